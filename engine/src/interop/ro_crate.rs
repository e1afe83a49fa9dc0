//! A finished run as an RO-Crate 1.1 with the profile Process Run Crate 0.5: what was run, by which
//! program, from what, to what. Small results and the pipeline's files travel along; of big ones the
//! digest and size are told.

use std::collections::{BTreeMap, BTreeSet};

use cache::{Cache, Kind, Output};
use serde_json::{Map, Value, json};

use super::{Course, plain};
use crate::event::Event;
use crate::plan::{Plan, Source};
use crate::run::{Past, timestamp};

const CONTEXT: &str = "https://w3id.org/ro/crate/1.1/context";
const CRATE: &str = "https://w3id.org/ro/crate/1.1";
const PROFILE: &str = "https://w3id.org/ro/wfrun/process/0.5";
/// Bigger artifacts stay in the cache.
const MOST_BYTES: u64 = 4 << 20;
/// The file that makes a directory a crate.
const METADATA: &str = "ro-crate-metadata.json";

/// Files by their path below the directory to write. `license` is a URL or a text.
pub fn files(
    past: &Past,
    courses: &[Course],
    cache: &Cache,
    license: &str,
) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut made = Crate { files: BTreeMap::new(), graph: Vec::new(), known: BTreeSet::new() };
    let mut parts = made.sources(past)?;
    for (step, course) in past.plan.steps.iter().zip(courses) {
        for output in &course.facts.outputs {
            let id = made.artifact(&step.name, output, cache)?;
            if made.files.contains_key(&id) {
                parts.push(reference(&id));
            }
        }
    }
    let actions = made.actions(past, courses);
    let root = json!({
        "@id": "./",
        "@type": "Dataset",
        "name": format!("run {} of {}", past.info.id, past.info.pipeline),
        "description": description(past),
        "datePublished": date(past.info.started_s + end(past)),
        "license": made.license(license),
        "conformsTo": reference(PROFILE),
        "hasPart": parts,
        "mentions": actions,
    });
    let about = json!({
        "@id": METADATA,
        "@type": "CreativeWork",
        "conformsTo": reference(CRATE),
        "about": reference("./"),
    });
    made.add(json!({
        "@id": PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5",
    }));
    let mut graph = vec![about, root];
    graph.append(&mut made.graph);
    let metadata = json!({ "@context": CONTEXT, "@graph": graph });
    made.files.insert(METADATA.into(), serde_json::to_vec_pretty(&metadata)?);
    Ok(made.files)
}

/// A crate being made.
struct Crate {
    files: BTreeMap<String, Vec<u8>>,
    graph: Vec<Value>,
    known: BTreeSet<String>,
}

fn reference(id: &str) -> Value {
    json!({ "@id": id })
}

fn end(past: &Past) -> f64 {
    past.events.last().map_or(0.0, |last| last.t)
}

fn description(past: &Past) -> String {
    let done = past.events.iter().rev().find_map(|stamped| match &stamped.event {
        Event::Ended { summary } => Some(summary),
        _ => None,
    });
    let counts = done.map_or(String::new(), |summary| {
        format!(": {} steps cached, {} ran", summary.cached, summary.ran)
    });
    format!("pipe {}{counts}", past.info.args.join(" "))
}

/// `2026-11-23T17:01:02+00:00`.
fn date(seconds: f64) -> String {
    let text = timestamp(seconds as u64);
    format!(
        "{}-{}-{}T{}:{}:{}+00:00",
        &text[..4],
        &text[4..6],
        &text[6..8],
        &text[9..11],
        &text[11..13],
        &text[13..15]
    )
}

impl Crate {
    /// Adds an entity once.
    fn add(&mut self, entity: Value) {
        let id = entity["@id"].as_str().unwrap_or_default().to_string();
        if self.known.insert(id) {
            self.graph.push(entity);
        }
    }

    fn license(&mut self, license: &str) -> Value {
        if !license.starts_with("https://") && !license.starts_with("http://") {
            return license.into();
        }
        let name = license.trim_end_matches('/').rsplit('/').next().unwrap_or(license);
        let entity = json!({ "@id": license, "@type": "CreativeWork", "name": name });
        self.add(entity);
        reference(license)
    }

    /// The pipeline's files as they were read.
    fn sources(&mut self, past: &Past) -> anyhow::Result<Vec<Value>> {
        let mut parts = Vec::new();
        for item in std::fs::read_dir(&past.dir)?.flatten() {
            let name = item.file_name().to_string_lossy().into_owned();
            let Some(rest) = name.strip_prefix("source-") else { continue };
            let bytes = std::fs::read(item.path())?;
            let id = format!("pipeline/{}", plain(rest));
            self.add(json!({
                "@id": id, "@type": "File", "name": rest.split_once('-').map_or(rest, |(_, name)| name),
                "encodingFormat": "application/yaml", "contentSize": bytes.len().to_string(),
            }));
            parts.push(reference(&id));
            self.files.insert(id, bytes);
        }
        parts.sort_by_key(Value::to_string);
        Ok(parts)
    }

