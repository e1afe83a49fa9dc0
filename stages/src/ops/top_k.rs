//! The k most likely tokens of a row of logits, with log-probabilities and what is left for the
//! rest; and the cross-entropy of a student against them. Ties go to the smaller token.

use std::ops::Range;

use half::f16;

use super::vector::{exp_sum, max, scale, vectorised};

/// Top tokens of a number of rows.
pub struct TopK {
    /// How many a row.
    pub k: usize,
    vocab: usize,
    /// Tokens by falling probability, `[rows, k]`.
    pub ids_nk: Vec<u32>,
    /// Their log-probabilities.
    pub log_p_nk: Vec<f16>,
    /// Probability of all other tokens together (1 minus the sum of the stored values, so that
    /// both fit each other).
    pub tail_n: Vec<f32>,
    logits_nv: Vec<f32>,
    order: Vec<u32>,
    picked_k: Vec<f32>,
}

/// Rows of logits that are made at a time.
const ROWS: usize = 32;

impl TopK {
    /// Room for `n` rows.
    pub fn new(n: usize, vocab: usize, k: usize) -> TopK {
        assert!(0 < k && k <= vocab, "`k` is between 1 and the vocabulary");
        TopK {
            k,
            vocab,
            ids_nk: vec![0; n * k],
            log_p_nk: vec![f16::ZERO; n * k],
            tail_n: vec![0.0; n],
            logits_nv: vec![0.0; ROWS * vocab],
            order: Vec::with_capacity(vocab),
            picked_k: vec![0.0; k],
        }
    }

    /// The first `n` rows of ids as a file holds them: 16 bits up to a vocabulary of 65,536.
    pub fn id_bytes(&self, n: usize) -> Vec<u8> {
        let ids = &self.ids_nk[..n * self.k];
        match self.vocab > 1 << 16 {
            true => bytemuck::cast_slice(ids).to_vec(),
            false => ids.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect(),
        }
    }

    fn row(&mut self, at: usize, row: usize) {
        let TopK { k, vocab, ids_nk, log_p_nk, tail_n, logits_nv, order, picked_k } = self;
        let logits = &mut logits_nv[row * *vocab..][..*vocab];
        order.clear();
        order.extend(0..*vocab as u32);
        let by =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if *k < *vocab {
            order.select_nth_unstable_by(*k - 1, by);
        }
        let top = &mut order[..*k];
        top.sort_unstable_by(by);
        let (ids, log_p) = (&mut ids_nk[at * *k..][..*k], &mut log_p_nk[at * *k..][..*k]);
        ids.copy_from_slice(top);
        let largest = max(logits);
        for (to, id) in picked_k.iter_mut().zip(ids.iter()) {
            *to = logits[*id as usize] - largest;
        }
        let log_sum = vectorised(|| exp_sum(logits, largest)).ln();
        let mut mass = 0.0f64;
        for (to, picked) in log_p.iter_mut().zip(picked_k.iter()) {
            *to = f16::from_f32(picked - log_sum);
            mass += f64::from(to.to_f32()).exp();
        }
        tail_n[at] = (1.0 - mass).max(0.0) as f32;
    }
}

/// Fills the first `n` rows; `logits` writes those of a range of rows, `[rows, vocab]`.
pub fn fill(top: &mut TopK, n: usize, logits: impl Fn(Range<usize>, &mut [f32])) {
    for first in (0..n).step_by(ROWS) {
        let rows = first..n.min(first + ROWS);
        logits(rows.clone(), &mut top.logits_nv[..rows.len() * top.vocab]);
        rows.clone().for_each(|at| top.row(at, at - first));
    }
}

/// Least probability that a student's tail counts as, so that its logarithm stays finite.
const TAIL_FLOOR: f64 = 1e-6;

