//! What a stage is to the engine: a name, a version, typed parameters, ports and a function.
//!
//! A stage sees its inputs by port, writes its outputs by port, may keep checkpoints, reports what
//! happens, and asks whether to stop. It knows nothing of keys, caches, retries, paths of the store
//! or other steps.

mod background;
pub mod cost;
mod errors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::errors::{Cancelled, DeviceFault, Diverged, OutOfDeviceMemory};

use self::background::Background;
use self::cost::{Cost, Known};
use crate::tensors::Tensors;

/// A kind of work. One file, one implementation, one line in the registry.
pub trait Stage: 'static {
    /// What the pipeline file calls it.
    const NAME: &'static str;
    /// Raised whenever the same parameters and inputs may give other bytes.
    const VERSION: u32;
    /// One or two sentences for `pipe stages`.
    const DOC: &'static str;
    /// How many cpu slots a step takes unless it says otherwise.
    const CPU: Cpu = Cpu::One;
    /// Whether it can compute on a GPU. Such a stage has a parameter `device: auto | cpu | cuda`,
    /// which the plan resolves, so that `run` sees `cpu` or `cuda`; with `cuda` the step takes a GPU
    /// and one cpu slot unless it says otherwise.
    const GPU: bool = false;
    /// Serde struct with `deny_unknown_fields`; its doc comments are the user's reference.
    type Params: Serialize + DeserializeOwned + JsonSchema;

    /// The named inputs and outputs.
    fn ports() -> Ports;

    /// What the schema cannot say about parameters: pairs of a parameter's name and what is wrong.
    fn check(_params: &Self::Params) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Does the work. Errors are for people: what, where, what to do.
    fn run(params: &Self::Params, ctx: &mut Context) -> Result<()>;
}

/// Default share of the cpu slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// One slot.
    One,
    /// Every slot there is (training).
    All,
}

/// The ports of a stage.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// Named inputs.
    pub inputs: &'static [In],
    /// Named outputs.
    pub outputs: &'static [Out],
}

/// An input port.
#[derive(Clone, Copy, Debug)]
pub struct In {
    /// Name in the pipeline file.
    pub name: &'static str,
    /// For `pipe stages`.
    pub doc: &'static str,
    /// Whether the step is wrong without it.
    pub required: bool,
    /// Whether it takes any number of artifacts.
    pub list: bool,
    /// Whether base names matter to the stage (and so enter the key).
    pub named: bool,
    /// Whether the stage reads it only by [`Context::tensors`]: then a store that keeps tensors
    /// apart need not put the file together first.
    pub tensors: bool,
}

/// An output port.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// Name in the pipeline file.
    pub name: &'static str,
    /// For `pipe stages`.
    pub doc: &'static str,
    /// Whether it holds numbered artifacts (one a layer).
    pub list: bool,
    /// File name of the artifact, `train.bin` say; of a numbered one, index before the extension.
    pub file: &'static str,
    /// Whether parameters decide if it is made at all.
    pub optional: bool,
}

impl In {
    /// A required port that takes exactly one artifact.
    pub const fn one(name: &'static str, doc: &'static str) -> In {
        In { name, doc, required: true, list: false, named: false, tensors: false }
    }
    /// A required port that takes one or more artifacts.
    pub const fn many(name: &'static str, doc: &'static str) -> In {
        In { name, doc, required: true, list: true, named: false, tensors: false }
    }
    /// The same port, but it may be left out.
    pub const fn optional(mut self) -> In {
        self.required = false;
        self
    }
    /// The same port, but its files are read only by [`Context::tensors`].
    pub const fn tensors(mut self) -> In {
        self.tensors = true;
        self
    }
    /// The same port, but base names of its files are part of the key.
    pub const fn named(mut self) -> In {
        self.named = true;
        self
    }
}

impl Out {
    /// A single artifact.
    pub const fn one(name: &'static str, file: &'static str, doc: &'static str) -> Out {
        Out { name, doc, list: false, file, optional: false }
    }
    /// Numbered artifacts.
    pub const fn many(name: &'static str, file: &'static str, doc: &'static str) -> Out {
        Out { name, doc, list: true, file, optional: false }
    }
    /// The same port, but parameters decide whether it is made.
    pub const fn optional(mut self) -> Out {
        self.optional = true;
        self
    }
}

