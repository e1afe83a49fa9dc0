//! JSON Schema (draft 2020-12) of a pipeline file, for editors.
//!
//! The stages' own schemas go in as they are; `with` and `in` depend on `stage`.

use serde_json::{Map, Value, json};

use crate::stage::{Entry, In, Registry};

/// The schema of a pipeline over these stages.
pub fn schema(registry: &Registry) -> Value {
    let mut definitions = Map::new();
    for entry in registry.0 {
        let mut schema = (entry.schema)();
        rebase(&mut schema, &format!("#/$defs/with_{}", entry.name));
        if let Some(object) = schema.as_object_mut() {
            object.remove("$schema");
            open(object);
        }
        definitions.insert(format!("with_{}", entry.name), schema);
    }
    definitions.insert("step".into(), step(registry));
    definitions.insert("profile".into(), profile());
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pipeline",
        "type": "object",
        "required": ["steps"],
        "additionalProperties": false,
        "patternProperties": { "^x-": {} },
        "properties": {
            "name": { "type": "string", "description": "What the pipeline is called; by default the file's name." },
            "include": {
                "description": "Other files whose params, profiles and steps are added; relative to this file.",
                "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }]
            },
            "params": { "type": "object", "description": "Values for `${params.NAME}`, overridden by `--set NAME=VALUE`." },
            "profiles": {
                "type": "object",
                "description": "Named changes to params and steps: `pipe run --profile NAME`.",
                "additionalProperties": { "$ref": "#/$defs/profile" }
            },
            "steps": {
                "type": "object",
                "description": "What is done, by name. A step runs when what it needs is there, whatever the order here.",
                "additionalProperties": { "$ref": "#/$defs/step" }
            },
            "executor": executor(),
            "outputs": {
                "type": "object",
                "description": "What to copy where after a run; `to` is relative to the current directory.",
                "additionalProperties": {
                    "type": "object",
                    "required": ["from", "to"],
                    "additionalProperties": false,
                    "properties": {
                        "from": { "type": "string", "description": "`step.port`" },
                        "to": { "type": "string", "description": "A path; nothing that we did not write is overwritten." }
                    }
                }
            }
        },
        "$defs": definitions
    })
}

fn step(registry: &Registry) -> Value {
    let mut step = json!({
        "type": "object",
        "required": ["stage"],
        "properties": fields(),
        "additionalProperties": false,
        "allOf": registry.0.iter().map(branch).collect::<Vec<_>>()
    });
    // One by one, so that an editor says beside each name what it is.
    let mut stages: Vec<Value> = registry.0.iter().map(one).collect();
    stages.push(json!({ "type": "string", "pattern": "\\$\\{" }));
    step["properties"]["stage"] =
        json!({ "anyOf": stages, "description": "What kind of work it is." });
    step
}

fn one(entry: &Entry) -> Value {
    json!({ "const": entry.name, "description": entry.doc })
}

/// What `stage: X` says about `with` and `in`.
fn branch(entry: &Entry) -> Value {
    let then = if entry.name == "command" {
        json!({ "required": ["run"], "properties": { "with": false } })
    } else {
        let inputs = (entry.ports)().inputs;
        let required: Vec<&str> = inputs.iter().filter(|p| p.required).map(|p| p.name).collect();
        let doc = |port: &In| (port.name.to_string(), json!({ "description": port.doc }));
        let ports: Map<String, Value> = inputs.iter().map(doc).collect();
        json!({ "properties": {
            "with": { "$ref": format!("#/$defs/with_{}", entry.name) },
            "in": { "properties": ports, "required": required, "additionalProperties": false },
            "run": false, "out": false, "env": false, "secrets": false
        } })
    };
    json!({ "if": { "required": ["stage"], "properties": { "stage": { "const": entry.name } } }, "then": then })
}

fn fields() -> Value {
    let source = json!({ "type": ["string", "null", "array"], "items": { "type": "string" } });
    let text = json!({ "type": ["string", "number", "boolean"] });
    json!({
        "in": { "type": "object", "additionalProperties": source,
            "description": "What feeds each input port: `step.port`, `step[VALUE].port`, `step[*].port`, a path (`./`, `../`, `/`, `~/`) or `hf:owner/name@revision`, with `#file` for one file of it." },
        "with": { "type": "object", "description": "The stage's parameters." },
        "matrix": { "type": ["object", "null"], "description": "Axes and their values, `0..3` or a list: one instance for every combination but those of `exclude`." },
        "resources": {
            "type": "object", "additionalProperties": false,
            "description": "What it takes while it runs.",
            "properties": {
                "cpu": { "type": ["integer", "string"], "description": "Cpu slots." },
                "gpu": { "type": ["integer", "string"], "description": "Whole GPUs." },
                "memory": { "type": ["integer", "string"], "description": "`8GiB`, or bytes." },
                "gpu_type": { "type": "string", "description": "Which GPUs, as a cluster calls them." },
                "time": { "type": ["number", "string"], "description": "Wall time to ask a cluster for: `90` seconds, `10m`, `2h`." },
                "vram": { "type": ["integer", "string"], "description": "Free memory on each GPU: `8GiB`, or bytes." }
            }
        },
        "retries": { "type": ["integer", "string"], "description": "How often to try again after a crash, a failing GPU, too little memory or a time-out." },
        "timeout": { "type": ["number", "string"], "description": "`90` seconds, `10m`, `2h`." },
        "after": { "type": ["string", "array"], "items": { "type": "string" }, "description": "Steps that must be done first though nothing flows." },
        "cache": { "type": ["boolean", "string"], "description": "`false`: always run." },
        "run": { "type": ["array", "string"], "items": text, "description": "Program and arguments; one text is a program for `sh` (a program and its arguments are started without it). `${in.PORT}` and `${out.PORT}` are paths, `${checkpoint}` is a directory that outlives an interruption." },
        "out": { "type": ["array", "object"], "description": "Output ports, or ports and file names." },
        "env": { "type": "object", "additionalProperties": text, "description": "Environment variables; part of the key." },
        "secrets": { "type": "array", "items": { "type": "string" }, "description": "Variables passed through; never part of the key, masked." }
    })
}

