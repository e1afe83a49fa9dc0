//! The same model in plain candle operations with candle's own gradients, in f64: slow, obvious,
//! and what every hand-written backward pass is compared with.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail};
use candle_core::{D, DType, Device, Tensor, Var};

use stages::models::config::{Config, MixerKind, MlpKind, NormKind, Wiring};
use stages::models::model::{Model, document_starts};
use stages::models::params::Params;
use stages::ops::Dims;
use stages::ops::cross_entropy::IGNORE;

/// A model whose tensors are candle variables, by published name.
pub struct Reference<'a> {
    model: &'a Model,
    vars: HashMap<String, Var>,
    device: Device,
}

/// What [`Reference::forward`] gives.
pub struct Out {
    /// h_0 to h_L, `[batch, seq, d_model]`; the last one un-normed.
    pub hidden: Vec<Tensor>,
    /// A of every layer, `[batch, head, seq, seq]`.
    pub attention: Vec<Tensor>,
    /// `[batch, seq, vocab]`.
    pub logits: Tensor,
}

impl<'a> Reference<'a> {
    /// Copies `params` into variables.
    pub fn new(model: &'a Model, params: &Params) -> Result<Reference<'a>> {
        let device = Device::Cpu;
        let mut vars = HashMap::new();
        for file in model.layout.files() {
            let values: Vec<f64> =
                params.flat[file.range.clone()].iter().map(|v| f64::from(*v)).collect();
            let tensor = Tensor::from_vec(values, file.shape.clone(), &device)?;
            vars.insert(file.name.clone(), Var::from_tensor(&tensor)?);
        }
        Ok(Reference { model, vars, device })
    }

    /// The variable called `name`.
    pub fn var(&self, name: &str) -> Result<&Tensor> {
        Ok(self.vars.get(name).with_context(|| format!("no tensor `{name}`"))?.as_tensor())
    }

    /// `{name}.weight`, and `{name}.bias` if the model has it.
    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let y = x.broadcast_matmul(&self.var(&format!("{name}.weight"))?.t()?)?;
        match self.vars.get(&format!("{name}.bias")) {
            Some(bias) => Ok(y.broadcast_add(bias.as_tensor())?),
            None => Ok(y),
        }
    }

