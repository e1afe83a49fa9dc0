//! `evaluate`: perplexity, recall and copying of a model, its accuracy on benchmarks, and how far it
//! is from its teacher.
//!
//! After the internal metrics of MOHAWK (Bick et al. 2024): held-out perplexity, hidden-state distance
//! of every layer with the teacher's tokens, a retrieval probe.

use std::fs::File;
use std::io::{BufWriter, Write, sink};

use anyhow::{Context as _, Result, bail, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::shard::{Answer, TokenShard};
use crate::eval::bench::Bench;
use crate::eval::benchmarks;
use crate::eval::matrices::Pictures;
use crate::eval::probes::Probes;
use crate::eval::report::{AgreementFigures, Figures, Layer, Metrics, Ratios, by_distance};
use crate::eval::runner::{Loaded, Runner, SequenceScore, Work};
use crate::eval::score::{Agreement, Loss, hits};
use crate::eval::tasks::encode::Encoder;
use crate::eval::tasks::results::{Average, TaskResult};
use crate::eval::tasks::retained::Retained;
use crate::models::Model;
use crate::train::device::Device;

/// The stage.
pub struct Evaluate;

/// How much to look at, and what to refuse.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Look at no more than so many sequences of each shard.
    pub sequences: usize,
    /// Sequences of one forward pass.
    pub batch: usize,
    /// Refuse a model whose recall is below this: of a teacher that did not learn to recall, no
    /// student can. Ignored when nothing is asked.
    pub min_recall: Option<f64>,
    /// Take the first so many documents of each benchmark; all without it.
    pub limit: Option<usize>,
    /// Tokens of one forward pass of benchmarks and probes; a longer input goes alone.
    pub batch_tokens: usize,
    /// Benchmarks' inputs are cut to their last so many tokens; probes have no more.
    pub max_length: usize,
    /// The special token that stands for an empty context (BOS, or else EOS); without it the model's
    /// separator.
    pub prefix_token: Option<String>,
    /// Made-up texts with a fact to find again.
    pub probes: Probes,
    /// Mixing matrices kept beside the teacher's attention.
    pub pictures: Pictures,
    /// Where to compute.
    pub device: Device,
}

/// Longest input that a model has positions for.
const LENGTH_MAX: usize = 8192;

impl Default for Params {
    fn default() -> Params {
        Params {
            sequences: 1024,
            batch: 4,
            min_recall: None,
            limit: None,
            batch_tokens: 2048,
            max_length: 2048,
            prefix_token: None,
            probes: Probes::default(),
            pictures: Pictures::default(),
            device: Device::Auto,
        }
    }
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const VERSION: u32 = 5;
    const DOC: &'static str = "Measures perplexity, recall and copying on held-out text, accuracy on \
         benchmarks, memory by probes, and, given a teacher, agreement and the distance of hidden states.";
    const CPU: Cpu = Cpu::All;
    const GPU: bool = true;
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("model", "The model to evaluate.").tensors(),
            In::one("teacher", "The model to compare it with.").tensors().optional(),
            In::one("tokens", "Token shard of held-out documents.").optional(),
            In::one("answers", "Held-out documents that ask, with their answers.").optional(),
            In::many("tasks", "Benchmarks' documents, `piqa.jsonl` say: the name tells which.")
                .optional()
                .named(),
            In::one("tokenizer", "A `tokenizer.json`, for benchmarks and probes.").optional(),
        ];
        const OUTPUTS: &[Out] = &[
            Out::one("metrics", "metrics.json", "All figures."),
            Out::one("scores", "scores.jsonl", "Likelihoods of every choice of every benchmark.")
                .optional(),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let sizes = [
            ("sequences", params.sequences),
            ("batch", params.batch),
            ("limit", params.limit.unwrap_or(1)),
            ("batch_tokens", params.batch_tokens),
        ];
        for (name, value) in sizes {
            if value == 0 {
                wrong.push((name.to_string(), "must be at least 1".to_string()));
            }
        }
        if params.min_recall.is_some_and(|least| !(0.0..=1.0).contains(&least)) {
            wrong.push(("min_recall".into(), "is not a share of 0 to 1".into()));
        }
        if !(1..=LENGTH_MAX).contains(&params.max_length) {
            wrong.push(("max_length".into(), format!("must be 1 to {LENGTH_MAX}")));
        }
        wrong.extend(params.probes.check(params.max_length));
        wrong.extend(params.pictures.check());
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let (questions, text) = (ctx.has("tasks") || params.probes.any(), ctx.has("tokens"));
        ensure!(
            questions || text,
            "nothing to evaluate on: connect `tokens` or `tasks`, or ask for `probes`"
        );
        ensure!(
            text || !ctx.has("answers"),
            "`answers` are asked beside `tokens`: connect these too"
        );
        let student = load(ctx, "model")?;
        let teacher = if ctx.has("teacher") { Some(load(ctx, "teacher")?) } else { None };
        same_vocabulary(&student, teacher.as_ref())?;
        let runner = Runner::on(params.device, &student, teacher.as_ref())?;
        let mut metrics = Metrics { kind: "evaluation", ..Metrics::default() };
        // First, since they keep what is done when the step is stopped.
        if questions {
            ask(params, ctx, &runner, &mut metrics)?;
        }
        if text {
            read(params, ctx, &runner, &mut metrics)?;
        }
        tell(ctx, &metrics);
        let path = ctx.output("metrics")?;
        let text = serde_json::to_string_pretty(&metrics)? + "\n";
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        refuse(params, ctx, metrics.student.as_ref())
    }
}

