//! `pipe run` where nothing has changed since the last run that asked the same: told without making
//! a plan. Decides what "the same" is beside files; `engine::repeat` compares.

use std::fmt::Write as _;

use ::cache::Cache;
use anyhow::Result;
use engine::event::Summary;
use engine::plan::{Plan, Step};
use engine::repeat::Earlier;
use engine::run::{Asked, Record};
use engine::spec::Loaded;
use engine::{kept, repeat};

use super::run::asked;
use crate::cli::{Place, Run};

/// The name of what runs like this one find; `None` where a run must look for itself.
pub fn memo(args: &Run) -> Result<Option<String>> {
    let steps = [&args.until, &args.from, &args.force, &args.fresh];
    let some = args.only.is_some() || steps.iter().any(|names| !names.is_empty());
    // On a cluster the site decides what the plan is.
    if some
        || args.json
        || args.on != Place::Local
        || args.remote_required
        || super::remote::open(&args.remote)?.is_some()
    {
        return Ok(None);
    }
    let settings = &args.settings;
    let mut what = vec![
        super::BUILD.to_string(),
        binary()?,
        format!("{:?}", args.file),
        std::env::current_dir()?.display().to_string(),
        format!("{:?}", std::env::home_dir()),
        format!("{:?} {:?} {:?}", settings.profiles, settings.params, settings.sets),
    ];
    // A run without the names of its files would be another's.
    what.push(super::cache_root(settings.cache.as_deref())?.display().to_string());
    let what: Vec<&str> = what.iter().map(String::as_str).collect();
    Ok(Some(repeat::name(&what)))
}

/// What `stat` says of this binary: another one may make other plans of the same files.
fn binary() -> Result<String> {
    let stamp = ::cache::Stamp::of(&std::fs::metadata("/proc/self/exe")?);
    Ok(format!("{stamp:?}"))
}

/// The cache, if it is there: it is not made before the pipeline is known to be right.
pub fn cache(args: &Run) -> Result<Option<Cache>> {
    let wanted = args.settings.cache.as_deref();
    let there = super::cache_root(wanted)?.join("version").exists();
    Ok(there.then(|| super::open_cache(wanted).ok()).flatten())
}

/// What the last run called `name` left, unless nothing is to be taken from it.
pub fn earlier(args: &Run, cache: Option<&Cache>, name: Option<&str>) -> Option<Earlier> {
    let (cache, name) = cache.zip(name).filter(|_| !args.paranoid)?;
    Earlier::read(cache, name)
}

/// Totals of a run that has nothing to do, if it is one; then it is recorded.
pub fn repeat(args: &Run, cache: &Cache, earlier: &Earlier) -> Result<Option<Summary>> {
    let jobs = args.jobs.map_or_else(threads, |jobs| jobs as usize);
    let repeated = repeat::repeat(cache, earlier, &gpus, asked(args)?, (super::BUILD, jobs))?;
    Ok(repeated.map(|repeated| repeated.summary))
}

/// The pipeline, and the record in which its plan lies if an earlier run called `name` made it.
pub fn load(
    args: &Run,
    cache: Option<&Cache>,
    name: Option<&str>,
    earlier: Option<&Earlier>,
) -> Result<(Loaded, Option<String>)> {
    let kept = cache.zip(name).filter(|_| !args.paranoid);
    match kept.and_then(|(cache, name)| kept::load(cache, name, &gpus, earlier)) {
        Some(kept) => Ok((kept.loaded, Some(kept.record))),
        None => Ok((super::load(args.file.as_deref(), &args.settings)?, None)),
    }
}

/// Begins the record of a run that is to be made, and keeps its plan for the next one.
pub fn record(
    cache: &Cache,
    (loaded, like): (&Loaded, Option<&str>),
    asked: Asked,
    name: Option<&str>,
) -> Result<Record> {
    let (plan, asked) = (&loaded.plan, (asked, super::BUILD));
    let record = Record::create_like(cache, plan, &loaded.sources, asked, like)?;
    if let Some(name) = name.filter(|_| like.is_none()) {
        kept::keep(cache, name, loaded, gpus_of(plan), &record.info.id);
    }
    Ok(record)
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The GPUs that there are, if `plan` depends on them.
pub fn gpus_of(plan: &Plan) -> Option<String> {
    let asks = |step: &Step| {
        let wants = step.resources.gpu > 0 || step.resources.vram > 0;
        wants || step.auto.is_some() || step.params.get("device").is_some()
    };
    plan.steps.iter().any(asks).then(gpus)
}

fn gpus() -> String {
    let offered = super::gpus::gpus();
    let mut text = offered.without.clone();
    for gpu in &offered.list {
        let _ = write!(text, "\n{} {} {:?} {}", gpu.uuid, gpu.name, gpu.capability, gpu.memory);
    }
    text
}
