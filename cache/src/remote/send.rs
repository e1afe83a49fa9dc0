//! Artifacts that no entry names yet, from this machine to a remote: what a job made, and what it is
//! to get.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::cache::Cache;
use crate::digest::Digest;
use crate::entry::Output;
use crate::error::{At, Error};
use crate::recipe::{Item, Part, Recipe};
use crate::remote::blob::Transfer;
use crate::remote::inner::{Length, Remote, Way, blocking, unless};
use crate::remote::patience::Patience;
use crate::remote::progress::Progress;
use crate::remote::push::Load;
use crate::remote::upload::Source;
use crate::remote::{Trouble, layout};
use crate::tree::{self, Kind};

/// A user's directory may not be deeper.
const DEEPEST: usize = 200;

impl Remote {
    /// Puts the bytes of `outputs` into the remote, unless they are there. They are in the cache, or
    /// at one of `places`, which is the user's: a file, or a directory in which files may be links.
    /// Gives the bytes that went.
    ///
    /// # Errors
    /// As [`Remote::push`]; [`Trouble::Local`] also when a user's file is not what it was.
    pub fn send(
        &self,
        cache: &Cache,
        outputs: &[Output],
        places: &BTreeMap<Digest, PathBuf>,
        cancel: &AtomicBool,
    ) -> Result<u64, Trouble> {
        let mut outputs = outputs.to_vec();
        outputs.sort_by_key(|output| (output.digest, output.kind));
        outputs.dedup_by_key(|output| (output.digest, output.kind));
        if outputs.is_empty() {
            return Ok(0);
        }
        let transfer = Transfer {
            inner: self.inner.clone(),
            cache: cache.clone(),
            progress: Progress::new(),
            patience: Arc::new(Patience::new(self.inner.settings.timeouts.patience)),
        };
        let work = unless(cancel, transfer.send_all(&outputs, places));
        self.work(Way::Write, Length::Transfer, work)
    }

    /// Forgets which bytes the remote was seen to have: somebody did not find some.
    pub fn doubt(&self) {
        self.inner.forget_all();
    }

    /// Removes what lies under `digest`, which was seen to be damaged, so that the next who has the
    /// bytes puts them there.
    ///
    /// # Errors
    /// [`Trouble::Unavailable`], [`Trouble::Refused`].
    pub fn discard(&self, digest: &Digest) -> Result<(), Trouble> {
        let inner = &self.inner;
        let work = async {
            for name in [layout::recipe(digest), layout::object(digest)] {
                let deleted = inner.transport.delete(&name).await;
                deleted.map_err(|fault| inner.trouble(fault))?;
            }
            Ok(())
        };
        let done = self.work(Way::Write, Length::Short, work);
        self.inner.forget(digest);
        done
    }
}

impl Transfer {
    async fn send_all(
        &self,
        outputs: &[Output],
        places: &BTreeMap<Digest, PathBuf>,
    ) -> Result<u64, Trouble> {
        self.patiently(async || self.inner.ready(true).await).await?;
        let lease = self.cache.lease("sending to a remote")?;
        lease.hold(&outputs.iter().map(|output| output.digest).collect::<Vec<_>>())?;
        let load = self.load(outputs, places).await?;
        self.send_load(&load).await
    }

    /// Adds what a user's file or directory consists of. That a file is what it was is found when it
    /// is read to be sent.
    pub async fn add_place(
        &self,
        load: &mut Load,
        output: &Output,
        place: &Path,
    ) -> Result<(), Trouble> {
        if output.kind == Kind::File {
            let part = Part { digest: output.digest, bytes: output.bytes };
            load.sources.insert(part.digest, Source { part, path: place.to_path_buf() });
            return Ok(());
        }
        let (digest, root) = (output.digest, place.to_path_buf());
        let (recipe, sources) = blocking(move || directory(digest, &root)).await?;
        if tree::listing_digest(&recipe) != Some(output.digest) {
            let what = "it changed while it was in use".to_string();
            return Err(self.damaged_here(place.to_path_buf(), what));
        }
        load.sources.extend(sources.into_iter().map(|source| (source.part.digest, source)));
        load.split.push(recipe.digest);
        load.recipes.push(recipe);
        Ok(())
    }
}

/// The recipe of the directory at `root` and where its parts are.
fn directory(digest: Digest, root: &Path) -> Result<(Recipe, Vec<Source>), Error> {
    let mut found = Found::default();
    look(root, "", 0, &mut found)?;
    found.items.sort_by(|a, b| a.path.cmp(&b.path));
    found.empty_dirs.sort();
    let Found { items, empty_dirs, sources } = found;
    let bytes = items.iter().flat_map(|item| &item.parts).map(|part| part.bytes).sum();
    Ok((Recipe { digest, kind: Kind::Dir, bytes, items, empty_dirs }, sources))
}

