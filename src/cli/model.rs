//! Commands that use a model: text, conversation, speed.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Settings;

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
