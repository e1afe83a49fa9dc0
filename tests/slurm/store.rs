//! A remote that leader and nodes share, and nothing else.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::cluster::Cluster;
use crate::support::Project;

/// A real S3 server where `PIPE_TEST_S3` names the script that starts one, else a directory.
pub struct Store {
    script: Option<PathBuf>,
    dir: TempDir,
}

impl Store {
    pub fn start() -> Store {
        let script = std::env::var_os("PIPE_TEST_S3").map(PathBuf::from);
        // A short path: it may have sockets in it.
        let dir = tempfile::Builder::new().prefix("s3").tempdir_in("/tmp").unwrap();
        let store = Store { script, dir };
        match &store.script {
            Some(_) => drop(store.ask("start")),
            None => println!("PIPE_TEST_S3 is not set: the remote is a directory"),
        }
        store
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
        cluster.meet(project);
        let mut url = self.dir.path().display().to_string();
        if self.is_served() {
            let env = self.ask("env");
            let lines =
                env.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
            let lines: Vec<(&str, &str)> = lines.collect();
            lines.iter().for_each(|(name, value)| project.env(name, value));
            let bucket = lines.iter().find(|(name, _)| *name == "S3_BUCKET").unwrap().1;
            url = format!("s3://{bucket}/pipe");
        }
        project.env("PIPE_REMOTE", &url);
        let config = project.path().join("../config");
        project.env("XDG_CONFIG_HOME", &config.display().to_string());
        fs::create_dir_all(config.join("pipe")).unwrap();
        let nodes = nodes(project).display().to_string();
        let text = format!(
            "executor: {{ slurm: {{ store: remote, node_cache: '{nodes}/$SLURMD_NODENAME', poll: 3{more} }} }}\n"
        );
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
