//! `pipe push` and `pipe pull`: results of steps to a remote cache and from it, now.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use cache::remote::{Found, Progress, Remote, Trouble, artifacts};
use cache::{Cache, Entry, Key, Publication};
use engine::executor::Options;
use engine::forecast::{self, Forecast};
use engine::spec::Loaded;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::SIGINT;

use super::{Wrong, remote};
use crate::cli::{OfSteps, Pull, Push};
use crate::out::{self, bytes};

pub fn push(args: Push) -> Result<ExitCode> {
    let (cache, loaded, steps) = selected(&args.of)?;
    let remote = remote::must_open(&args.of.remote)?;
    let entries = keys(&cache, &loaded, &steps)?.into_iter();
    let (there, absent): (Vec<_>, Vec<_>) = entries.partition(|(_, _, entry)| entry.is_some());
    for (name, ..) in &absent {
        out::message(format!("`{name}` has no result here: there is nothing to push"));
    }
    let mut failed = absent.len();
    let (mut done, mut sent) = (0, 0);
    for (name, _, entry) in there {
        let entry = entry.expect("partitioned");
        match with_progress(&format!("{name} →"), |progress, cancel| {
            remote.push(&cache, &entry, progress, cancel)
        }) {
            Ok(went) => {
                done += 1;
                sent += went.bytes;
            }
            Err(Trouble::Cancelled) => return Ok(ExitCode::from(130)),
            Err(trouble) => {
                failed += 1;
                out::message(format!("`{name}`: {trouble}"));
            }
        }
    }
    out::line(format!("{done} pushed ({}), {failed} failed", bytes(sent)));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub fn pull(args: Pull) -> Result<ExitCode> {
    let (cache, loaded, steps) = selected(&args.of)?;
    let remote = remote::must_open(&args.of.remote)?;
    let (mut done, mut failed, mut came) = (0, 0, 0);
    let mut waiting: Vec<usize> = steps;
    // A step's key is known once the results before it are here: so in rounds.
    while !waiting.is_empty() {
        let round = keys(&cache, &loaded, &waiting)?;
        let mut imported = 0;
        let mut left = Vec::new();
        for (at, (name, key, entry)) in waiting.iter().copied().zip(round) {
            let Some(key) = key else {
                left.push(at);
                continue;
            };
            match bring(&cache, &remote, &name, &key, entry) {
                Ok(Some(bytes)) => {
                    (done, came, imported) = (done + 1, came + bytes, imported + 1);
                }
                Ok(None) => {
                    failed += 1;
                    out::message(format!("`{name}` is not in the remote `{}`", remote.name()));
                }
                Err(Trouble::Cancelled) => return Ok(ExitCode::from(130)),
                Err(trouble) => {
                    failed += 1;
                    out::message(format!("`{name}`: {trouble}"));
                }
            }
        }
        if imported == 0 {
            for &at in &left {
                let name = &loaded.plan.steps[at].name;
                out::message(format!("`{name}` has no key yet: results before it are missing"));
            }
            failed += left.len();
            break;
        }
        waiting = left;
    }
    out::line(format!("{done} pulled ({}), {failed} failed", bytes(came)));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Brings entry and bytes of one key; `None` when the remote does not have it.
fn bring(
    cache: &Cache,
    remote: &Remote,
    name: &str,
    key: &Key,
    here: Option<Entry>,
) -> Result<Option<u64>, Trouble> {
    let (entry, new) = match here {
        Some(entry) => (entry, false),
        None => match remote.find(cache, key) {
            Found::Hit(entry) => (*entry, true),
            Found::Miss => return Ok(None),
            Found::Rejected(why) | Found::Unavailable(why) => return Err(Trouble::Settings(why)),
        },
    };
    let lacking: Vec<_> = artifacts(&entry).into_iter().filter(|o| !cache.present(o)).collect();
    let fetched = with_progress(&format!("{name} ←"), |progress, cancel| {
        remote.fetch(cache, &lacking, progress, cancel)
    })?;
    if new {
        let committer = cache.committer(|_| {});
        committer.publish(Publication::imported(entry))?;
        committer.flush()?;
    }
    Ok(Some(fetched.bytes))
}

/// Cache, pipeline and the steps that are meant: those named, else all.
fn selected(of: &OfSteps) -> Result<(Cache, Loaded, Vec<usize>)> {
    let cache = super::open_cache(of.settings.cache.as_deref())?;
    let loaded = super::load_for_step(of.file.as_deref(), &of.settings, &cache)?;
    let mut until = Vec::new();
    for name in &of.steps {
        until.extend(super::select(&loaded, name)?);
    }
    let steps = Options { until, ..Options::default() }.selection(&loaded.plan);
    if steps.is_empty() {
        bail!(Wrong("the pipeline has no steps".into()));
    }
    Ok((cache, loaded, steps))
}

type OfStep = (String, Option<Key>, Option<Entry>);

/// Name, key (once it is known) and result of each step.
fn keys(cache: &Cache, loaded: &Loaded, steps: &[usize]) -> Result<Vec<OfStep>> {
    let needed = Options { until: steps.to_vec(), ..Options::default() }.selection(&loaded.plan);
    let found = forecast::forecast(&loaded.plan, &needed, super::REGISTRY, cache, &super::hub())?;
    let of = |&step: &usize| {
        let name = loaded.plan.steps[step].name.clone();
        match found.get(&step) {
            Some(Forecast::Cached { entry }) => (name, Some(entry.key), Some((**entry).clone())),
            Some(Forecast::Runs { key, .. }) => (name, Some(*key), None),
            _ => (name, None, None),
        }
    };
    Ok(steps.iter().map(of).collect())
}

/// Shows how far a transfer is, and stops it at Ctrl-C.
fn with_progress<T>(
    what: &str,
    work: impl FnOnce(&Progress, &AtomicBool) -> Result<T, Trouble>,
) -> Result<T, Trouble> {
    let (progress, ended) = (Progress::new(), AtomicBool::new(false));
    let cancel = Arc::new(AtomicBool::new(false));
    let listening = signal_hook::flag::register(SIGINT, cancel.clone());
    let bar = ProgressBar::new(0).with_message(what.to_string());
    let style =
        ProgressStyle::with_template("{msg} {bytes} of {total_bytes} {wide_bar} {bytes_per_sec}");
    bar.set_style(style.expect("the template is right"));
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                bar.set_length(progress.total());
                bar.set_position(progress.done());
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let result = work(&progress, &cancel);
        ended.store(true, Ordering::Relaxed);
        result
    });
    bar.finish_and_clear();
    if let Ok(id) = listening {
        signal_hook::low_level::unregister(id);
    }
    result
}
