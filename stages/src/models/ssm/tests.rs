//! The mixer as a whole: gradients, decoding, names.

use super::*;
use crate::models::{Mixer, MixerKind, Model, mixer};
use crate::ops::vector::dot;
use crate::train::philox::Philox;

const DIMS: Dims = Dims { batch: 2, seq: 21 };

fn normal(name: &str, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n];
    Philox::new(4, name).fill_normal(1.0, &mut out);
    out
}

/// A one-layer student whose parameters have all left their start.
fn student() -> (Model, Vec<f32>, Vec<u32>) {
    let config = Config {
        vocab: 11,
        d_model: 12,
        layers: vec![MixerKind::Ssm],
        heads: 2,
        kv_heads: 2,
        head_dim: 4,
        ffn: 8,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        tied: true,
        separator: None,
        d_state: 5,
        d_conv: 4,
        chunk: 8,
        ..Config::default()
    };
    let model = Model::new(config).unwrap();
    let mut params = model.init(3).flat;
    let noise = normal("noise", params.len());
    params.iter_mut().zip(noise).for_each(|(p, n)| *p += 0.3 * n);
    let start = |n: u32| if n > 21 && n % 21 >= 9 { 9 } else { 0 };
    (model, params, (0..42).map(start).collect())
}

fn ssm(model: &Model) -> &Ssm {
    match &model.blocks[0].mixer {
        Mixer::Ssm(ssm) => ssm,
        Mixer::Attention(_) => panic!("not a student"),
    }
}

/// Compares `grads` of every entry of the mixer with the slope of `loss` along one direction.
fn check_slopes(model: &Model, params: &[f32], grads: &[f32], mut loss: impl FnMut(&[f32]) -> f64) {
    for entry in model.layout.entries() {
        if entry.part != Part::Mixer(0) {
            continue;
        }
        let direction = normal(&entry.name, entry.slot.len());
        let mut at = |by: f32| {
            let mut moved = params.to_vec();
            let to = entry.slot.of_mut(&mut moved);
            to.iter_mut().zip(&direction).for_each(|(p, d)| *p += by * d);
            loss(&moved)
        };
        let want = (at(2e-3) - at(-2e-3)) / 4e-3;
        let got = f64::from(dot(&direction, entry.slot.of(grads)));
        assert!((got - want).abs() < 1e-2 * (0.05 + want.abs()), "{}: {got} {want}", entry.name);
    }
}

#[test]
fn gradients_of_every_parameter_match_slopes_of_the_output() {
    let (model, params, starts) = student();
    let ssm = ssm(&model);
    let scene = model.scene(DIMS, &starts);
    let (x, w) = (normal("x", 42 * 12), normal("w", 42 * 12));
    let mut saved = ssm.saved(DIMS);
    let mut loss = |params: &[f32], x: &[f32]| {
        let mut out = vec![0.0; 42 * 12];
        ssm.forward(params, scene, x, &mut out, &mut saved);
        out.iter().zip(&w).map(|(o, w)| f64::from(*o) * f64::from(*w)).sum::<f64>()
    };
    loss(&params, &x);
    let mut forward = ssm.saved(DIMS);
    ssm.forward(&params, scene, &x, &mut vec![0.0; 42 * 12], &mut forward);
    let (mut grads, mut dx) = (vec![0.0; params.len()], vec![9.0; x.len()]);
    let mut scratch = ssm.scratch(DIMS);
    ssm.backward(&params, scene, &x, &w, &mut dx, &forward, &mut scratch, Some(&mut grads));
    check_slopes(&model, &params, &grads, |params| loss(params, &x));
    let direction = normal("dx", x.len());
    let mut at = |by: f32| {
        let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + by * d).collect();
        loss(&params, &moved)
    };
    let want = (at(2e-3) - at(-2e-3)) / 4e-3;
    let got = f64::from(dot(&direction, &dx));
    assert!((got - want).abs() < 1e-2 * want.abs(), "{got} {want}");
    let mut without = vec![9.0; x.len()];
    ssm.backward(&params, scene, &x, &w, &mut without, &forward, &mut scratch, None);
    assert_eq!(dx, without);
}

#[test]
fn gradients_of_phase_1_match_slopes_and_touch_what_the_matrix_holds() {
    let (model, params, starts) = student();
    let ssm = ssm(&model);
    let scene = model.scene(DIMS, &starts);
    let x = normal("x", 42 * 12);
    let mut packed = vec![0.0; 4 * 21 * 22 / 2];
    Philox::new(4, "A").fill_uniform(0.0, 0.3, &mut packed);
    let teacher = orient::Teacher::Packed(&packed);
    let (mut saved, mut scratch) = (ssm.saved(DIMS), ssm.scratch(DIMS));
    ssm.forward_matrix(&params, scene, &x, &mut saved);
    let mut grads = vec![0.0; params.len()];
    ssm.orient(&params, scene, &x, teacher, 0.25, &saved, &mut scratch, Some(&mut grads));
    check_slopes(&model, &params, &grads, |params| {
        ssm.forward_matrix(params, scene, &x, &mut saved);
        ssm.orient(params, scene, &x, teacher, 0.25, &saved, &mut scratch, None).distance / 4.0
    });
    let x_rows = model.layout.get("backbone.layers.0.mixer.in_proj.weight.x").unwrap().slot;
    assert!(x_rows.of(&grads).iter().all(|g| *g == 0.0));
}

#[test]
fn decoding_token_by_token_gives_what_the_whole_sequence_gives() {
    let (model, params, starts) = student();
    let ssm = ssm(&model);
    let x = normal("x", 42 * 12);
    let mut out = vec![0.0; 42 * 12];
    ssm.forward(&params, model.scene(DIMS, &starts), &x, &mut out, &mut ssm.saved(DIMS));
    let mut state = ssm.state();
    for n in 0..42 {
        let mut one = vec![0.0; 12];
        let first = starts[n] as usize == n % 21;
        ssm.run(&params, 1, first, &x[n * 12..][..12], &mut one, &mut state);
        for (a, b) in one.iter().zip(&out[n * 12..]) {
            assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "token {n}: {a} {b}");
        }
    }
}

#[test]
fn files_hold_one_projection_under_the_published_names() {
    let (model, ..) = student();
    let file = |name: &str| {
        let name = format!("backbone.layers.0.mixer.{name}");
        model.layout.files().iter().find(|f| f.name == name).map(|f| f.shape.clone())
    };
    assert_eq!(file("in_proj.weight"), Some(vec![8 + 10 + 10 + 8 + 2, 12]));
    assert_eq!(file("conv1d.weight"), Some(vec![28, 1, 4]));
    assert_eq!(file("z_bias"), Some(vec![8]));
    let start = model.init(1);
    let open = start.named("backbone.layers.0.mixer.z_bias").unwrap();
    assert!((crate::ops::vector::silu(open[0]) - 1.0).abs() < 1e-6);
    let mut scratch = mixer::Scratch::default();
    model.blocks[0].mixer.reserve(DIMS, &mut scratch);
}
