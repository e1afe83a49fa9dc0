//! The next token from the logits: greedy or drawn, with the usual cuts. Knows no model and no text.
//!
//! Order of the cuts as in transformers: repetition penalty (Keskar et al. 2019, CTRL), temperature,
//! the k most likely, the nucleus of mass p (Holtzman et al. 2020), a least share of the most likely
//! one (Nguyen et al. 2024, min-p).

use std::collections::{BTreeMap, VecDeque};

use anyhow::{Result, bail, ensure};

use crate::ops::vector::{exp_sum, max, vectorised};
use crate::train::philox::Philox;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token always.
    pub temperature: f32,
    /// Draw from the so many most likely tokens; 0: from all.
    pub top_k: usize,
    /// Draw from the fewest tokens whose probabilities reach this sum; 1: from all.
    pub top_p: f32,
    /// Draw from tokens at least so likely, relative to the most likely one; 0: from all.
    pub min_p: f32,
    /// Divides positive logits of recent tokens, multiplies negative ones; 1: changes nothing.
    pub repetition_penalty: f32,
    /// How many tokens are recent.
    pub window: usize,
    /// Equal seeds draw equal tokens from equal logits.
    pub seed: u64,
}

impl Default for Sampling {
    /// Draws from the distribution as it is.
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            window: 256,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Refuses numbers that mean nothing.
    pub fn check(&self) -> Result<()> {
        let Sampling { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        ensure!(
            temperature.is_finite() && temperature >= 0.0,
            "the temperature is {temperature}; it must be 0 (greedy) or a positive number"
        );
        ensure!(top_p > 0.0 && top_p <= 1.0, "top-p is {top_p}; it must be above 0 and at most 1");
        ensure!((0.0..=1.0).contains(&min_p), "min-p is {min_p}; it must be from 0 to 1");
        ensure!(
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
            "the repetition penalty is {repetition_penalty}; it must be a positive number (1: none)"
        );
        ensure!(self.window <= 1 << 20, "the repetition window is longer than 2²⁰ tokens");
        Ok(())
    }
}

/// Chooses token after token. Its memory is that of one distribution and of the recent tokens.
pub struct Sampler {
    sampling: Sampling,
    random: Philox,
    drawn: u64,
    recent: Recent,
    work_v: Vec<f32>,
    order: Vec<u32>,
}

impl Sampler {
    /// The `stream`-th independent sampler of the seed; see [`Sampling::check`].
    pub fn new(sampling: &Sampling, stream: u64) -> Result<Sampler> {
        sampling.check()?;
        Ok(Sampler {
            random: Philox::new(sampling.seed, &format!("generate.{stream}")),
            recent: Recent::new(sampling.window),
            sampling: sampling.clone(),
            drawn: 0,
            work_v: Vec::new(),
            order: Vec::new(),
        })
    }

    /// Counts `tokens` among the recent ones. Those that were chosen have to be told, too.
    pub fn saw(&mut self, tokens: &[u32]) {
        if self.sampling.repetition_penalty != 1.0 {
            tokens.iter().for_each(|token| self.recent.push(*token));
        }
    }

    /// The token that follows, of `logits_v`. Logits that are NaN or +∞, or all −∞, are an error.
    pub fn choose(&mut self, logits_v: &[f32]) -> Result<u32> {
        check(logits_v)?;
        let work_v = &mut self.work_v;
        work_v.clear();
        work_v.extend_from_slice(logits_v);
        penalise(work_v, self.recent.distinct(), self.sampling.repetition_penalty);
        if self.sampling.temperature == 0.0 {
            return Ok(argmax(work_v));
        }
        heat(work_v, self.sampling.temperature);
        let kept = keep(work_v, &self.sampling, &mut self.order);
        let words = self.random.block(self.drawn);
        self.drawn += 1;
        Ok(draw(work_v, kept, unit(words[0], words[1])))
    }
}

/// Refuses logits that say nothing.
fn check(logits_v: &[f32]) -> Result<()> {
    if let Some(at) = logits_v.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
        bail!(
            "the model's logit of token {at} is {}: its weights are broken, or its training \
             diverged",
            logits_v[at]
        );
    }
    ensure!(
        logits_v.iter().any(|x| *x != f32::NEG_INFINITY),
        "the model gives every token the probability 0: its weights are broken"
    );
    Ok(())
}

