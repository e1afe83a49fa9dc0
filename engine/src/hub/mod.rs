//! Models from a hub: what `hf:owner/name@revision` stands for, and bringing it here once.
//!
//! `settings.rs` says where the hub and its files are, `api.rs` asks, `select.rs` chooses files,
//! `download.rs` brings them, `store.rs` keeps them where Hugging Face's own tools look for them.
//! Knows no steps, no keys and no digests of ours.

mod api;
mod download;
mod select;
mod settings;
mod store;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub use settings::Settings;

use api::{Client, Listing};
use select::{plain_path, wanted};
use store::Store;

/// What the user named.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// `owner/name`, or the bare name of a model older than owners (`gpt2`).
    pub repository: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// One file of it; otherwise all that a model needs.
    pub file: Option<String>,
}

/// Why a text after `hf:` is no reference, and what to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadReference {
    /// What is wrong.
    pub message: String,
    /// What helps.
    pub hint: &'static str,
}

impl Reference {
    /// Reads `owner/name[@revision][#path/in/it]`, the text after `hf:`.
    pub fn parse(text: &str) -> Result<Reference, BadReference> {
        let bad = |message: String, hint| Err(BadReference { message, hint });
        let (rest, file) = match text.split_once('#') {
            Some((rest, file)) => (rest, Some(file)),
            None => (text, None),
        };
        let (repository, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let parts: Vec<&str> = repository.split('/').collect();
        if parts.len() > 2 || !parts.iter().all(|part| plain_name(part)) {
            let hint = "write `hf:owner/name` or `hf:owner/name@revision`";
            return bad(format!("`hf:{text}` names no repository"), hint);
        }
        if !plain_revision(revision) {
            let hint = "write a branch, a tag or a commit after `@`, or leave it out for `main`";
            return bad(format!("`hf:{text}` names no revision"), hint);
        }
        if file.is_some_and(|file| !plain_path(file)) {
            let hint = "write a path inside the repository after `#`: `#model-q4.gguf`";
            return bad(format!("`hf:{text}` names no file"), hint);
        }
        Ok(Reference {
            repository: repository.into(),
            revision: revision.into(),
            file: file.map(Into::into),
        })
    }

    /// The last part of the repository's name, or of the file's.
    pub fn base_name(&self) -> &str {
        let path = self.file.as_ref().unwrap_or(&self.repository);
        path.rsplit('/').next().unwrap_or(path)
    }

    /// The reference with the commit in place of the revision.
    fn origin(&self, commit: &str) -> String {
        let file = self.file.as_ref().map(|file| format!("#{file}")).unwrap_or_default();
        format!("{}@{commit}{file}", self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.origin(&self.revision))
    }
}

/// The hub's own rule; `--` joins owner and name in the cache, and dots would climb.
fn plain_name(part: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=96).contains(&part.len())
        && part.chars().all(inside)
        && !part.starts_with(['.', '-'])
        && !part.ends_with(['.', '-'])
        && !part.contains("--")
        && !part.contains("..")
}

/// What git allows in the name of a branch, as far as it matters for paths and addresses.
fn plain_revision(revision: &str) -> bool {
    plain_path(revision)
        && !revision.contains("..")
        && !revision.contains([' ', '~', '^', ':', '?', '*', '['])
        && !revision.split('/').any(|part| part.starts_with('.'))
}

/// Whether a revision is a whole commit id, which never stands for anything else.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A model, or one file, that is here whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// `owner/name@commit`, with `#file` when it is one file.
    pub origin: String,
    /// The commit.
    pub commit: String,
    /// Base name: of the repository, or of the file.
    pub name: String,
    /// Files by name, sorted, each with the place of its bytes.
    pub files: Vec<(String, PathBuf)>,
    /// Whether it is one file and no directory of files.
    pub single: bool,
}

/// What planning found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Looked {
    /// It is here.
    Here(Snapshot),
    /// It would be fetched.
    Absent,
}

/// What goes on while something is fetched.
pub struct Work<'a> {
    /// Raised when nobody wants it any more.
    pub cancel: &'a AtomicBool,
    /// Tells a person how far it is.
    pub say: &'a (dyn Fn(String) + Sync),
}

/// Why something could not be fetched.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    /// Whether trying again may help, and how long the hub asks to wait.
    again: Option<Option<Duration>>,
}

/// What is to be decided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The hub did not answer, or is in trouble.
    Unreachable,
    /// It answered, and that was no.
    Refused,
    /// The disk here, or a request to stop.
    Here,
}

