//! What Phi-Mamba (`core_input`) and Llamba (`ssm_cfg`) say of a Discrete Mamba-2 mixer.

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::models::config::Config;

/// The arguments of the published mixer, with its defaults, in the order of the published files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Core {
    d_state: usize,
    n_v_heads: usize,
    n_qk_heads: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    d_conv: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    conv_bias: Option<bool>,
    expand: usize,
    chunk_size: usize,
    activation: String,
    bias: bool,
}

impl Default for Core {
    fn default() -> Core {
        Core {
            d_state: 64,
            n_v_heads: 32,
            n_qk_heads: 32,
            d_conv: None,
            conv_bias: None,
            expand: 1,
            chunk_size: 128,
            activation: "identity".into(),
            bias: false,
        }
    }
}

impl Core {
    /// That of `config`; `whole` says the convolution also where it is the default.
    pub fn of(config: &Config, whole: bool) -> Core {
        let expand = match config.d_inner() % config.d_model {
            0 => config.d_inner() / config.d_model,
            _ => 1, // Then `head_dim` is one of the words of ours.
        };
        Core {
            d_state: config.d_state,
            n_v_heads: config.heads,
            n_qk_heads: config.heads,
            d_conv: (whole || config.d_conv != 4).then_some(config.d_conv),
            conv_bias: whole.then_some(true),
            expand,
            chunk_size: config.chunk,
            activation: "identity".into(),
            bias: false,
        }
    }

    /// Refuses what is computed otherwise here, and sets the sizes of `config`, whose `d_model` is
    /// set. `head_dim` says that words of ours give the width of a head.
    pub fn apply(&self, config: &mut Config, head_dim: bool) -> Result<()> {
        ensure!(
            self.activation == "identity",
            "`activation` is `{}`; the mixer here has none after its convolution (`identity`)",
            self.activation
        );
        ensure!(!self.bias, "`bias` is true; projections with a bias are not built");
        ensure!(self.conv_bias != Some(false), "`conv_bias` is false; it is built with one only");
        ensure!(
            self.n_qk_heads == self.n_v_heads,
            "`n_qk_heads` is {} and `n_v_heads` is {}; only equal numbers are built",
            self.n_qk_heads,
            self.n_v_heads
        );
        let inner = config.d_model.checked_mul(self.expand).context("`expand` is too large")?;
        let heads = self.n_v_heads;
        ensure!(heads > 0, "`n_v_heads` is 0");
        ensure!(
            head_dim || inner.is_multiple_of(heads),
            "`expand` {} times `d_model` {} is {inner}, which is no multiple of `n_v_heads` {heads}",
            self.expand,
            config.d_model
        );
        config.heads = heads;
        config.kv_heads = heads;
        config.head_dim = inner / heads;
        config.d_state = self.d_state;
        config.d_conv = self.d_conv.unwrap_or(4);
        config.chunk = self.chunk_size;
        Ok(())
    }
}
