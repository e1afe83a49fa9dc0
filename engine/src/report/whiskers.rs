//! Teacher against student as dots with error bars, a row a task. Knows names and values, no steps.

use std::fmt::Write;

use super::chart::num_short;
use super::markup::{clip, percent};
use super::scale::Scale;

const WIDTH: f64 = 520.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 500.0;
const ROW: f64 = 30.0;
const TOP: f64 = 6.0;
/// Rows of one figure.
const MOST_ROWS: usize = 40;
/// Standard errors of a 95 % interval.
const Z: f64 = 1.96;

/// A share and its standard error.
pub(super) type Mean = (f64, Option<f64>);

/// One task, in shares of one.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub name: String,
    pub chance: Option<f64>,
    pub teacher: Option<Mean>,
    pub student: Option<Mean>,
}

/// Draws `rows`; nothing if there are none with both sides.
pub(super) fn whiskers(title: &str, rows: &[Row]) -> String {
    let finite = |mean: &Option<Mean>| mean.is_some_and(|mean| mean.0.is_finite());
    let rows: Vec<&Row> = rows
        .iter()
        .filter(|row| finite(&row.teacher) && finite(&row.student))
        .take(MOST_ROWS)
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let bottom = TOP + ROW * rows.len() as f64;
    let x = Scale::linear([], LEFT, RIGHT, Some((0.0, 1.0)));
    let mut out = format!(
        "<figure class=whiskers><figcaption><b>{}</b> <span>accuracy, 95 % intervals</span></figcaption>\
         <svg viewBox=\"0 0 {WIDTH} {}\" role=img aria-label=\"{0}\">",
        clip(title, 120),
        bottom + 22.0
    );
    for tick in x.ticks(5) {
        let at = x.at(tick);
        let _ = write!(
            out,
            "<path class=grid d=\"M{at:.1} {TOP}V{bottom}\"/><text class=x x={at:.1} y={:.1}>{} %</text>",
            bottom + 16.0,
            num_short(tick * 100.0)
        );
    }
    for (i, row) in rows.iter().enumerate() {
        let y = TOP + ROW * (i as f64 + 0.5);
        let _ = write!(
            out,
            "<text class=y x={} y={:.1}>{}</text>",
            LEFT - 10.0,
            y + 4.0,
            clip(&row.name, 22)
        );
        if let Some(chance) = row.chance.filter(|chance| (0.0..=1.0).contains(chance)) {
            let _ = write!(
                out,
                "<path class=chance d=\"M{:.1} {:.1}v20\"><title>guessing: {}</title></path>",
                x.at(chance),
                y - 10.0,
                percent(chance)
            );
        }
        for (who, mean, y, ink) in
            [("teacher", row.teacher, y - 5.0, 1), ("student", row.student, y + 5.0, 0)]
        {
            mean.iter().for_each(|mean| dot(&mut out, who, row, *mean, (&x, y, ink)));
        }
    }
    out.push_str("</svg><ul class=legend>");
    for (ink, name) in [(1, "teacher"), (0, "student")] {
        let _ = write!(
            out,
            "<li style=\"--ink:var(--c{ink})\"><svg viewBox=\"0 0 22 8\"><circle cx=11 cy=4 r=3.5 /></svg>{name}</li>"
        );
    }
    out.push_str("<li style=\"--ink:var(--quiet);--dash:2 2\"><svg viewBox=\"0 0 22 8\"><path class=chance d=\"M11 0V8\"/></svg>guessing</li></ul></figure>");
    out
}

fn dot(out: &mut String, who: &str, row: &Row, (value, error): Mean, at: (&Scale, f64, usize)) {
    let (x, y, ink) = at;
    let place = |value: f64| x.at(value.clamp(0.0, 1.0));
    let _ = write!(out, "<g style=\"--ink:var(--c{ink})\">");
    let mut text = percent(value);
    if let Some(error) = error.filter(|error| error.is_finite() && *error > 0.0) {
        let (low, high) = (value - Z * error, value + Z * error);
        let _ = write!(out, "<path class=bar d=\"M{:.1} {y:.1}H{:.1}\"/>", place(low), place(high));
        text += &format!(", {} to {}", percent(low.max(0.0)), percent(high.min(1.0)));
    }
    let _ = write!(
        out,
        "<circle cx={:.1} cy={y:.1} r=4><title>{}, {who}: {text}</title></circle></g>",
        place(value),
        clip(&row.name, 80)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_have_a_dot_and_a_bar() {
        let row = |name: &str, teacher, student| Row {
            name: name.into(),
            chance: Some(0.25),
            teacher,
            student,
        };
        let drawn = whiskers(
            "tasks",
            &[
                row("a<b", Some((0.5, Some(0.1))), Some((0.4, None))),
                row("one side", Some((0.5, None)), None),
                row("no number", Some((f64::NAN, None)), Some((0.1, None))),
            ],
        );
        assert_eq!(
            (drawn.matches("<circle cx").count(), drawn.matches("class=bar").count()),
            (4, 1)
        );
        assert!(drawn.contains("a&lt;b, teacher: 50.0 %, 30.4 % to 69.6 %"), "{drawn}");
        assert!(drawn.contains("guessing: 25.0 %") && !drawn.contains("one side"));
        assert_eq!(whiskers("t", &[]), "");
    }
}
