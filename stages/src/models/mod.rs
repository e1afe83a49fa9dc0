//! One `Model` for teachers, students and hybrids: configuration, parameters, blocks, files.

pub mod attention;
pub mod block;
pub mod config;
pub mod decode;
pub mod family;
pub mod file;
pub mod linear;
pub mod mixer;
pub mod mlp;
pub mod model;
pub mod norm;
pub mod params;
pub mod published;
pub mod ssm;
pub mod start;
pub mod transfer;

pub use block::{Block, Trained};
pub use config::{Biases, Config, Family, MixerKind, MlpKind, NormKind, Wiring};
pub use linear::Linear;
pub use mixer::{Mixer, Scene};
pub use model::{Keep, Model, Pass};
pub use norm::Norm;
pub use params::{Builder, Entry, Init, Layout, Params, Part, Slot, Span};
