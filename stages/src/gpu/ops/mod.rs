//! One file an op: each function checks sizes and launches kernels of the same name.

pub mod adamw;
pub mod attention;
pub mod cast;
pub mod conv;
pub mod cross_entropy;
pub mod decode;
pub mod distance;
pub mod embed;
pub mod likelihood;
pub mod mlp;
pub mod norm;
pub mod orient;
pub mod reduce;
pub mod rope;
pub mod sample;
pub mod ssd;
pub mod ssm_step;
pub mod top_k;
