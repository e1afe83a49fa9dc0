//! `pipe log STEP`: what the newest attempt of a step printed; with `-f`, while it prints.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use cache::{Cache, Entry, Key};
use engine::event::Event;
use engine::executor::Options;
use engine::forecast::{self, Forecast};
use engine::history;
use engine::history::tail::Tail;
use engine::run::{EVENTS, Past};

use crate::cli::look::Log;
use crate::out;

/// How often a log and a run are looked at.
const EVERY: Duration = Duration::from_millis(150);

pub fn log(args: Log) -> Result<ExitCode> {
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    if args.follow {
        return follow(&cache, &args);
    }
    let (name, text) = match args.run.as_deref() {
        Some(run) => of_run(&cache, run, &args.step)?,
        None => of_newest(&cache, &args)?,
    };
    let Some(text) = text else {
        bail!(super::Wrong(format!(
            "`{name}` has no log: no attempt of it is recorded here\nhint: it did not run yet, or its records \
             were collected"
        )));
    };
    let text = String::from_utf8_lossy(&text);
    if args.json {
        out::line(serde_json::json!({ "step": name, "log": text }).to_string());
    } else if !text.is_empty() {
        out::line(out::clean(text.trim_end_matches('\n')));
    }
    Ok(ExitCode::SUCCESS)
}

/// The log of a step as it is planned now.
fn of_newest(cache: &Cache, args: &Log) -> Result<(String, Option<Vec<u8>>)> {
    let loaded = super::load_for_step(args.file.as_deref(), &args.settings, cache)?;
    let at = super::one_step(&loaded, &args.step)?;
    let steps = Options { only: Some(at), ..Options::default() }.selection(&loaded.plan);
    let found = forecast::forecast(&loaded.plan, &steps, super::REGISTRY, cache, &super::hub())?;
    let name = loaded.plan.steps[at].name.clone();
    let text = match &found[&at] {
        Forecast::Cached { entry } => stored(cache, entry)?,
        _ => match super::newest_run(cache)? {
            Some(dir) => attempt(cache, &Past::load(&dir)?, &name),
            None => None,
        },
    };
    Ok((name, text))
}

/// The log of a step in a recorded run.
fn of_run(cache: &Cache, run: &str, step: &str) -> Result<(String, Option<Vec<u8>>)> {
    let past = Past::load(&super::run_dir(cache, Some(run))?)?;
    let at = one_of(&past, step)?;
    let key = |event: &Event| match event {
        Event::Cached { step, key, .. } | Event::Finished { step, key, .. } if *step == at => {
            Some(*key)
        }
        _ => None,
    };
    let name = past.plan.steps[at].name.clone();
    let text = match past.events.iter().rev().find_map(|stamped| key(&stamped.event)) {
        Some(key) => by_key(cache, &key)?,
        None => attempt(cache, &past, &name),
    };
    Ok((name, text))
}

fn one_of(past: &Past, step: &str) -> Result<usize> {
    match &past.plan.select(step).map_err(super::Wrong)?[..] {
        [one] => Ok(*one),
        many => bail!(super::Wrong(format!(
            "`{step}` means {} steps\nhint: name one of them: `{}`",
            many.len(),
            past.plan.steps[many[0]].name
        ))),
    }
}

fn by_key(cache: &Cache, key: &Key) -> Result<Option<Vec<u8>>> {
    cache.lookup(key)?.map_or(Ok(None), |entry| stored(cache, &entry))
}

/// The log that is kept with a result.
fn stored(cache: &Cache, entry: &Entry) -> Result<Option<Vec<u8>>> {
    match entry.log {
        Some((digest, _)) => match cache.read(&digest) {
            Err(cache::Error::Missing { .. }) => bail!(super::Wrong(
                "the log was evicted with the step's artifacts\nhint: `pipe run --from` and the step's name makes them again".into()
            )),
            text => Ok(Some(text?)),
        },
        None => Ok(Some(Vec::new())),
    }
}

/// The log of the newest attempt of `name` in a run that did not finish it.
fn attempt(cache: &Cache, past: &Past, name: &str) -> Option<Vec<u8>> {
    let of = |event: &Event| match event {
        Event::Launched { step, dir, .. } if past.plan.steps[*step].name == name => {
            Some(dir.clone())
        }
        _ => None,
    };
    let newest = past.events.iter().rev().find_map(|stamped| of(&stamped.event));
    newest.and_then(|dir| std::fs::read(path(cache, &dir)).ok())
}

fn path(cache: &Cache, attempt: &str) -> PathBuf {
    cache.root().join(attempt).join(engine::worker::LOG)
}

/// Prints what a step prints until it ends, or its run does.
fn follow(cache: &Cache, args: &Log) -> Result<ExitCode> {
    let dir = super::run_dir(cache, args.run.as_deref())?;
    let past = Past::load(&dir)?;
    let at = one_of(&past, &args.step)?;
    let name = &past.plan.steps[at].name;
    let mut events = Tail::open(&dir.join(EVENTS))?;
    let mut log = Following::default();
    loop {
        // Before the events: what a run writes at its end is there when it is found to be gone.
        let alive = history::alive(&dir);
        let mut ended = !alive;
        for stamped in events.events()? {
            match &stamped.event {
                Event::Launched { step, dir, .. } if *step == at => log.begin(&path(cache, dir)),
                Event::Finished { step, key, .. } | Event::Cached { step, key, .. }
                    if *step == at =>
                {
                    log.end(by_key(cache, key)?);
                    return Ok(ExitCode::SUCCESS);
                }
                Event::Failed { step, retry, message, .. } if *step == at => {
                    log.more();
                    out::message(format!("note    `{name}` failed: {}", out::clean(message)));
                    if !retry {
                        return Ok(ExitCode::FAILURE);
                    }
                }
                Event::Skipped { step, .. } if *step == at => ended = true,
                Event::Ended { .. } => ended = true,
                _ => {}
            }
        }
        log.more();
        if ended {
            let how = if alive { "was not run" } else { "was interrupted, or not begun" };
            out::message(format!("note    the run ended; `{name}` {how}"));
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(EVERY);
    }
}

/// A log being printed.
#[derive(Default)]
struct Following {
    tail: Option<Tail>,
    printed: usize,
}

impl Following {
    /// Turns to another attempt; one whose log is not there any more is told by its result.
    fn begin(&mut self, path: &Path) {
        self.more();
        *self = Following { tail: Tail::open(path).ok(), printed: 0 };
    }

    fn more(&mut self) {
        let lines = self.tail.as_mut().and_then(|tail| tail.lines().ok()).unwrap_or_default();
        self.printed += lines.len();
        out::piece(&String::from_utf8_lossy(&lines));
    }

    /// Prints what is left of the whole log, as it is kept with the result.
    fn end(&mut self, whole: Option<Vec<u8>>) {
        self.more();
        match whole {
            Some(whole) => {
                let rest = whole.get(self.printed..).unwrap_or_default();
                out::piece(&String::from_utf8_lossy(rest));
                if rest.last().is_some_and(|last| *last != b'\n') {
                    out::piece("\n");
                }
            }
            None => out::piece(&String::from_utf8_lossy(
                &self.tail.as_mut().map(Tail::rest).unwrap_or_default(),
            )),
        }
    }
}
