//! One token of every sequence through the model: blocks in place over one residual stream, logits,
//! and the choice of what follows. Nothing here waits, so it can be recorded.

use anyhow::Result;
use half::bf16;

use super::memory::{Memory, heads};
use super::turns::Turns;
use super::{Room, attends};
use crate::gpu::gemm::{self, Mat};
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::model::attention::Attention;
use crate::gpu::model::block::{Block, Mixer};
use crate::gpu::model::mlp;
use crate::gpu::model::norm::Stats;
use crate::gpu::model::ssm::{self, Ssm};
use crate::gpu::model::whole::{Angles, Whole};
use crate::gpu::ops::attention as kv;
use crate::gpu::ops::decode as op;
use crate::gpu::ops::rope::{self, Positions};
use crate::gpu::ops::sample::{self, Choice};
use crate::gpu::ops::{embed, ssm_step};
use crate::gpu::phases::teacher::FROZEN;
use crate::gpu::weights::Frozen;
use crate::models::Model;

/// The model, what it remembers, and room for one token of every sequence.
pub struct Step {
    batch: usize,
    whole: Whole,
    embedding: Slice<bf16>,
    /// Keeps the parameters.
    _weights: Frozen,
    weight_bytes: usize,
    choice: Choice,
    /// Added to logits, `[vocab]`: the head's bias, and −∞ for tokens that nobody knows.
    bias_v: Option<Buf<f32>>,
    memory: Memory,
    turns: Turns,
    acts: Acts,
}

/// Activations, a row a sequence.
struct Acts {
    /// The residual stream.
    u_bd: Buf<bf16>,
    /// Normed.
    x_bd: Buf<bf16>,
    stats: Stats,
    attention: Option<AttentionActs>,
    ssm: Option<SsmActs>,
    into_bw: Option<Buf<bf16>>,
    act_bf: Buf<bf16>,
    logits_bv: Buf<f32>,
}

struct AttentionActs {
    angles: Angles,
    qkv_br: Buf<bf16>,
    ctx_bd: Buf<bf16>,
    /// Contexts of the parts of caches, and their sums.
    parts: [Buf<f32>; 2],
}

struct SsmActs {
    proj_br: Buf<bf16>,
    a_log_bh: Buf<f32>,
    gated_bd: Buf<bf16>,
}

impl AttentionActs {
    fn new(gpu: &Gpu, model: &Model, room: Room) -> Result<AttentionActs> {
        let (heads, what) = (heads(&model.config), "activations of attention");
        let splits = kv::splits(room.batch, heads, room.capacity);
        let [parts, sums] = kv::scratch(room.batch, heads, splits);
        Ok(AttentionActs {
            angles: Angles::new(gpu, model, room.capacity)?,
            qkv_br: gpu.alloc(what, room.batch * heads.row())?,
            ctx_bd: gpu.alloc(what, room.batch * heads.width())?,
            parts: [gpu.alloc(what, parts)?, gpu.alloc(what, sums)?],
        })
    }
}

impl SsmActs {
    fn new(gpu: &Gpu, mixer: &Ssm, batch: usize) -> Result<SsmActs> {
        let what = "activations of a mixer";
        Ok(SsmActs {
            proj_br: gpu.alloc(what, batch * mixer.rows)?,
            a_log_bh: gpu.alloc(what, batch * mixer.a_stride())?,
            gated_bd: gpu.alloc(what, batch * mixer.inner())?,
        })
    }
}

impl Acts {
    fn new(gpu: &Gpu, model: &Model, whole: &Whole, room: Room) -> Result<Acts> {
        let (config, batch, what) = (&model.config, room.batch, "activations of decoding");
        let ssm = whole.blocks.iter().find_map(|block| match &block.mixer {
            Mixer::Ssm(mixer) => Some(mixer),
            Mixer::Attention(_) => None,
        });
        let mlp = &whole.blocks[0].mlp;
        let into = mlp.keeps_into(false).then(|| gpu.alloc(what, batch * mlp.into.outputs));
        let attention = attends(config).then(|| AttentionActs::new(gpu, model, room));
        Ok(Acts {
            u_bd: gpu.alloc(what, batch * config.d_model)?,
            x_bd: gpu.alloc(what, batch * config.d_model)?,
            stats: whole.norm.stats(gpu, batch)?,
            attention: attention.transpose()?,
            ssm: ssm.map(|mixer| SsmActs::new(gpu, mixer, batch)).transpose()?,
            into_bw: into.transpose()?,
            act_bf: gpu.alloc(what, batch * mlp.ffn)?,
            logits_bv: gpu.alloc(what, batch * config.vocab)?,
        })
    }
}

