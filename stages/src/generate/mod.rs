//! Text from a model, token by token: sampling, streaming, stopping, chats. Knows no terminal.
//!
//! Nothing here grows with the text but the conversation of a chat: a student's memory stays what it
//! is.

pub mod about;
pub mod chat;
pub mod sample;
pub mod stream;
mod template;

use anyhow::{Context as _, Result};

use crate::models::decode::Decoder;
use about::Words;
use sample::Sampler;
use stream::{Pieces, Stops};

/// Takes in tokens and tells the logits of what follows.
pub trait Reader {
    /// Logits after the last of `tokens`, of which there is at least one.
    fn read(&mut self, tokens: &[u32]) -> &[f32];
}

impl Reader for Decoder<'_> {
    fn read(&mut self, tokens: &[u32]) -> &[f32] {
        Decoder::read(self, tokens)
    }
}

/// When a text is over.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// So many tokens at most; at least one.
    pub tokens: usize,
    /// Tokens that end it; they are not told.
    pub ends: Vec<u32>,
    /// Texts that end it; they are not told.
    pub stops: Vec<String>,
}

/// Why a text is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There are as many tokens as were allowed.
    Tokens,
    /// The model ended it.
    End,
    /// It came to a stop string.
    Stop(String),
    /// Whoever hears it does not want more.
    Interrupted,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spoken {
    /// Why it is over.
    pub reason: Reason,
    /// Tokens chosen, the one that ends it included.
    pub tokens: usize,
    /// The last of them, which was not read.
    pub unread: u32,
}

/// Chooses what follows `logits_v`, reads it, and so on. `hear` gets every token that was chosen and
/// the text that became whole with it, at the end also what is left of the text without a token; it
/// says whether to go on.
pub fn speak(
    reader: &mut impl Reader,
    logits_v: &[f32],
    sampler: &mut Sampler,
    (pieces, inside): (&Pieces<'_>, bool),
    limits: &Limits,
    hear: &mut dyn FnMut(Option<u32>, &str) -> bool,
) -> Result<Spoken> {
    let (mut stream, mut stops) = (pieces.stream(inside), Stops::new(&limits.stops));
    let (mut text, mut tokens) = (String::new(), 1);
    let mut token = sampler.choose(logits_v)?;
    let reason = loop {
        sampler.saw(&[token]);
        if limits.ends.contains(&token) {
            hear(Some(token), "");
            break Reason::End;
        }
        stream.push(token, &mut text);
        let stop = stops.filter(&mut text).map(String::from);
        let go_on = hear(Some(token), &text);
        text.clear();
        if let Some(stop) = stop {
            return Ok(Spoken { reason: Reason::Stop(stop), tokens, unread: token });
        }
        if !go_on || tokens >= limits.tokens {
            break if go_on { Reason::Tokens } else { Reason::Interrupted };
        }
        token = sampler
            .choose(reader.read(&[token]))
            .with_context(|| format!("the text breaks off after {tokens} tokens"))?;
        tokens += 1;
    };
    stream.end(&mut text);
    if stops.filter(&mut text).is_none() {
        stops.end(&mut text);
    }
    if !text.is_empty() {
        hear(None, &text);
    }
    Ok(Spoken { reason, tokens, unread: token })
}

/// Tokens a reader takes in before whoever waits is asked whether to go on.
const PIECE: usize = 256;

/// Reads `tokens`, at least one, and gives the logits after the last; `None` once `go_on` says no.
pub fn listen<'a>(
    reader: &'a mut impl Reader,
    tokens: &[u32],
    sampler: &mut Sampler,
    go_on: &dyn Fn() -> bool,
) -> Option<&'a [f32]> {
    sampler.saw(tokens);
    let last = tokens.len().saturating_sub(1) / PIECE * PIECE;
    let (early, late) = tokens.split_at(last);
    for piece in early.chunks(PIECE) {
        if !go_on() {
            return None;
        }
        reader.read(piece);
    }
    Some(reader.read(late))
}

impl Words {
    /// The pieces of its texts; see [`Pieces::new`].
    pub fn pieces(&self, special: bool) -> Result<Pieces<'_>> {
        Pieces::new(&self.tokenizer, special)
    }
}

