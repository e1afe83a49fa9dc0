//! Which results recorded runs keep from garbage collection, which records may go themselves, and
//! what results have saved. Reads records and removes nothing.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cache::gc::KeptRun;
use cache::{Cache, Key};
use serde::Deserialize;

use crate::run::{EVENTS, Info, UNCHANGED};

/// What the records of runs say.
#[derive(Debug, Default)]
pub struct Runs {
    /// The newest runs of each pipeline.
    pub kept: Vec<KeptRun>,
    /// Directories of all other records.
    pub others: Vec<PathBuf>,
}

/// The newest `keep` runs of each pipeline file are roots, whatever became of them. A record that
/// cannot be understood is left alone.
///
/// # Errors
/// When records cannot be listed or read: then it is not known what is to stay.
pub fn of_runs(cache: &Cache, keep: usize) -> Result<Runs> {
    let mut by_pipeline: HashMap<(PathBuf, String), Vec<(f64, PathBuf)>> = HashMap::new();
    for dir in records(cache)? {
        let Some(info) = info(&dir)? else { continue };
        let pipeline = (info.file, info.pipeline);
        by_pipeline.entry(pipeline).or_default().push((info.started_s, dir));
    }
    let mut runs = Runs::default();
    for mut dirs in by_pipeline.into_values() {
        dirs.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| b.1.cmp(&a.1)));
        let others = dirs.split_off(keep.min(dirs.len()));
        runs.others.extend(others.into_iter().map(|(_, dir)| dir));
        for (_, dir) in dirs {
            let keys: BTreeSet<Key> =
                facts(&dir)?.into_iter().filter_map(|fact| fact.key).collect();
            let id = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            runs.kept.push(KeptRun { id, keys: keys.into_iter().collect() });
        }
    }
    runs.kept.sort_by(|a, b| b.id.cmp(&a.id));
    runs.others.sort();
    Ok(runs)
}

/// How often each result was a hit in the recorded runs, and the seconds that saved in all.
///
/// # Errors
/// When records cannot be listed or read.
pub fn saved(cache: &Cache) -> Result<HashMap<Key, (usize, f64)>> {
    let mut saved: HashMap<Key, (usize, f64)> = HashMap::new();
    for dir in records(cache)? {
        for fact in facts(&dir)? {
            if let (Some(key), Some(seconds)) = (fact.key, fact.saved_s) {
                let one = saved.entry(key).or_default();
                *one = (one.0 + 1, one.1 + seconds);
            }
        }
    }
    Ok(saved)
}

fn records(cache: &Cache) -> Result<Vec<PathBuf>> {
    let dir = cache.runs_dir();
    let items = fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
    items.map(|item| Ok(item?.path())).collect()
}

/// What was asked; `None` where that is not to be read, as while a run begins.
fn info(dir: &Path) -> Result<Option<Info>> {
    match read(&dir.join("run.json"))? {
        Some(file) => Ok(serde_json::from_reader(BufReader::new(file)).ok()),
        None => Ok(None),
    }
}

/// What matters here of a line of events.
#[derive(Deserialize)]
struct Line {
    e: Fact,
}

#[derive(Deserialize)]
struct Fact {
    step: Option<usize>,
    key: Option<Key>,
    saved_s: Option<f64>,
    /// Steps that are not as in the run whose events lie beside.
    #[serde(default)]
    but: Vec<usize>,
}

/// Events with a key, and those of the run that this one repeats, as far as it does; a torn last line
/// is none.
fn facts(dir: &Path) -> Result<Vec<Fact>> {
    let (mut facts, mut earlier) = (Vec::new(), Vec::new());
    facts_of(&dir.join(EVENTS), &mut facts)?;
    facts_of(&dir.join(UNCHANGED), &mut earlier)?;
    let but: BTreeSet<usize> = facts.iter().flat_map(|fact| &fact.but).copied().collect();
    let same = |fact: &Fact| fact.step.is_none_or(|step| !but.contains(&step));
    facts.extend(earlier.into_iter().filter(same));
    Ok(facts)
}

fn facts_of(path: &Path, facts: &mut Vec<Fact>) -> Result<()> {
    let Some(file) = read(path)? else { return Ok(()) };
    for line in BufReader::new(file).split(b'\n') {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        // Most lines are progress: they are not parsed.
        if line.windows(6).any(|part| part == b"\"key\":" || part == b"\"but\":") {
            facts.extend(serde_json::from_slice::<Line>(&line).ok().map(|line| line.e));
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => Ok(None),
        result => Ok(Some(result.with_context(|| format!("cannot open {}", path.display()))?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(cache: &Cache, id: &str, file: &str, started_s: f64, events: &str) {
        let dir = cache.runs_dir().join(id);
        fs::create_dir(&dir).unwrap();
        let info = serde_json::json!({ "id": id, "pipeline": "p", "file": file, "cwd": "/",
            "args": [], "started_s": started_s, "build": "b" });
        fs::write(dir.join("run.json"), info.to_string()).unwrap();
        fs::write(dir.join("events.jsonl"), events).unwrap();
    }

    fn cached(key: &Key) -> String {
        format!(
            r#"{{"t":0.1,"e":{{"kind":"cached","step":0,"key":"{key}","saved_s":2.5,"outputs":[]}}}}"#
        )
    }

    #[test]
    fn what_is_not_as_in_the_earlier_run_keeps_its_own_key() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let keys: Vec<Key> = (0..3u8).map(|i| Key::of(&[i])).collect();
        let step =
            |n: usize, key: &Key| cached(key).replace("\"step\":0", &format!("\"step\":{n}"));
        let unchanged = r#"{"t":0.1,"e":{"kind":"unchanged","run":"0","but":[1]}}"#;
        record(&cache, "1", "/a", 1.0, &format!("{unchanged}\n{}", step(1, &keys[2])));
        let earlier = format!("{}\n{}", step(0, &keys[0]), step(1, &keys[1]));
        fs::write(cache.runs_dir().join("1").join(UNCHANGED), earlier).unwrap();
        let mut wanted = vec![keys[0], keys[2]];
        wanted.sort();
        assert_eq!(of_runs(&cache, 1).unwrap().kept[0].keys, wanted);
    }

    #[test]
    fn the_newest_of_each_pipeline_keep_their_keys() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let keys: Vec<Key> = (0..4u8).map(|i| Key::of(&[i])).collect();
        record(&cache, "3", "/a", 1.0, &cached(&keys[0]));
        record(&cache, "2", "/a", 2.0, &cached(&keys[1]));
        let torn = format!("{}\n{}", cached(&keys[2]), &cached(&keys[3])[..60]);
        record(&cache, "1", "/a", 3.0, &torn);
        record(&cache, "0", "/b", 0.0, &cached(&keys[0]));
        fs::create_dir(cache.runs_dir().join("begins")).unwrap();
        fs::write(cache.runs_dir().join("a file"), "").unwrap();
        let runs = of_runs(&cache, 1).unwrap();
        let kept: Vec<_> = runs.kept.iter().map(|run| (&run.id[..], &run.keys[..])).collect();
        assert_eq!(kept, [("1", &keys[2..3]), ("0", &keys[..1])]);
        assert_eq!(runs.others, ["2", "3"].map(|id| cache.runs_dir().join(id)));
        assert_eq!(of_runs(&cache, 9).unwrap().others, [""; 0].map(PathBuf::from));
        assert_eq!(of_runs(&cache, 0).unwrap().kept.len(), 0);
        assert_eq!(saved(&cache).unwrap()[&keys[0]], (2, 5.0));
        assert_eq!(saved(&cache).unwrap().get(&keys[3]), None);
    }
}
