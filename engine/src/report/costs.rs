//! What a run cost, and what the cache saved: a row for each step of the file, and the sums.

use std::fmt::Write;

use super::data::{Group, Run, State};
use super::markup::{bytes, clip, count, duration, thousands};

/// Rows of the table; the rest is one more row.
const MOST_ROWS: usize = 60;

/// Sums over steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    /// Steps that were executed, whatever came of them.
    pub ran: usize,
    /// Their seconds.
    pub seconds: f64,
    /// The same times their GPUs.
    pub gpu_seconds: f64,
    /// Steps whose result was there.
    pub cached: usize,
    /// What those took when they ran.
    pub saved: f64,
    /// Of results that were made here.
    pub bytes: u64,
}

impl Cost {
    /// The sum over `steps`.
    pub fn of<'a>(run: &Run, steps: impl IntoIterator<Item = &'a usize>) -> Cost {
        let mut sum = Cost::default();
        for step in steps.into_iter().filter_map(|&step| run.steps.get(step)) {
            let seconds = step.seconds.filter(|s| s.is_finite() && *s >= 0.0).unwrap_or(0.0);
            match step.state {
                State::Cached => {
                    sum.cached += 1;
                    sum.saved += seconds;
                }
                State::Ran | State::Failed => {
                    sum.ran += 1;
                    sum.seconds += seconds;
                    sum.gpu_seconds += seconds * f64::from(step.plan.resources.gpu);
                    let made = step.outputs.iter().map(|output| output.bytes);
                    sum.bytes = made.fold(sum.bytes, u64::saturating_add);
                }
                _ => {}
            }
        }
        sum
    }

    fn add(self, other: Cost) -> Cost {
        Cost {
            ran: self.ran + other.ran,
            seconds: self.seconds + other.seconds,
            gpu_seconds: self.gpu_seconds + other.gpu_seconds,
            cached: self.cached + other.cached,
            saved: self.saved + other.saved,
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

/// The sum over all steps.
pub(super) fn total(run: &Run) -> Cost {
    run.groups.iter().fold(Cost::default(), |sum, group| sum.add(Cost::of(run, &group.steps)))
}

/// GPU time in words; hours, since that is how it is paid.
pub(super) fn gpu_hours(seconds: f64) -> String {
    match seconds {
        s if s < 36.0 => format!("{} GPU", duration(s)),
        s => format!("{:.2} GPU-hours", s / 3600.0),
    }
}

/// The table, most expensive first.
pub(super) fn table(run: &Run) -> String {
    let mut rows: Vec<(&Group, Cost)> =
        run.groups.iter().map(|group| (group, Cost::of(run, &group.steps))).collect();
    rows.retain(|(_, cost)| cost.ran + cost.cached > 0);
    if rows.is_empty() {
        return String::new();
    }
    let work = |cost: &Cost| cost.seconds + cost.saved;
    rows.sort_by(|a, b| work(&b.1).total_cmp(&work(&a.1)));
    let (sum, most) = (total(run), rows.iter().map(|row| work(&row.1)).fold(1e-9, f64::max));
    let gpus = sum.gpu_seconds > 0.0;
    let mut out = String::from(
        "<div class=scroll><table class=\"figures costs\"><thead><tr><th>Step</th><th></th><th>Time here</th>",
    );
    out.push_str(if gpus { "<th>On GPUs</th>" } else { "" });
    out.push_str("<th>Saved by the cache</th><th>Bytes made</th></tr></thead><tbody>");
    for (group, cost) in rows.iter().take(MOST_ROWS) {
        let many = match group.steps.len() {
            1 => String::new(),
            n => format!(" <small>×{}</small>", thousands(n as u64)),
        };
        row(&mut out, &format!("<code>{}</code>{many}", clip(group.name, 80)), cost, (most, gpus));
    }
    if let Some(rest) = rows.get(MOST_ROWS..).filter(|rest| !rest.is_empty()) {
        let cost = rest.iter().fold(Cost::default(), |sum, (_, cost)| sum.add(*cost));
        row(&mut out, &count(rest.len(), "more step"), &cost, (most, gpus));
    }
    row(&mut out, "<b>all</b>", &sum, (f64::INFINITY, gpus));
    out.push_str("</tbody></table></div>");
    out
}

fn row(out: &mut String, name: &str, cost: &Cost, (most, gpus): (f64, bool)) {
    let share = |seconds: f64| (100.0 * seconds / most).min(100.0);
    let or_dash = |seconds: f64, some: bool| if some { duration(seconds) } else { "–".into() };
    let _ = write!(
        out,
        "<tr><th>{name}</th><td class=share><i style=\"width:{:.1}%\"></i><i class=saved style=\"width:{:.1}%\"></i></td><td>{}</td>",
        share(cost.seconds),
        share(cost.saved),
        or_dash(cost.seconds, cost.ran > 0)
    );
    if gpus {
        let text = if cost.gpu_seconds > 0.0 { gpu_hours(cost.gpu_seconds) } else { "–".into() };
        let _ = write!(out, "<td>{text}</td>");
    }
    let made = if cost.bytes > 0 { bytes(cost.bytes) } else { "–".into() };
    let _ = write!(out, "<td>{}</td><td>{made}</td></tr>", or_dash(cost.saved, cost.cached > 0));
}