/// Name of the directory in an attempt's in which stages write outputs, one below it for each port.
pub(crate) const OUT: &str = "out";

/// One artifact that a step gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    /// Number within a list artifact (the layer), if it has one.
    pub index: Option<u32>,
    /// Base name, `train.bin` say.
    pub name: String,
    /// Where its bytes are, read-only.
    pub path: PathBuf,
}

/// One artifact that a step made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Made {
    /// Output port.
    pub port: String,
    /// Number within a list port.
    pub index: Option<u32>,
    /// Base name.
    pub name: String,
    /// Where it was written, inside the attempt.
    pub path: PathBuf,
}

/// What a stage says while it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "report")]
pub enum Report {
    /// `done` of `total` `unit`s; `total` 0 when unknown.
    Progress {
        /// Finished so far.
        done: u64,
        /// All there is.
        total: u64,
        /// `tokens`, `updates`, `documents`, …
        unit: String,
    },
    /// Values at one point of the work (`loss` at update 300).
    Metric {
        /// The update, or whatever counts the work.
        at: u64,
        /// Names and values.
        values: BTreeMap<String, f64>,
    },
    /// Something a person should read.
    Note {
        /// The text.
        text: String,
    },
}

/// Where reports go. Called from the thread that runs the stage.
pub trait Reporter: Send {
    /// Takes one report.
    fn report(&mut self, report: Report);
}

/// A sealed checkpoint of an earlier attempt, or of this one.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// How far the work was.
    pub position: u64,
    /// Its files, read-only.
    pub dir: PathBuf,
}

/// Everything a running stage can reach.
pub struct Context {
    pub(crate) inputs: BTreeMap<String, Vec<Input>>,
    pub(crate) ports: Vec<(String, bool, String)>,
    pub(crate) dir: PathBuf,
    pub(crate) made: Vec<Made>,
    pub(crate) threads: usize,
    pub(crate) reporter: Box<dyn Reporter>,
    pub(crate) cancel: Arc<AtomicBool>,
    pub(crate) resume: Option<Checkpoint>,
    pub(crate) background: Background,
    pub(crate) secrets: Vec<String>,
}

impl Context {
    /// The single artifact at `port`.
    pub fn input(&self, port: &str) -> Result<&Input> {
        match self.inputs(port) {
            [one] => Ok(one),
            [] => bail!("nothing is connected to input `{port}`"),
            many => bail!("input `{port}` takes one artifact, but {} are connected", many.len()),
        }
    }

    /// All artifacts at `port`, in order; empty when nothing is connected.
    pub fn inputs(&self, port: &str) -> &[Input] {
        self.inputs.get(port).map_or(&[], Vec::as_slice)
    }

    /// Whether anything is connected to `port`.
    pub fn has(&self, port: &str) -> bool {
        !self.inputs(port).is_empty()
    }

    /// The file or directory at `port`.
    pub fn path(&self, port: &str) -> Result<&Path> {
        Ok(&self.input(port)?.path)
    }

    /// The tensors (name → dtype, shape, mapped bytes) of the safetensors artifact at `port`.
    pub fn tensors(&self, port: &str) -> Result<Tensors> {
        let input = self.input(port)?;
        Tensors::open(&input.path).with_context(|| format!("input `{port}` ({})", input.name))
    }

    /// The same for every artifact of a list port, with its number.
    pub fn tensors_list(&self, port: &str) -> Result<Vec<(Option<u32>, Tensors)>> {
        let open = |input: &Input| -> Result<(Option<u32>, Tensors)> {
            let tensors = Tensors::open(&input.path)
                .with_context(|| format!("input `{port}` ({})", input.name))?;
            Ok((input.index, tensors))
        };
        self.inputs(port).iter().map(open).collect()
    }

    /// The path at which to write the artifact of `port` (a file or a directory).
    pub fn output(&mut self, port: &str) -> Result<PathBuf> {
        self.declare(port, None, None)
    }

