//! A directory artifact, built in `staging/` as its recipe says. The recipe's paths were checked
//! when it was read, and the directory is new and private, so nothing in it can lead elsewhere.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::cache::Cache;
use crate::digest::Digest;
use crate::error::{At, Result};
use crate::parts::copy_range;
use crate::recipe::{Part, Recipe};
use crate::store;
use crate::tree::{self, Kind};

/// A directory that is not whole yet; removed when it never gets so.
pub(super) struct Building {
    /// Becomes the artifact.
    root: PathBuf,
    /// Holds parts of files that have several.
    beside: PathBuf,
    /// Where the bytes of each part go.
    targets: HashMap<Digest, (Part, Vec<PathBuf>)>,
    /// Files of no part or of several, to be made of these.
    joins: Vec<(PathBuf, Vec<PathBuf>)>,
    executables: Vec<PathBuf>,
}

impl Building {
    pub fn new(cache: &Cache, recipe: &Recipe) -> Result<Building> {
        let (root, beside) = (cache.layout().staging(), cache.layout().staging());
        let (targets, joins, executables) = Default::default();
        let mut building = Building { root, beside, targets, joins, executables };
        cache.layout().make_dir(&building.root)?;
        cache.layout().make_dir(&building.beside)?;
        for path in &recipe.empty_dirs {
            make_dir(&building.root.join(path))?;
        }
        for item in &recipe.items {
            let path = building.root.join(&item.path);
            make_dir(path.parent().unwrap_or(&building.root))?;
            if item.executable {
                building.executables.push(path.clone());
            }
            if let [one] = &item.parts[..] {
                building.aim(one, path);
                continue;
            }
            let places = item.parts.iter().map(|part| building.aim_beside(part)).collect();
            building.joins.push((path, places));
        }
        Ok(building)
    }

    fn aim(&mut self, part: &Part, path: PathBuf) {
        let aimed = self.targets.entry(part.digest).or_insert_with(|| (*part, Vec::new()));
        aimed.1.push(path);
    }

    /// One place for all uses of a part by files of several.
    fn aim_beside(&mut self, part: &Part) -> PathBuf {
        let path = self.beside.join(part.digest.to_string());
        let aimed = self.targets.get(&part.digest).is_some_and(|(_, to)| to.contains(&path));
        if !aimed {
            self.aim(part, path.clone());
        }
        path
    }

    /// The parts, each with the new files that are to have its bytes.
    pub fn wanted(&self) -> Vec<(Part, Vec<PathBuf>)> {
        self.targets.values().cloned().collect()
    }

    /// Gives the directory its name in the cache; false when it is not what the recipe is called.
    pub fn finish(mut self, cache: &Cache, recipe: &Recipe) -> Result<bool> {
        for (path, parts) in std::mem::take(&mut self.joins) {
            let to = File::create_new(&path).at("create", &path)?;
            let mut at = 0;
            for part in parts {
                let from = File::open(&part).at("open", &part)?;
                let bytes = from.metadata().at("inspect", &part)?.len();
                copy_range(&from, 0, &to, at, bytes).at("copy into", &path)?;
                at += bytes;
            }
        }
        for path in &self.executables {
            tree::set_mode(path, 0o555)?;
        }
        tree::freeze(&self.root, cache.layout().access())?;
        let (found, ..) = tree::hash_with(&self.root, &tree::hash_leaf)?;
        if found != recipe.digest {
            return Ok(false);
        }
        store::place(cache.layout(), &self.root, &recipe.digest, Kind::Dir)?;
        Ok(true)
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        let _ = tree::remove(&self.root);
        let _ = tree::remove(&self.beside);
    }
}

/// Makes a directory below a private one, with those between.
fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).at("create", path)
}

/// Copies a file to a new one, which is read-only after.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from).at("open", from)?;
    let bytes = source.metadata().at("inspect", from)?.len();
    let target = File::create_new(to).at("create", to)?;
    copy_range(&source, 0, &target, 0, bytes).at("copy into", to)?;
    target.set_permissions(Permissions::from_mode(0o444)).at("set the mode of", to)
}
