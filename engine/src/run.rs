//! The record of one run, `runs/<id>/` in the store: what was asked, the plan, every event. The
//! clock enters here and nowhere else. Read back, it is all that reports and explanations need.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use cache::{Cache, Presence};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::event::{Event, Stamped};
use crate::history::tail::Tail;
use crate::plan::Plan;

/// Name of the file with a line for each event, locked while it is written.
pub const EVENTS: &str = "events.jsonl";
/// Name of the file with the events of the run that [`Event::Unchanged`] names.
pub const UNCHANGED: &str = "unchanged.jsonl";
const PLAN: &str = "plan.json";

/// What was asked, and where.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Info {
    /// Its id: time of start and a little chance, sortable.
    pub id: String,
    /// Name of the pipeline.
    pub pipeline: String,
    /// The pipeline file, absolute; empty for the embedded one.
    pub file: PathBuf,
    /// The directory it was started in.
    pub cwd: PathBuf,
    /// The command line.
    pub args: Vec<String>,
    /// Seconds since 1970.
    pub started_s: f64,
    /// Build of the binary.
    pub build: String,
    /// The process; 0 in records of builds that did not tell. Whether it is still this run is told by
    /// its lock alone.
    #[serde(default)]
    pub pid: u32,
}

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// The pipeline file, absolute; empty for the embedded one.
    pub file: PathBuf,
    /// The current directory.
    pub cwd: PathBuf,
    /// The command line.
    pub args: Vec<String>,
}

/// As [`Stamped`], of an event that is another's.
#[derive(Serialize)]
struct Line<'a> {
    t: f64,
    e: &'a Event,
}

/// A run being recorded.
pub struct Record {
    /// What was asked.
    pub info: Info,
    /// Its directory.
    pub dir: PathBuf,
    events: BufWriter<File>,
    started: Instant,
    flushed: Instant,
    _presence: Option<Presence>,
}

impl Record {
    /// Starts a record: writes what was asked, the YAML as read, and the plan.
    pub fn create(
        cache: &Cache,
        plan: &Plan,
        sources: &[(PathBuf, String)],
        asked: Asked,
        build: &str,
    ) -> Result<Record> {
        Record::create_like(cache, plan, sources, (asked, build), None)
    }

    /// As [`Record::create`]; plan and YAML are linked where the record `like` has the very same.
    pub fn create_like(
        cache: &Cache,
        plan: &Plan,
        sources: &[(PathBuf, String)],
        (asked, build): (Asked, &str),
        like: Option<&str>,
    ) -> Result<Record> {
        let (info, dir) = begin(cache, &plan.name, asked, build)?;
        let like = like.map(|id| cache.runs_dir().join(id));
        let linked = |name: &str| {
            like.as_ref().is_some_and(|like| fs::hard_link(like.join(name), dir.join(name)).is_ok())
        };
        if !linked(PLAN) {
            cache.write(&dir.join(PLAN), &serde_json::to_vec(plan)?)?;
        }
        for (i, (path, text)) in sources.iter().enumerate() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name = format!("source-{i}-{name}");
            if !linked(&name) {
                cache.write(&dir.join(name), text.as_bytes())?;
            }
        }
        Record::start(cache, info, dir)
    }

    /// Starts the record of a run that finds what the run in `earlier` found: plan, YAML and events
    /// of that one are linked, since nobody writes to them any more. `None` if they are not there.
    pub fn repeat(
        cache: &Cache,
        earlier: &Path,
        pipeline: &str,
        asked: Asked,
        build: &str,
    ) -> Result<Option<Record>> {
        let Ok(items) = fs::read_dir(earlier) else { return Ok(None) };
        let (info, dir) = begin(cache, pipeline, asked, build)?;
        let mut linked = 0;
        for item in items.flatten() {
            let name = item.file_name().to_string_lossy().into_owned();
            if name == PLAN || name.starts_with("source-") {
                let done = fs::hard_link(item.path(), dir.join(&name)).is_ok();
                linked += usize::from(done && name == PLAN);
            }
        }
        if linked == 0 || !link_events(earlier, &dir) {
            let _ = fs::remove_dir_all(&dir);
            return Ok(None);
        }
        Record::start(cache, info, dir).map(Some)
    }

    fn start(cache: &Cache, info: Info, dir: PathBuf) -> Result<Record> {
        let events = File::create(dir.join(EVENTS)).context("cannot record events")?;
        // Says that the run goes on, for as long as this process does. Where a file system knows no
        // locks, that cannot be told, and is all that is missing.
        let _ = flock(&events, FlockOperation::LockExclusive);
        let presence = cache.presence(&dir.join(EVENTS))?;
        // Last, so that a directory with a run.json is complete.
        cache.write(&dir.join("run.json"), &serde_json::to_vec_pretty(&info)?)?;
        let (started, flushed) = (Instant::now(), Instant::now());
        let events = BufWriter::with_capacity(1 << 16, events);
        Ok(Record { info, dir, events, started, flushed, _presence: presence })
    }

    /// Stamps and keeps one event. A full disk must not end a run: the loss is told once, by the
    /// returned error.
    pub fn write(&mut self, event: &Event) -> std::io::Result<f64> {
        let t = self.started.elapsed().as_secs_f64();
        serde_json::to_writer(&mut self.events, &Line { t, e: event })?;
        self.events.write_all(b"\n")?;
        let chatty =
            matches!(event, Event::Reported { .. } | Event::Cached { .. } | Event::Durable { .. });
        if !chatty || self.flushed.elapsed().as_secs_f64() > 0.5 {
            self.events.flush()?;
            self.flushed = Instant::now();
        }
        Ok(t)
    }
}