    /// Says that the artifact of `port` is at `path`, below the attempt's directory.
    pub(crate) fn output_at(&mut self, port: &str, path: PathBuf) -> Result<()> {
        self.declare(port, None, Some(path)).map(drop)
    }

    /// The path at which to write artifact `index` of the list port `port`.
    pub fn output_item(&mut self, port: &str, index: u32) -> Result<PathBuf> {
        self.declare(port, Some(index), None)
    }

    fn declare(
        &mut self,
        port: &str,
        index: Option<u32>,
        path: Option<PathBuf>,
    ) -> Result<PathBuf> {
        let found = self.ports.iter().find(|(name, ..)| name == port);
        let Some((_, list, file)) = found else { bail!("the stage has no output `{port}`") };
        if *list != index.is_some() {
            bail!("output `{port}` is {} list", if *list { "a" } else { "no" });
        }
        let name = match index {
            None => file.clone(),
            Some(i) => match file.rsplit_once('.') {
                Some((stem, extension)) => format!("{stem}-{i}.{extension}"),
                None => format!("{file}-{i}"),
            },
        };
        let path = match path {
            Some(path) => path,
            None => {
                let folder = self.dir.join(OUT).join(port);
                std::fs::create_dir_all(&folder)
                    .with_context(|| format!("cannot create {}", folder.display()))?;
                folder.join(&name)
            }
        };
        let made = Made { port: port.into(), index, name, path: path.clone() };
        if !self.made.contains(&made) {
            self.made.push(made);
        }
        Ok(path)
    }

    /// What has been declared as output so far.
    pub fn made(&self) -> &[Made] {
        &self.made
    }

    /// A private directory for this attempt, gone after it.
    pub fn scratch(&self) -> Result<PathBuf> {
        let dir = self.dir.join("scratch");
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }

    /// How many threads the step may keep busy. Results must not depend on it.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Tells how far the work is.
    pub fn progress(&mut self, done: u64, total: u64, unit: &str) {
        self.reporter.report(Report::Progress { done, total, unit: unit.into() });
    }

    /// Records values at one point of the work; they become the curves of the report.
    pub fn metric(&mut self, at: u64, values: &[(&str, f64)]) {
        // JSON has no NaN; that a loss is none is the stage's to tell, as an error.
        let finite = values.iter().filter(|(_, value)| value.is_finite());
        let values = finite.map(|(name, value)| (name.to_string(), *value)).collect();
        self.reporter.report(Report::Metric { at, values });
    }

    /// Tells the user something.
    pub fn note(&mut self, text: impl Into<String>) {
        self.reporter.report(Report::Note { text: text.into() });
    }

