//! Curves as SVG figures, and the data from which the page's script draws them again: zoomed, or
//! with the other kind of axis. Knows points and names, no steps.

use std::fmt::Write;

use serde_json::json;

use super::markup::{clip, json as in_script, num};
use super::scale::Scale;

/// Points of one curve that are kept for zooming; more are thinned out, keeping extremes.
const MOST_POINTS: usize = 600;
/// Points of all curves of a figure, so that many curves have fewer each.
const MOST_IN_ALL: usize = 2400;
/// Points of one curve that are drawn at first: more than the paper shows anyway.
const MOST_DRAWN: usize = 240;
/// Curves drawn in one figure.
pub(super) const MOST_SERIES: usize = 36;

pub(super) const WIDTH: f64 = 520.0;
pub(super) const HEIGHT: f64 = 250.0;
pub(super) const LEFT: f64 = 52.0;
pub(super) const RIGHT: f64 = 500.0;
pub(super) const TOP: f64 = 12.0;
pub(super) const BOTTOM: f64 = 212.0;

/// One curve.
pub(super) struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    pub ink: Ink,
}

/// How a curve looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ink {
    /// One of eight colours, then the same again with other dashes.
    Palette(usize),
    /// A place between 0 and 1 on a ramp, for ordered curves.
    Ramp(f64),
    /// A reference line.
    Quiet,
}

impl Ink {
    pub fn style(self) -> String {
        let dashes = ["none", "5 3", "1.5 3", "7 3 1.5 3"];
        match self {
            Ink::Palette(i) => {
                format!("--ink:var(--c{});--dash:{}", i % 8, dashes[i / 8 % dashes.len()])
            }
            Ink::Ramp(at) => {
                let percent = (at.clamp(0.0, 1.0) * 100.0).round();
                format!(
                    "--ink:color-mix(in oklab,var(--ramp1) {percent}%,var(--ramp0));--dash:none"
                )
            }
            Ink::Quiet => "--ink:var(--quiet);--dash:4 4".into(),
        }
    }
}

/// A figure of curves.
pub(super) struct Lines {
    pub title: String,
    pub x: String,
    pub y: String,
    /// Names of x = 0, 1, …, if x is no quantity.
    pub places: Vec<String>,
    /// Fixed ends of the vertical axis, and no logarithmic one.
    pub ends: Option<(f64, f64)>,
    pub series: Vec<Series>,
}

/// Draws a figure.
pub(super) fn lines(chart: &Lines) -> String {
    let hidden = chart.series.len().saturating_sub(MOST_SERIES);
    let shown = chart.series.len().clamp(1, MOST_SERIES);
    let each = (MOST_IN_ALL / shown).clamp(60, MOST_POINTS);
    let series: Vec<(&Series, Vec<(f64, f64)>)> =
        chart.series.iter().take(MOST_SERIES).map(|s| (s, thin(&s.points, each))).collect();
    let all: Vec<(f64, f64)> =
        series.iter().flat_map(|(_, points)| points.iter().copied()).collect();
    if all.is_empty() {
        return empty(chart);
    }
    // Places stand in the middle of their share of the axis.
    let around = (!chart.places.is_empty()).then(|| (-0.5, chart.places.len() as f64 - 0.5));
    let x = Scale::linear(all.iter().map(|p| p.0), LEFT, RIGHT, around);
    let linear = Scale::linear(all.iter().map(|p| p.1), BOTTOM, TOP, chart.ends);
    let log = match chart.ends {
        None => Scale::log(all.iter().map(|p| p.1), BOTTOM, TOP),
        Some(_) => None,
    };
    let start_log = log.as_ref().is_some_and(|_| spread(&all) > 30.0);
    let mut out = head(chart, log.is_some(), start_log);
    let y = log.as_ref().filter(|_| start_log).unwrap_or(&linear);
    out.push_str("<g class=plot>");
    axes(&mut out, chart, &x, y);
    for (series, points) in &series {
        curve(&mut out, series, &thin(points, MOST_DRAWN), &x, y);
    }
    let _ = write!(
        out,
        "</g><text class=\"x name\" x={} y={}>{}</text>\
         <rect class=sel y={TOP} height={} x=-9 width=0 /><line class=cross y1={TOP} y2={BOTTOM} x1=-9 x2=-9 /></svg>",
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 33.0,
        clip(&chart.x, 60),
        BOTTOM - TOP
    );
    legend(&mut out, &series, hidden);
    data(&mut out, chart, &series, &x, [Some(&linear), log.as_ref()]);
    out.push_str("</figure>");
    out
}

