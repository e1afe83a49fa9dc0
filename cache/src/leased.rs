//! Locks by files that name a living process, for caches where no lock of the kernel's can be relied
//! on. An exclusive one is a file that a hard link made; a shared one is a file beside.
//!
//! Whoever was silent for too long loses a lock without knowing it: so what a lock protects asks
//! [`Exclusive::is_mine`] before it does what only its holder may do.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{At, Result};
use crate::layout::{Layout, unique};
use crate::lives::Lives;
use crate::tree;

/// Parts a shared lock's name from its holder's.
const MARK: char = '@';
/// So often a lock is tried for that others take and give back meanwhile.
const TRIES: usize = 50;

/// An exclusive lock.
#[derive(Debug)]
pub(crate) struct Exclusive {
    layout: Layout,
    path: PathBuf,
    text: String,
}

/// The outcome of trying for one.
pub(crate) enum Tried {
    Mine(Exclusive),
    /// What its holder wrote into it.
    Busy(String),
}

impl Exclusive {
    /// Tries for the lock at `path`. `about` is written into it, after a line that is ours.
    pub fn attempt(layout: &Layout, lives: &Lives, path: &Path, about: &str) -> Result<Tried> {
        let life = lives.own().at("write", path)?;
        let text = format!("{life} {}\n{about}", unique());
        let staged = layout.staging();
        fs::write(&staged, &text).at("write", &staged)?;
        let tried = Exclusive::tries(layout, lives, path, &staged, &text);
        let _ = fs::remove_file(&staged);
        tried
    }

    fn tries(
        layout: &Layout,
        lives: &Lives,
        path: &Path,
        staged: &Path,
        text: &str,
    ) -> Result<Tried> {
        let mut last = String::new();
        for _ in 0..TRIES {
            match link(staged, path) {
                Ok(true) => {
                    let (layout, path) = (layout.clone(), path.to_path_buf());
                    return Ok(Tried::Mine(Exclusive { layout, path, text: text.to_string() }));
                }
                Ok(false) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    layout.make_dir(path.parent().expect("locks are in directories"))?;
                    continue;
                }
                result => drop(result.at("create", path)?),
            }
            let Some(held) = read(path) else { continue };
            if lives.alive(life_of(&held)) {
                return Ok(Tried::Busy(about_of(&held)));
            }
            remove(layout, path, &held);
            last = held;
        }
        Ok(Tried::Busy(about_of(&last)))
    }

    /// Whether nobody has taken it since, as after this process was frozen for long.
    pub fn is_mine(&self) -> bool {
        read(&self.path).as_deref() == Some(&self.text)
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        if self.is_mine() {
            remove(&self.layout, &self.path, &self.text);
        }
    }
}

/// Whether somebody living has the exclusive lock at `path`.
pub(crate) fn is_locked(lives: &Lives, path: &Path) -> bool {
    read(path).is_some_and(|held| lives.alive(life_of(&held)))
}

/// Removes a lock if it is still the one that says `text`; another that was taken for it goes back.
fn remove(layout: &Layout, path: &Path, text: &str) {
    let aside = layout.staging();
    if fs::rename(path, &aside).is_err() {
        return;
    }
    if read(&aside).as_deref() != Some(text) {
        let _ = link(&aside, path);
    }
    let _ = fs::remove_file(aside);
}

/// Makes a second name for a file; `false` when the name is taken.
fn link(from: &Path, to: &Path) -> io::Result<bool> {
    let linked = fs::hard_link(from, to);
    match linked {
        Ok(()) => Ok(true),
        // An answer that was lost on its way says "exists" to its own sender.
        Err(_) if same(from, to) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

fn same(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    id(a).is_some() && id(a) == id(b)
}

fn read(path: &Path) -> Option<String> {
    let (bytes, _) = tree::read_plain(path).ok()??;
    String::from_utf8(bytes).ok()
}

fn life_of(text: &str) -> &str {
    text.split([' ', '\n']).next().unwrap_or_default()
}

fn about_of(text: &str) -> String {
    text.split_once('\n').map_or(String::new(), |(_, about)| about.to_string())
}

/// A shared lock: a file beside what it is on.
#[derive(Debug)]
pub(crate) struct Shared(PathBuf);

impl Shared {
    /// Shares the lock at `path`.
    pub fn take(lives: &Lives, path: &Path) -> io::Result<Shared> {
        let life = lives.own()?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let beside = path.with_file_name(format!("{name}{MARK}{}{MARK}{life}", unique()));
        fs::File::create_new(&beside)?;
        Ok(Shared(beside))
    }

    /// The same one, after what it lies in was moved to `dir`.
    pub fn moved(mut self, dir: &Path) -> Shared {
        let name = self.0.file_name().unwrap_or_default().to_os_string();
        self.0 = dir.join(name);
        self
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A name that says who holds what is called so.
pub(crate) fn named(life: &str) -> String {
    format!("{}{MARK}{life}", unique())
}

/// Whether nobody living shares the lock at `path`, nor is named by its own name.
pub(crate) fn is_free(lives: &Lives, path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if let Some((_, life)) = name.rsplit_once(MARK) {
        return !lives.alive(life);
    }
    let beside = format!("{name}{MARK}");
    let Some(parent) = path.parent() else { return true };
    for item in fs::read_dir(parent).into_iter().flatten().flatten() {
        let other = item.file_name().to_string_lossy().into_owned();
        let life = other.strip_prefix(&beside).and_then(|rest| rest.rsplit_once(MARK));
        if life.is_some_and(|(_, life)| lives.alive(life)) {
            return false;
        }
    }
    true
}