/// What is added to logits, if anything is.
fn bias(gpu: &Gpu, model: &Model, params: &[f32], known: usize) -> Result<Option<Buf<f32>>> {
    let vocab = model.config.vocab;
    let mut bias_v = match model.head().b {
        Some(b) => b.of(params).to_vec(),
        None if known < vocab => vec![0.0; vocab],
        None => return Ok(None),
    };
    bias_v[known..].fill(f32::NEG_INFINITY);
    gpu.buf("what is added to logits", &bias_v).map(Some)
}

impl Step {
    /// See [`super::Decoder::new`].
    pub fn new(
        gpu: &Gpu,
        model: &Model,
        params: &[f32],
        room: Room,
        choice: Choice,
        known: usize,
    ) -> Result<Step> {
        let weights = Frozen::new(gpu, model, params)?;
        let whole = Whole::new(model, &weights.bank, FROZEN);
        // Of an embedding that is no head a few rows are read.
        let unread = if model.config.tied { 0 } else { model.embedding().len() };
        Ok(Step {
            batch: room.batch,
            embedding: weights.bank.half(model.embedding()),
            acts: Acts::new(gpu, model, &whole, room)?,
            whole,
            _weights: weights,
            weight_bytes: (model.layout.len() - unread) * size_of::<bf16>(),
            choice,
            bias_v: bias(gpu, model, params, known)?,
            memory: Memory::new(gpu, &model.config, room)?,
            turns: Turns::new(gpu, room)?,
        })
    }

    /// What sequences remember.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What they read and choose.
    pub fn turns(&self) -> &Turns {
        &self.turns
    }

    /// Whether any layer does.
    pub fn attends(&self) -> bool {
        attends(&self.whole.config)
    }

    /// Bytes of weights that a turn reads.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Queues one turn.
    pub fn queue(&self, gpu: &Gpu) {
        let Step { batch, whole, acts, turns, memory, .. } = self;
        let (config, now) = (&whole.config, turns.now());
        op::begin(gpu, turns.all(), now, config.separator);
        if let Some((layers, window, state)) = memory.states() {
            op::forget(gpu, layers, now.fresh, window, state);
        }
        let dims = (*batch, config.d_model, config.vocab);
        let (u_bd, x_bd) = (acts.u_bd.all(), acts.x_bd.all());
        embed::forward(gpu, dims, now.ids, self.embedding, u_bd);
        let (mut attentions, mut states) = (0, 0);
        for block in &whole.blocks {
            let at = match block.mixer {
                Mixer::Attention(_) => &mut attentions,
                Mixer::Ssm(_) => &mut states,
            };
            self.block(gpu, block, *at);
            *at += 1;
        }
        whole.norm.forward(gpu, *batch, u_bd, x_bd, &acts.stats);
        let (x, logits) = (Mat::new(x_bd, config.d_model), acts.logits_bv.all());
        gemm::linear_f32(gpu, "head", dims, x, whole.head.w, (logits, config.vocab));
        let (rows, bias) = ((*batch, config.vocab), self.bias_v.as_ref().map(Buf::all));
        sample::rows_f32(gpu, rows, (logits, bias), self.choice, now.chance, now.chosen);
        op::end(gpu, turns.all(), now);
    }

