//! `cache_teacher` from outside: what is read back is what the teacher computes.

use std::path::{Path, PathBuf};

use engine::stage::{Context, Stage};
use engine::tensors::Tensors;
use stages::cache_teacher::{CacheTeacher, Number, Params, Signal};
use stages::data::shard::{ShardWriter, TokenShard};
use stages::models::{Config, Keep, MixerKind, Model, Params as Weights};
use stages::ops::Dims;
use stages::train::signals::{AttentionForm, Signals};

const SEQ: usize = 21;

fn teacher(dir: &Path) -> (Model, Weights, PathBuf) {
    let config = Config {
        vocab: 29,
        d_model: 12,
        layers: vec![MixerKind::Attention; 2],
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        ffn: 20,
        norm_eps: 1e-5,
        rope_theta: 100.0,
        tied: true,
        separator: Some(0),
        d_state: 8,
        d_conv: 4,
        chunk: 16,
        ..Config::default()
    };
    let model = Model::new(config).unwrap();
    let mut weights = model.init(3);
    weights.flat.iter_mut().for_each(|w| *w *= 2.0);
    let path = dir.join("teacher.safetensors");
    model.save(&path, &weights).unwrap();
    (model, weights, path)
}

fn tokens(dir: &Path) -> PathBuf {
    let path = dir.join("tokens.bin");
    let mut writer = ShardWriter::create(&path, 29, SEQ, 0).unwrap();
    for i in 0..40u32 {
        let document: Vec<u32> = (0..13 + i % 9).map(|j| 1 + (i * 31 + j * j * 7) % 28).collect();
        writer.document(&document).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn run(dir: &Path, name: &str, params: &Params, threads: usize) -> PathBuf {
    let (_, _, model) = teacher(dir);
    let tokens = tokens(dir);
    let place = dir.join(name);
    std::fs::create_dir_all(&place).unwrap();
    let inputs: [(&str, &[&Path]); 2] = [("model", &[&model]), ("tokens", &[&tokens])];
    let mut ctx = Context::local::<CacheTeacher>(&place, &inputs);
    ctx.set_threads(threads);
    CacheTeacher::run(params, &mut ctx).unwrap();
    place.join("out")
}

fn open(out: &Path, layer: usize) -> Signals {
    let path = out.join(format!("layer/layer-{layer}.safetensors"));
    Signals::open(Tensors::open(&path).unwrap()).unwrap()
}

/// Compares every cached value with a pass over the sequence alone.
fn compare(dir: &Path, out: &Path, tolerance: f32) {
    let (model, weights, _) = teacher(dir);
    let shard = TokenShard::open(&tokens(dir)).unwrap();
    let index = Tensors::open(&out.join("tokens/tokens.safetensors")).unwrap();
    let chosen: Vec<u32> = index
        .get("sequence")
        .unwrap()
        .bytes
        .chunks(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(chosen.len(), 11);
    assert!(chosen.windows(2).all(|w| w[0] < w[1]), "{chosen:?}");
    let dims = Dims { batch: 1, seq: SEQ };
    let mut pass = model.pass(dims, Keep::Matrices);
    let near = |what: &str, got: &[f32], want: &[f32]| {
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() <= tolerance * w.abs().max(0.5), "{what}: {g} {w}");
        }
        assert_eq!(got.len(), want.len());
    };
    for (i, sequence) in chosen.iter().enumerate() {
        shard.copy_to(*sequence as usize, &mut pass.tokens_n);
        let mut seen = Vec::new();
        model.forward(&weights.flat, &mut pass, |_, _, saved| {
            let attention = saved.mixer.attention().unwrap();
            seen.push((attention.probs_bhll.clone(), attention.lse_bhl.clone()));
        });
        for (layer, (a, lse)) in seen.iter().enumerate() {
            let signals = open(out, layer);
            let mut starts = vec![9; SEQ];
            signals.starts(i, &mut starts).unwrap();
            assert_eq!(starts, pass.starts_n);
            let mut hidden = vec![0.0; SEQ * 12];
            signals.hidden(i, &mut hidden).unwrap();
            near("hidden", &hidden, &pass.hidden[layer]);
            signals.next(i, &mut hidden).unwrap();
            near("next", &hidden, &pass.hidden[layer + 1]);
            let (mut got_a, mut got_lse) = (vec![9.0; a.len()], vec![9.0; lse.len()]);
            let mut scratch = Vec::new();
            signals.attention(i, &starts, &mut scratch, &mut got_a, &mut got_lse).unwrap();
            near("A", &got_a, a);
            near("log-sum-exp", &got_lse, lse);
        }
    }
}

fn params(attention: AttentionForm, dtype: Number) -> Params {
    Params { sequences: 11, attention, dtype, ..Params::default() }
}

#[test]
fn cached_f32_signals_are_the_teachers_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for form in [AttentionForm::Qk, AttentionForm::Matrix] {
        let out = run(dir.path(), &format!("{form:?}"), &params(form, Number::F32), 2);
        compare(dir.path(), &out, 0.0);
    }
}

