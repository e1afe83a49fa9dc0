//! The phases on a tiny teacher: losses fall, interrupted equals uninterrupted, bits do not depend
//! on threads, and one step over all layers equals a step for each.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use engine::stage::{Cancelled, Context, Report, Reporter, Stage};
use serde_json::Value;
use stages::align::{self, Align};
use stages::assemble::{self, Assemble};
use stages::cache_teacher::{self, CacheTeacher};
use stages::data::shard::ShardWriter;
use stages::distill::{self, Distill};
use stages::models::start::Start;
use stages::models::{Config, MixerKind, Model, Part};
use stages::orient::{self, Orient};
use stages::train::philox::Philox;
use stages::train::signals::AttentionForm;

const VOCAB: usize = 40;
const SEQ: usize = 24;

/// A place with a random teacher and tokens.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let config = Config {
            vocab: VOCAB,
            d_model: 16,
            layers: vec![MixerKind::Attention; 2],
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            ffn: 24,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            tied: true,
            separator: Some(0),
            d_state: 64,
            d_conv: 4,
            chunk: 64,
            ..Config::default()
        };
        let teacher = Model::new(config).unwrap();
        teacher.save(&place.path("teacher.safetensors"), &teacher.init(5)).unwrap();
        let mut writer = ShardWriter::create(&place.path("train.bin"), VOCAB, SEQ, 0).unwrap();
        let random = Philox::new(9, "tokens");
        for document in 0..80u64 {
            let word = |i| random.block(document * 100 + i)[0] % (VOCAB as u32 - 1) + 1;
            let tokens: Vec<u32> = (0..20).map(|i| word(i / 2 % 5)).collect();
            writer.document(&tokens).unwrap();
        }
        writer.finish().unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a stage in a fresh directory called `name`; `edit` may change the context.
    fn run<S: Stage>(
        &self,
        name: &str,
        params: &S::Params,
        inputs: &[(&str, &[&Path])],
        edit: impl FnOnce(&mut Context),
    ) -> Result<Vec<PathBuf>> {
        let mut ctx = Context::local::<S>(&self.path(name), inputs);
        edit(&mut ctx);
        S::run(params, &mut ctx)?;
        Ok(ctx.made().iter().map(|made| made.path.clone()).collect())
    }
}

/// Asks to stop after so many reports of progress.
struct StopAfter(u64, Arc<AtomicBool>);

impl Reporter for StopAfter {
    fn report(&mut self, report: Report) {
        if let Report::Progress { .. } = report {
            self.0 = self.0.saturating_sub(1);
            self.1.store(self.0 == 0, Ordering::Relaxed);
        }
    }
}

fn stop_after(updates: u64) -> impl FnOnce(&mut Context) {
    move |ctx| {
        let flag = ctx.cancel_flag();
        ctx.set_reporter(Box::new(StopAfter(updates + 1, flag)));
    }
}

fn bytes(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn metrics(paths: &[PathBuf]) -> Value {
    let path = paths.iter().find(|path| path.ends_with("metrics.json")).unwrap();
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn items<'a>(paths: &'a [PathBuf], port: &str) -> Vec<&'a Path> {
    let of_port = |path: &&PathBuf| path.parent().is_some_and(|folder| folder.ends_with(port));
    paths.iter().filter(of_port).map(PathBuf::as_path).collect()
}

fn orient_params(updates: u64) -> orient::Params {
    orient::Params {
        updates,
        batch: 4 * SEQ,
        d_state: 6,
        chunk: 8,
        held_out: 8,
        checkpoint_every: 5,
        metrics_every: 4,
        ..Default::default()
    }
}

fn align_params(updates: u64) -> align::Params {
    align::Params {
        updates,
        batch: 4 * SEQ,
        held_out: 8,
        checkpoint_every: 5,
        metrics_every: 4,
        ..Default::default()
    }
}

fn distill_params(updates: u64) -> distill::Params {
    distill::Params {
        updates,
        batch: 4 * SEQ,
        held_out: 8,
        checkpoint_every: 5,
        metrics_every: 4,
        ..Default::default()
    }
}

/// Runs three times: at once, on one thread, and stopped twice on the way; all must agree.
fn runs_alike<S: Stage>(
    place: &Place,
    name: &str,
    params: &S::Params,
    inputs: &[(&str, &[&Path])],
) -> Vec<PathBuf> {
    let whole = place.run::<S>(name, params, inputs, |_| {}).unwrap();
    let single = format!("{name}-single");
    let single = place.run::<S>(&single, params, inputs, |ctx| ctx.set_threads(1)).unwrap();
    assert_eq!(bytes(&whole), bytes(&single), "threads changed the result of {name}");
    let parts = format!("{name}-parts");
    for updates in [3, 4] {
        let stopped = place.run::<S>(&parts, params, inputs, stop_after(updates));
        assert!(stopped.unwrap_err().is::<Cancelled>());
    }
    let resumed = place.run::<S>(&parts, params, inputs, |_| {}).unwrap();
    assert_eq!(bytes(&whole), bytes(&resumed), "interruptions changed the result of {name}");
    whole
}