#[derive(Default)]
struct Found {
    items: Vec<Item>,
    empty_dirs: Vec<String>,
    sources: Vec<Source>,
}

fn look(dir: &Path, name: &str, depth: usize, found: &mut Found) -> Result<(), Error> {
    let mut empty = true;
    for item in fs::read_dir(dir).at("list", dir)? {
        let item = item.at("list", dir)?;
        empty = false;
        let path = item.path();
        let bad = || Error::BadName { name: path.display().to_string() };
        let own = item.file_name().into_string().map_err(|_| bad())?;
        let below = if name.is_empty() { own } else { format!("{name}/{own}") };
        let linked = item.file_type().at("inspect", &path)?.is_symlink();
        let meta = fs::metadata(&path).at("inspect", &path)?;
        if meta.is_dir() && !linked && depth < DEEPEST {
            look(&path, &below, depth + 1, found)?;
            continue;
        }
        let (digest, kind, bytes) = tree::hash_path(&path)?;
        if kind == Kind::Dir {
            return Err(bad());
        }
        let part = Part { digest, bytes };
        // What comes by a link is of a hub, which tells no modes.
        let executable = !linked && tree::executable(&meta);
        found.items.push(Item { path: below, executable, parts: vec![part] });
        found.sources.push(Source { part, path });
    }
    if empty && !name.is_empty() {
        found.empty_dirs.push(name.to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::remote::Settings;

    fn output(name: &str, (digest, kind, bytes): (Digest, Kind, u64)) -> Output {
        let (port, name) = ("in".to_string(), name.to_string());
        Output { port, index: None, name, kind, digest, bytes }
    }

    #[test]
    fn what_is_the_user_s_goes_and_comes_as_it_was_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (here, there) = (path("here"), path("there"));
        let [here, there] = [here, there].map(|root| Cache::open(root).unwrap());
        fs::create_dir_all(path("bucket")).unwrap();
        let settings = Settings::new(path("bucket").display().to_string());
        let remote = Remote::open(settings, &|_| None).unwrap();
        fs::create_dir_all(path("own/deep/empty")).unwrap();
        fs::write(path("own/deep/x"), "x").unwrap();
        tree::set_mode(&path("own/deep/x"), 0o755).unwrap();
        fs::write(path("blob"), "of a hub").unwrap();
        tree::set_mode(&path("blob"), 0o755).unwrap();
        fs::create_dir_all(path("laid")).unwrap();
        symlink(path("blob"), path("laid/model.bin")).unwrap();
        let own = output("own", tree::hash_path(path("own")).unwrap());
        let files = [("model.bin".to_string(), path("blob"))];
        let (digest, bytes) = here.digest_of_files(&files).unwrap();
        let laid = output("laid", (digest, Kind::Dir, bytes));
        let file = output("blob", tree::hash_path(path("blob")).unwrap());
        let all = [own, laid, file];
        let places = all.iter().map(|o| (o.digest, path(&o.name))).collect();
        let never = AtomicBool::new(false);
        assert!(remote.send(&here, &all, &places, &never).unwrap() > 0);
        assert_eq!(remote.send(&here, &all, &places, &never).unwrap(), 0);
        remote.fetch(&there, &all, &Progress::new(), &never).unwrap();
        for one in &all {
            there.verify(one).unwrap();
        }
        // Seen from now on: somebody removes it, and is told so.
        remote.discard(&all[2].digest).unwrap();
        let again = Cache::open(path("again")).unwrap();
        let missing = remote.fetch(&again, &all[2..], &Progress::new(), &never);
        assert!(matches!(missing, Err(Trouble::Missing { .. })), "{missing:?}");
        // What changed since it was hashed is not sent under its name.
        fs::write(path("blob"), "of a hut").unwrap();
        fs::write(path("own/deep/x"), "y").unwrap();
        remote.doubt();
        let sent = remote.send(&here, &all[2..], &places, &never);
        assert!(matches!(sent, Err(Trouble::Local(_))), "{sent:?}");
        let fresh = path("fresh");
        fs::create_dir(&fresh).unwrap();
        let settings = Settings::new(fresh.display().to_string());
        let other = Remote::open(settings, &|_| None).unwrap();
        let sent = other.send(&here, &all[..1], &places, &never);
        assert!(matches!(sent, Err(Trouble::Local(_))), "{sent:?}");
    }
}
