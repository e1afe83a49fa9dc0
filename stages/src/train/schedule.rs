//! Warm-up, stable, decay: the learning rate at each update.
//!
//! Pure arithmetic. The schedule is run separately in each phase (`phi-mamba#7`); the end value of
//! 1e-8 is that of the authors' released framework.

/// A WSD schedule over a known number of updates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wsd {
    /// The rate of the stable part.
    pub peak: f64,
    /// All updates of the phase.
    pub updates: u64,
    /// Updates of linear warm-up from zero.
    pub warmup: u64,
    /// Updates of linear decay to `end`.
    pub decay: u64,
    /// The rate after the last update.
    pub end: f64,
}

impl Wsd {
    /// The usual form: `warmup` and `decay` are fractions of `updates` (recipe: 0.05 and 0.2).
    pub fn new(peak: f64, updates: u64, warmup: f64, decay: f64) -> Wsd {
        let part = |fraction: f64| (updates as f64 * fraction).round() as u64;
        Wsd { peak, updates, warmup: part(warmup), decay: part(decay), end: 1e-8 }
    }

    /// The rate of update `update`, counted from 0.
    pub fn at(&self, update: u64) -> f32 {
        let start = self.updates.saturating_sub(self.decay);
        let rate = if update < self.warmup {
            // Counted from one: an update at rate zero would be thrown away.
            self.peak * (update + 1) as f64 / (self.warmup + 1) as f64
        } else if update < start {
            self.peak
        } else {
            let left = self.updates.saturating_sub(update) as f64 / (self.decay + 1) as f64;
            self.end + (self.peak - self.end) * left.min(1.0)
        };
        rate as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_holds_and_falls() {
        let wsd = Wsd::new(1e-3, 100, 0.05, 0.2);
        let rates: Vec<f32> = (0..101).map(|u| wsd.at(u)).collect();
        assert!(rates[0] > 0.0 && rates[..6].windows(2).all(|w| w[0] < w[1]));
        assert!(rates[5..80].iter().all(|r| *r == 1e-3));
        assert!(rates[79..].windows(2).all(|w| w[0] > w[1]));
        assert!(rates[99] > 0.0 && rates[99] < 1e-4 && rates[100] == 1e-8);
    }

    #[test]
    fn needs_no_warmup_and_no_decay() {
        let wsd = Wsd::new(0.5, 3, 0.0, 0.0);
        assert_eq!([wsd.at(0), wsd.at(1), wsd.at(2)], [0.5; 3]);
    }
}
