//! A whole model: embedding, blocks, norm, head; and the activations of one pass over one shard.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use engine::tensors::Tensors;

use super::block::{self, Block, Trained};
use super::config::Config;
use super::file;
use super::mixer::Scene;
use super::params::{Builder, Init, Layout, Params, Part, Slot};
use crate::ops::gemm::{Mat, gemm, linear, linear_dw};
use crate::ops::rope::Table;
use crate::ops::{Dims, embed, norm};

/// Structure of a model: where every parameter lies, not its value.
pub struct Model {
    /// Sizes and kinds.
    pub config: Config,
    /// Names and places of all parameters.
    pub layout: Arc<Layout>,
    /// The blocks, first to last.
    pub blocks: Vec<Block>,
    embedding: Slot,
    norm: Slot,
    head: Slot,
    rope: Arc<Table>,
}

/// Longest sequence for which rotary tables are made.
const POSITIONS: usize = 8192;

/// Activations of one shard, made once and used for every update.
pub struct Pass {
    dims: Dims,
    /// Tokens of the shard.
    pub tokens_n: Vec<u32>,
    /// See [`crate::ops`]: where each token's document starts.
    pub starts_n: Vec<u32>,
    /// Residual stream before block `l`; the last one is after the last block, un-normed.
    pub hidden: Vec<Vec<f32>>,
    /// One a block, or a single one that all blocks use in turn when nothing goes back.
    saved: Vec<block::Saved>,
    scratch: Option<block::Scratch>,
    final_nd: Vec<f32>,
    final_inv_n: Vec<f32>,
    d_final_nd: Vec<f32>,
    d_nd: Vec<f32>,
}

/// What a [`Pass`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Forward only: blocks share their buffers.
    Nothing,
    /// Forward and backward.
    Backward,
}

impl Model {
    /// The structure for `config`, or what is wrong with it.
    pub fn new(config: Config) -> Result<Model> {
        config.check()?;
        let names = config.names();
        let mut builder = Builder::default();
        let (d, v) = (config.d_model, config.vocab);
        let std = Init::Normal(config.init_std());
        let embedding = builder.matrix(names.embedding.into(), v, d, Part::Embedding, std);
        let block = |layer| {
            let prefix = format!("{}{layer}.", names.layers);
            Block::declare(&config, layer, &prefix, &mut builder)
        };
        let blocks: Vec<Block> = (0..config.layers.len()).map(block).collect();
        let one = Init::Constant(1.0);
        let norm = builder.vector(names.norm.into(), d, Part::FinalNorm, one);
        let head = match config.tied {
            true => embedding,
            false => builder.matrix("lm_head.weight".into(), v, d, Part::Head, std),
        };
        let rope = Arc::new(Table::new(POSITIONS, config.head_dim, config.rope_theta));
        Ok(Model { layout: builder.finish(), blocks, embedding, norm, head, rope, config })
    }

    /// Fresh weights; a tensor's values depend on `seed` and its name alone.
    pub fn init(&self, seed: u64) -> Params {
        Params::random(&self.layout, seed)
    }

    /// Writes `params` under their published names; the configuration goes along as metadata.
    pub fn save(&self, path: &Path, params: &Params) -> Result<()> {
        let config = serde_json::to_string(&self.config)?;
        let metadata = BTreeMap::from([("config".to_string(), config)]);
        file::save(path, params, &metadata, |_| true)
    }

    /// A model file that [`Model::save`] wrote.
    pub fn load(tensors: &Tensors) -> Result<(Model, Params)> {
        let text =
            tensors.metadata("config").context("the file has no `config` in its metadata")?;
        let config = serde_json::from_str(text).context("the file's `config` cannot be read")?;
        let model = Model::new(config)?;
        let mut params = Params::zeros(&model.layout);
        file::load(&mut params, tensors, |_| true)?;
        Ok((model, params))
    }

    /// Buffers for shards of `dims`.
    pub fn pass(&self, dims: Dims, keep: Keep) -> Pass {
        assert!(dims.seq <= POSITIONS, "sequences are limited to {POSITIONS} tokens");
        let (n, d) = (dims.tokens(), self.config.d_model);
        let back = keep == Keep::Backward;
        let count = if back { self.blocks.len() } else { 1 };
        let scratch = back.then(|| {
            let mut scratch = self.blocks[0].scratch(dims);
            self.blocks.iter().for_each(|block| block.reserve(dims, &mut scratch));
            scratch
        });
        let wide = |on: bool| vec![0.0; if on { n * d } else { 0 }];
        Pass {
            dims,
            tokens_n: vec![0; n],
            starts_n: vec![0; n],
            hidden: (0..=self.blocks.len()).map(|_| vec![0.0; n * d]).collect(),
            saved: self.blocks[..count].iter().map(|block| block.saved(dims)).collect(),
            scratch,
            final_nd: vec![0.0; n * d],
            final_inv_n: vec![0.0; n],
            d_final_nd: wide(back),
            d_nd: wide(back),
        }
    }

