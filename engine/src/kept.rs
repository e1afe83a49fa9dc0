//! The plan of a long pipeline, kept from one run to the next: read back where the texts it was made
//! from, the files it names and the question are the same. Disposable; a plan that is not exactly
//! known to be the same is made anew, which also finds all that is wrong with it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cache::{Cache, Digest};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::inputs;
use crate::lookup;
use crate::plan::{Plan, kept};
use crate::repeat::Earlier;
use crate::spec::Loaded;

/// Shorter plans are made almost as fast as they are read.
const STEPS: usize = 16;
const TEXT: usize = 64 << 10;

/// What a plan was made from, and what came of it beside.
#[derive(Serialize, Deserialize)]
struct Origin {
    sources: Vec<(PathBuf, Digest)>,
    params: Value,
    profiles: Vec<String>,
    executor: Value,
    /// The GPUs that planning looked at, if it did.
    gpus: Option<String>,
    /// The record in which the plan lies as JSON.
    record: String,
}

/// A plan that was kept.
pub struct Kept {
    /// As if it were loaded.
    pub loaded: Loaded,
    /// The record in which it lies as JSON.
    pub record: String,
}

fn file(name: &str) -> String {
    format!("plan-{name}")
}

/// Keeps what was loaded for runs that ask what `name` says; a failure costs the next one its time.
pub fn keep(cache: &Cache, name: &str, loaded: &Loaded, gpus: Option<String>, record: &str) {
    let text: usize = loaded.sources.iter().map(|(_, text)| text.len()).sum();
    let files = loaded.sources.iter().all(|(path, _)| path.is_absolute());
    if !files || (loaded.plan.steps.len() < STEPS && text < TEXT) {
        return;
    }
    let source = |(path, text): &(PathBuf, String)| (path.clone(), Digest::of(text.as_bytes()));
    let origin = Origin {
        sources: loaded.sources.iter().map(source).collect(),
        params: loaded.params.clone(),
        profiles: loaded.profiles.clone(),
        executor: loaded.executor.clone(),
        gpus,
        record: record.into(),
    };
    let Ok(head) = serde_json::to_vec(&origin) else { return };
    let (len, sum) = ((head.len() as u64).to_le_bytes(), Digest::of(&head));
    let plan = kept::render(&loaded.plan);
    let _ = cache.keep_file(&file(name), &[&len[..], sum.as_bytes(), &head, &plan].concat());
}

/// What was kept under `name`, if making it anew would give the same. `gpus` tells those that there
/// are; of the files that the plan names, those are not asked again that the last run (`earlier`)
/// had, if its plan was this.
pub fn load(
    cache: &Cache,
    name: &str,
    gpus: &dyn Fn() -> String,
    earlier: Option<&Earlier>,
) -> Option<Kept> {
    let bytes = fs::read(cache.kept_file(&file(name))).ok()?;
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let (sum, rest) = rest.split_first_chunk::<32>()?;
    let (head, plan) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    if Digest::of(head).as_bytes() != sum {
        return None;
    }
    let origin: Origin = serde_json::from_slice(head).ok()?;
    let mut sources = Vec::new();
    for (path, digest) in origin.sources {
        let text = String::from_utf8(fs::read(&path).ok()?).ok()?;
        if Digest::of(text.as_bytes()) != digest {
            return None;
        }
        sources.push((path, text));
    }
    if origin.gpus.is_some_and(|noted| noted != gpus()) {
        return None;
    }
    let earlier = earlier.filter(|earlier| earlier.head.plan.as_ref() == Some(&origin.record));
    let (plan, changed) = rayon::join(|| kept::parse(plan), || earlier.map(Earlier::changed));
    let plan = plan?;
    if !all_there(&plan, changed.as_deref()) {
        return None;
    }
    let Origin { params, profiles, executor, record, .. } = origin;
    let loaded = Loaded { plan: Arc::new(plan), sources, params, profiles, executor };
    Some(Kept { loaded, record })
}

/// Whether every path that the plan names stands for something: else planning would complain. If it
/// is known which have `changed` (sorted), the others do.
fn all_there(plan: &Plan, changed: Option<&[&OsStr]>) -> bool {
    let ports = plan.steps.iter().flat_map(|step| &step.inputs);
    let paths = ports.flat_map(|port| &port.sources).filter_map(lookup::path);
    let paths: HashSet<&OsStr> = match changed {
        Some(changed) => paths.filter(|path| changed.binary_search(path).is_ok()).collect(),
        None => paths.collect(),
    };
    let paths: Vec<&OsStr> = paths.into_iter().collect();
    paths.into_par_iter().with_min_len(64).all(|path| inputs::find(Path::new(path)).is_ok())
}
