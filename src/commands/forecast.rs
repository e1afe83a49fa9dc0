//! Words for what a run would do and why, shared by `plan` and `why`.

use std::collections::HashMap;

use engine::cause;
use engine::forecast::{Forecast, Reason};
use engine::key::{Difference, InputId};
use engine::plan::{Place, Plan, Source, Step};
use engine::recents::Recents;
use serde_json::{Value, json};

use crate::out::clean;

/// One line for the state of a step.
pub fn state(plan: &Plan, forecast: &Forecast) -> (&'static str, String) {
    match forecast {
        Forecast::Cached { .. } => ("cached", String::new()),
        Forecast::Runs { reason: Reason::First, .. } => ("runs", "never done before".into()),
        Forecast::Runs { reason: Reason::Always, .. } => ("runs", "`cache: false`".into()),
        Forecast::Runs { reason: Reason::Changed { .. }, .. } => ("runs", String::new()),
        Forecast::Unknown { because } => ("maybe", format!("after {}", few(plan, because))),
        Forecast::Fetches { names } => ("maybe", fetches(names)),
        Forecast::Broken { message } => ("broken", message.clone()),
    }
}

/// The first of `steps`, with the next one where that is short, and how many more there are.
fn few(plan: &Plan, steps: &[usize]) -> String {
    const LONGEST: usize = 16;
    let mut text = String::new();
    for (at, step) in steps.iter().enumerate() {
        let name = format!("`{}`", plan.steps[*step].name);
        if at > 0 && text.chars().count() + name.chars().count() > LONGEST {
            return format!("{text}, {} more", steps.len() - at);
        }
        text += if at > 0 { ", " } else { "" };
        text += &name;
    }
    text
}

/// What a run fetches first.
pub fn fetches(names: &[String]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`hf:{name}`")).collect();
    format!("{} will be fetched", names.join(", "))
}

