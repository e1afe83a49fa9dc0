//! Cross-entropy over rows of logits, with hard or soft targets; logits become their gradient in
//! place. Callers go through the vocabulary head in chunks of rows, so logits never exist whole.

use super::vector::{exp_sum, exp_sums, max, scale, sum_of, vectorised};

/// Target of a row that is not scored.
pub const IGNORE: u32 = u32::MAX;

/// The sum over scored rows of `-log softmax(logits)[target]`; `logits_nv` becomes
/// `weight · (softmax - onehot)`, zero in rows that are not scored.
pub fn hard(v: usize, logits_nv: &mut [f32], targets_n: &[u32], weight: f32) -> f64 {
    assert_eq!(logits_nv.len(), targets_n.len() * v, "shapes differ");
    vectorised(|| {
        let mut loss = 0.0;
        for (row, target) in logits_nv.chunks_exact_mut(v).zip(targets_n) {
            if *target == IGNORE {
                row.fill(0.0);
                continue;
            }
            let target = *target as usize;
            let (shift, logit) = (max(row), row[target]);
            let sum = exp_sum(row, shift);
            loss += f64::from(shift - logit) + f64::from(sum).ln();
            scale(row, weight / sum);
            row[target] -= weight;
        }
        loss
    })
}

/// `-log softmax(logits)[target]` of every row into `nll_n`; logits are lost.
pub fn nll(v: usize, logits_nv: &mut [f32], targets_n: &[u32], nll_n: &mut [f32]) {
    assert_eq!(logits_nv.len(), targets_n.len() * v, "shapes differ");
    vectorised(|| {
        let rows = logits_nv.chunks_exact_mut(v).zip(targets_n);
        for ((row, target), nll) in rows.zip(nll_n) {
            if *target == IGNORE {
                *nll = 0.0;
                continue;
            }
            let (shift, logit) = (max(row), row[*target as usize]);
            *nll = (f64::from(shift - logit) + f64::from(exp_sum(row, shift)).ln()) as f32;
        }
    });
}

/// What [`soft`] sums up over scored rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Soft {
    /// `-Σ p log q`.
    pub cross_entropy: f64,
    /// `-Σ p log p`, the least it can be.
    pub entropy: f64,
}

/// Soft cross-entropy of `logits_nv` (q) against the teacher's `teacher_nv` (p), over rows where
/// `scored_n` holds; `logits_nv` becomes `weight · (q - p)`, zero elsewhere. The teacher's logits
/// become p.
pub fn soft(
    v: usize,
    logits_nv: &mut [f32],
    teacher_nv: &mut [f32],
    scored_n: &[bool],
    weight: f32,
) -> Soft {
    assert_eq!(logits_nv.len(), scored_n.len() * v, "shapes differ");
    assert_eq!(logits_nv.len(), teacher_nv.len(), "shapes differ");
    vectorised(|| {
        let mut total = Soft::default();
        let rows = logits_nv.chunks_exact_mut(v).zip(teacher_nv.chunks_exact_mut(v));
        for ((student, teacher), scored) in rows.zip(scored_n) {
            if !scored {
                student.fill(0.0);
                continue;
            }
            let (s_max, t_max) = (max(student), max(teacher));
            let (t_sum, weighted) = exp_sums(teacher, t_max);
            scale(teacher, 1.0 / t_sum);
            let cross = sum_of(student, teacher, |s, p| p * (s - s_max));
            let q_sum = exp_sum(student, s_max);
            total.cross_entropy += f64::from(q_sum).ln() - f64::from(cross);
            total.entropy += f64::from(t_sum).ln() - f64::from(weighted / t_sum);
            let factor = weight / q_sum;
            for (s, p) in student.iter_mut().zip(teacher.iter()) {
                *s = *s * factor - *p * weight;
            }
        }
        total
    })
}
