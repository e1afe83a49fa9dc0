//! A tokenizer with what its makers say of it: which tokens begin and end a text, how a chat is
//! written. Knows no weights.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::template::Template;

/// Names under which tokenizers keep the end of a text or of a turn.
const ENDS: [&str; 8] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
];

/// The `tokens` of an `about.json`; what is unknown is left out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Tokens {
    bos: Option<u32>,
    eos: Vec<u32>,
    chat_template: Value,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct About {
    tokens: Tokens,
}

/// A tokenizer and its customs.
pub struct Words {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// What every text begins with.
    pub first: Option<u32>,
    /// What ends a text or a turn.
    pub ends: Vec<u32>,
    /// Tokens that the model knows.
    vocab: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    chat_template: Option<String>,
}

impl Words {
    /// Reads a `tokenizer.json` and, if there is one, an `about.json`, for a model of `vocab` tokens
    /// whose documents begin with `separator`.
    pub fn open(
        tokenizer: &Path,
        about: Option<&Path>,
        vocab: usize,
        separator: Option<u32>,
    ) -> Result<Words> {
        let about = match about {
            None => About::default(),
            Some(path) => {
                let wrong = || format!("cannot read {}", path.display());
                let bytes = std::fs::read(path).with_context(wrong)?;
                serde_json::from_slice(&bytes).with_context(wrong)?
            }
        };
        Words::new(crate::tokenize::load(tokenizer)?, about.tokens, vocab, separator)
    }

    fn new(
        mut tokenizer: Tokenizer,
        tokens: Tokens,
        vocab: usize,
        separator: Option<u32>,
    ) -> Result<Words> {
        let wrong = |error| anyhow!("the tokenizer cannot be used: {error}");
        tokenizer.with_truncation(None).map_err(wrong)?;
        tokenizer.with_padding(None);
        // Of nothing, what a tokenizer adds by itself.
        let added = tokenizer.encode("", true).map_err(wrong)?.get_ids().first().copied();
        let eos = tokens.eos.first().copied();
        let mut ends = tokens.eos;
        let special = |name: &&&str| tokenizer.get_added_vocabulary().is_special_token(name);
        ends.extend(ENDS.iter().filter(special).filter_map(|name| tokenizer.token_to_id(name)));
        ends.extend(separator);
        ends.sort_unstable();
        ends.dedup();
        Ok(Words {
            first: separator.or(added),
            bos: tokens.bos.or(added),
            chat_template: default_template(tokens.chat_template),
            eos,
            ends,
            vocab,
            tokenizer,
        })
    }

    /// The tokens of `text`, special ones where their names stand, nothing added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false);
        let encoding = encoding.map_err(|error| anyhow!("cannot encode the text: {error}"))?;
        let ids = encoding.get_ids().to_vec();
        if let Some(token) = ids.iter().find(|token| **token as usize >= self.vocab) {
            let name = self.tokenizer.id_to_token(*token).unwrap_or_default();
            return Err(anyhow!(
                "the text has token {token} (`{name}`), but the model knows {} tokens only: this is \
                 not its tokenizer",
                self.vocab
            ));
        }
        Ok(ids)
    }

    /// What a model reads of a prompt: the token that begins a text, once, then `text`. At least
    /// one token.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if let Some(first) = self.first.filter(|first| ids.first() != Some(first)) {
            let vocab = self.vocab;
            ensure!(
                (first as usize) < vocab,
                "a text begins with token {first}, but the model knows {vocab} tokens only"
            );
            ids.insert(0, first);
        }
        ensure!(
            !ids.is_empty(),
            "there is nothing to begin with: neither the model nor its tokenizer has a token that \
             begins a text"
        );
        Ok(ids)
    }

    /// The model's own template for chats, if it has one.
    pub(super) fn template(&self) -> Result<Option<Template>> {
        let Some(source) = &self.chat_template else { return Ok(None) };
        let name = |token: Option<u32>| {
            token.and_then(|token| self.tokenizer.id_to_token(token)).unwrap_or_default()
        };
        Template::new(source, [name(self.bos), name(self.eos)]).map(Some)
    }
}