/// Puts the events of the run in `earlier`, or of the one that it names itself, beside those of the
/// run in `dir`, which names that run; `false` if they are not there.
pub fn link_events(earlier: &Path, dir: &Path) -> bool {
    let link = |name: &str| fs::hard_link(earlier.join(name), dir.join(UNCHANGED)).is_ok();
    match earlier.join(UNCHANGED).exists() {
        true => link(UNCHANGED),
        false => link(EVENTS),
    }
}

/// What is known of a run as it begins, and its directory.
fn begin(cache: &Cache, pipeline: &str, asked: Asked, build: &str) -> Result<(Info, PathBuf)> {
    let now = now();
    let (id, dir) = new_dir(cache, now as u64)?;
    let info = Info {
        id,
        pipeline: pipeline.into(),
        file: asked.file,
        cwd: asked.cwd,
        args: asked.args,
        started_s: now,
        build: build.into(),
        pid: std::process::id(),
    };
    Ok((info, dir))
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A fresh directory named by time; a second run in the same second gets another suffix.
fn new_dir(cache: &Cache, seconds: u64) -> Result<(String, PathBuf)> {
    let runs = cache.runs_dir();
    for attempt in 0..1000u32 {
        let salt = blake3_short(&format!("{}-{attempt}", std::process::id()));
        let id = format!("{}-{salt}", timestamp(seconds));
        let dir = runs.join(&id);
        if cache.make_dir(&dir)? {
            return Ok((id, dir));
        }
    }
    anyhow::bail!("cannot find a free name for this run in {}", runs.display())
}

fn blake3_short(text: &str) -> String {
    cache::Digest::of(text.as_bytes()).to_string()[..4].to_string()
}

/// `20261123-170102` in UTC, by the civil-from-days algorithm (Howard Hinnant).
pub(crate) fn timestamp(seconds: u64) -> String {
    let days = (seconds / 86_400) as i64 + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}-{h:02}{m:02}{s:02}")
}

/// A recorded run, read back. A torn last line, of a run that was killed, is left out.
pub struct Past {
    /// What was asked.
    pub info: Info,
    /// Its plan.
    pub plan: Arc<Plan>,
    /// Everything that happened.
    pub events: Vec<Stamped>,
    /// Its directory.
    pub dir: PathBuf,
}

impl Past {
    /// Reads the run in `dir`.
    ///
    /// # Errors
    /// When there is no whole record.
    pub fn load(dir: &Path) -> Result<Past> {
        let plan = serde_json::from_slice(&read(dir, PLAN)?)?;
        Ok(Reading::begin(dir, Arc::new(plan))?.finish())
    }

    fn add(&mut self, stamped: Stamped) {
        match stamped.event {
            // As if they had been found one by one.
            Event::Unchanged { but, .. } => {
                let earlier = lines(&self.dir.join(UNCHANGED));
                let hits = earlier.filter_map(|e| hit_now(e.event, &but));
                self.events.extend(hits.map(|event| Stamped { t: stamped.t, event }));
            }
            _ => self.events.push(stamped),
        }
    }
}

/// A record that is read while its run goes on, so that little is left to be read at the end.
pub struct Reading {
    past: Past,
    /// The rest of the events.
    tail: Option<Tail>,
}

