//! Events → terminal: a board where there is one, plain lines elsewhere.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::event::{Event, Failure, Job, Shared, Stamped, Summary};
use engine::gpu::Gpu;
use engine::history::now::{Now, Stand};
use engine::plan::{Plan, Step};
use engine::stage::Report;

use crate::board::Board;
use crate::commands::at_work;
use crate::out::{self, Paint, clean, duration};
use crate::screen::Screen;
use crate::usage::Look;

/// Plain lines tell progress this often.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Shows a run.
pub struct Console<'p> {
    steps: &'p [Step],
    quiet: bool,
    json: bool,
    live: Option<(Screen, Arc<Mutex<Board>>)>,
    /// Without a board.
    now: Now,
    /// When progress of a step was last told in a plain line.
    told: HashMap<usize, Instant>,
    paint: Paint,
}

impl<'p> Console<'p> {
    /// A console for `plan`; live if standard error is a terminal. `expected` is what each step took
    /// before, as far as that is known: asked only if it is live.
    pub fn new(
        plan: &'p Plan,
        (quiet, json): (bool, bool),
        expected: impl FnOnce() -> Vec<Option<f64>>,
        gpus: &[Gpu],
    ) -> Console<'p> {
        let wanted = Screen::possible() && !quiet && !json;
        let live = wanted.then(|| live(Board::new(plan, expected()), Look::new(gpus)));
        Console {
            steps: &plan.steps,
            quiet,
            json,
            now: Now::new(if live.is_some() { 0 } else { plan.steps.len() }),
            live,
            told: HashMap::new(),
            paint: Paint::stderr(),
        }
    }

    /// Shows one event.
    pub fn show(&mut self, stamped: &Stamped) {
        if self.json {
            out::line(serde_json::to_string(stamped).unwrap_or_default());
            return;
        }
        match &self.live {
            Some((_, board)) => lock(board).take(stamped),
            None => self.now.take(stamped),
        }
        match &stamped.event {
            Event::Launched { step, resumed, .. } => self.launched(*step, *resumed),
            Event::Reported { step, report } => self.reported(*step, report, stamped.t),
            Event::Finished { step, seconds, .. } => {
                self.told.remove(step);
                let took = self.paint.dim(&duration(*seconds));
                self.say(&format!("{} {} {took}", self.paint.green("done   "), self.name(*step)));
            }
            Event::Failed { step, failure, message, log, retry, .. } => {
                self.failed(*step, *failure, message, log, *retry);
            }
            Event::Waiting { step, holder } => {
                let text = format!("{} waits for {}", self.name(*step), clean(holder));
                self.say(&format!("{} {text}", self.paint.yellow("waiting")));
            }
            Event::Note { text } => self.note(text),
            Event::Job { step, said } => self.of_job(*step, said),
            Event::Started { .. }
            | Event::Cached { .. }
            | Event::Unchanged { .. }
            | Event::Skipped { .. }
            | Event::Durable { .. }
            | Event::Ended { .. } => {}
        }
        if let Some((screen, _)) = &self.live {
            screen.touch();
        }
    }

    /// What a step is called.
    fn name(&self, step: usize) -> String {
        clean(&self.steps[step].name)
    }

    /// The last line of a run. The board is gone before.
    pub fn last_line(&mut self, summary: &Summary) {
        self.live = None;
        if self.json {
            return;
        }
        let counts = [
            (summary.cached, "cached"),
            (summary.ran, "ran"),
            (summary.failed, "failed"),
            (summary.skipped - summary.left.min(summary.skipped), "skipped"),
            (summary.left, "left"),
        ];
        let told = |(n, what): &(usize, &str)| match (*what, *n) {
            ("failed" | "skipped" | "left", 0) => None,
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
        if !self.quiet && !self.json {
            out::message(line);
        }
    }

    fn launched(&mut self, step: usize, resumed: Option<u64>) {
        if self.live.is_none() || resumed.is_some() {
            let from = resumed.map_or(String::new(), |at| format!(" from its checkpoint at {at}"));
            let name = self.name(step);
            self.say(&format!("{} {name}{from}", self.paint.dim("running")));
        }
        self.told.insert(step, Instant::now());
    }

    fn reported(&mut self, step: usize, report: &Report, t: f64) {
        if let Report::Note { text } = report {
            let text = format!("{}: {text}", self.name(step));
            return self.note(&text);
        }
        let due = |told: &mut Instant| told.elapsed() > PLAIN_EVERY;
        if self.live.is_some() || !self.told.get_mut(&step).is_some_and(due) {
            return;
        }
        self.told.insert(step, Instant::now());
        let text = match self.now.steps.get(step) {
            Some(Stand::Running(running)) => at_work(running, t),
            _ => return,
        };
        self.say(&format!("{} {} {text}", self.paint.dim("running"), self.name(step)));
    }

    /// Where a step's job stands: only that none can be had is worth a line, the board has the rest.
    fn of_job(&mut self, step: usize, said: &Job) {
        let Job::Queued { job, reason } = said else { return };
        // Words of Slurm's for what will not pass by itself.
        let lasting = ["Config", "Constraints", "Held", "NotAvail", "Invalid", "Denied"];
        let text = match job.is_empty() {
            true => format!("waits: {}", clean(reason)),
            false if lasting.iter().any(|word| reason.contains(word)) => {
                format!("job {}: {}", clean(job), clean(reason))
            }
            false => return,
        };
        let line = format!("{} {} {text}", self.paint.dim("queued "), self.name(step));
        self.say(&line);
    }

    /// A failure is told even when quiet.
    fn failed(&mut self, step: usize, failure: Failure, message: &str, log: &str, retry: bool) {
        if failure == Failure::Cancelled {
            let line = format!("{} {}", self.paint.yellow("stopped"), self.name(step));
            return self.say(&line);
        }
        let what = if retry { "failed, trying again" } else { "failed" };
        let mut text =
            format!("{} {}: {}", self.paint.bold_red(what), self.name(step), clean(message));
        for line in log.lines() {
            text += &format!("\n  {} {}", self.paint.dim("│"), clean(line));
        }
        if !retry && !log.is_empty() {
            text += &format!("\n  hint: the whole log: `pipe log {}`", self.name(step));
        }
        out::message(text);
    }
}

/// Draws the board again and again until the screen is dropped.
fn live(board: Board, mut look: Look) -> (Screen, Arc<Mutex<Board>>) {
    let board = Arc::new(Mutex::new(board));
    let (drawn, began) = (board.clone(), Instant::now());
    let lines = move |columns, rows| {
        let machine = look.at();
        let t = began.elapsed().as_secs_f64();
        lock(&drawn).lines(t, machine, (columns, rows), Paint::stderr())
    };
    (Screen::show(Box::new(lines)), board)
}

/// Whoever panicked with it has told so; a board is never half changed in a way that matters.
fn lock(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
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