impl Error {
    fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into(), again: None }
    }

    fn refused(message: impl Into<String>) -> Error {
        Error::new(Kind::Refused, message)
    }

    fn here(message: impl Into<String>) -> Error {
        Error::new(Kind::Here, message)
    }

    fn stopped() -> Error {
        Error::here("stopped")
    }

    /// The same, worth another try after `wait` or a pause of our own.
    fn again(self, wait: Option<Duration>) -> Error {
        Error { again: Some(wait), ..self }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Brings what `reference` stands for here. A commit that is here whole needs no hub; a hub that
/// cannot be reached is replaced by what it said last, if that is here whole.
///
/// # Errors
/// Each names the reference, the host and what to do.
pub fn fetch(
    settings: &Settings,
    reference: &Reference,
    work: &Work<'_>,
) -> Result<Snapshot, Error> {
    let store = Store::new(&settings.cache, &reference.repository);
    if let Some(found) = pinned(&store, reference) {
        return Ok(found);
    }
    let local = local(&store, reference);
    if settings.offline {
        return Ok(tell_local(local.map_err(|lacks| offline(reference, &lacks))?, reference, work));
    }
    let client = Client::new(settings, reference, work.cancel)?;
    let tries = if local.is_ok() { 1 } else { settings.tries };
    match (client.listing(tries), local) {
        (Ok(listing), _) => bring(&client, &store, reference, &listing, work),
        (Err(error), Ok(found)) if error.kind == Kind::Unreachable => {
            let text = error.message.lines().next().unwrap_or_default();
            (work.say)(text.into());
            Ok(tell_local(found, reference, work))
        }
        (Err(error), Err(lacks)) if error.kind == Kind::Unreachable => {
            let other = "look at the network, or set HF_ENDPOINT to a mirror";
            let (what, hint) =
                error.message.split_once("\nhint: ").unwrap_or((&error.message, other));
            Err(Error { message: format!("{what}; {lacks}\nhint: {hint}"), ..error })
        }
        (Err(error), _) => Err(error),
    }
}

/// Whether what `reference` stands for is here whole; asks the hub at most once, and little.
///
/// # Errors
/// As [`fetch`].
pub fn look(settings: &Settings, reference: &Reference) -> Result<Looked, Error> {
    let store = Store::new(&settings.cache, &reference.repository);
    if let Some(found) = pinned(&store, reference) {
        return Ok(Looked::Here(found));
    }
    let local = local(&store, reference);
    if settings.offline {
        return local.map(Looked::Here).map_err(|lacks| offline(reference, &lacks));
    }
    let cancel = AtomicBool::new(false);
    let client = Client::new(settings, reference, &cancel)?;
    match (client.listing(1), local) {
        (Ok(listing), _) => {
            let names = names(reference, &listing)?;
            let read = |index: &str| store.read(&listing.commit, index);
            let names = names.and_shards(&read).ok();
            Ok(names
                .and_then(|names| snapshot(&store, reference, &listing.commit, &names).ok())
                .map_or(Looked::Absent, Looked::Here))
        }
        (Err(error), Ok(found)) if error.kind == Kind::Unreachable => Ok(Looked::Here(found)),
        (Err(error), _) => Err(error),
    }
}

/// Fetches what is missing of a listed commit and remembers that it is whole.
fn bring(
    client: &Client<'_>,
    store: &Store,
    reference: &Reference,
    listing: &Listing,
    work: &Work<'_>,
) -> Result<Snapshot, Error> {
    let commit = &listing.commit;
    let chosen = names(reference, listing)?;
    // The index first: it says which the other files are.
    if let Some(index) = &chosen.index {
        download::files(client, store, commit, std::slice::from_ref(index), work)?;
    }
    let shards = chosen.and_shards(&|index| store.read(commit, index));
    let names = shards.map_err(|what| Error::refused(format!("`{reference}`: {what}")))?;
    if let Some(missing) = names.iter().find(|name| !listing.files.contains(name)) {
        return Err(Error::refused(format!(
            "`{reference}` (commit {}): its index names `{missing}`, which it does not have",
            short(commit)
        )));
    }
    download::files(client, store, commit, &names, work)?;
    if reference.file.is_none() {
        store.mark(commit, &names);
    }
    store.set_ref(&reference.revision, commit);
    snapshot(store, reference, commit, &names)
        .map_err(|lacks| Error::here(format!("`{reference}`: {lacks}, though it was fetched")))
}

/// The files of a listing that are wanted, the index still unread.
fn names(reference: &Reference, listing: &Listing) -> Result<select::Wanted, Error> {
    let Some(file) = &reference.file else {
        let chosen = wanted(&listing.files);
        return chosen.map_err(|what| Error::refused(format!("`{reference}` {what}")));
    };
    if listing.files.contains(file) {
        return Ok(select::Wanted { files: vec![file.clone()], index: None });
    }
    let there = listing.files.iter().map(String::as_str);
    let hint = crate::diagnostic::suggest(file, "its files", there);
    let hint = hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
    Err(Error::refused(format!(
        "`{reference}` (commit {}) has no file `{file}`{hint}",
        short(&listing.commit)
    )))
}

/// What a whole commit id stands for, if that is known to be here whole.
fn pinned(store: &Store, reference: &Reference) -> Option<Snapshot> {
    let commit = Some(&reference.revision).filter(|revision| is_commit(revision))?;
    let names = match &reference.file {
        Some(file) => vec![file.clone()],
        None => store.marked(commit)?,
    };
    snapshot(store, reference, commit, &names).ok()
}

/// What the hub last said `reference` is, if that is here whole: by our mark, or by being whole in
/// itself. Otherwise what it lacks.
fn local(store: &Store, reference: &Reference) -> Result<Snapshot, String> {
    let commit = match is_commit(&reference.revision) {
        true => reference.revision.clone(),
        false => store.get_ref(&reference.revision).ok_or("nothing of it is here")?,
    };
    let names = match &reference.file {
        Some(file) => vec![file.clone()],
        None => match store.marked(&commit) {
            Some(names) => names,
            None => {
                let there = store.names(&commit);
                if !there.iter().any(|name| name == "config.json") {
                    return Err("what is here of it is not whole: no `config.json`".into());
                }
                let chosen = wanted(&there)
                    .map_err(|what| format!("what is here of it is not whole: it {what}"))?;
                chosen.and_shards(&|index| store.read(&commit, index))?
            }
        },
    };
    snapshot(store, reference, &commit, &names)
}

/// The named files, if all are here.
fn snapshot(
    store: &Store,
    reference: &Reference,
    commit: &str,
    names: &[String],
) -> Result<Snapshot, String> {
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let lacks = || format!("what is here of it is not whole: no `{name}`");
        files.push((name.clone(), store.bytes_of(commit, name).ok_or_else(lacks)?));
    }
    files.sort();
    files.dedup();
    Ok(Snapshot {
        origin: reference.origin(commit),
        commit: commit.into(),
        name: reference.base_name().into(),
        files,
        single: reference.file.is_some(),
    })
}

