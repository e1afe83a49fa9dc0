//! A whole model: embedding, blocks, norm, head; and the activations of one pass over one shard.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result};
use engine::tensors::Tensors;

use super::block::{self, Block, Trained};
use super::config::Config;
use super::file;
use super::linear::Linear;
use super::mixer::Scene;
use super::norm::Norm;
use super::params::{Builder, Init, Layout, Params, Part, Slot};
use crate::ops::rope::Table;
use crate::ops::{Dims, embed};

/// Structure of a model: where every parameter lies, not its value.
pub struct Model {
    /// Sizes and kinds.
    pub config: Config,
    /// Names and places of all parameters.
    pub layout: Arc<Layout>,
    /// The blocks, first to last.
    pub blocks: Vec<Block>,
    embedding: Slot,
    norm: Norm,
    head: Linear,
    rope: [OnceLock<Table>; TABLES],
}

/// Rotary tables are made when they are first needed, the i-th for `FIRST_TABLE << i` positions.
const FIRST_TABLE: usize = 1024;
/// So that the last one is for 2²² positions.
const TABLES: usize = 13;

/// Activations of one shard, made once and used for every update.
pub struct Pass {
    dims: Dims,
    /// Tokens of the shard.
    pub tokens_n: Vec<u32>,
    /// See [`crate::ops`]: where each token's document starts.
    pub starts_n: Vec<u32>,
    /// Residual stream before block `l`; the last one is after the last block, un-normed.
    pub hidden: Vec<Vec<f32>>,
    /// One a block, or one a kind of mixer that blocks use in turn when nothing goes back.
    saved: Vec<block::Saved>,
    /// Which of them each block uses.
    saved_of: Vec<usize>,
    scratch: Option<block::Scratch>,
    final_nd: Vec<f32>,
    final_inv_n: Vec<f32>,
    d_final_nd: Vec<f32>,
    d_nd: Vec<f32>,
}

