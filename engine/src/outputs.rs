//! `outputs:` of a pipeline: copies artifacts to where the user wants them. Reflinked or copied,
//! never linked, and a file that we did not write is never overwritten.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use cache::{Cache, Digest, Kind, Output as Artifact};

use crate::executor::Settled;
use crate::plan::{Output, Plan, Source};

/// Delivers one output if its step is done; `false` when nothing had to be written.
pub fn deliver(output: &Output, plan: &Plan, steps: &[Settled], cache: &Cache) -> Result<bool> {
    let Source::Step { step, port, index } = &output.source else {
        bail!("`from` names no step");
    };
    let Some(made) = &steps[*step].outputs else { return Ok(false) };
    let wanted = |a: &&Artifact| a.port == *port && (index.is_none() || a.index == *index);
    let found: Vec<&Artifact> = made.iter().filter(wanted).collect();
    let listed = plan.steps[*step].ports.iter().any(|(name, list, _)| name == port && *list);
    match (&found[..], index, listed) {
        ([one], _, false) | ([one], Some(_), true) => place(one, &output.to, cache),
        ([], ..) => bail!("`{}.{port}` has no such artifact", plan.steps[*step].name),
        (many, ..) => {
            let mut any = false;
            for artifact in many {
                any |= place(artifact, &output.to.join(&artifact.name), cache)?;
            }
            Ok(any)
        }
    }
}

fn place(artifact: &Artifact, to: &Path, cache: &Cache) -> Result<bool> {
    let mark = cache.marks_dir().join(Digest::of(to.as_os_str().as_encoded_bytes()).to_string());
    let mut marked = artifact.digest.to_string();
    if to.symlink_metadata().is_ok() {
        let (digest, ..) = cache::hash_path(to)?;
        if digest == artifact.digest {
            return Ok(false);
        }
        let digest = digest.to_string();
        let ours = fs::read_to_string(&mark);
        if !ours.is_ok_and(|text| text.lines().any(|line| line == digest)) {
            bail!(
                "{} is there already and was not written by this pipeline (or was changed since)\nhint: move it away, or change `to`",
                to.display()
            );
        }
        // It stays ours until the new one is in its place.
        marked = format!("{marked}\n{digest}");
    }
    if !cache.present(artifact) {
        bail!(
            "its bytes are not in the store any more\nhint: run again with `--from` and the step's name"
        );
    }
    let parent = to.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let tmp = beside(to);
    cache.check(artifact)?;
    remove(&tmp)?;
    let put = || -> Result<()> {
        let cannot = || format!("cannot write {}", tmp.display());
        let from = cache.whole(artifact, || tmp.clone())?;
        copy(&from, &tmp, artifact.kind).map_err(|e| full(e, to)).with_context(cannot)?;
        // The mark goes first: a crash in between leaves a file that is known all the same.
        cache.write(&mark, marked.as_bytes())?;
        if to.is_dir() {
            remove(to)?;
        }
        fs::rename(&tmp, to).with_context(|| format!("cannot write {}", to.display()))
    };
    put().inspect_err(|_| drop(remove(&tmp)))?;
    Ok(true)
}

fn remove(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

/// The error, with what helps if the disk at `to` is full.
fn full(error: std::io::Error, to: &Path) -> anyhow::Error {
    match cache::disk::trouble(to) {
        Some(full) => anyhow::anyhow!("{error}: {full}"),
        None => error.into(),
    }
}

fn beside(to: &Path) -> PathBuf {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    to.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Copies an object; what the user gets is writable.
fn copy(from: &Path, to: &Path, kind: Kind) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match kind {
        Kind::File => {
            if from != to {
                let _ = fs::remove_file(to);
                reflink_copy::reflink_or_copy(from, to)?;
            }
            let executable = fs::metadata(from)?.permissions().mode() & 0o111;
            fs::set_permissions(to, fs::Permissions::from_mode(0o644 | executable))
        }
        Kind::Dir => {
            fs::create_dir_all(to)?;
            for item in fs::read_dir(from)? {
                let item = item?;
                let kind = if item.file_type()?.is_dir() { Kind::Dir } else { Kind::File };
                copy(&item.path(), &to.join(item.file_name()), kind)?;
            }
            Ok(())
        }
    }
}
