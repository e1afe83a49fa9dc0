//! A throw-away cluster, and what was asked of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

use crate::support::Project;

/// Of a cluster whose nodes are lost soon.
pub const FRAGILE: (&str, &str) = ("SLURM_LOOPBACK_NODE_TIMEOUT", "5");
/// Commands of Slurm that are counted.
const COMMANDS: [&str; 6] = ["sbatch", "squeue", "sacct", "scancel", "sinfo", "scontrol"];

/// One cluster at a time: each has daemons that answer late, and so are taken for lost, where many
/// run beside each other.
static ONE: Mutex<()> = Mutex::new(());

/// A cluster that ends with this.
pub struct Cluster {
    script: PathBuf,
    dir: TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Three nodes with four cpus and two GPUs, which nobody takes for lost because they are slow,
    /// unless `settings` say otherwise; `None`, told, where there is no Slurm.
    pub fn start(settings: &[(&str, &str)]) -> Option<Cluster> {
        let Some(script) = std::env::var_os("PIPE_TEST_SLURM") else {
            println!("skipped: PIPE_TEST_SLURM is not set");
            return None;
        };
        let cluster = Cluster {
            script: script.into(),
            // A socket's path is short.
            dir: tempfile::Builder::new().prefix("sl").tempdir_in("/tmp").unwrap(),
            _one: ONE.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let mut command = Command::new(&cluster.script);
        command.arg("start").arg(cluster.dir.path());
        command.env("SLURM_LOOPBACK_NODE_TIMEOUT", "120").env("SLURM_LOOPBACK_WAIT", "180");
        command.envs(settings.iter().copied());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(cluster)
    }

    /// `slurm-loopback WHAT DIR [NODE]`.
    pub fn fault(&self, what: &str, node: Option<&str>) {
        let mut command = Command::new(&self.script);
        command.arg(what).arg(self.dir.path()).args(node);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What an administrator does: a controller killed before it ever saved its state gives ids of
    /// jobs anew, and Slurm then takes nodes out of service that know them already.
    pub fn repair(&self) {
        let drained = self.ask("sinfo", &["-h", "-N", "-t", "drain", "-o", "%N"]);
        for node in String::from_utf8_lossy(&drained.stdout).lines() {
            let name = format!("nodename={}", node.trim());
            self.ask("scontrol", &["update", &name, "state=resume"]);
        }
    }

    /// A command of Slurm's.
    pub fn ask(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program).args(args).env("SLURM_CONF", self.conf()).output().unwrap()
    }

    /// Ids of jobs in these states, a task each.
    pub fn jobs(&self, states: &str) -> Vec<String> {
        let output = self.ask("squeue", &["-h", "-r", "-t", states, "-o", "%i"]);
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_string).collect()
    }

    fn conf(&self) -> PathBuf {
        self.dir.path().join("slurm.conf")
    }

    /// Lets a project meet this cluster, through commands that are counted.
    pub fn meet(&self, project: &mut Project) {
        let bin = self.dir.path().join("bin");
        fs::create_dir_all(&bin).unwrap();
        for name in COMMANDS {
            let real = which(name);
            let text = format!(
                "#!/bin/sh\necho {name} \"$@\" >> {}\nexec {} \"$@\"\n",
                self.asked().display(),
                real.display()
            );
            fs::write(bin.join(name), text).unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = std::env::var("PATH").unwrap();
        project.env("PATH", &format!("{}:{path}", bin.display()));
        project.env("SLURM_CONF", &self.conf().display().to_string());
    }

    fn asked(&self) -> PathBuf {
        self.dir.path().join("asked")
    }

    /// The commands that were given since the last call.
    pub fn take_asked(&self) -> Vec<String> {
        let text = fs::read_to_string(self.asked()).unwrap_or_default();
        let _ = fs::remove_file(self.asked());
        text.lines().map(str::to_string).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = Command::new(&self.script).arg("stop").arg(self.dir.path()).output();
    }
}

fn which(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("no {name}"))
}

/// How many entries a cache has.
pub fn entries(cache: &Path) -> usize {
    let shards = fs::read_dir(cache.join("entries")).unwrap().flatten();
    shards.map(|shard| fs::read_dir(shard.path()).unwrap().count()).sum()
}

/// How many results differed from an earlier one of their key.
pub fn divergences(cache: &Path) -> usize {
    fs::read_dir(cache.join("divergences")).unwrap().count()
}
