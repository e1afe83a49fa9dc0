//! `pipe status`: how far a run has come, from its record, also from another terminal.

use std::process::ExitCode;

use anyhow::Result;
use engine::history::now::{Now, Running, Stand};
use engine::history::{self, Brief, State};
use engine::plan::Plan;
use engine::run::{self, Past};
use serde_json::{Value, json};

use crate::cli::look::Status;
use crate::out::{self, Paint, clean, duration};
use crate::table::short;

/// More failed or running steps are only counted.
const MOST_TOLD: usize = 20;

pub fn status(args: Status) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let dir = super::run_dir(&cache, args.run.as_deref())?;
    let brief = history::brief(run::info(&dir)?, dir.clone())?;
    let past = Past::load(&dir)?;
    let now = now_of(&past);
    if args.json {
        out::line(serde_json::to_string_pretty(&to_json(&brief, &past.plan, &now))?);
    } else {
        tell(&brief, &past.plan, &now);
    }
    Ok(ExitCode::SUCCESS)
}

/// How far a run has come by its events.
pub fn now_of(past: &Past) -> Now {
    let mut now = Now::new(past.plan.steps.len());
    past.events.iter().for_each(|stamped| now.take(stamped));
    now
}

fn tell(brief: &Brief, plan: &Plan, now: &Now) {
    let paint = Paint::stdout();
    let state = match brief.state {
        State::Done => paint.green("done"),
        State::Failed => paint.bold_red("failed"),
        State::Interrupted => paint.yellow("interrupted"),
        State::Running => paint.bold("running"),
    };
    let pid = match (brief.state, brief.info.pid) {
        (State::Running, pid @ 1..) => format!(" (process {pid})"),
        _ => String::new(),
    };
    let time = duration(brief.seconds);
    out::line(format!(
        "{} of `{}` {state} {} {time}{pid}",
        clean(&brief.info.id),
        clean(&brief.info.pipeline),
        if brief.state == State::Running { "for" } else { "after" },
    ));
    out::line(format!("  {}", counts(now, brief.state == State::Running)));
    let told = plan.steps.iter().zip(&now.steps).filter_map(|(step, stand)| {
        let (word, text) = match stand {
            Stand::Running(running) if brief.state == State::Running => match &running.queued {
                Some((job, reason)) => (paint.yellow("queued "), in_queue(job, reason)),
                None => (paint.bold("running"), at_work(running, brief.seconds)),
            },
            Stand::Running(running) => (paint.yellow("stopped"), at_work(running, now.t)),
            Stand::Waiting { holder } if brief.state == State::Running => {
                (paint.yellow("waiting"), format!("for {}", clean(holder)))
            }
            Stand::Failed { message } => {
                (paint.bold_red("failed "), clean(message.lines().next().unwrap_or_default()))
            }
            _ => return None,
        };
        Some(format!("{word} {}  {text}", clean(&step.name)))
    });
    let told: Vec<String> = told.collect();
    told.iter().take(MOST_TOLD).for_each(out::line);
    if told.len() > MOST_TOLD {
        out::line(format!("… and {} more", told.len() - MOST_TOLD));
    }
    if brief.state == State::Interrupted {
        out::line("run again to go on");
    }
}

/// `4 cached, 3 ran, 1 running, 7 to go`.
fn counts(now: &Now, goes_on: bool) -> String {
    let [cached, ran, failed, running, left] = now.counts();
    let parts = [
        (cached, "cached", true),
        (ran, "ran", true),
        (failed, "failed", false),
        (running, if goes_on { "running" } else { "stopped" }, goes_on),
        (left, if goes_on { "to go" } else { "not run" }, goes_on),
    ];
    let parts = parts.iter().filter(|(n, _, always)| *n > 0 || *always);
    parts.map(|(n, what, _)| format!("{n} {what}")).collect::<Vec<_>>().join(", ")
}

/// `job 12_3: Resources`
fn in_queue(job: &str, reason: &str) -> String {
    match job {
        "" => clean(reason),
        job => format!("job {}: {}", clean(job), clean(reason)),
    }
}

/// `41 %, 52000 tokens/s, loss 1.234, 12 s left`.
pub fn at_work(running: &Running, seconds: f64) -> String {
    let mut parts = Vec::new();
    if let Some((host, job)) = &running.at {
        parts.push(format!("on {} (job {})", clean(host), clean(job)));
    }
    if running.total > 0 {
        parts.push(format!("{:.0} %", 100.0 * running.done as f64 / running.total as f64));
    }
    if let Some(rate) = running.rate() {
        parts.push(format!("{} {}/s", short(rate.round()), clean(&running.unit)));
    }
    let metrics = running.metrics.iter().take(3);
    parts.extend(metrics.map(|(name, value)| format!("{} {}", clean(name), short(*value))));
    match running.left() {
        Some(left) => {
            parts.push(format!("{} left", duration((left - (seconds - running.last)).max(0.0))))
        }
        None => parts.push(format!("for {}", duration((seconds - running.since).max(0.0)))),
    }
    parts.join(", ")
}

/// Of one run, also for `pipe top`.
pub fn to_json(brief: &Brief, plan: &Plan, now: &Now) -> Value {
    let [cached, ran, failed, running, left] = now.counts();
    let step = |(step, stand): (&engine::plan::Step, &Stand)| {
        let mut object = json!({ "step": step.name });
        let state = match stand {
            Stand::Pending => "pending",
            Stand::Waiting { holder } => {
                object["holder"] = json!(holder);
                "waiting"
            }
            Stand::Running(running) => {
                object["done"] = json!(running.done);
                object["total"] = json!(running.total);
                object["unit"] = json!(running.unit);
                object["rate"] = json!(running.rate());
                object["left_s"] = json!(running.left());
                object["metrics"] = json!(running.metrics);
                if let Some((job, reason)) = &running.queued {
                    object["queued"] = json!({ "job": job, "reason": reason });
                }
                if let Some((host, job)) = &running.at {
                    object["at"] = json!({ "host": host, "job": job });
                }
                if brief.state == State::Running { "running" } else { "interrupted" }
            }
            Stand::Cached => "cached",
            Stand::Ran { seconds } => {
                object["seconds"] = json!(seconds);
                "ran"
            }
            Stand::Failed { message } => {
                object["message"] = json!(message);
                "failed"
            }
            Stand::Skipped => "skipped",
        };
        object["state"] = json!(state);
        object
    };
    json!({
        "run": brief.info.id,
        "pipeline": brief.info.pipeline,
        "directory": brief.info.cwd,
        "pid": brief.info.pid,
        "state": brief.state.word(),
        "seconds": brief.seconds,
        "cached": cached,
        "ran": ran,
        "failed": failed,
        "running": running,
        "left": left,
        "steps": plan.steps.iter().zip(&now.steps).map(step).collect::<Vec<_>>(),
    })
}
