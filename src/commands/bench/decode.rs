//! `pipe bench decode STEP...`: speed and memory of the next token after long contexts.

mod device;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use stages::models::decode::Decoder;
use stages::models::{Model, Params};
use stages::train::philox::Philox;

use super::super::{Wrong, model_of, speech};
use crate::cli::BenchDecode;
use crate::out::{self, Paint, bytes, clean};
use device::{Device, Moved};

/// One model after one context.
struct Measure {
    model: String,
    context: usize,
    /// `Err`: why it was left out.
    cost: Result<Cost, String>,
}

struct Cost {
    rate: f64,
    state: u64,
    resident: Option<u64>,
    anonymous: Option<u64>,
    /// On a GPU.
    moved: Option<Moved>,
}

/// What is measured, by name.
fn subjects(args: &BenchDecode) -> Result<Vec<(String, Load<'_>)>> {
    if let Some(sizes) = &args.sizes {
        let named = |layers: &String| {
            let student = layers == "all";
            let load: Load = Box::new(move || device::made_up(sizes, student));
            (format!("{sizes}, {layers} replaced"), load)
        };
        return Ok(args.replace.iter().map(named).collect());
    }
    let step = |name: &String| {
        let files = model_of::find(name, &args.model)?;
        let name = files.name.clone();
        Ok((name, Box::new(move || speech::load(&files)) as Load))
    };
    args.steps.iter().map(step).collect()
}

/// One model at a time is in memory.
type Load<'a> = Box<dyn Fn() -> Result<(Model, Params)> + 'a>;

