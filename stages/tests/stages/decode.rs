//! Token by token against the whole text at once, for every family, kind of mixer and chunking.

use crate::model::{close, config, phi, qwen2, weights};
use stages::models::decode::Decoder;
use stages::models::{Config, Keep, MixerKind, Model, Params};
use stages::ops::Dims;

/// Students of `teacher`: all layers replaced, and the first one kept.
fn students(teacher: Config) -> [Config; 3] {
    let mut pure = teacher.clone();
    pure.layers = vec![MixerKind::Ssm; 2];
    let mut hybrid = teacher.clone();
    hybrid.layers = vec![MixerKind::Attention, MixerKind::Ssm];
    [teacher, pure, hybrid]
}

pub fn all(separator: Option<u32>) -> impl Iterator<Item = Config> {
    let teachers = [config(true, separator), phi(separator), qwen2(separator)];
    teachers.into_iter().flat_map(students)
}

/// Logits after every token, `[tokens, vocab]`.
pub fn logits(model: &Model, params: &Params, tokens: &[u32]) -> Vec<f32> {
    let mut pass = model.pass(Dims { batch: 1, seq: tokens.len() }, Keep::Nothing);
    pass.tokens_n.copy_from_slice(tokens);
    model.forward(&params.flat, &mut pass, |_, _, _| {});
    let mut all = vec![0.0; tokens.len() * model.config.vocab];
    model.logits(&params.flat, &pass, 0..tokens.len(), &mut all);
    all
}

fn text(n: u32) -> Vec<u32> {
    (0..n).map(|i| if i % 13 == 5 { 0 } else { 1 + i.wrapping_mul(2_654_435_761) % 36 }).collect()
}

#[test]
fn every_chunking_gives_the_logits_of_the_whole_text() {
    for config in all(None).chain(all(Some(0))) {
        let model = Model::new(config).unwrap();
        let (params, tokens) = (weights(&model), text(71));
        let v = model.config.vocab;
        let want = logits(&model, &params, &tokens);
        for sizes in [vec![1; 71], vec![40, 1, 1, 1, 28], vec![71]] {
            let mut decoder = Decoder::new(&model, &params.flat);
            let mut at = 0;
            for size in sizes {
                let got = decoder.read(&tokens[at..at + size]);
                at += size;
                let what = format!("{:?} after {at}", model.config.layers);
                close(&what, got, &want[(at - 1) * v..][..v], 1e-4);
            }
            assert_eq!(decoder.position(), 71);
        }
    }
}

#[test]
fn only_attention_needs_more_memory_for_more_text() {
    for config in all(None) {
        let attends = config.layers.contains(&MixerKind::Attention);
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let mut decoder = Decoder::new(&model, &params.flat);
        let empty = decoder.bytes();
        decoder.read(&text(30));
        let some = decoder.bytes();
        for _ in 0..40 {
            decoder.read(&text(30));
        }
        assert_eq!(decoder.bytes() > some, attends);
        assert!(attends || (some == empty && empty > 0));
    }
}

#[test]
fn a_long_prompt_is_read_in_pieces() {
    let [teacher, pure, hybrid] = students(config(true, None));
    for config in [teacher, pure, hybrid] {
        let model = Model::new(config).unwrap();
        let (params, tokens) = (weights(&model), text(700));
        let mut one = Decoder::new(&model, &params.flat);
        let got = one.read(&tokens).to_vec();
        let want = logits(&model, &params, &tokens);
        close("the last of 700", &got, &want[699 * 37..], 1e-4);
        let mut far = Decoder::new(&model, &params.flat);
        far.pretend(1000);
        far.read(&tokens[..3]);
        assert_eq!(far.position(), 1003);
    }
}

#[test]
fn a_copy_goes_on_by_itself() {
    for config in all(None) {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let mut one = Decoder::new(&model, &params.flat);
        one.read(&text(20));
        let mut copy = one.clone();
        one.read(&[7, 8, 9]);
        let got = copy.read(&[3, 4]).to_vec();
        let mut other = Decoder::new(&model, &params.flat);
        other.read(&text(20));
        assert_eq!(got, other.read(&[3, 4]));
        assert_eq!((one.position(), copy.position()), (23, 22));
    }
}

#[test]
fn memory_is_known_before_and_little_of_it_is_spare() {
    for config in all(None) {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let mut far = Decoder::new(&model, &params.flat);
        far.pretend(100_000);
        let need = Decoder::bytes_after(&model, 100_000);
        assert!((need..need + need / 100 + 1).contains(&far.bytes()), "{need} {}", far.bytes());
        let mut grown = Decoder::new(&model, &params.flat);
        for n in 1..600 {
            grown.read(&[n % 36 + 1]);
            let need = Decoder::bytes_after(&model, n as usize);
            let room = Decoder::bytes_after(&model, n as usize + 65);
            assert!((need..=room.max(need + need / 4)).contains(&grown.bytes()), "after {n}");
        }
    }
}
