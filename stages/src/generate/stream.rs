//! Text out of tokens, as soon as it is whole: never half a character, in constant memory.
//!
//! A token's bytes are what the tokenizer's decoder makes of it: byte-level BPE, or SentencePiece
//! with or without byte tokens. Also finds stop strings. Knows no model.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokenizers::Tokenizer;

/// What a decoder does to each token, in its order.
#[derive(Debug, PartialEq)]
enum Step {
    /// One text for another.
    Replace(String, String),
    /// `<0x41>` is the byte 0x41.
    Bytes,
    /// Every character stands for a byte, by GPT-2's alphabet.
    ByteLevel(HashMap<char, u8>),
}

/// A tokenizer's tokens as bytes.
pub struct Pieces<'a> {
    tokenizer: &'a Tokenizer,
    steps: Vec<Step>,
    /// What is stripped from the beginning of a text, and how often at most.
    strip: (char, usize),
    /// What stands between tokens.
    between: &'static str,
    special: bool,
}

impl<'a> Pieces<'a> {
    /// Of a byte-level or SentencePiece tokenizer; others are an error. With `special`, special
    /// tokens are text like others, else nothing.
    pub fn new(tokenizer: &'a Tokenizer, special: bool) -> Result<Pieces<'a>> {
        let mut pieces =
            Pieces { tokenizer, steps: Vec::new(), strip: (' ', 0), between: "", special };
        match tokenizer.get_decoder() {
            None => pieces.between = " ",
            Some(decoder) => {
                let decoder = serde_json::to_value(decoder)?;
                pieces.add(&decoder).with_context(|| {
                    format!("the tokenizer's decoder cannot be used to stream: {decoder}")
                })?;
            }
        }
        Ok(pieces)
    }

    fn add(&mut self, decoder: &Value) -> Result<()> {
        let text = |name: &str| decoder[name].as_str();
        match text("type").unwrap_or_default() {
            "Sequence" => {
                let inner = decoder["decoders"].as_array().context("it has no list of decoders")?;
                inner.iter().try_for_each(|decoder| self.add(decoder))?;
            }
            "ByteLevel" => self.steps.push(Step::ByteLevel(alphabet())),
            "ByteFallback" => self.steps.push(Step::Bytes),
            "Fuse" => {}
            "Replace" => {
                let from = decoder["pattern"]["String"].as_str().context("it has a pattern")?;
                let to = text("content").unwrap_or_default();
                self.steps.push(Step::Replace(from.into(), to.into()));
            }
            "Metaspace" => {
                let blank = text("replacement").context("it replaces nothing")?;
                self.steps.push(Step::Replace(blank.into(), " ".into()));
                let never = text("prepend_scheme") == Some("never");
                self.strip = (' ', usize::from(!never));
            }
            "Strip" if decoder["stop"].as_u64() == Some(0) => {
                let content = text("content").and_then(|text| text.chars().next());
                let most = decoder["start"].as_u64().unwrap_or(0) as usize;
                self.strip = (content.unwrap_or(' '), most);
            }
            other => bail!("`{other}` is neither byte-level nor SentencePiece"),
        }
        Ok(())
    }

    /// The bytes of `token`; none of one that the tokenizer does not know.
    fn bytes(&self, token: u32) -> Vec<u8> {
        let Some(mut text) = self.tokenizer.id_to_token(token) else { return Vec::new() };
        if !self.special && self.tokenizer.get_added_vocabulary().is_special_token(&text) {
            return Vec::new();
        }
        for step in &self.steps {
            match step {
                Step::Replace(from, to) => text = text.replace(from.as_str(), to),
                Step::Bytes => {
                    if let Some(byte) = byte_token(&text) {
                        return vec![byte];
                    }
                }
                Step::ByteLevel(alphabet) => {
                    let bytes: Option<Vec<u8>> =
                        text.chars().map(|c| alphabet.get(&c).copied()).collect();
                    return bytes.unwrap_or_else(|| text.into_bytes());
                }
            }
        }
        text.into_bytes()
    }

    /// A text that begins here. `inside`: something stands before it, so that its first blank stays.
    pub fn stream(&self, inside: bool) -> Stream<'_> {
        let strip = if inside { 0 } else { self.strip.1 };
        Stream { pieces: self, strip, begun: inside, half: Vec::new() }
    }
}

/// `<0x41>`.
fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's characters for bytes: printable Latin-1 for itself, the others from U+0100 on.
fn alphabet() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(|byte| !printable(byte)).zip(0x100u32..);
    let others = others.filter_map(|(byte, code)| Some((char::from_u32(code)?, byte)));
    (0..=255u8).filter(printable).map(|byte| (char::from(byte), byte)).chain(others).collect()
}

/// A text in the making.
pub struct Stream<'a> {
    pieces: &'a Pieces<'a>,
    /// How many characters may still be stripped.
    strip: usize,
    begun: bool,
    /// The beginning of a character: 3 bytes at most.
    half: Vec<u8>,
}