    /// An artifact: with its bytes if it is a small file, else by its digest. Gives its id.
    fn artifact(&mut self, step: &str, output: &Output, cache: &Cache) -> anyhow::Result<String> {
        let index = output.index.map_or(String::new(), |index| format!("[{index}]"));
        let name = format!("{step}.{}{index}", output.port);
        let identifier = format!("blake3:{}", output.digest);
        let small =
            output.kind == Kind::File && output.bytes <= MOST_BYTES && cache.present(output);
        if !small {
            let id = format!("#{identifier}");
            self.add(json!({
                "@id": id, "@type": "CreativeWork", "name": name, "identifier": identifier,
                "contentSize": output.bytes.to_string(),
            }));
            return Ok(id);
        }
        let id = format!(
            "results/{}/{}",
            plain(&format!("{step}.{}{index}", output.port)),
            plain(&output.name)
        );
        let mut entity = json!({
            "@id": id, "@type": "File", "name": name, "identifier": identifier,
            "contentSize": output.bytes.to_string(),
        });
        if output.name.ends_with(".json") {
            entity["encodingFormat"] = "application/json".into();
        }
        self.add(entity);
        self.files.insert(id.clone(), std::fs::read(cache.object(&output.digest))?);
        Ok(id)
    }

    /// An action for every step that was done or tried.
    fn actions(&mut self, past: &Past, courses: &[Course]) -> Vec<Value> {
        let times = times(past);
        let mut actions = Vec::new();
        for (at, (step, course)) in past.plan.steps.iter().zip(courses).enumerate() {
            if !matches!(course.facts.state, "ran" | "cached" | "failed") {
                continue;
            }
            let program = format!("#stage-{}", plain(&step.stage));
            self.add(json!({
                "@id": program, "@type": "SoftwareApplication", "name": format!("stage {}", step.stage),
                "softwareVersion": past.info.build,
            }));
            let id = format!("#step-{}", plain(&step.name));
            let results: Vec<Value> =
                course.facts.outputs.iter().map(|output| self.id_of(&step.name, output)).collect();
            let mut action = json!({
                "@id": id, "@type": "CreateAction", "name": step.name,
                "instrument": reference(&program),
                "object": self.objects(&past.plan, at, courses),
                "result": results,
                "description": step.params.value().to_string(),
                "actionStatus": reference(match course.facts.state {
                    "failed" => "http://schema.org/FailedActionStatus",
                    _ => "http://schema.org/CompletedActionStatus",
                }),
            });
            if let Some((from, to)) = times.get(&at) {
                action["startTime"] = date(past.info.started_s + from).into();
                action["endTime"] = date(past.info.started_s + to).into();
            }
            self.add(action);
            actions.push(reference(&id));
        }
        actions
    }

    /// The reference to an artifact that was added before.
    fn id_of(&self, step: &str, output: &Output) -> Value {
        let index = output.index.map_or(String::new(), |index| format!("[{index}]"));
        let name = plain(&format!("{step}.{}{index}", output.port));
        let file = format!("results/{name}/{}", plain(&output.name));
        match self.files.contains_key(&file) {
            true => reference(&file),
            false => reference(&format!("#blake3:{}", output.digest)),
        }
    }

    /// What a step took.
    fn objects(&mut self, plan: &Plan, at: usize, courses: &[Course]) -> Vec<Value> {
        let mut objects = Vec::new();
        for source in plan.steps[at].inputs.iter().flat_map(|port| &port.sources) {
            match source {
                Source::Step { step, port, index } => {
                    let Some(course) = courses.get(*step) else { continue };
                    let wanted =
                        |o: &&Output| o.port == *port && (index.is_none() || o.index == *index);
                    let outputs = course.facts.outputs.iter().filter(wanted);
                    objects
                        .extend(outputs.map(|output| self.id_of(&plan.steps[*step].name, output)));
                }
                Source::Path { path } => {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    objects.push(self.outside(&format!("#file-{}", plain(&name)), &name));
                }
                Source::Hub { name } => {
                    let owner = name.split(['@', '#']).next().unwrap_or(name);
                    let url = format!("https://huggingface.co/{owner}");
                    objects.push(self.outside(&url, name));
                }
            }
        }
        objects
    }

    /// Something that is not in the crate.
    fn outside(&mut self, id: &str, name: &str) -> Value {
        let entity: Map<String, Value> = [
            ("@id".to_string(), id.into()),
            ("@type".to_string(), "CreativeWork".into()),
            ("name".to_string(), name.into()),
        ]
        .into_iter()
        .collect();
        self.add(entity.into());
        reference(id)
    }
}

/// Beginning and end of the last attempt of each step, in seconds of the run.
fn times(past: &Past) -> BTreeMap<usize, (f64, f64)> {
    let mut times = BTreeMap::new();
    for stamped in &past.events {
        match &stamped.event {
            Event::Launched { step, .. } => {
                times.insert(*step, (stamped.t, stamped.t));
            }
            Event::Finished { step, .. } | Event::Failed { step, .. } => {
                if let Some((_, to)) = times.get_mut(step) {
                    *to = stamped.t;
                }
            }
            _ => {}
        }
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_iso() {
        assert_eq!(date(1_795_453_262.9), "2026-11-23T17:01:02+00:00");
    }
}
