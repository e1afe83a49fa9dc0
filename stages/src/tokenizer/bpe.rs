//! The common end of every conversion: vocabulary, merges and the steps around them, checked and put
//! together as the tokenizers crate's JSON has them. Knows no file format.

use std::collections::{HashMap, HashSet};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// GPT-2's alphabet and words, as pre-tokenizers name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pre {
    /// GPT-2's word pattern.
    Gpt2,
    /// Every digit alone, then GPT-2's pattern.
    Digits,
    /// Llama 3's pattern: up to three digits together.
    Llama3,
    /// Qwen 2's pattern, after normalisation to NFC.
    Qwen2,
}

/// The alternatives before and after the digits, which Llama 3 and Qwen 2 share.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+";
const SIGNS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Pre {
    fn pattern(self) -> Option<String> {
        match self {
            Pre::Gpt2 | Pre::Digits => None,
            Pre::Llama3 => Some(format!(r"{WORDS}|\p{{N}}{{1,3}}|{SIGNS}")),
            Pre::Qwen2 => Some(format!(r"{WORDS}|\p{{N}}|{SIGNS}")),
        }
    }

    /// The pre-tokenizer.
    pub fn steps(self, add_prefix_space: bool) -> Value {
        let bytes = |use_regex| byte_level(add_prefix_space, use_regex);
        let both = |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
        match self.pattern() {
            Some(pattern) => {
                let pattern = json!({"Regex": pattern});
                let split = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
                both(split, bytes(false))
            }
            None if self == Pre::Digits => {
                both(json!({"type": "Digits", "individual_digits": true}), bytes(true))
            }
            None => bytes(true),
        }
    }
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

/// A token that is looked for in the text before anything else.
#[derive(Clone, Debug)]
pub(super) struct Added {
    pub id: u32,
    pub content: String,
    /// Left out of decoded text.
    pub special: bool,
    /// Take blanks at its left, at its right, and match whole words only.
    pub flags: [bool; 3],
}

impl Added {
    pub fn new(id: u32, content: &str, special: bool) -> Added {
        Added { id, content: content.into(), special, flags: [false; 3] }
    }

    fn json(&self) -> Value {
        let [lstrip, rstrip, single_word] = self.flags;
        json!({
            "id": self.id,
            "content": self.content,
            "special": self.special,
            "normalized": false,
            "lstrip": lstrip,
            "rstrip": rstrip,
            "single_word": single_word,
        })
    }
}

/// A tokenizer, before it is checked.
pub(super) struct Bpe {
    /// Ids by content; the added ones too.
    pub ids: HashMap<String, u32>,
    /// Best first.
    pub merges: Vec<(String, String)>,
    pub added: Vec<Added>,
    /// Put before every text.
    pub bos: Option<(String, u32)>,
    pub unk: Option<String>,
    pub kind: Kind,
}

/// How text becomes the vocabulary's letters.
pub(super) enum Kind {
    /// Bytes as GPT-2's letters.
    Bytes { pre: Pre, add_prefix_space: bool },
    /// Characters, with bytes as `<0x0A>` for those that the vocabulary lacks; blanks are written
    /// as `blank`, and one more is put before the text if `prefix`.
    Characters { blank: char, prefix: bool },
}

/// A token of each id, or what is wrong with them: none, twice the same, more than ids can count.
pub(super) fn ids(tokens: &[String]) -> Result<HashMap<String, u32>> {
    ensure!(!tokens.is_empty(), "the vocabulary is empty");
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        let id = u32::try_from(id).context("more tokens than ids")?;
        if let Some(first) = ids.insert(token.clone(), id) {
            return Err(anyhow!("tokens {first} and {id} are both {token:?}"));
        }
    }
    Ok(ids)
}

/// Parses `left right`, as GGUF and `merges.txt` have it.
pub(super) fn merge(text: &str) -> Option<(String, String)> {
    let (left, right) = text.split_once(' ')?;
    let fine = !left.is_empty() && !right.is_empty() && !right.contains(' ');
    fine.then(|| (left.into(), right.into()))
}

/// Whether each merge is of two tokens that make a third. `prefix` is what a token that begins no
/// word starts with; it is dropped from the right one.
pub(super) fn check_merges<'a>(
    merges: impl IntoIterator<Item = (&'a str, &'a str)>,
    prefix: &str,
    has: impl Fn(&str) -> bool,
) -> Result<()> {
    let mut whole = String::new();
    for (at, (left, right)) in merges.into_iter().enumerate() {
        for part in [left, right] {
            ensure!(has(part), "merge {at} is of {part:?}, which is no token");
        }
        let rest = right.strip_prefix(prefix);
        let rest =
            rest.with_context(|| format!("merge {at}: {right:?} lacks the prefix {prefix:?}"))?;
        whole.clear();
        whole.extend([left, rest]);
        ensure!(
            has(&whole),
            "merge {at} of {left:?} and {right:?} makes {whole:?}, which is no token"
        );
    }
    Ok(())
}

