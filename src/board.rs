//! What a run looks like on a terminal, as lines: steps at work with rate, loss and time left, counts,
//! what the machine gives. Pure: knows no clock, no file and no terminal, only its size.

use std::collections::HashMap;

use engine::event::{Event, Stamped};
use engine::history::now::{Now, Running, Stand};
use engine::lookup;
use engine::plan::Plan;
use engine::stage::Report;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::out::{Paint, bytes, clean, duration};
use crate::usage::Machine;

/// Points of a curve that are kept; of more, every second is forgotten.
const MOST_POINTS: usize = 512;
/// Columns of a curve, and of a bar of progress.
const CURVE: usize = 12;
const BAR: usize = 16;
/// Names of steps take no more columns.
const NAME: usize = 28;
/// Lines of a board, however high the terminal is.
const MOST_LINES: usize = 16;

/// A run as it goes on.
pub struct Board {
    pipeline: String,
    names: Vec<String>,
    now: Now,
    curves: HashMap<usize, Losses>,
    needs: Vec<Vec<usize>>,
    /// Seconds that each step takes, as far as anything like it was ever done.
    expected: Vec<Option<f64>>,
}

/// The loss of a step: what it is called, and its values so far.
#[derive(Default)]
struct Losses {
    name: String,
    values: Vec<f64>,
    /// Keep one of so many.
    stride: usize,
    seen: usize,
}

impl Losses {
    fn push(&mut self, value: f64) {
        self.seen += 1;
        if !value.is_finite() || !(self.seen - 1).is_multiple_of(self.stride.max(1)) {
            return;
        }
        self.values.push(value);
        if self.values.len() > MOST_POINTS {
            let mut at = 0;
            self.values.retain(|_| {
                at += 1;
                at % 2 == 1
            });
            self.stride = self.stride.max(1) * 2;
        }
    }
}

/// A piece of a line and how it is painted.
struct Piece(Style, String);

#[derive(Clone, Copy, PartialEq)]
enum Style {
    Plain,
    Bold,
    Dim,
    Green,
    Yellow,
    Red,
}

impl Board {
    /// The board of a run of `plan`.
    pub fn new(plan: &Plan, expected: Vec<Option<f64>>) -> Board {
        let steps = plan.steps.len();
        Board {
            pipeline: clean(&plan.name),
            names: plan.steps.iter().map(|step| clean(&step.name)).collect(),
            now: Now::new(steps),
            curves: HashMap::new(),
            needs: (0..steps).map(|step| lookup::upstream(plan, step)).collect(),
            expected,
        }
    }

    /// Takes one event.
    pub fn take(&mut self, stamped: &Stamped) {
        self.now.take(stamped);
        match &stamped.event {
            Event::Reported { step, report: Report::Metric { values, .. } } => {
                let curve = self.curves.entry(*step).or_default();
                let named = values.keys().find(|name| name.as_str() == "loss");
                let named = named.or_else(|| values.keys().find(|name| name.contains("loss")));
                if curve.name.is_empty() {
                    curve.name = named.or(values.keys().next()).cloned().unwrap_or_default();
                }
                if let Some(value) = values.get(&curve.name) {
                    curve.push(*value);
                }
            }
            Event::Launched { step, .. }
            | Event::Finished { step, .. }
            | Event::Failed { step, .. } => {
                self.curves.remove(step);
            }
            _ => {}
        }
    }

    /// The board `t` seconds after the start of the run, for a terminal of `width` columns and
    /// `height` lines: fewer lines than that, none as wide.
    pub fn lines(
        &self,
        t: f64,
        machine: &Machine,
        (width, height): (usize, usize),
        paint: Paint,
    ) -> Vec<String> {
        let room = height.saturating_sub(1).clamp(1, MOST_LINES);
        let columns = width.saturating_sub(1).max(1);
        let mut lines = vec![self.head(t)];
        let mut work: Vec<Vec<Piece>> = self.work(t, columns);
        // The machine's line is the first to go, then steps.
        let foot = Some(foot(machine)).filter(|foot| !foot.is_empty() && room > work.len() + 1);
        let most = room - 1 - usize::from(foot.is_some());
        if work.len() > most {
            let shown = most.saturating_sub(1);
            let more = format!("… and {} more at work", work.len() - shown);
            work.truncate(shown);
            if most > 0 {
                work.push(vec![Piece(Style::Dim, more)]);
            }
        }
        lines.extend(work);
        lines.extend(foot);
        lines.into_iter().map(|line| finish(line, columns, paint)).collect()
    }

