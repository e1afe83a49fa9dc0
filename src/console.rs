//! Events → terminal: a live line a running step where there is one, plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use engine::event::{Event, Failure, Job, Shared, Stamped, Summary};
use engine::plan::Plan;
use engine::stage::Report;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::out::{self, Paint, clean, duration};

/// Plain lines tell progress this often.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Shows a run.
pub struct Console {
    names: Vec<String>,
    quiet: bool,
    json: bool,
    live: Option<MultiProgress>,
    running: HashMap<usize, Step>,
    paint: Paint,
}

struct Step {
    bar: Option<ProgressBar>,
    started: Instant,
    told: Instant,
    first: Option<(Instant, u64)>,
    done: u64,
    total: u64,
    unit: String,
    metrics: String,
}

impl Console {
    /// A console for `plan`; live if standard error is a terminal.
    pub fn new(plan: &Plan, quiet: bool, json: bool) -> Console {
        let live = std::io::stderr().is_terminal() && !quiet && !json;
        Console {
            names: plan.steps.iter().map(|step| clean(&step.name)).collect(),
            quiet,
            json,
            live: live
                .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10))),
            running: HashMap::new(),
            paint: Paint::stderr(),
        }
    }

    /// Shows one event.
    pub fn show(&mut self, stamped: &Stamped) {
        if self.json {
            out::line(serde_json::to_string(stamped).unwrap_or_default());
            return;
        }
        match &stamped.event {
            Event::Launched { step, resumed, .. } => self.launched(*step, *resumed),
            Event::Reported { step, report } => self.reported(*step, report),
            Event::Finished { step, seconds, .. } => {
                self.ended(*step);
                let took = self.paint.dim(&duration(*seconds));
                self.say(&format!("{} {} {took}", self.paint.green("done   "), self.names[*step]));
            }
            Event::Failed { step, failure, message, log, retry, .. } => {
                self.ended(*step);
                self.failed(*step, *failure, message, log, *retry);
            }
            Event::Waiting { step, holder } => {
                let text = format!("{} waits for {}", self.names[*step], clean(holder));
                self.say(&format!("{} {text}", self.paint.yellow("waiting")));
            }
            Event::Note { text } => self.note(text),
            Event::Job { step, said } => self.of_job(*step, said),
            Event::Started { .. }
            | Event::Cached { .. }
            | Event::Skipped { .. }
            | Event::Durable { .. }
            | Event::Ended { .. } => {}
        }
    }

    /// The last line of a run.
    pub fn last_line(&mut self, summary: &Summary) {
        if self.json {
            return;
        }
        if let Some(live) = self.live.take() {
            let _ = live.clear();
        }
        let counts = [
            (summary.cached, "cached"),
            (summary.ran, "ran"),
            (summary.failed, "failed"),
            (summary.skipped, "skipped"),
        ];
        let told = |(n, what): &(usize, &str)| match (*what, *n) {
            ("failed" | "skipped", 0) => None,
            _ => Some(format!("{n} {what}")),
        };
        let counts: Vec<String> = counts.iter().filter_map(told).collect();
        let mut line = format!("{} in {}", counts.join(", "), duration(summary.seconds));
        if summary.saved_s >= 1.0 {
            line += &format!(" (the cache saved {})", duration(summary.saved_s));
        }
        if summary.interrupted {
            line = format!("interrupted: {line}; run again to go on");
        }
        if let Some(shared) = &summary.shared {
            out::line(sharing(shared));
        }
        if let Some(used) = &summary.used {
            let (cpu, gpu) = (used.cpu_hours, used.gpu_hours);
            out::line(format!(
                "cluster: {} jobs' work, {cpu:.2} cpu-hours, {gpu:.2} GPU-hours",
                used.jobs
            ));
        }
        out::line(line);
    }

    /// Tells the user something.
    pub fn note(&mut self, text: &str) {
        self.say(&format!("{} {}", self.paint.yellow("note   "), clean(text)));
    }

    fn say(&mut self, line: &str) {
        match &self.live {
            _ if self.quiet || self.json => {}
            Some(live) => drop(live.println(line)),
            None => out::message(line),
        }
    }

    fn launched(&mut self, step: usize, resumed: Option<u64>) {
        let name = &self.names[step];
        let bar = self.live.as_ref().map(|live| {
            let style = ProgressStyle::with_template("{spinner:.dim} {prefix} {bar:18.dim} {msg}");
            let bar = live.add(ProgressBar::new(0));
            bar.set_style(
                style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━ "),
            );
            bar.set_prefix(name.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() || resumed.is_some() {
            let from = resumed.map_or(String::new(), |at| format!(" from its checkpoint at {at}"));
            self.say(&format!("{} {name}{from}", self.paint.dim("running")));
        }
        let now = Instant::now();
        let step_now = Step {
            bar,
            started: now,
            told: now,
            first: None,
            done: 0,
            total: 0,
            unit: String::new(),
            metrics: String::new(),
        };
        self.running.insert(step, step_now);
    }

    fn reported(&mut self, step: usize, report: &Report) {
        if let Report::Note { text } = report {
            let text = format!("{}: {text}", self.names[step]);
            return self.note(&text);
        }
        let Some(running) = self.running.get_mut(&step) else { return };
        match report {
            Report::Progress { done, total, unit } => {
                running.first.get_or_insert((Instant::now(), *done));
                (running.done, running.total, running.unit) = (*done, *total, clean(unit));
            }
            Report::Metric { values, .. } => {
                let shown =
                    values.iter().take(3).map(|(name, v)| format!("{} {v:.4}", clean(name)));
                running.metrics = shown.collect::<Vec<_>>().join(", ");
            }
            Report::Note { .. } => {}
        }
        let text = running.text();
        if let Some(bar) = &running.bar {
            bar.set_length(running.total);
            bar.set_position(running.done);
            bar.set_message(text);
        } else if running.told.elapsed() > PLAIN_EVERY {
            running.told = Instant::now();
            let line = format!("{} {} {text}", self.paint.dim("running"), self.names[step]);
            self.say(&line);
        }
    }

    /// Where a step's job stands. Without a terminal only that none could be had is worth a line.
    fn of_job(&mut self, step: usize, said: &Job) {
        let text = match said {
            Job::Queued { job, reason } if job.is_empty() => format!("waits: {}", clean(reason)),
            Job::Queued { job, reason } => format!("job {}: {}", clean(job), clean(reason)),
            Job::Began { job, host } => format!("job {} on {}", clean(job), clean(host)),
            Job::Ended { .. } | Job::Idle { .. } => return,
        };
        let began = matches!(said, Job::Began { .. });
        // Words of Slurm's for what will not pass by itself.
        let lasting = ["Config", "Constraints", "Held", "NotAvail", "Invalid", "Denied"];
        let refused = match said {
            Job::Queued { job, reason } => {
                job.is_empty() || lasting.iter().any(|word| reason.contains(word))
            }
            _ => false,
        };
        let Some(running) = self.running.get_mut(&step) else { return };
        if began {
            running.started = Instant::now();
        }
        match &running.bar {
            Some(bar) => bar.set_message(text),
            None if !refused => {}
            None => {
                let line = format!("{} {} {text}", self.paint.dim("queued "), self.names[step]);
                self.say(&line);
            }
        }
    }

    fn ended(&mut self, step: usize) {
        if let Some(Step { bar: Some(bar), .. }) = self.running.remove(&step) {
            bar.finish_and_clear();
        }
    }

    /// A failure is told even when quiet.
    fn failed(&mut self, step: usize, failure: Failure, message: &str, log: &str, retry: bool) {
        if failure == Failure::Cancelled {
            let line = format!("{} {}", self.paint.yellow("stopped"), self.names[step]);
            return self.say(&line);
        }
        let what = if retry { "failed, trying again" } else { "failed" };
        let mut text =
            format!("{} {}: {}", self.paint.bold_red(what), self.names[step], clean(message));
        for line in log.lines() {
            text += &format!("\n  {} {}", self.paint.dim("│"), clean(line));
        }
        if !retry && !log.is_empty() {
            text += &format!("\n  hint: the whole log: `pipe log {}`", self.names[step]);
        }
        match &self.live {
            Some(live) => drop(live.println(text)),
            None => out::message(text),
        }
    }
}

impl Step {
    /// `41 % 52k tokens/s, loss 1.234, 12 s left`.
    fn text(&self) -> String {
        let mut parts = Vec::new();
        if self.total > 0 {
            parts.push(format!("{:.0} %", 100.0 * self.done as f64 / self.total as f64));
        }
        if let Some((since, at)) = self.first {
            let seconds = since.elapsed().as_secs_f64();
            let rate = (self.done - at.min(self.done)) as f64 / seconds.max(1e-3);
            if rate > 0.0 && seconds > 0.3 {
                parts.push(format!("{} {}/s", short(rate), self.unit));
                if self.total > self.done {
                    let left = (self.total - self.done) as f64 / rate;
                    parts.push(format!("{} left", duration(left)));
                }
            }
        }
        if !self.metrics.is_empty() {
            parts.push(self.metrics.clone());
        }
        if parts.is_empty() {
            parts.push(duration(self.started.elapsed().as_secs_f64()));
        }
        parts.join(", ")
    }
}

fn short(rate: f64) -> String {
    match rate {
        1e6.. => format!("{:.1}M", rate / 1e6),
        1e4.. => format!("{:.0}k", rate / 1e3),
        1e3.. => format!("{:.1}k", rate / 1e3),
        _ => format!("{rate:.0}"),
    }
}

/// What the remote was good for.
fn sharing(shared: &Shared) -> String {
    let mut line = format!(
        "remote {}: {} hits, {} misses, {} uploaded, {} failed",
        shared.remote, shared.hits, shared.misses, shared.uploads_done, shared.uploads_failed
    );
    if shared.unanswered > 0 {
        line += &format!(", {} without an answer", shared.unanswered);
    }
    if shared.fetched_bytes + shared.sent_bytes > 0 {
        let (came, went) = (out::bytes(shared.fetched_bytes), out::bytes(shared.sent_bytes));
        line += &format!(" ({came} came, {went} went)");
    }
    if shared.uploads_failed > 0 {
        line += "; `pipe push` sends them again";
    }
    line
}
