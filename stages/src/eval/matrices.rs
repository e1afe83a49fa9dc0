//! A few of the student's mixing matrices beside the teacher's attention, to be looked at: the first
//! tokens of the first held-out sequence, every student's layer on the teacher's own input of it, as
//! in phase 1. Computed on the CPU: it is one short pass.

use anyhow::{Result, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::report::short;
use super::runner::Loaded;
use crate::data::shard::TokenShard;
use crate::models::{Keep, Mixer, MixerKind, mixer, model::document_starts};
use crate::ops::Dims;

/// Which matrices are kept beside the figures, as pictures of the report.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Pictures {
    /// Numbers of layers, from 0; when empty the first, the middle and the last that were replaced.
    pub layers: Vec<usize>,
    /// Numbers of heads, from 0.
    pub heads: Vec<usize>,
    /// Tokens of each matrix, from the start of the text; 0 for no pictures.
    pub tokens: usize,
}

/// Biggest matrix that is still a picture.
const TOKENS_MAX: usize = 128;
/// Most pairs that are kept.
const PAIRS_MAX: usize = 24;

impl Default for Pictures {
    fn default() -> Pictures {
        Pictures { layers: Vec::new(), heads: vec![0, 1], tokens: 48 }
    }
}

/// Both matrices of one head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// 0-based.
    pub layer: usize,
    /// 0-based.
    pub head: usize,
    /// ‖M − A‖_F / ‖A‖_F of these tokens.
    pub distance: f64,
    /// Rows of the lower triangle of A, in thousandths.
    pub teacher: Vec<String>,
    /// Rows of the lower triangle of M with its skip, in thousandths.
    pub student: Vec<String>,
}

impl Pictures {
    /// What is wrong with the parameters, by name.
    pub fn check(&self) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        if self.tokens > TOKENS_MAX {
            wrong.push(("pictures.tokens".into(), format!("must be at most {TOKENS_MAX}")));
        }
        if self.heads.len().max(1) * self.layers.len() > PAIRS_MAX {
            let text = format!("that is more than {PAIRS_MAX} pictures");
            wrong.push(("pictures.layers".into(), text));
        }
        wrong
    }

    /// The matrices; none if the models have other sizes or no layer was replaced.
    pub fn of(&self, student: &Loaded, teacher: &Loaded, shard: &TokenShard) -> Result<Vec<Pair>> {
        let (s, t) = (&student.model.config, &teacher.model.config);
        let same = (s.layers.len(), s.d_model, s.heads) == (t.layers.len(), t.d_model, t.heads);
        let tokens = self.tokens.min(shard.seq());
        let replaced: Vec<usize> = (0..s.layers.len())
            .filter(|&l| s.layers[l] == MixerKind::Ssm)
            .filter(|&l| t.layers.get(l) == Some(&MixerKind::Attention))
            .collect();
        if tokens == 0 || !same || replaced.is_empty() {
            return Ok(Vec::new());
        }
        let layers = self.layers(&replaced)?;
        let heads: Vec<usize> = self.heads.iter().copied().filter(|&h| h < s.heads).collect();
        ensure!(!heads.is_empty(), "`pictures.heads`: the model has heads 0 to {}", s.heads - 1);
        Ok(pairs(student, teacher, &first(shard, tokens), (&layers, &heads)))
    }

    fn layers(&self, replaced: &[usize]) -> Result<Vec<usize>> {
        if let Some(odd) = self.layers.iter().find(|layer| !replaced.contains(layer)) {
            bail!("`pictures.layers`: layer {odd} is none in which attention was replaced");
        }
        let n = replaced.len();
        let mut layers = match self.layers.is_empty() {
            true => vec![replaced[0], replaced[n / 2], replaced[n - 1]],
            false => self.layers.clone(),
        };
        layers.sort_unstable();
        layers.dedup();
        Ok(layers)
    }
}

fn first(shard: &TokenShard, tokens: usize) -> Vec<u32> {
    let all = shard.tokens(0);
    (0..tokens).map(|at| all.get(at)).collect()
}

/// One pass of the teacher; the student's mixers run beside it.
fn pairs(
    student: &Loaded,
    teacher: &Loaded,
    tokens: &[u32],
    (layers, heads): (&[usize], &[usize]),
) -> Vec<Pair> {
    let dims = Dims { batch: 1, seq: tokens.len() };
    let mut pass = teacher.model.pass(dims, Keep::Matrices);
    pass.tokens_n.copy_from_slice(tokens);
    let mut starts_n = vec![0; tokens.len()];
    let separator = student.model.config.separator;
    document_starts(separator, dims.seq, tokens, &mut starts_n);
    let scene = student.model.scene(dims, &starts_n);
    let (flat, count) = (&student.params.flat, layers.last().map_or(0, |last| last + 1));
    let mut found = Vec::new();
    teacher.model.forward_blocks(
        &teacher.params.flat,
        &mut pass,
        count,
        |layer, u_nd, of_teacher| {
            let block = &student.model.blocks[layer];
            let (true, Mixer::Ssm(ssm)) = (layers.contains(&layer), &block.mixer) else { return };
            let Some(attention) = of_teacher.mixer.attention() else { return };
            let mut saved = block.saved(dims, false);
            block.forward_mixer(flat, scene, u_nd, &mut saved);
            let mixer::Saved::Ssm(mixed) = &saved.mixer else { return };
            for &head in heads {
                let size = dims.seq * dims.seq;
                let a = &attention.probs_bhll[head * size..][..size];
                let m = ssm.matrix(flat, dims, (0, head), mixed);
                found.push(pair((layer, head), a, &m, dims.seq));
            }
        },
    );
    found
}

fn pair((layer, head): (usize, usize), a: &[f32], m: &[f32], seq: usize) -> Pair {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let apart: f64 = a.iter().zip(m).map(|(a, m)| square(m - a)).sum();
    let size: f64 = a.iter().map(|a| square(*a)).sum();
    let distance = short((apart / size.max(1e-12)).sqrt());
    Pair { layer, head, distance, teacher: triangle(a, seq), student: triangle(m, seq) }
}

/// Rows of the lower triangle in thousandths, a text each: a picture shows no more.
fn triangle(full: &[f32], seq: usize) -> Vec<String> {
    let row = |(l, row): (usize, &[f32])| {
        let words: Vec<String> =
            row[..=l].iter().map(|x| format!("{}", (f64::from(*x) * 1e3).round() as i64)).collect();
        words.join(" ")
    };
    full.chunks_exact(seq).enumerate().map(row).collect()
}
