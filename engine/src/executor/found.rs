//! Looks keys and files up, first in what the last run that asked the same found, and collects what
//! this one finds. Knows no schedule.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cache::{Cache, Carried, Hit, Key, Memo};
use rayon::prelude::*;

use super::{Options, Settled};
use crate::event::Summary;
use crate::inputs::{self, UserFile};
use crate::lookup::{self, Files};
use crate::plan::{Plan, Source};
use crate::repeat::{self, Earlier, Head};

/// From so many files of the user's on, memory matters more than the time to give it back.
const MANY: usize = 20_000;

/// So many results one thread reads at a time.
const PIECE: usize = 512;

/// In place of the key of a step that has none.
const NONE: Key = Key::from_bytes([0; 32]);

/// Answers from memory where it may.
pub(super) struct Finder {
    paranoid: bool,
    earlier: Option<Arc<Earlier>>,
    memo: Option<(String, Memo)>,
    /// When hits of the earlier run were last noted as used, seconds since 1970.
    used_s: Option<f64>,
    /// Of each step of the plan whether it stands as the earlier run found it. Empty where no step is
    /// known to.
    stand: Vec<bool>,
    /// What the earlier run found of them, where another step will ask for it, until that is taken.
    hits: Vec<(usize, Key, Hit)>,
}

/// What a run found, for the next one.
pub struct Found {
    name: String,
    memo: Memo,
    keys: Vec<Key>,
    earlier: Option<Arc<Earlier>>,
    stand: Vec<bool>,
    /// Whether there was nothing to do and nothing too young to prove that.
    whole: bool,
    used_s: f64,
    cached: usize,
    saved_s: f64,
}

impl Finder {
    /// Starts from what the last run found, if the options have it.
    pub fn new(cache: &Cache, options: &Options) -> Finder {
        let earlier = options.earlier.clone().filter(|_| !options.paranoid);
        let memo = || earlier.as_ref().map_or_else(|| cache.memo(), |e| Memo::after(&e.recalled));
        let name = options.memo.as_deref().map(repeat::file);
        Finder {
            paranoid: options.paranoid,
            memo: name.map(|name| (name, memo())),
            used_s: earlier.as_ref().map(|e| e.head.used_s).filter(|&s| !repeat::is_old(s)),
            earlier,
            stand: Vec::new(),
            hits: Vec::new(),
        }
    }

    /// Which of all steps of `plan` stand as the earlier run found them, if it had the same plan: all
    /// that they need stands, and their entries. None of those that are to be looked at anyway
    /// (`looked`), nor what needs them.
    pub fn stand(&mut self, plan: &Plan, options: &Options, looked: &dyn Fn(usize) -> bool) {
        let Some(earlier) = &self.earlier else { return };
        let head = &earlier.head;
        let same_plan = head.plan.is_some() && head.plan == options.plan_of;
        if !same_plan || earlier.recalled.len() != plan.steps.len() {
            return;
        }
        let changed = earlier.changed();
        let mut stand: Vec<bool> = Vec::with_capacity(plan.steps.len());
        for (at, step) in plan.steps.iter().enumerate() {
            let mut sources = step.inputs.iter().flat_map(|port| &port.sources);
            let stands = step.after.iter().all(|&step| stand[step])
                && sources.all(|source| match source {
                    Source::Step { step, .. } => stand[*step],
                    Source::Path { path } => changed.binary_search(&path.as_os_str()).is_err(),
                    Source::Hub { .. } => false,
                })
                && !looked(at);
            stand.push(stands && earlier.recalled.stands_at(at));
        }
        // What is told one by one is not to be told of more and more steps.
        let but = head.but.iter().filter(|&&step| stand[step]).count();
        let others = stand.iter().filter(|stands| !**stands).count();
        let any = others < stand.len();
        if any && but + others <= plan.steps.len() / 8 + 8 {
            let mut asked: BTreeSet<usize> = head.but.iter().copied().collect();
            for step in plan.steps.iter().zip(&stand).filter(|(_, stands)| !**stands) {
                asked.extend(lookup::needs(step.0));
            }
            let asked: Vec<usize> = asked.into_iter().filter(|step| stand[*step]).collect();
            let hit = |at: usize| earlier.recalled.hit_at(at).map(|(key, hit)| (at, key, hit));
            // A few are read sooner than threads start.
            let hits: Option<Vec<_>> = match asked.len() < PIECE {
                true => asked.into_iter().map(hit).collect(),
                false => asked.into_par_iter().with_min_len(PIECE).map(hit).collect(),
            };
            if let Some(hits) = hits {
                (self.stand, self.hits) = (stand, hits);
            }
        }
    }

    /// The steps that stand; `None` if no earlier run is known to tell of them.
    pub fn standing(&self) -> Option<(&Arc<Earlier>, &[bool])> {
        let earlier = self.earlier.as_ref().filter(|_| !self.stand.is_empty())?;
        Some((earlier, &self.stand))
    }

    /// What the earlier run found of the steps that stand, those that somebody will ask for, in their
    /// order, once.
    pub fn take_hits(&mut self) -> Vec<(usize, Key, Hit)> {
        std::mem::take(&mut self.hits)
    }

    /// No step stands: each is to be looked up.
    pub fn look_at_all(&mut self) {
        self.stand.clear();
        self.hits.clear();
    }

    /// The step at `at` runs again though it stood.
    pub fn falls(&mut self, at: usize) {
        if let Some(stands) = self.stand.get_mut(at) {
            *stands = false;
        }
    }

    /// Keeps nothing for the next run: keys that this one found are not what it would find now.
    pub fn forget(&mut self) {
        self.memo = None;
    }

