//! Trains the teacher of the default pipeline on the sample text (or on files given) without the
//! engine, and prints what it learned: for tuning the sample. Not a part of `pipe`.

#![expect(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use engine::stage::{Context, Report, Reporter, Stage};
use stages::evaluate::{Evaluate, Params as EvaluateParams};
use stages::pretrain::{Params as PretrainParams, Pretrain};
use stages::text::{Params as TextParams, Text};
use stages::tokenize::{Params as TokenizeParams, Tokenize};
use stages::train_tokenizer::{Params as TrainTokenizerParams, TrainTokenizer};

struct Print;

impl Reporter for Print {
    fn report(&mut self, report: Report) {
        match report {
            Report::Note { text } => println!("  {text}"),
            Report::Metric { at, values } if at % 200 == 0 => println!("  {at}: {values:?}"),
            _ => {}
        }
    }
}

fn run<S: Stage>(
    dir: &Path,
    params: &S::Params,
    inputs: &[(&str, &[&Path])],
) -> Result<Vec<PathBuf>> {
    let started = Instant::now();
    let mut ctx = Context::local::<S>(dir, inputs);
    ctx.set_reporter(Box::new(Print));
    S::run(params, &mut ctx)?;
    println!("{} {:.2} s", S::NAME, started.elapsed().as_secs_f64());
    Ok(ctx.made().iter().map(|made| made.path.clone()).collect())
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: sample_recall EMPTY-FOLDER SEED [FILE...]";
    let root = PathBuf::from(arguments.next().expect(usage));
    let seed: u64 = arguments.next().expect(usage).parse()?;
    let files: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();

    let text = run::<Text>(&root.join("text"), &TextParams::default(), &[("files", &files)])?;
    let text = text[0].as_path();
    let params = TrainTokenizerParams::default();
    let tokenizer = run::<TrainTokenizer>(&root.join("tokenizer"), &params, &[("text", &[text])])?;
    let inputs: &[(&str, &[&Path])] = &[("text", &[text]), ("tokenizer", &[&tokenizer[0]])];
    let shards = run::<Tokenize>(&root.join("tokens"), &TokenizeParams::default(), inputs)?;
    let params = PretrainParams { seed, ..PretrainParams::default() };
    let teacher = root.join(format!("teacher-{seed}"));
    let model = run::<Pretrain>(&teacher, &params, &[("tokens", &[&shards[0]])])?;
    let inputs: &[(&str, &[&Path])] =
        &[("model", &[&model[0]]), ("tokens", &[&shards[1]]), ("answers", &[&shards[2]])];
    let metrics = run::<Evaluate>(&root.join("evaluation"), &EvaluateParams::default(), inputs)?;
    println!("{}", std::fs::read_to_string(&metrics[0])?);
    Ok(())
}
