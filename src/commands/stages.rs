//! `pipe stages`: every stage's ports and parameters, from the types.

use std::process::ExitCode;

use anyhow::{Result, bail};
use engine::stage::Entry;
use serde_json::{Value, json};

use crate::cli::Stages;
use crate::out::{self, Paint};

pub fn stages(args: Stages) -> Result<ExitCode> {
    let wanted = |entry: &&Entry| args.name.as_ref().is_none_or(|name| name == entry.name);
    let found: Vec<&Entry> = super::REGISTRY.0.iter().filter(wanted).collect();
    if let (Some(name), true) = (&args.name, found.is_empty()) {
        let names: Vec<&str> = super::REGISTRY.0.iter().map(|entry| entry.name).collect();
        let hint = engine::diagnostic::suggest(name, "stages", names).unwrap_or_default();
        bail!(super::Wrong(format!("unknown stage `{name}`\nhint: {hint}")));
    }
    if args.json {
        let all: Vec<Value> = found.iter().map(|entry| to_json(entry)).collect();
        out::line(serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    for entry in found {
        describe(entry, args.name.is_some());
    }
    if args.name.is_none() {
        out::line("\n`pipe stages NAME` describes parameters in full");
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(entry: &Entry, full: bool) {
    let paint = Paint::stdout();
    let gpu = if entry.gpu { ", CPU or GPU" } else { "" };
    out::line(format!(
        "{} {}",
        paint.bold(entry.name),
        paint.dim(&format!("(version {}{gpu})", entry.version))
    ));
    out::line(format!("  {}", entry.doc));
    let ports = (entry.ports)();
    for port in ports.inputs {
        let marks = [(port.list, "list"), (!port.required, "optional")];
        out::line(row("in ", port.name, &marked(&marks), port.doc));
    }
    for port in ports.outputs {
        out::line(row("out", port.name, &marked(&[(port.list, "list")]), port.doc));
    }
    let schema = (entry.schema)();
    let fields = schema["properties"].as_object().cloned().unwrap_or_default();
    if !full {
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        if !names.is_empty() {
            out::line(format!("  with {}", names.join(", ")));
        }
        return;
    }
    for (name, field) in fields {
        let default = match field.get("default") {
            Some(value) => format!(" [{value}]"),
            None => String::new(),
        };
        let text = field["description"].as_str().unwrap_or("").replace('\n', " ");
        out::line(row("with", &name, &default, &text));
    }
}

fn row(kind: &str, name: &str, marks: &str, text: &str) -> String {
    format!("  {kind:<4} {:<28} {text}", format!("{name}{marks}"))
}

fn marked(marks: &[(bool, &str)]) -> String {
    let set: Vec<&str> = marks.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
    if set.is_empty() { String::new() } else { format!(" ({})", set.join(", ")) }
}

fn to_json(entry: &Entry) -> Value {
    let ports = (entry.ports)();
    let input = |p: &engine::stage::In| json!({ "name": p.name, "doc": p.doc, "list": p.list, "required": p.required });
    let output = |p: &engine::stage::Out| json!({ "name": p.name, "doc": p.doc, "list": p.list });
    json!({
        "name": entry.name,
        "version": entry.version,
        "gpu": entry.gpu,
        "doc": entry.doc,
        "inputs": ports.inputs.iter().map(input).collect::<Vec<_>>(),
        "outputs": ports.outputs.iter().map(output).collect::<Vec<_>>(),
        "params": (entry.schema)(),
    })
}
