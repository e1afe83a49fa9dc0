//! What a student kept of its teacher's gain over guessing, with an interval by the paired bootstrap:
//! documents are drawn again within each benchmark, the same ones for both models.

use serde::Serialize;

use super::results::TaskResult;
use crate::eval::report::short;
use crate::train::philox::Philox;

/// Draws of all documents.
const DRAWS: usize = 10_000;
/// Decides the draws.
const SEED: u64 = 17;
/// Shares of the draws below the interval and up to its end.
const ENDS: [f64; 2] = [0.025, 0.975];

/// (student − guessing) / (teacher − guessing), each a mean over benchmarks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Retained {
    /// How many benchmarks.
    pub tasks: usize,
    /// What guessing scores on average; a cloze cannot be guessed and counts 0.
    pub chance: f64,
    /// The share.
    pub value: f64,
    /// Ends of the 95 % interval; none where some draw leaves the teacher no gain.
    pub low: Option<f64>,
    /// The upper end.
    pub high: Option<f64>,
    /// Draws behind the interval.
    pub draws: usize,
}

/// One benchmark: whether student and teacher are right on each document.
struct Pairs<'a> {
    name: &'a str,
    hits: &'a [[bool; 2]],
}

impl Pairs<'_> {
    /// Shares of student and teacher.
    fn plain(&self) -> [f64; 2] {
        let n = self.hits.len() as f64;
        [0, 1].map(|side| self.hits.iter().filter(|hits| hits[side]).count() as f64 / n)
    }

    /// The same over as many documents, drawn with replacement.
    fn drawn(&self, draw: usize) -> [f64; 2] {
        let n = self.hits.len();
        let random = Philox::new(SEED, &format!("bootstrap.{}", self.name));
        let blocks = n.div_ceil(4);
        let (mut student, mut teacher, mut left) = (0u32, 0u32, n);
        for block in 0..blocks {
            for word in random.block((draw * blocks + block) as u64).into_iter().take(left) {
                let [s, t] = self.hits[((u64::from(word) * n as u64) >> 32) as usize];
                student += u32::from(s);
                teacher += u32::from(t);
            }
            left = left.saturating_sub(4);
        }
        [student, teacher].map(|hits| f64::from(hits) / n as f64)
    }
}

impl Retained {
    /// Over `results`; none without a teacher, without documents, or where the teacher gains nothing.
    pub fn of(results: &[&TaskResult]) -> Option<Retained> {
        Retained::over(results, DRAWS)
    }

    fn over(results: &[&TaskResult], draws: usize) -> Option<Retained> {
        let pairs = results.iter().map(|result| Pairs { name: result.task, hits: &result.hits });
        let all: Vec<Pairs> = pairs.collect();
        if all.is_empty() || all.iter().any(|pairs| pairs.hits.is_empty()) {
            return None;
        }
        let count = all.len() as f64;
        let chance = results.iter().map(|result| result.chance.unwrap_or(0.0)).sum::<f64>() / count;
        let share = |of: &dyn Fn(&Pairs) -> [f64; 2]| {
            let [student, teacher] = all
                .iter()
                .map(of)
                .fold([0.0, 0.0], |[s, t], [a, b]| [s + a / count, t + b / count]);
            (teacher > chance).then(|| (student - chance) / (teacher - chance))
        };
        let value = share(&|pairs: &Pairs| pairs.plain())?;
        let again = (0..draws).map(|draw| share(&|pairs: &Pairs| pairs.drawn(draw)));
        let again: Option<Vec<f64>> = again.collect();
        let ends = again.map(|mut shares| {
            shares.sort_by(f64::total_cmp);
            ENDS.map(|end| short(shares[(end * (shares.len() - 1) as f64).round() as usize]))
        });
        Some(Retained {
            tasks: all.len(),
            chance: short(chance),
            value: short(value),
            low: ends.map(|[low, _]| low),
            high: ends.map(|[_, high]| high),
            draws,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::tasks::results::TaskFigures;

    fn result(task: &'static str, chance: Option<f64>, hits: Vec<[bool; 2]>) -> TaskResult {
        TaskResult {
            task,
            n: hits.len(),
            metric: "acc",
            chance,
            student: TaskFigures::default(),
            teacher: Some(TaskFigures::default()),
            difference: None,
            hits,
        }
    }

    /// `both` documents that both models have right, then `teacher` that only the teacher has, and so on.
    fn hits(both: usize, teacher: usize, student: usize, none: usize) -> Vec<[bool; 2]> {
        let part = |count, pair| std::iter::repeat_n(pair, count);
        part(both, [true, true])
            .chain(part(teacher, [false, true]))
            .chain(part(student, [true, false]))
            .chain(part(none, [false, false]))
            .collect()
    }

    #[test]
    fn the_share_is_of_means_and_its_interval_that_of_the_delta_method() {
        let a = result("a", Some(0.5), hits(1200, 200, 100, 500));
        let b = result("b", None, hits(250, 150, 50, 550));
        let found = Retained::over(&[&a, &b], 4000).unwrap();
        // Teacher 0.7 and 0.4, student 0.65 and 0.3, guessing 0.5 and 0.
        let share = (0.475 - 0.25) / (0.55 - 0.25);
        assert_eq!((found.tasks, found.chance, found.value), (2, 0.25, short(share)));
        // Of s − share · t, document by document: the error of the share to first order.
        let variance = |hits: &[[bool; 2]]| {
            let of = |[s, t]: &[bool; 2]| f64::from(u8::from(*s)) - share * f64::from(u8::from(*t));
            let n = hits.len() as f64;
            let mean = hits.iter().map(of).sum::<f64>() / n;
            hits.iter().map(|hit| (of(hit) - mean).powi(2)).sum::<f64>() / n / n
        };
        let error = (variance(&a.hits) + variance(&b.hits)).sqrt() / 2.0 / 0.3;
        let (low, high) = (found.low.unwrap(), found.high.unwrap());
        assert!(((share - low) / (1.96 * error) - 1.0).abs() < 0.12, "{low} {share} {error}");
        assert!(((high - share) / (1.96 * error) - 1.0).abs() < 0.12, "{high} {share} {error}");
        // Documents are paired: where both are right together, nothing is uncertain.
        let same = result("c", Some(0.5), hits(60, 0, 0, 40));
        let found = Retained::over(&[&same], 500).unwrap();
        assert_eq!((found.value, found.low), (1.0, None), "some draw has the teacher at 0.5");
        let same = result("c", Some(0.5), hits(900, 0, 0, 100));
        let found = Retained::over(&[&same], 500).unwrap();
        assert_eq!((found.low, found.high), (Some(1.0), Some(1.0)));
    }

    #[test]
    fn nothing_is_said_where_there_is_no_gain_or_no_teacher() {
        let poor = result("a", Some(0.5), hits(40, 10, 30, 20));
        assert_eq!(Retained::of(&[&poor]), None);
        assert_eq!(Retained::of(&[&result("a", Some(0.5), Vec::new())]), None);
        assert_eq!(Retained::of(&[]), None);
    }
}