    /// Whether the hits are to be noted as used.
    pub fn notes_uses(&self) -> bool {
        self.used_s.is_none()
    }

    /// Finds and hashes the user's files that `steps` read.
    pub fn user_files<'p>(&self, plan: &'p Plan, steps: &[usize], cache: &Cache) -> Files<'p> {
        let earlier = self.earlier.as_ref();
        let known = |path: &Path| Some(vec![UserFile::recalled(&earlier?.recalled, path)?]);
        lookup::user_files_by(plan, steps, &known, &|path| {
            let read = |path: &PathBuf| match self.paranoid {
                true => UserFile::reread(path),
                false => UserFile::read(cache, path),
            };
            let mut files: Vec<UserFile> =
                inputs::find(path)?.iter().map(read).collect::<Result<_, String>>()?;
            // Most often it is one, and there may be very many patterns.
            files.shrink_to_fit();
            Ok(files)
        })
    }

    /// The result of `key`, if there is one.
    pub fn look(&mut self, cache: &Cache, key: &Key) -> cache::Result<Option<Hit>> {
        let known = self.earlier.as_ref().filter(|_| !cache.is_pending(key));
        let found = match known.and_then(|known| known.recalled.hit(key)) {
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
        files: Files<'_>,
        summary: &Summary,
    ) -> Option<Found> {
        let (name, mut memo) = self.memo?;
        let mut whole = steps.len() == plan.steps.len() && !summary.interrupted;
        let many = files.len() >= MANY;
        for (pattern, files) in files {
            let noted = files.as_ref().is_ok_and(|f| inputs::note(&mut memo, pattern.as_ref(), f));
            // To take them apart takes longer than to end; very many are in the way of what is noted.
            if !many {
                std::mem::forget(files);
            }
            if !noted {
                memo.unproved(pattern.as_ref());
            }
            whole &= noted;
        }
        if many {
            give_back();
        }
        let mut saved_s = summary.saved_s;
        // What ran is a hit next time, where it is durable and nobody else's result took its place.
        let hits = memo.keys();
        for (at, &step) in steps.iter().enumerate() {
            if self.stand.get(at) == Some(&true) {
                continue;
            }
            let Settled { key: Some(key), outputs: Some(outputs) } = &settled[step] else {
                whole = false;
                continue;
            };
            let sources = plan.steps[step].inputs.iter().flat_map(|port| &port.sources);
            let hub = sources.into_iter().any(|source| matches!(source, Source::Hub { .. }));
            whole &= plan.steps[step].cache && !hub;
            if hits.contains(key) {
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
            earlier: self.earlier,
            stand: self.stand,
            whole,
            used_s: self.used_s.unwrap_or_else(crate::run::now),
            cached: steps.len(),
            saved_s,
        })
    }
}

/// Gives the system what was freed in between: what is to be written needs large pieces.
fn give_back() {
    // SAFETY: it may be called at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

impl Found {
    /// Keeps it: the run with `record` (its id) was made from `sources`, its plan is that of
    /// `plan_of` (another id, or its own), and `gpus` tells those that planning looked at, if it did.
    /// A failure costs the next run its time and nothing else.
    pub fn keep(
        mut self,
        cache: &Cache,
        plan: &Plan,
        (record, plan_of): (&str, &str),
        sources: &[(PathBuf, String)],
        gpus: &dyn Fn() -> Option<String>,
    ) {
        for (path, text) in sources {
            let noted = self.source(path, text);
            if !noted {
                self.memo.unproved(path);
            }
            self.whole &= noted;
        }
        for output in &plan.outputs {
            let noted = inputs::note_as_it_is(&mut self.memo, &output.to);
            if !noted {
                self.memo.unproved(&output.to);
            }
            self.whole &= noted;
        }
        let earlier = self.earlier.as_ref().filter(|_| !self.stand.is_empty());
        let (base, but) = match earlier {
            Some(e) => (e.head.base.clone(), not_as_before(&e.head, &self.stand)),
            None => (record.into(), Vec::new()),
        };
        let head = Head {
            record: record.into(),
            plan: Some(plan_of.into()),
            pipeline: plan.name.clone(),
            whole: self.whole,
            used_s: self.used_s,
            cached: self.cached,
            saved_s: self.saved_s,
            // Of the same plan, which is not gone through again.
            gpus: earlier.map_or_else(gpus, |earlier| earlier.head.gpus.clone()),
            base,
            but,
        };
        let carried = earlier.map(|earlier| Carried {
            from: &earlier.recalled,
            files: earlier.recalled.verdicts(&inputs::seal),
            keys: &self.stand,
        });
        let _ = self.memo.write(cache, &self.name, &head.text(), &self.keys, carried.as_ref());
    }

    /// Notes a file of the pipeline, if it still says what it said when it was read.
    fn source(&mut self, path: &Path, text: &str) -> bool {
        let Ok(meta) = std::fs::metadata(path) else { return false };
        let same = std::fs::read(path).is_ok_and(|bytes| bytes == text.as_bytes());
        let digest = cache::Digest::of(text.as_bytes());
        same && self.memo.file(path, &cache::Stamp::of(&meta), &digest)
    }
}

/// Steps that are not what they were to the run that `head` has its events from: those it says, and
/// those that do not stand.
pub(super) fn not_as_before(head: &Head, stand: &[bool]) -> Vec<usize> {
    let mut as_before = stand.to_vec();
    for &step in &head.but {
        as_before[step] = false;
    }
    (0..as_before.len()).filter(|&step| !as_before[step]).collect()
}
