//! `teacher`: a checkpoint from elsewhere as a model of ours, with its tokenizer.
//!
//! Reads Hugging Face directories (safetensors or `pytorch_model.bin`, sharded or not), GGUF files
//! and llama2.c's `.bin`. Weights stored as f32, f16 or bf16 are kept bit for bit; quantised ones
//! are dequantised to f32. Every tensor of the model must be there with its shape, and nothing may
//! be left over that the model would need.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use engine::stage::{Context, In, Out, Ports, Stage};
use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::data::separator::separator;
use crate::foreign::{self, Foreign};
use crate::formats::unpermute_rows;
use crate::models::family::Origin;
use crate::models::file::{Spec, Writer};
use crate::models::params::FileTensor;
use crate::models::{Config, Model};

/// The stage.
pub struct Teacher;

/// What is not in the files.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Whether documents of one sequence see each other not: attention stops, and a student's
    /// state and convolution begin anew, at every separator.
    pub mask_documents: bool,
    /// The token that begins a document; by default `<|endoftext|>`, `<|begin_of_text|>`, `<s>` or
    /// `<bos>`, whichever the tokenizer has first. `tokenize` must use the same.
    pub separator: Option<String>,
}

impl Default for Params {
    fn default() -> Params {
        Params { mask_documents: true, separator: None }
    }
}

impl Stage for Teacher {
    const NAME: &'static str = "teacher";
    const VERSION: u32 = 1;
    const DOC: &'static str = "Reads a pretrained model (Hugging Face directory or hub, GGUF, \
         llama2.c) with its tokenizer.";
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one(
                "model",
                "a Hugging Face directory, `hf:owner/name@revision`, a GGUF file, or a `.bin` of llama2.c",
            ),
            In::one(
                "tokenizer",
                "a `tokenizer.json`, or the `tok.bin` of llama2.c, where it is not with the model",
            )
            .optional(),
        ];
        const OUTPUTS: &[Out] = &[
            Out::one("model", "model.safetensors", "the model"),
            Out::one("tokenizer", "tokenizer.json", "its tokenizer").optional(),
            Out::one("about", "about.json", "what it is: sizes, special tokens, chat template"),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let name = ctx.input("model")?.name.clone();
        let other = if ctx.has("tokenizer") { Some(ctx.path("tokenizer")?) } else { None };
        let mut foreign = foreign::open(ctx.path("model")?, other)
            .with_context(|| format!("`{name}` cannot be read as a model"))?;
        foreign.config.separator = document_separator(params, &foreign)?;
        write_model(ctx, &foreign)?;
        if let Some(tokenizer) = &foreign.tokenizer {
            let path = ctx.output("tokenizer")?;
            tokenizer.save(&path, false).map_err(|e| anyhow!("cannot write the tokenizer: {e}"))?;
        }
        let Foreign { format, config, about, .. } = &foreign;
        let about = json!({ "format": format, "config": config, "tokens": about });
        let text = serde_json::to_string_pretty(&about)? + "\n";
        std::fs::write(ctx.output("about")?, text)?;
        ctx.note(in_words(&foreign));
        Ok(())
    }
}

/// The token that begins documents, and whether tokenizer and model belong together.
fn document_separator(params: &Params, foreign: &Foreign) -> Result<Option<u32>> {
    let Some(tokenizer) = &foreign.tokenizer else {
        ensure!(
            params.separator.is_none(),
            "`separator` names a token, but there is no tokenizer to look it up in"
        );
        return Ok(foreign.config.separator);
    };
    let (known, vocab) = (tokenizer.get_vocab_size(true), foreign.config.vocab);
    ensure!(
        known <= vocab,
        "the tokenizer has {known} tokens, but the model only {vocab}: they do not belong together"
    );
    match params.mask_documents {
        true => Ok(Some(separator(tokenizer, params.separator.as_deref())?.1)),
        false => Ok(None),
    }
}

/// What is written of a tensor, and where from.
struct Item {
    file: FileTensor,
    origin: Origin,
    dtype: Dtype,
}