#[test]
fn all_phases_lower_their_losses_and_resume_bit_for_bit() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];

    let oriented = runs_alike::<Orient>(&place, "orient", &orient_params(40), &common);
    let figures = metrics(&oriented);
    for layer in figures["final"]["layers"].as_array().unwrap() {
        let figure = |name: &str| layer[name].as_f64().unwrap();
        assert!(figure("after") < 0.9 * figure("before"), "{layer}");
        assert!(figure("attention") > 0.0 && figure("skipped") == 0.0);
    }
    assert_eq!(figures["kind"], "training");
    assert_eq!(figures["curve"].as_array().unwrap().len(), 11);

    let mixers = items(&oriented, "mixer");
    assert_eq!(mixers.len(), 2);
    let inputs = [common[0], common[1], ("mixers", &mixers[..])];
    let aligned = runs_alike::<Align>(&place, "align", &align_params(40), &inputs);
    for layer in metrics(&aligned)["final"]["layers"].as_array().unwrap() {
        for figure in ["distance", "relative_median"] {
            let at = |when: &str| layer[figure][when].as_f64().unwrap();
            assert!(at("after") < 0.9 * at("before"), "{layer}");
        }
    }

    let blocks = items(&aligned, "block");
    let student = place
        .run::<Assemble>("assemble", &Default::default(), &[common[0], ("blocks", &blocks)], |_| {})
        .unwrap();
    let inputs = [common[0], common[1], ("student", &[&*student[0]])];
    let distilled = runs_alike::<Distill>(&place, "distill", &distill_params(60), &inputs);
    let figures = metrics(&distilled);
    let divergence = |when: &str| figures["final"][when]["divergence"].as_f64().unwrap();
    assert!(divergence("after") < 0.7 * divergence("before"), "{figures}");
    assert!(divergence("after") > 0.0);
}

#[test]
fn one_step_over_all_layers_equals_a_step_for_each() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
    let both = place.run::<Orient>("both", &orient_params(6), &common, |_| {}).unwrap();
    for layer in 0..2 {
        let params = orient::Params { layers: vec![layer], ..orient_params(6) };
        let name = format!("only-{layer}");
        let one = place.run::<Orient>(&name, &params, &common, |_| {}).unwrap();
        let (both, one) = (items(&both, "mixer"), items(&one, "mixer"));
        assert_eq!(std::fs::read(both[layer]).unwrap(), std::fs::read(one[0]).unwrap());
    }
}

