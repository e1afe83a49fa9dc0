//! Evaluation on the device: what one or two models say of the tokens of held-out text, and of
//! tokens that are asked for after some positions. Knows no benchmark; see [`crate::eval`].
//!
//! Logits are bf16, their log-sum-exps f32; for every token a few numbers come back to the host.

use anyhow::Result;
use half::bf16;

use super::teacher::FROZEN;
use crate::gpu::batch::Batch;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::model::Scene;
use crate::gpu::model::whole::{Angles, Forward, Whole, check, rows};
use crate::gpu::ops::cross_entropy::{self, Rows};
use crate::gpu::ops::{cast, distance, likelihood};
use crate::gpu::weights::Bank;
use crate::models::Model;
use crate::ops::Dims;

/// A model with its parameters on the device.
pub type Placed<'a> = (&'a Model, &'a Bank);

/// One model's buffers, for passes of any shape that has no more tokens.
struct Side {
    forward: Forward,
    angles: Angles,
    batch: Batch,
    separator: Option<u32>,
}

impl Side {
    /// For at most `tokens` in sequences of at most `seq`.
    fn new(gpu: &Gpu, (model, bank): Placed, tokens: usize, seq: usize) -> Result<Side> {
        check(&model.config)?;
        let dims = Dims { batch: 1, seq: tokens };
        Ok(Side {
            forward: Forward::new(gpu, Whole::new(model, bank, FROZEN), dims, 1)?,
            angles: Angles::new(gpu, model, seq)?,
            batch: Batch::new(gpu, dims)?.with_targets()?,
            separator: model.config.separator,
        })
    }

    fn send(&mut self, dims: Dims, tokens_n: &[u32]) -> Result<()> {
        self.batch.reshape(dims);
        let seq = dims.seq;
        self.batch.send(self.separator, false, |i, out| {
            out.copy_from_slice(&tokens_n[i * seq..][..seq]);
        })
    }

    fn scene(&self) -> Scene {
        let (dims, starts_n) = (self.batch.dims(), self.batch.starts_n());
        Scene { dims, starts_n, rope: self.angles.all() }
    }

    fn vocab(&self) -> usize {
        self.forward.whole.config.vocab
    }

    fn layers(&self) -> usize {
        self.forward.whole.blocks.len()
    }

    /// Logits without their bias, and the bias.
    fn logits(
        &self,
        gpu: &Gpu,
        final_nd: Slice<bf16>,
        rows: std::ops::Range<usize>,
        to: &Buf<bf16>,
    ) -> (Slice<bf16>, Option<Slice<f32>>) {
        let to = to.all().range(0..rows.len() * self.vocab());
        self.forward.whole.logits(gpu, final_nd, rows, to);
        (to, self.forward.whole.head.full_b)
    }
}

/// What is said of every token of a batch of text. Of a sequence's last token nothing is asked: there
/// [`Said::ln_p`] is 0.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// Of each model: ln p of the token that follows.
    pub ln_p: Vec<Vec<f32>>,
    /// Of each model: whether that token is the likeliest.
    pub first: Vec<Vec<bool>>,
    /// KL of the second model's next tokens from the first's, if there are two.
    pub kl_n: Vec<f64>,
    /// Whether both find the same token likeliest.
    pub same_n: Vec<bool>,
    /// After each block: ‖s − t‖ / ‖t‖, if hidden states are compared.
    pub distances: Vec<Vec<f32>>,
}

/// Runs one model or two, the student and then its teacher, over text.
pub struct Text {
    gpu: Gpu,
    sides: Vec<Side>,
    logits: Vec<Buf<bf16>>,
    ln_p: Vec<Buf<f32>>,
    first: Vec<Buf<u8>>,
    /// Cross-entropy and entropy of each token.
    soft_n2: Buf<f32>,
    same_n: Buf<u8>,
    /// Distances of each layer and token, and the teacher's norms.
    distances: Option<[Buf<f32>; 2]>,
    rows: usize,
}

