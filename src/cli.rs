//! The command line; its doc comments are the help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Turns pretrained Transformers into subquadratic students: declarative, incremental pipelines.
#[derive(Parser)]
#[command(name = "pipe", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Run a pipeline; what is cached is not done again
    Run(Run),
    /// Tell what a run would do, step by step, and why
    Plan(Plan),
    /// Check a pipeline and print every error
    Check(Check),
    /// Tell why a step would run again, or why it last ran: the parameter, file or upstream step
    Why(OfStep),
    /// Show a step: parameters, key, artifacts, metrics, log
    Show(OfStep),
    /// Print the log of a step's newest attempt
    Log(OfStep),
    /// Write the report of a run as one HTML file
    Report(Report),
    /// List stages with their ports and parameters
    Stages(Stages),
    /// Print the JSON Schema of pipeline files, for editors
    Schema,
    #[command(hide = true)]
    Worker { store: PathBuf },
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

#[derive(Args)]
#[command(after_help = "Examples:
  pipe run                                   the embedded pipeline, from text to evaluated student
  pipe run pipelines/mohawk.yaml --set align.lr=3e-4
  pipe run mohawk.yaml --until signals --jobs 4")]
pub struct Run {
    /// Pipeline file [default: the embedded `mohawk.yaml`]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Cpu slots, which are also the threads of training steps [default: all]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub jobs: Option<u32>,
    /// Go on with what does not depend on a failed step
    #[arg(short, long)]
    pub keep_going: bool,
    /// Run only this step and what it needs; may be repeated
    #[arg(long, value_name = "STEP")]
    pub until: Vec<String>,
    /// Run only this step; what it needs must be cached
    #[arg(long, value_name = "STEP", conflicts_with = "until")]
    pub only: Option<String>,
    /// Run this step though it is cached; what follows goes by its bytes; may be repeated
    #[arg(long, value_name = "STEP")]
    pub from: Vec<String>,
    /// Run this step from nothing, without checkpoints; its result replaces the cached one
    #[arg(long, value_name = "STEP")]
    pub force: Vec<String>,
    /// Drop the checkpoints of this step before it runs; may be repeated
    #[arg(long, value_name = "STEP")]
    pub fresh: Vec<String>,
    /// Print nothing but errors and the last line
    #[arg(short, long)]
    pub quiet: bool,
    /// Print every event as a line of JSON on standard output
    #[arg(long)]
    pub json: bool,
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
    /// Pipeline file [default: that of the newest run in this directory]
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
  pipe report -o report.html")]
pub struct Report {
    /// Id of a run, or its beginning [default: the newest run in this directory]
    pub run: Option<String>,
    /// Where to write it
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    pub output: PathBuf,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
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