#[test]
fn cached_signals_give_the_same_bits_as_the_teacher_alongside() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
    let cache = |name: &str, attention: AttentionForm| {
        let params = cache_teacher::Params { sequences: 32, attention, ..Default::default() };
        let inputs = [("model", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
        place.run::<CacheTeacher>(name, &params, &inputs, |_| {}).unwrap()
    };
    let (qk, matrix) = (cache("qk", AttentionForm::Qk), cache("matrix", AttentionForm::Matrix));
    let layers = |made| items(made, "layer");
    let orient = |name: &str, inputs: &[(&str, &[&Path])]| {
        let params = orient::Params { sequences: 32, ..orient_params(6) };
        place.run::<Orient>(name, &params, inputs, |_| {}).unwrap()
    };
    let streamed = orient("streamed", &common);
    let cached = orient("cached", &[common[0], ("signals", &layers(&qk))]);
    assert_eq!(bytes(&streamed), bytes(&cached));
    let packed = metrics(&orient("packed", &[common[0], ("signals", &layers(&matrix))]));
    let streamed = metrics(&streamed);
    for layer in 0..2 {
        let after = |all: &Value| all["final"]["layers"][layer]["after"].as_f64().unwrap();
        assert!((after(&streamed) - after(&packed)).abs() < 1e-4 * after(&packed));
    }
    let align = |name: &str, inputs: &[(&str, &[&Path])]| {
        let params = align::Params { sequences: 32, layers: vec![1], ..align_params(6) };
        place.run::<Align>(name, &params, inputs, |_| {}).unwrap()
    };
    let streamed = align("align-streamed", &common);
    let cached = align("align-cached", &[common[0], ("signals", &layers(&qk)[1..])]);
    assert_eq!(bytes(&streamed), bytes(&cached));
    let params = align::Params { layers: vec![0], ..align_params(6) };
    let inputs: &[(&str, &[&Path])] = &[common[0], ("signals", &layers(&qk)[1..])];
    let error = place.run::<Align>("wrong", &params, inputs, |_| {}).unwrap_err();
    assert!(error.to_string().contains("holds nothing of layer 0"), "{error}");
}

#[test]
fn every_start_and_target_trains() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
    let mut before = Vec::new();
    let starts =
        [Start::Default, Start::Paper, Start::Attention, Start::RandomGate, Start::WideDecay];
    for (i, init) in starts.into_iter().enumerate() {
        let params = orient::Params { init, d_state: 10, ..orient_params(8) };
        let name = format!("start-{i}");
        let made = place.run::<Orient>(&name, &params, &common, |_| {}).unwrap();
        let layer = &metrics(&made)["final"]["layers"][0];
        before.push(layer["before"].as_f64().unwrap());
        assert!(layer["after"].as_f64().unwrap() < before[i], "{layer}");
    }
    assert!(before[1] > before[0], "D = 1 starts farther away: {before:?}");
    assert_eq!(before[3], before[0], "the gate is no part of the matrix");
    assert_ne!(before[4], before[0], "decays are");
    let first = |init| {
        let params = align::Params { init, layers: vec![1], ..align_params(1) };
        let made = place.run::<Align>(&format!("{init:?}"), &params, &common, |_| {}).unwrap();
        metrics(&made)["final"]["layers"][0]["distance"]["before"].as_f64().unwrap()
    };
    assert_ne!(first(Start::RandomGate), first(Start::Default), "the output has the gate");
    for (i, target) in [align::Target::Mixer, align::Target::Both].into_iter().enumerate() {
        let params =
            align::Params { target, train_mlp: i == 1, layers: vec![1], ..align_params(12) };
        let made = place.run::<Align>(&format!("target-{i}"), &params, &common, |_| {}).unwrap();
        let figure = &metrics(&made)["final"]["layers"][0]["distance"];
        assert!(figure["after"].as_f64() < figure["before"].as_f64(), "{figure}");
    }
}

#[test]
fn assemble_wants_every_layer_exactly_once() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
    let aligned = place.run::<Align>("align", &align_params(1), &common, |_| {}).unwrap();
    let blocks = items(&aligned, "block");
    let assemble = |keep: &[usize], blocks: &[&Path]| {
        let params = assemble::Params {
            keep_attention: assemble::Kept::Layers(keep.to_vec()),
            ..Default::default()
        };
        let inputs: &[(&str, &[&Path])] = &[common[0], ("blocks", blocks)];
        let made = place.run::<Assemble>("assemble", &params, inputs, |_| {});
        made.map_err(|error| format!("{error:#}"))
    };
    let gap = assemble(&[], &blocks[..1]).unwrap_err();
    assert!(gap.contains("no block replaces layer 1") && gap.contains("`keep_attention`"), "{gap}");
    assert!(assemble(&[], &[blocks[0], blocks[0]]).unwrap_err().contains("layer 0 is there twice"));
    assert!(assemble(&[0], &blocks).unwrap_err().contains("replaces it"));
    assert!(assemble(&[7], &blocks).unwrap_err().contains("names layer 7"));
    assert!(assemble(&[], &[]).unwrap_err().contains("`init: default`"));
    let hybrid = assemble(&[1], &blocks[..1]).unwrap();
    let (model, _) = Model::load(&engine::tensors::Tensors::open(&hybrid[0]).unwrap()).unwrap();
    assert_eq!(model.config.layers, [MixerKind::Ssm, MixerKind::Attention]);
    let params = distill::Params { train: distill::Train::Mixers, ..distill_params(2) };
    let inputs: &[(&str, &[&Path])] = &[common[0], common[1], ("student", &[&hybrid[0]])];
    place.run::<Distill>("mixers", &params, inputs, |_| {}).unwrap();
}

