//! The page's charts: loss curves by group of steps, figures by layer, recall over distance.

use std::collections::{BTreeMap, BTreeSet};

use super::bars::{Bars, bars};
use super::chart::{Ink, Lines, Series, lines};
use super::data::{Curve, Group, Run, State, Step};
use super::evaluations::{plain, without_seed};
use super::markup::{count, thousands};
use super::metrics::{Bucket, Evaluation, Layer, Metrics};

/// Charts of one section.
const MOST_CHARTS: usize = 24;

fn curve<'a>(step: &'a Step) -> &'a Curve {
    match &step.metrics {
        Metrics::Training { curve, .. } if !curve.is_empty() => curve,
        _ => &step.curve,
    }
}

/// Whether it is the loss of a step's only layer, which is the step's loss.
fn is_loss_again(steps: &[&Step], name: &str) -> bool {
    let same = |values: &BTreeMap<String, f64>| match values.get(name) {
        Some(value) => values.get("loss") == Some(value),
        None => true,
    };
    name.starts_with("loss.") && steps.iter().all(|step| curve(step).values().all(same))
}

/// Whether there may be more points later.
fn is_open(step: &Step) -> bool {
    step.state == State::Running && !step.curve.is_empty()
}

/// Whether a value belongs into the chart of the loss.
fn is_loss(name: &str) -> bool {
    name == "loss" || name.starts_with("loss") || name.ends_with("loss")
}

/// Loss curves, a chart for every group of training steps; what else was measured, folded away.
pub(super) fn curves(run: &Run) -> String {
    let (mut main, mut more) = (Vec::new(), Vec::new());
    for group in &run.groups {
        // What was told once only (an evaluation's figures) is no curve.
        let steps: Vec<&Step> = group.steps.iter().map(|&step| &run.steps[step]).collect();
        if steps.iter().all(|step| curve(step).len() < 2 && !is_open(step)) {
            continue;
        }
        let mut names: BTreeSet<&str> = BTreeSet::new();
        for step in &steps {
            for values in curve(step).values() {
                names.extend(values.keys().map(String::as_str));
            }
        }
        names.retain(|name| !is_loss_again(&steps, name));
        let (mut losses, mut others): (Vec<&str>, Vec<&str>) =
            names.into_iter().partition(|name| is_loss(name));
        if losses.is_empty() {
            losses = std::mem::take(&mut others);
        }
        if losses.is_empty() {
            continue;
        }
        main.push(chart(group, &steps, &losses));
        more.extend(others.into_iter().map(|name| chart(group, &steps, &[name])));
    }
    let mut out = grid(&main);
    if !more.is_empty() {
        let n = count(more.len(), "more chart");
        out += &format!(
            "<details class=more><summary>{n}: learning rates, norms and the like</summary>{}</details>",
            grid(&more)
        );
    }
    out
}

/// What layers' figures are sorted by: `loss.2` comes before `loss.10`.
fn by_number(name: &str) -> (&str, Option<u64>) {
    match name.rsplit_once('.').map(|(stem, number)| (stem, number.parse())) {
        Some((stem, Ok(number))) => (stem, Some(number)),
        _ => (name, None),
    }
}

fn grid(charts: &[Lines]) -> String {
    if charts.is_empty() {
        return String::new();
    }
    let drawn: String = charts.iter().take(MOST_CHARTS).map(lines).collect();
    let hidden = charts.len().saturating_sub(MOST_CHARTS);
    let rest = if hidden > 0 {
        format!("<p class=none>{hidden} more charts are not drawn.</p>")
    } else {
        String::new()
    };
    format!("<div class=grid>{drawn}</div>{rest}")
}

