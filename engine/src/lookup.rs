//! From a step and the artifacts of its upstream to its pre-image: shared by everything that needs
//! a key (running, planning, explaining), so that they cannot disagree.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use cache::{Cache, Digest, Kind, Output};
use rayon::prelude::*;

use crate::hub::{self, Looked, Reference};
use crate::inputs::{self, Fetched, UserFile};
use crate::key::{FORMAT, InputId, PreImage};
use crate::plan::{self, Plan, Port, Source};
use crate::stage::Registry;

/// The user's files by pattern of a plan, by its bytes: to compare paths part by part takes its time.
pub type Files<'p> = HashMap<&'p OsStr, Result<Vec<UserFile>, String>>;

/// What is known of the inputs of steps.
pub struct Inputs<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The user's files by pattern.
    pub files: &'a Files<'a>,
    /// What came from a hub, by the text after `hf:`.
    pub hub: &'a BTreeMap<String, Result<Fetched, String>>,
    /// Artifacts of a step, once known.
    pub outputs: &'a dyn Fn(usize) -> Option<&'a [Output]>,
}

/// One artifact at an input port.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// Number within a list artifact.
    pub index: Option<u32>,
    /// Base name.
    pub name: String,
    /// Digest of its bytes.
    pub digest: Digest,
    /// File or directory.
    pub kind: Kind,
    /// Size.
    pub bytes: u64,
    /// Where it is, if it is the user's own file.
    pub path: Option<PathBuf>,
    /// `owner/name@commit`, if it is from a hub.
    pub origin: Option<String>,
    /// Its files by name, if it is from a hub: they lie apart.
    pub files: Vec<(String, PathBuf)>,
    /// The step that made it, otherwise.
    pub step: Option<usize>,
}

impl Artifact {
    /// As what the store knows it.
    pub fn output(&self, port: &str) -> Output {
        Output {
            port: port.into(),
            index: self.index,
            name: self.name.clone(),
            kind: self.kind,
            digest: self.digest,
            bytes: self.bytes,
        }
    }
}

/// Steps that must be done before `step`, each once.
pub fn upstream(plan: &Plan, step: usize) -> Vec<usize> {
    needs(&plan.steps[step]).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Steps that must be done before `step`, once for each reason.
pub fn needs(step: &plan::Step) -> impl Iterator<Item = usize> + '_ {
    let of = |source: &Source| match source {
        Source::Step { step, .. } => Some(*step),
        _ => None,
    };
    let sources = step.inputs.iter().flat_map(move |port| port.sources.iter().filter_map(of));
    sources.chain(step.after.iter().copied())
}

/// Finds and hashes every user file that `steps` read, each once, in parallel.
pub fn user_files<'p>(plan: &'p Plan, steps: &[usize], cache: &Cache) -> Files<'p> {
    user_files_by(plan, steps, &|_| None, &|path| {
        let found = inputs::find(path)?;
        found.iter().map(|file| UserFile::read(cache, file)).collect()
    })
}

/// So many files that may be known are looked at by one thread, since others would take longer to start.
const FEW: usize = 128;

/// As [`user_files`]; `known` tells by one `stat` what a pattern stands for, where that is known,
/// `read` finds and hashes it.
pub fn user_files_by<'p>(
    plan: &'p Plan,
    steps: &[usize],
    known: &(dyn Fn(&Path) -> Option<Vec<UserFile>> + Sync),
    read: &(dyn Fn(&Path) -> Result<Vec<UserFile>, String> + Sync),
) -> Files<'p> {
    let ports = steps.iter().flat_map(|&step| &plan.steps[step].inputs);
    let paths: HashSet<&'p OsStr> = ports.flat_map(|p| p.sources.iter().filter_map(path)).collect();
    let look = |path: &'p OsStr| known(Path::new(path)).map(|files| (path, Ok(files)));
    let read = |path: &'p OsStr| (path, read(Path::new(path)));
    let paths: Vec<&'p OsStr> = paths.into_iter().collect();
    if paths.len() > FEW {
        let found = |path| look(path).unwrap_or_else(|| read(path));
        return paths.into_par_iter().with_min_len(16).map(found).collect();
    }
    let mut files: Files<'p> = paths.iter().copied().filter_map(look).collect();
    let others: Vec<&'p OsStr> =
        paths.into_iter().filter(|path| !files.contains_key(path)).collect();
    match others.len() {
        0 | 1 => files.extend(others.into_iter().map(read)),
        _ => files.par_extend(others.into_par_iter().map(read)),
    }
    files
}

/// The path or pattern of a user's file.
pub(crate) fn path(source: &Source) -> Option<&OsStr> {
    match source {
        Source::Path { path } => Some(path.as_os_str()),
        _ => None,
    }
}

