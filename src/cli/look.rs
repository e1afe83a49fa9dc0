//! Arguments of the commands that look: at the graph, at runs, at what goes on.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Settings;

#[derive(Args)]
#[command(
    after_help = "A step with a matrix is one node unless `--expand` is given. Marks: ✓ cached, ▸ will run, ? may be
cut off (something before it runs; if that gives the same bytes, this does not), ✗ failed in the
newest run here, ! cannot run.

Examples:
  pipe graph pipelines/mohawk.yaml
  pipe graph pipelines/mohawk.yaml --state -o graph.svg
  pipe graph --format dot | dot -Tpng > graph.png"
)]
pub struct Graph {
    /// Pipeline file [default: the embedded `mohawk.yaml`]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// What to write [default: by the ending of `-o`, else text]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Draw every instance of a matrix
    #[arg(long)]
    pub expand: bool,
    /// Colour steps by what a run would do now [default: on a terminal]
    #[arg(long)]
    pub state: bool,
    /// Where to write it [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Formats of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For terminals
    Text,
    /// A picture
    Svg,
    /// Graphviz
    Dot,
    /// For Markdown
    Mermaid,
}

#[derive(Args)]
#[command(
    after_help = "`@1` is the newest run of this directory, `@2` the one before; other commands take these names, too.
A metric is a step's name and its own, or an ending of that which is clear.

Examples:
  pipe runs
  pipe runs --sort evaluate.ratios.perplexity
  pipe runs --all -n 100 --metric evaluate.student.loss --csv > runs.csv"
)]
pub struct Runs {
    /// Runs of all directories
    #[arg(long)]
    pub all: bool,
    /// The newest N
    #[arg(short, value_name = "N", default_value_t = 20)]
    pub newest: usize,
    /// Show this metric; may be repeated
    #[arg(long = "metric", value_name = "METRIC")]
    pub metrics: Vec<String>,
    /// Show this metric and sort by it, the smallest first
    #[arg(long, value_name = "METRIC")]
    pub sort: Option<String>,
    /// The biggest first
    #[arg(long, requires = "sort")]
    pub reverse: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,
    /// Print CSV
    #[arg(long)]
    pub csv: bool,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(
    after_help = "A run is the beginning of its id, or `@1` for the newest run of this directory, `@2` for the one before.

Examples:
  pipe diff @2 @1
  pipe diff 20261123-1701 @1 --all --csv"
)]
pub struct Diff {
    /// The earlier run
    pub a: String,
    /// The later run
    pub b: String,
    /// Show what is the same, too
    #[arg(long)]
    pub all: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,
    /// Print CSV
    #[arg(long)]
    pub csv: bool,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(
    after_help = "Instances of a step with a matrix, each with its values and what it measured. Without `--metric`, a
few that differ are shown, and all with `--csv` and `--json`.

Examples:
  pipe compare evaluate --sort ratios.perplexity
  pipe compare 'train[lr=*,seed=1]' --metric final.loss --csv"
)]
pub struct Compare {
    /// The step: `evaluate`, `'train[lr=*,seed=1]'`
    pub step: String,
    /// A run [default: the newest in this directory]
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Show this metric; may be repeated
    #[arg(long = "metric", value_name = "METRIC")]
    pub metrics: Vec<String>,
    /// Show this metric and sort by it, the smallest first
    #[arg(long, value_name = "METRIC")]
    pub sort: Option<String>,
    /// The biggest first
    #[arg(long, requires = "sort")]
    pub reverse: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,
    /// Print CSV
    #[arg(long)]
    pub csv: bool,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(
    after_help = "What is shown comes from the run's record, so this works from any terminal. A run whose process is
gone is shown as interrupted.

Examples:
  pipe status
  pipe status --run @2 --json"
)]
pub struct Status {
    /// A run [default: the newest in this directory]
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  pipe top
  pipe top --json")]
pub struct Top {
    /// Show it once, also on a terminal
    #[arg(long)]
    pub once: bool,
    /// Print JSON, once
    #[arg(long)]
    pub json: bool,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  pipe log teacher
  pipe log -f teacher            from a second terminal, while it runs
  pipe log align@2 --run @2")]
pub struct Log {
    /// The step: `distill`, `align[2]` or `align@2`
    pub step: String,
    /// Go on printing until the step ends
    #[arg(short = 'f', long)]
    pub follow: bool,
    /// A run [default: the newest in this directory]
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Pipeline file [default: that of the newest run in this directory, with its settings]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["run", "follow"])]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Print JSON
    #[arg(long, conflicts_with = "follow")]
    pub json: bool,
}