/// One row: `L = -Σ_k p log q - r log(1 - Σ_k q)`; `logits_v` becomes `weight` times the gradient:
/// `q - p` on the k, `q (1 - r / q_tail)` elsewhere. `own_k` is scratch.
pub fn soft(
    logits_v: &mut [f32],
    (ids, log_p, tail): (&[u32], &[f16], f32),
    weight: f32,
    own_k: &mut [f32],
) -> f64 {
    let largest = max(logits_v);
    let (mut kept, mut mass) = (0.0, 0.0);
    for (id, log_p) in ids.iter().zip(log_p) {
        let p = f64::from(log_p.to_f32()).exp();
        kept += p * f64::from(logits_v[*id as usize] - largest);
        mass += p;
    }
    let sum = vectorised(|| exp_sum(logits_v, largest));
    let top: f64 = ids.iter().map(|id| f64::from(logits_v[*id as usize])).sum();
    let (q_tail, tail) = ((1.0 - top / f64::from(sum)).max(TAIL_FLOOR), f64::from(tail));
    let share = weight / sum;
    for ((own, id), log_p) in own_k.iter_mut().zip(ids).zip(log_p) {
        *own = logits_v[*id as usize] * share - log_p.to_f32().exp() * weight;
    }
    vectorised(|| scale(logits_v, (1.0 - tail / q_tail) as f32 * share));
    for (id, own) in ids.iter().zip(own_k) {
        logits_v[*id as usize] = *own;
    }
    mass * f64::from(sum).ln() - kept - tail * q_tail.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, v: usize) -> Vec<f32> {
        (0..n * v).map(|i| ((i * 7919) % 613) as f32 / 90.0 - 3.0).collect()
    }

    fn probabilities(logits: &[f32]) -> Vec<f64> {
        let powers: Vec<f64> = logits.iter().map(|l| f64::from(*l).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|p| p / sum).collect()
    }

    #[test]
    fn keeps_the_largest_and_the_mass_of_the_rest() {
        let (n, v, k) = (70, 41, 5);
        let logits = rows(n, v);
        let mut top = TopK::new(n, v, k);
        fill(&mut top, n, |rows, out| out.copy_from_slice(&logits[rows.start * v..rows.end * v]));
        for i in 0..n {
            let p = probabilities(&logits[i * v..][..v]);
            let mut order: Vec<usize> = (0..v).collect();
            order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
            let mut mass = 0.0;
            for (j, id) in order[..k].iter().enumerate() {
                assert_eq!(top.ids_nk[i * k + j] as usize, *id);
                assert!((f64::from(top.log_p_nk[i * k + j].to_f32()) - p[*id].ln()).abs() < 4e-3);
                mass += p[*id];
            }
            assert!((f64::from(top.tail_n[i]) - (1.0 - mass)).abs() < 3e-3);
        }
        assert_eq!(top.id_bytes(n).len(), 2 * n * k);
    }

    #[test]
    fn gradient_is_the_difference_quotient_and_vanishes_at_the_teacher() {
        let (v, k) = (23, 4);
        let teacher = rows(1, v);
        let mut top = TopK::new(1, v, k);
        fill(&mut top, 1, |_, out| out.copy_from_slice(&teacher));
        let loss = |logits: &[f32]| {
            let mut d = logits.to_vec();
            let target = (&top.ids_nk[..], &top.log_p_nk[..], top.tail_n[0]);
            (soft(&mut d, target, 1.0, &mut [0.0; 4]), d)
        };
        let student: Vec<f32> = teacher.iter().rev().map(|l| l * 0.6).collect();
        let (_, grad) = loss(&student);
        for i in 0..v {
            let at = |step: f32| {
                let mut moved = student.clone();
                moved[i] += step;
                loss(&moved).0
            };
            let quotient = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((quotient - f64::from(grad[i])).abs() < 2e-4, "{i}: {quotient} {}", grad[i]);
        }
        assert!(loss(&teacher).1.iter().all(|g| g.abs() < 2e-3));
    }
}