impl Reading {
    /// Reads what there is of the run of `plan` in `dir`.
    ///
    /// # Errors
    /// When there is no whole record.
    pub fn begin(dir: &Path, plan: Arc<Plan>) -> Result<Reading> {
        let info = serde_json::from_slice(&read(dir, "run.json")?)?;
        let past = Past { info, plan, events: Vec::new(), dir: dir.to_path_buf() };
        let mut reading = Reading { past, tail: Tail::open(&dir.join(EVENTS)).ok() };
        reading.follow();
        Ok(reading)
    }

    /// The run, with what came since.
    pub fn finish(mut self) -> Past {
        self.follow();
        let rest = self.tail.as_mut().map(Tail::rest).unwrap_or_default();
        if let Ok(stamped) = serde_json::from_slice(&rest) {
            self.past.add(stamped);
        }
        self.past
    }

    fn follow(&mut self) {
        let Some(tail) = &mut self.tail else { return };
        // What cannot be read ends it: it would fail for ever.
        while let Some(bytes) = tail.lines().ok().filter(|bytes| !bytes.is_empty()) {
            let lines = bytes.split(|byte| *byte == b'\n');
            for stamped in lines.filter_map(|line| serde_json::from_slice(line).ok()) {
                self.past.add(stamped);
            }
        }
    }
}

fn read(dir: &Path, name: &str) -> Result<Vec<u8>> {
    let path = dir.join(name);
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// What an event of an earlier run is to one that finds what that one found or made, of all steps
/// but some (sorted).
fn hit_now(event: Event, but: &[usize]) -> Option<Event> {
    match event {
        Event::Finished { step, .. } | Event::Cached { step, .. }
            if but.binary_search(&step).is_ok() =>
        {
            None
        }
        Event::Finished { step, key, seconds: saved_s, outputs } => {
            Some(Event::Cached { step, key, saved_s, outputs })
        }
        Event::Cached { .. } => Some(event),
        _ => None,
    }
}

/// The events in a file; none if there is no such file.
fn lines(path: &Path) -> impl Iterator<Item = Stamped> + use<> {
    let file = File::open(path).ok().map(BufReader::new);
    // A line that cannot be read ends it: it would fail for ever.
    let lines = file.into_iter().flat_map(|file| file.split(b'\n').map_while(Result::ok));
    lines.filter_map(|line| serde_json::from_slice(&line).ok())
}

/// Directories of all recorded runs, newest first.
pub fn all(cache: &Cache) -> Vec<PathBuf> {
    let Ok(items) = fs::read_dir(cache.runs_dir()) else { return Vec::new() };
    let mut dirs: Vec<PathBuf> = items.flatten().map(|item| item.path()).collect();
    dirs.retain(|dir| dir.join("run.json").exists());
    dirs.sort_unstable_by(|a, b| b.cmp(a));
    dirs
}

/// What was asked in the run of `dir`.
pub fn info(dir: &Path) -> Result<Info> {
    let path = dir.join("run.json");
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_is_read_while_it_grows_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let (plan, asked) = (Plan::default(), Asked::default());
        let mut record = Record::create(&cache, &plan, &[], asked, "test").unwrap();
        let note = |i: usize| Event::Note { text: i.to_string() };
        for i in 0..3 {
            record.write(&note(i)).unwrap();
        }
        let reading = Reading::begin(&record.dir, Arc::default()).unwrap();
        for i in 3..6 {
            record.write(&note(i)).unwrap();
        }
        let dir = record.dir.clone();
        drop(record);
        let texts = |past: Past| -> Vec<String> {
            let text = |e: Stamped| match e.event {
                Event::Note { text } => text,
                other => format!("{other:?}"),
            };
            past.events.into_iter().map(text).collect()
        };
        let read = texts(reading.finish());
        assert_eq!(read, ["0", "1", "2", "3", "4", "5"]);
        assert_eq!(texts(Past::load(&dir).unwrap()), read);
        // What a killed run left of a line is no event.
        let mut file = File::options().append(true).open(dir.join(EVENTS)).unwrap();
        file.write_all(b"{\"t\":0.1,\"e\":{\"kind\":\"no").unwrap();
        assert_eq!(texts(Past::load(&dir).unwrap()), read);
    }

    #[test]
    fn timestamps_are_civil() {
        assert_eq!(timestamp(0), "19700101-000000");
        assert_eq!(timestamp(951_782_400), "20000229-000000");
        assert_eq!(timestamp(1_795_453_262), "20261123-170102");
    }
}