fn tell_local(found: Snapshot, reference: &Reference, work: &Work<'_>) -> Snapshot {
    if !is_commit(&reference.revision) {
        let commit = short(&found.commit);
        (work.say)(format!("`{reference}` is taken as it was when last fetched: commit {commit}"));
    }
    found
}

fn offline(reference: &Reference, lacks: &str) -> Error {
    Error::refused(format!(
        "`{reference}`: {lacks}, and HF_HUB_OFFLINE forbids to fetch it\nhint: unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE), or give a directory"
    ))
}

fn short(commit: &str) -> &str {
    commit.get(..12).unwrap_or(commit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read() {
        let read = |text: &str| {
            let r = Reference::parse(text).map_err(|bad| bad.message)?;
            Ok::<_, String>((r.to_string(), r.revision.clone(), r.base_name().to_string()))
        };
        let good = |a: &str, b: &str, c: &str| Ok((a.to_string(), b.to_string(), c.to_string()));
        assert_eq!(read("gpt2"), good("hf:gpt2@main", "main", "gpt2"));
        assert_eq!(read("o/n.1"), good("hf:o/n.1@main", "main", "n.1"));
        assert_eq!(read("o/n@refs/pr/1"), good("hf:o/n@refs/pr/1", "refs/pr/1", "n"));
        assert_eq!(read("o/n@v1#a/b.gguf"), good("hf:o/n@v1#a/b.gguf", "v1", "b.gguf"));
        assert_eq!(read("o/n#b.gguf"), good("hf:o/n@main#b.gguf", "main", "b.gguf"));
        for (text, what) in [
            ("", "repository"),
            ("/n", "repository"),
            ("o/", "repository"),
            ("a/b/c", "repository"),
            ("../n", "repository"),
            ("o/n--m", "repository"),
            ("o/n m", "repository"),
            ("@main", "repository"),
            ("o/n@", "revision"),
            ("o/n@../x", "revision"),
            ("o/n@a/", "revision"),
            ("o/n@/a", "revision"),
            ("o/n@a b", "revision"),
            ("o/n@a/.lock", "revision"),
            ("o/n#", "file"),
            ("o/n#/etc/passwd", "file"),
            ("o/n#a/../b", "file"),
        ] {
            let told = read(text).unwrap_err();
            assert_eq!(told, format!("`hf:{text}` names no {what}"));
        }
    }
}
