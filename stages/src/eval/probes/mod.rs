//! Probes of memory that work with any tokenizer: made-up texts with one fact to find again, whose
//! answer is scored as a continuation. The same from the same seed.

pub mod needle;
pub mod recall;
mod words;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::needle::{Needle, NeedleRow};
use self::recall::{DistanceRow, Recall, RecallRow};
use super::likelihood::{Item, Likelihood};
use super::report::short;
use super::tasks::encode::Encoder;
use super::tasks::results::Mean;

/// Which probes to make; none unless they are named.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Probes {
    /// Words and their numbers, one of which is asked for again.
    pub recall: Option<Recall>,
    /// One sentence in a long text, asked for at its end.
    pub needle: Option<Needle>,
    /// Other texts, other questions.
    pub seed: u64,
}

/// All probes' figures.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ProbeResults {
    /// Recall by the number of pairs.
    pub recall: Vec<RecallRow>,
    /// Recall by the tokens between fact and answer.
    pub recall_by_distance: Vec<DistanceRow>,
    /// Needles by length and depth.
    pub needle: Vec<NeedleRow>,
}

/// What is asked at the end of a text.
pub(crate) struct Question {
    /// The right answer first, then the others that it is to be chosen among.
    items: Vec<Item>,
    /// Tokens between the fact and its answer.
    distance: usize,
}

/// One model's figures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ProbeFigures {
    /// Share of answers of which every token is the likeliest.
    pub exact: f64,
    /// Its standard error.
    pub exact_stderr: Option<f64>,
    /// Share of answers that are likelier than all others offered; none if none is.
    pub chosen: Option<f64>,
    /// Its standard error.
    pub chosen_stderr: Option<f64>,
}

/// Both models' figures on some questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// Questions.
    pub n: usize,
    /// What guessing scores as `chosen`.
    pub chance: Option<f64>,
    /// The model evaluated.
    pub student: ProbeFigures,
    /// The model it is compared with.
    pub teacher: Option<ProbeFigures>,
}

impl Probes {
    /// Whether there is anything to ask.
    pub fn any(&self) -> bool {
        self.recall.is_some() || self.needle.is_some()
    }

    /// What is wrong with the parameters, by name.
    pub fn check(&self, length: usize) -> Vec<(String, String)> {
        let recall = self.recall.iter().flat_map(Recall::check);
        recall.chain(self.needle.iter().flat_map(|needle| needle.check(length))).collect()
    }
}

impl Question {
    /// `answers` (the right one first) after `context`, in which the fact ends at byte `fact_end`;
    /// or how many tokens there are, if more than `most`: what is asked for could be cut off.
    fn new(
        encoder: &Encoder,
        context: &str,
        fact_end: usize,
        answers: &[String],
        most: usize,
    ) -> Result<Result<Question, usize>> {
        let mut items = Vec::new();
        for answer in answers {
            let (before, after) = encoder.pair(context, &format!(" {answer}"))?;
            let needed = before.len() + after.len() - 1;
            if needed > most {
                return Ok(Err(needed));
            }
            items.push(Item::new(&before, &after, most)?);
        }
        Ok(Ok(Question { items, distance: encoder.tokens_from(context, fact_end)? }))
    }
}

/// Whether the right answer is given, and whether it is chosen (if there are others).
fn judged(own: &[Likelihood]) -> (bool, Option<bool>) {
    let (right, others) = (own[0], &own[1..]);
    let best = others.iter().all(|other| right.nats > other.nats);
    (right.greedy, (!others.is_empty()).then_some(best))
}

impl ProbeFigures {
    fn of(answers: &[&[Likelihood]]) -> Option<ProbeFigures> {
        let share = |hit: bool| f64::from(u8::from(hit));
        let judged: Vec<_> = answers.iter().map(|own| judged(own)).collect();
        let exact = Mean::of(&judged.iter().map(|j| share(j.0)).collect::<Vec<_>>())?;
        let chosen = Mean::of(&judged.iter().filter_map(|j| j.1.map(share)).collect::<Vec<_>>());
        Some(ProbeFigures {
            exact: short(exact.value),
            exact_stderr: exact.stderr.map(short),
            chosen: chosen.map(|mean| short(mean.value)),
            chosen_stderr: chosen.and_then(|mean| mean.stderr).map(short),
        })
    }
}

/// Questions with what both models say to them.
pub(crate) struct Answered<'a> {
    questions: &'a [Question],
    student: Vec<&'a [Likelihood]>,
    teacher: Option<Vec<&'a [Likelihood]>>,
}

impl<'a> Answered<'a> {
    fn new(
        questions: &'a [Question],
        student: &'a [Likelihood],
        teacher: Option<&'a [Likelihood]>,
    ) -> Answered<'a> {
        let split = |mut rest: &'a [Likelihood]| -> Vec<&'a [Likelihood]> {
            let own = |question: &Question| {
                let (own, after) = rest.split_at(question.items.len());
                rest = after;
                own
            };
            questions.iter().map(own).collect()
        };
        Answered { questions, student: split(student), teacher: teacher.map(split) }
    }

    /// Figures on the questions that are `selected`, if any is.
    fn compare(&self, selected: impl Fn(usize, &Question) -> bool) -> Option<Compared> {
        let chosen: Vec<usize> =
            (0..self.questions.len()).filter(|i| selected(*i, &self.questions[*i])).collect();
        let pick = |all: &Vec<&'a [Likelihood]>| -> Vec<&'a [Likelihood]> {
            chosen.iter().map(|i| all[*i]).collect()
        };
        let offered = |i: &usize| self.questions[*i].items.len();
        let guesses: Vec<f64> =
            chosen.iter().map(offered).filter(|n| *n > 1).map(|n| 1.0 / n as f64).collect();
        Some(Compared {
            n: chosen.len(),
            chance: Mean::of(&guesses).map(|mean| short(mean.value)),
            student: ProbeFigures::of(&pick(&self.student))?,
            teacher: self.teacher.as_ref().and_then(|all| ProbeFigures::of(&pick(all))),
        })
    }
}

impl Probes {
    /// Makes and asks all probes; `ask` gets a name and items and gives both models' likelihoods.
    pub fn run(
        &self,
        encoder: &Encoder,
        mut ask: impl FnMut(&str, &[Item]) -> Result<super::bench::Answers>,
    ) -> Result<ProbeResults> {
        let mut results = ProbeResults::default();
        if let Some(recall) = &self.recall {
            let questions = recall.questions(self.seed, encoder)?;
            let answers = ask("recall", &items(&questions))?;
            let found = Answered::new(&questions, &answers.student, answers.teacher.as_deref());
            results.recall = recall.rows(&found);
            results.recall_by_distance = recall::by_distance(&found);
        }
        if let Some(needle) = &self.needle {
            let questions = needle.questions(self.seed, encoder)?;
            let answers = ask("needle", &items(&questions))?;
            let found = Answered::new(&questions, &answers.student, answers.teacher.as_deref());
            results.needle = needle.rows(&found);
        }
        Ok(results)
    }
}

fn items(questions: &[Question]) -> Vec<Item> {
    questions.iter().flat_map(|question| question.items.iter().cloned()).collect()
}