    /// The norm whose tensors begin with `prefix`.
    fn norm(&self, x: &Tensor, prefix: &str) -> Result<Tensor> {
        let layer = self.model.config.norm == NormKind::Layer;
        let x = match layer {
            true => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
            false => x.clone(),
        };
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + self.model.config.norm_eps)?.sqrt()?;
        let y = x.broadcast_div(&root)?.broadcast_mul(self.var(&format!("{prefix}weight"))?)?;
        match layer {
            true => Ok(y.broadcast_add(self.var(&format!("{prefix}bias"))?)?),
            false => Ok(y),
        }
    }

    fn mlp(&self, x: &Tensor, prefix: &str) -> Result<Tensor> {
        let of = |x: &Tensor, name: &str| self.linear(x, &format!("{prefix}mlp.{name}"));
        match self.model.config.mlp {
            MlpKind::Swiglu => of(&(silu(&of(x, "gate_proj")?)? * of(x, "up_proj")?)?, "down_proj"),
            MlpKind::Gelu => of(&gelu(&of(x, "fc1")?)?, "fc2"),
        }
    }

    /// Everything for `tokens_n`.
    pub fn forward(&self, dims: Dims, tokens_n: &[u32]) -> Result<Out> {
        let config = &self.model.config;
        let names = config.names();
        let mut starts = vec![0; tokens_n.len()];
        document_starts(config.separator, dims.seq, tokens_n, &mut starts);
        let mask = mask(dims, &starts, &self.device)?;
        let ids = Tensor::from_slice(tokens_n, tokens_n.len(), &self.device)?;
        let shape = (dims.batch, dims.seq, config.d_model);
        let mut x = self.var(names.embedding)?.index_select(&ids, 0)?.reshape(shape)?;
        let (mut hidden, mut attention) = (vec![x.clone()], Vec::new());
        for (layer, kind) in config.layers.iter().enumerate() {
            let prefix = format!("{}{layer}.", names.layers);
            let n1 = self.norm(&x, &format!("{prefix}input_layernorm."))?;
            let (mixed, a) = match kind {
                MixerKind::Attention => {
                    self.attention(dims, &config.mixer_prefix(layer), &n1, &mask)?
                }
                MixerKind::Ssm => bail!("the reference has no `ssm` mixer"),
            };
            attention.push(a);
            let m = (&x + mixed)?;
            let n2 = match config.wiring {
                Wiring::Sequential => {
                    self.norm(&m, &format!("{prefix}post_attention_layernorm."))?
                }
                Wiring::Parallel => n1,
            };
            x = (m + self.mlp(&n2, &prefix)?)?;
            hidden.push(x.clone());
        }
        let head =
            if config.tied { names.embedding.trim_end_matches(".weight") } else { "lm_head" };
        let logits = self.linear(&self.norm(&x, names.norm)?, head)?;
        Ok(Out { hidden, attention, logits })
    }

    fn attention(
        &self,
        dims: Dims,
        prefix: &str,
        x: &Tensor,
        mask: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let config = &self.model.config;
        let heads = |name: &str, count: usize, turn: bool| -> Result<Tensor> {
            let y = self.linear(x, &format!("{prefix}{name}_proj"))?;
            let y = y.reshape((dims.batch, dims.seq, count, config.head_dim))?.transpose(1, 2)?;
            let y = if turn { rope(&y, config)? } else { y.contiguous()? };
            let (group, flat) = (config.heads / count, config.heads);
            let shape = (dims.batch, count, group, dims.seq, config.head_dim);
            let y = y.unsqueeze(2)?.broadcast_as(shape)?.contiguous()?;
            Ok(y.reshape((dims.batch, flat, dims.seq, config.head_dim))?)
        };
        let q = heads("q", config.heads, true)?;
        let k = heads("k", config.kv_heads, true)?;
        let v = heads("v", config.kv_heads, false)?;
        let scores = (q.matmul(&k.t()?)? / (config.head_dim as f64).sqrt())?;
        let scores = scores.broadcast_add(mask)?;
        let largest = scores.max_keepdim(D::Minus1)?.detach();
        let powers = scores.broadcast_sub(&largest)?.exp()?;
        let a = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?;
        let context = a.matmul(&v)?.transpose(1, 2)?.contiguous()?;
        let context = context.reshape((dims.batch, dims.seq, config.d_inner()))?;
        Ok((self.linear(&context, &format!("{prefix}{}", config.out_name()))?, a))
    }

    /// Mean cross-entropy over the targets that are scored.
    pub fn loss(&self, logits: &Tensor, targets_n: &[u32]) -> Result<Tensor> {
        let v = self.model.config.vocab;
        let logits = logits.reshape((targets_n.len(), v))?;
        let largest = logits.max_keepdim(1)?.detach();
        let shifted = logits.broadcast_sub(&largest)?;
        let log_sum = shifted.exp()?.sum_keepdim(1)?.log()?;
        let scored = targets_n.iter().filter(|t| **t != IGNORE).count() as f64;
        let mut pick = vec![0.0; targets_n.len() * v];
        for (i, target) in targets_n.iter().enumerate().filter(|(_, t)| **t != IGNORE) {
            pick[i * v + *target as usize] = 1.0 / scored;
        }
        let pick = Tensor::from_vec(pick, (targets_n.len(), v), &self.device)?;
        Ok((log_sum.broadcast_sub(&shifted)? * pick)?.sum_all()?)
    }

    /// Gradients of the scalar `loss` in the layout of the model; zero where nothing flows.
    pub fn gradients(&self, loss: &Tensor) -> Result<Params> {
        let store = loss.backward()?;
        let mut grads = Params::zeros(&self.model.layout);
        for file in self.model.layout.files() {
            if let Some(grad) = store.get(self.var(&file.name)?) {
                let values = grad.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                grads.flat[file.range.clone()].copy_from_slice(&values);
            }
        }
        Ok(grads)
    }
}

fn silu(x: &Tensor) -> Result<Tensor> {
    Ok((x / (x.neg()?.exp()? + 1.0)?)?)
}

fn gelu(x: &Tensor) -> Result<Tensor> {
    let inner = ((x + (x.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
    Ok(((x * 0.5)? * (inner.tanh()? + 1.0)?)?)
}

/// Zero where a position may look, -1e30 elsewhere, `[batch, 1, seq, seq]`.
fn mask(dims: Dims, starts: &[u32], device: &Device) -> Result<Tensor> {
    let seq = dims.seq;
    let cell = |i: usize| {
        let (token, key) = (i / seq, i % seq);
        let seen = key <= token % seq && key >= starts[token] as usize;
        if seen { 0.0 } else { -1e30f64 }
    };
    let values: Vec<f64> = (0..dims.tokens() * seq).map(cell).collect();
    Ok(Tensor::from_vec(values, (dims.batch, 1, seq, seq), device)?)
}

fn rope(x: &Tensor, config: &Config) -> Result<Tensor> {
    let (_, _, seq, dim) = x.dims4()?;
    let rotary = config.rotary_dim.unwrap_or(dim);
    let half = rotary / 2;
    let angle = |i: usize| {
        let frequency = config.rope_theta.powf(-2.0 * (i % half) as f64 / rotary as f64);
        (i / half) as f64 * frequency
    };
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f64> = (0..seq * half).map(|i| f(angle(i))).collect();
        Tensor::from_vec(values, (seq, half), x.device())
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let rest = x.narrow(D::Minus1, rotary, dim - rotary)?;
    Ok(Tensor::cat(&[&low, &high, &rest], D::Minus1)?)
}
