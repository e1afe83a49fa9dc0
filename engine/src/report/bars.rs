//! Bars as SVG figures: one value for each of a few places. Knows names and values, no steps.

use std::fmt::Write;

use super::chart::{BOTTOM, HEIGHT, Ink, LEFT, Lines, RIGHT, Series, TOP, WIDTH, lines, num_short};
use super::markup::{clip, num};
use super::scale::{Scale, ticks};

/// One figure of bars: for every place, one bar of each series.
pub(super) struct Bars {
    pub title: String,
    pub x: String,
    pub y: String,
    pub places: Vec<String>,
    /// Name and a value for every place.
    pub series: Vec<(String, Vec<Option<f64>>)>,
}

/// Draws bars; too many of them become curves.
pub(super) fn bars(chart: &Bars) -> String {
    let (places, wide) = (chart.places.len(), chart.series.len());
    if places * wide > 96 || wide > 4 {
        return lines(&curves(chart));
    }
    let values = chart.series.iter().flat_map(|(_, values)| values.iter().flatten().copied());
    let high = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
    let y = Scale::linear([0.0, if high > 0.0 { high } else { 1.0 }], BOTTOM, TOP, None);
    let (title, unit) = (clip(&chart.title, 120), clip(&chart.y, 60));
    let mut out = format!(
        "<figure class=chart><figcaption><b>{title}</b> <span>{unit}</span></figcaption>\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=img aria-label=\"{title}: {unit}\">"
    );
    grid(&mut out, &y);
    all_places(&mut out, chart, &y);
    let _ = write!(
        out,
        "<path class=axis d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/><text class=\"x name\" x={} y={}>{}</text></svg>",
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 33.0,
        clip(&chart.x, 60)
    );
    legend(&mut out, chart);
    out.push_str("</figure>");
    out
}

/// The same values as curves.
fn curves(chart: &Bars) -> Lines {
    let points = |values: &[Option<f64>]| {
        values.iter().enumerate().filter_map(|(x, y)| Some((x as f64, (*y)?))).collect()
    };
    let series = chart.series.iter().enumerate().map(|(i, (name, values))| Series {
        name: name.clone(),
        points: points(values),
        ink: Ink::Palette(i),
    });
    Lines {
        title: chart.title.clone(),
        x: chart.x.clone(),
        y: chart.y.clone(),
        places: chart.places.clone(),
        ends: None,
        series: series.collect(),
    }
}

/// Horizontal lines with their values.
fn grid(out: &mut String, y: &Scale) {
    for tick in ticks(y.low, y.high, 5) {
        let at = y.at(tick);
        let _ = write!(
            out,
            "<path class=grid d=\"M{LEFT} {at:.1}H{RIGHT}\"/><text class=y x={} y={:.1}>{}</text>",
            LEFT - 6.0,
            at + 3.5,
            num_short(tick)
        );
    }
}

/// Bars and name of every place; of many places, some names.
fn all_places(out: &mut String, chart: &Bars, y: &Scale) {
    let (places, wide) = (chart.places.len(), chart.series.len());
    let slot = (RIGHT - LEFT) / places.max(1) as f64;
    let width = (slot * 0.72 / wide.max(1) as f64).min(46.0);
    let every = places.div_ceil(16).max(1);
    for (i, place) in chart.places.iter().enumerate() {
        let middle = LEFT + slot * (i as f64 + 0.5);
        for (j, (name, values)) in chart.series.iter().enumerate() {
            let Some(value) = values.get(i).copied().flatten().filter(|v| v.is_finite()) else {
                continue;
            };
            let left = middle + width * (j as f64 - wide as f64 / 2.0);
            bar(out, (left, width), (place, name, j), value, y);
        }
        if i % every == 0 {
            let (at, name) = (BOTTOM + 16.0, clip(place, 14));
            let _ = write!(out, "<text class=x x={middle:.1} y={at}>{name}</text>");
        }
    }
}

fn legend(out: &mut String, chart: &Bars) {
    out.push_str("<ul class=legend>");
    for (j, (name, _)) in chart.series.iter().enumerate() {
        let _ = write!(
            out,
            "<li><svg viewBox=\"0 0 22 10\"><rect class=b{j} x=1 y=1 width=20 height=8 /></svg>{}</li>",
            clip(name, 80)
        );
    }
    out.push_str("</ul>");
}

/// A bar with its value above it, when there is room.
fn bar(
    out: &mut String,
    (left, width): (f64, f64),
    (place, name, j): (&str, &str, usize),
    value: f64,
    y: &Scale,
) {
    let top = y.at(value.max(0.0));
    let _ = write!(
        out,
        "<rect class=b{j} x={:.1} y={top:.1} width={:.1} height={:.1}><title>{} {}: {}</title></rect>",
        left + 1.0,
        (width - 2.0).max(1.0),
        (BOTTOM - top).max(0.5),
        clip(place, 40),
        clip(name, 80),
        num(value)
    );
    if width >= 26.0 {
        let text = match num(value) {
            text if text.len() > 5 => num_short(format!("{value:.2e}").parse().unwrap_or(value)),
            text => text,
        };
        let _ = write!(
            out,
            "<text class=val x={:.1} y={:.1}>{text}</text>",
            left + width / 2.0,
            top - 3.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_take_missing_and_odd_values() {
        let bar = |values: Vec<Option<f64>>| {
            bars(&Bars {
                title: "t".into(),
                x: "layer".into(),
                y: "distance".into(),
                places: (0..values.len()).map(|i| i.to_string()).collect(),
                series: vec![("s".into(), values)],
            })
        };
        assert!(bar(Vec::new()).contains("<svg"));
        let drawn = bar(vec![None, Some(f64::NAN), Some(0.5), Some(-3.0)]);
        assert!(drawn.contains("0.5") && !drawn.contains("NaN"));
        assert!(bar(vec![Some(1.0); 200]).contains("class=curve"));
    }
}
