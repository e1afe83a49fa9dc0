//! Scores of one sequence: its loss, its answers, and how far one model is from another.
//!
//! Rows are V logits, hidden states T positions by D. Sums run in a fixed order, over positions in
//! f64.

use crate::data::shard::Answer;
use crate::ops::vector::{exp, max, sum_of, vectorised};

/// What one model did on one sequence of held-out text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Sum of −ln p(next token), in nats.
    pub nats: f64,
    /// Number of predictions.
    pub tokens: u64,
}

/// How the student's predictions compare with the teacher's on one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Sum of KL(teacher ‖ student), in nats.
    pub kl: f64,
    /// Positions at which both find the same token likeliest.
    pub same: u64,
    /// Number of positions.
    pub tokens: u64,
}

/// The likeliest token of a row of logits; of equals the first.
pub fn likeliest(logits_v: &[f32]) -> usize {
    let most = vectorised(|| max(logits_v));
    logits_v.iter().position(|logit| *logit == most).unwrap_or(0)
}

/// ln Σ exp of a row.
#[inline(always)]
pub(super) fn log_sum_exp(logits_v: &[f32]) -> f64 {
    let most = max(logits_v);
    let sum = sum_of(logits_v, logits_v, |logit, _| exp(logit - most));
    f64::from(most) + f64::from(sum).ln()
}

impl Loss {
    /// Takes in one position: its logits and the token that came next.
    pub fn add(&mut self, logits_v: &[f32], next: u32) {
        let sum = vectorised(|| log_sum_exp(logits_v));
        self.nats += sum - f64::from(logits_v[next as usize]);
        self.tokens += 1;
    }
}

impl Agreement {
    /// Takes in one position: both models' logits.
    pub fn add(&mut self, teacher_v: &[f32], student_v: &[f32]) {
        let divergence = vectorised(|| {
            let (teacher_sum, student_sum) = (log_sum_exp(teacher_v), log_sum_exp(student_v));
            let (teacher_sum, student_sum) = (teacher_sum as f32, student_sum as f32);
            sum_of(teacher_v, student_v, |t, s| {
                exp(t - teacher_sum) * ((t - teacher_sum) - (s - student_sum))
            })
        });
        self.kl += f64::from(divergence);
        self.same += u64::from(likeliest(teacher_v) == likeliest(student_v));
        self.tokens += 1;
    }
}

/// How many tokens of the answer were guessed, given all true tokens before them; `right[t]` is
/// whether the model found the token after position t likeliest.
pub fn hits(right: &[bool], answer: &Answer) -> u32 {
    (answer.start as usize..answer.end as usize).filter(|at| right[at - 1]).count() as u32
}

/// ‖s − t‖ / ‖t‖ at each position, of hidden states T·D.
pub fn distances(teacher_td: &[f32], student_td: &[f32], width: usize) -> Vec<f32> {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let pairs = teacher_td.chunks_exact(width).zip(student_td.chunks_exact(width));
    pairs
        .map(|(t, s)| {
            let apart: f64 = t.iter().zip(s).map(|(t, s)| square(s - t)).sum();
            let norm: f64 = t.iter().map(|t| square(*t)).sum();
            (apart / norm.max(1e-24)).sqrt() as f32
        })
        .collect()
}

/// The middle value (the mean of the two middle ones); `None` of nothing.
pub fn median(values: &mut [f32]) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    values.sort_unstable_by(f32::total_cmp);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    Some((f64::from(low) + f64::from(high)) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_model_loses_the_logarithm_of_the_vocabulary() {
        let mut loss = Loss::default();
        (0..3).for_each(|next| loss.add(&[3.0; 8], next));
        assert_eq!(loss.tokens, 3);
        assert!((loss.nats - 3.0 * 8f64.ln()).abs() < 1e-6, "{loss:?}");
    }

    #[test]
    fn answers_are_scored_by_the_position_before_them() {
        let right = [true, false, true, false];
        let mut answer: Answer = bytemuck::Zeroable::zeroed();
        (answer.start, answer.end) = (1, 4);
        assert_eq!(hits(&right, &answer), 2);
        (answer.start, answer.end) = (2, 3);
        assert_eq!(hits(&right, &answer), 0);
        assert_eq!(likeliest(&[0.0, 2.0, 1.0, 2.0]), 1);
    }

    #[test]
    fn divergence_is_zero_of_equals_and_exact_of_two_coins() {
        let coin = |p: f32| [p.ln(), (1.0 - p).ln()];
        let mut same = Agreement::default();
        same.add(&coin(0.3), &coin(0.3).map(|x| x + 5.0));
        assert!(same.kl.abs() < 1e-6 && same.same == 1);
        let mut apart = Agreement::default();
        apart.add(&coin(0.25), &coin(0.75));
        assert!((apart.kl - 0.5 * 3f64.ln()).abs() < 1e-6, "{apart:?}");
        assert_eq!((apart.same, apart.tokens), (0, 1));
    }

    #[test]
    fn distances_are_relative_to_the_teacher() {
        let found = distances(&[3.0, 4.0, 0.0, 2.0], &[3.0, 4.0, 0.0, 1.0], 2);
        assert_eq!(found, [0.0, 0.5]);
        assert_eq!(median(&mut [3.0, 1.0, 2.0, 9.0]), Some(2.5));
        assert_eq!(median(&mut []), None);
    }
}
