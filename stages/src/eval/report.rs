//! The `metrics` artifact of an evaluation: sums over sequences turned into figures.

use serde::Serialize;

use super::matrices::Pair;
use super::probes::ProbeResults;
use super::score::{Agreement, Loss, median};
use super::tasks::results::{Average, TaskResult};
use crate::data::shard::Answer;

/// The whole artifact.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Metrics {
    /// Always `evaluation`.
    pub kind: &'static str,
    /// The model evaluated, on held-out text.
    pub student: Option<Figures>,
    /// The model it is compared with, on the same.
    pub teacher: Option<Figures>,
    /// Student against teacher, token by token.
    pub agreement: Option<AgreementFigures>,
    /// Student divided by teacher.
    pub ratios: Option<Ratios>,
    /// How far hidden states are apart after each block.
    pub layers: Vec<Layer>,
    /// Recall by the number of tokens between fact and answer.
    pub recall_by_distance: Vec<Bucket>,
    /// Mixing matrices beside attention.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matrices: Vec<Pair>,
    /// Benchmarks, in the order they were given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskResult>,
    /// Over the paper's benchmarks, if all were given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub average: Option<Average>,
    /// Probes of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probes: Option<ProbeResults>,
}

/// One model's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// exp of the mean loss.
    pub perplexity: f64,
    /// Mean −ln p of a token.
    pub nats: f64,
    /// Standard error of `nats`, over sequences.
    pub nats_se: Option<f64>,
    /// Tokens predicted.
    pub tokens: u64,
    /// Share of facts answered with every token likeliest.
    pub recall: Option<f64>,
    /// Standard error of `recall`.
    pub recall_se: Option<f64>,
    /// What guessing among the document's values of that kind scores.
    pub chance: Option<f64>,
    /// Facts asked for.
    pub answers: u64,
    /// Share of tokens of repeated lines that are likeliest.
    pub copy: Option<f64>,
    /// Tokens of repeated lines.
    pub copy_tokens: u64,
}

/// Agreement with the teacher.
#[derive(Clone, Debug, Serialize)]
pub struct AgreementFigures {
    /// Share of positions with the same likeliest token.
    pub top1: f64,
    /// Mean KL(teacher ‖ student), in nats.
    pub kl: f64,
}

/// Student divided by teacher.
#[derive(Clone, Debug, Serialize)]
pub struct Ratios {
    /// 1 is as good as the teacher, more is worse.
    pub perplexity: f64,
    /// 1 is as good as the teacher, less is worse.
    pub recall: Option<f64>,
    /// The same of copying.
    pub copy: Option<f64>,
}

/// Distances after one block: medians over tokens of ‖s − t‖ / ‖t‖.
#[derive(Clone, Debug, Serialize)]
pub struct Layer {
    /// 0-based.
    pub layer: usize,
    /// Over positions 1 and later.
    pub distance: Option<f64>,
    /// Over position 0, whose states are unlike all others.
    pub first: Option<f64>,
}

/// Recall over one range of distances.
#[derive(Clone, Debug, Serialize)]
pub struct Bucket {
    /// Least number of tokens between fact and answer.
    pub from: u32,
    /// One more than the most.
    pub to: u32,
    /// Facts asked for at such a distance.
    pub n: u64,
    /// The teacher's recall.
    pub teacher: Option<f64>,
    /// The student's recall.
    pub student: Option<f64>,
}

/// Six significant digits: what a person compares, and short to read.
pub(super) fn short(x: f64) -> f64 {
    format!("{x:.5e}").parse().unwrap_or(x)
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| short(part as f64 / whole as f64))
}

/// Whether every token of the answer was hit.
fn answered(hits: u32, answer: &Answer) -> bool {
    hits == answer.end - answer.start
}

impl Figures {
    /// From the losses of sequences, and the hits of each answer.
    pub fn of(losses: &[Loss], answers: &[Answer], hits: &[u32]) -> Figures {
        let tokens: u64 = losses.iter().map(|loss| loss.tokens).sum();
        let nats = losses.iter().map(|loss| loss.nats).sum::<f64>() / tokens.max(1) as f64;
        let scored = || answers.iter().zip(hits);
        let recall = || scored().filter(|(answer, _)| answer.copy == 0);
        let copy = || scored().filter(|(answer, _)| answer.copy != 0);
        let asked = recall().count() as u64;
        let right = recall().filter(|(answer, hits)| answered(**hits, answer)).count() as u64;
        let chance: f64 = recall().map(|(answer, _)| 1.0 / f64::from(answer.candidates)).sum();
        let copy_tokens = copy().map(|(answer, _)| u64::from(answer.end - answer.start)).sum();
        let p = right as f64 / asked.max(1) as f64;
        Figures {
            perplexity: short(nats.exp()),
            nats: short(nats),
            nats_se: standard_error(losses).map(short),
            tokens,
            recall: share(right, asked),
            recall_se: (asked > 0).then(|| short((p * (1.0 - p) / asked as f64).sqrt())),
            chance: (asked > 0).then(|| short(chance / asked as f64)),
            answers: asked,
            copy: share(copy().map(|(_, hits)| u64::from(*hits)).sum(), copy_tokens),
            copy_tokens,
        }
    }
}