impl Text {
    /// For batches of at most `dims`. `hidden`: whether hidden states are compared; both models must
    /// have the same sizes.
    pub fn new(gpu: &Gpu, models: &[Placed], dims: Dims, hidden: bool) -> Result<Text> {
        let n = dims.tokens();
        let sides = models.iter().map(|model| Side::new(gpu, *model, n, dims.seq));
        let sides: Vec<Side> = sides.collect::<Result<_>>()?;
        let (v, layers) = (sides[0].vocab(), sides[0].layers());
        let rows = rows(v, n);
        let each = 0..sides.len();
        let logits = each.clone().map(|_| gpu.alloc("logits", rows * v));
        let ln_p = each.clone().map(|_| gpu.alloc("likelihoods", n));
        let first = each.map(|_| gpu.alloc("likelihoods", n));
        let apart = || gpu.alloc("distances", layers * n);
        Ok(Text {
            gpu: gpu.clone(),
            logits: logits.collect::<Result<_>>()?,
            ln_p: ln_p.collect::<Result<_>>()?,
            first: first.collect::<Result<_>>()?,
            soft_n2: gpu.alloc("cross-entropies", 2 * n)?,
            same_n: gpu.alloc("first choices", n)?,
            distances: if hidden { Some([apart()?, apart()?]) } else { None },
            sides,
            rows,
        })
    }

    /// What the models say of `tokens_n`.
    pub fn run(&mut self, dims: Dims, tokens_n: &[u32]) -> Result<Said> {
        self.sides.iter_mut().try_for_each(|side| side.send(dims, tokens_n))?;
        let n = dims.tokens();
        self.forward(n);
        for first in (0..n).step_by(self.rows) {
            self.judge(first..n.min(first + self.rows));
        }
        self.read(n)
    }

    fn forward(&self, n: usize) {
        let Text { gpu, sides, distances, .. } = self;
        let Some([distance_ln, norm_ln]) = distances else {
            return sides.iter().for_each(|s| s.forward.all(gpu, s.scene(), &s.batch));
        };
        sides.iter().for_each(|s| s.forward.begin(gpu, &s.batch));
        for layer in 0..sides[0].layers() {
            let out = |side: &Side| side.forward.block(gpu, side.scene(), layer).1;
            let pair = (out(&sides[0]), out(&sides[1]));
            let at = |of: &Buf<f32>| Some(of.all().range(layer * n..(layer + 1) * n));
            let dims = (n, sides[0].forward.whole.config.d_model);
            distance::distances(gpu, dims, pair, at(distance_ln), at(norm_ln), None);
        }
        sides.iter().for_each(|s| s.forward.end(gpu, s.scene()));
    }

    fn judge(&self, chunk: std::ops::Range<usize>) {
        let Text { gpu, sides, .. } = self;
        let (v, rows) = (sides[0].vocab(), chunk.len());
        let mut logits = Vec::new();
        for (i, side) in sides.iter().enumerate() {
            let final_nd = side.forward.final_nd.all();
            let own = side.logits(gpu, final_nd, chunk.clone(), &self.logits[i]);
            let targets_n = side.batch.targets_n().range(chunk.clone());
            let out = self.ln_p[i].all().range(chunk.clone());
            let first = self.first[i].all().range(chunk.clone());
            likelihood::pick(gpu, (rows, v), own, targets_n, out, first);
            logits.push(own);
        }
        if let [student, teacher] = logits[..] {
            let at = Rows { rows, v, weight: 0.0, factor: None, learn: false };
            let out = self.soft_n2.all().range(2 * chunk.start..2 * chunk.end);
            cross_entropy::soft(gpu, at, student, teacher, None, None, out);
            likelihood::same(gpu, (rows, v), student, teacher, self.same_n.all().range(chunk));
        }
    }

