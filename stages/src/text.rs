//! `text`: the user's documents, or the embedded sample, as one file of JSON lines.
//!
//! Streams: memory is bounded by the longest document.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use engine::stage::{Context, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::document::Document;
use crate::data::read::{self, Format, Reading, Skipped};
use crate::data::sample::{self, Mix};

/// The stage.
pub struct Text;

/// What to read, or what the sample is like.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// The JSON field, or parquet column, that holds the text.
    pub field: String,
    /// Paragraphs of a txt file (parted by blank lines) are joined to documents of at least so
    /// many bytes.
    pub paragraphs_bytes: usize,
    /// Stop after so many documents.
    pub documents_max: Option<u64>,
    /// Documents of the embedded sample, used when no files are given.
    pub documents: u64,
    /// Seed of the sample.
    pub seed: u64,
    /// Share of the sample's documents that are one random line, repeated.
    pub refrains: f64,
    /// Share of the sample's repeated facts that are put as a question.
    pub questions: f64,
    /// Chance that a sentence of the sample is followed by one about nothing.
    pub filler: f64,
}

impl Default for Params {
    fn default() -> Params {
        Params {
            field: "text".into(),
            paragraphs_bytes: 4096,
            documents_max: None,
            documents: 40_000,
            seed: 17,
            refrains: 0.4,
            questions: 0.2,
            filler: 0.2,
        }
    }
}

impl Stage for Text {
    const NAME: &'static str = "text";
    const VERSION: u32 = 1;
    const DOC: &'static str = "Gathers documents from files (txt, jsonl, parquet, gz, zst); without \
         files, makes a sample of little worlds in which early facts are asked for later.";
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] =
            &[In::many("files", "Files or folders of documents.").optional().named()];
        const OUTPUTS: &[Out] =
            &[Out::one("text", "text.jsonl", "One document a line: `text`, `answers`, `kind`.")];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let shares = [
            ("refrains", params.refrains),
            ("questions", params.questions),
            ("filler", params.filler),
        ];
        let mut wrong: Vec<(String, String)> = shares
            .iter()
            .filter(|(_, share)| !(0.0..=1.0).contains(share))
            .map(|(name, share)| (name.to_string(), format!("is {share}, not a share of 0 to 1")))
            .collect();
        if params.documents == 0 {
            wrong.push(("documents".into(), "must be at least 1".into()));
        }
        if params.paragraphs_bytes == 0 {
            wrong.push(("paragraphs_bytes".into(), "must be at least 1".into()));
        }
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let path = ctx.output("text")?;
        let file =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        if ctx.has("files") {
            gather(params, ctx, &mut out)?
        } else {
            invent(params, ctx, &mut out)?
        }
        out.flush().with_context(|| format!("cannot write {}", path.display()))
    }
}

fn put(out: &mut impl Write, document: &Document) -> Result<()> {
    serde_json::to_writer(&mut *out, document)?;
    out.write_all(b"\n")?;
    Ok(())
}

/// Writes the embedded sample.
fn invent(params: &Params, ctx: &mut Context, out: &mut impl Write) -> Result<()> {
    let mix = Mix { refrains: params.refrains, questions: params.questions, filler: params.filler };
    let total = params.documents.min(params.documents_max.unwrap_or(u64::MAX));
    for index in 0..total {
        put(out, &sample::document(params.seed, index, &mix))?;
        if index % 4096 == 0 {
            ctx.check_cancelled()?;
            ctx.progress(index, total, "documents");
        }
    }
    ctx.progress(total, total, "documents");
    Ok(())
}

/// Raised inside a sink when `documents_max` is reached.
#[derive(Debug)]
struct Enough;

impl std::fmt::Display for Enough {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("enough documents")
    }
}

impl std::error::Error for Enough {}

/// Writes the documents of all files, in the order given; folders are walked in sorted order.
fn gather(params: &Params, ctx: &mut Context, out: &mut impl Write) -> Result<()> {
    let files = files(ctx)?;
    let reading = Reading { field: &params.field, paragraphs_bytes: params.paragraphs_bytes };
    let most = params.documents_max.unwrap_or(u64::MAX);
    let (mut count, mut skipped) = (0u64, Skipped::default());
    for (at, (path, format)) in files.iter().enumerate() {
        ctx.progress(at as u64, files.len() as u64, "files");
        let read = read::documents(path, *format, &reading, &mut skipped, &mut |text| {
            if count >= most {
                return Err(Enough.into());
            }
            count += 1;
            if count.is_multiple_of(4096) {
                ctx.check_cancelled()?;
            }
            put(out, &Document::plain(text.into()))
        });
        match read {
            Err(error) if error.is::<Enough>() => break,
            other => other.with_context(|| format!("in {}", path.display()))?,
        }
    }
    ctx.progress(files.len() as u64, files.len() as u64, "files");
    if skipped != Skipped::default() {
        let Skipped { invalid, empty } = skipped;
        ctx.note(format!("skipped {invalid} documents that are no UTF-8, {empty} that are empty"));
    }
    ensure!(
        count > 0,
        "no document in {}: {} were empty and {} no UTF-8",
        match &files[..] {
            [(path, _)] => format!("`{}`", path.display()),
            many => format!("{} files", many.len()),
        },
        skipped.empty,
        skipped.invalid
    );
    Ok(())
}

/// The files to read. A file given by name must be of a known kind; others in folders are left out.
fn files(ctx: &mut Context) -> Result<Vec<(PathBuf, Format)>> {
    let (mut files, mut unknown) = (Vec::new(), Vec::new());
    for input in ctx.inputs("files") {
        if input.path.is_dir() {
            for path in read::walk(&input.path)? {
                match format_of(&path) {
                    Some(format) => files.push((path, format)),
                    None => unknown.push(path),
                }
            }
        } else {
            match Format::of(&input.name) {
                Some(format) => files.push((input.path.clone(), format)),
                None => {
                    bail!("`{}` is of no known kind; it must end in {}", input.name, read::KNOWN)
                }
            }
        }
    }
    if let Some(first) = unknown.first() {
        let (count, first) = (unknown.len(), first.display());
        ctx.note(format!("left out {count} files of unknown kind, {first} among them"));
    }
    ensure!(!files.is_empty(), "no document files there; their names must end in {}", read::KNOWN);
    Ok(files)
}

fn format_of(path: &Path) -> Option<Format> {
    Format::of(&path.file_name()?.to_string_lossy())
}
