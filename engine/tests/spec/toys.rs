//! Toy stages, and the one function that tests are data for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use engine::plan::{Plan, Source};
use engine::spec::{Loaded, Options, load, load_text};
use engine::stage::{Context, Entry, In, Out, Ports, Registry, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Joins texts.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Concat {
    /// Goes between.
    pub sep: String,
    /// How often.
    pub n: u32,
    /// Learning rate.
    pub lr: f64,
    /// Which way round.
    pub mode: Mode,
    /// Which items to keep.
    pub keep: Vec<Keep>,
    /// Which layers.
    pub layers: Vec<u32>,
    /// At most this many.
    pub cap: Option<u8>,
    /// Shape of the noise.
    pub noise: Noise,
    /// Where it runs.
    pub device: String,
    /// Whether to shout.
    pub loud: bool,
}

impl Default for Concat {
    fn default() -> Concat {
        Concat {
            sep: " ".into(),
            n: 1,
            lr: 1e-3,
            mode: Mode::Plain,
            keep: Vec::new(),
            layers: Vec::new(),
            cap: None,
            noise: Noise::None,
            device: "auto".into(),
            loud: false,
        }
    }
}

#[derive(Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// As it is.
    Plain,
    /// Back to front.
    Reverse,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    Hidden,
    Attention,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Noise {
    None,
    Normal { mean: f64, std: f64 },
}

macro_rules! toy {
    ($type:ident, $name:literal, $params:ty, $ports:expr) => {
        pub struct $type;
        impl Stage for $type {
            const NAME: &'static str = $name;
            const VERSION: u32 = 1;
            const DOC: &'static str = "a toy";
            const GPU: bool = true;
            type Params = $params;
            fn ports() -> Ports {
                const PORTS: Ports = $ports;
                PORTS
            }
            fn run(_: &$params, _: &mut Context) -> Result<()> {
                Ok(())
            }
        }
    };
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// One number, which must be there.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Seq {
    /// Length of a sequence.
    pub seq: u32,
    #[serde(default)]
    pub holdout: f64,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    run: Vec<String>,
    #[serde(default)]
    out: BTreeMap<String, Option<String>>,
    #[serde(default)]
    env: BTreeMap<String, String>,
}

toy!(
    Text,
    "text",
    Nothing,
    Ports {
        inputs: &[In::many("files", "the user's files").optional().named()],
        outputs: &[Out::one("text", "text.txt", "all of it")],
    }
);
toy!(
    Teacher,
    "pretrain",
    Nothing,
    Ports {
        inputs: &[],
        outputs: &[
            Out::one("model", "model", "weights"),
            Out::one("tokenizer", "t.json", "vocabulary")
        ],
    }
);
toy!(
    Tokenize,
    "tokenize",
    Seq,
    Ports {
        inputs: &[In::one("text", "documents"), In::one("tokenizer", "vocabulary")],
        outputs: &[
            Out::one("train", "train.bin", "tokens"),
            Out::one("held", "held.bin", "tokens")
        ],
    }
);
toy!(
    Signals,
    "cache_teacher",
    Concat,
    Ports {
        inputs: &[In::one("model", "teacher"), In::one("tokens", "data")],
        outputs: &[Out::many("layer", "layer.safetensors", "signals")],
    }
);
toy!(
    Orient,
    "orient",
    Concat,
    Ports {
        inputs: &[
            In::one("teacher", "the model"),
            In::one("tokens", "data"),
            In::many("signals", "cached").optional(),
        ],
        outputs: &[Out::many("mixer", "mixer.safetensors", "one a layer")],
    }
);
toy!(
    Align,
    "align",
    Concat,
    Ports {
        inputs: &[In::many("mixers", "of phase 1")],
        outputs: &[Out::many("block", "block.safetensors", "one a layer")],
    }
);
toy!(
    Assemble,
    "assemble",
    Nothing,
    Ports {
        inputs: &[In::one("teacher", "the model"), In::many("blocks", "of phase 2")],
        outputs: &[Out::one("model", "model", "student")],
    }
);
toy!(
    Join,
    "concat",
    Concat,
    Ports {
        inputs: &[
            In::many("parts", "what to join").optional(),
            In::one("head", "goes first").optional()
        ],
        outputs: &[
            Out::one("text", "text.txt", "the whole"),
            Out::many("part", "part.txt", "pieces")
        ],
    }
);
toy!(Command, "command", Run, Ports { inputs: &[], outputs: &[] });

/// Refuses `n` 13, to see a stage's own complaint.
pub struct Picky;

impl Stage for Picky {
    const NAME: &'static str = "picky";
    const VERSION: u32 = 1;
    const DOC: &'static str = "a toy that is hard to please";
    type Params = Concat;
    fn ports() -> Ports {
        Ports { inputs: &[], outputs: &[] }
    }
    fn check(params: &Concat) -> Vec<(String, String)> {
        let unlucky = params.n == 13;
        unlucky.then(|| ("n".to_string(), "13 is unlucky".to_string())).into_iter().collect()
    }
    fn run(_: &Concat, _: &mut Context) -> Result<()> {
        Ok(())
    }
}

pub const TOYS: Registry = Registry(&[
    Entry::of::<Text>(),
    Entry::of::<Teacher>(),
    Entry::of::<Tokenize>(),
    Entry::of::<Signals>(),
    Entry::of::<Orient>(),
    Entry::of::<Align>(),
    Entry::of::<Assemble>(),
    Entry::of::<Join>(),
    Entry::of::<Picky>(),
    Entry::of::<Command>(),
]);

/// Options in a directory that has nothing.
pub fn options() -> Options {
    Options { cwd: "/nowhere".into(), ..Options::default() }
}

/// With some `--set`.
pub fn set(sets: &[&str]) -> Options {
    Options { sets: sets.iter().map(|s| s.to_string()).collect(), ..options() }
}

/// Loads a pipeline from text.
pub fn plan(yaml: &str, options: &Options) -> std::sync::Arc<Plan> {
    load_text("p.yaml", yaml, options, &TOYS).unwrap_or_else(|e| panic!("{e}")).plan
}

/// What a pipeline becomes, as text: the plan, or what is wrong.
pub fn check(yaml: &str, options: &Options) -> String {
    tell(load_text("p.yaml", yaml, options, &TOYS))
}

/// The same of files.
pub fn check_file(file: &Path, options: &Options) -> String {
    let told = tell(load(file, options, &TOYS));
    told.replace(&options.cwd.display().to_string(), "CWD")
}

fn tell(loaded: Result<Loaded, engine::diagnostic::Diagnostics>) -> String {
    match loaded {
        Ok(loaded) => show(&loaded.plan),
        Err(wrong) => {
            assert!(!wrong.0.is_empty(), "an error that says nothing");
            wrong.render(false)
        }
    }
}

/// A plan as text: a line a step, with what differs from the ordinary.
pub fn show(plan: &Plan) -> String {
    let mut text = String::new();
    let source = |source: &Source| match source {
        Source::Step { step, port, index: None } => format!("{}.{port}", plan.steps[*step].name),
        Source::Step { step, port, index: Some(i) } => {
            format!("{}.{port}[{i}]", plan.steps[*step].name)
        }
        Source::Path { path } => path.display().to_string(),
        Source::Hub { name } => format!("hf:{name}"),
    };
    let defaults = serde_json::to_value(Concat { device: "cpu".into(), ..Concat::default() });
    let defaults = defaults.expect("plain");
    for step in &plan.steps {
        let _ = write!(text, "{}: {}", step.name, step.stage);
        for port in &step.inputs {
            let sources: Vec<String> = port.sources.iter().map(source).collect();
            let _ = write!(text, " {}<-{}", port.name, sources.join("+"));
        }
        let params = step.params.value();
        for (name, value) in params.as_object().into_iter().flatten() {
            if defaults.get(name) != Some(value) {
                let _ = write!(text, " {name}={value}");
            }
        }
        if !step.after.is_empty() {
            let names: Vec<&str> =
                step.after.iter().map(|&s| plan.steps[s].name.as_str()).collect();
            let _ = write!(text, " after={}", names.join("+"));
        }
        if step.resources != Default::default() {
            let r = &step.resources;
            let _ =
                write!(text, " cpu={:?} gpu={} memory={} vram={}", r.cpu, r.gpu, r.memory, r.vram);
        }
        let _ = match (step.retries, step.timeout_s, step.cache) {
            (0, None, true) => writeln!(text),
            (retries, timeout, cache) => {
                writeln!(text, " retries={retries} timeout={timeout:?} cache={cache}")
            }
        };
    }
    for output in &plan.outputs {
        let _ = writeln!(
            text,
            "=> {} {} -> {}",
            output.name,
            source(&output.source),
            output.to.display()
        );
    }
    text
}
