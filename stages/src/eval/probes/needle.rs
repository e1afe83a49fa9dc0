//! A needle in a haystack: neutral sentences, one of which tells a code that is asked for at the end.

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::words::{PLACES, SENTENCES};
use super::{Answered, Compared, Question};
use crate::data::random::{Stream, hash};
use crate::eval::tasks::encode::Encoder;

/// Sentences of a paragraph.
const PARAGRAPH: usize = 6;

/// How long the text is, and where in it the code stands.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Needle {
    /// Tokens of text and question together, at most; none above `max_length`.
    pub lengths: Vec<usize>,
    /// Share of the text that comes before the code: 0 is the beginning, 1 the end.
    pub depths: Vec<f64>,
    /// Texts of each length and depth.
    pub n: usize,
    /// Codes that the right one is to be chosen among, itself included; the others are not in the
    /// text. Each costs a pass; with 1 only exact answers count.
    pub candidates: usize,
}

impl Default for Needle {
    fn default() -> Needle {
        Needle { lengths: vec![256, 1024], depths: vec![0.0, 0.5, 1.0], n: 8, candidates: 4 }
    }
}

/// The figures of one length and depth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NeedleRow {
    /// Tokens of the text, at most.
    pub length: usize,
    /// Share of the text before the code.
    pub depth: f64,
    /// The figures.
    #[serde(flatten)]
    pub figures: Compared,
}

impl Needle {
    pub(super) fn check(&self, length: usize) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let mut refuse = |name: &str, why: String| {
            wrong.push((format!("probes.needle.{name}"), why));
        };
        if self.lengths.is_empty() || self.lengths.iter().any(|n| !(1..=length).contains(n)) {
            refuse("lengths", format!("must be numbers of 1 to {length}, the `max_length`"));
        }
        if self.depths.is_empty() || self.depths.iter().any(|d| !(0.0..=1.0).contains(d)) {
            refuse("depths", "must be shares of 0 to 1".into());
        }
        if !(1..=100_000).contains(&self.n) {
            refuse("n", "must be 1 to 100000".into());
        }
        if !(1..=1000).contains(&self.candidates) {
            refuse("candidates", "must be 1 to 1000".into());
        }
        wrong
    }

    /// Every length with every depth.
    fn cells(&self) -> impl Iterator<Item = (usize, f64)> {
        let depths = |length: &usize| {
            let length = *length;
            self.depths.iter().map(move |depth| (length, *depth))
        };
        self.lengths.iter().flat_map(depths)
    }

    pub(super) fn questions(&self, seed: u64, encoder: &Encoder) -> Result<Vec<Question>> {
        let sizes = SENTENCES.iter().map(|text| encoder.tokens_from(&format!(" {text}"), 0));
        let sizes: Vec<usize> = sizes.collect::<Result<_>>()?;
        let mut questions = Vec::new();
        for (length, depth) in self.cells() {
            for number in 0..self.n {
                let index = hash(format!("needle {length} {depth} {number}").as_bytes());
                let hay = Haystack::new(Stream::new(seed, index), self.candidates);
                questions.push(hay.question(encoder, &sizes, length, depth)?);
            }
        }
        Ok(questions)
    }

    pub(super) fn rows(&self, answered: &Answered) -> Vec<NeedleRow> {
        let row = |(at, (length, depth)): (usize, (usize, f64))| {
            let own = at * self.n..(at + 1) * self.n;
            let figures = answered.compare(|i, _| own.contains(&i))?;
            Some(NeedleRow { length, depth, figures })
        };
        self.cells().enumerate().filter_map(row).collect()
    }
}

/// What goes into one text.
struct Haystack {
    random: Stream,
    place: &'static str,
    /// The right one first.
    codes: Vec<String>,
}

impl Haystack {
    fn new(mut random: Stream, candidates: usize) -> Haystack {
        let place = random.pick(PLACES);
        let mut codes: Vec<String> = Vec::new();
        while codes.len() < candidates {
            let code = random.between(1000, 9999).to_string();
            if !codes.contains(&code) {
                codes.push(code);
            }
        }
        Haystack { random, place, codes }
    }

    /// As many sentences as fit into `length` tokens with needle and question.
    fn question(
        mut self,
        encoder: &Encoder,
        sizes: &[usize],
        length: usize,
        depth: f64,
    ) -> Result<Question> {
        let hay = self.hay(sizes, length);
        for count in (1..=hay.len()).rev() {
            let (text, fact_end) = self.text(&hay[..count], depth);
            // The sum over sentences was a guess of the tokens of all together.
            if let Ok(question) = Question::new(encoder, &text, fact_end, &self.codes, length)? {
                return Ok(question);
            }
        }
        bail!("a needle in {length} tokens has no room: ask for longer texts")
    }

    /// Sentences in random order, again from the start when all are used, of about `length` tokens.
    fn hay(&mut self, sizes: &[usize], length: usize) -> Vec<&'static str> {
        let (mut order, mut hay, mut tokens): (Vec<usize>, Vec<&str>, usize) = (vec![], vec![], 0);
        let (needle, question) = self.around();
        let around = (needle.len() + question.len()) / 4;
        while tokens + around < length {
            if order.is_empty() {
                order = (0..SENTENCES.len()).collect();
                self.random.shuffle(&mut order);
            }
            let next = order.pop().unwrap_or(0);
            tokens += sizes[next].max(1);
            hay.push(SENTENCES[next]);
        }
        hay
    }

    /// The needle, and what comes after the text.
    fn around(&self) -> (String, String) {
        let (place, code) = (self.place, &self.codes[0]);
        let needle = format!("The code of the {place} is {code}.");
        let ask = format!(
            "\n\nQuestion: What is the code of the {place}?\nAnswer: The code of the {place} is"
        );
        (needle, ask)
    }

    /// The whole text, and where the code in it ends.
    fn text(&self, hay: &[&str], depth: f64) -> (String, usize) {
        let (needle, ask) = self.around();
        let at = (depth * hay.len() as f64).round() as usize;
        let (mut text, mut fact_end) = (String::new(), 0);
        let needle = std::iter::once(needle.as_str());
        let before = hay[..at].iter().copied();
        let sentences = before.chain(needle).chain(hay[at..].iter().copied());
        for (i, sentence) in sentences.enumerate() {
            let space = match i {
                0 => "",
                i if i % PARAGRAPH == 0 => "\n",
                _ => " ",
            };
            text = text + space + sentence;
            if i == at {
                fact_end = text.len() - 1;
            }
        }
        (text + &ask, fact_end)
    }
}
