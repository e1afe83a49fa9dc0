//! A whole model on the device: embedding, blocks, norm, head; one pass forward, one back.

use std::ops::Range;

use anyhow::{Result, ensure};
use half::bf16;

use super::Scene;
use super::acts::Acts;
use super::block::Block;
use super::linear::Linear;
use super::norm::{Norm, Stats};
use super::room::Room;
use crate::gpu::batch::Batch;
use crate::gpu::fault::OutOfDeviceMemory;
use crate::gpu::gemm::{self, Epilogue, Mat};
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::ops::{embed, rope};
use crate::gpu::weights::Bank;
use crate::models::{Config, MixerKind, Model, Trained};
use crate::ops::Dims;

/// Bytes of logits that exist at a time, for each of teacher and student: so many that the head's
/// gradient, which every chunk reads and writes, costs little beside them.
const LOGIT_BYTES: usize = 1 << 30;

/// Structure and places of a model.
pub struct Whole {
    /// Sizes and kinds.
    pub config: Config,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// The norm before the head.
    pub norm: Norm,
    /// The head.
    pub head: Linear,
    embedding: Slice<bf16>,
    d_embedding: Option<Slice<f32>>,
    trained: Trained,
}

/// Refuses models whose sizes kernels are not made for.
pub fn check(config: &Config) -> Result<()> {
    let eights = [("d_model", config.d_model), ("ffn", config.ffn), ("vocab", config.vocab)];
    for (name, value) in eights {
        ensure!(
            value.is_multiple_of(8),
            "`{name}` is {value}, but on a GPU it must be a multiple of 8; set `device: cpu`"
        );
    }
    ensure!(
        [32, 64, 128].contains(&config.head_dim),
        "heads are {} wide, but on a GPU they must be 32, 64 or 128; set `device: cpu`",
        config.head_dim
    );
    ensure!(
        !config.layers.contains(&MixerKind::Ssm) || [16, 32, 64, 128].contains(&config.d_state),
        "`d_state` is {}, but on a GPU it must be 16, 32, 64 or 128; set `device: cpu`",
        config.d_state
    );
    ensure!(config.d_conv <= 8, "`d_conv` is at most 8 on a GPU; set `device: cpu`");
    Ok(())
}

/// Tokens whose logits exist at a time.
pub fn rows(vocab: usize, tokens: usize) -> usize {
    (LOGIT_BYTES / 2 / vocab / 256 * 256).max(256).min(tokens)
}

/// Angles on the device.
pub struct Angles {
    cos: Buf<f32>,
    sin: Buf<f32>,
    dim: usize,
    rotary: usize,
}

impl Angles {
    /// Those of `model` for `positions`.
    pub fn new(gpu: &Gpu, model: &Model, positions: usize) -> Result<Angles> {
        let (config, table) = (&model.config, model.rope(positions));
        let rotary = config.rotary_dim.unwrap_or(config.head_dim);
        let part = |values: &[f32]| gpu.buf("angles", &values[..positions * rotary / 2]);
        let (cos, sin) = (part(table.cos_lp())?, part(table.sin_lp())?);
        Ok(Angles { cos, sin, dim: config.head_dim, rotary })
    }

    /// As ops take them.
    pub fn all(&self) -> rope::Table {
        let (cos, sin) = (self.cos.all(), self.sin.all());
        rope::Table { cos, sin, dim: self.dim, rotary: self.rotary }
    }
}

impl Whole {
    /// `model` with the parameters in `bank`.
    pub fn new(model: &Model, bank: &Bank, trained: Trained) -> Whole {
        let config = model.config.clone();
        let head_trained = if config.tied { trained.embedding } else { trained.head };
        Whole {
            blocks: model
                .blocks
                .iter()
                .map(|block| Block::new(block, &config, bank, trained))
                .collect(),
            norm: Norm::new(model.final_norm(), bank, trained.norms),
            head: Linear::new(model.head(), bank, head_trained),
            embedding: bank.half(model.embedding()),
            d_embedding: trained.embedding.then(|| bank.grad(model.embedding())).flatten(),
            config,
            trained,
        }
    }

    fn dims(&self, n: usize) -> (usize, usize, usize) {
        (n, self.config.d_model, self.config.vocab)
    }

    /// `hidden_nd` of the batch's tokens.
    pub fn embed(&self, gpu: &Gpu, batch: &Batch, hidden_nd: Slice<bf16>) {
        let dims = self.dims(batch.dims().tokens());
        embed::forward(gpu, dims, batch.tokens_n(), self.embedding, hidden_nd);
    }

    /// Logits of some rows of the normed last hidden state, without the head's bias.
    pub fn logits(&self, gpu: &Gpu, final_nd: Slice<bf16>, rows: Range<usize>, to: Slice<bf16>) {
        let (n, d, v) = self.dims(rows.len());
        let x = Mat::new(final_nd.range(rows.start * d..rows.end * d), d);
        gemm::linear(
            gpu,
            "head",
            (n, d, v),
            (x, Mat::new(to, v)),
            self.head.w,
            (None, Epilogue::None),
        );
    }
}

