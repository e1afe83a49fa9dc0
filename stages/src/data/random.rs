//! Random numbers that depend on a seed and a counter only: stream `i` is the same whoever draws it.
//!
//! SplitMix64 (Steele, Lea, Flood 2014); for choosing text, not for weights.

/// One stream of numbers.
pub struct Stream(u64);

/// The finaliser of SplitMix64: spreads every bit of `x` over the whole word.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A hash of `bytes` (FNV-1a, then mixed): the same on every machine and in every release.
pub fn hash(bytes: &[u8]) -> u64 {
    let step = |h: u64, byte: &u8| (h ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
    mix(bytes.iter().fold(0xCBF2_9CE4_8422_2325, step))
}

/// `hash` as a fraction in [0, 1).
pub fn fraction(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

impl Stream {
    /// Stream `index` of `seed`.
    pub fn new(seed: u64, index: u64) -> Stream {
        Stream(mix(mix(seed ^ 0x9E37_79B9_7F4A_7C15).wrapping_add(index)))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A whole number below `n` (which is above 0).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// A whole number from `low` to `high`, both included.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        fraction(self.bits()) < p
    }

    /// One element of `items`, which is not empty.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// Puts `items` in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_and_streams_differ() {
        let mut counts = [0; 10];
        let mut stream = Stream::new(1, 2);
        (0..10_000).for_each(|_| counts[stream.below(10)] += 1);
        assert!(counts.iter().all(|n| (850..1150).contains(n)), "{counts:?}");
        assert_ne!(Stream::new(1, 3).bits(), Stream::new(1, 2).bits());
        assert_ne!(Stream::new(2, 2).bits(), Stream::new(1, 2).bits());
    }

    #[test]
    fn hashes_stay_as_they_are() {
        assert_eq!(hash(b""), mix(0xCBF2_9CE4_8422_2325));
        let spread = (0..1000u32).filter(|i| fraction(hash(&i.to_le_bytes())) < 0.3).count();
        assert!((250..350).contains(&spread), "{spread}");
    }
}