/// The merges that a vocabulary with scores stands for (SentencePiece's BPE): every way to cut a
/// piece in two pieces, in order of the piece's score. `pieces` are id, text and score; only these
/// are cut and merged.
///
/// Equal scores are told apart as transformers does it: longer left parts, longer right parts, lower
/// ids first.
pub(super) fn merges_of_scores(pieces: &[(u32, &str, f32)]) -> Result<Vec<(String, String)>> {
    /// SentencePiece's own limit is 16 characters by default; models go to some dozen.
    const LONGEST: usize = 1024;
    let known: HashMap<&str, u32> = pieces.iter().map(|(id, piece, _)| (*piece, *id)).collect();
    let mut found = Vec::new();
    for (id, piece, score) in pieces {
        ensure!(!score.is_nan(), "the score of token {id}, {piece:?}, is not a number");
        let bytes = piece.len();
        ensure!(bytes <= LONGEST, "token {id} has {bytes} bytes, more than any piece ({LONGEST})");
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(l), Some(r)) = (known.get(left), known.get(right)) {
                found.push((*score, left, right, *id, *l, *r));
            }
        }
    }
    let count = |text: &str| text.chars().count();
    found.sort_by(|a, b| {
        let longer = (count(b.1), count(b.2)).cmp(&(count(a.1), count(a.2)));
        // -0.0 and 0.0 are the same score.
        let better = (b.0 + 0.0).total_cmp(&(a.0 + 0.0));
        better.then(longer).then((a.3, a.4, a.5).cmp(&(b.3, b.4, b.5)))
    });
    Ok(found.into_iter().map(|(_, left, right, ..)| (left.into(), right.into())).collect())
}

impl Bpe {
    /// Checks and builds.
    pub fn build(self) -> Result<Tokenizer> {
        let has = |token: &str| self.ids.contains_key(token);
        check_merges(self.merges.iter().map(|(l, r)| (&l[..], &r[..])), "", has)?;
        let mut seen = HashSet::new();
        for added in &self.added {
            ensure!(!added.content.is_empty(), "token {} is special, but empty", added.id);
            ensure!(seen.insert(&added.content), "token {:?} is added twice", added.content);
        }
        let tokenizer = serde_json::from_value(self.json());
        tokenizer.map_err(|error| anyhow!("the tokenizers crate does not take it: {error}"))
    }

    /// What `tokenizer.json` holds.
    fn json(&self) -> Value {
        let llama3 = matches!(self.kind, Kind::Bytes { pre: Pre::Llama3, .. });
        let characters = matches!(self.kind, Kind::Characters { .. });
        let mut added: Vec<&Added> = self.added.iter().collect();
        added.sort_by_key(|added| added.id);
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.iter().map(|added| added.json()).collect::<Vec<_>>(),
            "normalizer": self.normalizer(),
            "pre_tokenizer": self.pre_tokenizer(),
            "post_processor": self.post_processor(),
            "decoder": self.decoder(),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": self.unk,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": characters,
                "byte_fallback": characters,
                "ignore_merges": llama3,
                "vocab": self.ids,
                "merges": self.merges,
            },
        })
    }

    fn normalizer(&self) -> Value {
        match &self.kind {
            Kind::Bytes { pre: Pre::Qwen2, .. } => json!({"type": "NFC"}),
            Kind::Bytes { .. } => Value::Null,
            Kind::Characters { blank, prefix } => {
                let prepend = json!({"type": "Prepend", "prepend": blank});
                let replace =
                    json!({"type": "Replace", "pattern": {"String": " "}, "content": blank});
                let steps = [(*prefix, prepend), (*blank != ' ', replace)];
                let steps: Vec<Value> =
                    steps.into_iter().filter_map(|(wanted, step)| wanted.then_some(step)).collect();
                json!({"type": "Sequence", "normalizers": steps})
            }
        }
    }

    fn pre_tokenizer(&self) -> Value {
        match self.kind {
            Kind::Bytes { pre, add_prefix_space } => pre.steps(add_prefix_space),
            Kind::Characters { .. } => Value::Null,
        }
    }

    fn decoder(&self) -> Value {
        match &self.kind {
            Kind::Bytes { .. } => byte_level(false, true),
            Kind::Characters { blank, prefix } => {
                let replace =
                    json!({"type": "Replace", "pattern": {"String": blank}, "content": " "});
                let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
                let mut steps = vec![json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
                if *blank != ' ' {
                    steps.insert(0, replace);
                }
                if *prefix {
                    steps.push(strip);
                }
                json!({"type": "Sequence", "decoders": steps})
            }
        }
    }

    fn post_processor(&self) -> Value {
        let bytes = match self.kind {
            Kind::Bytes { add_prefix_space, .. } => Some(byte_level(add_prefix_space, true)),
            Kind::Characters { .. } => None,
        };
        let template = self.bos.as_ref().map(|(token, id)| {
            let bos = |kind: u32| json!({"SpecialToken": {"id": token, "type_id": kind}});
            let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
            json!({
                "type": "TemplateProcessing",
                "single": [bos(0), text("A", 0)],
                "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
                "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
            })
        });
        match (bytes, template) {
            (Some(bytes), Some(template)) => {
                json!({"type": "Sequence", "processors": [bytes, template]})
            }
            (bytes, template) => bytes.or(template).unwrap_or(Value::Null),
        }
    }
}
