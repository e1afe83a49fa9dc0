//! `pipe show STEP`: parameters, key, artifacts, metrics and log of a step.

use std::process::ExitCode;

use anyhow::Result;
use cache::{Cache, Entry};
use engine::executor::Options;
use engine::forecast::{self, Forecast};
use engine::plan::Step;
use serde_json::{Value, json};

use crate::cli::OfStep;
use crate::out::{self, Paint, bytes, clean, duration};

pub fn show(args: OfStep) -> Result<ExitCode> {
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let loaded = super::load_for_step(args.file.as_deref(), &args.settings, &cache)?;
    let plan = &loaded.plan;
    let at = super::one_step(&loaded, &args.step)?;
    let steps = Options { only: Some(at), ..Options::default() }.selection(plan);
    let mut found = forecast::forecast(plan, &steps, super::REGISTRY, &cache, &super::hub())?;
    let (step, forecast) = (&plan.steps[at], found.remove(&at).expect("asked for"));
    let entry = match &forecast {
        Forecast::Cached { entry } => Some(&**entry),
        _ => None,
    };
    if args.json {
        let mut object = super::forecast::to_json(plan, at, &forecast);
        object["stage"] = json!(step.stage);
        object["params"] = step.params.value();
        if let Some(entry) = entry {
            object["outputs"] = json!(entry.outputs);
            object["provenance"] = entry.provenance.clone();
            object["metrics"] = metrics(&cache, entry).unwrap_or(Value::Null);
            object["log"] = json!(entry.log.map(|(digest, _)| digest));
        }
        out::line(serde_json::to_string_pretty(&object)?);
        return Ok(ExitCode::SUCCESS);
    }
    head(plan, step, &forecast);
    if let Some(entry) = entry {
        result(&cache, entry);
    }
    Ok(ExitCode::SUCCESS)
}

fn head(plan: &engine::plan::Plan, step: &Step, forecast: &Forecast) {
    let paint = Paint::stdout();
    let (state, text) = super::forecast::state(plan, forecast);
    out::line(format!("{} {} (stage `{}`)", paint.bold(&clean(&step.name)), state, step.stage));
    if !text.is_empty() {
        out::line(format!("  {}", clean(&text)));
    }
    if let Some(device) = super::forecast::device(step) {
        out::line(format!("{} {device}", paint.bold("on")));
    }
    let place = |name: &String| match (step.origins.get(name), &step.auto) {
        (_, Some(why)) if name == "device" => format!("auto: {why}"),
        (Some(place), _) if place.line > 0 => {
            format!("{}:{}:{}", place.file, place.line, place.column)
        }
        (Some(place), _) => place.file.to_string(),
        (None, _) => "by default".into(),
    };
    let params = step.params.value();
    if let Some(params) = params.as_object().filter(|params| !params.is_empty()) {
        out::line(paint.bold("parameters"));
        for (name, value) in params {
            out::line(format!(
                "  {name:<18} {:<20} {}",
                clean(&value.to_string()),
                paint.dim(&clean(&place(name)))
            ));
        }
    }
}

fn result(cache: &Cache, entry: &Entry) {
    let paint = Paint::stdout();
    out::line(format!("{} {}", paint.bold("key"), entry.key));
    out::line(paint.bold("artifacts"));
    for output in &entry.outputs {
        let index = output.index.map_or(String::new(), |i| format!("[{i}]"));
        let gone = if cache.present(output) { "" } else { "  (bytes are gone)" };
        let name = format!("{}{index}", output.port);
        out::line(format!(
            "  {name:<18} {:>10}  {}{gone}",
            bytes(output.bytes),
            output.digest.short()
        ));
    }
    let text =
        |name: &str| entry.provenance.get(name).and_then(Value::as_str).unwrap_or("?").to_string();
    let seconds = entry.provenance.get("seconds").and_then(Value::as_f64).unwrap_or(0.0);
    out::line(format!(
        "{} {} in run {} of `{}` ({})",
        paint.bold("made in"),
        duration(seconds),
        text("run"),
        clean(&text("pipeline")),
        text("build")
    ));
    if let Some(metrics) = metrics(cache, entry) {
        out::line(paint.bold("metrics"));
        flat("", &metrics, &mut |name, value| out::line(format!("  {name:<34} {value}")));
    }
    if let Some((digest, size)) = entry.log {
        out::line(format!("{} {} ({})", paint.bold("log"), digest.short(), bytes(size)));
    }
}

/// The `metrics` artifact, if the step has one.
fn metrics(cache: &Cache, entry: &Entry) -> Option<Value> {
    let output = entry.outputs.iter().find(|output| output.port == "metrics")?;
    serde_json::from_slice(&cache.read(&output.digest).ok()?).ok()
}

/// Scalars of nested JSON by dotted name; long lists (curves) by their length.
fn flat(name: &str, value: &Value, tell: &mut impl FnMut(&str, String)) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let path = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flat(&path, inner, tell);
            }
        }
        Value::Array(items) if items.len() > 8 || items.iter().any(Value::is_array) => {
            tell(name, format!("{} values", items.len()));
        }
        Value::Array(items) => {
            for (i, inner) in items.iter().enumerate() {
                flat(&format!("{name}[{i}]"), inner, tell);
            }
        }
        other => tell(name, clean(&other.to_string())),
    }
}
