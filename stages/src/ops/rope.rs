//! Rotary positions (Su et al. 2021), "rotate-half" pairing (dimension j with j + rotary/2), in
//! place. Only the first `rotary` dimensions of a head turn; the others pass (Phi).

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::vector::vectorised;

/// What long contexts do to the frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Llama 3.1 and later: wavelengths beyond `original / low` are divided by `factor`, those
    /// below `original / high` kept, between them a blend.
    Llama3 {
        /// How much longer the context became.
        factor: f64,
        /// `low_freq_factor`.
        low: f64,
        /// `high_freq_factor`.
        high: f64,
        /// `original_max_position_embeddings`.
        original: f64,
    },
    /// A divisor for every frequency (llama.cpp's `rope_freqs`).
    Factors {
        /// One a pair of dimensions.
        factors: Vec<f32>,
    },
}

impl RopeScaling {
    /// Refuses numbers that give no frequencies.
    pub fn check(&self, rotary: usize) -> Result<()> {
        let good = |x: f64| x.is_finite() && x > 0.0;
        let sensible = match self {
            RopeScaling::Linear { factor } => good(*factor),
            RopeScaling::Llama3 { factor, low, high, original } => {
                [factor, low, high, original].into_iter().all(|x| good(*x)) && high > low
            }
            RopeScaling::Factors { factors } => {
                factors.len() == rotary / 2 && factors.iter().all(|x| good(f64::from(*x)))
            }
        };
        if !sensible {
            bail!("the scaling of rotary positions has no sensible numbers: {self:?}");
        }
        Ok(())
    }

    /// What becomes of the frequency of pair `j`.
    fn apply(&self, j: usize, frequency: f64) -> f64 {
        match *self {
            RopeScaling::Factors { ref factors } => frequency / f64::from(factors[j]),
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low, high, original } => {
                let turns = original * frequency / (2.0 * std::f64::consts::PI);
                let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (keep + (1.0 - keep) / factor)
            }
        }
    }
}

/// Which angles a model's heads turn by.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Width of a head.
    pub dim: usize,
    /// Width of the part that turns.
    pub rotary: usize,
    /// Frequencies are `theta^(-2j/rotary)`, j from 0.
    pub theta: f64,
    /// What is then done to them.
    pub scaling: Option<RopeScaling>,
}

impl Rope {
    /// The frequency of every pair, in radians a position.
    pub fn frequencies(&self) -> Vec<f64> {
        let frequency = |j: usize| {
            let plain = self.theta.powf(-2.0 * j as f64 / self.rotary as f64);
            self.scaling.as_ref().map_or(plain, |scaling| scaling.apply(j, plain))
        };
        (0..self.rotary / 2).map(frequency).collect()
    }
}

/// Cosines and sines of every position.
pub struct Table {
    dim: usize,
    half: usize,
    cos_lp: Vec<f32>,
    sin_lp: Vec<f32>,
}

impl Table {
    /// Cosines, `[positions, pairs]`.
    pub fn cos_lp(&self) -> &[f32] {
        &self.cos_lp
    }

    /// Sines, likewise.
    pub fn sin_lp(&self) -> &[f32] {
        &self.sin_lp
    }

    /// For positions `from..from + seq`.
    pub fn new(from: usize, seq: usize, rope: &Rope) -> Table {
        Table::with(from, seq, rope.dim, &rope.frequencies())
    }

    /// The same for heads `dim` wide whose [`Rope::frequencies`] are known.
    pub fn with(from: usize, seq: usize, dim: usize, frequencies: &[f64]) -> Table {
        let half = frequencies.len();
        let (mut cos_lp, mut sin_lp) = (Vec::new(), Vec::new());
        for position in from..from + seq {
            let angles =
                frequencies.iter().map(|frequency| (position as f64 * frequency).sin_cos());
            for (sin, cos) in angles {
                cos_lp.push(cos as f32);
                sin_lp.push(sin as f32);
            }
        }
        Table { dim, half, cos_lp, sin_lp }
    }

    /// Positions there are.
    pub fn len(&self) -> usize {
        self.cos_lp.len() / self.half
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.cos_lp.is_empty()
    }

    /// Rotates the first `heads` heads of every row of `x` (rows `stride` apart; row `i` is at
    /// position `i mod seq`), or turns a gradient back when `back`.
    pub fn rotate(&self, x: &mut [f32], stride: usize, heads: usize, seq: usize, back: bool) {
        let (dim, half) = (self.dim, self.half);
        assert!(heads * dim <= stride && seq * half <= self.cos_lp.len(), "shapes differ");
        let sign = if back { -1.0 } else { 1.0 };
        vectorised(|| {
            for (i, row) in x.chunks_exact_mut(stride).enumerate() {
                let at = i % seq * half;
                let (cos, sin) = (&self.cos_lp[at..at + half], &self.sin_lp[at..at + half]);
                for head in row[..heads * dim].chunks_exact_mut(dim) {
                    let (low, high) = head[..2 * half].split_at_mut(half);
                    for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        let s = s * sign;
                        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROPE: Rope = Rope { dim: 4, rotary: 4, theta: 100.0, scaling: None };

    #[test]
    fn scores_depend_on_distance_only_and_turning_back_undoes() {
        let table = Table::new(0, 9, &ROPE);
        let (q, k) = ([0.3, -1.0, 0.7, 0.2], [1.1, 0.4, -0.6, 0.9]);
        let turned = |v: [f32; 4]| {
            let mut rows = v.repeat(9);
            table.rotate(&mut rows, 4, 1, 9, false);
            rows
        };
        let (qs, ks) = (turned(q), turned(k));
        let score = |i: usize, j: usize| (0..4).map(|p| qs[i * 4 + p] * ks[j * 4 + p]).sum::<f32>();
        assert!((score(5, 2) - score(8, 5)).abs() < 1e-6);
        assert!((score(5, 2) - score(5, 3)).abs() > 1e-3);
        let mut back = qs.clone();
        table.rotate(&mut back, 4, 1, 9, true);
        assert!(back.iter().zip(q.iter().cycle()).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn only_the_rotary_part_turns_and_a_table_may_begin_anywhere() {
        let rope = Rope { dim: 6, ..ROPE };
        let x: Vec<f32> = (0..54).map(|i| i as f32 * 0.1 - 2.0).collect();
        let mut all = x.clone();
        Table::new(0, 9, &rope).rotate(&mut all, 6, 1, 9, false);
        for (after, before) in all.chunks(6).zip(x.chunks(6)) {
            assert_eq!(after[4..], before[4..]);
        }
        assert_ne!(all[6..10], x[6..10]);
        let mut last = x[30..].to_vec();
        Table::new(5, 4, &rope).rotate(&mut last, 6, 1, 4, false);
        assert_eq!(last, all[30..]);
    }

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let wave = |length: f64| 2.0 * std::f64::consts::PI / length;
        assert_eq!(scaling.apply(0, wave(100.0)), wave(100.0));
        assert!((scaling.apply(0, wave(20_000.0)) * 8.0 / wave(20_000.0) - 1.0).abs() < 1e-12);
        let between = scaling.apply(0, wave(4096.0)) / wave(4096.0);
        assert!((between - (1.0 / 3.0 + 2.0 / 3.0 / 8.0)).abs() < 1e-12, "{between}");
        assert_eq!(RopeScaling::Factors { factors: vec![1.0, 4.0] }.apply(1, 2.0), 0.5);
        assert!(RopeScaling::Factors { factors: vec![1.0] }.check(4).is_err());
        assert!(RopeScaling::Linear { factor: 0.0 }.check(4).is_err());
    }
}
