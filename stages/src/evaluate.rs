//! `evaluate`: perplexity, recall and copying of a model, and how far it is from its teacher.
//!
//! After the internal metrics of MOHAWK (Bick et al. 2024): held-out perplexity, hidden-state distance
//! of every layer with the teacher's tokens, a retrieval probe.

use anyhow::{Context as _, Result, bail, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::shard::{Answer, TokenShard};
use crate::eval::report::{AgreementFigures, Figures, Layer, Metrics, Ratios, by_distance};
use crate::eval::runner::{Loaded, SequenceScore, Work, scores};
use crate::eval::score::{Agreement, Loss, hits};
use crate::models::Model;

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
}

impl Default for Params {
    fn default() -> Params {
        Params { sequences: 1024, batch: 4, min_recall: None }
    }
}

impl Stage for Evaluate {
    const NAME: &'static str = "evaluate";
    const VERSION: u32 = 1;
    const DOC: &'static str = "Measures perplexity, recall and copying on held-out text, and, \
         given a teacher, agreement and the distance of hidden states.";
    const CPU: Cpu = Cpu::All;
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("model", "The model to evaluate."),
            In::one("teacher", "The model to compare it with.").optional(),
            In::one("tokens", "Token shard of held-out documents."),
            In::one("answers", "Held-out documents that ask, with their answers.").optional(),
        ];
        const OUTPUTS: &[Out] = &[Out::one("metrics", "metrics.json", "All figures.")];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        for (name, value) in [("sequences", params.sequences), ("batch", params.batch)] {
            if value == 0 {
                wrong.push((name.to_string(), "must be at least 1".to_string()));
            }
        }
        if params.min_recall.is_some_and(|least| !(0.0..=1.0).contains(&least)) {
            wrong.push(("min_recall".into(), "is not a share of 0 to 1".into()));
        }
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let student = load(ctx, "model")?;
        let teacher = if ctx.has("teacher") { Some(load(ctx, "teacher")?) } else { None };
        let tokens = TokenShard::open(ctx.path("tokens")?)?;
        let asked = match ctx.has("answers") {
            true => Some(TokenShard::open(ctx.path("answers")?)?),
            false => None,
        };
        ensure!(!tokens.is_empty(), "there is no sequence to evaluate on in `tokens`");
        comparable(&student, teacher.as_ref(), &tokens)?;
        let metrics = measure(params, ctx, &student, teacher.as_ref(), &tokens, asked.as_ref())?;
        tell(ctx, &metrics);
        let path = ctx.output("metrics")?;
        let text = serde_json::to_string_pretty(&metrics)? + "\n";
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        refuse(params, ctx, &metrics.student)
    }
}

fn load(ctx: &Context, port: &str) -> Result<Loaded> {
    let (model, params) =
        Model::load(&ctx.tensors(port)?).with_context(|| format!("input `{port}`"))?;
    Ok(Loaded { model, params })
}

/// Whether the models and the text are about the same tokens.
fn comparable(student: &Loaded, teacher: Option<&Loaded>, tokens: &TokenShard) -> Result<()> {
    let vocab = student.model.config.vocab;
    let text = tokens.vocab();
    ensure!(text <= vocab, "`tokens` has a vocabulary of {text}, the model one of {vocab}");
    if let Some(teacher) = teacher {
        let other = teacher.model.config.vocab;
        ensure!(vocab == other, "the model has {vocab} tokens, its teacher {other}");
    }
    Ok(())
}