/// `cuda, 1 GPU`: where a step computes, if that is anything to tell.
pub fn device(step: &Step) -> Option<String> {
    let gpus = match step.resources.gpu {
        0 => None,
        1 => Some("1 GPU".to_string()),
        n => Some(format!("{n} GPUs")),
    };
    let device = step.params.get("device").and_then(|device| Some(device.as_str()?.to_string()));
    let parts: Vec<String> = device.into_iter().chain(gpus).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// A difference, with the place of what changed.
pub fn difference(plan: &Plan, step: usize, difference: &Difference) -> String {
    match difference {
        Difference::Stage { old, new } => format!("stage `{old}` → `{new}`"),
        Difference::Version { old, new } => format!("the stage's code: version {old} → {new}"),
        Difference::Param { name, old, new } => {
            let origin = plan.steps[step]
                .origins
                .iter()
                .find(|(key, _)| name == *key || name.starts_with(&format!("{key}.")));
            let place = match &plan.steps[step].auto {
                Some(why) if name == "device" => format!("auto: {why}"),
                _ => origin.map_or("by default".into(), |(_, place)| at(place)),
            };
            let place = place + &used(&plan.steps[step], name, old, new);
            clean(&format!("parameter `{name}`: {} → {} ({place})", value(old), value(new)))
        }
        Difference::Input { port, old, new } => input(plan, step, port, old, new),
    }
}

/// Which parameters of the pipeline within a text are new in it, and where their values are from.
fn used(step: &Step, name: &str, old: &Option<Value>, new: &Option<Value>) -> String {
    let texts = |value: &Option<Value>| value.as_ref().map_or(String::new(), Value::to_string);
    let (old, new) = (texts(old), texts(new));
    let of = |parameter: &str| name == parameter || name.starts_with(&format!("{parameter}."));
    let fresh = step
        .uses
        .iter()
        .filter(|one| of(&one.parameter) && new.contains(&one.value) && !old.contains(&one.value));
    fresh.map(|one| format!(", `{}` at {}", one.name, at(&one.place))).collect()
}

/// `mohawk.yaml:31:20`, or `--set`.
pub fn at(place: &Place) -> String {
    match place.line {
        0 => place.file.to_string(),
        line => format!("{}:{line}:{}", place.file, place.column),
    }
}

fn value(value: &Option<Value>) -> String {
    value.as_ref().map_or("absent".into(), Value::to_string)
}

/// `, number 0 → 1`, if an artifact has another number than before.
fn renumbered(old: &InputId, new: &InputId) -> String {
    let number = |id: &InputId| id.index.map_or("none".to_string(), |index| index.to_string());
    match old.index == new.index {
        true => String::new(),
        false => format!(", number {} → {}", number(old), number(new)),
    }
}

fn input(plan: &Plan, step: usize, port: &str, old: &[InputId], new: &[InputId]) -> String {
    let changed = match (old.len(), new.len()) {
        (0, _) => "was not connected before".to_string(),
        (_, 0) => "is not connected any more".to_string(),
        (1, 1) if old[0].digest != new[0].digest => format!(
            "other bytes ({} → {}){}",
            old[0].digest.short(),
            new[0].digest.short(),
            renumbered(&old[0], &new[0])
        ),
        (1, 1) => match (&old[0].name, &new[0].name) {
            (Some(old), Some(new)) if old != new => format!("another name ({old} → {new})"),
            _ => format!("the same bytes{}", renumbered(&old[0], &new[0])),
        },
        (a, b) if a != b => format!("{a} artifact{} → {b}", if a == 1 { "" } else { "s" }),
        (n, _) => {
            let differing = old.iter().zip(new).filter(|(a, b)| a != b).count();
            format!("{differing} of {n} artifacts have other bytes")
        }
    };
    let Some(bound) = plan.steps[step].inputs.iter().find(|p| p.name == port) else {
        return format!("input `{port}` {changed} ({})", at(&plan.steps[step].place));
    };
    let mut sources: Vec<String> = bound
        .sources
        .iter()
        .map(|source| match source {
            Source::Step { step, .. } => format!("step `{}`", plan.steps[*step].name),
            Source::Path { path } => format!("file {}", path.display()),
            Source::Hub { name } => format!("hf:{name}"),
        })
        .collect();
    sources.dedup();
    let more = if sources.len() > 3 { ", …" } else { "" };
    sources.truncate(3);
    clean(&format!(
        "input `{port}` from {}{more}: {changed} ({})",
        sources.join(", "),
        at(&bound.place)
    ))
}

/// The forecast as JSON.
pub fn to_json(plan: &Plan, step: usize, forecast: &Forecast) -> Value {
    let (state, text) = state(plan, forecast);
    let mut object = json!({ "step": plan.steps[step].name, "state": state });
    let planned = &plan.steps[step];
    if let Some(device) = planned.params.get("device").filter(|device| device.is_string()) {
        object["device"] = device;
    }
    if let Some(why) = &planned.auto {
        object["device_auto"] = json!(why);
    }
    if planned.resources.gpu > 0 {
        object["gpus"] = json!(planned.resources.gpu);
    }
    match forecast {
        Forecast::Cached { entry } => object["key"] = json!(entry.key),
        Forecast::Runs { key, reason } => {
            object["key"] = json!(key);
            if let Reason::Changed { nearest, differences } = reason {
                object["nearest"] = json!(nearest.key);
                object["differences"] = json!(differences);
                object["because"] = differences
                    .iter()
                    .map(|d| difference(plan, step, d))
                    .collect::<Vec<_>>()
                    .into();
            } else {
                object["because"] = json!([text]);
            }
        }
        Forecast::Unknown { because } => {
            object["after"] =
                because.iter().map(|&s| plan.steps[s].name.clone()).collect::<Vec<_>>().into();
        }
        Forecast::Fetches { names } => object["fetches"] = json!(names),
        Forecast::Broken { message } => object["message"] = json!(message),
    }
    object
}

/// Steps told behind the inputs of one, at most.
const DEPTH: usize = 12;

/// What is behind the inputs that changed, up the steps: of each step that made other bytes, in what
/// it differs from when it made the earlier ones.
pub fn causes(
    plan: &Plan,
    found: &HashMap<usize, Forecast>,
    recents: &Recents<'_>,
    step: usize,
) -> Vec<Value> {
    let Some(Forecast::Runs { reason: Reason::Changed { differences, .. }, .. }) = found.get(&step)
    else {
        return Vec::new();
    };
    behind(plan, found, recents, (step, differences), &mut Vec::new())
}

/// The same behind `differences` of a step; each step is told once (`told`).
pub fn behind(
    plan: &Plan,
    found: &HashMap<usize, Forecast>,
    recents: &Recents<'_>,
    (step, differences): (usize, &[Difference]),
    told: &mut Vec<usize>,
) -> Vec<Value> {
    let mut all = Vec::new();
    for one in differences {
        for cause in cause::behind(plan, found, recents, step, one) {
            if told.len() >= DEPTH || told.contains(&cause.step) {
                continue;
            }
            told.push(cause.step);
            let words = cause.differences.iter().map(|d| difference(plan, cause.step, d));
            let words: Vec<String> = words.collect();
            let mut object = json!({
                "step": plan.steps[cause.step].name,
                "differences": cause.differences,
                "because": words,
            });
            let upstream = behind(plan, found, recents, (cause.step, &cause.differences), told);
            if !upstream.is_empty() {
                object["causes"] = upstream.into();
            }
            all.push(object);
        }
    }
    all
}
