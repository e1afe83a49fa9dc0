//! Checkpoints of steps on nodes with caches of their own: a node brings what its step seals into a
//! place of the attempt's own in the remote, the leader notes the newest with the attempt and names it
//! in the next order, and the node that gets that goes on from there.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use cache::remote::{Progress, Remote, Trouble};
use cache::{Attempt, Cache, Digest, Key, Kind, Output, checkpoint};
use serde::{Deserialize, Serialize};

use super::records;

/// What the leader knows of an attempt's, beside where sealed ones lie: who drops those drops this.
const FILE: &str = "remote.json";
const DIR: &str = "checkpoints";
/// A node keeps so many of an attempt: an order may name the last but one.
const KEPT: usize = 2;

/// A checkpoint in a remote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// How far the step had come.
    pub position: u64,
    /// The place in the remote.
    pub place: String,
    /// Of the directory.
    pub digest: Digest,
    /// Of the files in it.
    pub bytes: u64,
}

impl Saved {
    fn output(&self) -> Output {
        let (port, name) = (DIR.to_string(), self.position.to_string());
        let Saved { digest, bytes, .. } = *self;
        Output { port, index: None, name, kind: Kind::Dir, digest, bytes }
    }
}

/// Keeps what is known of the attempt at `dir`, unless something newer is.
pub(super) fn keep(dir: &Path, saved: &Saved) -> io::Result<()> {
    let path = dir.join(DIR).join(FILE);
    if records::read::<Saved>(&path).is_some_and(|known| known.position >= saved.position) {
        return Ok(());
    }
    fs::create_dir_all(dir.join(DIR))?;
    records::write(&path, saved)
}

/// Forgets a checkpoint that is not in the remote any more, so that older ones than it count again.
pub(super) fn forget(store: &Path, dir: &Path, gone: &Saved) {
    let key = dir.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    for (path, _) in all(store, &key).into_iter().filter(|(_, saved)| saved == gone) {
        let _ = fs::remove_file(path);
    }
}

fn all(store: &Path, key: &str) -> Vec<(PathBuf, Saved)> {
    let attempts = fs::read_dir(store.join("attempts").join(key)).into_iter().flatten().flatten();
    let paths = attempts.map(|attempt| attempt.path().join(DIR).join(FILE));
    paths.filter_map(|path| Some((path.clone(), records::read(&path)?))).collect()
}

/// The newest of any attempt at `key`.
pub(super) fn newest(store: &Path, key: &Key) -> Option<Saved> {
    let all = all(store, &key.to_string()).into_iter();
    all.map(|(_, saved)| saved).max_by_key(|saved| saved.position)
}

/// Removes checkpoints that nobody needs of the key of the attempt at `dir`: all, when it is `done`,
/// else those older than the attempt's own. What cannot be removed now goes some day.
pub(super) fn tidy(remote: &Remote, store: &Path, dir: &Path, done: bool) {
    let key = dir.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let own = records::read::<Saved>(&dir.join(DIR).join(FILE));
    let old = |saved: &Saved| done || own.as_ref().is_some_and(|o| o.position > saved.position);
    for (path, saved) in all(store, &key).into_iter().filter(|(_, saved)| old(saved)) {
        if remote.checkpoints_drop(&saved.place).is_ok() {
            let _ = fs::remove_file(path);
        }
    }
}

/// A node's side: what an attempt seals goes to its place.
pub(super) struct Keeper<'a> {
    cache: &'a Cache,
    attempt: &'a Attempt,
    place: Remote,
    name: String,
    /// The last ones that are there.
    sent: Vec<Saved>,
    /// So far the step had come before.
    position: Option<u64>,
}

impl<'a> Keeper<'a> {
    /// `name` is that of the place, `from` what the attempt began with.
    pub fn new(
        remote: &Remote,
        name: String,
        (cache, attempt): (&'a Cache, &'a Attempt),
        from: Option<&Saved>,
    ) -> Result<Keeper<'a>, Trouble> {
        let (place, position) = (remote.checkpoints(&name)?, from.map(|saved| saved.position));
        Ok(Keeper { cache, attempt, place, name, sent: Vec::new(), position })
    }

    /// Sends the newest, if it is not there; `told` tells the leader of it.
    pub fn look(
        &mut self,
        cancel: &AtomicBool,
        told: impl FnOnce(&Saved) -> bool,
    ) -> Result<(), Trouble> {
        let dir = self.attempt.checkpoints();
        // By name first: to look closer may mean to read all of it.
        let new = |position: &u64| self.position.is_none_or(|before| before < *position);
        if !positions(&dir).any(|position| new(&position)) {
            return Ok(());
        }
        let newest = checkpoint::latest([dir]).filter(|(position, _)| new(position));
        let Some((position, sealed)) = newest else { return Ok(()) };
        // The step may replace it at any moment.
        let held = self.attempt.dir.join("sent");
        let _ = fs::remove_dir_all(&held);
        if link_all(&sealed, &held).is_err() {
            return Ok(());
        }
        let sent = self.send(position, &held, cancel);
        let _ = fs::remove_dir_all(&held);
        let saved = sent?;
        if told(&saved) {
            self.position = Some(position);
            self.sent.push(saved);
            let kept = &self.sent[self.sent.len().saturating_sub(KEPT)..];
            let kept: Vec<Output> = kept.iter().map(Saved::output).collect();
            let _ = self.place.keep_only(&kept);
        }
        Ok(())
    }

    fn send(&self, position: u64, held: &Path, cancel: &AtomicBool) -> Result<Saved, Trouble> {
        let (digest, _, bytes) = cache::hash_path(held)?;
        let saved = Saved { position, place: self.name.clone(), digest, bytes };
        let places = BTreeMap::from([(digest, held.to_path_buf())]);
        self.place.send(self.cache, &[saved.output()], &places, cancel)?;
        Ok(saved)
    }
}