/// Benchmarks and probes.
fn ask(params: &Params, ctx: &mut Context, runner: &Runner, metrics: &mut Metrics) -> Result<()> {
    let encoder = encoder(params, ctx, runner.student)?;
    let inputs = ctx.inputs("tasks").to_vec();
    let tasks = benchmarks::tasks(&inputs)?;
    let mut scores: Box<dyn Write> = match tasks.is_empty() {
        true => Box::new(sink()),
        false => {
            let path = ctx.output("scores")?;
            let create = || format!("cannot write {}", path.display());
            Box::new(BufWriter::new(File::create(&path).with_context(create)?))
        }
    };
    let mut bench = Bench::new(runner, params.batch_tokens, ctx)?;
    for (task, input) in tasks {
        let result =
            benchmarks::run((task, input), params.limit, &encoder, &mut bench, ctx, &mut scores)?;
        tell_task(ctx, &result);
        metrics.tasks.push(result);
    }
    scores.flush().context("cannot write the scores")?;
    metrics.average = Average::of(&metrics.tasks);
    if params.probes.any() {
        let ask = |name: &str, items: &[_]| bench.ask(name, items, ctx);
        metrics.probes = Some(params.probes.run(&encoder, ask).context("`probes`")?);
    }
    Ok(())
}

fn encoder(params: &Params, ctx: &Context, student: &Loaded) -> Result<Encoder> {
    let connected = ctx.has("tokenizer");
    ensure!(connected, "benchmarks and probes are text: connect the model's `tokenizer`");
    let tokenizer = crate::tokenize::load(ctx.path("tokenizer")?)?;
    let prefix = match &params.prefix_token {
        None => student.model.config.separator,
        Some(token) => Some(tokenizer.token_to_id(token).with_context(|| {
            format!("`prefix_token` is `{token}`, which the tokenizer does not have")
        })?),
    };
    let encoder = Encoder::new(tokenizer, prefix, params.max_length)?;
    let (ids, vocab) = (encoder.ids(), student.model.config.vocab);
    ensure!(
        ids <= vocab,
        "the tokenizer has {ids} tokens, the model {vocab}: they do not belong together"
    );
    Ok(encoder)
}

/// Puts one benchmark's figures into the run's record.
fn tell_task(ctx: &mut Context, result: &TaskResult) {
    let TaskResult { task, n, metric, student, teacher, .. } = result;
    let of = |figures: &crate::eval::tasks::results::TaskFigures| match figures.acc_norm {
        Some(norm) if *metric == "acc_norm" => norm,
        _ => figures.acc,
    };
    let own = of(student);
    let other = teacher.as_ref().map(of);
    let mut values = vec![(format!("{task}.{metric}"), own)];
    values.extend(other.map(|other| (format!("{task}.{metric}.teacher"), other)));
    let values: Vec<(&str, f64)> = values.iter().map(|(name, x)| (name.as_str(), *x)).collect();
    ctx.metric(0, &values);
    let before = other.map_or(String::new(), |other| format!("{:.1} % → ", 100.0 * other));
    ctx.note(format!("{task}: {metric} {before}{:.1} % of {n} documents", 100.0 * own));
}