#[test]
fn weights_of_the_teacher_learn_at_their_share_of_the_rate() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let params = assemble::Params { init: Some(Start::Default), d_state: 6, ..Default::default() };
    let inputs: &[(&str, &[&Path])] = &[("teacher", &[&teacher])];
    let student = place.run::<Assemble>("fresh", &params, inputs, |_| {}).unwrap();
    let inputs: &[(&str, &[&Path])] =
        &[("teacher", &[&*teacher]), ("tokens", &[&*tokens]), ("student", &[&*student[0]])];
    let load = |path: &Path| Model::load(&engine::tensors::Tensors::open(path).unwrap()).unwrap();
    let (model, start) = load(&student[0]);
    // How far the mixers and all other parameters went.
    let moved = |name: &str, transferred: f64| {
        let params = distill::Params { transferred, ..distill_params(4) };
        let made = place.run::<Distill>(name, &params, inputs, |_| {}).unwrap();
        let (_, end) = load(&made[0]);
        [true, false].map(|mixers| {
            let entries = model.layout.entries();
            let own = entries.iter().filter(|e| matches!(e.part, Part::Mixer(_)) == mixers);
            let apart =
                own.flat_map(|e| e.slot.range()).map(|i| (end.flat[i] - start.flat[i]).abs());
            apart.fold(0f32, f32::max)
        })
    };
    let [whole, tenth] = [moved("whole", 1.0), moved("tenth", 0.1)];
    assert!((tenth[0] / whole[0] - 1.0).abs() < 0.3, "{whole:?} {tenth:?}");
    assert!((tenth[1] / whole[1] - 0.1).abs() < 0.05, "{whole:?} {tenth:?}");
    let names: Vec<String> = [0.0, f64::NAN]
        .iter()
        .flat_map(|transferred| {
            let wrong = distill::Params { transferred: *transferred, ..distill_params(4) };
            Distill::check(&wrong).into_iter().map(|(name, _)| name)
        })
        .collect();
    assert_eq!(names, ["transferred", "transferred"]);
}

#[test]
fn top_k_logits_of_every_token_teach_what_full_logits_teach() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let params = assemble::Params { init: Some(Start::Default), d_state: 6, ..Default::default() };
    let inputs: &[(&str, &[&Path])] = &[("teacher", &[&teacher])];
    let student = place.run::<Assemble>("fresh", &params, inputs, |_| {}).unwrap();
    let cached = |top_k: usize| {
        let keep = vec![cache_teacher::Signal::Logits];
        let params = cache_teacher::Params { sequences: 1000, keep, top_k, ..Default::default() };
        let inputs: &[(&str, &[&Path])] = &[("model", &[&teacher]), ("tokens", &[&tokens])];
        place.run::<CacheTeacher>(&format!("top-{top_k}"), &params, inputs, |_| {}).unwrap()
    };
    let distill = |name: &str, labels: f64, more: &[(&str, &[&Path])]| {
        let (teacher, student) = ([&*teacher], [&*student[0]]);
        let mut inputs = vec![("teacher", &teacher[..]), ("student", &student[..])];
        inputs.extend(more);
        let params = distill::Params { labels, ..distill_params(30) };
        let made = place.run::<Distill>(name, &params, &inputs, |_| {}).unwrap();
        let figures = metrics(&made)["final"].clone();
        ["before", "after"].map(|when| figures[when]["divergence"].as_f64().unwrap())
    };
    let full = distill("full", 0.0, &[("tokens", &[&*tokens])]);
    let top = |k: usize, labels: f64| {
        let made = cached(k);
        let (logits, sampled) = (items(&made, "logits"), items(&made, "tokens"));
        let name = format!("by-top-{k}-{labels}");
        distill(&name, labels, &[("logits", &logits), ("sampled", &sampled)])
    };
    let (all, few) = (top(VOCAB, 0.0), top(8, 0.0));
    assert_eq!(full[0], all[0]);
    assert!((full[1] - all[1]).abs() < 0.02 * full[1], "{full:?} {all:?}");
    assert!(few[1] < 0.9 * few[0], "{few:?}");
    // The random teacher knows nothing of the text: its labels lead away from it, by both ways alike.
    let (mixed, all) = (distill("labels", 0.5, &[("tokens", &[&*tokens])]), top(VOCAB, 0.5));
    assert!(mixed[1] > 1.1 * full[1] && mixed[1] < mixed[0], "{mixed:?} {full:?}");
    assert!((mixed[1] - all[1]).abs() < 0.02 * mixed[1], "{mixed:?} {all:?}");
    let wrong = distill::Params { labels: 1.0, ..distill_params(1) };
    assert_eq!(Distill::check(&wrong)[0].0, "labels");
}

#[test]
fn an_exploding_rate_ends_the_step_with_advice() {
    let place = Place::new();
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
    let params = align::Params { lr: 1e30, warmup: 0.0, ..align_params(40) };
    let error = place.run::<Align>("explode", &params, &common, |_| {}).unwrap_err();
    let text = format!("{error:#}");
    assert!(error.is::<engine::stage::Diverged>(), "{text}");
    assert!(text.contains("checkpoint") && text.contains("`lr` is too high"), "{text}");
}