/// One template, or the one called `default` of several.
fn default_template(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Array(several) => {
            let found = several.iter().find(|one| one["name"] == "default");
            found?["template"].as_str().map(String::from)
        }
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;
    use tokenizers::AddedToken;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    /// A byte-level tokenizer that knows the word `yes`.
    pub fn plain() -> Tokenizer {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let names = ["<s>".into(), "ye".into(), "yes".into()];
        let names = names.into_iter().chain(alphabet.iter().map(char::to_string));
        let vocab: serde_json::Map<String, Value> =
            names.zip(0..).map(|(name, id): (String, u32)| (name, id.into())).collect();
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "vocab": vocab, "merges": ["y e", "ye s"]}
        });
        let mut tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap();
        let bytes = ByteLevel::default().add_prefix_space(false);
        tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
        tokenizer.add_special_tokens([AddedToken::from("<s>", true)]).unwrap();
        tokenizer
    }

    /// The same with ChatML's marks, and a template.
    pub fn words(template: Option<&str>) -> Words {
        let mut tokenizer = plain();
        let marks = ["<|im_start|>", "<|im_end|>"].map(|mark| AddedToken::from(mark, true));
        tokenizer.add_special_tokens(marks).unwrap();
        let tokens = Tokens { chat_template: json!(template), ..Tokens::default() };
        Words::new(tokenizer, tokens, 1000, None).unwrap()
    }

    #[test]
    fn a_text_begins_with_the_separator_once() {
        let mut words = words(None);
        assert!(words.prompt("").unwrap_err().to_string().contains("nothing to begin with"));
        assert_eq!(words.prompt("yes").unwrap(), [2]);
        words.first = Some(0);
        assert_eq!(words.prompt("").unwrap(), [0]);
        assert_eq!(words.prompt("yes").unwrap(), [0, 2]);
        assert_eq!(words.prompt("<s>yes").unwrap(), [0, 2]);
        assert_eq!(words.prompt("<s><s>yes").unwrap(), [0, 0, 2], "what is asked for is given");
    }

    #[test]
    fn tokens_that_the_model_does_not_know_are_told() {
        let mut words = words(None);
        words.vocab = 100;
        assert_eq!(words.encode("yes").unwrap(), [2]);
        let error = words.encode("<|im_end|>").unwrap_err().to_string();
        assert!(error.contains("`<|im_end|>`") && error.contains("100 tokens only"), "{error}");
        words.first = Some(100);
        assert!(words.prompt("yes").is_err());
    }

    #[test]
    fn ends_and_templates_come_from_about_and_from_known_names() {
        let tokens = |text: &str| serde_json::from_str::<About>(text).unwrap().tokens;
        let about = r#"{"format": "hf", "tokens": {"bos": 1, "eos": [7, 5], "pad": null, "x": 1,
            "chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}}"#;
        let words = Words::new(words(None).tokenizer, tokens(about), 1000, Some(3));
        let words = words.unwrap();
        let im_end = words.tokenizer.token_to_id("<|im_end|>").unwrap();
        assert_eq!((&words.ends[..], words.first), (&[3, 5, 7, im_end][..], Some(3)));
        assert_eq!(words.chat_template.as_deref(), Some("d"));
        let none = tokens(r#"{"tokens": {"bos": null, "eos": [], "chat_template": null}}"#);
        let words = Words::new(plain(), none, 1000, None).unwrap();
        assert!(words.ends.is_empty() && words.template().unwrap().is_none());
    }

    #[test]
    fn what_a_tokenizer_puts_first_is_put_first() {
        let mut tokenizer = plain();
        let post = tokenizers::processors::template::TemplateProcessing::builder()
            .try_single("<s> $A ye")
            .unwrap()
            .special_tokens(vec![("<s>", 0), ("ye", 1)])
            .build()
            .unwrap();
        tokenizer.with_post_processor(Some(post));
        let words = Words::new(tokenizer, Tokens::default(), 1000, None).unwrap();
        assert_eq!(words.prompt("yes").unwrap(), [0, 2], "and nothing put last");
    }
}
