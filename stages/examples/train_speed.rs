//! Tokens a second of teacher training at the default sizes: `cargo run --release -p stages
//! --example train_speed -- [updates] [threads]`.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::time::Instant;

use stages::models::{Config, Keep, MixerKind, Model, Trained};
use stages::train::adamw::{AdamW, Group, Rule};
use stages::train::clip;
use stages::train::language::Language;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>());
    let updates = args.next().transpose()?.unwrap_or(100);
    let threads = args.next().transpose()?.unwrap_or(2);
    let (batch, seq, vocab) = (8, 128, 512);
    let model = Model::new(Config {
        vocab,
        d_model: 64,
        layers: vec![MixerKind::Attention; 3],
        heads: 4,
        kv_heads: 4,
        head_dim: 16,
        ffn: 160,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tied: true,
        separator: None,
        d_state: 32,
        d_conv: 4,
        chunk: 64,
        ..Config::default()
    })?;
    let mut params = model.init(17);
    let mut language = Language::new(&model, batch, seq, Keep::Backward);
    let mut adamw = AdamW::new(model.layout.len(), Rule::default());
    let spans = model.layout.spans(|_| true);
    let group = |s: &stages::models::Span| {
        let decay = if s.decay { 0.1 } else { 0.0 };
        Group { range: s.range.clone(), decay, scale: 1.0 }
    };
    let groups: Vec<Group> = spans.iter().map(group).collect();
    let mut random = 1u32;
    let mut start = Instant::now();
    for update in 0..updates + 5 {
        if update == 5 {
            start = Instant::now();
        }
        language.load(batch, |_, tokens| {
            for token in tokens {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *token = random >> 23;
            }
        });
        let (loss, _) = language.step(&model, &params, Trained::ALL, threads);
        let norm = clip::norm([&language.grads().flat[..]]);
        let factor = clip::factor(norm, 1.0).unwrap_or(0.0);
        adamw.update(&mut params.flat, &language.grads().flat, &groups, 1e-3, factor);
        if update % 50 == 0 {
            println!("update {update}: loss {loss:.4}");
        }
    }
    let elapsed_s = start.elapsed().as_secs_f64();
    println!("{:.0} tok/s", (updates * batch * seq) as f64 / elapsed_s);
    Ok(())
}