#[cfg(test)]
mod tests {
    use super::sample::Sampling;
    use super::*;
    use tokenizers::Tokenizer;

    /// Says the token after the last one it read, of `n`.
    struct Counter {
        n: usize,
        read: Vec<u32>,
        logits: Vec<f32>,
    }

    impl Reader for Counter {
        fn read(&mut self, tokens: &[u32]) -> &[f32] {
            self.read.extend(tokens);
            self.logits = vec![0.0; self.n];
            self.logits[(tokens[tokens.len() - 1] as usize + 1) % self.n] = 1.0;
            &self.logits
        }
    }

    /// `a`, `b`, … as tokens 0, 1, …
    fn letters() -> Tokenizer {
        let vocab: serde_json::Map<String, serde_json::Value> =
            ('a'..='z').zip(0..).map(|(c, id): (char, u32)| (c.into(), id.into())).collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Fuse"}, "model": {"type": "BPE", "vocab": vocab, "merges": []}
        });
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    /// Text, tokens heard, and what came of it, from `b` on.
    fn spoken(limits: Limits, most_heard: usize) -> (String, Vec<u32>, Spoken, Vec<u32>) {
        let tokenizer = letters();
        let pieces = Pieces::new(&tokenizer, false).unwrap();
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let mut sampler = Sampler::new(&greedy, 0).unwrap();
        let mut counter = Counter { n: 26, read: Vec::new(), logits: Vec::new() };
        let logits = listen(&mut counter, &[0], &mut sampler, &|| true).unwrap().to_vec();
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let mut hear = |token: Option<u32>, part: &str| {
            text.push_str(part);
            tokens.extend(token);
            tokens.len() < most_heard
        };
        let spoken =
            speak(&mut counter, &logits, &mut sampler, (&pieces, true), &limits, &mut hear);
        (text, tokens, spoken.unwrap(), counter.read)
    }

    #[test]
    fn a_text_ends_for_each_reason() {
        let limits = |tokens, ends: &[u32], stops: &[&str]| Limits {
            tokens,
            ends: ends.to_vec(),
            stops: stops.iter().map(|s| s.to_string()).collect(),
        };
        let (text, tokens, done, read) = spoken(limits(3, &[], &[]), 99);
        assert_eq!(
            (text.as_str(), &tokens[..], &read[..]),
            ("bcd", &[1, 2, 3][..], &[0, 1, 2][..])
        );
        assert_eq!(done, Spoken { reason: Reason::Tokens, tokens: 3, unread: 3 });
        let (text, tokens, done, _) = spoken(limits(30, &[4], &[]), 99);
        assert_eq!((text.as_str(), tokens.len()), ("bcd", 4));
        assert_eq!(done, Spoken { reason: Reason::End, tokens: 4, unread: 4 });
        let (text, _, done, _) = spoken(limits(30, &[], &["xx", "def"]), 99);
        assert_eq!(text, "bc");
        assert_eq!(done, Spoken { reason: Reason::Stop("def".into()), tokens: 5, unread: 5 });
        // The beginning of a stop string is told when nothing more comes.
        let (text, _, done, _) = spoken(limits(30, &[6], &["efz"]), 99);
        assert_eq!((text.as_str(), done.reason), ("bcdef", Reason::End));
        let (text, _, done, _) = spoken(limits(30, &[], &[]), 2);
        assert_eq!((text.as_str(), done.reason), ("bc", Reason::Interrupted));
    }

    #[test]
    fn a_long_prompt_is_read_whole_and_can_be_interrupted() {
        let prompt: Vec<u32> = (0..1000).map(|i| i % 26).collect();
        let mut sampler = Sampler::new(&Sampling::default(), 0).unwrap();
        for n in [1, 255, 256, 257, 512, 1000] {
            let mut counter = Counter { n: 26, read: Vec::new(), logits: Vec::new() };
            listen(&mut counter, &prompt[..n], &mut sampler, &|| true).unwrap();
            assert_eq!(counter.read, prompt[..n]);
        }
        let mut counter = Counter { n: 26, read: Vec::new(), logits: Vec::new() };
        assert!(listen(&mut counter, &prompt, &mut sampler, &|| false).is_none());
    }
}
