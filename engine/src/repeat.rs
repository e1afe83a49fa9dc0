//! A run that would find everything as the last one of its kind left it, told without a plan.
//!
//! A run that comes to its end leaves a memo of all it looked at: pipeline files, user
//! files, entries, delivered outputs, GPUs where planning asked for them. The next run that asks the
//! same of the same binary compares all that by `stat`, and where nothing differs, it is known how
//! it would end. The memo is a copy of what can be found again, and is never the truth: anything
//! that is not exactly as noted, or younger than a clock can tell, makes the run an ordinary one. Where
//! only the stamps of directories of entries had gone stale, theirs are noted beside it.

use std::ffi::OsStr;
use std::path::PathBuf;

use anyhow::Result;
use cache::{Cache, Digest, Recalled};
use serde::{Deserialize, Serialize};

use crate::event::{Event, Summary};
use crate::inputs;
use crate::run::{self, Asked, Record};

/// Uses are noted for garbage collection once a day.
const DAY_S: f64 = 86_400.0;

/// So many entries are not looked at one by one in every run.
const MANY: usize = 64;

/// What a memo says beside files and entries.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// The record of the run.
    pub record: String,
    /// The record in which its plan lies first.
    pub plan: Option<String>,
    /// The pipeline's name.
    pub pipeline: String,
    /// Whether every step is done, and all that was looked at is noted.
    pub whole: bool,
    /// When the hits were last noted as used, seconds since 1970.
    pub used_s: f64,
    /// How many hits the next one has.
    pub cached: usize,
    /// What they took when they ran, in seconds.
    pub saved_s: f64,
    /// The GPUs that planning looked at, if it did.
    pub gpus: Option<String>,
    /// The run whose events tell every step but those in `but`, as they were to this one.
    pub base: String,
    /// Steps that were something else to this run.
    pub but: Vec<usize>,
}

/// What an earlier run that asked the same left.
#[derive(Debug)]
pub struct Earlier {
    /// The memo's file.
    name: String,
    /// What it says of itself.
    pub head: Head,
    /// What it found.
    pub recalled: Recalled,
}

impl Earlier {
    /// Reads back what the last run called `name` left.
    pub fn read(cache: &Cache, name: &str) -> Option<Earlier> {
        let name = file(name);
        let recalled = cache.recall(&name)?;
        Some(Earlier { name, head: Head::of(recalled.head())?, recalled })
    }

    /// Files and patterns that are not what they were, sorted; whatever else it looked at is.
    pub fn changed(&self) -> Vec<&OsStr> {
        self.recalled.changed(&inputs::seal)
    }
}

impl Head {
    /// Reads it back.
    pub fn of(text: &[u8]) -> Option<Head> {
        serde_json::from_slice(text).ok()
    }

    /// As text.
    pub fn text(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// Whether a note of `when` (seconds since 1970) is to be made again: it is a day old, or the clock
/// was set back.
pub fn is_old(when: f64) -> bool {
    !(0.0..DAY_S).contains(&(run::now() - when))
}

/// The name of the memo of runs that ask for `what`: all that decides a run beside files.
pub fn name(what: &[&str]) -> String {
    let text = serde_json::to_string(what).unwrap_or_default();
    Digest::of(text.as_bytes()).to_string()
}

/// The file of the memo `name`.
pub fn file(name: &str) -> String {
    format!("memo-{name}")
}

/// What a run that repeats another came to.
#[derive(Debug)]
pub struct Repeated {
    /// Totals.
    pub summary: Summary,
    /// Its own record.
    pub dir: PathBuf,
}

/// Records the run that asks what `earlier` did, if nothing has changed since; `None` when it is to
/// be run. `gpus` tells those that planning would look at.
///
/// # Errors
/// When the record cannot be written.
pub fn repeat(
    cache: &Cache,
    Earlier { name, head, recalled }: &Earlier,
    gpus: &dyn Fn() -> String,
    asked: Asked,
    (build, jobs): (&str, usize),
) -> Result<Option<Repeated>> {
    let started = std::time::Instant::now();
    let same = head.whole
        && !is_old(head.used_s)
        && recalled.len() == head.cached
        && head.gpus.as_ref().is_none_or(|noted| *noted == gpus());
    let Some(looked) = same.then(|| recalled.entries_stand()).flatten() else { return Ok(None) };
    if !recalled.files_stand(&inputs::seal) {
        return Ok(None);
    }
    if looked >= MANY {
        // At worst the next run looks at them again.
        let _ = recalled.renew(cache, name);
    }
    // Before a record is begun: what the events of the base do not tell.
    let hit = |&step: &usize| {
        let (key, hit) = recalled.hit_at(step)?;
        Some(Event::Cached { step, key, saved_s: hit.seconds, outputs: hit.outputs })
    };
    let Some(others) = head.but.iter().map(hit).collect::<Option<Vec<Event>>>() else {
        return Ok(None);
    };
    let earlier = cache.runs_dir().join(&head.record);
    let Some(mut record) = Record::repeat(cache, &earlier, &head.pipeline, asked, build)? else {
        return Ok(None);
    };
    let summary = Summary {
        cached: head.cached,
        saved_s: head.saved_s,
        seconds: started.elapsed().as_secs_f64(),
        ..Summary::default()
    };
    record.write(&Event::Started { steps: head.cached, jobs })?;
    record.write(&Event::Unchanged { run: head.base.clone(), but: head.but.clone() })?;
    for event in others {
        record.write(&event)?;
    }
    record.write(&Event::Ended { summary: summary.clone() })?;
    Ok(Some(Repeated { summary, dir: record.dir.clone() }))
}