#[derive(Args)]
#[command(
    after_help = "  tensorboard  a directory of event files, a run for each step: `tensorboard --logdir DIR`
  trace        a file that https://ui.perfetto.dev opens: steps by lane, metrics as counters
  jsonl        a file with a line for each measured value
  ro-crate     a directory: RO-Crate 1.1 with the profile Process Run Crate, of a run that ended

Examples:
  pipe export-run --to trace -o trace.json
  pipe export-run @2 --to tensorboard -o boards
  pipe export-run --to ro-crate -o crate --license https://spdx.org/licenses/CC-BY-4.0"
)]
pub struct ExportRun {
    /// A run [default: the newest in this directory]
    pub run: Option<String>,
    /// For what
    #[arg(long, value_name = "FORMAT")]
    pub to: Tool,
    /// The file, or the directory, to write; a directory must be new or empty
    #[arg(short, long, value_name = "PATH")]
    pub output: PathBuf,
    /// Under which licence an RO-Crate is given on: a URL, or words
    #[arg(long, value_name = "LICENSE", default_value = "no licence is stated; ask its author")]
    pub license: String,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// Who reads a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tool {
    Tensorboard,
    #[value(aliases = ["perfetto", "chrome"])]
    Trace,
    Jsonl,
    RoCrate,
}

#[derive(Args)]
#[command(
    after_help = "Steps are those of the pipeline file that stands in the line, else of the newest run in the directory.

Examples:
  source <(pipe completions bash)                                   in ~/.bashrc
  source <(pipe completions zsh)                                    in ~/.zshrc, after `compinit`
  pipe completions fish > ~/.config/fish/completions/pipe.fish"
)]
pub struct Completions {
    /// For which shell
    #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"])]
    pub shell: String,
}

#[derive(Args)]
#[command(after_help = "Examples:
  pipe man | man -l -
  pipe man -o ~/.local/share/man/man1            one page for each command: `man pipe-run`
  pipe man --markdown -o docs/reference          commands, stages and the pipeline file")]
pub struct Man {
    /// Write Markdown: commands, stages and the pipeline file
    #[arg(long)]
    pub markdown: bool,
    /// Write all pages into this directory [default: print, without `--markdown` that of `pipe`]
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

#[derive(Args)]
#[command(
    after_help = "Models are GGUF files and Hugging Face directories below this directory, and what the hub's cache
holds. The smallest is taken; the others stand in the file. Without any, the pipeline trains a small
teacher of its own.

Examples:
  pipe init
  pipe init -o student.yaml && pipe run student.yaml --profile try"
)]
pub struct Init {
    /// The pipeline file to write
    #[arg(short, long, value_name = "FILE", default_value = "pipeline.yaml")]
    pub output: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    pub force: bool,
}

#[derive(Args)]
#[command(
    after_help = "Its leader, if it goes on somewhere, stops; what its steps have saved stays.

Examples:
  pipe cancel
  pipe cancel 20261126-0031"
)]
pub struct Cancel {
    /// A run [default: the newest in this directory]
    pub run: Option<String>,
    /// Where artifacts are kept [default: $PIPE_CACHE, else the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

#[derive(Args)]
#[command(
    after_help = "Every step becomes a job that runs `pipe run --only STEP` with the same settings and cache, which
all nodes must see. Kubernetes knows no order of Jobs: they have their wave as a label.

Examples:
  pipe export-jobs script pipelines/mohawk.yaml > submit.sh && bash submit.sh
  pipe export-jobs k8s mohawk.yaml --image lab/pipe:1 --claim shared > jobs.json
  kubectl apply -f jobs.json -l pipe/wave=0"
)]
pub struct ExportJobs {
    /// What to write
    pub format: JobFormat,
    /// Pipeline file [default: the embedded `mohawk.yaml`]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    /// Only this step and what it needs; may be repeated
    #[arg(long, value_name = "STEP")]
    pub until: Vec<String>,
    /// GPUs of a node: `device: auto` computes on one if there is any
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub gpus: u32,
    /// With `k8s`: an image with `pipe` in it
    #[arg(long, value_name = "IMAGE", default_value = "pipe")]
    pub image: String,
    /// With `k8s`: a claim of a volume that holds the cache and the pipeline's files
    #[arg(long, value_name = "CLAIM")]
    pub claim: Option<String>,
    /// With `k8s`: where that is mounted
    #[arg(long, value_name = "DIR", default_value = "/work")]
    pub mount: String,
}

/// Jobs without a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum JobFormat {
    /// A script that submits a chain of jobs to Slurm
    Script,
    /// Kubernetes Jobs
    K8s,
}
