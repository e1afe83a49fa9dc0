//! The hand-written model against the candle reference, finite differences and itself.

use crate::reference::Reference;
use stages::models::{
    Biases, Config, Family, Keep, MixerKind, MlpKind, Model, NormKind, Params, Trained, Wiring,
};
use stages::ops::Dims;
use stages::ops::cross_entropy::{self, IGNORE};

pub fn config(tied: bool, separator: Option<u32>) -> Config {
    Config {
        vocab: 37,
        d_model: 24,
        layers: vec![MixerKind::Attention; 2],
        heads: 6,
        kv_heads: 2,
        head_dim: 6,
        ffn: 40,
        norm_eps: 1e-5,
        rope_theta: 100.0,
        tied,
        separator,
        d_state: 8,
        d_conv: 4,
        chunk: 16,
        ..Config::default()
    }
}

/// The same sizes, with every choice that Phi makes otherwise.
pub fn phi(separator: Option<u32>) -> Config {
    Config {
        family: Family::Phi,
        wiring: Wiring::Parallel,
        norm: NormKind::Layer,
        mlp: MlpKind::Gelu,
        bias: Biases { qkv: true, out: true, mlp: true, head: true },
        rotary_dim: Some(4),
        ..config(false, separator)
    }
}

/// Llama's wiring with Qwen2's biases.
pub fn qwen2(separator: Option<u32>) -> Config {
    let bias = Biases { qkv: true, ..Biases::default() };
    Config { family: Family::Qwen2, bias, ..config(true, separator) }
}

/// Tokens with a separator (0) now and then, and targets of which some are not scored.
fn batch(dims: Dims, vocab: u32) -> (Vec<u32>, Vec<u32>) {
    let token = |i: u32| if i % 11 == 7 { 0 } else { i.wrapping_mul(2_654_435_761) >> 7 };
    let tokens: Vec<u32> = (0..dims.tokens() as u32).map(|i| token(i) % vocab).collect();
    let target = |i: usize| if i % 5 == 4 { IGNORE } else { tokens[(i * 7 + 3) % tokens.len()] };
    let targets = (0..tokens.len()).map(target).collect();
    (tokens, targets)
}

/// Weights far from their start, so that norms and softmax are exercised.
pub fn weights(model: &Model) -> Params {
    let mut params = model.init(5);
    for (i, value) in params.flat.iter_mut().enumerate() {
        *value = *value * 2.0 + 0.1 * ((i as f32 * 0.7).sin());
    }
    params
}

struct Run {
    loss: f64,
    grads: Params,
    hidden: Vec<Vec<f32>>,
    attention: Vec<Vec<f32>>,
    lse: Vec<Vec<f32>>,
    logits: Vec<f32>,
}

fn run(model: &Model, params: &Params, dims: Dims, trained: Trained) -> Run {
    let (tokens, targets) = batch(dims, model.config.vocab as u32);
    let (n, v) = (dims.tokens(), model.config.vocab);
    let mut pass = model.pass(dims, Keep::Backward);
    pass.tokens_n.copy_from_slice(&tokens);
    let (mut attention, mut lse) = (Vec::new(), Vec::new());
    model.forward(&params.flat, &mut pass, |_, _, saved| {
        let saved = saved.mixer.attention().unwrap();
        attention.push(saved.probs_bhll.clone());
        lse.push(saved.lse_bhl.clone());
    });
    let scored = targets.iter().filter(|t| **t != IGNORE).count() as f32;
    let mut grads = Params::zeros(&model.layout);
    let (mut loss, mut all) = (0.0, Vec::new());
    for first in (0..n).step_by(8) {
        let rows = first..n.min(first + 8);
        let mut logits = vec![0.0; rows.len() * v];
        model.logits(&params.flat, &pass, rows.clone(), &mut logits);
        all.extend_from_slice(&logits);
        loss += cross_entropy::hard(v, &mut logits, &targets[rows.clone()], 1.0 / scored);
        model.head_backward(&params.flat, &mut pass, rows, &logits, trained, &mut grads.flat);
    }
    model.backward(&params.flat, &mut pass, trained, &mut grads.flat);
    let loss = loss / f64::from(scored);
    Run { loss, grads, hidden: pass.hidden, attention, lse, logits: all }
}

pub fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().map(|x| x * x).sum::<f32>().sqrt();
    let gap = got.iter().zip(want).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
    assert!(size > 0.0, "{what} is all zero");
    assert!(gap <= tolerance * size, "{what}: off by {gap:e} of {size:e}");
}

