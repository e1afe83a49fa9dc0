//! One published directory: what files it has, and writing them into an empty one. Knows neither
//! where a model comes from nor how a directory gets its name.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use engine::tensors::Tensors;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::card::Provenance;
use super::weights::{self, Wanted};
use super::{Described, Format};
use crate::models::config::Config;

/// What [`Provenance::made_by`] says in directories of ours.
pub const MADE_BY: &str = "pipe export";
/// The file by which such a directory is known.
pub const PROVENANCE: &str = "provenance.json";

/// What goes into a directory.
pub struct Bundle<'a> {
    /// A model file that [`crate::models::Model::save`] wrote.
    pub tensors: &'a Tensors,
    /// The text of a `tokenizer.json`.
    pub tokenizer: Option<&'a str>,
    /// How weights are written; `shard_bytes` `None`: the format's default.
    pub dtype: Option<Dtype>,
    /// Bytes of one weights file.
    pub shard_bytes: Option<u64>,
    /// Where the model comes from; what is known here only is filled in.
    pub provenance: Provenance,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// The format of `config.json`.
    pub format: Format,
    /// Number of parameters.
    pub parameters: usize,
    /// The element type of (most) weights, by its name in torch.
    pub dtype: &'static str,
    /// Names and bytes of all files.
    pub files: Vec<(String, u64)>,
    /// What the published classes would do otherwise, and what is missing.
    pub notes: Vec<String>,
}

/// Writes all files into `dir`, which is there and empty. `stop` is asked again and again; when it
/// says so, the error is an [`super::Interrupted`].
pub fn write(dir: &Path, mut bundle: Bundle, stop: &dyn Fn() -> bool) -> Result<Written> {
    let model = weights::open(bundle.tensors)?;
    let specs = weights::specs(&model, bundle.tensors, bundle.dtype);
    let dtype = weights::main_dtype(&specs);
    let Described { format, text, mut notes } = super::describe(&model.config, dtype)?;
    let mut texts = vec![("config.json".to_string(), text)];
    match bundle.tokenizer {
        Some(text) => texts.extend(tokenizer_files(text, &model.config)?),
        None => notes.push(
            "there is no tokenizer: no step before it makes one\nhint: give one with `--tokenizer`"
                .into(),
        ),
    }
    let shard_bytes = bundle.shard_bytes.unwrap_or(format.default_shard_bytes());
    let wanted = Wanted { dtype: bundle.dtype, shard_bytes };
    let shards = weights::shards(specs, wanted.shard_bytes);
    if shards.len() > 1 && format != Format::Transformers {
        notes.push("the published class reads one `model.safetensors` only, not several".into());
    }
    texts.extend(weights::index(&shards).map(|text| (weights::INDEX.to_string(), text)));
    let parameters = model.layout.len();
    let dtype = weights::dtype_name(dtype)?;
    let files = texts.iter().map(|(name, _)| name.clone());
    let files = files.chain(shards.iter().map(|shard| shard.file.clone()));
    bundle.provenance.complete(format, parameters, dtype, &notes, files.collect());
    texts.push((PROVENANCE.into(), serde_json::to_string_pretty(&bundle.provenance)? + "\n"));
    texts.push(("README.md".into(), bundle.provenance.card()));
    for shard in &shards {
        weights::write(dir, shard, bundle.tensors, stop)?;
    }
    for (name, text) in &texts {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(Written { format, parameters, dtype, files: sealed(dir)?, notes })
}

/// Brings all files of `dir` to the disk; gives their names and sizes.
fn sealed(dir: &Path) -> Result<Vec<(String, u64)>> {
    let list = || -> std::io::Result<Vec<(String, u64)>> {
        let mut files = Vec::new();
        for item in fs::read_dir(dir)? {
            let item = item?;
            fs::File::open(item.path())?.sync_all()?;
            let name = item.file_name().to_string_lossy().into_owned();
            files.push((name, item.metadata()?.len()));
        }
        fs::File::open(dir)?.sync_all()?;
        files.sort();
        Ok(files)
    };
    list().with_context(|| format!("cannot write {}", dir.display()))
}

/// `tokenizer.json` and the least that transformers wants beside it. Refuses a tokenizer with ids
/// that the model has no row for.
fn tokenizer_files(text: &str, config: &Config) -> Result<[(String, String); 2]> {
    let wrong = |error| anyhow!("the tokenizer cannot be read: {error}");
    let tokenizer = Tokenizer::from_bytes(text).map_err(wrong)?;
    let most = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
    if let Some((token, id)) = most {
        ensure!(
            (id as usize) < config.vocab,
            "the tokenizer has token {id} ({token:?}), but the model has {} only\nhint: it is not \
             this model's; give the right one with `--tokenizer`",
            config.vocab
        );
    }
    let mut about = Map::new();
    about.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    about.insert("clean_up_tokenization_spaces".into(), false.into());
    about.insert("model_max_length".into(), config.positions.into());
    if let Some(token) = config.separator.and_then(|id| tokenizer.id_to_token(id)) {
        about.insert("bos_token".into(), token.clone().into());
        about.insert("eos_token".into(), token.into());
    }
    let about = format!("{:#}\n", json!(Value::Object(about)));
    Ok([("tokenizer.json".into(), text.into()), ("tokenizer_config.json".into(), about)])
}