/// What a [`Pass`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Forward only: blocks share their buffers, and no attention matrix is whole.
    Nothing,
    /// The same with whole attention matrices, for whoever observes them.
    Matrices,
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
        let norm = Norm::declare(&config, names.norm, Part::FinalNorm, &mut builder);
        let head = declare_head(&config, embedding, &mut builder);
        let rope = [const { OnceLock::new() }; TABLES];
        Ok(Model { layout: builder.finish(), blocks, embedding, norm, head, rope, config })
    }

    /// The embedding.
    pub fn embedding(&self) -> Slot {
        self.embedding
    }

    /// The norm before the head.
    pub fn final_norm(&self) -> Norm {
        self.norm
    }

    /// The head.
    pub fn head(&self) -> Linear {
        self.head
    }

    /// Rotary tables for at least `positions`.
    pub fn rope(&self, positions: usize) -> &Table {
        let size = |i: usize| FIRST_TABLE << i;
        let at = (0..TABLES).find(|i| size(*i) >= positions);
        let at = at.expect("sequences are limited to 2²² tokens");
        self.rope[at].get_or_init(|| Table::new(0, size(at), &self.config.rope()))
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
        // First, so that a lying configuration is an error and no huge allocation.
        file::check(&model.layout, tensors, |_| true)?;
        let mut params = Params::zeros(&model.layout);
        file::load(&mut params, tensors, |_| true)?;
        Ok((model, params))
    }

    /// Buffers for shards of `dims`.
    pub fn pass(&self, dims: Dims, keep: Keep) -> Pass {
        let (n, d) = (dims.tokens(), self.config.d_model);
        let back = keep == Keep::Backward;
        let saved_of: Vec<usize> = match back {
            true => (0..self.blocks.len()).collect(),
            false => self.first_of_kind(),
        };
        let users = (0..self.blocks.len()).filter(|layer| saved_of[*layer] == *layer);
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
            saved: users
                .clone()
                .map(|layer| self.blocks[layer].saved(dims, keep != Keep::Nothing))
                .collect(),
            saved_of: saved_of
                .iter()
                .map(|of| users.clone().take_while(|u| u < of).count())
                .collect(),
            scratch,
            final_nd: vec![0.0; n * d],
            final_inv_n: vec![0.0; n],
            d_final_nd: wide(back),
            d_nd: wide(back),
        }
    }

    /// For each block, the first one with its kind of mixer.
    fn first_of_kind(&self) -> Vec<usize> {
        let layers = &self.config.layers;
        layers.iter().map(|kind| layers.iter().position(|k| k == kind).unwrap_or(0)).collect()
    }

    /// What mixers see of a pass.
    pub fn scene<'a>(&'a self, dims: Dims, starts_n: &'a [u32]) -> Scene<'a> {
        Scene { dims, starts_n, rope: self.rope(dims.seq) }
    }

    /// Runs [`Pass::tokens_n`] through all blocks and the final norm; `observe` sees every block's
    /// buffers right after it ran (layer number, its input, its own buffers).
    pub fn forward(
        &self,
        params: &[f32],
        pass: &mut Pass,
        observe: impl FnMut(usize, &[f32], &block::Saved),
    ) {
        self.forward_blocks(params, pass, self.blocks.len(), observe);
        let last = pass.hidden.last().expect("one more than blocks");
        self.norm.forward(params, last, &mut pass.final_nd, &mut pass.final_inv_n);
    }

    /// The same through the first `count` blocks only, for whoever wants nothing of the others.
    pub fn forward_blocks(
        &self,
        params: &[f32],
        pass: &mut Pass,
        count: usize,
        mut observe: impl FnMut(usize, &[f32], &block::Saved),
    ) {
        let Pass { dims, tokens_n, starts_n, hidden, saved, saved_of, .. } = pass;
        document_starts(self.config.separator, dims.seq, tokens_n, starts_n);
        embed::forward(self.config.d_model, tokens_n, self.embedding.of(params), &mut hidden[0]);
        let scene = self.scene(*dims, starts_n);
        for (layer, block) in self.blocks.iter().enumerate().take(count) {
            let (before, after) = hidden.split_at_mut(layer + 1);
            let saved = &mut saved[saved_of[layer]];
            block.forward(params, scene, &before[layer], &mut after[0], saved);
            observe(layer, &before[layer], saved);
        }
    }

    /// Logits of the tokens `rows` of a pass that ran forward, `[rows, vocab]`, into `logits_nv`.
    pub fn logits(&self, params: &[f32], pass: &Pass, rows: Range<usize>, logits_nv: &mut [f32]) {
        let d = self.config.d_model;
        let x = &pass.final_nd[rows.start * d..rows.end * d];
        self.head.forward(params, rows.len(), x, logits_nv);
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
        let (n, d) = (rows.len(), self.config.d_model);
        let span = rows.start * d..rows.end * d;
        let d_final_nd = &mut pass.d_final_nd[span.clone()];
        self.head.backward_input(params, n, d_logits_nv, d_final_nd);
        let wanted = if self.config.tied { trained.embedding } else { trained.head };
        if wanted {
            self.head.backward_weight(n, d_logits_nv, &pass.final_nd[span], grads);
        }
    }

    /// From the gradients that [`Model::head_backward`] took in to those of all `trained`
    /// parameters, added to `grads`.
    pub fn backward(&self, params: &[f32], pass: &mut Pass, trained: Trained, grads: &mut [f32]) {
        let Pass { dims, tokens_n, starts_n, hidden, saved, .. } = pass;
        let scratch = pass.scratch.as_mut().expect("a pass that keeps nothing cannot go back");
        let d_nd = &mut pass.d_nd;
        let last = hidden.last().expect("one more than blocks");
        d_nd.fill(0.0);
        let own = trained.norms.then_some(&mut *grads);
        self.norm.backward(params, &pass.d_final_nd, (last, &pass.final_inv_n), d_nd, own);
        let scene = self.scene(*dims, starts_n);
        let first = trained.first_block(&self.config.layers);
        for (layer, block) in self.blocks.iter().enumerate().skip(first).rev() {
            let (u, saved) = (&hidden[layer], &mut saved[layer]);
            block.backward(params, scene, u, d_nd, saved, scratch, trained, grads);
        }
        if trained.embedding {
            let table = self.embedding.of_mut(grads);
            embed::backward(self.config.d_model, tokens_n, d_nd, table);
        }
    }
}

/// The head: the embedding's rows when tied, else `lm_head.weight`; maybe with a bias.
fn declare_head(config: &Config, embedding: Slot, builder: &mut Builder) -> Linear {
    let std = Init::Normal(config.init_std());
    let (d, v) = (config.d_model, config.vocab);
    let w = match config.tied {
        true => embedding,
        false => builder.matrix("lm_head.weight".into(), v, d, Part::Head, std),
    };
    let bias = |builder: &mut Builder| {
        builder.column("lm_head.bias".into(), v, Part::Head, Init::Constant(0.0))
    };
    Linear { w, b: config.bias.head.then(|| bias(builder)) }
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
