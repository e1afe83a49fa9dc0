//! `pipe bench gpu`: phases and ops on the GPU, beside what it can do at most.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use stages::gpu::bench::ceilings::Ceilings;
use stages::gpu::bench::ops::{self, Op, Work};
use stages::gpu::bench::phases::{self, Amount, Figures, Phase};
use stages::gpu::bench::subject::Subject;
use stages::gpu::fault::OutOfDeviceMemory;
use stages::gpu::launch::Gpu;

use super::super::Wrong;
use crate::cli::BenchGpu;
use crate::out::{self, Paint, clean};

/// An open device and what is asked of it.
struct Bench<'a> {
    args: &'a BenchGpu,
    gpu: Gpu,
    /// Its free memory when it was opened.
    free: usize,
    ceilings: Ceilings,
    subject: Subject,
}

/// Measures what `args` ask for.
pub fn gpu(args: &BenchGpu) -> Result<ExitCode> {
    let subject = Subject::named(&args.model).context("there is no such model")?;
    phases::sizes(&subject, amount(args)).map_err(|error| Wrong(format!("{error:#}")))?;
    let gpu = stages::gpu::open()?;
    let free = gpu.memory()?.0;
    let ceilings = Ceilings::measure(&gpu, args.model == "tiny")?;
    let bench = Bench { args, gpu, free, ceilings, subject };
    let asked = |name: &str| args.phase == name || args.phase == "all";
    let mut all_fit = true;
    bench.heading();
    if args.phase != "ops" {
        bench.phase_heading();
        for (phase, name) in Phase::ALL.into_iter().filter(|(_, name)| asked(name)) {
            all_fit &= bench.phase(phase, name)?;
        }
    }
    if asked("ops") {
        bench.ops()?;
    }
    Ok(if all_fit { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn amount(args: &BenchGpu) -> Amount {
    let BenchGpu { batch, micro_batch, updates, .. } = *args;
    Amount {
        batch: batch.unwrap_or(0) as usize,
        micro_batch: micro_batch.unwrap_or(0) as usize,
        updates: updates as usize,
    }
}

impl Bench<'_> {
    fn people(&self, line: impl FnOnce() -> String) {
        if !self.args.json {
            out::line(line());
        }
    }

    fn heading(&self) {
        let Ceilings { copy_gb_s, gemm_tflop_s } = self.ceilings;
        let name = clean(&self.gpu.name());
        let text =
            format!("{name}: copies {copy_gb_s:.0} GB/s, products {gemm_tflop_s:.1} TFLOP/s");
        self.people(|| Paint::stdout().dim(&text));
    }

    fn phase_heading(&self) {
        let names =
            ["model", "phase", "batch", "micro", "seq", "ms", "tok/s", "GiB", "share", "loss"];
        self.people(|| phase_row(names.map(String::from)));
    }

    /// Whether it fitted the device.
    fn phase(&self, phase: Phase, name: &str) -> Result<bool> {
        let (subject, json) = (&self.subject, self.args.json);
        let found = phases::measure(&self.gpu, subject, phase, amount(self.args), self.free);
        match found {
            Ok(figures) if json => out::line(self.phase_json(name, &figures).to_string()),
            Ok(figures) => out::line(self.phase_line(name, &figures)),
            Err(error) if error.is::<OutOfDeviceMemory>() => {
                let (model, why) = (subject.name, format!("{error:#}"));
                match json {
                    true => out::line(
                        json!({ "model": model, "phase": name, "oom": true, "failed": why })
                            .to_string(),
                    ),
                    false => out::line(format!("{model:<8} {name:<15} {}", clean(&why))),
                }
                return Ok(false);
            }
            Err(error) => return Err(error.context(format!("phase {name}"))),
        }
        Ok(true)
    }

    /// Of the measured ceiling of products.
    fn share(&self, figures: &Figures) -> f64 {
        figures.flops * figures.tok_s / 1e12 / self.ceilings.gemm_tflop_s
    }

    fn phase_line(&self, name: &str, f: &Figures) -> String {
        phase_row([
            self.subject.name.into(),
            name.into(),
            f.batch.to_string(),
            f.micro_batch.to_string(),
            f.seq.to_string(),
            format!("{:.2}", f.ms),
            format!("{:.0}", f.tok_s),
            format!("{:.2}", gib(f.peak_bytes)),
            format!("{:.1}%", 100.0 * self.share(f)),
            f.loss.map_or("-".into(), |loss| format!("{loss:.4}")),
        ])
    }

    fn phase_json(&self, name: &str, f: &Figures) -> Value {
        json!({
            "model": self.subject.name,
            "phase": name,
            "device": self.gpu.name(),
            "batch": f.batch,
            "micro_batch": f.micro_batch,
            "seq": f.seq,
            "tokens": f.batch * f.seq,
            "micro_tokens": f.micro_batch * f.seq,
            "tok_s": f.tok_s,
            "ms": f.ms,
            "peak_gib": gib(f.peak_bytes),
            "share": self.share(f),
            "flops_token": f.flops,
            "loss": f.loss,
            "gemm_tflop_s": self.ceilings.gemm_tflop_s,
            "copy_gb_s": self.ceilings.copy_gb_s,
        })
    }

    fn ops(&self) -> Result<()> {
        let names = ["op", "ms", "GB/s", "TFLOP/s", "share"].map(String::from);
        self.people(|| op_row(names));
        ops::measure(&self.gpu, &self.subject, amount(self.args), &mut |op: Op| {
            let (rate, share) = (op.rate(), op.share(&self.ceilings));
            let moves = matches!(op.work, Work::Bytes(_));
            if !self.args.json {
                let (rate, none) = (format!("{rate:.1}"), String::from("-"));
                let [a, b] = if moves { [rate, none] } else { [none, rate] };
                let share = format!("{:.1}%", 100.0 * share);
                return out::line(op_row([op.name.into(), format!("{:.4}", op.ms), a, b, share]));
            }
            let unit = if moves { "gb_s" } else { "tflop_s" };
            let model = self.subject.name;
            let row =
                json!({ "model": model, "op": op.name, "ms": op.ms, unit: rate, "share": share });
            out::line(row.to_string());
        })
    }
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn phase_row(
    [model, phase, batch, micro, seq, ms, rate, peak, share, loss]: [String; 10],
) -> String {
    format!(
        "{model:<8} {phase:<15} {batch:>6} {micro:>6} {seq:>6} {ms:>10} {rate:>10} {peak:>7} \
         {share:>7} {loss:>10}"
    )
}

fn op_row([op, ms, bytes, flops, share]: [String; 5]) -> String {
    format!("{op:<24} {ms:>10} {bytes:>9} {flops:>9} {share:>7}")
}