    fn read(&self, n: usize) -> Result<Said> {
        let gpu = &self.gpu;
        let yes = |of: &Buf<u8>| -> Result<Vec<bool>> {
            Ok(gpu.download(of.all().range(0..n))?.into_iter().map(|byte| byte != 0).collect())
        };
        let ln_p = self.ln_p.iter().map(|of| gpu.download(of.all().range(0..n)));
        let mut said = Said {
            ln_p: ln_p.collect::<Result<_>>()?,
            first: self.first.iter().map(yes).collect::<Result<_>>()?,
            ..Said::default()
        };
        if self.sides.len() == 2 {
            let pairs = gpu.download(self.soft_n2.all().range(0..2 * n))?;
            let apart = |pair: &[f32]| f64::from(pair[0]) - f64::from(pair[1]);
            said.kl_n = pairs.chunks_exact(2).map(apart).collect();
            said.same_n = yes(&self.same_n)?;
        }
        if let Some([distance_ln, norm_ln]) = &self.distances {
            let len = self.sides[0].layers() * n;
            let distances = gpu.download(distance_ln.all().range(0..len))?;
            let norms = gpu.download(norm_ln.all().range(0..len))?;
            let relative = |(e, t): (&f32, &f32)| e / t.max(1e-12);
            let all: Vec<f32> = distances.iter().zip(&norms).map(relative).collect();
            said.distances = all.chunks_exact(n).map(<[f32]>::to_vec).collect();
        }
        Ok(said)
    }
}

/// Asks one model for tokens after some positions of its inputs.
pub struct Asker {
    gpu: Gpu,
    side: Side,
    gathered: Buf<bf16>,
    logits: Buf<bf16>,
    index: Buf<u32>,
    targets: Buf<u32>,
    ln_p: Buf<f32>,
    first: Buf<u8>,
    rows: usize,
}

impl Asker {
    /// For passes of at most `tokens` in sequences of at most `seq`.
    pub fn new(gpu: &Gpu, model: Placed, tokens: usize, seq: usize) -> Result<Asker> {
        let side = Side::new(gpu, model, tokens, seq)?;
        let (v, d) = (side.vocab(), side.forward.whole.config.d_model);
        let rows = rows(v, tokens);
        Ok(Asker {
            gpu: gpu.clone(),
            side,
            gathered: gpu.alloc("hidden states", rows * d)?,
            logits: gpu.alloc("logits", rows * v)?,
            index: gpu.alloc("rows asked after", rows)?,
            targets: gpu.alloc("tokens asked for", rows)?,
            ln_p: gpu.alloc("likelihoods", rows)?,
            first: gpu.alloc("likelihoods", rows)?,
            rows,
        })
    }

    /// Of each of `asked` (a row of `tokens_n` and a token): ln p of the token after that row, and
    /// whether it is the likeliest.
    pub fn run(
        &mut self,
        dims: Dims,
        tokens_n: &[u32],
        asked: &[(u32, u32)],
    ) -> Result<Vec<(f32, bool)>> {
        self.side.send(dims, tokens_n)?;
        let Asker { gpu, side, gathered, .. } = self;
        side.forward.all(gpu, side.scene(), &side.batch);
        let d = side.forward.whole.config.d_model;
        let final_nd = side.forward.final_nd.all();
        let mut found = Vec::with_capacity(asked.len());
        for part in asked.chunks(self.rows) {
            let (rows, targets): (Vec<u32>, Vec<u32>) = part.iter().copied().unzip();
            let n = part.len();
            let (index, to) = (self.index.all().range(0..n), self.targets.all().range(0..n));
            gpu.upload(index, &rows);
            gpu.upload(to, &targets);
            cast::gather_rows(gpu, d, (final_nd, d), index, (gathered.all(), d));
            let logits = side.logits(gpu, gathered.all(), 0..n, &self.logits);
            let (ln_p, first) = (self.ln_p.all().range(0..n), self.first.all().range(0..n));
            likelihood::pick(gpu, (n, side.vocab()), logits, to, ln_p, first);
            let pairs = gpu.download(ln_p)?.into_iter().zip(gpu.download(first)?);
            found.extend(pairs.map(|(ln_p, first)| (ln_p, first != 0)));
        }
        gpu.status()?;
        Ok(found)
    }
}
