//! `pipe run`, and the workers that it starts.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::{Cli, OfRemote, Settings, Verb};

#[derive(Args)]
#[command(after_help = "Examples:
  pipe run                                   the embedded pipeline, from text to evaluated student
  pipe run pipelines/mohawk.yaml --set align.lr=3e-4
  pipe run mohawk.yaml --until signals --jobs 4
  pipe run mohawk.yaml --budget 6h           what ends in time; run it again for the rest
  pipe run mohawk.yaml --on slurm            steps become jobs; Ctrl-C leaves or cancels them")]
pub struct Run {
    /// Pipeline file [default: the embedded `mohawk.yaml`]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Where steps run; settings stand under `executor:` of the pipeline or the configuration
    #[arg(long, value_name = "PLACE", value_enum, default_value_t)]
    pub on: Place,
    /// With `--on slurm`: let a job lead the run, and return
    #[arg(long)]
    pub detach: bool,
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
    /// Run what ends within this time by the plan's estimates (`90m`, `6h`, `2d`); what still runs
    /// then is stopped at a checkpoint; exit code 3 if anything is left
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub budget: Option<f64>,
    #[command(flatten)]
    pub remote: OfRemote,
    /// Fail when the remote does not answer or does not take a result
    #[arg(long)]
    pub remote_required: bool,
    /// Read every byte of the files that steps read, and every entry, whatever was found before
    #[arg(long)]
    pub paranoid: bool,
    /// Print nothing but errors and the last line
    #[arg(short, long)]
    pub quiet: bool,
    /// Print every event as a line of JSON on standard output
    #[arg(long)]
    pub json: bool,
}

/// Seconds.
fn time(text: &str) -> Result<f64, String> {
    engine::spec::parse_duration(text)
        .ok_or_else(|| "write a time as `90s`, `45m`, `6h` or `2d`".into())
}

/// Where steps run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    /// On this machine
    #[default]
    Local,
    /// As jobs of Slurm
    Slurm,
}

/// What leaders, and jobs of a cluster, start.
#[derive(Args)]
pub struct Worker {
    /// The store
    pub store: PathBuf,
    /// Run the step in the line of this list that the job's number says
    #[arg(long, conflicts_with = "pilot")]
    pub list: Option<PathBuf>,
    /// Run step after step from this queue
    #[arg(long)]
    pub pilot: Option<PathBuf>,
    /// Stop by the leader's word, not by SIGTERM
    #[arg(long)]
    pub patient: bool,
    /// Get orders and inputs from this remote, and leave results there; the store is the node's own
    #[arg(long, requires_all = ["list", "run"])]
    pub remote: Option<String>,
    /// What the run is called there
    #[arg(long)]
    pub run: Option<String>,
}

/// The command line of a run alone, which most calls are, without the words of all others: to make
/// and read those takes half of the instructions of a run of 100 steps that has nothing to do.
#[derive(Parser)]
struct Runs {
    #[arg(long, global = true)]
    shared_cache: bool,
    #[command(subcommand)]
    verb: RunAlone,
}

#[derive(Subcommand)]
enum RunAlone {
    Run(Run),
}

impl Cli {
    /// The command line of this process; what is not right, or asks for help, is told by the whole.
    pub fn read() -> Result<Cli, clap::Error> {
        let verb = std::env::args_os().nth(1);
        let run = verb.filter(|verb| verb == "run").and_then(|_| Runs::try_parse().ok());
        run.map_or_else(Cli::try_parse, |Runs { shared_cache, verb: RunAlone::Run(run) }| {
            Ok(Cli { shared_cache, verb: Verb::Run(run) })
        })
    }
}