fn head(chart: &Lines, switch: bool, start_log: bool) -> String {
    let (title, y) = (clip(&chart.title, 120), clip(&chart.y, 60));
    let mut out = String::from("<figure class=\"chart");
    if start_log {
        out.push_str(" islog");
    }
    let _ = write!(out, "\"><figcaption><b>{title}</b> <span>{y}</span>");
    out.push_str("<button type=button class=reset hidden>all</button>");
    if switch {
        out.push_str(
            "<button type=button class=scale><i class=lin>linear</i><i class=log>log</i></button>",
        );
    }
    let _ = write!(
        out,
        "</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=img aria-label=\"{title}: {y}\">"
    );
    out
}

fn empty(chart: &Lines) -> String {
    let (title, y) = (clip(&chart.title, 120), clip(&chart.y, 60));
    format!(
        "<figure class=chart><figcaption><b>{title}</b> <span>{y}</span></figcaption>\
         <p class=none>No points were recorded.</p></figure>"
    )
}

fn spread(points: &[(f64, f64)]) -> f64 {
    let low = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|p| p.1).fold(0.0, f64::max);
    if low > 0.0 { high / low } else { 1.0 }
}

fn axes(out: &mut String, chart: &Lines, x: &Scale, y: &Scale) {
    for tick in y.ticks(6) {
        let at = y.at(tick);
        let _ = write!(
            out,
            "<path class=grid d=\"M{LEFT} {at:.1}H{RIGHT}\"/><text class=y x={} y={:.1}>{}</text>",
            LEFT - 6.0,
            at + 3.5,
            num_short(tick)
        );
    }
    let _ = write!(out, "<path class=axis d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/>");
    if chart.places.is_empty() {
        for tick in x.ticks(6) {
            let at = x.at(tick);
            let _ = write!(
                out,
                "<path class=axis d=\"M{at:.1} {BOTTOM}v4\"/><text class=x x={at:.1} y={}>{}</text>",
                BOTTOM + 16.0,
                num_short(tick)
            );
        }
    } else {
        let every = chart.places.len().div_ceil(9).max(1);
        for (i, place) in chart.places.iter().enumerate().step_by(every) {
            let at = x.at(i as f64);
            let _ = write!(
                out,
                "<text class=x x={at:.1} y={}>{}</text>",
                BOTTOM + 16.0,
                clip(place, 14)
            );
        }
    }
}

/// The same number for an axis: no zeros at its end.
pub(super) fn num_short(value: f64) -> String {
    let text = num(value);
    if text.contains('.') && !text.contains('e') {
        return text.trim_end_matches('0').trim_end_matches('.').to_string();
    }
    text.replace(".00e", "e")
}

fn curve(out: &mut String, series: &Series, points: &[(f64, f64)], x: &Scale, y: &Scale) {
    let seen: Vec<(f64, f64)> =
        points.iter().map(|&(px, py)| (x.at(px), y.at(py))).filter(|p| p.1.is_finite()).collect();
    let style = series.ink.style();
    if seen.len() <= 12 {
        for (px, py) in &seen {
            let _ = write!(out, "<circle cx={px:.1} cy={py:.1} r=3 style=\"{style}\" />");
        }
    }
    if seen.len() > 1 {
        let _ = write!(out, "<path class=curve style=\"{style}\" d=\"");
        for (i, (px, py)) in seen.iter().enumerate() {
            let _ = write!(out, "{}{px:.1} {py:.1}", if i == 0 { 'M' } else { 'L' });
        }
        out.push_str("\"/>");
    }
}