fn chart(group: &Group, steps: &[&Step], names: &[&str]) -> Lines {
    let mut names = names.to_vec();
    names.sort_by_key(|name| by_number(name));
    let mut series = Vec::new();
    for step in steps {
        for name in &names {
            let points: Vec<(f64, f64)> = curve(step)
                .iter()
                .filter_map(|(&at, values)| Some((at as f64, *values.get(*name)?)))
                .collect();
            if points.is_empty() {
                continue;
            }
            let called = match (steps.len(), names.len()) {
                (1, _) => (*name).to_string(),
                (_, 1) => instance(step),
                _ => format!("{} {name}", instance(step)),
            };
            series.push((without_seed(step), Series { name: called, points, ink: Ink::Quiet }));
        }
    }
    let inks = inks(steps, series.iter().map(|(family, _)| family.as_str()), names.len());
    let mut series: Vec<Series> = series.into_iter().map(|(_, series)| series).collect();
    series.iter_mut().zip(inks).for_each(|(series, ink)| series.ink = ink);
    let y = match names.as_slice() {
        losses if losses.iter().all(|name| by_number(name).0 == "loss") => loss_unit(group.stage),
        [one] => (*one).to_string(),
        _ => "value".into(),
    };
    Lines { title: title(group), x: "update".into(), y, places: Vec::new(), ends: None, series }
}

fn title(group: &Group) -> String {
    match group.steps.len() {
        1 => group.name.to_string(),
        n => format!("{} ×{n}", group.name),
    }
}

/// What the losses of the method are measured in.
fn loss_unit(stage: &str) -> String {
    match stage {
        "pretrain" | "distill" => "loss, nats per token".into(),
        "orient" => "loss, ‖M − A‖_F per head".into(),
        "align" => "loss, L2 distance of block outputs".into(),
        _ => "loss".into(),
    }
}

/// The coordinates of an instance: `layer 2`, `lr=3e-4 seed=1`.
fn instance(step: &Step) -> String {
    match step.plan.coords.as_slice() {
        [] => step.plan.name.clone(),
        [(axis, value)] => format!("{axis} {}", plain(value)),
        many => many
            .iter()
            .map(|(axis, value)| format!("{axis}={}", plain(value)))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

/// Seeds of one thing share a colour; many instances along one axis get a ramp.
fn inks<'a>(steps: &[&Step], families: impl Iterator<Item = &'a str>, names: usize) -> Vec<Ink> {
    let families: Vec<&str> = families.collect();
    let mut distinct: Vec<&str> = Vec::new();
    families.iter().for_each(|family| {
        if !distinct.contains(family) {
            distinct.push(family);
        }
    });
    let seeded = steps.iter().any(|step| step.plan.coords.iter().any(|(axis, _)| axis == "seed"));
    if seeded && names == 1 && distinct.len() > 1 {
        let place = |family: &&str| distinct.iter().position(|known| known == family).unwrap_or(0);
        return families.iter().map(|family| Ink::Palette(place(family))).collect();
    }
    let n = families.len();
    let ramp = n > 8 && names == 1 && steps.iter().all(|step| step.plan.coords.len() == 1);
    (0..n)
        .map(|i| if ramp { Ink::Ramp(i as f64 / (n - 1) as f64) } else { Ink::Palette(i) })
        .collect()
}

/// Bars by layer: of phases that end with figures for each layer, and of evaluations.
pub(super) fn layers(run: &Run, found: &[(&Step, &Evaluation)]) -> String {
    let mut charts = Vec::new();
    for group in &run.groups {
        let mut rows: BTreeMap<i64, super::metrics::Figures> = BTreeMap::new();
        let seeds = group.steps.iter().map(|&step| without_seed(&run.steps[step]));
        let kinds: BTreeSet<String> = seeds.collect();
        for &step in &group.steps {
            if let Metrics::Training { layers, .. } = &run.steps[step].metrics {
                layers.iter().for_each(|(layer, values)| {
                    rows.entry(*layer).or_insert_with(|| values.clone());
                });
            }
        }
        // Several runs over the same layers (an ablation) have no one bar for a layer.
        if kinds.len() <= rows.len().max(1) {
            charts.extend(of_group(group, &rows.into_iter().collect::<Vec<_>>()));
        }
    }
    charts.extend(of_evaluations(found));
    charts.retain(|chart: &Bars| chart.places.len() > 1);
    charts.truncate(MOST_CHARTS);
    if charts.is_empty() {
        return String::new();
    }
    format!("<div class=grid>{}</div>", charts.iter().map(bars).collect::<String>())
}

/// `distance` and 0 of `distance.before`, and 1 of `after_distance`.
fn phase(name: &str) -> Option<(String, usize)> {
    let words: Vec<&str> = name.split(['.', '_']).collect();
    let when = |word: &&str| match *word {
        "before" | "start" | "initial" | "first" => Some(0),
        "after" | "end" | "final" | "last" => Some(1),
        _ => None,
    };
    let at = words.iter().position(|word| when(word).is_some())?;
    let rest: Vec<&str> =
        words.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, word)| *word).collect();
    Some((rest.join("_"), when(&words[at])?))
}

