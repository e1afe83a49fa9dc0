//! A remote that leader and nodes share, and nothing else.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cache::remote::{Remote, Settings};
use tempfile::TempDir;

use super::cluster::Cluster;
use crate::support::Project;

/// A real S3 server where `PIPE_TEST_S3` names the script that starts one, else a directory.
pub struct Store {
    script: Option<PathBuf>,
    dir: TempDir,
    env: HashMap<String, String>,
}

impl Store {
    pub fn start() -> Store {
        let script = std::env::var_os("PIPE_TEST_S3").map(PathBuf::from);
        if script.is_none() {
            println!("PIPE_TEST_S3 is not set: the remote is a directory");
            return Store::directory();
        }
        let mut store = Store::directory();
        store.script = script;
        store.ask("start");
        let env = store.ask("env");
        let lines = env.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        store.env = lines.map(|(name, value)| (name.into(), value.into())).collect();
        store
    }

    /// A directory, in which a test can remove things.
    pub fn directory() -> Store {
        // A short path: a server has sockets in it.
        let dir = tempfile::Builder::new().prefix("s3").tempdir_in("/tmp").unwrap();
        Store { script: None, dir, env: HashMap::new() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn url(&self) -> String {
        match self.env.get("S3_BUCKET") {
            Some(bucket) => format!("s3://{bucket}/pipe"),
            None => self.dir.path().display().to_string(),
        }
    }

    /// What gives a right to the store.
    pub fn secret(&self) -> String {
        self.env["AWS_SECRET_ACCESS_KEY"].clone()
    }

    fn open(&self) -> Remote {
        let env = |name: &str| self.env.get(name).map(OsString::from);
        Remote::open(Settings::new(self.url()), &env).unwrap()
    }

    /// Runs whose checkpoints are here.
    pub fn checkpoints(&self) -> Vec<String> {
        self.open().checkpointed().unwrap()
    }

    /// What runs have left here.
    pub fn notes(&self) -> Vec<String> {
        let remote = self.open();
        let runs = remote.noted_runs().unwrap();
        runs.iter().flat_map(|run| remote.notes(run).list().unwrap()).collect()
    }

    /// `s3-loopback WHAT DIR`; what it printed.
    pub fn ask(&self, what: &str) -> String {
        let script = self.script.as_ref().expect("a server");
        let output = Command::new(script).arg(what).arg(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Whether there is a server, which can be frozen.
    pub fn is_served(&self) -> bool {
        self.script.is_some()
    }

    /// Lets a project share results by this store, and its nodes nothing but this store: each has a
    /// cache of its own. `more` are more settings of Slurm.
    pub fn meet(&self, cluster: &Cluster, project: &mut Project, more: &str) {
        let nodes = nodes(project).display().to_string();
        let more = format!(", node_cache: '{nodes}/$SLURMD_NODENAME'{more}");
        self.meet_with(cluster, project, &more);
    }

    /// As [`Store::meet`], where `more` says where nodes have their caches.
    pub fn meet_with(&self, cluster: &Cluster, project: &mut Project, more: &str) {
        cluster.meet(project);
        self.env.iter().for_each(|(name, value)| project.env(name, value));
        project.env("PIPE_REMOTE", &self.url());
        let config = project.path().join("../config");
        project.env("XDG_CONFIG_HOME", &config.display().to_string());
        fs::create_dir_all(config.join("pipe")).unwrap();
        let text = format!("executor: {{ slurm: {{ store: remote, poll: 3{more} }} }}\n");
        fs::write(config.join("pipe/config.yaml"), text).unwrap();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(script) = &self.script {
            let _ = Command::new(script).arg("stop").arg(self.dir.path()).output();
        }
    }
}

/// Where the caches of nodes are, by node.
pub fn nodes(project: &Project) -> PathBuf {
    project.path().parent().unwrap().join("nodes")
}
