//! The files of a model: of a step's result, with the tokenizer that belongs to it, or as given by
//! path. Reads none of them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use cache::{Cache, Entry, Lease};
use engine::executor::Options;
use engine::forecast::{self, Forecast};
use engine::lookup;
use engine::plan::{Plan, Source, Step};
use engine::spec::Loaded;

use super::Wrong;
use crate::cli::OfModel;

/// Where a model and what belongs to it are.
#[derive(Debug)]
pub struct ModelFiles {
    /// The step's name, or the path as given.
    pub name: String,
    /// A `model.safetensors` of ours.
    pub model: PathBuf,
    /// A `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    /// What the makers of the model say of it, an `about.json`.
    pub about: Option<PathBuf>,
    /// Keeps them where they are, if they are the store's.
    pub _lease: Option<Lease>,
}

/// What `name` means: a path if it looks like one, else a step.
pub fn find(name: &str, args: &OfModel) -> Result<ModelFiles> {
    if name.contains('/') || name.ends_with(".safetensors") {
        return of_path(name);
    }
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let loaded = super::load_for_step(args.file.as_deref(), &args.settings, &cache)?;
    model_of(&loaded, &cache, super::one_step(&loaded, name)?, &args.port)
}

/// A model file, with what lies beside it under the names of artifacts.
fn of_path(name: &str) -> Result<ModelFiles> {
    let model = PathBuf::from(name);
    if !model.is_file() {
        bail!(Wrong(format!("there is no model file `{name}`")));
    }
    let beside = |file: &str| Some(model.with_file_name(file)).filter(|path| path.is_file());
    let (tokenizer, about) = (beside("tokenizer.json"), beside("about.json"));
    Ok(ModelFiles { name: name.into(), model, tokenizer, about, _lease: None })
}

/// The model at `port` of step `at`, and the nearest tokenizer and `about` upstream of it. A step
/// without a result is told how to get one.
pub fn model_of(loaded: &Loaded, cache: &Cache, at: usize, port: &str) -> Result<ModelFiles> {
    let plan = &loaded.plan;
    let steps = Options { only: Some(at), ..Options::default() }.selection(plan);
    let found = forecast::forecast(plan, &steps, super::REGISTRY, cache, &super::hub())?;
    let step = &plan.steps[at];
    has_port(step, port)?;
    let again = || {
        let file = match plan.file.as_os_str().is_empty() {
            true => String::new(),
            false => format!(" {}", plan.file.display()),
        };
        format!("\nhint: `pipe run{file} --until {}`", step.name)
    };
    let entry = match &found[&at] {
        Forecast::Cached { entry } => entry,
        Forecast::Broken { message } => bail!(Wrong(format!("`{}`: {message}", step.name))),
        _ => bail!(Wrong(format!("`{}` has no result yet{}", step.name, again()))),
    };
    let lease = cache.lease(&format!("reading `{}`", step.name))?;
    let Some(model) = artifact(cache, &lease, entry, port) else {
        bail!(Wrong(format!("the bytes of `{}.{port}` are gone{}", step.name, again())));
    };
    let upstream = Upstream { plan, cache, lease: &lease, found: &found };
    let (tokenizer, about) = (upstream.nearest(at, "tokenizer"), upstream.nearest(at, "about"));
    Ok(ModelFiles { name: step.name.clone(), model, tokenizer, about, _lease: Some(lease) })
}

fn has_port(step: &Step, port: &str) -> Result<()> {
    match step.ports.iter().find(|(name, _, _)| name == port) {
        Some((_, false, _)) => Ok(()),
        Some((_, true, _)) => {
            bail!(Wrong(format!("`{}.{port}` is a list of files, not a model", step.name)))
        }
        None => bail!(super::no_port(step, port)),
    }
}

/// The one file at `port`, if its bytes are there.
fn artifact(cache: &Cache, lease: &Lease, entry: &Entry, port: &str) -> Option<PathBuf> {
    let output = entry.outputs.iter().find(|o| o.port == port && o.index.is_none())?;
    lease.hold(&[output.digest]).ok()?;
    cache.present(output).then(|| cache.path(&output.digest))
}

/// What leads to a step.
struct Upstream<'a> {
    plan: &'a Plan,
    cache: &'a Cache,
    lease: &'a Lease,
    found: &'a HashMap<usize, Forecast>,
}

impl Upstream<'_> {
    /// The artifact called `port` of the step that is fewest steps away from `at`, or the user's own
    /// file that such a step takes in under this name.
    fn nearest(&self, at: usize, port: &str) -> Option<PathBuf> {
        let (mut level, mut seen) = (vec![at], HashSet::from([at]));
        while !level.is_empty() {
            if let Some(path) = level.iter().find_map(|step| self.of(*step, port)) {
                return Some(path);
            }
            let next = level.iter().flat_map(|step| lookup::upstream(self.plan, *step));
            level = next.filter(|step| seen.insert(*step)).collect();
        }
        None
    }

    fn of(&self, step: usize, port: &str) -> Option<PathBuf> {
        if let Some(Forecast::Cached { entry }) = self.found.get(&step)
            && let Some(path) = artifact(self.cache, self.lease, entry, port)
        {
            return Some(path);
        }
        let input = self.plan.steps[step].inputs.iter().find(|input| input.name == port)?;
        input.sources.iter().find_map(|source| match source {
            Source::Path { path } => Some(path).filter(|path| Path::is_file(path)).cloned(),
            _ => None,
        })
    }
}
