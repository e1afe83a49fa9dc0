//! A checkpoint from elsewhere: which format it is, its configuration, tensors and tokenizer.
//! Knows no artifact.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use tokenizers::Tokenizer;

use crate::formats::llama2c::Vocabulary;
use crate::formats::{Checkpoint, Directory, Gguf, Llama2c};
use crate::models::family::gguf::Facts;
use crate::models::family::{self, Origin, hub};
use crate::models::{Config, Family, published};
use crate::tokenize;
use crate::tokenizer::{self, About};

/// A model that is not in our form yet.
pub struct Foreign {
    /// What it was read as, for people.
    pub format: &'static str,
    /// What it computes.
    pub config: Config,
    /// Its tensors.
    pub checkpoint: Box<dyn Checkpoint>,
    /// Its tokenizer, where there is one.
    pub tokenizer: Option<Tokenizer>,
    /// Its special tokens and chat template.
    pub about: About,
    names: Names,
}

/// How its tensors are called.
enum Names {
    /// As ours.
    Published,
    /// As llama.cpp's; whether q, k and v are one.
    Gguf { fused: bool },
}

impl Foreign {
    /// Where our tensor `name` comes from.
    pub fn origin(&self, name: &str) -> Origin {
        match self.names {
            Names::Published => Origin::whole(name),
            Names::Gguf { fused } => family::gguf::origin(&self.config, name, fused)
                .unwrap_or_else(|| Origin::whole(name)),
        }
    }
}

/// Opens what lies at `path`; `tokenizer` is a file of its own, if it is not with the model.
pub fn open(path: &Path, tokenizer: Option<&Path>) -> Result<Foreign> {
    if path.is_dir() {
        return from_directory(path, tokenizer);
    }
    let mut magic = [0; 4];
    File::open(path)?.read_exact(&mut magic).context("it is shorter than four bytes")?;
    match &magic {
        b"GGUF" => from_gguf(path, tokenizer),
        b"PK\x03\x04" => {
            bail!("it is a single `.bin` of torch; give its directory, which has `config.json` too")
        }
        _ if path.extension().is_some_and(|e| e == "safetensors") => bail!(
            "it is a single safetensors file; give its directory, which has `config.json` too"
        ),
        _ => from_llama2c(path, tokenizer),
    }
}

fn from_directory(path: &Path, other: Option<&Path>) -> Result<Foreign> {
    let file = path.join("config.json");
    let text = std::fs::read_to_string(&file)
        .context("there is no readable `config.json` in the directory")?;
    let student = published::config(&text).context("`config.json`")?;
    let config = match student {
        Some(config) => config,
        None => hub::config(&text).context("`config.json`")?,
    };
    let checkpoint = Box::new(Directory::open(path)?);
    published::check_names(checkpoint.names().into_iter())?;
    let there = |name: &str| path.join(name).exists();
    let own = ["tokenizer.json", "vocab.json", "tokenizer.model"].into_iter().any(there);
    let tokenizer = match other {
        Some(file) => Some(tokenize::load(file)?),
        None if own => Some(tokenizer::directory::load(path)?),
        None => None,
    };
    let about = match &tokenizer {
        Some(tokenizer) => tokenizer::directory::about(path, tokenizer)?,
        None => About::default(),
    };
    let (format, names) = ("Hugging Face checkpoint", Names::Published);
    Ok(Foreign { format, config, checkpoint, tokenizer, about, names })
}

fn from_gguf(path: &Path, other: Option<&Path>) -> Result<Foreign> {
    let file = Gguf::open(path)?;
    let config = family::gguf::config(&file)?;
    let vocabulary = vocabulary(&file)?;
    let tokenizer = match (other, &vocabulary) {
        (Some(file), _) => Some(tokenize::load(file)?),
        (None, Some(vocabulary)) => Some(vocabulary.tokenizer()?),
        (None, None) => None,
    };
    let about = vocabulary.map(|vocabulary| vocabulary.about()).unwrap_or_default();
    let fused = file.shape("blk.0.attn_qkv.weight").is_some();
    let (format, names) = ("GGUF", Names::Gguf { fused });
    Ok(Foreign { format, config, checkpoint: Box::new(file), tokenizer, about, names })
}