/// A pass of a model that only goes forward: blocks share their buffers.
pub struct Forward {
    /// The model.
    pub whole: Whole,
    /// Normed last hidden state, of a pass through all blocks.
    pub final_nd: Buf<bf16>,
    /// One more than `turns`, used in turn, and of the blocks' buffers `turns` a kind of mixer: what
    /// a block read and made stays until `turns` more blocks ran.
    hidden: Vec<Buf<bf16>>,
    acts: Vec<(MixerKind, Vec<Acts>)>,
    turns: usize,
    stats: Stats,
}

impl Forward {
    /// Buffers for `dims`, so that what a block made stays while `turns - 1` others run.
    pub fn new(gpu: &Gpu, whole: Whole, dims: Dims, turns: usize) -> Result<Forward> {
        let len = dims.tokens() * whole.config.d_model;
        let wide = || gpu.alloc::<bf16>("hidden states", len);
        let mut acts: Vec<(MixerKind, Vec<Acts>)> = Vec::new();
        for (kind, block) in whole.config.layers.iter().zip(&whole.blocks) {
            if acts.iter().all(|(of, _)| of != kind) {
                let some = (0..turns).map(|_| Acts::new(gpu, block, dims, false));
                acts.push((*kind, some.collect::<Result<_>>()?));
            }
        }
        let hidden = (0..=turns).map(|_| wide()).collect::<Result<_>>()?;
        let stats = whole.norm.stats(gpu, dims.tokens())?;
        Ok(Forward { whole, final_nd: wide()?, hidden, acts, turns, stats })
    }

    /// Embeds the tokens of `batch`, which the first block reads.
    pub fn begin(&self, gpu: &Gpu, batch: &Batch) {
        self.whole.embed(gpu, batch, self.hidden[0].all());
    }

    fn place(&self, layer: usize) -> (Slice<bf16>, Slice<bf16>, &Acts) {
        let [from, to] = [layer, layer + 1].map(|at| self.hidden[at % (self.turns + 1)].all());
        let kind = self.whole.config.layers[layer];
        let (_, acts) = self.acts.iter().find(|(of, _)| *of == kind).expect("some a kind");
        (from, to, &acts[layer % self.turns])
    }

    /// Block `layer`, after those before it: its input, output and buffers.
    pub fn block(
        &self,
        gpu: &Gpu,
        scene: Scene,
        layer: usize,
    ) -> (Slice<bf16>, Slice<bf16>, &Acts) {
        let (from, to, acts) = self.place(layer);
        self.whole.blocks[layer].forward(gpu, scene, from, to, acts);
        (from, to, acts)
    }

    /// Norm and mixer of block `layer` alone; the output is not made.
    pub fn mixer(
        &self,
        gpu: &Gpu,
        scene: Scene,
        layer: usize,
    ) -> (Slice<bf16>, Slice<bf16>, &Acts) {
        let (from, to, acts) = self.place(layer);
        self.whole.blocks[layer].forward_mixer(gpu, scene, from, acts);
        (from, to, acts)
    }

    /// The norm after all blocks, into [`Forward::final_nd`].
    pub fn end(&self, gpu: &Gpu, scene: Scene) {
        let last = self.hidden[self.whole.blocks.len() % (self.turns + 1)].all();
        self.whole.norm.forward(gpu, scene.dims.tokens(), last, self.final_nd.all(), &self.stats);
    }

    /// Through the first `count` blocks; `observe` sees number, input, output and buffers of each.
    pub fn blocks(
        &self,
        gpu: &Gpu,
        scene: Scene,
        batch: &Batch,
        count: usize,
        mut observe: impl FnMut(usize, Slice<bf16>, Slice<bf16>, &Acts),
    ) {
        self.begin(gpu, batch);
        for layer in 0..count {
            let (from, to, acts) = self.block(gpu, scene, layer);
            observe(layer, from, to, acts);
        }
    }

    /// Through all blocks and the norm, into [`Forward::final_nd`].
    pub fn all(&self, gpu: &Gpu, scene: Scene, batch: &Batch) {
        self.blocks(gpu, scene, batch, self.whole.blocks.len(), |_, _, _, _| {});
        self.end(gpu, scene);
    }
}

/// What a pass that goes back keeps of its blocks. The bits are the same.
enum Kept {
    /// All activations of all blocks.
    Everything(Vec<Acts>),
    /// Only what enters the blocks; one set of activations a kind of mixer serves all, and the way
    /// back forms them again (a third more work).
    Inputs(Vec<(MixerKind, Acts)>),
}

/// A pass of a model that also goes back.
pub struct Pass {
    /// The model.
    pub whole: Whole,
    /// Normed last hidden state.
    pub final_nd: Buf<bf16>,
    d_final_nd: Buf<bf16>,
    d_nd: Buf<bf16>,
    hidden: Vec<Buf<bf16>>,
    acts: Kept,
    stats: Stats,
    room: Room,
    embed_partials: Buf<f32>,
}