/// Makes `tokens` less likely (or more, if `penalty` is below 1).
pub fn penalise(logits_v: &mut [f32], tokens: impl Iterator<Item = u32>, penalty: f32) {
    for token in tokens {
        if let Some(logit) = logits_v.get_mut(token as usize) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

/// The first of the largest.
pub fn argmax(logits_v: &[f32]) -> u32 {
    let largest = vectorised(|| max(logits_v));
    logits_v.iter().position(|x| *x == largest).unwrap_or(0) as u32
}

/// Logits to weights `e^((x − max)/temperature)`; the largest is 1.
fn heat(work_v: &mut [f32], temperature: f32) {
    vectorised(|| {
        let largest = max(work_v);
        work_v.iter_mut().for_each(|x| *x = (*x - largest) / temperature);
        exp_sum(work_v, 0.0);
    });
}

/// The tokens that may be drawn: all (`None`), or those at the head of `order`.
fn keep<'a>(work_v: &[f32], sampling: &Sampling, order: &'a mut Vec<u32>) -> Option<&'a [u32]> {
    let Sampling { top_k, top_p, min_p, .. } = *sampling;
    let top_k = if top_k == 0 { work_v.len() } else { top_k.min(work_v.len()) };
    if top_k == work_v.len() && top_p >= 1.0 && min_p <= 0.0 {
        return None;
    }
    // More likely first, then by number: what is kept never depends on how it is sorted.
    let before = |a: &u32, b: &u32| {
        let weight = |token: &u32| work_v[*token as usize];
        weight(b).total_cmp(&weight(a)).then(a.cmp(b))
    };
    order.clear();
    order.extend((0..work_v.len() as u32).filter(|token| work_v[*token as usize] > 0.0));
    if top_k < order.len() {
        order.select_nth_unstable_by(top_k - 1, before);
        order.truncate(top_k);
    }
    let weight = |token: &u32| f64::from(work_v[*token as usize]);
    if top_p < 1.0 {
        let total: f64 = order.iter().map(weight).sum();
        // Those below this are together too light to be needed, so that few are sorted.
        let light = total * (1.0 - f64::from(top_p)) / order.len() as f64;
        order.retain(|token| weight(token) >= light);
        order.sort_unstable_by(before);
        let mut sum = 0.0;
        let reached = order.iter().position(|token| {
            sum += weight(token);
            sum >= total * f64::from(top_p)
        });
        order.truncate(reached.map_or(order.len(), |at| at + 1));
    }
    // The largest weight is 1.
    order.retain(|token| work_v[*token as usize] >= min_p);
    order.sort_unstable();
    Some(order)
}

/// The token at `place` (in `[0, 1)`) of the kept weights laid side by side.
fn draw(work_v: &[f32], kept: Option<&[u32]>, place: f64) -> u32 {
    match kept {
        None => walk(work_v.iter().copied().enumerate().map(|(at, w)| (at as u32, w)), place),
        Some(kept) => walk(kept.iter().map(|token| (*token, work_v[*token as usize])), place),
    }
}

fn walk(weights: impl Iterator<Item = (u32, f32)> + Clone, place: f64) -> u32 {
    let total: f64 = weights.clone().map(|(_, weight)| f64::from(weight)).sum();
    let (mut sum, mut last) = (0.0, 0);
    for (token, weight) in weights.filter(|(_, weight)| *weight > 0.0) {
        sum += f64::from(weight);
        last = token;
        if sum > place * total {
            break;
        }
    }
    last
}

