//! The command line; its doc comments are the help.

mod cache;
pub mod look;
mod model;
mod run;

use std::path::PathBuf;

pub use cache::{Cache, Du, Gc, KEEP_RUNS, Ls, OfPins, Pin, Rebuild, Sort, Unpin, Verify};
use clap::{Args, Parser, Subcommand};
pub use model::{Bench, BenchDecode, BenchGpu, Chat, Generate, OfModel, Speech};
pub use run::{Place, Run, Worker};

/// Turns pretrained Transformers into subquadratic students: declarative, incremental pipelines.
#[derive(Parser)]
#[command(name = "pipe", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    /// Make the cache for everybody of a group, each of whom trusts all others; one made so stays so
    #[arg(long, global = true)]
    pub shared_cache: bool,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Write a starter pipeline for the models and the text that are here
    Init(look::Init),
    /// Run a pipeline; what is cached is not done again
    Run(Run),
    /// Tell what a run would do, step by step, and why
    Plan(Plan),
    /// Send results of steps to a remote cache
    Push(Push),
    /// Bring results of steps from a remote cache
    Pull(Pull),
    /// Check a pipeline and print every error
    Check(Check),
    /// Draw the graph of a pipeline
    Graph(look::Graph),
    /// Tell why a step would run again, or why it last ran: the parameter, file or upstream step
    Why(OfStep),
    /// Show a step: parameters, key, artifacts, metrics, log
    Show(OfStep),
    /// Print the log of a step's newest attempt
    Log(look::Log),
    /// List runs: when, how they ended, what they measured
    Runs(look::Runs),
    /// Show two runs side by side: parameters, metrics, artifacts
    Diff(look::Diff),
    /// Compare the instances of a step with a matrix in one table
    Compare(look::Compare),
    /// Tell how far a run has come
    Status(look::Status),
    /// End a run on a cluster, and its jobs
    Cancel(look::Cancel),
    /// Show all pipelines that run now
    Top(look::Top),
    /// Write the report of a run as one HTML file
    Report(Report),
    /// Write a step's model as a directory that published code loads
    Export(Export),
    /// Write a run for TensorBoard, Perfetto, scripts or an archive
    ExportRun(look::ExportRun),
    /// Write a pipeline as jobs, for sites where no leader may run
    ExportJobs(look::ExportJobs),
    /// Continue a text with the model of a step
    Generate(Generate),
    /// Talk with the model of a step
    Chat(Chat),
    /// Measure models
    #[command(subcommand)]
    Bench(Bench),
    /// Look after the cache: list, collect, pin, verify
    #[command(subcommand)]
    Cache(Cache),
    /// List stages with their ports and parameters
    Stages(Stages),
    /// Print the JSON Schema of pipeline files, for editors
    #[command(after_help = "Then, as the first line of a pipeline, for a YAML language server:
  # yaml-language-server: $schema=pipe.schema.json

Example:
  pipe schema > pipe.schema.json")]
    Schema,
    /// Print the script that lets a shell complete commands, steps and runs
    Completions(look::Completions),
    /// Print manual pages
    Man(look::Man),
    #[command(hide = true)]
    Worker(Worker),
}

/// Which pipeline, with what changed.
#[derive(Args, Clone, Default)]
pub struct Settings {
    /// Use a profile of the pipeline file; may be repeated
    #[arg(long = "profile", value_name = "NAME")]
    pub profiles: Vec<String>,
    /// Override a parameter (`--set lr=3e-4`, `--set align.lr=3e-4`); may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE")]
    pub sets: Vec<String>,
    /// Override parameters from a YAML file; may be repeated
    #[arg(long = "params", value_name = "FILE")]
    pub params: Vec<PathBuf>,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR", global = true)]
    pub cache: Option<PathBuf>,
}

