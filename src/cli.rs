//! The command line; its doc comments are the help.

mod cache;
pub mod look;

use std::path::PathBuf;

pub use cache::{Cache, Du, Gc, KEEP_RUNS, Ls, OfPins, Pin, Rebuild, Sort, Unpin, Verify};
use clap::{Args, Parser, Subcommand};

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

/// A model: of a step, or a file of ours.
#[derive(Args)]
pub struct OfModel {
    /// Output of the step that is the model
    #[arg(long, value_name = "PORT", default_value = "model")]
    pub port: String,
    /// Pipeline file [default: that of the newest run in this directory, with its settings]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
}

/// How the text is made.
#[derive(Args)]
pub struct Speech {
    /// Tokenizer [default: that of the nearest step upstream, or `tokenizer.json` beside the model]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Divides the logits; 0 takes the most likely token always
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub temperature: f32,
    /// Draw from the K most likely tokens; 0: from all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Draw from the fewest tokens whose probabilities reach P
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Draw from tokens at least P times as likely as the most likely one
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// Make recent tokens less likely; 1: do not
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// How many tokens are recent
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub repetition_window: usize,
    /// Equal seeds give equal texts [default: another one every time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// End before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Tell tokens, speed and memory on standard error at the end, terminal or not
    #[arg(long)]
    pub stats: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  pipe generate distill --prompt 'Once upon a time'
  pipe generate teacher --prompt - --temperature 0 < prompt.txt
  pipe generate out/student.safetensors --tokenizer tokenizer.json --count 3 --json")]
pub struct Generate {
    /// The step (`distill`, `align[2]`), or the path of a model file
    pub step: String,
    /// What to continue; `-`: standard input [default: the beginning of a text]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Tokens to make at most
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = count())]
    pub max_tokens: u64,
    /// Samples to make, each by itself
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub count: u64,
    /// Read the prompt as it is, without a token before it that begins a text
    #[arg(long)]
    pub raw: bool,
    /// Go on after a token that ends a text
    #[arg(long)]
    pub endless: bool,
    /// Print special tokens, too
    #[arg(long)]
    pub special: bool,
    /// Print an object of JSON for each sample when it is done, with its text and tokens
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub speech: Speech,
    #[command(flatten)]
    pub model: OfModel,
}

#[derive(Args)]
#[command(
    after_help = "A line is a turn; `/reset` begins again, `/exit` or Ctrl-D ends, Ctrl-C breaks an answer off.

Examples:
  pipe chat distill
  echo 'Who are you?' | pipe chat teacher --temperature 0"
)]
pub struct Chat {
    /// The step (`distill`, `align[2]`), or the path of a model file
    pub step: String,
    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = count())]
    pub max_tokens: u64,
    #[command(flatten)]
    pub speech: Speech,
    #[command(flatten)]
    pub model: OfModel,
}

#[derive(Subcommand)]
pub enum Bench {
    /// Measure the speed and the memory of making text after long contexts
    Decode(Box<BenchDecode>),
    /// Measure the GPU: phases of training and single ops, beside what it can do at most
    Gpu(BenchGpu),
}

#[derive(Args)]
#[command(
    after_help = "On a GPU a batch of texts goes on side by side; tokens/s are those of all. `of copy` is the bytes that
have to move for a token (weights, keys and values, states), a second, as a part of what the same
run measured for a large copy.

Examples:
  pipe bench decode teacher distill --contexts 1k,8k,32k,128k
  pipe bench decode --model smollm2 --contexts 32k --batch 32 --device cuda"
)]
pub struct BenchDecode {
    /// Steps, or paths of model files; the others are compared with the first
    #[arg(required_unless_present = "sizes", conflicts_with = "sizes", value_name = "STEP")]
    pub steps: Vec<String>,
    /// Sizes of a model with made-up weights, instead of steps
    #[arg(long = "model", id = "sizes", value_name = "NAME", value_parser = ["smollm2", "phi", "tiny"])]
    pub sizes: Option<String>,
    /// Layers of `--model` that are replaced: `none` is the teacher, `all` the student
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', default_value = "none,all",
        value_parser = ["none", "all"], requires = "sizes")]
    pub replace: Vec<String>,
    /// Where to decode; `auto` takes a GPU if this build can use one and there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
    pub device: String,
    /// Texts side by side; more than one on a GPU only
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub batch: u32,
    /// Tokens before those that are measured
    #[arg(long, alias = "context", value_name = "N,…", value_delimiter = ',', default_value = "1k,8k,32k,128k", value_parser = tokens)]
    pub contexts: Vec<usize>,
    /// Tokens to measure, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub tokens: u64,
    /// Read contexts of random tokens, instead of counting them as read
    #[arg(long)]
    pub read: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub model: OfModel,
}

#[derive(Args)]
#[command(
    after_help = "Sizes are those of SmolLM2-135M and Phi-1.5, weights and tokens are made up. `share`, of a phase:
the least arithmetic that it needs, as a part of what the same run measured for a large product of
bf16; of an op: its arithmetic likewise, or its bytes beside a large copy's.

Examples:
  pipe bench gpu
  pipe bench gpu --model phi --phase distill --batch 8 --json"
)]
pub struct BenchGpu {
    /// Sizes of the model
    #[arg(long, value_name = "NAME", default_value = "smollm2", value_parser = ["smollm2", "phi", "tiny"])]
    pub model: String,
    /// What to measure
    #[arg(long, value_name = "PHASE", default_value = "all",
        value_parser = ["teacher", "teacher-logits", "orient", "align", "distill", "ops", "all"])]
    pub phase: String,
    /// Sequences of an update [default: 32 of smollm2, 8 of phi]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub batch: Option<u32>,
    /// Sequences that the GPU works on at a time [default: as in training]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub micro_batch: Option<u32>,
    /// Updates to time, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub updates: u32,
    /// Print an object of JSON for each phase and op
    #[arg(long)]
    pub json: bool,
}

/// From one to a number that no run reaches.
fn count() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=1 << 40)
}

/// `1000`, `8k` (8192), `1m`.
fn tokens(text: &str) -> Result<usize, String> {
    let lower = text.trim().to_ascii_lowercase();
    let units = [('k', 1 << 10), ('m', 1 << 20), ('g', 1 << 30)];
    let (digits, unit) = units
        .iter()
        .find_map(|(letter, unit)| Some((lower.strip_suffix(*letter)?, *unit)))
        .unwrap_or((&lower, 1));
    let number = digits.parse::<usize>().ok().and_then(|number| number.checked_mul(unit));
    match number {
        Some(number @ 0..=MOST) => Ok(number),
        _ => Err("must be a number of tokens like 1000, 8k or 1m, at most 1024g".into()),
    }
}

/// The longest context: no sum of it overflows.
const MOST: usize = 1 << 40;