pub fn decode(args: BenchDecode) -> Result<ExitCode> {
    let subjects = subjects(&args)?;
    let device = Device::open(&args)?;
    if device.is_none() && args.batch > 1 {
        bail!(Wrong("the CPU decodes one text at a time: leave out `--batch`".into()));
    }
    let mut all = Vec::new();
    if !args.json {
        out::line(Paint::stdout().dim(&heading(&args, device.as_ref())));
        let fifth = if device.is_some() { "of copy" } else { "process" };
        row(["model", "context", "tokens/s", "state", fifth, "speed", "state"].map(String::from));
    }
    for (name, load) in subjects {
        let (model, params) = load()?;
        for &context in &args.contexts {
            let cost = match &device {
                Some(device) => device.measure(&args, &model, &params, context)?,
                None => measure(&args, &model, &params, context),
            };
            let one = Measure { model: name.clone(), context, cost };
            if !args.json {
                tell(&one, first(&all, context));
            }
            all.push(one);
        }
    }
    if args.json {
        let results: Vec<Value> =
            all.iter().map(|one| one.json(first(&all, one.context))).collect();
        let mut object = json!({
            "tokens": args.tokens,
            "context": if args.read { "read" } else { "pretended" },
            "threads": rayon::current_num_threads(),
            "batch": args.batch,
            "results": results,
        });
        if let Some(device) = &device {
            object["device"] = json!(device.name());
            object["copy_gb_s"] = json!(device.copy_gb_s());
        }
        out::line(serde_json::to_string_pretty(&object)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn heading(args: &BenchDecode, device: Option<&Device>) -> String {
    let filled = match args.read {
        true => "context of random tokens, read",
        false => "context filled without reading, cost only",
    };
    let on = match device {
        Some(device) => {
            let (name, copies, batch) = (device.name(), device.copy_gb_s(), args.batch);
            format!("{}, copies {copies:.0} GB/s, {batch} texts", clean(&name))
        }
        None => format!("{} threads", rayon::current_num_threads()),
    };
    format!("median of {} tokens, {on}; {filled}", args.tokens)
}

/// What the first model took after the same context.
fn first(all: &[Measure], context: usize) -> Option<&Cost> {
    let model = &all.first()?.model;
    let same = all.iter().find(|one| one.model == *model && one.context == context);
    same.and_then(|one| one.cost.as_ref().ok())
}

fn measure(
    args: &BenchDecode,
    model: &Model,
    params: &Params,
    context: usize,
) -> Result<Cost, String> {
    let tokens = args.tokens as usize;
    let need = Decoder::bytes_after(model, context.saturating_add(tokens)) as u64;
    // A quarter more while it grows, and what the scores of attention need.
    let need = need + need / 4;
    if let Some(free) = free_memory().filter(|free| need > *free) {
        return Err(format!("its state needs {}, and {} are free", bytes(need), bytes(free)));
    }
    let mut decoder = Decoder::new(model, &params.flat);
    let mut words = (0u64..).map({
        let (random, vocab) = (Philox::new(0, "bench"), model.config.vocab as u64);
        // Not the separator: a model forgets at it.
        let separator = model.config.separator.map(u64::from);
        move |at| {
            let token = u64::from(random.block(at)[0]) % vocab;
            (if Some(token) == separator { (token + 1) % vocab } else { token }) as u32
        }
    });
    match args.read {
        true => {
            let mut left = context;
            while left > 0 {
                let piece: Vec<u32> = words.by_ref().take(left.min(4096)).collect();
                left -= piece.len();
                decoder.read(&piece);
            }
        }
        false => decoder.pretend(context),
    }
    // The first one meets memory that nobody touched yet.
    let mut seconds = Vec::new();
    for token in words.take(tokens.saturating_add(1)) {
        let started = Instant::now();
        decoder.read(&[token]);
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.remove(0);
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    Ok(Cost {
        rate: 1.0 / median.max(1e-9),
        state: decoder.bytes() as u64,
        resident: proc_bytes("/proc/self/status", "VmRSS:"),
        anonymous: proc_bytes("/proc/self/status", "RssAnon:"),
        moved: None,
    })
}

impl Measure {
    fn json(&self, first: Option<&Cost>) -> Value {
        let mut object = json!({ "model": self.model, "context": self.context });
        match &self.cost {
            Err(why) => object["skipped"] = json!(why),
            Ok(cost) => {
                object["tokens_per_second"] = json!(cost.rate);
                object["state_bytes"] = json!(cost.state);
                object["process_bytes"] = json!(cost.resident);
                object["process_anonymous_bytes"] = json!(cost.anonymous);
                object["speed_ratio"] = json!(first.map(|first| cost.rate / first.rate));
                object["state_ratio"] = json!(first.map(|first| ratio(cost.state, first.state)));
                if let Some(moved) = &cost.moved {
                    object["milliseconds"] = json!(moved.milliseconds);
                    object["weight_bytes"] = json!(moved.weights);
                    object["gb_s"] = json!(moved.gb_s);
                    object["copy_share"] = json!(moved.share);
                }
            }
        }
        object
    }
}

fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

/// A line of the table.
fn tell(one: &Measure, first: Option<&Cost>) {
    let (model, context) = (clean(&one.model), one.context.to_string());
    match &one.cost {
        Err(why) => out::line(format!("{model:<24} {context:>8}  left out: {}", clean(why))),
        Ok(cost) => {
            let first = first.unwrap_or(cost);
            let fifth = match &cost.moved {
                Some(moved) => format!("{:.1}%", 100.0 * moved.share),
                None => cost.resident.map_or("?".into(), bytes),
            };
            row([
                model,
                context,
                format!("{:.1}", cost.rate),
                bytes(cost.state),
                fifth,
                format!("{:.2}x", cost.rate / first.rate),
                format!("{:.3}x", ratio(cost.state, first.state)),
            ]);
        }
    }
}

fn row([model, context, rate, state, process, speed, state_ratio]: [String; 7]) {
    out::line(format!(
        "{model:<24} {context:>8} {rate:>10} {state:>10} {process:>10} {speed:>8} {state_ratio:>9}"
    ));
}

/// Bytes that can be had without swapping.
fn free_memory() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemAvailable:")
}

/// The line `name … kB` of a file of the kernel.
fn proc_bytes(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}
