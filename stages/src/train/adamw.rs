//! AdamW over one flat f32 buffer, with state that can be saved.
//!
//! Knows ranges of parameters, not their names. Source: Loshchilov and Hutter, "Decoupled weight
//! decay regularization" (ICLR 2019), algorithm 2 with the schedule multiplying both terms.

use std::ops::Range;

/// Constants of the update rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

impl Default for Rule {
    fn default() -> Rule {
        Rule { beta1: 0.9, beta2: 0.95, eps: 1e-8 }
    }
}

/// A run of parameters that are trained alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Where they lie in the buffer.
    pub range: Range<usize>,
    /// Decoupled weight decay; 0.1 for matrices, 0 for norms, biases and the like.
    pub decay: f32,
    /// Multiplies the learning rate.
    pub scale: f32,
}

/// Moments of every parameter and the number of updates made.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// First moments, as long as the parameters.
    pub m: Vec<f32>,
    /// Second moments, as long as the parameters.
    pub v: Vec<f32>,
    /// Updates made so far (skipped ones do not count).
    pub updates: u64,
    rule: Rule,
}

impl AdamW {
    /// A fresh optimiser of `len` parameters.
    pub fn new(len: usize, rule: Rule) -> AdamW {
        AdamW { m: vec![0.0; len], v: vec![0.0; len], updates: 0, rule }
    }

    /// One update of the parameters in `groups` with gradients `grads · clip` at rate `lr`; all
    /// others, and their moments, stay as they are.
    ///
    /// # Panics
    ///
    /// If `params`, `grads` and the moments differ in length or a group lies outside.
    pub fn update(
        &mut self,
        params: &mut [f32],
        grads: &[f32],
        groups: &[Group],
        lr: f32,
        clip: f32,
    ) {
        assert!(params.len() == self.m.len() && grads.len() == self.m.len(), "lengths differ");
        self.updates += 1;
        let n = i32::try_from(self.updates).unwrap_or(i32::MAX);
        let correct1 = 1.0 - f64::from(self.rule.beta1).powi(n);
        let correct2 = 1.0 - f64::from(self.rule.beta2).powi(n);
        let arch = pulp::Arch::new();
        for group in groups {
            let rate = lr * group.scale;
            let pass = Pass {
                params: &mut params[group.range.clone()],
                grads: &grads[group.range.clone()],
                m: &mut self.m[group.range.clone()],
                v: &mut self.v[group.range.clone()],
                clip,
                beta: (self.rule.beta1, self.rule.beta2),
                eps: self.rule.eps,
                rate: (f64::from(rate) / correct1) as f32,
                root: (1.0 / correct2.sqrt()) as f32,
                keep: 1.0 - rate * group.decay,
            };
            arch.dispatch(|| pass.go());
        }
    }
}

struct Pass<'a> {
    params: &'a mut [f32],
    grads: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    clip: f32,
    beta: (f32, f32),
    eps: f32,
    rate: f32,
    root: f32,
    keep: f32,
}

impl Pass<'_> {
    #[inline(always)]
    fn go(self) {
        let (b1, b2) = self.beta;
        let moments = self.m.iter_mut().zip(self.v.iter_mut());
        for ((p, g), (m, v)) in self.params.iter_mut().zip(self.grads).zip(moments) {
            let g = g * self.clip;
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * (g * g);
            *p = *p * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(range: Range<usize>, decay: f32) -> Group {
        Group { range, decay, scale: 1.0 }
    }

    #[test]
    fn agrees_with_the_textbook_in_f64() {
        let rule = Rule::default();
        let mut params = vec![0.5f32, -1.25, 2.0, 0.125];
        let mut optimiser = AdamW::new(4, rule);
        let mut expect: Vec<f64> = params.iter().map(|p| f64::from(*p)).collect();
        let (mut m, mut v) = ([0.0f64; 4], [0.0f64; 4]);
        for t in 1..=20 {
            let grads: Vec<f32> =
                (0..4).map(|i| ((i * 7 + t * 3) % 11) as f32 / 5.0 - 1.0).collect();
            optimiser.update(&mut params, &grads, &[group(0..4, 0.1)], 0.01, 0.5);
            for i in 0..4 {
                let g = f64::from(grads[i]) * 0.5;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.95f64.powi(t)));
                expect[i] -= 0.01 * (mh / (vh.sqrt() + 1e-8) + 0.1 * expect[i]);
            }
        }
        for (p, e) in params.iter().zip(expect) {
            assert!((f64::from(*p) - e).abs() < 1e-5, "{p} {e}");
        }
    }

    #[test]
    fn decays_only_the_groups_that_ask_and_leaves_the_rest_alone() {
        let mut params = vec![1.0; 6];
        let mut optimiser = AdamW::new(6, Rule::default());
        let groups = [group(0..2, 0.1), group(2..4, 0.0)];
        optimiser.update(&mut params, &[0.0; 6], &groups, 0.1, 1.0);
        assert_eq!(params, [0.99, 0.99, 1.0, 1.0, 1.0, 1.0]);
        optimiser.update(&mut params, &[1.0; 6], &groups, 0.1, 1.0);
        assert!(params[2] < 1.0 && params[4] == 1.0 && optimiser.m[5] == 0.0);
    }
}