    /// One block, in place; its mixer is the `at`-th of its kind.
    fn block(&self, gpu: &Gpu, block: &Block, at: usize) {
        let (n, acts) = (self.batch, &self.acts);
        let (u_bd, x_bd) = (acts.u_bd.all(), acts.x_bd.all());
        let (u, x) = (Mat::new(u_bd, block.d), Mat::new(x_bd, block.d));
        block.norm1.forward(gpu, n, u_bd, x_bd, &acts.stats);
        match &block.mixer {
            Mixer::Attention(mixer) => self.attention(gpu, mixer, at, x, u),
            Mixer::Ssm(mixer) => self.ssm(gpu, mixer, at, x, u),
        }
        if let Some(norm) = block.norm2 {
            norm.forward(gpu, n, u_bd, x_bd, &acts.stats);
        }
        let into_nw = acts.into_bw.as_ref().map(Buf::all);
        let room = mlp::Acts { into_nw, act_nf: acts.act_bf.all() };
        block.mlp.forward(gpu, n, x, room, (u, u));
    }

    /// Adds the output for `x` to `u`.
    fn attention(&self, gpu: &Gpu, mixer: &Attention, at: usize, x: Mat, u: Mat) {
        let (n, heads, length) = (self.batch, mixer.heads, self.turns.now().length);
        let acts = self.acts.attention.as_ref().expect("there is room for attention");
        let (qkv, ctx) = (acts.qkv_br.all(), acts.ctx_bd.all());
        mixer.qkv.forward(gpu, "attention.qkv", n, (x, Mat::new(qkv, heads.row())), None);
        let rows = (qkv, heads.row());
        let positions = Positions { seq: 1, first: 0, before: Some((length, 1)) };
        rope::rope(gpu, rows, n, heads.query + heads.kv, acts.angles.all(), positions, false);
        let cache = self.memory.cache(at, length);
        kv::append(gpu, n, 1, heads, rows, cache);
        let parts = acts.parts.each_ref().map(Buf::all);
        kv::decode(gpu, n, heads, rows, (cache, 1), parts.into(), (ctx, heads.width()));
        let ctx = Mat::new(ctx, heads.width());
        mixer.o.forward(gpu, "attention.o", n, (ctx, u), Some(u));
    }

    /// Adds the output for `x` to `u`.
    fn ssm(&self, gpu: &Gpu, mixer: &Ssm, at: usize, x: Mat, u: Mat) {
        let n = self.batch;
        let acts = self.acts.ssm.as_ref().expect("there is room for a mixer");
        let (proj, a_log) = (acts.proj_br.all(), acts.a_log_bh.all());
        let gated = acts.gated_bd.all();
        // The convolution's output stays inside of the step.
        let to = ssm::Acts {
            proj_nr: proj,
            a_log_nh: a_log,
            xbc_nc: proj,
            y_nd: None,
            gated_nd: gated,
            states: None,
        };
        mixer.project(gpu, n, x, to, 0..mixer.a_at());
        mixer.project_a(gpu, n, x, to);
        let shape = ssm_step::Shape {
            batch: n,
            heads: mixer.heads,
            width: mixer.width,
            state: mixer.state,
            taps: mixer.taps,
            proj_stride: mixer.rows,
            a_stride: mixer.a_stride(),
        };
        let params = ssm_step::Params {
            w_ck: mixer.conv_w,
            bias_c: mixer.conv_b,
            d_h: mixer.d_h,
            z_bias: mixer.z_bias,
        };
        let state = self.memory.state(at, mixer);
        ssm_step::step(gpu, shape, (proj, a_log), params, state, gated);
        let gated = Mat::new(gated, mixer.inner());
        mixer.out.forward(gpu, "ssm.out", n, (gated, u), Some(u));
    }

    /// See [`super::Decoder::logits`].
    pub fn logits(&self, gpu: &Gpu) -> Result<Vec<f32>> {
        let mut logits_bv = gpu.download(self.acts.logits_bv.all())?;
        if let Some(bias_v) = &self.bias_v {
            let bias_v = gpu.download(bias_v.all())?;
            for row in logits_bv.chunks_mut(bias_v.len()) {
                row.iter_mut().zip(&bias_v).for_each(|(logit, bias)| *logit += bias);
            }
        }
        Ok(logits_bv)
    }
}
