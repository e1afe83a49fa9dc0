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

/// Turns part of soft targets into hard ones: adds `weight · (p - onehot)` to the gradient that
/// [`soft`] left, in rows that have a target. With `weight` times λ that is the gradient of
/// `(1 - λ) soft + λ hard`.
pub fn harden(v: usize, slope_nv: &mut [f32], p_nv: &[f32], targets_n: &[u32], weight: f32) {
    assert_eq!(slope_nv.len(), targets_n.len() * v, "shapes differ");
    assert_eq!(slope_nv.len(), p_nv.len(), "shapes differ");
    vectorised(|| {
        let rows = slope_nv.chunks_exact_mut(v).zip(p_nv.chunks_exact(v));
        for ((slope, p), target) in rows.zip(targets_n) {
            if *target != IGNORE {
                slope.iter_mut().zip(p).for_each(|(slope, p)| *slope += weight * p);
                slope[*target as usize] -= weight;
            }
        }
    });
}

/// The token that follows each in its sequence of `seq`; [`IGNORE`] after the last, and in sequences
/// that are not there.
pub fn successors(seq: usize, tokens_n: &[u32], targets_n: &mut [u32]) {
    targets_n.fill(IGNORE);
    for (tokens, targets) in tokens_n.chunks_exact(seq).zip(targets_n.chunks_exact_mut(seq)) {
        targets[..seq - 1].copy_from_slice(&tokens[1..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardened_targets_are_the_two_kinds_by_their_shares() {
        let (v, share, weight) = (37, 0.3, 0.25);
        let logits = |factor: usize| -> Vec<f32> {
            (0..3 * v).map(|i| ((i * factor) % 613) as f32 / 90.0 - 3.0).collect()
        };
        let targets = [5, IGNORE, 36];
        let (mut mixed, mut p) = (logits(7919), logits(271));
        soft(v, &mut mixed, &mut p, &[true; 3], weight);
        harden(v, &mut mixed, &p, &targets, weight * share);
        let (mut by_teacher, mut by_text) = (logits(7919), logits(7919));
        soft(v, &mut by_teacher, &mut logits(271), &[true; 3], weight);
        hard(v, &mut by_text, &targets, weight);
        for (i, mixed) in mixed.iter().enumerate() {
            let share = if targets[i / v] == IGNORE { 0.0 } else { share };
            let wanted = (1.0 - share) * by_teacher[i] + share * by_text[i];
            assert!((mixed - wanted).abs() < 1e-6, "{i}: {mixed} and {wanted}");
        }
    }
}