/// How a run uses a cluster (`pipe run --on slurm`).
fn executor() -> Value {
    let said = |mut rule: Value, what: &str| {
        rule["description"] = what.into();
        rule
    };
    let text = |what: &str| said(json!({ "type": "string" }), what);
    let texts = |what: &str| said(json!({ "type": "array", "items": { "type": "string" } }), what);
    let number = |what: &str| said(json!({ "type": "integer", "minimum": 1 }), what);
    let span = |what: &str| {
        said(
            json!({ "type": ["number", "string"] }),
            &format!("{what}: `90` seconds, `10m`, `2h`."),
        )
    };
    let mode = json!({ "enum": ["auto", "submit", "pilot"] });
    let store = json!({ "enum": ["shared", "remote"] });
    let slurm = json!({
        "partition": text("Partition of the jobs."),
        "account": text("Account they are charged to."),
        "qos": text("Quality of service."),
        "program": text("The `pipe` that nodes run, if it is not the leader's own."),
        "time": span("Wall time of jobs whose step says none"),
        "idle": span("After so long without a step a pilot ends"),
        "margin": span("So long before the end of its time a step saves a checkpoint and stops"),
        "poll": span("The longest pause between two questions to Slurm"),
        "leader_time": span("Wall time of the leader's own job (`--detach`)"),
        "memory": said(json!({ "type": ["integer", "string"] }), "Memory of jobs whose step says none: `8GiB`, or bytes."),
        "cpus": number("Cpus of steps that take all there are."),
        "max_jobs": number("Steps that are queued or running at a time."),
        "pilots": number("Pilots of one shape at a time."),
        "mode": said(mode, "One job a step, or pilots: a few jobs that take many steps."),
        "extra": texts("More arguments of every `sbatch`."),
        "store": said(store, "By what leader and nodes share results: a cache that all see, or the run's remote."),
        "node_cache": text("With `store: remote`, where a node keeps its cache; `$NAME` is a variable of the job."),
        "setup": texts("Lines of the job's script before it: `module load cuda`.")
    });
    json!({
        "type": "object",
        "additionalProperties": false,
        "description": "How `pipe run --on slurm` uses Slurm.",
        "properties": { "slurm": {
            "type": "object", "additionalProperties": false, "properties": slurm,
            "description": "What a site and a pipeline want of Slurm."
        } }
    })
}

fn profile() -> Value {
    json!({
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "params": { "type": "object", "description": "Values laid over the file's `params`." },
            "executor": executor(),
            "steps": { "type": "object", "description": "Steps to change, by name.",
                "additionalProperties": { "type": "object",
                    "properties": fields(), "description": "Fields laid over the step's; `null` takes one away." } }
        }
    })
}

/// Lets `#/$defs/X` of a stage's schema mean the same inside this one.
fn rebase(schema: &mut Value, at: &str) {
    match schema {
        Value::Object(object) => {
            if let Some(Value::String(target)) = object.get_mut("$ref")
                && let Some(rest) = target.strip_prefix('#')
            {
                *target = format!("{at}{rest}");
            }
            object.values_mut().for_each(|value| rebase(value, at));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| rebase(value, at)),
        _ => {}
    }
}

/// Any parameter may be a `${…}` in place of its value, and so may what is inside a list; numbers may
/// be texts like `2e6`, lists ranges.
fn open(object: &mut Map<String, Value>) {
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        for schema in properties.values_mut() {
            let told = ["description", "default"].map(|word| (word, schema.get(word).cloned()));
            if let Some(items) = schema.get_mut("items") {
                *items = or_filled(items.take());
            }
            *schema = or_filled(schema.take());
            for (word, value) in told {
                if let Some(value) = value {
                    schema[word] = value;
                }
            }
        }
    }
}

fn or_filled(schema: Value) -> Value {
    json!({ "anyOf": [schema, { "type": "string", "pattern": "\\$\\{|^[-+0-9._eE]+$" }] })
}
