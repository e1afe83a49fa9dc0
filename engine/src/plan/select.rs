//! Steps named on a command line: `align`, `align[2]`, `align@2`, `train[lr=3e-4,seed=*]`.

use super::matrix::canonical_text;
use super::reference::{coordinates, parse};
use super::{Plan, Step};
use crate::diagnostic::suggest;

impl Plan {
    /// Positions of the steps that `text` means; without a selector, all instances of the step.
    pub fn select(&self, text: &str) -> Result<Vec<usize>, String> {
        if let Some(at) = self.steps.iter().position(|step| step.name == text) {
            return Ok(vec![at]);
        }
        let reference = parse(text)?;
        if reference.port.is_some() {
            let step = text.rsplit_once('.').map_or(text, |(step, _)| step);
            return Err(format!("`{text}` names a port\nhint: write the step, `{step}`"));
        }
        let group: Vec<usize> =
            (0..self.steps.len()).filter(|&at| self.steps[at].group == reference.step).collect();
        if group.is_empty() {
            let mut names: Vec<&str> = self.steps.iter().map(|step| step.group.as_str()).collect();
            names.dedup();
            let hint = suggest(reference.step, "steps", names.iter().copied());
            let hint = hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
            return Err(format!("unknown step `{}`{hint}", reference.step));
        }
        let Some(select) = reference.select else { return Ok(group) };
        let wanted = coordinates(select);
        let chosen: Vec<usize> =
            group.iter().copied().filter(|&at| fits(&self.steps[at], &wanted)).collect();
        if chosen.is_empty() {
            let names: Vec<&str> = group.iter().map(|&at| self.steps[at].name.as_str()).collect();
            let hint = suggest(text, "instances", names.iter().copied());
            let hint = hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
            return Err(format!("`{}` has no instance `{select}`{hint}", reference.step));
        }
        Ok(chosen)
    }
}

/// Whether an instance has the wanted coordinates; axes that are not named may be anything.
fn fits(step: &Step, wanted: &[super::reference::Coordinate<'_>]) -> bool {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        other => canonical_text(&other.to_string()),
    };
    wanted.iter().all(|(axis, value)| {
        let Some(value) = value else {
            return axis.is_none_or(|a| step.coords.iter().any(|c| c.0 == a));
        };
        match axis {
            None => step.coords.len() == 1 && text(&step.coords[0].1) == canonical_text(value),
            Some(axis) => {
                step.coords.iter().any(|(a, v)| a == axis && text(v) == canonical_text(value))
            }
        }
    })
}