    /// `mohawk  3 cached, 4 ran, 1 running, 7 to go   1 min 12 s, about 4 min left`.
    fn head(&self, t: f64) -> Vec<Piece> {
        let [cached, ran, failed, running, left] = self.now.counts();
        let mut line = vec![Piece(Style::Bold, format!("{} ", self.pipeline))];
        let counts = [
            (cached, "cached", Style::Green),
            (ran, "ran", Style::Green),
            (failed, "failed", Style::Red),
            (running, "running", Style::Bold),
            (left, "to go", Style::Plain),
        ];
        let shown: Vec<_> = counts.into_iter().filter(|(n, ..)| *n > 0).collect();
        for (n, what, style) in shown {
            line.push(Piece(Style::Plain, " ".into()));
            line.push(Piece(style, n.to_string()));
            line.push(Piece(Style::Plain, format!(" {what}")));
        }
        let mut time = format!("  {}", duration(t.max(0.0)).replace(" ms", "ms"));
        if let Some((left, least)) = self.left(t) {
            let about = if least { "at least" } else { "about" };
            time += &format!(", {about} {} left", rough(left));
        }
        line.push(Piece(Style::Dim, time));
        line
    }

    /// Seconds that the run still takes, and whether something unknown comes on top.
    fn left(&self, t: f64) -> Option<(f64, bool)> {
        let (mut unknown, mut sum, mut running) = (false, 0.0, 0);
        let mut ends = vec![0.0f64; self.now.steps.len()];
        for (step, stand) in self.now.steps.iter().enumerate() {
            let own = match stand {
                Stand::Running(at) => {
                    running += 1;
                    let spent = t - at.since;
                    let expected = self.expected.get(step).copied().flatten().map(|s| s - spent);
                    at.left().map(|left| left - (t - at.last)).or(expected)
                }
                // Of a part of the plan that was not asked for nothing is told, so that this is the
                // most that is left.
                Stand::Pending => self.expected.get(step).copied().flatten(),
                _ => Some(0.0),
            };
            unknown |= own.is_none();
            let own = own.unwrap_or(0.0).max(0.0);
            let before = self.needs[step].iter().map(|&at| ends[at]).fold(0.0, f64::max);
            ends[step] = before + own;
            sum += own;
        }
        let longest = ends.into_iter().fold(0.0, f64::max);
        let left = longest.max(sum / f64::from(running.max(1)));
        (left > 0.5).then_some((left, unknown))
    }

    /// A line a step at work.
    fn work(&self, t: f64, columns: usize) -> Vec<Vec<Piece>> {
        let at_work = || {
            let steps = self.now.steps.iter().enumerate();
            steps.filter(|(_, stand)| matches!(stand, Stand::Running(_) | Stand::Waiting { .. }))
        };
        let width = at_work().map(|(step, _)| self.names[step].width()).max().unwrap_or(0);
        let width = width.min(NAME).min(columns / 2).max(4);
        let line = |(step, stand): (usize, &Stand)| {
            let name = pad(&self.names[step], width);
            match stand {
                Stand::Running(running) => self.running(step, running, t, (name, columns)),
                Stand::Waiting { holder } => vec![
                    Piece(Style::Yellow, "· ".into()),
                    Piece(Style::Plain, name),
                    Piece(Style::Dim, format!("  waits for {}", clean(holder))),
                ],
                _ => Vec::new(),
            }
        };
        at_work().map(line).collect()
    }

    /// What there is room for, the most telling first.
    fn running(
        &self,
        step: usize,
        at: &Running,
        t: f64,
        (name, columns): (String, usize),
    ) -> Vec<Piece> {
        let share = (at.total > 0).then(|| (at.done as f64 / at.total as f64).clamp(0.0, 1.0));
        let spent = (t - at.since).max(0.0);
        let time = match at.left() {
            Some(left) => format!("{} left", rough((left - (t - at.last)).max(0.0))),
            None => format!("for {}", rough(spent)),
        };
        let losses = self.curves.get(&step).filter(|losses| !losses.values.is_empty());
        let loss = losses.map(|losses| {
            let last = losses.values.last().copied().unwrap_or_default();
            format!("{} {}", clean(&losses.name), value(last))
        });
        let curve = losses.filter(|losses| losses.values.len() > 1);
        let rate = at.rate().map(|rate| format!("{} {}/s", per_second(rate), clean(&at.unit)));
        // In the order they stand in, with the order in which they get their room.
        let parts = [
            (5, share.map(|share| (Style::Green, bar(share, BAR)))),
            (0, share.map(|share| (Style::Bold, format!("{:>3.0} %", 100.0 * share)))),
            (3, rate.map(|rate| (Style::Plain, rate))),
            (2, loss.map(|loss| (Style::Plain, loss))),
            (4, curve.map(|losses| (Style::Yellow, sparkline(&losses.values, CURVE)))),
            (1, Some((Style::Dim, time))),
        ];
        let mut left = columns.saturating_sub(2 + name.width());
        let mut order: Vec<usize> = (0..parts.len()).collect();
        order.sort_by_key(|&i| parts[i].0);
        let mut shown = [false; 6];
        for i in order {
            if let Some((_, text)) = &parts[i].1
                && text.width() + 2 <= left
            {
                left -= text.width() + 2;
                shown[i] = true;
            }
        }
        let mut line = vec![Piece(Style::Green, "▸ ".into()), Piece(Style::Plain, name)];
        for ((_, part), _) in parts.into_iter().zip(shown).filter(|(_, shown)| *shown) {
            if let Some((style, text)) = part {
                line.push(Piece(Style::Plain, "  ".into()));
                line.push(Piece(style, text));
            }
        }
        line
    }
}

