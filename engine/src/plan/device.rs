//! Where a step computes: what the executor offers decides, here and nowhere later, since the
//! device is part of the key.

use serde_json::{Value as Json, json};

use super::Resources;
use super::build::{Group, World};
use crate::gpu::size;
use crate::spec::source::{Problem, Problems};
use crate::spec::yaml::Node;

/// Resolves `device` in `params` and the GPUs in `resources`; gives the reason where `auto` chose.
pub fn settle(
    world: &World<'_>,
    group: &Group<'_>,
    params: &mut Json,
    resources: &mut Resources,
    problems: &mut Problems,
) -> Option<String> {
    let step = Asking { world, group };
    let said = step.field("resources", "gpu").is_some();
    let mut reason = None;
    let device = params.get("device").and_then(Json::as_str).unwrap_or_default();
    let problem = match device {
        "auto" => {
            let (device, because) = step.choose(said && resources.gpu == 0);
            let none = world.gpus.list.is_empty() || world.gpus.blind.is_some();
            if device == "cpu" && none {
                // They tell what it would take on a GPU.
                (resources.gpu, resources.vram) = (0, 0);
            }
            params["device"] = json!(device);
            reason = Some(because);
            None
        }
        "cuda" => step.refused(said && resources.gpu == 0),
        _ => None,
    };
    if !said && params.get("device").is_some_and(|device| device == "cuda") {
        resources.gpu = 1;
    }
    if let Some(problem) = problem.or_else(|| step.beyond(resources)) {
        problems.push(problem);
    }
    reason
}

struct Asking<'a> {
    world: &'a World<'a>,
    group: &'a Group<'a>,
}

impl Asking<'_> {
    /// `auto`: the device and why.
    fn choose(&self, no_gpu: bool) -> (&'static str, String) {
        let offered = &self.world.gpus;
        if let (Some(why), true) = (&offered.blind, self.able()) {
            return ("cpu", why.clone());
        }
        match offered.list.len() {
            _ if !self.able() => ("cpu", "the stage computes on the CPU only".into()),
            0 => ("cpu", offered.without.clone()),
            _ if no_gpu => ("cpu", "`resources.gpu` is 0".into()),
            1 => ("cuda", "there is a GPU".into()),
            n => ("cuda", format!("there are {n} GPUs")),
        }
    }

    fn able(&self) -> bool {
        self.group.entry.is_some_and(|entry| entry.gpu)
    }

    /// What speaks against `device: cuda`.
    fn refused(&self, no_gpu: bool) -> Option<Problem> {
        let at = |field: &str, name: &str, message: String| {
            let span = self.field(field, name).map_or(self.group.spec.name.span, Node::here);
            Problem::new(span, message)
        };
        let stage = self.group.entry.map_or("", |entry| entry.name);
        if !self.able() {
            let message = format!("stage `{stage}` computes on the CPU only");
            return Some(at("with", "device", message).hint("write `device: cpu`"));
        }
        let blind = self.world.gpus.blind.as_ref();
        if self.world.gpus.list.is_empty() || blind.is_some() {
            let why = blind.unwrap_or(&self.world.gpus.without);
            let message = format!("`device: cuda`, but there is no GPU to use: {why}");
            let hint = "write `device: auto` to use one where there is one, or `device: cpu`";
            return Some(at("with", "device", message).hint(hint));
        }
        no_gpu.then(|| {
            let message = "`device: cuda` without a GPU: `gpu` is 0".to_string();
            at("resources", "gpu", message).hint("leave `gpu` out, or write `device: cpu`")
        })
    }

    /// More GPUs, or more memory on them, than there is.
    fn beyond(&self, resources: &Resources) -> Option<Problem> {
        let (offered, wanted) = (&self.world.gpus, resources.gpu as usize);
        if wanted == 0 {
            return None;
        }
        let (name, message, hint) = match offered.list.len() {
            0 => (
                "gpu",
                format!("there is no GPU to use: {}", offered.without),
                "take `gpu` out of `resources`, or run it on a machine with GPUs".to_string(),
            ),
            n if wanted > n => (
                "gpu",
                format!("it wants {}, and there {}", gpus(wanted), there(n)),
                format!("write `gpu: {n}`, or run it on a machine with more"),
            ),
            _ => {
                let fits = offered.list.iter().filter(|gpu| gpu.memory >= resources.vram).count();
                if fits >= wanted {
                    return None;
                }
                let most = offered.list.iter().map(|gpu| gpu.memory).max().unwrap_or(0);
                let most = size(most);
                let vram = size(resources.vram);
                let message = match fits {
                    0 => format!("it wants {vram} of GPU memory, and no GPU has more than {most}"),
                    _ => format!(
                        "it wants {} with {vram} of memory each, and there {}",
                        gpus(wanted),
                        there(fits)
                    ),
                };
                ("vram", message, "lower `vram`, or run it on a larger GPU".to_string())
            }
        };
        let span = self.field("resources", name).map_or(self.group.spec.name.span, Node::here);
        let message = format!("step `{}` cannot run here: {message}", self.group.name());
        Some(Problem::new(span, message).hint(hint))
    }

    fn field(&self, field: &str, name: &str) -> Option<&Node> {
        self.group.spec.get(field)?.get(name)
    }
}

fn gpus(n: usize) -> String {
    if n == 1 { "a GPU".into() } else { format!("{n} GPUs") }
}

fn there(n: usize) -> String {
    if n == 1 { "is one".into() } else { format!("are {n}") }
}
