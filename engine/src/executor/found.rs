//! Looks keys and files up, first in what the last run that asked the same found, and collects what
//! this one finds. Knows no order of steps.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cache::{Cache, Hit, Key, Memo, Recalled};

use super::{Options, Settled};
use crate::event::Summary;
use crate::inputs::{self, UserFile};
use crate::lookup;
use crate::plan::{Plan, Source};
use crate::repeat::{self, Head};

/// User files by pattern, as [`lookup::user_files`] gives them.
type Files = BTreeMap<PathBuf, Result<Vec<UserFile>, String>>;

/// Answers from memory where it may.
pub(super) struct Finder {
    paranoid: bool,
    recalled: Option<Recalled>,
    memo: Option<(String, Memo)>,
    /// When hits of the earlier run were last noted as used, seconds since 1970.
    used_s: Option<f64>,
}

/// What a run found, for the next one.
pub struct Found {
    name: String,
    memo: Memo,
    keys: Vec<Key>,
    /// Whether there was nothing to do and nothing too young to prove that.
    whole: bool,
    used_s: f64,
    cached: usize,
    saved_s: f64,
}

impl Finder {
    /// Reads what the last run found, if the options name it.
    pub fn new(cache: &Cache, options: &Options) -> Finder {
        let name = options.memo.as_ref();
        let recalled = name.filter(|_| !options.paranoid).and_then(|name| cache.recall(name));
        let head = recalled.as_ref().and_then(|recalled| Head::of(recalled.head()));
        Finder {
            paranoid: options.paranoid,
            recalled,
            memo: name.map(|name| (name.clone(), cache.memo())),
            used_s: head.map(|head| head.used_s).filter(|&s| !repeat::is_old(s)),
        }
    }

    /// Finds and hashes the user's files that `steps` read.
    pub fn user_files(&self, plan: &Plan, steps: &[usize], cache: &Cache) -> Files {
        let earlier = self.recalled.as_ref();
        lookup::user_files_by(plan, steps, &|path| {
            if let Some(file) = earlier.and_then(|earlier| UserFile::recalled(earlier, path)) {
                return Ok(vec![file]);
            }
            let read = |path: &PathBuf| match self.paranoid {
                true => UserFile::reread(path),
                false => UserFile::read(cache, path),
            };
            inputs::find(path)?.iter().map(read).collect()
        })
    }

    /// The result of `key`, if there is one.
    pub fn look(&mut self, cache: &Cache, key: &Key) -> cache::Result<Option<Hit>> {
        let known = self.recalled.as_ref().filter(|_| !cache.is_pending(key));
        let found = match known.and_then(|known| known.hit(key)) {
            Some((hit, stamp)) => {
                if self.used_s.is_none() {
                    cache.used(key);
                }
                Some((hit, Some(stamp)))
            }
            None => {
                let found = cache.lookup_stamped(key)?;
                found.map(|(entry, stamp)| (Hit::of(&entry), stamp))
            }
        };
        if let (Some((_, memo)), Some((hit, Some(stamp)))) = (&mut self.memo, &found) {
            memo.hit(*key, *stamp, hit.clone());
        }
        Ok(found.map(|(hit, _)| hit))
    }

    /// What the next run may start from.
    pub fn found(
        self,
        plan: &Plan,
        steps: &[usize],
        settled: &[Settled],
        files: &Files,
        summary: &Summary,
    ) -> Option<Found> {
        let (name, mut memo) = self.memo?;
        let mut young = false;
        for (pattern, files) in files {
            let Ok(files) = files else { continue };
            young |= !inputs::note(&mut memo, pattern, files);
        }
        let hub = |step: &usize| {
            let mut sources = plan.steps[*step].inputs.iter().flat_map(|port| &port.sources);
            sources.any(|source| matches!(source, Source::Hub { .. }))
        };
        let all = steps.len() == plan.steps.len() && summary.cached == steps.len();
        Some(Found {
            name,
            memo,
            keys: steps.iter().filter_map(|&step| settled[step].key).collect(),
            whole: all && !young && !summary.interrupted && !steps.iter().any(hub),
            used_s: self.used_s.unwrap_or_else(crate::run::now),
            cached: summary.cached,
            saved_s: summary.saved_s,
        })
    }
}

impl Found {
    /// Keeps it: the run with `record` (its id) was made from `sources`, and `gpus` are those
    /// that planning looked at, if it did. A failure costs the next run its time and nothing else.
    pub fn keep(
        mut self,
        cache: &Cache,
        plan: &Plan,
        record: &str,
        sources: &[(PathBuf, String)],
        gpus: Option<String>,
    ) {
        for (path, text) in sources {
            self.whole &= self.source(path, text);
        }
        for output in &plan.outputs {
            self.whole &= inputs::note_as_it_is(&mut self.memo, &output.to);
        }
        let head = Head {
            record: record.into(),
            pipeline: plan.name.clone(),
            whole: self.whole,
            used_s: self.used_s,
            cached: self.cached,
            saved_s: self.saved_s,
            gpus,
        };
        let _ = self.memo.write(cache, &self.name, &head.text(), &self.keys);
    }

    /// Notes a file of the pipeline, if it still says what it said when it was read.
    fn source(&mut self, path: &Path, text: &str) -> bool {
        let Ok(meta) = std::fs::metadata(path) else { return false };
        let same = std::fs::read(path).is_ok_and(|bytes| bytes == text.as_bytes());
        let digest = cache::Digest::of(text.as_bytes());
        same && self.memo.file(path, &cache::Stamp::of(&meta), &digest)
    }
}
