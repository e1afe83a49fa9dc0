//! Key-value recall: lines of `word: number` in random order, then one of the words again.

use anyhow::{Result, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::words::WORDS;
use super::{Answered, Compared, Question};
use crate::data::random::{Stream, hash};
use crate::eval::tasks::encode::Encoder;

/// Numbers have three digits.
const NUMBERS: std::ops::RangeInclusive<u32> = 100..=999;

/// How many pairs, how many questions.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Recall {
    /// Pairs in a text: a row of the table for each.
    pub pairs: Vec<usize>,
    /// Texts of each, with one question each.
    pub queries: usize,
    /// Numbers of the text that the right one is to be chosen among, itself included. Each costs a
    /// pass; with 1 only exact answers count.
    pub candidates: usize,
}

impl Default for Recall {
    fn default() -> Recall {
        Recall { pairs: vec![4, 16, 64], queries: 64, candidates: 4 }
    }
}

/// Recall from texts of so many pairs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RecallRow {
    /// Pairs of a text.
    pub pairs: usize,
    /// The figures.
    #[serde(flatten)]
    pub figures: Compared,
}

/// Recall over a range of distances.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DistanceRow {
    /// Least number of tokens between fact and answer.
    pub from: usize,
    /// One more than the most.
    pub to: usize,
    /// The figures.
    #[serde(flatten)]
    pub figures: Compared,
}

impl Recall {
    pub(super) fn check(&self) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let most = WORDS.len();
        if self.pairs.is_empty() || self.pairs.iter().any(|n| *n == 0 || *n > most) {
            wrong.push(("probes.recall.pairs".into(), format!("must be numbers of 1 to {most}")));
        }
        for (name, value) in [("queries", self.queries), ("candidates", self.candidates)] {
            if !(1..=100_000).contains(&value) {
                wrong.push((format!("probes.recall.{name}"), "must be 1 to 100000".into()));
            }
        }
        wrong
    }

    pub(super) fn questions(&self, seed: u64, encoder: &Encoder) -> Result<Vec<Question>> {
        let mut questions = Vec::new();
        for pairs in &self.pairs {
            for query in 0..self.queries {
                questions.push(self.question(seed, *pairs, query, encoder)?);
            }
        }
        Ok(questions)
    }

    /// Facts asked for are spread evenly over the text, whatever the number of queries.
    fn question(
        &self,
        seed: u64,
        pairs: usize,
        query: usize,
        encoder: &Encoder,
    ) -> Result<Question> {
        let index = hash(format!("recall {pairs} {query}").as_bytes());
        let mut random = Stream::new(seed, index);
        let (mut words, mut numbers) = (WORDS.to_vec(), NUMBERS.collect::<Vec<u32>>());
        random.shuffle(&mut words);
        random.shuffle(&mut numbers);
        let asked = (query * pairs + random.below(pairs)) / self.queries;
        let mut text = String::from("Each word has a number.\n");
        let mut fact_end = 0;
        for (i, (word, number)) in words.iter().zip(&numbers).take(pairs).enumerate() {
            text += &format!("{word}: {number}");
            if i == asked {
                fact_end = text.len();
            }
            text.push('\n');
        }
        text += &format!("\nWhich number has this word?\n{}:", words[asked]);
        let right = numbers[asked];
        numbers.truncate(pairs);
        numbers.remove(asked);
        random.shuffle(&mut numbers);
        let others = numbers.iter().take(self.candidates - 1);
        let answers: Vec<String> =
            std::iter::once(&right).chain(others).map(u32::to_string).collect();
        let most = encoder.length();
        Question::new(encoder, &text, fact_end, &answers, most)?.map_err(|needed| {
            anyhow!(
                "{pairs} pairs make {needed} tokens, `max_length` is {most}: ask for fewer pairs"
            )
        })
    }

    pub(super) fn rows(&self, answered: &Answered) -> Vec<RecallRow> {
        let row = |(at, pairs): (usize, &usize)| {
            let own = at * self.queries..(at + 1) * self.queries;
            let figures = answered.compare(|i, _| own.contains(&i))?;
            Some(RecallRow { pairs: *pairs, figures })
        };
        self.pairs.iter().enumerate().filter_map(row).collect()
    }
}

/// In ranges of powers of two; empty ones are left out.
pub(super) fn by_distance(answered: &Answered) -> Vec<DistanceRow> {
    let farthest = answered.questions.iter().map(|question| question.distance).max().unwrap_or(0);
    let (mut rows, mut from) = (Vec::new(), 0);
    while from <= farthest {
        let to = (from * 2).max(8);
        let near = |_, question: &Question| (from..to).contains(&question.distance);
        let figures = answered.compare(near);
        rows.extend(figures.map(|figures| DistanceRow { from, to, figures }));
        from = to;
    }
    rows
}