/// What `steps` want of a hub, each once.
pub fn hub_names(plan: &Plan, steps: &[usize]) -> BTreeSet<String> {
    let ports = steps.iter().flat_map(|&step| &plan.steps[step].inputs);
    let name = |source: &Source| match source {
        Source::Hub { name } => Some(name.clone()),
        _ => None,
    };
    ports.flat_map(|port| port.sources.iter().filter_map(name)).collect()
}

/// What is here of `name`, hashed; `None` if a run would fetch it.
pub fn look_for(
    settings: &hub::Settings,
    cache: &Cache,
    name: &str,
) -> Option<Result<Fetched, String>> {
    let reference = Reference::parse(name).map_err(|bad| bad.message);
    match reference.and_then(|r| hub::look(settings, &r).map_err(|e| e.to_string())) {
        Ok(Looked::Absent) => None,
        Ok(Looked::Here(snapshot)) => Some(Fetched::read(cache, snapshot)),
        Err(message) => Some(Err(message)),
    }
}

/// The artifacts at `port`, in order, or why there are none.
pub fn artifacts(inputs: &Inputs<'_>, port: &Port) -> Result<Vec<Artifact>, String> {
    let mut found = Vec::new();
    for source in &port.sources {
        match source {
            Source::Step { step, port: from, index } => {
                from_step(inputs, *step, from, *index, &mut found)?;
            }
            Source::Path { path } => from_files(inputs, path, &mut found)?,
            Source::Hub { name } => found.push(from_hub(inputs, name)?),
        }
    }
    match (&found[..], port.list) {
        (_, true) | ([_], false) => Ok(found),
        ([], false) => Err(format!("input `{}` gets no artifact", port.name)),
        (many, false) => Err(format!(
            "input `{}` takes one artifact, but {} are there\nhint: name one of them by its number, `step.port[0]`",
            port.name,
            many.len()
        )),
    }
}

fn from_step(
    inputs: &Inputs<'_>,
    step: usize,
    port: &str,
    index: Option<u32>,
    found: &mut Vec<Artifact>,
) -> Result<(), String> {
    let name = &inputs.plan.steps[step].name;
    let outputs = (inputs.outputs)(step).ok_or_else(|| format!("`{name}` is not done"))?;
    let before = found.len();
    let wanted = |o: &&Output| o.port == port && (index.is_none() || o.index == index);
    found.extend(outputs.iter().filter(wanted).map(|o| Artifact {
        index: o.index,
        name: o.name.clone(),
        digest: o.digest,
        kind: o.kind,
        bytes: o.bytes,
        path: None,
        origin: None,
        files: Vec::new(),
        step: Some(step),
    }));
    match index {
        Some(index) if found.len() == before => {
            let there: Vec<String> = outputs
                .iter()
                .filter(|o| o.port == port)
                .filter_map(|o| Some(o.index?.to_string()))
                .collect();
            Err(format!("`{name}.{port}` has no item {index}; there are {}", there.join(", ")))
        }
        _ => Ok(()),
    }
}

fn from_files(inputs: &Inputs<'_>, path: &Path, found: &mut Vec<Artifact>) -> Result<(), String> {
    let files = inputs
        .files
        .get(path.as_os_str())
        .ok_or_else(|| format!("`{}` was not read", path.display()))?;
    found.extend(files.as_ref().map_err(Clone::clone)?.iter().map(|file| Artifact {
        index: None,
        name: file.name(),
        digest: file.digest,
        kind: file.kind,
        bytes: file.bytes,
        path: Some(file.path.clone()),
        origin: None,
        files: Vec::new(),
        step: None,
    }));
    Ok(())
}

fn from_hub(inputs: &Inputs<'_>, name: &str) -> Result<Artifact, String> {
    let fetched = inputs.hub.get(name).ok_or_else(|| format!("`hf:{name}` was not fetched"))?;
    let fetched = fetched.as_ref().map_err(Clone::clone)?;
    Ok(Artifact {
        index: None,
        name: fetched.name.clone(),
        digest: fetched.digest,
        kind: fetched.kind,
        bytes: fetched.bytes,
        path: None,
        origin: Some(fetched.origin.clone()),
        files: fetched.files.clone(),
        step: None,
    })
}

/// Everything that decides the output of `step`.
pub fn pre_image(inputs: &Inputs<'_>, step: usize, registry: Registry) -> Result<PreImage, String> {
    let step = &inputs.plan.steps[step];
    let stage = registry.get(&step.stage).ok_or_else(|| format!("no stage `{}`", step.stage))?;
    let mut ports = BTreeMap::new();
    for port in &step.inputs {
        let id = |artifact: Artifact| InputId {
            digest: artifact.digest,
            index: artifact.index,
            name: artifact.origin.or(port.named.then_some(artifact.name)),
        };
        ports.insert(port.name.to_string(), artifacts(inputs, port)?.into_iter().map(id).collect());
    }
    Ok(PreImage {
        format: FORMAT,
        inputs: ports,
        params: step.params.value(),
        stage: step.stage.to_string(),
        version: stage.version,
    })
}