#[test]
fn forward_and_every_gradient_agree_with_candle() {
    for (config, dims) in [
        (config(true, None), Dims { batch: 2, seq: 19 }),
        (config(false, Some(0)), Dims { batch: 1, seq: 83 }),
        (config(true, Some(0)), Dims { batch: 3, seq: 1 }),
        (phi(Some(0)), Dims { batch: 2, seq: 37 }),
        (qwen2(None), Dims { batch: 2, seq: 37 }),
    ] {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let ours = run(&model, &params, dims, Trained::ALL);
        let reference = Reference::new(&model, &params).unwrap();
        let (tokens, targets) = batch(dims, model.config.vocab as u32);
        let out = reference.forward(dims, &tokens).unwrap();
        let flat = |t: &candle_core::Tensor| -> Vec<f32> {
            let t = t.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap();
            t.to_vec1().unwrap()
        };
        for (l, hidden) in out.hidden.iter().enumerate() {
            close(&format!("h_{l}"), &ours.hidden[l], &flat(hidden), 1e-5);
        }
        for (l, a) in out.attention.iter().enumerate() {
            close(&format!("A of layer {l}"), &ours.attention[l], &flat(a), 1e-5);
        }
        close("logits", &ours.logits, &flat(&out.logits), 1e-5);
        let loss = reference.loss(&out.logits, &targets).unwrap();
        let want = loss.to_scalar::<f64>().unwrap();
        assert!((ours.loss - want).abs() < 1e-5 * want, "{} {want}", ours.loss);
        let grads = reference.gradients(&loss).unwrap();
        for file in model.layout.files() {
            let (got, want) =
                (&ours.grads.flat[file.range.clone()], &grads.flat[file.range.clone()]);
            let single =
                dims.seq == 1 && ["q_proj", "k_proj"].iter().any(|n| file.name.contains(n));
            match single {
                true => assert!(got.iter().all(|g| g.abs() < 1e-4), "one key leaves no choice"),
                false => close(&file.name, got, want, 1e-4),
            }
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let model = Model::new(config(true, Some(0))).unwrap();
    let (dims, mut params) = (Dims { batch: 2, seq: 19 }, weights(&model));
    let ours = run(&model, &params, dims, Trained::ALL);
    for file in model.layout.files() {
        let range = &ours.grads.flat[file.range.clone()];
        let steepest = (0..range.len()).max_by(|a, b| range[*a].abs().total_cmp(&range[*b].abs()));
        let at = file.range.start + steepest.unwrap();
        let (before, step) = (params.flat[at], 2e-3);
        let mut loss_at = |value| {
            params.flat[at] = value;
            run(&model, &params, dims, Trained::ALL).loss
        };
        let slope = (loss_at(before + step) - loss_at(before - step)) / f64::from(2.0 * step);
        params.flat[at] = before;
        let grad = f64::from(ours.grads.flat[at]);
        assert!((slope - grad).abs() < 2e-2 * grad.abs() + 1e-4, "{}: {slope} {grad}", file.name);
    }
}

#[test]
fn log_sum_exp_rebuilds_the_attention_from_q_and_k() {
    let model = Model::new(config(true, Some(0))).unwrap();
    let (dims, params) = (Dims { batch: 2, seq: 19 }, weights(&model));
    let ours = run(&model, &params, dims, Trained::ALL);
    let mut pass = model.pass(dims, Keep::Nothing);
    pass.tokens_n.copy_from_slice(&batch(dims, 37).0);
    model.forward(&params.flat, &mut pass, |layer, _, saved| {
        let saved = saved.mixer.attention().unwrap();
        let (b, h, i, j) = (1, 5, 4, 2);
        let row = saved.heads().row();
        let at = |token: usize, head: usize| {
            &saved.qkv_nr[(dims.seq * b + token) * row + head * 6..][..6]
        };
        let score: f32 = at(i, h).iter().zip(at(j, 6 + h / 3)).map(|(q, k)| q * k).sum();
        let lse = ours.lse[layer][(b * 6 + h) * dims.seq + i];
        let a = ours.attention[layer][((b * 6 + h) * dims.seq + i) * dims.seq + j];
        let rebuilt = (score / 6f32.sqrt() - lse).exp();
        assert!((rebuilt - a).abs() < 1e-5 && a > 0.0, "{rebuilt} {a}");
    });
    assert_eq!(pass.hidden, ours.hidden, "shared buffers change nothing");
}

#[test]
fn frozen_parts_get_no_gradient_and_the_others_the_same() {
    let model = Model::new(config(false, None)).unwrap();
    let (dims, params) = (Dims { batch: 2, seq: 19 }, weights(&model));
    let all = run(&model, &params, dims, Trained::ALL);
    let attention = Trained { attention: true, ..Trained::MIXERS };
    let some = run(&model, &params, dims, attention);
    let none = run(&model, &params, dims, Trained::MIXERS);
    assert!(none.grads.flat.iter().all(|g| *g == 0.0), "there is no new mixer to train");
    for file in model.layout.files() {
        let (a, b) = (&all.grads.flat[file.range.clone()], &some.grads.flat[file.range.clone()]);
        match file.part {
            stages::models::Part::Mixer(_) => assert_eq!(a, b, "{}", file.name),
            _ => assert!(b.iter().all(|g| *g == 0.0), "{}", file.name),
        }
    }
}

#[test]
fn a_model_comes_back_from_its_file_with_published_names() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::new(config(false, Some(0))).unwrap();
    let params = weights(&model);
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    model.save(&one, &params).unwrap();
    let tensors = engine::tensors::Tensors::open(&one).unwrap();
    let names: Vec<&str> = tensors.names().collect();
    assert!(names.contains(&"model.layers.1.self_attn.q_proj.weight"), "{names:?}");
    assert!(names.contains(&"lm_head.weight") && names.contains(&"model.norm.weight"));
    let (back, read) = Model::load(&tensors).unwrap();
    assert_eq!((&back.config, &read.flat), (&model.config, &params.flat));
    back.save(&two, &read).unwrap();
    assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
}

#[test]
fn impossible_sizes_are_refused_by_name() {
    let mut wrong = config(true, None);
    wrong.kv_heads = 4;
    let error = Model::new(wrong).err().unwrap().to_string();
    assert!(error.contains("`heads` (6) must be a multiple of `kv_heads` (4)"), "{error}");
}
