//! Metrics as lines of JSON: one for each value at each point, and the last values of each step.

use serde_json::json;

use super::Course;
use crate::run::Past;

/// The lines of a run.
pub fn jsonl(past: &Past, courses: &[Course]) -> String {
    let mut out = String::new();
    for (step, course) in past.plan.steps.iter().zip(courses) {
        for point in &course.points {
            for (name, value) in &point.values {
                let line = json!({
                    "run": past.info.id, "step": step.name, "at": point.at,
                    "time": past.info.started_s + point.t, "metric": name, "value": value,
                });
                out += &line.to_string();
                out.push('\n');
            }
        }
        for (name, value) in &course.facts.metrics {
            let line = json!({
                "run": past.info.id, "step": step.name, "metric": name, "value": value,
            });
            out += &line.to_string();
            out.push('\n');
        }
    }
    out
}
