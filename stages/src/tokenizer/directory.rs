//! The tokenizer in a model's directory as Hugging Face lays it out. Knows no weights.
//!
//! `tokenizer.json` is taken as it is; else `vocab.json` and `merges.txt` make a byte-level BPE, for
//! the classes that are known to be one (GPT-2, CodeGen, which Phi 1 and 2 use, and Qwen 2).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::About;
use super::bpe::{self, Added, Bpe, Kind, Pre};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
/// Text that GPT-2's family has as a special token even where no file says so.
const END_OF_TEXT: &str = "<|endoftext|>";

/// The tokenizer of the model at `dir`. Truncation and padding, which some files carry from
/// training, are switched off. Errors name the file, or all those that were looked for.
pub fn load(dir: &Path) -> Result<Tokenizer> {
    let shown = dir.display();
    if dir.join(TOKENIZER).is_file() {
        let text = read(dir, TOKENIZER)?;
        return parse(&text)
            .with_context(|| format!("`{TOKENIZER}` in {shown} is no valid tokenizer"));
    }
    if dir.join("vocab.json").is_file() && dir.join("merges.txt").is_file() {
        let (vocab, merges) = (json(dir, "vocab.json")?, read(dir, "merges.txt")?);
        let config = optional(dir, CONFIG)?.unwrap_or_default();
        let more = optional(dir, "added_tokens.json")?.unwrap_or_default();
        let bpe = byte_level(&vocab, &merges, &config, &more).and_then(Bpe::build);
        return bpe
            .with_context(|| format!("`vocab.json` and what is with it in {shown} are wrong"));
    }
    ensure!(
        !dir.join("tokenizer.model").is_file(),
        "{shown} has only `tokenizer.model`, which is not read here; convert it with transformers: \
         `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` writes `{TOKENIZER}`"
    );
    bail!(
        "no tokenizer in {shown}; looked for `{TOKENIZER}`, for `vocab.json` with `merges.txt`, and for \
         `tokenizer.model`"
    )
}

/// What the directory's files say about special tokens, with ids of `tokenizer`. A file that is not
/// there says nothing; a beginning or end that is no token is an error.
pub fn about(dir: &Path, tokenizer: &Tokenizer) -> Result<About> {
    let config = optional(dir, CONFIG)?.unwrap_or_default();
    let generation = optional(dir, "generation_config.json")?.unwrap_or_default();
    let model = optional(dir, "config.json")?.unwrap_or_default();
    let id = |name: &str| -> Result<Option<u32>> {
        let Some(token) = named(&config, name)? else { return Ok(None) };
        let id = tokenizer.token_to_id(&token);
        ensure!(
            id.is_some() || !matches!(name, "bos_token" | "eos_token"),
            "`{CONFIG}` says that {name} is {token:?}, which the tokenizer does not have"
        );
        Ok(id)
    };
    let first = |name: &str| -> Result<Option<u32>> {
        Ok(numbers(&generation, name)?
            .or(numbers(&model, name)?)
            .and_then(|ids| ids.first().copied()))
    };
    let mut eos = numbers(&generation, "eos_token_id")?.or(numbers(&model, "eos_token_id")?);
    let ends = eos.get_or_insert_default();
    ends.extend(id("eos_token")?);
    let mut seen = std::collections::HashSet::new();
    ends.retain(|id| seen.insert(*id));
    Ok(About {
        bos: id("bos_token")?.or(first("bos_token_id")?),
        eos: eos.unwrap_or_default(),
        pad: id("pad_token")?.or(first("pad_token_id")?),
        unk: id("unk_token")?,
        add_bos: config.get("add_bos_token").and_then(Value::as_bool),
        chat_template: template(dir, &config)?,
    })
}

/// Parses a `tokenizer.json`, which must give the same ids every time and must not cut texts.
fn parse(text: &str) -> Result<Tokenizer> {
    let value: Value = serde_json::from_str(text)?;
    if let Some(model) = value.get("model").filter(|model| model.get("merges").is_some()) {
        check_model(model)?;
    }
    check_templates(value.get("post_processor").unwrap_or(&Value::Null), 0)?;
    let mut tokenizer: Tokenizer =
        serde_json::from_value(value).map_err(|error| anyhow!("{error}"))?;
    let wrong = |error| anyhow!("{error}");
    tokenizer.with_padding(None).with_truncation(None).map_err(wrong)?;
    Ok(tokenizer)
}