impl Stream<'_> {
    /// One more token; adds what is whole by now to `text`.
    pub fn push(&mut self, token: u32, text: &mut String) {
        let bytes = self.pieces.bytes(token);
        if bytes.is_empty() {
            return;
        }
        if self.begun {
            self.half.extend_from_slice(self.pieces.between.as_bytes());
        }
        self.begun = true;
        self.half.extend_from_slice(&bytes);
        let from = text.len();
        let held = whole(&self.half, text);
        self.half.drain(..self.half.len() - held);
        while self.strip > 0 && text.len() > from {
            self.strip = match text[from..].starts_with(self.pieces.strip.0) {
                true => {
                    text.remove(from);
                    self.strip - 1
                }
                false => 0,
            };
        }
    }

    /// The text is over: the beginning of a character, if there is one, can only be told as broken.
    pub fn end(&mut self, text: &mut String) {
        if !self.half.is_empty() {
            self.half.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Adds the whole characters of `bytes` to `text`, and U+FFFD for what can be none; gives how many
/// bytes at the end may yet become a character.
fn whole(bytes: &[u8], text: &mut String) -> usize {
    let mut rest = bytes;
    loop {
        let error = match std::str::from_utf8(rest) {
            Ok(all) => {
                text.push_str(all);
                return 0;
            }
            Err(error) => error,
        };
        let (good, bad) = rest.split_at(error.valid_up_to());
        text.push_str(&String::from_utf8_lossy(good));
        match error.error_len() {
            None => return bad.len(),
            Some(len) => {
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &bad[len..];
            }
        }
    }
}

/// Watches for strings that end a text.
pub struct Stops {
    strings: Vec<String>,
    /// What may be the beginning of one of them; shorter than the longest.
    held: String,
}

impl Stops {
    /// Empty strings stop nothing.
    pub fn new(strings: &[String]) -> Stops {
        let strings = strings.iter().filter(|string| !string.is_empty()).cloned().collect();
        Stops { strings, held: String::new() }
    }

    /// Takes all of `text` and leaves in it what can be told; gives the string that was found first,
    /// which is not told, nor is what follows it.
    pub fn filter(&mut self, text: &mut String) -> Option<&str> {
        self.held.push_str(text);
        text.clear();
        let found = self.strings.iter().enumerate();
        let found = found.filter_map(|(i, string)| Some((self.held.find(string.as_str())?, i)));
        if let Some((at, i)) = found.min() {
            text.push_str(&self.held[..at]);
            self.held.clear();
            return Some(&self.strings[i]);
        }
        let may_begin =
            |at: &usize| self.strings.iter().any(|string| string.starts_with(&self.held[*at..]));
        let from = self.held.char_indices().map(|(at, _)| at).find(may_begin);
        text.extend(self.held.drain(..from.unwrap_or(self.held.len())));
        None
    }

    /// The text is over: what was held back is told after all.
    pub fn end(&mut self, text: &mut String) {
        text.push_str(&std::mem::take(&mut self.held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A tokenizer of `tokens`, of which the first is special.
    fn tokenizer(tokens: &[&str], decoder: Value) -> Tokenizer {
        let vocab: serde_json::Map<String, Value> =
            tokens.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect();
        let special = json!({
            "id": 0, "content": tokens[0], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        });
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}
        });
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    fn byte_level(tokens: &[&str]) -> Tokenizer {
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        tokenizer(tokens, decoder)
    }

    /// As Llama 2's, TinyLlama's, Mistral's.
    fn llama(tokens: &[&str]) -> Tokenizer {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        tokenizer(tokens, decoder)
    }

    fn told(tokenizer: &Tokenizer, tokens: &[u32], inside: bool) -> Vec<String> {
        let pieces = Pieces::new(tokenizer, false).unwrap();
        let mut stream = pieces.stream(inside);
        let push = |token: &u32| {
            let mut text = String::new();
            stream.push(*token, &mut text);
            assert!(stream.half.len() < 4);
            text
        };
        let mut told: Vec<String> = tokens.iter().map(push).collect();
        let mut last = String::new();
        stream.end(&mut last);
        told.extend(Some(last).filter(|last| !last.is_empty()));
        told
    }

    #[test]
    fn a_character_is_told_once_it_is_whole() {
        // 🦀 is f0 9f a6 80: ð Ł ¦ Ģ in GPT-2's alphabet.
        let bytes = byte_level(&["<s>", "ð", "Ł¦", "Ģ", "Ġa", "ÿ", "é"]);
        assert_eq!(told(&bytes, &[4, 1, 2, 3, 4], false), [" a", "", "", "🦀", " a"]);
        // Never a replacement for half of it, but one for what no byte can mend.
        assert_eq!(told(&bytes, &[1, 2, 4], false), ["", "", "\u{fffd} a"]);
        assert_eq!(told(&bytes, &[5, 5, 4], false), ["\u{fffd}", "\u{fffd}", " a"]);
        assert_eq!(told(&bytes, &[4, 1, 2], false), [" a", "", "", "\u{fffd}"]);
        let fallback = llama(&["<s>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x80>", "▁a", "<0xFF>"]);
        assert_eq!(told(&fallback, &[5, 1, 2, 3, 4, 5], false), ["a", "", "", "", "🦀", " a"]);
        assert_eq!(told(&fallback, &[1, 6, 5], true), ["", "\u{fffd}\u{fffd}", " a"]);
    }

    #[test]
    fn the_first_blank_of_a_text_goes_and_that_of_a_continuation_stays() {
        let llama = llama(&["<s>", "▁Paris", "▁", "s"]);
        assert_eq!(told(&llama, &[0, 1, 1], false), ["", "Paris", " Paris"]);
        assert_eq!(told(&llama, &[1, 1], true), [" Paris", " Paris"]);
        assert_eq!(told(&llama, &[2, 1], false), ["", " Paris"]);
        assert_eq!(told(&llama, &[3, 1], false), ["s", " Paris"]);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        assert_eq!(told(&tokenizer(&["<s>", "▁a"], metaspace), &[1, 1], false), ["a", " a"]);
        let none = tokenizer(&["<s>", "a", "b"], Value::Null);
        assert_eq!(told(&none, &[0, 1, 2], false), ["", "a", " b"]);
    }

    #[test]
    fn whole_texts_are_what_the_tokenizer_decodes() {
        let tokens = ["<s>", "ð", "Ł", "¦", "Ģ", "Ġ", "a", "Ã", "©", "Ċ", "日本"];
        let byte_level = byte_level(&tokens);
        let sentence = llama(&["<s>", "▁", "▁a", "b", "<0xC3>", "<0xA9>", "▁▁", "日"]);
        let random = crate::train::philox::Philox::new(1, "tokens");
        for round in 0..300 {
            let ids = |n: u32| -> Vec<u32> {
                (0..12).map(|i| random.block(round * 12 + i)[0] % n).collect()
            };
            let ids_b = ids(tokens.len() as u32);
            let want = byte_level.decode(&ids_b, true).unwrap();
            assert_eq!(told(&byte_level, &ids_b, false).concat(), want, "{ids_b:?}");
            // Bytes that make no character are told one by one here, all of a run there.
            let ids_s = ids(8);
            let want = sentence.decode(&ids_s, true).unwrap();
            if !want.contains('\u{fffd}') {
                assert_eq!(told(&sentence, &ids_s, false).concat(), want, "{ids_s:?}");
            }
        }
    }

    #[test]
    fn special_tokens_are_told_on_demand_and_unknown_ones_never() {
        let tokenizer = byte_level(&["<s>", "a"]);
        assert_eq!(told(&tokenizer, &[0, 1, 77], false), ["", "a", ""]);
        let pieces = Pieces::new(&tokenizer, true).unwrap();
        let mut text = String::new();
        pieces.stream(false).push(0, &mut text);
        assert_eq!(text, "<s>");
    }

    #[test]
    fn decoders_that_look_back_are_refused() {
        let tokenizer =
            tokenizer(&["<s>"], json!({"type": "WordPiece", "prefix": "##", "cleanup": true}));
        let error = Pieces::new(&tokenizer, false).err().unwrap();
        assert!(format!("{error:#}").contains("`WordPiece` is neither"), "{error:#}");
    }

    #[test]
    fn stop_strings_are_found_over_pieces_and_never_told() {
        let feed = |strings: &[&str], parts: &[&str]| -> (String, Option<String>) {
            let strings: Vec<String> = strings.iter().map(|s| s.to_string()).collect();
            let mut stops = Stops::new(&strings);
            let mut told = String::new();
            for part in parts {
                let mut text = part.to_string();
                let found = stops.filter(&mut text).map(String::from);
                told.push_str(&text);
                let longest = strings.iter().map(String::len).max().unwrap_or(0);
                assert!(stops.held.len() < longest.max(1));
                if found.is_some() {
                    return (told, found);
                }
            }
            stops.end(&mut told);
            (told, None)
        };
        let of = |told: &str, found: &str| (told.to_string(), Some(found.to_string()));
        assert_eq!(feed(&["\nUser:"], &["a\n", "Us", "er: b"]), of("a", "\nUser:"));
        assert_eq!(feed(&["\nUser:"], &["a\n", "Us", "a"]), ("a\nUsa".into(), None));
        assert_eq!(feed(&["aab"], &["a", "a", "a", "b", "c"]), of("a", "aab"));
        assert_eq!(feed(&["xyz", "y"], &["wx", "yz"]), of("w", "xyz"));
        assert_eq!(feed(&["éa"], &["é", "é", "a"]), of("é", "éa"));
        assert_eq!(feed(&["ab"], &["xa"]), ("xa".into(), None), "the end tells what was held");
        assert_eq!(feed(&[""], &["xa"]), ("xa".into(), None));
    }
}
