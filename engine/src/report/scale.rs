//! Axes: from values to places on the paper, and the round values to mark. Knows nothing else.

/// A linear or logarithmic axis.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    pub low: f64,
    pub high: f64,
    from: f64,
    to: f64,
    log: bool,
}

/// Beyond this, sums and differences overflow; nobody reads such values off a chart.
const HUGE: f64 = 1e300;

impl Scale {
    /// From `from` to `to` for all `values`, with 0 in sight when it is near, or for `ends`.
    pub fn linear(
        values: impl IntoIterator<Item = f64>,
        from: f64,
        to: f64,
        ends: Option<(f64, f64)>,
    ) -> Scale {
        let (mut low, mut high) = ends.unwrap_or_else(|| extent(values));
        if low == high {
            let pad = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            (low, high) = (low - pad, high + pad);
        }
        // Vertical axes run upwards (`to < from`) and end at round values.
        if ends.is_none() && to < from {
            if low > 0.0 && low < 0.5 * high {
                low = 0.0;
            }
            let step = step(low, high, 5);
            (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        }
        Scale { low, high, from, to, log: false }
    }

    /// The same by powers of ten, if all values are positive.
    pub fn log(values: impl IntoIterator<Item = f64>, from: f64, to: f64) -> Option<Scale> {
        let (low, high) = extent(values);
        if low <= 0.0 {
            return None;
        }
        let (low, high) = if high / low < 1.2 { (low / 1.2, high * 1.2) } else { (low, high) };
        let pad = (high / low).powf(0.03);
        let (low, high) = ((low / pad).max(f64::MIN_POSITIVE), (high * pad).min(f64::MAX));
        Some(Scale { low, high, from, to, log: true })
    }

    /// The place of `value`.
    pub fn at(&self, value: f64) -> f64 {
        let value = value.clamp(-HUGE, HUGE);
        let share = if self.log {
            (value.ln() - self.low.ln()) / (self.high.ln() - self.low.ln())
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + share * (self.to - self.from)
    }

    /// About `n` round values on the axis.
    pub fn ticks(&self, n: usize) -> Vec<f64> {
        if !self.log {
            return ticks(self.low, self.high, n);
        }
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let span = self.high.log10() - self.low.log10();
        let factors: &[f64] = match span {
            s if s < 0.7 => return ticks(self.low, self.high, n),
            s if s < 2.5 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let every = (span / 8.0).ceil().max(1.0) as i32;
        let all = decades.filter(|d| d.rem_euclid(every) == 0);
        let all = all.flat_map(|d| factors.iter().map(move |f| f * 10f64.powi(d)));
        all.filter(|tick| (self.low..=self.high).contains(tick)).collect()
    }
}

fn extent(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let finite = values.into_iter().filter(|value| value.is_finite());
    let (low, high) = finite
        .map(|value| value.clamp(-HUGE, HUGE))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high { (0.0, 1.0) } else { (low, high) }
}

/// 1, 2 or 5 times a power of ten, so that about `n` fit between `low` and `high`.
fn step(low: f64, high: f64, n: usize) -> f64 {
    let rough = (high / n.max(1) as f64 - low / n.max(1) as f64).max(f64::MIN_POSITIVE * 1e16);
    let power = 10f64.powf(rough.log10().floor());
    let factor = match rough / power {
        f if f <= 1.0 => 1.0,
        f if f <= 2.0 => 2.0,
        f if f <= 5.0 => 5.0,
        _ => 10.0,
    };
    factor * power
}

/// Round values from `low` to `high`.
pub(super) fn ticks(low: f64, high: f64, n: usize) -> Vec<f64> {
    let step = step(low, high, n);
    let first = (low / step - 1e-9).ceil();
    (0..=2 * n)
        .map(|i| (first + i as f64) * step)
        .take_while(|tick| *tick <= high + step * 1e-9)
        // Differences of round numbers, rounded back: 0.30000000000000004 is 0.3.
        .map(|tick| format!("{tick:.9e}").parse().unwrap_or(tick))
        .collect()
}

/// Round moments from 0 to `seconds`.
pub(super) fn moments(seconds: f64) -> Vec<f64> {
    let rough = seconds / 6.0;
    let steps = [
        60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 21_600.0, 43_200.0,
        86_400.0,
    ];
    let step = match steps.iter().find(|step| **step >= rough) {
        Some(step) if rough > 20.0 => *step,
        Some(_) => return ticks(0.0, seconds, 6),
        None => (rough / 86_400.0).ceil() * 86_400.0,
    };
    (0..=12).map(|i| f64::from(i) * step).take_while(|t| *t <= seconds).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 5), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        assert_eq!(ticks(-3.0, 7.0, 5), [-2.0, 0.0, 2.0, 4.0, 6.0]);
        let log = Scale::log([0.05, 40.0], 0.0, 1.0).unwrap();
        assert_eq!(log.ticks(6), [0.1, 1.0, 10.0]);
        let widest = Scale::log([7.0, f64::MAX], 0.0, 1.0).unwrap().ticks(6);
        assert!((3..12).contains(&widest.len()), "{widest:?}");
        assert_eq!(moments(200.0), [0.0, 60.0, 120.0, 180.0]);
        assert_eq!(moments(10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert!(moments(1e9).len() <= 13);
    }

    #[test]
    fn ends_of_an_axis_are_its_places() {
        let scale = Scale::linear([1.0, 10.0], 200.0, 0.0, None);
        assert_eq!((scale.at(0.0), scale.at(10.0)), (200.0, 0.0));
        assert!(Scale::log([0.0, 1.0], 0.0, 1.0).is_none());
        assert!(Scale::linear([], 0.0, 1.0, None).at(0.5).is_finite());
    }
}
