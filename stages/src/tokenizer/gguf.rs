//! The vocabulary in a GGUF file's metadata (`tokenizer.ggml.*`) as a tokenizer. Knows not how the
//! file stores it.
//!
//! Sources: GGUF's specification for the keys; llama.cpp for what `pre` means; the models' own
//! `tokenizer.json` where the two differ (Qwen 2 normalises to NFC); SentencePiece for `llama`.

use anyhow::{Context as _, Result, bail, ensure};
use tokenizers::Tokenizer;

use super::About;
use super::bpe::{self, Added, Bpe, Kind, Pre};

/// Token types of `tokenizer.ggml.token_type` that matter here.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// What `tokenizer.ggml.pre` may be for byte-level vocabularies.
const PRES: &[(&str, Pre)] = &[
    ("default", Pre::Gpt2),
    ("gpt-2", Pre::Gpt2),
    ("phi-2", Pre::Gpt2),
    ("codeshell", Pre::Digits),
    ("refact", Pre::Digits),
    ("smollm", Pre::Digits),
    ("starcoder", Pre::Digits),
    ("llama-bpe", Pre::Llama3),
    ("llama-v3", Pre::Llama3),
    ("llama3", Pre::Llama3),
    ("deepseek-r1-qwen", Pre::Qwen2),
    ("qwen2", Pre::Qwen2),
];