fn legend(out: &mut String, series: &[(&Series, Vec<(f64, f64)>)], hidden: usize) {
    out.push_str("<ul class=legend>");
    for (series, points) in series {
        let last = points.last().map(|p| num(p.1)).unwrap_or_default();
        let _ = write!(
            out,
            "<li style=\"{}\"><svg viewBox=\"0 0 22 8\"><path class=curve d=\"M1 4H21\"/></svg>{} <b>{last}</b></li>",
            series.ink.style(),
            clip(&series.name, 80)
        );
    }
    if hidden > 0 {
        let _ = write!(out, "<li>and {hidden} more, not drawn</li>");
    }
    out.push_str("</ul>");
}

fn data(
    out: &mut String,
    chart: &Lines,
    series: &[(&Series, Vec<(f64, f64)>)],
    x: &Scale,
    y: [Option<&Scale>; 2],
) {
    let short = |value: f64| format!("{value:.5e}").parse::<f64>().unwrap_or(value);
    let series: Vec<_> = series
        .iter()
        .map(|(series, points)| {
            let points: Vec<_> = points.iter().map(|p| [short(p.0), short(p.1)]).collect();
            json!({ "n": series.name.chars().take(80).collect::<String>(), "i": series.ink.style(), "p": points })
        })
        .collect();
    let ends = |scale: Option<&Scale>| scale.map(|s| [s.low, s.high]);
    let value = json!({
        "x": chart.x, "places": chart.places, "box": [LEFT, RIGHT, TOP, BOTTOM],
        "xs": ends(Some(x)), "lin": ends(y[0]), "log": ends(y[1]), "fixed": chart.ends.is_some(), "s": series,
    });
    let _ = write!(out, "<script type=\"application/json\">{}</script>", in_script(&value));
}

/// At most `most` finite points, keeping the lowest and highest of each stretch.
fn thin(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect();
    if finite.len() <= most {
        return finite;
    }
    let stretch = finite.len().div_ceil(most / 2 - 1);
    let mut kept = vec![finite[0]];
    for part in finite[1..finite.len() - 1].chunks(stretch) {
        let by = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (part.iter().min_by(by).unwrap(), part.iter().max_by(by).unwrap());
        kept.extend(if low.0 <= high.0 { [*low, *high] } else { [*high, *low] });
    }
    kept.push(finite[finite.len() - 1]);
    kept.dedup();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> String {
        let series = vec![Series { name: "a<b".into(), points, ink: Ink::Palette(0) }];
        lines(&Lines {
            title: "loss".into(),
            x: "update".into(),
            y: "loss (nats)".into(),
            places: Vec::new(),
            ends: None,
            series,
        })
    }

    #[test]
    fn any_points_can_be_drawn() {
        assert!(chart(Vec::new()).contains("No points"));
        assert!(chart(vec![(0.0, f64::NAN), (f64::INFINITY, 1.0)]).contains("No points"));
        assert!(chart(vec![(3.0, 1.5)]).contains("<circle"));
        for y in [0.0, -1.0, 1e-300, 1e300, f64::MAX, f64::MIN] {
            let drawn = chart(vec![(0.0, y), (1.0, f64::NAN), (2.0, y)]);
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{y}: {drawn}");
            let drawn = chart(vec![(0.0, y), (1.0, 7.0)]);
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{y}: {drawn}");
        }
    }

    #[test]
    fn thinning_keeps_ends_and_extremes() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), 1.0)).collect();
        points[30_000].1 = 99.0;
        points[40_000].1 = -99.0;
        let kept = thin(&points, MOST_POINTS);
        assert!(kept.len() <= MOST_POINTS, "{}", kept.len());
        assert!(kept.contains(&(30_000.0, 99.0)) && kept.contains(&(40_000.0, -99.0)));
        assert_eq!((kept[0].0, kept[kept.len() - 1].0), (0.0, 49_999.0));
    }

    #[test]
    fn a_logarithmic_axis_is_offered_for_positive_values_only() {
        assert!(chart(vec![(0.0, 20.0), (1.0, 0.1)]).contains("islog"));
        let linear = chart(vec![(0.0, 2.0), (1.0, 1.0)]);
        assert!(linear.contains("class=log") && !linear.contains("islog"));
        assert!(!chart(vec![(0.0, -2.0), (1.0, 1.0)]).contains("class=log"));
    }
}
