//! What processes take, from `/proc`: times and memory of a process and all below it.

use std::collections::HashMap;
use std::time::Duration;

/// One process at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    parent: u32,
    /// Processor time used so far.
    ticks: u64,
    /// Memory of its own.
    memory: u64,
}

/// What a process and all below it take.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processors in use, on the average between two looks.
    pub cpus: f64,
    /// Bytes; what they share is counted for each.
    pub memory: u64,
    /// How many there are.
    pub processes: usize,
}

/// All processes.
pub fn all() -> HashMap<u32, Process> {
    let Ok(items) = std::fs::read_dir("/proc") else { return HashMap::new() };
    let pid = |item: std::fs::DirEntry| item.file_name().to_str()?.parse::<u32>().ok();
    let pids = items.flatten().filter_map(pid);
    let page = rustix::param::page_size() as u64;
    let read = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((pid, parse(&text, page)?))
    };
    pids.filter_map(read).collect()
}

/// A line of `/proc/PID/stat`; the name in parentheses may hold anything.
fn parse(text: &str, page: u64) -> Option<Process> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Process {
        parent: number(1)? as u32,
        ticks: number(11)? + number(12)?,
        memory: number(21)? * page,
    })
}

/// What `root` and all below it took between two looks.
pub fn below(
    root: u32,
    before: &HashMap<u32, Process>,
    after: &HashMap<u32, Process>,
    between: Duration,
) -> Usage {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for (&pid, process) in after {
        children.entry(process.parent).or_default().push(pid);
    }
    let mut usage = Usage::default();
    let mut ticks = 0;
    let mut stack = vec![root];
    while let Some(pid) = stack.pop() {
        let Some(process) = after.get(&pid) else { continue };
        usage.processes += 1;
        usage.memory += process.memory;
        ticks += process.ticks - before.get(&pid).map_or(0, |old| old.ticks).min(process.ticks);
        stack.extend(children.get(&pid).into_iter().flatten());
    }
    let a_second = rustix::param::clock_ticks_per_second() as f64;
    usage.cpus = ticks as f64 / a_second / between.as_secs_f64();
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_summed_and_others_are_not() {
        let line = |parent: u32, ticks: u64| {
            format!("1 (a) b) S {parent} 0 0 0 0 0 0 0 0 0 {ticks} 5 0 0 0 0 0 0 0 0 3")
        };
        let process = |parent, ticks| parse(&line(parent, ticks), 4096).unwrap();
        let before = HashMap::from([(10, process(1, 0)), (11, process(10, 100))]);
        let after = HashMap::from([
            (10, process(1, 0)),
            (11, process(10, 200)),
            (12, process(11, 95)),
            (13, process(1, 999)),
        ]);
        let usage = below(10, &before, &after, Duration::from_secs(2));
        assert_eq!((usage.processes, usage.memory), (3, 3 * 3 * 4096));
        let a_second = rustix::param::clock_ticks_per_second() as f64;
        assert!((usage.cpus - 200.0 / a_second / 2.0).abs() < 1e-9, "{usage:?}");
    }

    #[test]
    fn we_are_among_all() {
        let me = std::process::id();
        let usage = below(me, &HashMap::new(), &all(), Duration::from_secs(1));
        assert!(usage.processes >= 1 && usage.memory > 0);
    }
}
