//! `pipe export STEP DIR`: a step's model as a directory in a published format. What is written is
//! decided in `stages::models::published`.

mod facts;
mod place;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, anyhow, bail};
use cache::{Cache, Kind, Output};
use engine::tensors::Tensors;
use serde_json::json;
use stages::models::published::{self, Bundle, Interrupted, Written};

use super::Wrong;
use crate::cli::Export;
use crate::out::{self, Paint, bytes, clean};
use facts::Found;

pub fn export(args: Export) -> Result<ExitCode> {
    let wrong = |error: anyhow::Error| anyhow!(Wrong(format!("{error:#}")));
    let dtype = args.dtype.as_deref().map(published::parse_dtype).transpose().map_err(wrong)?;
    let shard_bytes = args.max_shard_size.as_deref().map(published::parse_size);
    let shard_bytes = shard_bytes.transpose().map_err(wrong)?;
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let loaded = super::load_for_step(args.file.as_deref(), &args.settings, &cache)?;
    let at = super::one_step(&loaded, &args.step)?;
    let found = facts::find(&loaded.plan, at, &args.port, &cache)?;
    let lease = cache.lease(&format!("exporting `{}`", found.step))?;
    let made = found.tokenizer.iter().map(|(_, output)| output).chain([&found.model]);
    lease.hold(&made.map(|output| output.digest).collect::<Vec<_>>())?;
    let tokenizer = tokenizer(args.tokenizer.as_deref(), &found, &cache)?;
    let place = place::Place::new(&args.dir)?;
    let model = object(&cache, &found.model, &found.step)?;
    let not_model = || format!("port `{}` of `{}` is no model", args.port, found.step);
    let tensors = Tensors::open(&model).with_context(not_model)?;
    published::open(&tensors).with_context(not_model)?;

    let stopped = listen()?;
    let temporary = place.begin()?;
    let bundle = Bundle {
        tensors: &tensors,
        tokenizer: tokenizer.as_deref(),
        dtype,
        shard_bytes,
        provenance: found.provenance,
    };
    let written = published::write(temporary.path(), bundle, &|| stopped.load(Ordering::Relaxed));
    let written = match written {
        Err(error) if error.is::<Interrupted>() => {
            drop(temporary);
            out::message("interrupted; nothing was written");
            return Ok(ExitCode::from(130));
        }
        other => other.with_context(|| format!("cannot export `{}`", found.step))?,
    };
    let dir = temporary.publish()?;
    tell(&dir, &written, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Where the bytes of an artifact are.
fn object(cache: &Cache, output: &Output, step: &str) -> Result<std::path::PathBuf> {
    if !cache.present(output) {
        bail!(Wrong(format!(
            "the bytes of `{step}.{}` are not in the cache any more\nhint: `pipe run --from {step}`",
            output.port
        )));
    }
    if output.kind != Kind::File {
        bail!(Wrong(format!("port `{}` of `{step}` is a directory, not a model", output.port)));
    }
    cache.check(output)?;
    Ok(cache.path(&output.digest))
}

/// The text of the tokenizer: the user's, else the pipeline's.
fn tokenizer(given: Option<&Path>, found: &Found, cache: &Cache) -> Result<Option<String>> {
    if let Some(path) = given {
        let read = std::fs::read_to_string(path);
        let wrong = |error| Wrong(format!("cannot read the tokenizer {}: {error}", path.display()));
        return Ok(Some(read.map_err(wrong)?));
    }
    let Some((step, output)) = &found.tokenizer else { return Ok(None) };
    let path = object(cache, output, step)?;
    let text = std::fs::read_to_string(path);
    Ok(Some(text.with_context(|| format!("cannot read `{step}.tokenizer`"))?))
}

/// Becomes true on Ctrl-C and SIGTERM, so that nothing half-written is left.
fn listen() -> Result<Arc<AtomicBool>> {
    let stopped = Arc::new(AtomicBool::new(false));
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, stopped.clone())
            .context("cannot listen for signals")?;
    }
    Ok(stopped)
}

fn tell(dir: &Path, written: &Written, as_json: bool) -> Result<()> {
    let total: u64 = written.files.iter().map(|(_, bytes)| bytes).sum();
    if as_json {
        let files = written.files.iter().map(|(name, bytes)| json!({"name": name, "bytes": bytes}));
        let told = json!({
            "dir": dir,
            "format": written.format.name(),
            "parameters": written.parameters,
            "dtype": written.dtype,
            "bytes": total,
            "files": files.collect::<Vec<_>>(),
            "notes": written.notes,
        });
        out::line(serde_json::to_string_pretty(&told)?);
        return Ok(());
    }
    let paint = Paint::stdout();
    out::line(format!(
        "{} {}: {}, {} parameters as {}, {}",
        paint.bold("wrote"),
        clean(&dir.display().to_string()),
        written.format.name(),
        written.parameters,
        written.dtype,
        bytes(total)
    ));
    for (name, size) in &written.files {
        out::line(format!("  {name:<36} {:>10}", bytes(*size)));
    }
    for note in &written.notes {
        out::message(format!("note: {}", clean(note)));
    }
    Ok(())
}