/// Writes every tensor of the model; refuses missing, wrong and surplus ones.
fn write_model(ctx: &mut Context, foreign: &Foreign) -> Result<()> {
    let model = Model::new(foreign.config.clone())?;
    let mut items = Vec::new();
    for file in model.layout.files() {
        let origin = foreign.origin(&file.name);
        check(foreign, file, &origin)?;
        let plain = foreign.checkpoint.plain(&origin.name).filter(|_| origin.is_whole());
        let dtype = plain.map_or(Dtype::F32, |(dtype, _)| dtype);
        items.push(Item { file: file.clone(), origin, dtype });
    }
    surplus(foreign, &items)?;
    let spec =
        |item: &Item| -> Spec { (item.file.name.clone(), item.dtype, item.file.shape.clone()) };
    let specs: Vec<Spec> = items.iter().map(spec).collect();
    let config = serde_json::to_string(&foreign.config)?;
    let metadata = BTreeMap::from([("config".to_string(), config)]);
    let mut writer = Writer::create(&ctx.output("model")?, &specs, &metadata)?;
    for (done, item) in items.iter().enumerate() {
        ctx.check_cancelled()?;
        match foreign.checkpoint.plain(&item.origin.name).filter(|_| item.origin.is_whole()) {
            Some((_, bytes)) => writer.append(&item.file.name, bytes)?,
            None => {
                let values = values(foreign, item)?;
                writer.append(&item.file.name, bytemuck::cast_slice(&values))?;
            }
        }
        ctx.progress(done as u64 + 1, items.len() as u64, "tensors");
    }
    writer.finish()
}

/// Whether the checkpoint has the tensor in the shape that the model needs.
fn check(foreign: &Foreign, file: &FileTensor, origin: &Origin) -> Result<()> {
    let Some(info) = foreign.checkpoint.info(&origin.name) else {
        bail!("tensor `{}` is missing", origin.name)
    };
    let mut shape = file.shape.clone();
    if let (Some((first, rows)), Some(outer)) = (origin.rows, shape.first_mut()) {
        let all = info.shape.first().copied().unwrap_or(0);
        ensure!(first + rows <= all, "tensor `{}` has only {all} rows", origin.name);
        *outer = all;
    }
    ensure!(
        info.shape == shape,
        "tensor `{}` is {:?}, but by its configuration the model needs {shape:?}",
        origin.name,
        info.shape
    );
    Ok(())
}

/// The values of a tensor in our order of rows.
fn values(foreign: &Foreign, item: &Item) -> Result<Vec<f32>> {
    let Origin { name, rows, paired_heads } = &item.origin;
    let shape = &foreign.checkpoint.info(name).context("it was there before")?.shape;
    let mut all = vec![0.0; shape.iter().product()];
    foreign.checkpoint.read_f32(name, &mut all)?;
    let cols = all.len() / shape[0].max(1);
    if let Some((first, rows)) = rows {
        all.drain(..first * cols);
        all.truncate(rows * cols);
    }
    if let Some(heads) = paired_heads {
        unpermute_rows(*heads, foreign.config.head_dim, &mut all)?;
    }
    if let Some(at) = all.iter().position(|value| !value.is_finite()) {
        bail!("tensor `{name}` holds {} at element {at}: the file is damaged", all[at]);
    }
    Ok(all)
}

/// Refuses tensors that the model has no place for, but for what is known to be redundant.
fn surplus(foreign: &Foreign, items: &[Item]) -> Result<()> {
    let redundant = |name: &str| {
        name.ends_with("rotary_emb.inv_freq")
            || name == "rope_freqs.weight"
            || (foreign.config.tied && matches!(name, "lm_head.weight" | "output.weight"))
    };
    let names = foreign.checkpoint.names();
    let used: BTreeSet<&str> = items.iter().map(|item| item.origin.name.as_str()).collect();
    let extra: Vec<&str> =
        names.into_iter().filter(|name| !used.contains(name) && !redundant(name)).collect();
    let some = extra.iter().take(4).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    ensure!(
        extra.is_empty(),
        "the model has no place for {} of its tensors: {some}{}; it computes something else than \
         its configuration says",
        extra.len(),
        if extra.len() > 4 { ", …" } else { "" }
    );
    Ok(())
}

/// The model on one line.
fn in_words(foreign: &Foreign) -> String {
    let Config { family, layers, d_model, heads, kv_heads, vocab, .. } = &foreign.config;
    let count: usize = Model::new(foreign.config.clone()).map_or(0, |model| model.layout.len());
    format!(
        "{} ({family:?}): {:.1}M parameters, {} layers, width {d_model}, {heads} heads \
         ({kv_heads} key/value), {vocab} tokens",
        foreign.format,
        count as f64 / 1e6,
        layers.len(),
    )
}