/// Which remote cache.
#[derive(Args, Clone, Default)]
pub struct OfRemote {
    /// Share results by this remote: s3://bucket/prefix, gs://…, az://…, a directory, or a name of
    /// the configuration [default: $PIPE_REMOTE, else `remote:` of the configuration]
    #[arg(long, value_name = "URL")]
    pub remote: Option<String>,
    /// Believe everybody who can write to the remote, also what no key has signed
    #[arg(long)]
    pub trust_remote: bool,
    /// Use no remote
    #[arg(long, conflicts_with = "remote")]
    pub no_remote: bool,
}

/// Which steps of which pipeline, and which remote.
#[derive(Args)]
pub struct OfSteps {
    /// Steps; what they need is included [default: all]
    #[arg(value_name = "STEP")]
    pub steps: Vec<String>,
    /// Pipeline file [default: that of the newest run in this directory, with its settings]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub remote: OfRemote,
}

#[derive(Args)]
#[command(after_help = "What the remote has is not sent again, and what was broken off goes on.

Examples:
  pipe push --remote s3://team/pipe
  pipe push signals teacher -f pipelines/mohawk.yaml --remote /mnt/shared/pipe")]
pub struct Push {
    #[command(flatten)]
    pub of: OfSteps,
}

#[derive(Args)]
#[command(after_help = "All bytes are compared with their digests before they are used.

Examples:
  pipe pull distill -f pipelines/mohawk.yaml --remote s3://team/pipe --trust-remote")]
pub struct Pull {
    #[command(flatten)]
    pub of: OfSteps,
}

#[derive(Args)]
#[command(after_help = "Example:
  pipe cache keygen --comment alice@lab")]
pub struct Keygen {
    /// File of the private key [default: signing.key beside the configuration]
    pub path: Option<PathBuf>,
    /// Put after the public key, for people
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub comment: String,
}

#[derive(Args)]
#[command(after_help = "Example:
  pipe plan pipelines/mohawk.yaml --set distill.lr=1e-3")]
pub struct Plan {
    /// Pipeline file [default: the embedded `mohawk.yaml`]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Example:
  pipe check pipelines/mohawk.yaml --profile small")]
pub struct Check {
    /// Pipeline file [default: the embedded `mohawk.yaml`]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  pipe why distill
  pipe why align@2 -f pipelines/mohawk.yaml --set align.lr=1e-3")]
pub struct OfStep {
    /// The step: `distill`, `align[2]` or `align@2`
    pub step: String,
    /// Pipeline file [default: that of the newest run in this directory, with its settings]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  pipe report -o report.html
  pipe report --open --watch             # of a run that goes on: the page follows it")]
pub struct Report {
    /// Id of a run, or its beginning [default: the newest run in this directory]
    pub run: Option<String>,
    /// Where to write it
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    pub output: PathBuf,
    /// Open it in a browser ($BROWSER, else the desktop's)
    #[arg(long)]
    pub open: bool,
    /// While the run goes on, write it anew every so many seconds; the page in the browser follows
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "5", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub watch: Option<u32>,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  pipe export distill out/student
  pipe export distill out/student --dtype bf16 --tokenizer tokenizer.json

Students of Phi are written as (Hybrid-)Phi-Mamba, those of Llama as Llamba, transformers as
Hugging Face transformers has them. Beside the weights: config.json, the tokenizer, README.md (a
model card) and provenance.json. DIR must be new, empty, or an earlier export.")]
pub struct Export {
    /// The step: `distill`, `align[2]` or `align@2`
    pub step: String,
    /// The directory to write
    pub dir: PathBuf,
    /// Which output port of the step
    #[arg(long, value_name = "PORT", default_value = "model")]
    pub port: String,
    /// Element type of the weights: f32, bf16 or f16 [default: as stored]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<String>,
    /// Size of one weights file [default: 5GB for transformers, one file for students]
    #[arg(long, value_name = "SIZE")]
    pub max_shard_size: Option<String>,
    /// A tokenizer.json [default: that of the nearest step before it]
    #[arg(long, value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Pipeline file [default: that of the newest run in this directory, with its settings]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Example:
  pipe stages distill")]
pub struct Stages {
    /// Only this stage, in full
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
