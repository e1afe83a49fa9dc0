//! What the machine gives to this run, looked at now and then: processors and memory of its processes,
//! use and memory of GPUs as `nvidia-smi` tells (a context on the device would cost more).

use std::collections::HashMap;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use engine::gpu::Gpu;

use crate::processes::{self, Process};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(5);

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Processors in use by the run, and how many there are.
    pub cpus: (f64, usize),
    /// Bytes of memory that the run's processes take; 0 when not known.
    pub memory: u64,
    /// The GPUs that the run may use.
    pub gpus: Vec<GpuUse>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuUse {
    /// Its number.
    pub index: u32,
    /// Share of time in which a kernel ran, in percent, where the driver tells.
    pub busy: Option<u32>,
    /// Bytes in use by anybody.
    pub used: u64,
    /// Bytes in all.
    pub memory: u64,
}

/// Looks, and remembers the last look.
pub struct Look {
    /// UUID and number of each GPU.
    gpus: Vec<(String, u32)>,
    last: Option<(Instant, HashMap<u32, Process>)>,
    asked: Option<Child>,
    seen: Machine,
}

impl Look {
    /// Nothing was seen yet.
    pub fn new(gpus: &[Gpu]) -> Look {
        let gpus = gpus.iter().map(|gpu| (gpu.uuid.clone(), gpu.index)).collect();
        Look { gpus, last: None, asked: None, seen: Machine::default() }
    }

    /// What was seen last; looks again if that is long ago. Waits for nothing.
    pub fn at(&mut self) -> &Machine {
        if self.last.as_ref().is_some_and(|(at, _)| at.elapsed() < EVERY) {
            return &self.seen;
        }
        let all = processes::all();
        if let Some((at, before)) = &self.last {
            let usage = processes::below(std::process::id(), before, &all, at.elapsed());
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            (self.seen.cpus, self.seen.memory) = ((usage.cpus, cpus), usage.memory);
        }
        self.last = Some((Instant::now(), all));
        if !self.gpus.is_empty() {
            self.ask();
        }
        &self.seen
    }

    /// Takes the answer to the last question, if it is there, and asks the next one.
    fn ask(&mut self) {
        if let Some(child) = &mut self.asked {
            match child.try_wait() {
                Ok(None) => return,
                Ok(Some(_)) => {
                    let mut text = String::new();
                    let answer = child.stdout.as_mut().map(|out| out.read_to_string(&mut text));
                    if matches!(answer, Some(Ok(_))) {
                        self.seen.gpus = parse(&text, &self.gpus);
                    }
                }
                Err(_) => {}
            }
        }
        let mut command = Command::new("nvidia-smi");
        command.args([
            "--query-gpu=uuid,utilization.gpu,memory.used,memory.total",
            "--format=csv,noheader,nounits",
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        self.asked = command.spawn().ok();
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        if let Some(child) = &mut self.asked {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `GPU-…, 97, 34012, 81559`: percent and MiB. What is not asked for, or not told, is left out.
fn parse(text: &str, gpus: &[(String, u32)]) -> Vec<GpuUse> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let (_, index) = gpus.iter().find(|(uuid, _)| Some(&uuid.as_str()) == fields.first())?;
        let mib = |at: usize| Some(fields.get(at)?.parse::<u64>().ok()?.saturating_mul(1 << 20));
        let busy = fields.get(1).and_then(|text| text.parse().ok());
        Some(GpuUse { index: *index, busy, used: mib(2)?, memory: mib(3)? })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_gpus_are_told() {
        let ours = [("GPU-b".to_string(), 1), ("GPU-c".to_string(), 2)];
        let text =
            "GPU-a, 3, 1, 2\nGPU-b, 97, 34012, 81559\nGPU-c, [N/A], 0, 81559\nGPU-c, 1\n\nrubbish";
        let found = parse(text, &ours);
        let (b, c) = (&found[0], &found[1]);
        assert_eq!((b.index, b.busy, b.used >> 20, b.memory >> 20), (1, Some(97), 34012, 81559));
        assert_eq!((c.index, c.busy, found.len()), (2, None, 2));
    }

    #[test]
    fn a_look_is_taken_now_and_then() {
        let mut look = Look::new(&[]);
        look.at();
        let first = look.last.as_ref().map(|(at, _)| *at);
        look.at();
        assert_eq!(look.last.as_ref().map(|(at, _)| *at), first);
        assert_eq!(look.seen.memory, 0, "there is nothing to compare with yet");
        look.last.as_mut().unwrap().0 -= EVERY;
        assert!(look.at().memory > 0);
    }
}