fn load(ctx: &Context, port: &str) -> Result<Loaded> {
    let (model, params) =
        Model::load(&ctx.tensors(port)?).with_context(|| format!("input `{port}`"))?;
    Ok(Loaded { model, params })
}

fn same_vocabulary(student: &Loaded, teacher: Option<&Loaded>) -> Result<()> {
    let vocab = student.model.config.vocab;
    if let Some(teacher) = teacher {
        let other = teacher.model.config.vocab;
        ensure!(vocab == other, "the model has {vocab} tokens, its teacher {other}");
    }
    Ok(())
}

/// Whether model and text are about the same tokens.
fn comparable(student: &Loaded, tokens: &TokenShard) -> Result<()> {
    let (vocab, text) = (student.model.config.vocab, tokens.vocab());
    ensure!(text <= vocab, "`tokens` has a vocabulary of {text}, the model one of {vocab}");
    Ok(())
}

/// Held-out text, and what it asks.
fn read(params: &Params, ctx: &mut Context, runner: &Runner, metrics: &mut Metrics) -> Result<()> {
    let tokens = TokenShard::open(ctx.path("tokens")?)?;
    let asked = match ctx.has("answers") {
        true => Some(TokenShard::open(ctx.path("answers")?)?),
        false => None,
    };
    ensure!(!tokens.is_empty(), "there is no sequence to evaluate on in `tokens`");
    comparable(runner.student, &tokens)?;
    measure(params, ctx, runner, (&tokens, asked.as_ref()), metrics)
}

fn measure(
    params: &Params,
    ctx: &mut Context,
    runner: &Runner,
    (tokens, asked): (&TokenShard, Option<&TokenShard>),
    metrics: &mut Metrics,
) -> Result<()> {
    let Runner { student, teacher, .. } = *runner;
    let sizes = |loaded: &Loaded| (loaded.model.config.layers.len(), loaded.model.config.d_model);
    let hidden = teacher.is_some_and(|teacher| sizes(teacher) == sizes(student));
    if teacher.is_some() && !hidden {
        ctx.note("model and teacher differ in layers or width: hidden states are not compared");
    }
    let (batch, sequences) = (params.batch, params.sequences.min(tokens.len()));
    let work = Work { shard: tokens, sequences, batch, hidden };
    let text = runner.scores(work, ctx, "sequences")?;
    let (mut answers, mut found): (&[Answer], _) = (&[], [Vec::new(), Vec::new()]);
    if let Some(shard) = asked.filter(|shard| !shard.answers().is_empty()) {
        comparable(student, shard)?;
        let sequences = params.sequences.min(shard.len());
        let work = Work { shard, sequences, hidden: false, ..work };
        let scores = runner.scores(work, ctx, "sequences with answers")?;
        let within = shard.answers().partition_point(|a| (a.sequence as usize) < sequences);
        answers = &shard.answers()[..within];
        found = [0, 1].map(|side| all_hits(&scores, answers, side));
    }
    let losses = |loss: fn(&SequenceScore) -> Loss| text.iter().map(loss).collect::<Vec<_>>();
    let student_figures = Figures::of(&losses(|s| s.student), answers, &found[0]);
    let teacher_figures = teacher.map(|_| Figures::of(&losses(|s| s.teacher), answers, &found[1]));
    let agreements: Vec<Agreement> = text.iter().map(|score| score.agreement).collect();
    metrics.ratios = teacher_figures.as_ref().map(|teacher| Ratios::of(&student_figures, teacher));
    metrics.agreement = teacher.map(|_| AgreementFigures::of(&agreements));
    metrics.layers = layers(&text, tokens.seq());
    metrics.recall_by_distance = by_distance(answers, &found[0], teacher.map(|_| &found[1][..]));
    if let Some(teacher) = teacher {
        metrics.matrices = params.pictures.of(student, teacher, tokens)?;
    }
    metrics.student = Some(student_figures);
    metrics.teacher = teacher_figures;
    Ok(())
}

/// Hits of every answer, by the student (side 0) or the teacher (side 1, if there is one).
fn all_hits(scores: &[SequenceScore], answers: &[Answer], side: usize) -> Vec<u32> {
    let one = |answer: &Answer| {
        let right = &scores[answer.sequence as usize].right[side];
        if right.is_empty() { 0 } else { hits(right, answer) }
    };
    answers.iter().map(one).collect()
}

