//! The embedded sample text: little English-like worlds in which facts stated early are asked for
//! later. Knows no tokenizer, but every word is short, so that 512 tokens hold them all.
//!
//! What makes recall learnable rather than guessable (measured): one kind of fact a document, keys
//! that are distinct, every fact repeated twice and mostly in the words it was stated in, the value
//! right after its key, and many documents that are one random line repeated, which teach copying
//! first. (With words between key and value, "ken has the hat", 2.9M tokens teach copying and no
//! recall.)

use super::document::{Document, Question};
use super::random::Stream;

/// Shares of things in the sample.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Of documents that are one line repeated.
    pub refrains: f64,
    /// Of repeated facts that are put as a question.
    pub questions: f64,
    /// Chance of a sentence about nothing after each sentence.
    pub filler: f64,
}

/// A kind of fact: who may be its subject, what may be said of it, and how.
struct Kind {
    keys: [&'static str; 16],
    values: [&'static str; 16],
    /// What comes before key and value in a statement: `let` makes "let sam hop.".
    statement: &'static str,
    /// What comes before the key in a question: `and` makes "and sam? hop.".
    question: &'static str,
}

#[rustfmt::skip]
const KINDS: [Kind; 4] = [
    Kind {
        keys: ["man", "boy", "cop", "vet", "nun", "dad", "lad", "son", "pal", "mob", "mom", "kid", "guy", "pop", "tot", "gal"],
        values: ["ran", "sat", "dug", "hid", "ate", "won", "led", "lit", "hit", "bit", "fed", "met", "got", "put", "cut", "fit"],
        statement: "the",
        question: "and the",
    },
    Kind {
        keys: ["red", "big", "hot", "wet", "sad", "mad", "bad", "fat", "new", "low", "far", "tan", "dim", "old", "raw", "shy"],
        values: ["cup", "hat", "bag", "pen", "map", "mug", "jug", "box", "net", "kit", "pot", "fan", "toy", "wig", "jar", "pin"],
        statement: "see the",
        question: "and the",
    },
    Kind {
        keys: ["sam", "pam", "dan", "jan", "ken", "ben", "ted", "ned", "meg", "peg", "bob", "rob", "kay", "ray", "roy", "may"],
        values: ["run", "hop", "dig", "nap", "sip", "jog", "beg", "hug", "sit", "win", "rub", "lay", "pay", "sob", "mop", "tag"],
        statement: "let",
        question: "and",
    },
    Kind {
        keys: ["den", "bog", "bay", "van", "dam", "pit", "log", "hay", "bed", "hut", "bin", "car", "cot", "rug", "gap", "mat"],
        values: ["cat", "dog", "pig", "hen", "rat", "cow", "fox", "hog", "ram", "bat", "bug", "pup", "cub", "nag", "jay", "ant"],
        statement: "it is the",
        question: "and the",
    },
];

const FILLER: [&str; 8] = [
    "it is day.",
    "let us go.",
    "we can not say.",
    "it is not far.",
    "so we go in.",
    "now we sit.",
    "it is hot now.",
    "we do not run.",
];

/// Document `index` of the sample with this seed; depends on nothing else.
pub fn document(seed: u64, index: u64, mix: &Mix) -> Document {
    let mut stream = Stream::new(seed, index);
    if stream.chance(mix.refrains) { refrain(&mut stream) } else { facts(&mut stream, mix) }
}

/// A line of 4 to 15 random content words, 2 to 4 times. What is asked: each later line, without
/// its first word.
fn refrain(stream: &mut Stream) -> Document {
    let line: Vec<&str> = (0..stream.between(4, 15)).map(|_| content_word(stream)).collect();
    let line = format!("{}.", line.join(" "));
    let skip = line.find(' ').map_or(0, |at| at + 1);
    let mut document = Document { kind: "refrain".into(), ..Document::default() };
    for turn in 0..stream.between(2, 4) {
        if turn > 0 {
            document.text.push(' ');
        }
        let start = document.text.len();
        document.text.push_str(&line);
        if turn > 0 {
            let span = [start + skip, document.text.len()];
            let fact_span = span.map(|at| at - line.len() - 1);
            document.answers.push(Question { span, fact_span, candidates: content_words() });
        }
    }
    document
}

fn content_word(stream: &mut Stream) -> &'static str {
    let kind = &KINDS[stream.below(KINDS.len())];
    if stream.chance(0.5) { stream.pick(&kind.keys) } else { stream.pick(&kind.values) }
}

fn content_words() -> usize {
    KINDS.iter().map(|kind| kind.keys.len() + kind.values.len()).sum()
}

/// 3 to 7 facts of one kind, then every one of them twice more in random order.
fn facts(stream: &mut Stream, mix: &Mix) -> Document {
    let kind = &KINDS[stream.below(KINDS.len())];
    let mut keys: Vec<usize> = (0..kind.keys.len()).collect();
    stream.shuffle(&mut keys);
    keys.truncate(stream.between(3, 7));
    let facts: Vec<(usize, usize)> =
        keys.into_iter().map(|key| (key, stream.below(kind.values.len()))).collect();
    let mut distinct: Vec<usize> = facts.iter().map(|(_, value)| *value).collect();
    distinct.sort_unstable();
    distinct.dedup();

    let mut order: Vec<usize> = (0..facts.len()).chain(0..facts.len()).collect();
    stream.shuffle(&mut order);
    let mut document = Document { kind: "facts".into(), ..Document::default() };
    let mut stated: Vec<Option<[usize; 2]>> = vec![None; facts.len()];
    for (turn, at) in (0..facts.len()).chain(order).enumerate() {
        let (key, value) = (kind.keys[facts[at].0], kind.values[facts[at].1]);
        let asked = turn >= facts.len() && stream.chance(mix.questions);
        let (before, after) = if asked { (kind.question, "? ") } else { (kind.statement, " ") };
        if turn > 0 {
            document.text.push(' ');
        }
        document.text.push_str(before);
        document.text.push(' ');
        let start = document.text.len();
        document.text.push_str(key);
        document.text.push_str(after);
        let span = [document.text.len(), document.text.len() + value.len()];
        document.text.push_str(value);
        document.text.push('.');
        if let Some(fact_span) = stated[at] {
            document.answers.push(Question { span, fact_span, candidates: distinct.len() });
        }
        stated[at] = Some([start, span[1]]);
        if stream.chance(mix.filler) {
            document.text.push(' ');
            document.text.push_str(stream.pick(&FILLER));
        }
    }
    document
}