/// 53 random bits as a number in `[0, 1)`.
fn unit(high: u32, low: u32) -> f64 {
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// The last tokens, and how often each is among them.
struct Recent {
    window: usize,
    tokens: VecDeque<u32>,
    counts: BTreeMap<u32, usize>,
}

impl Recent {
    fn new(window: usize) -> Recent {
        Recent { window, tokens: VecDeque::new(), counts: BTreeMap::new() }
    }

    fn push(&mut self, token: u32) {
        self.tokens.push_back(token);
        *self.counts.entry(token).or_default() += 1;
        if self.tokens.len() > self.window
            && let Some(old) = self.tokens.pop_front()
            && let Some(count) = self.counts.get_mut(&old)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&old);
            }
        }
    }

    fn distinct(&self) -> impl Iterator<Item = u32> {
        self.counts.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [1.0, 3.0, 2.0, -1.0, 0.5, f32::NEG_INFINITY];

    /// How often each token comes up, as a share.
    fn shares(sampling: Sampling) -> Vec<f64> {
        let mut sampler = Sampler::new(&sampling, 0).unwrap();
        let mut shares = vec![0.0; LOGITS.len()];
        for _ in 0..20_000 {
            shares[sampler.choose(&LOGITS).unwrap() as usize] += 1.0 / 20_000.0;
        }
        shares
    }

    /// Softmax of the logits of `tokens` at `temperature`.
    fn exact(tokens: &[usize], temperature: f64) -> Vec<f64> {
        let mut weights = vec![0.0; LOGITS.len()];
        tokens.iter().for_each(|at| weights[*at] = (f64::from(LOGITS[*at]) / temperature).exp());
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    }

    fn agree(got: &[f64], want: &[f64]) {
        for (got, want) in got.iter().zip(want) {
            // 20,000 draws: a standard deviation is at most 0.0036.
            assert!((got - want).abs() < 0.015 && (*want > 0.0 || *got == 0.0), "{got} {want}");
        }
    }

    #[test]
    fn every_cut_leaves_the_distribution_it_says() {
        let plain = Sampling { seed: 7, ..Sampling::default() };
        agree(&shares(plain.clone()), &exact(&[0, 1, 2, 3, 4], 1.0));
        let cool = Sampling { temperature: 0.5, ..plain.clone() };
        agree(&shares(cool), &exact(&[0, 1, 2, 3, 4], 0.5));
        agree(&shares(Sampling { top_k: 2, ..plain.clone() }), &exact(&[1, 2], 1.0));
        // Probabilities: 0.63, 0.23, 0.086, 0.052, 0.012.
        agree(&shares(Sampling { top_p: 0.8, ..plain.clone() }), &exact(&[1, 2], 1.0));
        agree(&shares(Sampling { top_p: 0.9, ..plain.clone() }), &exact(&[1, 2, 0], 1.0));
        agree(&shares(Sampling { min_p: 0.1, ..plain.clone() }), &exact(&[1, 2, 0], 1.0));
        let all = Sampling { top_k: 3, top_p: 0.9, min_p: 0.3, ..plain };
        agree(&shares(all), &exact(&[1, 2], 1.0));
    }

    #[test]
    fn one_token_is_left_at_least() {
        for sampling in [
            Sampling { top_p: 1e-9, ..Sampling::default() },
            Sampling { min_p: 1.0, ..Sampling::default() },
            Sampling { top_k: 1, ..Sampling::default() },
            Sampling { temperature: 0.0, ..Sampling::default() },
            Sampling { temperature: 1e-40, ..Sampling::default() },
        ] {
            let mut sampler = Sampler::new(&sampling, 0).unwrap();
            assert_eq!(sampler.choose(&LOGITS).unwrap(), 1, "{sampling:?}");
            assert_eq!(sampler.choose(&[f32::NEG_INFINITY, -5.0]).unwrap(), 1, "{sampling:?}");
            // Of equal ones the first, as far as one is asked for.
            if sampling.min_p < 1.0 && sampling.temperature != 1e-40 {
                assert_eq!(sampler.choose(&[0.5; 40]).unwrap(), 0, "{sampling:?}");
            }
        }
    }

    #[test]
    fn equal_seeds_draw_alike_and_others_do_not() {
        let tokens = |seed, stream| -> Vec<u32> {
            let mut sampler =
                Sampler::new(&Sampling { seed, ..Sampling::default() }, stream).unwrap();
            (0..50).map(|_| sampler.choose(&[0.0; 1000]).unwrap()).collect()
        };
        assert_eq!(tokens(1, 0), tokens(1, 0));
        assert_ne!(tokens(1, 0), tokens(2, 0));
        assert_ne!(tokens(1, 0), tokens(1, 1));
    }

    #[test]
    fn recent_tokens_are_penalised_once_and_old_ones_not() {
        let sampling = Sampling {
            temperature: 0.0,
            repetition_penalty: 2.0,
            window: 2,
            ..Sampling::default()
        };
        let mut sampler = Sampler::new(&sampling, 0).unwrap();
        sampler.saw(&[1, 1, 1]);
        // 3/2 < 2, whereas a penalty for each of them would also let 1 and 0.5 win.
        assert_eq!(sampler.choose(&[1.0, 3.0, 1.4, -1.0, 0.5]).unwrap(), 1);
        assert_eq!(sampler.choose(&LOGITS).unwrap(), 2);
        sampler.saw(&[3, 2]);
        assert_eq!(sampler.choose(&LOGITS).unwrap(), 1, "1 is no more recent");
        let mut logits = [2.0, -2.0];
        penalise(&mut logits, [0, 1, 99].into_iter(), 2.0);
        assert_eq!(logits, [1.0, -4.0]);
        (0..1000).for_each(|token| sampler.saw(&[token]));
        assert!(sampler.recent.tokens.len() == 2 && sampler.recent.counts.len() == 2);
    }

    #[test]
    fn logits_that_say_nothing_are_an_error() {
        let mut sampler = Sampler::new(&Sampling::default(), 0).unwrap();
        let mut told = |logits: &[f32]| sampler.choose(logits).unwrap_err().to_string();
        assert!(told(&[0.0, f32::NAN]).contains("token 1 is NaN"));
        assert!(told(&[f32::INFINITY, 0.0]).contains("token 0 is inf"));
        assert!(told(&[f32::NEG_INFINITY; 3]).contains("probability 0"));
        assert!(told(&[]).contains("probability 0"));
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        let plain = Sampling::default;
        for wrong in [
            Sampling { temperature: -1.0, ..plain() },
            Sampling { temperature: f32::NAN, ..plain() },
            Sampling { top_p: 0.0, ..plain() },
            Sampling { top_p: 1.1, ..plain() },
            Sampling { min_p: -0.1, ..plain() },
            Sampling { repetition_penalty: 0.0, ..plain() },
            Sampling { window: usize::MAX, ..plain() },
        ] {
            assert!(Sampler::new(&wrong, 0).is_err(), "{wrong:?}");
        }
        assert!(plain().check().is_ok());
    }

    #[test]
    fn a_large_vocabulary_keeps_what_sorting_all_would_keep() {
        let mut logits = vec![0.0; 5000];
        Philox::new(3, "logits").fill_normal(3.0, &mut logits);
        heat(&mut logits, 1.0);
        let mut order: Vec<u32> = (0..5000).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        let total: f64 = logits.iter().map(|w| f64::from(*w)).sum();
        for top_p in [0.1, 0.5, 0.9, 0.99] {
            let mut sum = 0.0;
            let n = 1 + order
                .iter()
                .position(|token| {
                    sum += f64::from(logits[*token as usize]);
                    sum >= total * f64::from(top_p)
                })
                .unwrap();
            let mut want = order[..n].to_vec();
            want.sort_unstable();
            let mut scratch = Vec::new();
            let sampling = Sampling { top_p, ..Sampling::default() };
            assert_eq!(keep(&logits, &sampling, &mut scratch), Some(&want[..]), "{top_p}");
        }
    }
}
