//! `pipe top`: all pipelines of the user that run now, with what their processes take.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use cache::Cache;
use engine::history::now::Stand;
use engine::history::{self, Brief, State};
use engine::run::Past;
use serde_json::{Value, json};

use super::status::{at_work, now_of, to_json};
use crate::cli::look::Top;
use crate::out::{self, bytes, clean, duration};
use crate::processes::{self, Usage};
use crate::table::{Cell, Format, Table};

/// Between two looks; processor time is what was used between them.
const EVERY: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_millis(300);
/// Home, and clear to the end of the screen.
const CLEAR: &str = "\x1b[H\x1b[J";

pub fn top(args: Top) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let live = std::io::stdout().is_terminal() && !args.once && !args.json;
    let mut before = processes::all();
    std::thread::sleep(SHORT);
    let mut since = SHORT;
    loop {
        let after = processes::all();
        let running = running(&cache);
        let used = |run: &Running| processes::below(run.brief.info.pid, &before, &after, since);
        if args.json {
            let all: Vec<Value> = running.iter().map(|run| run.to_json(used(run))).collect();
            out::line(serde_json::to_string_pretty(&all)?);
            return Ok(ExitCode::SUCCESS);
        }
        if live {
            out::raw(CLEAR);
        }
        match running.is_empty() {
            true => out::line("no pipeline is running"),
            false => table(&running, &used).print(Format::Text),
        }
        if !live {
            return Ok(ExitCode::SUCCESS);
        }
        before = after;
        since = EVERY;
        std::thread::sleep(EVERY);
    }
}

struct Running {
    brief: Brief,
    past: Past,
}

/// Runs whose process is at work, the newest first.
fn running(cache: &Cache) -> Vec<Running> {
    let brief = |(info, dir)| history::brief(info, dir).ok();
    let briefs = history::all(cache).into_iter().filter(|(_, dir)| history::alive(dir));
    let running = briefs.filter_map(brief).filter(|brief| brief.state == State::Running);
    running
        .filter_map(|brief| Some(Running { past: Past::load(&brief.dir).ok()?, brief }))
        .collect()
}

impl Running {
    fn to_json(&self, usage: Usage) -> Value {
        let mut object = to_json(&self.brief, &self.past.plan, &now_of(&self.past));
        object["cpus"] = json!(usage.cpus);
        object["memory_bytes"] = json!(usage.memory);
        object["processes"] = json!(usage.processes);
        object
    }
}

fn table(running: &[Running], used: &dyn Fn(&Running) -> Usage) -> Table {
    let columns =
        ["process", "pipeline", "time", "steps", "cpus", "memory", "at work", "directory"];
    let row = |run: &Running| {
        let now = now_of(&run.past);
        let [cached, ran, ..] = now.counts();
        let usage = used(run);
        let work =
            run.past.plan.steps.iter().zip(&now.steps).filter_map(|(step, stand)| match stand {
                Stand::Running(running) => {
                    Some(format!("{} {}", clean(&step.name), at_work(running, run.brief.seconds)))
                }
                _ => None,
            });
        let work: Vec<String> = work.collect();
        let more =
            if work.len() > 2 { format!(" and {} more", work.len() - 2) } else { String::new() };
        vec![
            Cell::Number(f64::from(run.brief.info.pid)),
            Cell::Text(run.brief.info.pipeline.clone()),
            Cell::Shown(run.brief.seconds, duration(run.brief.seconds)),
            Cell::Text(format!("{}/{}", cached + ran, now.asked)),
            Cell::Shown(usage.cpus, format!("{:.1}", usage.cpus)),
            Cell::Shown(usage.memory as f64, bytes(usage.memory)),
            Cell::Text(work.iter().take(2).cloned().collect::<Vec<_>>().join("; ") + &more),
            Cell::Text(run.brief.info.cwd.display().to_string()),
        ]
    };
    Table { columns: columns.map(String::from).into(), rows: running.iter().map(row).collect() }
}