    /// What mixers see of a pass.
    pub fn scene<'a>(&'a self, dims: Dims, starts_n: &'a [u32]) -> Scene<'a> {
        Scene { dims, starts_n, rope: &self.rope }
    }

    /// Runs [`Pass::tokens_n`] through all blocks and the final norm; `observe` sees every block's
    /// buffers right after it ran (layer number, its input, its own buffers).
    pub fn forward(
        &self,
        params: &[f32],
        pass: &mut Pass,
        mut observe: impl FnMut(usize, &[f32], &block::Saved),
    ) {
        let Pass { dims, tokens_n, starts_n, hidden, saved, .. } = pass;
        document_starts(self.config.separator, dims.seq, tokens_n, starts_n);
        embed::forward(self.config.d_model, tokens_n, self.embedding.of(params), &mut hidden[0]);
        let scene = Scene { dims: *dims, starts_n, rope: &self.rope };
        let shared = saved.len() < self.blocks.len();
        for (layer, block) in self.blocks.iter().enumerate() {
            let (before, after) = hidden.split_at_mut(layer + 1);
            let saved = &mut saved[if shared { 0 } else { layer }];
            block.forward(params, scene, &before[layer], &mut after[0], saved);
            observe(layer, &before[layer], saved);
        }
        let last = hidden.last().expect("one more than blocks");
        let eps = self.config.norm_eps as f32;
        norm::forward(last, self.norm.of(params), eps, &mut pass.final_nd, &mut pass.final_inv_n);
    }

    /// Logits of the tokens `rows` of a pass that ran forward, `[rows, vocab]`, into `logits_nv`.
    pub fn logits(&self, params: &[f32], pass: &Pass, rows: Range<usize>, logits_nv: &mut [f32]) {
        let d = self.config.d_model;
        let x = &pass.final_nd[rows.start * d..rows.end * d];
        linear(rows.len(), d, self.config.vocab, x, self.head.of(params), logits_nv);
    }

    /// Takes in the gradient of the logits of `rows`. Every row must come before
    /// [`Model::backward`].
    pub fn head_backward(
        &self,
        params: &[f32],
        pass: &mut Pass,
        rows: Range<usize>,
        d_logits_nv: &[f32],
        trained: Trained,
        grads: &mut [f32],
    ) {
        let (n, d, v) = (rows.len(), self.config.d_model, self.config.vocab);
        let span = rows.start * d..rows.end * d;
        let d_logits = Mat::new(d_logits_nv, n, v, v);
        let weight = Mat::new(self.head.of(params), v, d, d);
        gemm(&mut pass.d_final_nd[span.clone()], d, 0.0, 1.0, d_logits, weight);
        let wanted = if self.config.tied { trained.embedding } else { trained.head };
        if wanted {
            linear_dw(n, d, v, d_logits_nv, &pass.final_nd[span], self.head.of_mut(grads));
        }
    }

    /// From the gradients that [`Model::head_backward`] took in to those of all `trained`
    /// parameters, added to `grads`.
    pub fn backward(&self, params: &[f32], pass: &mut Pass, trained: Trained, grads: &mut [f32]) {
        let Pass { dims, tokens_n, starts_n, hidden, saved, .. } = pass;
        let scratch = pass.scratch.as_mut().expect("a pass that keeps nothing cannot go back");
        let (d_nd, weight) = (&mut pass.d_nd, self.norm.of(params));
        let last = hidden.last().expect("one more than blocks");
        d_nd.fill(0.0);
        let d_w = trained.norms.then(|| self.norm.of_mut(grads));
        norm::backward(&pass.d_final_nd, last, weight, &pass.final_inv_n, d_nd, d_w);
        let scene = Scene { dims: *dims, starts_n, rope: &self.rope };
        for (layer, block) in self.blocks.iter().enumerate().rev() {
            let (u, saved) = (&hidden[layer], &mut saved[layer]);
            block.backward(params, scene, u, d_nd, saved, scratch, trained, grads);
        }
        if trained.embedding {
            let table = self.embedding.of_mut(grads);
            embed::backward(self.config.d_model, tokens_n, d_nd, table);
        }
    }
}

impl Pass {
    /// Batch and length.
    pub fn dims(&self) -> Dims {
        self.dims
    }
}

/// Fills `starts_n` from the separators in `tokens_n`, see [`Config::separator`].
pub fn document_starts(separator: Option<u32>, seq: usize, tokens_n: &[u32], starts_n: &mut [u32]) {
    for (tokens, starts) in tokens_n.chunks(seq).zip(starts_n.chunks_mut(seq)) {
        let mut start = 0;
        for (i, (token, to)) in tokens.iter().zip(starts).enumerate() {
            if Some(*token) == separator {
                start = i as u32;
            }
            *to = start;
        }
    }
}