/// The crate takes some merges that are no tokens for granted, so look at them first.
fn check_model(model: &Value) -> Result<()> {
    let dropout = model.get("dropout").and_then(Value::as_f64).unwrap_or(0.0);
    ensure!(dropout == 0.0, "model.dropout is {dropout}, which makes ids random; set it to null");
    let vocab =
        model.get("vocab").and_then(Value::as_object).context("model.vocab is no object")?;
    let merges =
        model.get("merges").and_then(Value::as_array).context("model.merges is no list")?;
    let pair = |(at, merge): (usize, &Value)| -> Result<(String, String)> {
        let parts = match merge {
            Value::String(text) => bpe::merge(text),
            Value::Array(parts) => match &parts[..] {
                [Value::String(left), Value::String(right)] => Some((left.clone(), right.clone())),
                _ => None,
            },
            _ => None,
        };
        parts.with_context(|| format!("merge {at} is not of two tokens"))
    };
    // Older files may begin with the version line of merges.txt.
    let legacy = |merge: &&Value| !merge.as_str().is_some_and(|text| text.starts_with("#version"));
    let merges: Vec<_> =
        merges.iter().filter(legacy).enumerate().map(pair).collect::<Result<_>>()?;
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or("");
    let pairs = merges.iter().map(|(left, right)| (&left[..], &right[..]));
    bpe::check_merges(pairs, prefix, |token| vocab.contains_key(token))
}

/// Every token that a template puts beside the text must have its ids; the crate looks them up blindly.
fn check_templates(step: &Value, depth: usize) -> Result<()> {
    ensure!(depth < 16, "post_processor is nested too deeply");
    for inner in step.get("processors").and_then(Value::as_array).into_iter().flatten() {
        check_templates(inner, depth + 1)?;
    }
    let known = step.get("special_tokens").unwrap_or(&Value::Null);
    for (form, texts) in [("single", &["A"][..]), ("pair", &["A", "B"])] {
        for piece in step.get(form).and_then(Value::as_array).into_iter().flatten() {
            if let Some(text) = piece.pointer("/Sequence/id") {
                let there = text.as_str().is_some_and(|text| texts.contains(&text));
                ensure!(there, "post_processor.{form} has no text {text}");
            }
            if let Some(name) = piece.pointer("/SpecialToken/id").and_then(Value::as_str) {
                let token = known.get(name);
                let count = |key| Some(token?.get(key)?.as_array()?.len());
                let fits = count("ids").is_some() && count("ids") == count("tokens");
                ensure!(
                    fits,
                    "post_processor.{form} puts {name:?}, of which special_tokens has no ids"
                );
            }
        }
    }
    Ok(())
}

fn read(dir: &Path, name: &str) -> Result<String> {
    let path = dir.join(name);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn json(dir: &Path, name: &str) -> Result<Map<String, Value>> {
    let value = serde_json::from_str(&read(dir, name)?);
    value.with_context(|| format!("`{name}` in {} is no JSON object", dir.display()))
}

fn optional(dir: &Path, name: &str) -> Result<Option<Map<String, Value>>> {
    dir.join(name).is_file().then(|| json(dir, name)).transpose()
}

/// A token in `tokenizer_config.json`: its text, or an object with `content`.
fn named(config: &Map<String, Value>, name: &str) -> Result<Option<String>> {
    match config.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(token)) => Ok(Some(token.clone())),
        Some(Value::Object(token)) => {
            let content = token.get("content").and_then(Value::as_str);
            let content = content.with_context(|| format!("`{CONFIG}`: {name} has no content"))?;
            Ok(Some(content.into()))
        }
        Some(_) => bail!("`{CONFIG}`: {name} is neither a text nor an object"),
    }
}

/// An id or a list of ids.
fn numbers(config: &Map<String, Value>, name: &str) -> Result<Option<Vec<u32>>> {
    let one = |value: &Value| -> Result<u32> {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.with_context(|| format!("{name} is {value}, which is no token id"))
    };
    match config.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(ids)) => Ok(Some(ids.iter().map(one).collect::<Result<_>>()?)),
        Some(id) => Ok(Some(vec![one(id)?])),
    }
}

/// `chat_template.jinja`, else the configuration's template; of several, the default one.
fn template(dir: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    if dir.join("chat_template.jinja").is_file() {
        return read(dir, "chat_template.jinja").map(Some);
    }
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(templates)) => {
            let is_default = |t: &&Value| t.get("name").is_some_and(|name| name == "default");
            let template = templates.iter().find(is_default).and_then(|t| t.get("template"));
            Ok(template.and_then(Value::as_str).map(String::from))
        }
        Some(_) => bail!("`{CONFIG}`: chat_template is neither a text nor a list"),
    }
}