    /// Fails with [`Cancelled`] once the step is to stop. Call it between updates, after a
    /// checkpoint if there is anything worth keeping.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.cancelled() { Err(Cancelled.into()) } else { Ok(()) }
    }

    /// Whether the step is to stop.
    pub fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// The flag behind [`Context::cancelled`], for threads of the stage.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.cancel.clone()
    }

    /// The newest sealed checkpoint of this step's key, if any attempt left one. One that is being
    /// written in the background does not count yet.
    pub fn checkpoint_latest(&self) -> Option<&Checkpoint> {
        self.resume.as_ref()
    }

    /// Seals a checkpoint: `write` fills an empty directory, which then becomes immutable. A crash
    /// at any moment leaves either the whole checkpoint or none.
    pub fn checkpoint_save(
        &mut self,
        position: u64,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        self.checkpoint_wait()?;
        let dir = cache::checkpoint::save(&self.dir.join("checkpoints"), position, write)?;
        self.resume = Some(Checkpoint { position, dir });
        Ok(())
    }

    /// The same on another thread: it returns once the checkpoint before is sealed, and the stage
    /// goes on while `write`, which owns what it writes, does its work. What goes wrong there is
    /// told by the next call or at the end of the step, which waits for it.
    pub fn checkpoint_save_in_background(
        &mut self,
        position: u64,
        write: impl FnOnce(&Path) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.checkpoint_wait()?;
        self.background.start(self.dir.join("checkpoints"), position, write)
    }

    /// Waits for the checkpoint that is being written in the background, if one is.
    pub fn checkpoint_wait(&mut self) -> Result<()> {
        if let Some(sealed) = self.background.wait()? {
            self.resume = Some(sealed);
        }
        Ok(())
    }

    /// Names of the environment variables that a command step passes through.
    pub fn secrets(&self) -> &[String] {
        &self.secrets
    }

    /// The attempt's private directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A context over a plain directory, for tests and tools: no cache, no worker.
    pub fn local<S: Stage>(dir: &Path, inputs: &[(&str, &[&Path])]) -> Context {
        let input = |(i, path): (usize, &&Path)| Input {
            index: Some(i as u32),
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            path: path.to_path_buf(),
        };
        let inputs = inputs
            .iter()
            .map(|(port, paths)| (port.to_string(), paths.iter().enumerate().map(input).collect()))
            .collect();
        let ports = S::ports().outputs.iter().map(|o| (o.name.into(), o.list, o.file.into()));
        Context {
            inputs,
            ports: ports.collect(),
            dir: dir.to_path_buf(),
            made: Vec::new(),
            threads: 2,
            reporter: Box::new(Silent),
            cancel: Arc::default(),
            resume: cache::checkpoint::latest([dir.join("checkpoints")])
                .map(|(position, dir)| Checkpoint { position, dir }),
            background: Background::default(),
            secrets: Vec::new(),
        }
    }

    /// Sets the number of threads (see [`Context::local`]).
    pub fn set_threads(&mut self, threads: usize) {
        self.threads = threads;
    }

    /// Sets where reports go (see [`Context::local`]).
    pub fn set_reporter(&mut self, reporter: Box<dyn Reporter>) {
        self.reporter = reporter;
    }
}

struct Silent;

impl Reporter for Silent {
    fn report(&mut self, _: Report) {}
}

/// One stage, its types erased: what plans, keys and workers see.
#[derive(Clone, Copy)]
pub struct Entry {
    /// [`Stage::NAME`].
    pub name: &'static str,
    /// [`Stage::VERSION`].
    pub version: u32,
    /// [`Stage::DOC`].
    pub doc: &'static str,
    /// [`Stage::CPU`].
    pub cpu: Cpu,
    /// [`Stage::GPU`].
    pub gpu: bool,
    /// [`Stage::ports`].
    pub ports: fn() -> Ports,
    /// JSON Schema of the parameters.
    pub schema: fn() -> Value,
    /// Fills in defaults and gives the canonical value, or says what is wrong.
    pub resolve: fn(Value) -> Result<Resolved, String>,
    /// [`Stage::run`] on canonical parameters.
    pub run: fn(&Value, &mut Context) -> Result<()>,
    /// [`cost::Costed::cost`] on canonical parameters, if the stage tells it.
    pub cost: Option<fn(&Value, &Known) -> Option<Cost>>,
}

/// Parameters with every default filled in.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The canonical value.
    pub params: Value,
    /// What [`Stage::check`] found: parameter and complaint.
    pub complaints: Vec<(String, String)>,
}

impl Entry {
    /// Erases the types of `S`.
    pub const fn of<S: Stage>() -> Entry {
        Entry {
            name: S::NAME,
            version: S::VERSION,
            doc: S::DOC,
            cpu: S::CPU,
            gpu: S::GPU,
            ports: S::ports,
            schema: || schemars::schema_for!(S::Params).to_value(),
            resolve: |value| {
                let params: S::Params = serde_json::from_value(value).map_err(|e| e.to_string())?;
                let complaints = S::check(&params);
                let params = serde_json::to_value(&params).map_err(|e| e.to_string())?;
                Ok(Resolved { params, complaints })
            },
            run: |params, ctx| {
                let params = S::Params::deserialize(params).context("frozen parameters")?;
                S::run(&params, ctx)
            },
            cost: None,
        }
    }
}

/// All stages a binary has.
#[derive(Clone, Copy)]
pub struct Registry(pub &'static [Entry]);

impl Registry {
    /// The stage called `name`.
    pub fn get(&self, name: &str) -> Option<&'static Entry> {
        self.0.iter().find(|entry| entry.name == name)
    }
}
