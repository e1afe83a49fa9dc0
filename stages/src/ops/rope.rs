//! Rotary positions, full width, "rotate-half" pairing (dimension j with j + width/2), in place.

use super::vector::vectorised;

/// Cosines and sines of every position.
pub struct Table {
    half: usize,
    cos_lp: Vec<f32>,
    sin_lp: Vec<f32>,
}

impl Table {
    /// For positions `0..seq` of heads `head_dim` wide; frequencies `theta^(-2j/head_dim)`.
    pub fn new(seq: usize, head_dim: usize, theta: f64) -> Table {
        let half = head_dim / 2;
        let angle = |i: usize| {
            let frequency = theta.powf(-2.0 * (i % half) as f64 / head_dim as f64);
            (i / half) as f64 * frequency
        };
        let cos_lp = (0..seq * half).map(|i| angle(i).cos() as f32).collect();
        let sin_lp = (0..seq * half).map(|i| angle(i).sin() as f32).collect();
        Table { half, cos_lp, sin_lp }
    }

    /// Rotates the first `heads` heads of every row of `x` (rows `stride` apart; row `i` is at
    /// position `i mod seq`), or turns a gradient back when `back`.
    pub fn rotate(&self, x: &mut [f32], stride: usize, heads: usize, seq: usize, back: bool) {
        let half = self.half;
        assert!(heads * 2 * half <= stride && seq * half <= self.cos_lp.len(), "shapes differ");
        let sign = if back { -1.0 } else { 1.0 };
        vectorised(|| {
            for (i, row) in x.chunks_exact_mut(stride).enumerate() {
                let at = i % seq * half;
                let (cos, sin) = (&self.cos_lp[at..at + half], &self.sin_lp[at..at + half]);
                for head in row[..heads * 2 * half].chunks_exact_mut(2 * half) {
                    let (low, high) = head.split_at_mut(half);
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

    #[test]
    fn scores_depend_on_distance_only_and_turning_back_undoes() {
        let table = Table::new(9, 4, 100.0);
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
}