/// What a GGUF file's metadata says of its tokenizer, if it has one.
pub fn vocabulary(file: &Gguf) -> Result<Option<tokenizer::gguf::Vocabulary>> {
    let meta = file.metadata();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    if !meta.has(&key("model")) {
        return Ok(None);
    }
    let text = |name: &str| meta.str(&key(name)).unwrap_or_default().to_string();
    let id = |name: &str| meta.u32(&key(name)).ok();
    let flag = |name: &str, otherwise| meta.bool(&key(name)).unwrap_or(otherwise);
    let strings = |name: &str| -> Result<Vec<String>> {
        Ok(meta.strings(&key(name))?.into_iter().map(String::from).collect())
    };
    let optional = |name: &str| meta.has(&key(name)).then(|| key(name));
    let kinds = match optional("token_type") {
        Some(key) => Some(meta.i64s(&key)?.into_iter().map(|kind| kind as i32).collect()),
        None => None,
    };
    let model = text("model");
    let sentencepiece = model == "llama";
    Ok(Some(tokenizer::gguf::Vocabulary {
        pre: text("pre"),
        tokens: strings("tokens")?,
        scores: optional("scores").map(|key| meta.f32s(&key)).transpose()?,
        kinds,
        merges: if meta.has(&key("merges")) { strings("merges")? } else { Vec::new() },
        bos: id("bos_token_id"),
        eos: id("eos_token_id"),
        unk: id("unknown_token_id"),
        pad: id("padding_token_id"),
        add_bos: flag("add_bos_token", sentencepiece),
        add_space_prefix: flag("add_space_prefix", sentencepiece),
        chat_template: meta.str("tokenizer.chat_template").ok().map(String::from),
        model,
    }))
}

impl Facts for Gguf {
    fn number(&self, key: &str) -> Option<u64> {
        self.metadata().u64(key).ok()
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.metadata().f32(key).ok().map(decimal)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.metadata().str(key).ok()
    }

    fn shape(&self, tensor: &str) -> Option<&[usize]> {
        Some(&self.info(tensor)?.shape)
    }

    fn values(&self, tensor: &str) -> Result<Vec<f32>> {
        let info = self.info(tensor).with_context(|| format!("there is no tensor `{tensor}`"))?;
        let mut values = vec![0.0; info.elements()];
        self.read_f32(tensor, &mut values)?;
        Ok(values)
    }
}

/// The number that somebody wrote: 1e-5 and not the f32 nearest to it.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn from_llama2c(path: &Path, other: Option<&Path>) -> Result<Foreign> {
    let file = Llama2c::open(path).context("taken for a `.bin` of llama2.c")?;
    let header = file.header();
    let config = Config {
        family: Family::Llama,
        vocab: header.vocab,
        d_model: header.dim,
        layers: hub::layers(header.layers)?,
        heads: header.heads,
        kv_heads: header.kv_heads,
        head_dim: header.head_dim(),
        ffn: header.hidden_dim,
        positions: header.seq_len,
        tied: header.shared_head,
        ..Config::default()
    };
    config.check()?;
    let (tokenizer, about) = match other {
        Some(path) if begins_with(path, b"{")? => (Some(tokenize::load(path)?), About::default()),
        Some(path) => {
            let pieces = Vocabulary::open(path, header.vocab)?.tokens;
            (Some(tokenizer::llama2c::tokenizer(&pieces)?), tokenizer::llama2c::about())
        }
        None => (None, About::default()),
    };
    let (format, names) = ("llama2.c checkpoint", Names::Published);
    Ok(Foreign { format, config, checkpoint: Box::new(file), tokenizer, about, names })
}

fn begins_with(path: &Path, start: &[u8]) -> Result<bool> {
    let mut found = vec![0; start.len()];
    Ok(File::open(path)?.read_exact(&mut found).is_ok() && found == start)
}