fn measure(
    params: &Params,
    ctx: &mut Context,
    student: &Loaded,
    teacher: Option<&Loaded>,
    tokens: &TokenShard,
    asked: Option<&TokenShard>,
) -> Result<Metrics> {
    let sizes = |loaded: &Loaded| (loaded.model.config.layers.len(), loaded.model.config.d_model);
    let hidden = teacher.is_some_and(|teacher| sizes(teacher) == sizes(student));
    if teacher.is_some() && !hidden {
        ctx.note("model and teacher differ in layers or width: hidden states are not compared");
    }
    let (batch, sequences) = (params.batch, params.sequences.min(tokens.len()));
    let work = Work { student, teacher, shard: tokens, sequences, batch, hidden };
    let text = scores(work, ctx, "sequences")?;
    let (mut answers, mut found): (&[Answer], _) = (&[], [Vec::new(), Vec::new()]);
    if let Some(shard) = asked.filter(|shard| !shard.answers().is_empty()) {
        comparable(student, teacher, shard)?;
        let sequences = params.sequences.min(shard.len());
        let work = Work { shard, sequences, hidden: false, ..work };
        let scores = scores(work, ctx, "sequences with answers")?;
        let within = shard.answers().partition_point(|a| (a.sequence as usize) < sequences);
        answers = &shard.answers()[..within];
        found = [0, 1].map(|side| all_hits(&scores, shard, answers, side));
    }
    let losses = |loss: fn(&SequenceScore) -> Loss| text.iter().map(loss).collect::<Vec<_>>();
    let student_figures = Figures::of(&losses(|s| s.student), answers, &found[0]);
    let teacher_figures = teacher.map(|_| Figures::of(&losses(|s| s.teacher), answers, &found[1]));
    let agreements: Vec<Agreement> = text.iter().map(|score| score.agreement).collect();
    Ok(Metrics {
        kind: "evaluation",
        ratios: teacher_figures.as_ref().map(|teacher| Ratios::of(&student_figures, teacher)),
        agreement: teacher.map(|_| AgreementFigures::of(&agreements)),
        layers: layers(&text, tokens.seq()),
        recall_by_distance: by_distance(answers, &found[0], teacher.map(|_| &found[1][..])),
        student: student_figures,
        teacher: teacher_figures,
    })
}

/// Hits of every answer, by the student (side 0) or the teacher (side 1, if there is one).
fn all_hits(
    scores: &[SequenceScore],
    shard: &TokenShard,
    answers: &[Answer],
    side: usize,
) -> Vec<u32> {
    let mut tokens = vec![0; shard.seq()];
    let one = |answer: &Answer| {
        let sequence = answer.sequence as usize;
        shard.copy_to(sequence, &mut tokens);
        let guesses = &scores[sequence].guesses[side];
        if guesses.is_empty() { 0 } else { hits(guesses, &tokens, answer) }
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
    let mut values = vec![("perplexity", metrics.student.perplexity)];
    let optional = [
        ("recall", metrics.student.recall),
        ("chance", metrics.student.chance),
        ("copy", metrics.student.copy),
        ("perplexity_ratio", metrics.ratios.as_ref().map(|ratios| ratios.perplexity)),
        ("recall_ratio", metrics.ratios.as_ref().and_then(|ratios| ratios.recall)),
        ("agreement", metrics.agreement.as_ref().map(|agreement| agreement.top1)),
    ];
    values.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    ctx.metric(0, &values);
    ctx.note(in_words(metrics));
}

/// The main figures on one line, teacher before student where there is one.
fn in_words(metrics: &Metrics) -> String {
    let (student, teacher) = (&metrics.student, metrics.teacher.as_ref());
    let pair = |name: &str, of: &dyn Fn(&Figures) -> Option<String>| {
        let own = of(student)?;
        let before = teacher.and_then(of).map_or(String::new(), |text| format!("{text} → "));
        Some(format!("{name} {before}{own}"))
    };
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let perplexity = pair("perplexity", &|f| Some(format!("{:.3}", f.perplexity)));
    let recall = pair("recall", &|f| f.recall.map(percent));
    let chance = student.chance.map(|chance| format!("{} by guessing", percent(chance)));
    let ratio = metrics.ratios.as_ref().map(|r| format!("{:.3} times the teacher's", r.perplexity));
    let with = |text: Option<String>, more: Option<String>| {
        text.map(|text| more.map_or(text.clone(), |more| format!("{text} ({more})")))
    };
    let agreement = metrics.agreement.as_ref();
    let agreement = agreement.map(|a| format!("same first choice {}", percent(a.top1)));
    let parts = [with(perplexity, ratio), with(recall, chance), agreement];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Fails on a model that is of no use.
fn refuse(params: &Params, ctx: &mut Context, figures: &Figures) -> Result<()> {
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