/// Whether a figure is a distance or a size, which is what bars by layer are for.
fn is_distance(name: &str) -> bool {
    let words = ["loss", "norm", "dist", "err", "frob", "median", "relative", "a_f"];
    name.is_empty() || words.iter().any(|word| name.to_lowercase().contains(word))
}

fn of_group(group: &Group, rows: &[Layer]) -> Vec<Bars> {
    let names: BTreeSet<&String> = rows.iter().flat_map(|(_, values)| values.keys()).collect();
    let column =
        |name: &str| rows.iter().map(|(_, values)| values.get(name).copied()).collect::<Vec<_>>();
    let mut pairs: BTreeMap<String, [Option<&String>; 2]> = BTreeMap::new();
    let mut single: Vec<&String> = Vec::new();
    for name in names.into_iter().filter(|name| is_distance(name) || phase(name).is_some()) {
        match phase(name) {
            Some((base, when)) => pairs.entry(base).or_default()[when] = Some(name),
            None => single.push(name),
        }
    }
    let chart = |y: String, series: Vec<(String, Vec<Option<f64>>)>| Bars {
        title: group.name.to_string(),
        x: "layer".into(),
        y,
        places: rows.iter().map(|(layer, _)| layer.to_string()).collect(),
        series,
    };
    let mut charts = Vec::new();
    for (base, [before, after]) in pairs {
        let mut series = Vec::new();
        series.extend(before.map(|name| ("before".to_string(), column(name))));
        series.extend(after.map(|name| ("after".to_string(), column(name))));
        charts.push(chart(words(&base), series));
    }
    // ‖A‖_F is the loss of M = 0, so it belongs beside the loss.
    let together = |name: &&String| is_loss(name) || is_norm(name);
    let (beside, apart): (Vec<&String>, Vec<&String>) = single.iter().copied().partition(together);
    if !beside.is_empty() {
        let y = if beside.iter().any(|name| is_norm(name)) {
            "loss beside ‖A‖_F, the loss of M = 0"
        } else {
            "loss"
        };
        let series = beside.iter().take(4).map(|name| (words(name), column(name))).collect();
        charts.push(chart(y.into(), series));
    }
    charts.extend(
        apart.into_iter().take(4).map(|name| chart(words(name), vec![(words(name), column(name))])),
    );
    charts
}

fn is_norm(name: &str) -> bool {
    ["norm", "frob", "a_f"].iter().any(|word| name.to_lowercase().contains(word))
}

fn words(name: &str) -> String {
    if is_norm(name) && !name.contains("rel") && name.len() <= 12 {
        return "‖A‖_F".into();
    }
    if name.is_empty() { "distance".into() } else { name.replace(['_', '.'], " ") }
}

/// Evaluations by what they are called without their seed.
fn families<'a>(found: &[(&Step, &'a Evaluation)]) -> Vec<(String, Vec<&'a Evaluation>)> {
    let mut families: Vec<(String, Vec<&Evaluation>)> = Vec::new();
    for (step, evaluation) in found {
        let name = without_seed(step);
        match families.iter().position(|(known, _)| *known == name) {
            Some(i) => families[i].1.push(evaluation),
            None => families.push((name, vec![evaluation])),
        }
    }
    for (name, members) in families.iter_mut().filter(|(_, members)| members.len() > 1) {
        name.push_str(&format!(", mean of {}", members.len()));
    }
    families
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0.0), |(sum, n), value| (sum + value, n + 1.0));
    (n > 0.0).then(|| sum / n)
}

