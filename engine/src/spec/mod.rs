//! Pipeline YAML → one spanned tree ([`layers::Spec`]) → [`Plan`]; everything wrong comes at once.
//!
//! In reading order: `source` (texts and places), `yaml` (one tree), `files` (includes), `layers`
//! (profiles, `--params`), `set` (`--set`), `params` and `scope` (`${…}`), `value` and `typed`
//! (numbers, a stage's schema), `schema` (the whole file's, for editors). What the steps are to each
//! other is [`crate::plan`]'s.

pub(crate) mod files;
pub(crate) mod layers;
pub(crate) mod params;
pub(crate) mod schema;
pub(crate) mod scope;
pub(crate) mod set;
pub(crate) mod source;
pub(crate) mod typed;
pub mod user;
pub(crate) mod value;
pub(crate) mod yaml;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use self::files::Files;
use self::layers::{Spec, argument};
use self::source::{Problem, Problems, Sources};
use self::yaml::Node;
use crate::cluster::Settings;
use crate::diagnostic::{Diagnostics, suggest};
use crate::gpu::Gpus;
use crate::plan::{Plan, build};
use crate::stage::Registry;

pub use self::schema::schema;
pub use self::value::{bytes as parse_bytes, duration as parse_duration};

/// What the command line says about a pipeline.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--profile`, in order.
    pub profiles: Vec<String>,
    /// `--params`, in order.
    pub params_files: Vec<PathBuf>,
    /// `--set`, in order: `a.b=value`.
    pub sets: Vec<String>,
    /// The current directory, absolute: relative paths of the command line and of `outputs` start here.
    pub cwd: PathBuf,
    /// GPUs that the executor offers; `device: auto` is `cuda` if there are any.
    pub gpus: Gpus,
}

/// A checked pipeline and what it was made from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The plan.
    pub plan: Arc<Plan>,
    /// Every file read and its text, verbatim: the included before the including, then `--params`.
    pub sources: Vec<(PathBuf, String)>,
    /// The pipeline's parameters with everything laid over and filled in.
    pub params: Value,
    /// Names of its profiles, in the order in which they are written.
    pub profiles: Vec<String>,
    /// What stands under `executor:`, by executor.
    pub executor: Value,
}

/// What the pipeline at `file` (or, without one, in `text`) says under `executor:`, whatever is
/// wrong with the rest: it is needed before the rest can be judged.
pub fn executor(file: &Path, text: Option<&str>, options: &Options) -> Value {
    let (mut sources, mut problems) = (Sources::default(), Problems::default());
    let mut files = Files::default();
    let name = file.display().to_string();
    match text {
        Some(text) => files.take(&name, text, &options.cwd, &mut sources, &mut problems),
        None => files.load(file, &options.cwd, &mut sources, &mut problems),
    }
    if files.broken() {
        return Value::Null;
    }
    value::json(&Spec::of(files, &options.profiles, &mut sources, &mut problems).executor)
}

/// Reads and checks the pipeline at `file`.
pub fn load(file: &Path, options: &Options, registry: &Registry) -> Result<Loaded, Diagnostics> {
    let mut sources = Sources::default();
    let mut problems = Problems::default();
    let mut files = Files::default();
    files.load(file, &options.cwd, &mut sources, &mut problems);
    finish(file, files, options, registry, sources, problems)
}

/// Checks a pipeline that is no file; `name` is how it is shown, relative paths start from
/// [`Options::cwd`].
pub fn load_text(
    name: &str,
    text: &str,
    options: &Options,
    registry: &Registry,
) -> Result<Loaded, Diagnostics> {
    let mut sources = Sources::default();
    let mut problems = Problems::default();
    let mut files = Files::default();
    files.take(name, text, &options.cwd, &mut sources, &mut problems);
    finish(Path::new(name), files, options, registry, sources, problems)
}

/// From the files' trees to the plan.
fn finish(
    file: &Path,
    mut files: Files,
    options: &Options,
    registry: &Registry,
    mut sources: Sources,
    mut problems: Problems,
) -> Result<Loaded, Diagnostics> {
    let mut read = std::mem::take(&mut files.read);
    // A file that cannot be read or parsed hides what it declares: more would be guesses.
    if files.broken() {
        return Err(problems.finish(&sources));
    }
    let mut spec = Spec::of(files, &options.profiles, &mut sources, &mut problems);
    for path in &options.params_files {
        let text = spec.params_file(path, &options.cwd, &mut sources, &mut problems);
        read.extend(text.map(|text| (options.cwd.join(path), text)));
    }
    for set in &options.sets {
        let done = set::apply(&mut spec, set, &options.cwd, registry, &mut sources);
        done.unwrap_or_else(|found| found.into_iter().for_each(|problem| problems.push(problem)));
    }
    if spec.steps.is_empty() && problems.len() == 0 {
        let span = argument(&file.display().to_string(), "", &mut sources);
        let problem = Problem::new(span, "the pipeline has no steps");
        problems.push(problem.hint("write `steps: { NAME: { stage: … } }`"));
    }
    let executor = executors(&spec.executor, &mut problems);
    let params = params::fill(&spec.params, &mut problems);
    let place = (options.cwd.as_path(), &options.gpus);
    let plan = build::build(file, &spec, &params, place, registry, &sources, &mut problems);
    match plan {
        Some(plan) if problems.len() == 0 => {
            let params = value::json(&params);
            Ok(Loaded {
                plan: Arc::new(plan),
                sources: read,
                params,
                profiles: spec.profiles,
                executor,
            })
        }
        _ => Err(problems.finish(&sources)),
    }
}

/// Checks `executor:`; gives it as it is.
fn executors(node: &Node, problems: &mut Problems) -> Value {
    let Some(entries) = node.entries() else {
        let message = format!("`executor` takes a map, not {}", node.describe());
        let hint = "write `executor: { slurm: { partition: … } }`";
        problems.push(Problem::new(node.span, message).hint(hint));
        return Value::Null;
    };
    for (key, block) in entries {
        if key.text != "slurm" {
            let problem = Problem::new(key.span, format!("unknown executor `{}`", key.text));
            problems.push(problem.maybe_hint(suggest(&key.text, "executors", ["slurm"])));
        } else if let Err(message) = Settings::parse(&value::json(block)) {
            problems.push(Problem::new(key.span, format!("`slurm`: {message}")));
        }
    }
    value::json(node)
}