impl Kept {
    /// Everything, if there is room.
    fn new(gpu: &Gpu, whole: &Whole, dims: Dims) -> Result<Kept> {
        let all = whole.blocks.iter().map(|block| Acts::new(gpu, block, dims, true));
        match all.collect::<Result<_>>() {
            Ok(all) => Ok(Kept::Everything(all)),
            Err(error) if error.is::<OutOfDeviceMemory>() => Kept::inputs(gpu, whole, dims),
            Err(error) => Err(error),
        }
    }

    fn inputs(gpu: &Gpu, whole: &Whole, dims: Dims) -> Result<Kept> {
        let mut kinds: Vec<(MixerKind, Acts)> = Vec::new();
        for (kind, block) in whole.config.layers.iter().zip(&whole.blocks) {
            if kinds.iter().all(|(of, _)| of != kind) {
                kinds.push((*kind, Acts::new(gpu, block, dims, true)?));
            }
        }
        Ok(Kept::Inputs(kinds))
    }
}

impl Pass {
    /// Buffers for `dims`.
    pub fn new(gpu: &Gpu, whole: Whole, dims: Dims) -> Result<Pass> {
        let (n, d) = (dims.tokens(), whole.config.d_model);
        let wide = || gpu.alloc::<bf16>("hidden states", n * d);
        let hidden = (0..=whole.blocks.len()).map(|_| wide()).collect::<Result<_>>()?;
        let room = Room::new(gpu, whole.blocks.iter(), dims, Some(&whole.head))?;
        let (final_nd, d_final_nd, d_nd) = (wide()?, wide()?, wide()?);
        let embed_partials = gpu.alloc("partial sums", embed::partial(n, d))?;
        // Last, so that what is left decides.
        let acts = Kept::new(gpu, &whole, dims)?;
        Ok(Pass {
            final_nd,
            d_final_nd,
            d_nd,
            hidden,
            acts,
            stats: whole.norm.stats(gpu, n)?,
            room,
            embed_partials,
            whole,
        })
    }

    fn last(&self) -> Slice<bf16> {
        self.hidden.last().expect("one more than blocks").all()
    }

    /// Through all blocks and the norm, into [`Pass::final_nd`].
    pub fn forward(&self, gpu: &Gpu, scene: Scene, batch: &Batch) {
        self.whole.embed(gpu, batch, self.hidden[0].all());
        for layer in 0..self.whole.blocks.len() {
            self.forward_block(gpu, scene, layer);
        }
        let n = scene.dims.tokens();
        self.whole.norm.forward(gpu, n, self.last(), self.final_nd.all(), &self.stats);
    }

    fn forward_block(&self, gpu: &Gpu, scene: Scene, layer: usize) {
        let (u, out) = (self.hidden[layer].all(), self.hidden[layer + 1].all());
        self.whole.blocks[layer].forward(gpu, scene, u, out, self.acts(layer));
    }

    fn acts(&self, layer: usize) -> &Acts {
        match &self.acts {
            Kept::Everything(all) => &all[layer],
            Kept::Inputs(kinds) => {
                let kind = self.whole.config.layers[layer];
                &kinds.iter().find(|(of, _)| *of == kind).expect("one a kind").1
            }
        }
    }

    /// Whether the way back forms activations again since there is no room to keep them.
    pub fn recomputes(&self) -> bool {
        matches!(self.acts, Kept::Inputs(_))
    }

    /// Takes in the gradient of the logits of `rows`; every row must come before
    /// [`Pass::backward`].
    pub fn head_backward(&self, gpu: &Gpu, rows: Range<usize>, d_logits_nv: Slice<bf16>) {
        let Whole { config, head, .. } = &self.whole;
        let (n, d) = (rows.len(), config.d_model);
        let span = rows.start * d..rows.end * d;
        let dy = Mat::new(d_logits_nv, config.vocab);
        let dx = Mat::new(self.d_final_nd.all().range(span.clone()), d);
        head.backward_input(gpu, "head.dx", n, (dy, dx), false);
        let x = Mat::new(self.final_nd.all().range(span), d);
        head.backward_weight(gpu, "head.dw", n, (dy, x), &self.room);
    }

    /// From the gradients that [`Pass::head_backward`] took in to those of all that is trained.
    pub fn backward(&self, gpu: &Gpu, scene: Scene, batch: &Batch) {
        let (n, whole) = (scene.dims.tokens(), &self.whole);
        let (d_final, d_nd) = (self.d_final_nd.all(), self.d_nd.all());
        let seen = (self.last(), &self.stats);
        whole.norm.backward(gpu, n, d_final, None, seen, None, d_nd, &self.room);
        let first = whole.trained.first_block(&whole.config.layers);
        for layer in (first..whole.blocks.len()).rev() {
            if self.recomputes() {
                self.forward_block(gpu, scene, layer);
            }
            let (block, acts) = (&whole.blocks[layer], self.acts(layer));
            block.backward(gpu, scene, self.hidden[layer].all(), d_nd, acts, &self.room);
        }
        if let Some(d_w) = whole.d_embedding {
            let ids = (batch.tokens_n(), batch.order_n());
            let partials = self.embed_partials.all();
            embed::backward(gpu, whole.dims(n), ids, d_nd, partials, d_w);
        }
    }
}
