//! Counter-based random numbers: Philox4x32-10, keyed by a seed and a name.
//!
//! A stream has no state, so what one tensor gets never depends on what was drawn before it. Knows
//! nothing of tensors or stages. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2,
//! 3" (SC 2011); constants and known answers from its Random123 distribution.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// A stream of random numbers, addressed by position.
#[derive(Clone, Copy, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: [u32; 2],
}

impl Philox {
    /// The stream of `seed` called `name` (a tensor's name, `order`, …).
    pub fn new(seed: u64, name: &str) -> Philox {
        let stream = fnv1a(name.as_bytes());
        Philox { key: halves(seed), stream: halves(stream) }
    }

    /// Four random words at `position`.
    pub fn block(&self, position: u64) -> [u32; 4] {
        let [low, high] = halves(position);
        philox4x32_10([low, high, self.stream[0], self.stream[1]], self.key)
    }

    /// Fills `out` with numbers uniform in `[low, high)`.
    pub fn fill_uniform(&self, low: f32, high: f32, out: &mut [f32]) {
        let width = high - low;
        for (position, four) in out.chunks_mut(4).enumerate() {
            for (value, word) in four.iter_mut().zip(self.block(position as u64)) {
                // Rounding of `low + width·u` may reach `high`; keep the interval half open.
                *value = (low + width * unit(word)).min(high.next_down());
            }
        }
    }

    /// Fills `out` with normal numbers of mean 0 and standard deviation `std` (Box and Muller).
    pub fn fill_normal(&self, std: f32, out: &mut [f32]) {
        for (position, four) in out.chunks_mut(4).enumerate() {
            let words = self.block(position as u64);
            for (pair, values) in four.chunks_mut(2).enumerate() {
                let radius_of = (f64::from(words[2 * pair]) + 1.0) / 4_294_967_296.0;
                let angle =
                    std::f64::consts::TAU * f64::from(words[2 * pair + 1]) / 4_294_967_296.0;
                let radius = (-2.0 * radius_of.ln()).sqrt() * f64::from(std);
                let both = [radius * angle.cos(), radius * angle.sin()];
                for (value, normal) in values.iter_mut().zip(both) {
                    *value = normal as f32;
                }
            }
        }
    }

    /// A random order of `0..n` (Fisher and Yates; `n` below 2^32).
    pub fn permutation(&self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            let block = self.block(i as u64);
            let wide = u128::from(u64::from(block[0]) | u64::from(block[1]) << 32);
            let j = ((wide * (i as u128 + 1)) >> 64) as usize;
            order.swap(i, j);
        }
        order
    }
}

fn unit(word: u32) -> f32 {
    (word >> 8) as f32 / 16_777_216.0
}

fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [low0, high0] = halves(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let [low1, high1] = halves(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        let zeros = philox4x32_10([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32_10([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox4x32_10(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
        );
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn moments_are_right_and_names_part_streams() {
        let mut a = vec![0.0; 20_001];
        Philox::new(17, "a").fill_normal(2.0, &mut a);
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let var = a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.05 && (var - 4.0).abs() < 0.15, "{mean} {var}");
        let mut b = vec![0.0; 20_001];
        Philox::new(17, "b").fill_normal(2.0, &mut b);
        let cov = a.iter().zip(&b).map(|(x, y)| x * y).sum::<f32>() / a.len() as f32;
        assert!(cov.abs() < 0.1, "{cov}");
        Philox::new(17, "u").fill_uniform(-0.5, 0.5, &mut a);
        assert!(a.iter().all(|x| (-0.5..0.5).contains(x)));
    }

    #[test]
    fn a_shorter_fill_is_a_prefix_of_a_longer_one() {
        let (mut long, mut short) = (vec![0.0; 11], vec![0.0; 7]);
        Philox::new(3, "w").fill_normal(1.0, &mut long);
        Philox::new(3, "w").fill_normal(1.0, &mut short);
        assert_eq!(long[..7], short[..]);
    }

    #[test]
    fn permutation_holds_everything_once_and_depends_on_the_seed() {
        let mut order = Philox::new(1, "order").permutation(100);
        assert_ne!(order, Philox::new(2, "order").permutation(100));
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