/// Of the mean loss, taking sequences as independent.
fn standard_error(losses: &[Loss]) -> Option<f64> {
    let n = losses.len() as f64;
    if losses.len() < 2 {
        return None;
    }
    let mean_of = |loss: &Loss| loss.nats / loss.tokens.max(1) as f64;
    let mean = losses.iter().map(mean_of).sum::<f64>() / n;
    let variance = losses.iter().map(|l| (mean_of(l) - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Some((variance / n).sqrt())
}

impl AgreementFigures {
    /// From the sums of sequences.
    pub fn of(sums: &[Agreement]) -> AgreementFigures {
        let tokens = sums.iter().map(|sum| sum.tokens).sum::<u64>().max(1) as f64;
        let same = sums.iter().map(|sum| sum.same).sum::<u64>() as f64;
        let kl = sums.iter().map(|sum| sum.kl).sum::<f64>();
        AgreementFigures { top1: short(same / tokens), kl: short(kl / tokens) }
    }
}

impl Ratios {
    /// Student divided by teacher.
    pub fn of(student: &Figures, teacher: &Figures) -> Ratios {
        let ratio = |s: Option<f64>, t: Option<f64>| match (s, t) {
            (Some(s), Some(t)) if t > 0.0 => Some(short(s / t)),
            _ => None,
        };
        Ratios {
            perplexity: short((student.nats - teacher.nats).exp()),
            recall: ratio(student.recall, teacher.recall),
            copy: ratio(student.copy, teacher.copy),
        }
    }
}

impl Layer {
    /// From the distances at all positions of sequences of `seq` tokens, one after the other.
    pub fn of(layer: usize, distances: &[f32], seq: usize) -> Layer {
        let (mut first, mut rest) = (Vec::new(), Vec::new());
        for sequence in distances.chunks(seq) {
            first.push(sequence[0]);
            rest.extend_from_slice(&sequence[1..]);
        }
        Layer {
            layer,
            distance: median(&mut rest).map(short),
            first: median(&mut first).map(short),
        }
    }
}

/// Recall by distance, in buckets of powers of two; empty buckets are left out.
pub fn by_distance(answers: &[Answer], student: &[u32], teacher: Option<&[u32]>) -> Vec<Bucket> {
    let mut buckets = Vec::new();
    let mut from = 0;
    while from < 1 << 30 {
        let to = (from * 2).max(4);
        let near = |answer: &Answer| {
            answer.copy == 0 && (from..to).contains(&(answer.start - answer.fact_end))
        };
        let n = answers.iter().filter(|answer| near(answer)).count() as u64;
        let right = |hits: &[u32]| {
            let pairs = answers.iter().zip(hits);
            pairs.filter(|(answer, hits)| near(answer) && answered(**hits, answer)).count() as u64
        };
        if n > 0 {
            buckets.push(Bucket {
                from,
                to,
                n,
                teacher: teacher.and_then(|hits| share(right(hits), n)),
                student: share(right(student), n),
            });
        }
        from = to;
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(copy: u32, distance: u32, length: u32, candidates: u32) -> Answer {
        Answer {
            sequence: 0,
            start: 2 + distance,
            end: 2 + distance + length,
            fact_start: 0,
            fact_end: 2,
            candidates,
            copy,
            document: 0,
        }
    }

    #[test]
    fn recall_needs_every_token_and_copying_counts_each() {
        let answers = [answer(0, 3, 2, 2), answer(0, 9, 1, 4), answer(1, 5, 4, 128)];
        let loss = |nats| Loss { nats, tokens: 10 };
        let figures = Figures::of(&[loss(10.0), loss(30.0)], &answers, &[1, 1, 3]);
        assert_eq!((figures.recall, figures.answers), (Some(0.5), 2));
        assert_eq!((figures.copy, figures.copy_tokens), (Some(0.75), 4));
        assert_eq!((figures.chance, figures.nats, figures.nats_se), (Some(0.375), 2.0, Some(1.0)));
        let buckets = by_distance(&answers, &[1, 1, 3], Some(&[2, 0, 0]));
        let flat: Vec<_> =
            buckets.iter().map(|b| (b.from, b.to, b.n, b.student, b.teacher)).collect();
        let (no, yes) = (Some(0.0), Some(1.0));
        assert_eq!(flat, [(0, 4, 1, no, yes), (8, 16, 1, yes, no)]);
    }

    #[test]
    fn without_answers_there_is_no_recall() {
        let figures = Figures::of(&[Loss { nats: 7.0, tokens: 7 }], &[], &[]);
        assert_eq!((figures.recall, figures.copy, figures.chance), (None, None, None));
        assert_eq!(figures.nats_se, None);
    }

    #[test]
    fn position_0_is_kept_apart() {
        let layer = Layer::of(3, &[9.0, 0.5, 0.5, 7.0, 0.25, 0.25], 3);
        assert_eq!((layer.distance, layer.first), (Some(0.375), Some(8.0)));
    }
}