fn layers(text: &[SequenceScore], seq: usize) -> Vec<Layer> {
    let count = text.first().map_or(0, |score| score.distances.len());
    let layer = |layer: usize| {
        let all: Vec<f32> =
            text.iter().flat_map(|score| &score.distances[layer]).copied().collect();
        Layer::of(layer, &all, seq)
    };
    (0..count).map(layer).collect()
}

/// Puts the main figures into the run's record.
fn tell(ctx: &mut Context, metrics: &Metrics) {
    let student = metrics.student.as_ref();
    let optional = [
        ("perplexity", student.map(|student| student.perplexity)),
        ("recall", student.and_then(|student| student.recall)),
        ("chance", student.and_then(|student| student.chance)),
        ("copy", student.and_then(|student| student.copy)),
        ("perplexity_ratio", metrics.ratios.as_ref().map(|ratios| ratios.perplexity)),
        ("recall_ratio", metrics.ratios.as_ref().and_then(|ratios| ratios.recall)),
        ("agreement", metrics.agreement.as_ref().map(|agreement| agreement.top1)),
        ("average", metrics.average.as_ref().map(|average| average.student.value)),
        ("retained", retained(metrics).map(|retained| retained.value)),
    ];
    let present = optional.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let values: Vec<(&str, f64)> = present.collect();
    ctx.metric(0, &values);
    let words = in_words(metrics);
    if !words.is_empty() {
        ctx.note(words);
    }
}

fn retained(metrics: &Metrics) -> Option<&Retained> {
    metrics.average.as_ref()?.retained.as_ref()
}

/// The main figures on one line, teacher before student where there is one.
fn in_words(metrics: &Metrics) -> String {
    let (student, teacher) = (metrics.student.as_ref(), metrics.teacher.as_ref());
    let pair = |name: &str, of: &dyn Fn(&Figures) -> Option<String>| {
        let own = of(student?)?;
        let before = teacher.and_then(of).map_or(String::new(), |text| format!("{text} → "));
        Some(format!("{name} {before}{own}"))
    };
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let perplexity = pair("perplexity", &|f| Some(format!("{:.3}", f.perplexity)));
    let recall = pair("recall", &|f| f.recall.map(percent));
    let chance =
        student.and_then(|student| student.chance).map(|c| format!("{} by guessing", percent(c)));
    let ratio = metrics.ratios.as_ref().map(|r| format!("{:.3} times the teacher's", r.perplexity));
    let with = |text: Option<String>, more: Option<String>| {
        text.map(|text| more.map_or(text.clone(), |more| format!("{text} ({more})")))
    };
    let agreement = metrics.agreement.as_ref();
    let agreement = agreement.map(|a| format!("same first choice {}", percent(a.top1)));
    let average = metrics.average.as_ref().map(|average| {
        let teacher = average.teacher.map(|teacher| format!("{} → ", percent(teacher.value)));
        let (before, own) = (teacher.unwrap_or_default(), percent(average.student.value));
        format!("average of {} benchmarks {before}{own}", average.tasks)
    });
    let kept = retained(metrics).map(|kept| {
        let ends = kept.low.zip(kept.high);
        let ends = ends.map(|(low, high)| format!("{} to {}", percent(low), percent(high)));
        with(Some(format!("retained gain {}", percent(kept.value))), ends).unwrap_or_default()
    });
    let parts = [with(perplexity, ratio), with(recall, chance), agreement, average, kept];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Fails on a model that is of no use.
fn refuse(params: &Params, ctx: &mut Context, figures: Option<&Figures>) -> Result<()> {
    let Some(figures) = figures else { return Ok(()) };
    if !figures.nats.is_finite() {
        bail!("the model's loss on held-out text is {}: its weights are broken", figures.nats);
    }
    let Some(least) = params.min_recall else { return Ok(()) };
    match figures.recall {
        None => ctx.note("`min_recall` is ignored: no held-out document asks anything"),
        Some(recall) if recall < least => bail!(
            "the model's recall {recall:.2} is below `min_recall` {least} (guessing gives {:.2}): \
             train it with another `seed`, or longer",
            figures.chance.unwrap_or_default()
        ),
        Some(_) => {}
    }
    Ok(())
}