/// Lets `attempt` go on from `saved`.
pub(super) fn restore(
    remote: &Remote,
    cache: &Cache,
    attempt: &Attempt,
    saved: &Saved,
    cancel: &AtomicBool,
) -> Result<(), Trouble> {
    let output = saved.output();
    let place = remote.checkpoints(&saved.place)?;
    place.fetch(cache, std::slice::from_ref(&output), &Progress::new(), cancel)?;
    let object = cache.object(&output.digest);
    let copied = checkpoint::save::<io::Error>(&attempt.checkpoints(), saved.position, |to| {
        copy_all(&object, to)
    });
    match copied {
        Ok(_) => Ok(()),
        Err(cause) => {
            let (doing, path) = ("copy a checkpoint to", attempt.dir.clone());
            Err(Trouble::Local(cache::Error::Io { doing, path, cause }))
        }
    }
}

/// Positions of sealed checkpoints, by their names.
fn positions(dir: &Path) -> impl Iterator<Item = u64> + use<> {
    let items = fs::read_dir(dir).into_iter().flatten().flatten();
    items.filter_map(|item| item.file_name().to_str()?.parse().ok())
}

fn link_all(from: &Path, to: &Path) -> io::Result<()> {
    each(from, to, &|from, to| fs::hard_link(from, to))
}

/// Copies what may be changed after.
fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    each(from, to, &|from, to| {
        reflink_copy::reflink_or_copy(from, to)?;
        let executable = fs::metadata(from)?.permissions().mode() & 0o111;
        fs::set_permissions(to, fs::Permissions::from_mode(0o644 | executable))
    })
}

fn each(from: &Path, to: &Path, file: &dyn Fn(&Path, &Path) -> io::Result<()>) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for item in fs::read_dir(from)? {
        let item = item?;
        let (path, target) = (item.path(), to.join(item.file_name()));
        match item.file_type()?.is_dir() {
            true => each(&path, &target, file)?,
            false => file(&path, &target)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cache::remote::Settings;

    #[test]
    fn another_node_goes_on_from_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| Cache::open(dir.path().join(name)).unwrap();
        let (leader, one, two) = (open("leader"), open("one"), open("two"));
        let bucket = dir.path().join("bucket");
        fs::create_dir(&bucket).unwrap();
        let settings = Settings::new(bucket.display().to_string());
        let remote = Remote::open(settings, &|_| None).unwrap();
        let key: Key = Digest::of(b"key").to_string().parse().unwrap();
        let never = AtomicBool::new(false);

        let (ours, theirs) = (leader.attempt(&key).unwrap(), one.attempt(&key).unwrap());
        let name = "run/first".to_string();
        let mut keeper = Keeper::new(&remote, name, (&one, &theirs), None).unwrap();
        let mut look = |position: Option<u64>| {
            if let Some(position) = position {
                checkpoint::save::<io::Error>(&theirs.checkpoints(), position, |to| {
                    fs::create_dir(to.join("deep"))?;
                    fs::write(to.join("deep/w"), position.to_string())
                })
                .unwrap();
            }
            let mut told = None;
            let tell = |saved: &Saved| {
                keep(&ours.dir, saved).unwrap();
                told.replace(saved.position).is_none()
            };
            keeper.look(&never, tell).unwrap();
            told
        };
        assert_eq!(look(None), None);
        assert_eq!(look(Some(7)), Some(7));
        assert_eq!(look(None), None, "it is there");
        assert_eq!((look(Some(8)), look(Some(9))), (Some(8), Some(9)));
        let saved = newest(leader.root(), &key).unwrap();
        assert_eq!(saved.position, 9);

        let third = two.attempt(&key).unwrap();
        restore(&remote, &two, &third, &saved, &never).unwrap();
        let (position, sealed) = two.checkpoint_latest(&key).unwrap();
        assert_eq!((position, fs::read(sealed.join("deep/w")).unwrap()), (9, b"9".to_vec()));
        fs::write(sealed.join("deep/w"), "may be changed").unwrap();
        let name = "run/second".to_string();
        let mut keeper = Keeper::new(&remote, name, (&two, &third), Some(&saved)).unwrap();
        keeper.look(&never, |_| panic!("nothing is new")).unwrap();

        // What nobody needs goes.
        let later = leader.attempt(&key).unwrap();
        keep(&later.dir, &Saved { position: 10, place: "run/second".into(), ..saved.clone() })
            .unwrap();
        tidy(&remote, leader.root(), &later.dir, false);
        assert_eq!(newest(leader.root(), &key).unwrap().position, 10);
        let gone = Saved { position: 9, place: "run/first".into(), ..saved };
        let three = open("three");
        let fourth = three.attempt(&key).unwrap();
        assert!(restore(&remote, &three, &fourth, &gone, &never).is_err());
        tidy(&remote, leader.root(), &later.dir, true);
        assert_eq!(newest(leader.root(), &key), None);
        assert!(remote.checkpointed().unwrap().is_empty());
        leader.checkpoints_drop(&key).unwrap();
    }
}