#[test]
fn bf16_signals_are_close_and_half_the_size() {
    let dir = tempfile::tempdir().unwrap();
    let full = run(dir.path(), "f32", &params(AttentionForm::Qk, Number::F32), 2);
    let half = run(dir.path(), "bf16", &params(AttentionForm::Qk, Number::Bf16), 2);
    compare(dir.path(), &half, 0.25);
    let size = |out: &Path| out.join("layer/layer-0.safetensors").metadata().unwrap().len() as f64;
    assert!(size(&half) < 0.7 * size(&full));
}

#[test]
fn threads_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let keep = vec![Signal::Hidden, Signal::Attention, Signal::Logits];
    let params = Params { keep, top_k: 5, ..params(AttentionForm::Qk, Number::F32) };
    let (one, two) = (run(dir.path(), "one", &params, 1), run(dir.path(), "two", &params, 2));
    for file in
        ["layer/layer-1.safetensors", "logits/logits.safetensors", "tokens/tokens.safetensors"]
    {
        let read = |out: &Path| std::fs::read(out.join(file)).unwrap();
        assert!(read(&one) == read(&two), "{file}");
    }
}

#[test]
fn top_logits_are_the_largest_and_are_left_out_when_not_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let only =
        Params { keep: vec![Signal::Logits], top_k: 5, ..params(AttentionForm::Qk, Number::F32) };
    let out = run(dir.path(), "only", &only, 2);
    assert!(!out.join("layer").exists(), "layers were written though nothing of them is kept");
    let logits = Tensors::open(&out.join("logits/logits.safetensors")).unwrap();
    let (ids, log_p) = (logits.get("ids").unwrap(), logits.get("log_p").unwrap());
    assert_eq!((ids.shape, log_p.shape), (&[11, SEQ, 5][..], &[11, SEQ, 5][..]));
    let (model, weights, _) = teacher(dir.path());
    let index = Tensors::open(&out.join("tokens/tokens.safetensors")).unwrap();
    let mut pass = model.pass(Dims { batch: 1, seq: SEQ }, Keep::Matrices);
    for (to, b) in pass.tokens_n.iter_mut().zip(index.get("tokens").unwrap().bytes.chunks(4)) {
        *to = u32::from_le_bytes(b.try_into().unwrap());
    }
    model.forward(&weights.flat, &mut pass, |_, _, _| {});
    let mut rows = vec![0.0; SEQ * 29];
    model.logits(&weights.flat, &pass, 0..SEQ, &mut rows);
    for (i, row) in rows.chunks(29).enumerate() {
        let sum: f32 = row.iter().map(|l| l.exp()).sum();
        let largest = (0..29).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
        let at = i * 5;
        assert_eq!(
            usize::from(u16::from_le_bytes([ids.bytes[2 * at], ids.bytes[2 * at + 1]])),
            largest
        );
        let stored = half::f16::from_le_bytes([log_p.bytes[2 * at], log_p.bytes[2 * at + 1]]);
        assert!((stored.to_f32() - (row[largest].exp() / sum).ln()).abs() < 1e-2);
    }
    let none = run(dir.path(), "none", &params(AttentionForm::Qk, Number::F32), 2);
    assert!(!none.join("logits").exists(), "top logits were written though none are kept");
}
