//! `pipe export-jobs`: a pipeline as jobs that no leader looks after.

use std::process::ExitCode;

use anyhow::Result;
use engine::cluster::batch::Shape;
use engine::cluster::export::{self, Pods};
use engine::executor::Options;
use engine::gpu::Gpus;
use engine::stage::Cpu;

use crate::cli::look::{ExportJobs, JobFormat};
use crate::out;

pub fn export_jobs(args: ExportJobs) -> Result<ExitCode> {
    let gpus = Gpus::elsewhere(args.gpus, "`--gpus` names none", None);
    let loaded = super::load_for(args.file.as_deref(), &args.settings, gpus)?;
    let settings = super::slurm::settings(args.file.as_deref(), &args.settings)?;
    let mut options = Options::default();
    for name in &args.until {
        options.until.extend(super::select(&loaded, name)?);
    }
    let steps = options.selection(&loaded.plan);
    let shape = |at: usize| {
        let step = &loaded.plan.steps[at];
        let resources = &step.resources;
        let all = super::REGISTRY.get(&step.stage).is_some_and(|stage| stage.cpu == Cpu::All);
        let default = if all && resources.gpu == 0 { settings.cpus.unwrap_or(1) } else { 1 };
        let memory = settings.memory.map_or(0, |memory| memory.0);
        Shape {
            cpus: resources.cpu.unwrap_or(default),
            gpus: resources.gpu,
            gpu_type: resources.gpu_type.clone(),
            memory: if resources.memory > 0 { resources.memory } else { memory },
            time_s: resources.time_s.or(settings.time.map(|t| t.0)).map(|s| s.ceil() as u64),
        }
    };
    let jobs = export::jobs(&loaded.plan, &steps, shape);
    let name = &loaded.plan.name;
    let text = match args.format {
        JobFormat::Script => export::script(&jobs, &settings, name, &command(&args, true)?),
        JobFormat::K8s => {
            let pods = Pods {
                image: args.image.clone(),
                claim: args.claim.clone(),
                mount: args.mount.clone(),
            };
            export::kubernetes(&jobs, &pods, name, &command(&args, false)?)
        }
    };
    out::piece(&text);
    Ok(ExitCode::SUCCESS)
}

/// `pipe run` with the settings of this call; `here`: on machines that see what this one sees.
fn command(args: &ExportJobs, here: bool) -> Result<Vec<String>> {
    let program = match here {
        true => std::env::current_exe()?.display().to_string(),
        false => "pipe".to_string(),
    };
    let mut words = vec![program, "run".into()];
    if let Some(file) = &args.file {
        let file = if here { std::path::absolute(file)? } else { file.clone() };
        words.push(file.display().to_string());
    }
    let mut add = |flag: &str, value: String| words.extend([flag.to_string(), value]);
    args.settings.profiles.iter().for_each(|name| add("--profile", name.clone()));
    for path in &args.settings.params {
        let path = if here { std::path::absolute(path)? } else { path.clone() };
        add("--params", path.display().to_string());
    }
    args.settings.sets.iter().for_each(|set| add("--set", set.clone()));
    match (&args.settings.cache, here) {
        (Some(dir), true) => add("--cache", std::path::absolute(dir)?.display().to_string()),
        (Some(dir), false) => add("--cache", dir.display().to_string()),
        (None, true) => {}
        (None, false) => add("--cache", format!("{}/cache", args.mount)),
    }
    Ok(words)
}
