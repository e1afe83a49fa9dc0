//! Many steps: few commands for arrays, little lost time for pilots.

use std::path::PathBuf;
use std::time::Instant;

use super::cluster::{Cluster, entries};
use crate::support::Project;

fn many(project: &Project, n: usize, executor: &str) {
    project.write(
        "p.yaml",
        &format!(
            "executor: {{ slurm: {{ {executor} }} }}
steps:
  a:
    matrix: {{ n: 0..{n} }}
    stage: command
    run: [sh, -c, 'echo ${{matrix.n}} > ${{out.o}}']
    out: [o]
"
        ),
    );
}

#[test]
fn five_hundred_tasks_take_ten_commands() {
    let Some(cluster) = Cluster::start(&[("SLURM_LOOPBACK_CPUS", "8")]) else { return };
    let mut project = Project::new();
    cluster.meet(&mut project);
    many(&project, 500, "mode: submit");
    let started = Instant::now();
    assert_eq!(project.run(&["--on", "slurm"]), "0 cached, 500 ran");
    assert_eq!(entries(project.cache()), 500);
    let asked = cluster.take_asked();
    let seconds = started.elapsed().as_secs_f64();
    println!("{} commands in {seconds:.0} s: {asked:#?}", asked.len());
    let (polls, others): (Vec<_>, Vec<_>) =
        asked.iter().partition(|line| line.starts_with("squeue"));
    assert!(others.len() <= 6, "{asked:#?}");
    // Asked less and less often, however slow this machine is.
    assert!(polls.len() as f64 <= 4.0 + seconds / 10.0, "{seconds} s: {asked:#?}");
}

/// The same steps here and by pilots on as many cpus. Both are timed in turn, several times, and the
/// best of each counts: what else the machine does hits both. A soak tells the ratio; elsewhere the
/// machine is too busy with other tests for more than the outcome. `PIPE_SLURM_STORE` names a directory
/// for the stores.
#[test]
fn pilots_are_nearly_as_fast_as_this_machine() {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let settings =
        [("SLURM_LOOPBACK_NODES", "1".to_string()), ("SLURM_LOOPBACK_CPUS", cpus.to_string())];
    let settings = settings.each_ref().map(|(name, value)| (*name, value.as_str()));
    let Some(cluster) = Cluster::start(&settings) else { return };
    let soak = std::env::var_os("PIPE_SOAK").is_some();
    let (n, times) = if soak { (2000, 3) } else { (200, 1) };
    let timed = |args: &[&str]| {
        let mut project = Project::new();
        cluster.meet(&mut project);
        many(&project, n, &format!("mode: pilot, pilots: {cpus}"));
        // In memory where there is a place for it: what the disk has to do for others is no part of it.
        let memory = Some(PathBuf::from("/dev/shm")).filter(|memory| memory.is_dir());
        let place = std::env::var_os("PIPE_SLURM_STORE").map(PathBuf::from).or(memory);
        let place = place.unwrap_or_else(std::env::temp_dir);
        let store = tempfile::tempdir_in(place).unwrap();
        let cache = store.path().join("cache").display().to_string();
        let started = Instant::now();
        let ran = project.run(&[args, &["--cache", &cache]].concat());
        assert_eq!(ran, format!("0 cached, {n} ran"));
        started.elapsed().as_secs_f64()
    };
    let (mut here, mut there) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..times {
        here = here.min(timed(&[&format!("-j{cpus}")]));
        there = there.min(timed(&["--on", "slurm"]));
    }
    println!("{n} steps: {here:.2} s here, {there:.2} s by pilots, ratio {:.2}", there / here);
    if soak {
        assert!(there <= 1.3 * here, "{there} s, and here {here} s");
    }
    let pilots = cluster.take_asked().iter().filter(|line| line.starts_with("sbatch")).count();
    assert!(pilots <= cpus * times, "as many pilots as cpus, each for many steps: {pilots}");
}