/// `cpu 1.9 of 2, memory 512 MB, GPU 0 97 %, 34 GB of 80 GB`.
fn foot(machine: &Machine) -> Vec<Piece> {
    if machine.memory == 0 {
        return Vec::new();
    }
    let (used, all) = machine.cpus;
    let mut text = format!("  cpu {used:.1} of {all}, memory {}", bytes(machine.memory));
    for gpu in &machine.gpus {
        let busy = gpu.busy.map_or(String::new(), |busy| format!("{busy} %, "));
        let (used, all) = (bytes(gpu.used), bytes(gpu.memory));
        text += &format!(", GPU {} {busy}{used} of {all}", gpu.index);
    }
    vec![Piece(Style::Dim, text)]
}

/// Cuts a line to `columns` and paints it.
fn finish(line: Vec<Piece>, columns: usize, paint: Paint) -> String {
    let (mut out, mut left) = (String::new(), columns);
    for Piece(style, text) in line {
        let cut = cut(&text, left);
        left -= cut.width();
        let whole = cut.len() == text.len();
        out += &match style {
            Style::Plain => cut,
            _ if cut.is_empty() => cut,
            Style::Bold => paint.bold(&cut),
            Style::Dim => paint.dim(&cut),
            Style::Green => paint.green(&cut),
            Style::Yellow => paint.yellow(&cut),
            Style::Red => paint.bold_red(&cut),
        };
        if !whole {
            break;
        }
    }
    out
}

/// `text` in at most `columns`; what is cut ends in `…`.
fn cut(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.into();
    }
    let (mut out, mut used) = (String::new(), 0);
    for c in text.chars() {
        let wide = c.width().unwrap_or(0);
        if used + wide + 1 > columns {
            break;
        }
        used += wide;
        out.push(c);
    }
    if columns > 0 {
        out.push('…');
    }
    out
}

fn pad(text: &str, columns: usize) -> String {
    let text = cut(text, columns);
    let missing = columns.saturating_sub(text.width());
    text + &" ".repeat(missing)
}

/// A bar of progress.
fn bar(share: f64, columns: usize) -> String {
    let full = (share * columns as f64).round() as usize;
    "━".repeat(full) + &"─".repeat(columns - full)
}

/// A curve of one line: the mean of each stretch, from the lowest to the highest value; by powers
/// where these are far apart.
fn sparkline(values: &[f64], columns: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = columns.min(values.len());
    let mean = |i: usize| {
        let part = &values[i * values.len() / columns..(i + 1) * values.len() / columns];
        part.iter().sum::<f64>() / part.len() as f64
    };
    let means: Vec<f64> = (0..columns).map(mean).collect();
    let ends = |values: &[f64]| {
        values
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(*v), high.max(*v)))
    };
    let (low, high) = ends(&means);
    let by_powers = low > 0.0 && high / low > 10.0;
    let place = |v: f64| if by_powers { v.ln() } else { v };
    let (low, high) = (place(low), place(high));
    let block = |v: &f64| {
        let share = (place(*v) - low) / (high - low);
        let at = if share.is_finite() { (share * 7.0).round() as usize } else { 0 };
        BLOCKS[at.min(7)]
    };
    means.iter().map(block).collect()
}

/// `52k`, `1.2M`, `31`, `0.42`.
pub fn per_second(rate: f64) -> String {
    match rate {
        1e6.. => format!("{:.1}M", rate / 1e6),
        1e4.. => format!("{:.0}k", rate / 1e3),
        1e3.. => format!("{:.1}k", rate / 1e3),
        10.0.. => format!("{rate:.0}"),
        _ => format!("{rate:.2}"),
    }
}

fn value(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if (1e-3..1e5).contains(&size) => {
            let digits = (3 - size.log10().floor() as i32).clamp(0, 5) as usize;
            format!("{value:.digits$}")
        }
        _ => format!("{value:.2e}"),
    }
}

/// A time that is no exact one: `40 s`, `4 min`, `1 h 10 min`.
fn rough(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..90 => format!("{whole} s"),
        90..600 => format!("{} min {:02} s", whole / 60, whole % 60),
        600..3600 => format!("{} min", (whole + 30) / 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests;
