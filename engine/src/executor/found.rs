//! Looks keys and files up, first in what the last run that asked the same found, and collects what
//! this one finds. Knows no order of steps.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use cache::{Cache, Hit, Key, Memo, Recalled};

use super::{Options, Settled};
use crate::event::Summary;
use crate::inputs::{self, UserFile};
use crate::lookup::{self, Files};
use crate::plan::{Plan, Source};
use crate::repeat::{self, Head};

/// In place of the key of a step that has none.
const NONE: Key = Key::from_bytes([0; 32]);

/// Answers from memory where it may.
pub(super) struct Finder {
    paranoid: bool,
    recalled: Option<Recalled>,
    memo: Option<(String, Memo)>,
    /// When hits of the earlier run were last noted as used, seconds since 1970.
    used_s: Option<f64>,
    /// Whether the plan is that of the earlier run, step by step.
    same_plan: bool,
    /// By position in the plan: steps that the earlier run found as they are now.
    same: HashSet<usize>,
    steps: Vec<usize>,
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
    pub fn new(cache: &Cache, options: &Options, steps: &[usize]) -> Finder {
        let name = options.memo.as_deref().map(repeat::file);
        let earlier = name.as_ref().filter(|_| !options.paranoid);
        let recalled = earlier.and_then(|name| cache.recall(name));
        let head = recalled.as_ref().and_then(|recalled| Head::of(recalled.head()));
        let as_then = |head: &Head| head.plan.is_some() && head.plan == options.plan_of;
        let same_plan = head.as_ref().is_some_and(as_then)
            && recalled.as_ref().is_some_and(|recalled| recalled.len() == steps.len());
        Finder {
            paranoid: options.paranoid,
            same_plan,
            same: HashSet::new(),
            steps: if same_plan { steps.to_vec() } else { Vec::new() },
            recalled,
            memo: name.map(|name| (name, cache.memo())),
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

    /// Key and result of the step at `at`, if the earlier run had the same plan, all that the step
    /// reads is what it was then, and its entry too.
    pub fn same<'a>(
        &mut self,
        cache: &Cache,
        at: usize,
        mut sources: impl Iterator<Item = &'a Source>,
        files: &Files,
    ) -> Option<(Key, Hit)> {
        let recalled = self.recalled.as_ref().filter(|_| self.same_plan)?;
        let unchanged = |source: &Source| match source {
            Source::Step { step, .. } => self.same.contains(step),
            Source::Path { path } => match files.get(path.as_os_str()) {
                Some(Ok(files)) => files.iter().all(|file| file.known),
                _ => false,
            },
            Source::Hub { .. } => false,
        };
        if !sources.all(unchanged) {
            return None;
        }
        let key = recalled.key(at).filter(|key| !cache.is_pending(key))?;
        let (hit, stamp) = recalled.hit(&key)?;
        if self.used_s.is_none() {
            cache.used(&key);
        }
        if let Some((_, memo)) = &mut self.memo {
            memo.hit(key, stamp, &hit);
        }
        self.same.insert(self.steps[at]);
        Some((key, hit))
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
            memo.hit(*key, *stamp, hit);
        }
        Ok(found.map(|(hit, _)| hit))
    }

    /// What the next run may start from.
    pub fn found(
        self,
        (cache, plan, steps): (&Cache, &Plan, &[usize]),
        settled: &[Settled],
        files: &Files,
        summary: &Summary,
    ) -> Option<Found> {
        let (name, mut memo) = self.memo?;
        let mut whole = steps.len() == plan.steps.len() && !summary.interrupted;
        for (pattern, files) in files {
            let Ok(files) = files else { continue };
            whole &= inputs::note(&mut memo, Path::new(pattern), files);
        }
        let mut saved_s = summary.saved_s;
        // What ran is a hit next time, where it is durable and nobody else's result took its place.
        let hits = if summary.ran > 0 { memo.keys() } else { HashSet::new() };
        for &step in steps {
            let Settled { key: Some(key), outputs: Some(outputs) } = &settled[step] else {
                whole = false;
                continue;
            };
            let sources = plan.steps[step].inputs.iter().flat_map(|port| &port.sources);
            let hub = sources.into_iter().any(|source| matches!(source, Source::Hub { .. }));
            whole &= plan.steps[step].cache && !hub;
            if summary.ran == 0 || hits.contains(key) {
                continue;
            }
            match cache.lookup_stamped(key) {
                Ok(Some((entry, Some(stamp)))) if entry.outputs == *outputs => {
                    let hit = Hit::of(&entry);
                    saved_s += hit.seconds;
                    memo.hit(*key, stamp, &hit);
                }
                _ => whole = false,
            }
        }
        Some(Found {
            name,
            memo,
            keys: steps.iter().map(|&step| settled[step].key.unwrap_or(NONE)).collect(),
            whole,
            used_s: self.used_s.unwrap_or_else(crate::run::now),
            cached: steps.len(),
            saved_s,
        })
    }
}

impl Found {
    /// Keeps it: the run with `record` (its id) was made from `sources`, its plan is that of
    /// `plan_of` (another id, or its own), and `gpus` are those that planning looked at, if it did.
    /// A failure costs the next run its time and nothing else.
    pub fn keep(
        mut self,
        cache: &Cache,
        plan: &Plan,
        (record, plan_of): (&str, &str),
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
            plan: Some(plan_of.into()),
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