fn of_evaluations(found: &[(&Step, &Evaluation)]) -> Vec<Bars> {
    let found: Vec<_> = found.iter().copied().filter(|(_, e)| !e.layers.is_empty()).collect();
    let all = || found.iter().flat_map(|(_, e)| &e.layers);
    let names: BTreeSet<&String> = all().flat_map(|(_, values)| values.keys()).collect();
    let places: BTreeSet<i64> = all().map(|(layer, _)| *layer).collect();
    let families = families(&found);
    let column = |members: &[&Evaluation], name: &str| -> Vec<Option<f64>> {
        let at = |layer: i64| {
            let rows = members.iter().flat_map(|e| &e.layers).filter(move |row| row.0 == layer);
            mean(rows.filter_map(|(_, values)| values.get(name).copied()))
        };
        places.iter().map(|&layer| at(layer)).collect()
    };
    let one = |name: &String| Bars {
        title: match found.as_slice() {
            [(step, _)] => step.plan.name.clone(),
            _ => "evaluations".into(),
        },
        x: "layer".into(),
        y: match name.as_str() {
            "first" => "distance of student from teacher at the first token".into(),
            name => format!("{} of student from teacher", words(name)),
        },
        places: places.iter().map(i64::to_string).collect(),
        series: families
            .iter()
            .map(|(family, members)| {
                let called = if families.len() == 1 { words(name) } else { family.clone() };
                (called, column(members, name))
            })
            .collect(),
    };
    names.into_iter().take(3).map(one).collect()
}

/// Recall over the distance between a fact and its question.
pub(super) fn recall(found: &[(&Step, &Evaluation)]) -> String {
    let found: Vec<_> = found.iter().copied().filter(|(_, e)| !e.recall.is_empty()).collect();
    let Some((_, first)) = found.first() else { return String::new() };
    let place = |bucket: &Bucket| format!("{}–{}", bucket.from, bucket.to);
    let places: Vec<String> = first.recall.iter().map(place).collect();
    let points = |members: &[&Evaluation], value: fn(&Bucket) -> Option<f64>| -> Vec<(f64, f64)> {
        let at = |i: usize| mean(members.iter().filter_map(|e| value(e.recall.get(i)?)));
        (0..places.len()).filter_map(|i| Some((i as f64, at(i)?))).collect()
    };
    let teacher = points(&[*first], |bucket| bucket.teacher);
    let mut series = vec![Series { name: "teacher".into(), points: teacher, ink: Ink::Palette(1) }];
    let families = families(&found);
    for (i, (family, members)) in families.iter().enumerate() {
        let name = if families.len() == 1 { "student".into() } else { family.clone() };
        let ink = Ink::Palette(if i == 0 { 0 } else { i + 1 });
        series.push(Series { name, points: points(members, |bucket| bucket.student), ink });
    }
    if let Some(chance) = first.chance() {
        let points = (0..places.len()).map(|i| (i as f64, chance)).collect();
        series.push(Series { name: "chance".into(), points, ink: Ink::Quiet });
    }
    series.retain(|series| !series.points.is_empty());
    let n: f64 = first.recall.iter().filter_map(|bucket| bucket.n).sum();
    lines(&Lines {
        title: "recall over distance".into(),
        x: "tokens between fact and question".into(),
        y: match n {
            n if n > 0.0 => format!("accuracy, {} answers", thousands(n as u64)),
            _ => "accuracy".into(),
        },
        places,
        ends: Some((0.0, 1.0)),
        series,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_before_from_after() {
        assert_eq!(phase("distance.before"), Some(("distance".into(), 0)));
        assert_eq!(phase("after_relative_distance"), Some(("relative_distance".into(), 1)));
        assert_eq!(phase("before"), Some((String::new(), 0)));
        assert_eq!(phase("loss"), None);
    }

    #[test]
    fn layers_are_sorted_by_their_numbers() {
        let mut names = vec!["loss.10", "lr", "loss", "loss.2", "loss.x"];
        names.sort_by_key(|name| by_number(name));
        assert_eq!(names, ["loss", "loss.2", "loss.10", "loss.x", "lr"]);
    }
}
