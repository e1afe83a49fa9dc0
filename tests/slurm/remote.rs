//! Leader and nodes share a remote and no directory: what a step gets and gives is the same, and
//! whoever dies or is cut off costs work, never a result.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use super::cluster::{Cluster, FRAGILE, divergences, entries};
use super::store::{Store, nodes};
use crate::support::{Project, signal};

/// What is left of runs in a store that is a directory.
fn cached_nodes(project: &Project) -> Vec<PathBuf> {
    let items = fs::read_dir(nodes(project)).into_iter().flatten().flatten();
    items.map(|item| item.path()).collect()
}

/// The leader's cache is seen by it alone: it lies elsewhere, under this name only in a name space of
/// the leader's own. So whatever nodes do at that path is seen here, and they find nothing there.
fn hidden(project: &mut Project, args: &[&str]) -> Option<(Command, PathBuf)> {
    let (real, seen) = (project.path().join("../real"), project.path().join("../seen"));
    for dir in [&real, &seen] {
        fs::create_dir_all(dir).unwrap();
    }
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"";
    command.args(["-m", "sh", "-c", script, "sh"]).args([&real, &seen]);
    project.env("PIPE_CACHE", &real.display().to_string());
    let inner = project.command(args);
    command.arg(inner.get_program()).args(inner.get_args());
    command.current_dir(project.path()).stdin(Stdio::null());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("PIPE_CACHE", &seen);
    let works = Command::new("unshare").args(["-m", "true"]).output();
    works.is_ok_and(|output| output.status.success()).then_some((command, seen))
}

#[test]
fn the_method_gives_the_same_bytes_over_a_remote_alone() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    let tiny = include_str!("../cases/tiny.yaml");
    let mut project = Project::with(tiny);
    store.meet(&cluster, &mut project, "");
    match hidden(&mut project, &["run", "p.yaml", "--on", "slurm"]) {
        Some((mut command, seen)) => {
            let output = command.output().unwrap();
            let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            assert_eq!(output.status.code(), Some(0), "{text}");
            assert!(text.contains("0 cached, 13 ran"), "{text}");
            assert_eq!(fs::read_dir(seen).unwrap().count(), 0, "nodes did something there");
        }
        None => assert_eq!(project.run(&["--on", "slurm"]), "0 cached, 13 ran"),
    }
    let here = Project::with(tiny);
    here.run(&[]);
    assert_eq!(project.digests(&[]), here.digests(&[]));
    assert!(!cached_nodes(&project).is_empty());
    for node in cached_nodes(&project) {
        assert_eq!(entries(&node), 0, "only the leader publishes");
        assert_eq!(fs::read_dir(node.join("attempts")).unwrap().count(), 0, "all is tidy");
    }
}