/// The metadata, as it stands in the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece's BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut to words; only for `gpt2`.
    pub pre: String,
    /// The tokens, by id.
    pub tokens: Vec<String>,
    /// The tokens' scores; `llama` needs them.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`; all normal if there are none.
    pub kinds: Option<Vec<i32>>,
    /// `left right`, best first; only for `gpt2`.
    pub merges: Vec<String>,
    /// Stands before a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Stands for what the vocabulary lacks.
    pub unk: Option<u32>,
    /// Fills up batches.
    pub pad: Option<u32>,
    /// Whether `bos` is put before every text.
    pub add_bos: bool,
    /// Whether a blank is put before every text (llama.cpp assumes so for `llama`).
    pub add_space_prefix: bool,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl Vocabulary {
    /// The tokenizer. Errors say what in the metadata does not fit together.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.check()?;
        let bpe = match self.model.as_str() {
            "gpt2" => self.byte_level(),
            "llama" => self.sentencepiece(),
            other => bail!("tokenizer.ggml.model is `{other}`; known are gpt2 and llama"),
        };
        bpe.and_then(Bpe::build)
            .with_context(|| format!("the vocabulary (`{}`) is wrong", self.model))
    }

    /// What the metadata says about special tokens.
    pub fn about(&self) -> About {
        About {
            bos: self.bos,
            eos: self.eos.into_iter().collect(),
            pad: self.pad,
            unk: self.unk,
            add_bos: Some(self.add_bos),
            chat_template: self.chat_template.clone(),
        }
    }

    fn check(&self) -> Result<()> {
        let count = self.tokens.len();
        let lengths = [
            ("scores", self.scores.as_ref().map(Vec::len)),
            ("token_type", self.kinds.as_ref().map(Vec::len)),
        ];
        for (name, length) in lengths {
            if let Some(length) = length {
                ensure!(
                    length == count,
                    "tokenizer.ggml.{name} has {length} items for {count} tokens"
                );
            }
        }
        let named =
            [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk), ("padding", self.pad)];
        for (name, id) in named {
            if let Some(id) = id {
                ensure!(
                    (id as usize) < count,
                    "tokenizer.ggml.{name}_token_id is {id}, but there are {count} tokens"
                );
            }
        }
        ensure!(
            !self.add_bos || self.bos.is_some(),
            "tokenizer.ggml.add_bos_token is set, but there is no bos_token_id"
        );
        Ok(())
    }

    fn kind(&self, id: usize) -> i32 {
        self.kinds.as_ref().map_or(1, |kinds| kinds[id])
    }

    /// The tokens looked for before anything else: control tokens and, by `unknown`, the unknown one,
    /// which are special; user-defined ones, which are not.
    fn added(&self, unknown: bool) -> Vec<Added> {
        let added = |(id, token): (usize, &String)| {
            let special = match self.kind(id) {
                CONTROL => true,
                UNKNOWN if unknown => true,
                USER_DEFINED => false,
                _ => return None,
            };
            Some(Added::new(id as u32, token, special))
        };
        self.tokens.iter().enumerate().filter_map(added).collect()
    }

    fn bos(&self) -> Option<(String, u32)> {
        let id = self.bos.filter(|_| self.add_bos)?;
        Some((self.tokens[id as usize].clone(), id))
    }

    fn byte_level(&self) -> Result<Bpe> {
        let known = || PRES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let Some((_, pre)) = PRES.iter().find(|(name, _)| *name == self.pre) else {
            bail!(
                "tokenizer.ggml.pre is `{}`, and how that cuts words is not known here; known are {}. \
                 If it cuts as one of them, rewrite the key, or give the model's tokenizer.json",
                self.pre,
                known()
            );
        };
        let merge = |(at, text): (usize, &String)| {
            let parts = bpe::merge(text);
            parts.with_context(|| {
                format!("merge {at}, {text:?}, is not two tokens with a blank between")
            })
        };
        Ok(Bpe {
            ids: bpe::ids(&self.tokens)?,
            merges: self.merges.iter().enumerate().map(merge).collect::<Result<_>>()?,
            added: self.added(false),
            bos: self.bos(),
            unk: None,
            kind: Kind::Bytes { pre: *pre, add_prefix_space: self.add_space_prefix },
        })
    }

    fn sentencepiece(&self) -> Result<Bpe> {
        let scores = self.scores.as_ref().context("there are no tokenizer.ggml.scores")?;
        let ids = bpe::ids(&self.tokens)?;
        let mergeable =
            |id: &usize| !matches!(self.kind(*id), UNKNOWN | CONTROL | USER_DEFINED | BYTE);
        let pieces: Vec<_> = (0..self.tokens.len())
            .filter(mergeable)
            .map(|id| (id as u32, self.tokens[id].as_str(), scores[id]))
            .collect();
        let unk = (0..self.tokens.len()).find(|id| self.kind(*id) == UNKNOWN);
        let unk = self.unk.map(|id| id as usize).or(unk);
        Ok(Bpe {
            merges: bpe::merges_of_scores(&pieces)?,
            ids,
            added: self.added(true),
            bos: self.bos(),
            unk: unk.map(|id| self.tokens[id].clone()),
            kind: Kind::Characters { blank: '▁', prefix: self.add_space_prefix },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Vocabulary {
        let tokens = ["<|end|>", "a", "b", "c", "ab", "abc", "<note>"].map(String::from).to_vec();
        Vocabulary {
            model: "gpt2".into(),
            pre: "gpt-2".into(),
            kinds: Some(vec![3, 1, 1, 1, 1, 1, 4]),
            merges: vec!["a b".into(), "ab c".into()],
            tokens,
            ..Vocabulary::default()
        }
    }

    fn ids(vocabulary: &Vocabulary, text: &str) -> Vec<u32> {
        let tokenizer = vocabulary.tokenizer().unwrap();
        tokenizer.encode_fast(text, true).unwrap().get_ids().to_vec()
    }

    #[track_caller]
    fn refused(change: impl Fn(&mut Vocabulary), message: &str) {
        let mut vocabulary = tiny();
        change(&mut vocabulary);
        let error = format!("{:#}", vocabulary.tokenizer().unwrap_err());
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn added_tokens_are_whole_and_bos_comes_first() {
        assert_eq!(ids(&tiny(), "abca<|end|><note>ab"), [5, 1, 0, 6, 4]);
        let with_bos = Vocabulary { add_bos: true, bos: Some(0), ..tiny() };
        assert_eq!(ids(&with_bos, "abc"), [0, 5]);
        let tokenizer = tiny().tokenizer().unwrap();
        assert_eq!(tokenizer.decode(&[0, 5, 6], true).unwrap(), "abc<note>");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        refused(|v| v.kinds = Some(vec![1; 3]), "token_type has 3 items for 7 tokens");
        refused(|v| v.scores = Some(vec![0.0; 9]), "scores has 9 items for 7 tokens");
        refused(|v| v.tokens[2] = "a".into(), "tokens 1 and 2 are both \"a\"");
        refused(|v| v.merges.push("a d".into()), "merge 2 is of \"d\", which is no token");
        refused(|v| v.merges.push("b c".into()), "makes \"bc\", which is no token");
        refused(|v| v.merges.push("abc".into()), "merge 2, \"abc\", is not two tokens");
        refused(|v| v.eos = Some(7), "eos_token_id is 7, but there are 7 tokens");
        refused(|v| v.add_bos = true, "there is no bos_token_id");
        refused(|v| v.pre = "tekken".into(), "known are default, gpt-2, phi-2, codeshell");
        refused(|v| v.model = "t5".into(), "known are gpt2 and llama");
        refused(|v| v.model = "llama".into(), "no tokenizer.ggml.scores");
        refused(|v| v.tokens[0].clear(), "token 0 is special, but empty");
        let emptied =
            |v: &mut Vocabulary| *v = Vocabulary { kinds: None, tokens: vec![], ..v.clone() };
        refused(emptied, "the vocabulary is empty");
    }

    #[test]
    fn words_are_cut_as_pre_says() {
        let digits = |pre: &str| {
            let tokens = ["1", "2", "12", "Ġ", "Ġ1", "Ġ12", "ĠĠ"].map(String::from).to_vec();
            let merges = ["1 2", "Ġ 1", "Ġ1 2", "Ġ 12", "Ġ Ġ"].map(String::from).to_vec();
            let pre = pre.to_string();
            ids(&Vocabulary { pre, tokens, merges, kinds: None, ..tiny() }, "  12")
        };
        assert_eq!(digits("gpt-2"), [3, 5]);
        assert_eq!(digits("smollm"), [6, 0, 1]);
        assert_eq!(digits("llama-bpe"), [3, 3, 2]);
        assert_eq!(digits("qwen2"), [3, 3, 0, 1]);
    }
}