/// GPT-2's files: vocabulary, merges, and tokens added to them.
fn byte_level(
    vocab: &Map<String, Value>,
    merges: &str,
    config: &Map<String, Value>,
    more: &Map<String, Value>,
) -> Result<Bpe> {
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or("GPT2Tokenizer");
    let pre = match class.strip_suffix("Fast").unwrap_or(class) {
        "GPT2Tokenizer" | "CodeGenTokenizer" => Pre::Gpt2,
        "Qwen2Tokenizer" => Pre::Qwen2,
        _ => bail!(
            "how `{class}` cuts words is not known here; convert it with transformers: \
             `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` writes `{TOKENIZER}`"
        ),
    };
    let flag = |name: &str| config.get(name).and_then(Value::as_bool).unwrap_or(false);
    let mut ids = HashMap::with_capacity(vocab.len());
    for (token, id) in vocab {
        ids.insert(token.clone(), number(token, id)?);
    }
    let mut added = added(config, more)?;
    specials(config, &ids, &mut added)?;
    for token in added.values() {
        let id = *ids.entry(token.content.clone()).or_insert(token.id);
        ensure!(id == token.id, "token {:?} is both {id} and {}", token.content, token.id);
    }
    check_ids(&ids)?;
    let bos = match flag("add_bos_token") {
        true => {
            let token = named(config, "bos_token")?.unwrap_or_else(|| END_OF_TEXT.into());
            let id =
                *ids.get(&token).with_context(|| format!("bos_token {token:?} is no token"))?;
            Some((token, id))
        }
        false => None,
    };
    let kind = Kind::Bytes { pre, add_prefix_space: flag("add_prefix_space") };
    let merges = lines(merges)?;
    Ok(Bpe { ids, merges, added: added.into_values().collect(), bos, unk: None, kind })
}

/// The lines of `merges.txt`, less its version.
fn lines(merges: &str) -> Result<Vec<(String, String)>> {
    let lines = merges.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.starts_with("#version") && !line.trim().is_empty());
    lines
        .map(|(at, line)| {
            let pair = bpe::merge(line);
            pair.with_context(|| {
                format!("`merges.txt`, line {}: {line:?} is not two tokens", at + 1)
            })
        })
        .collect()
}

fn number(token: &str, id: &Value) -> Result<u32> {
    let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
    number.with_context(|| format!("token {token:?} has {id}, which is no id"))
}

/// The tokens of `added_tokens_decoder` and of `added_tokens.json`, by id.
fn added(config: &Map<String, Value>, more: &Map<String, Value>) -> Result<BTreeMap<u32, Added>> {
    let mut added = BTreeMap::new();
    let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
    for (id, token) in decoder.into_iter().flatten() {
        let place = || format!("`{CONFIG}`, added_tokens_decoder, {id:?}");
        let id: u32 = id.parse().with_context(place)?;
        let content = token.get("content").and_then(Value::as_str).with_context(place)?;
        let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
        let flags = [flag("lstrip"), flag("rstrip"), flag("single_word")];
        added.insert(id, Added { flags, ..Added::new(id, content, flag("special")) });
    }
    for (content, id) in more {
        let id = number(content, id)?;
        let token = added.entry(id).or_insert_with(|| Added::new(id, content, false));
        ensure!(
            token.content == *content,
            "token {id} is {:?} in `{CONFIG}`, {content:?} in `added_tokens.json`",
            token.content
        );
    }
    Ok(added)
}

/// The special tokens that stand in the vocabulary itself.
fn specials(
    config: &Map<String, Value>,
    ids: &HashMap<String, u32>,
    added: &mut BTreeMap<u32, Added>,
) -> Result<()> {
    let mut names = vec![END_OF_TEXT.to_string()];
    for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        names.extend(named(config, name)?);
    }
    for name in names {
        let known = ids.get(&name).copied();
        let id = known.or(added.values().find(|token| token.content == name).map(|token| token.id));
        if let Some(id) = id {
            added.entry(id).or_insert_with(|| Added::new(id, &name, true)).special = true;
        }
    }
    Ok(())
}

/// Every id from 0 on has one token.
fn check_ids(ids: &HashMap<String, u32>) -> Result<()> {
    let mut tokens = vec![None; ids.len()];
    for (token, id) in ids {
        let place = tokens.get_mut(*id as usize);
        let place = place.with_context(|| {
            format!("token {token:?} is {id}, but there are {} tokens; some are missing", ids.len())
        })?;
        if let Some(other) = place.replace(token) {
            bail!("tokens {other:?} and {token:?} are both {id}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
