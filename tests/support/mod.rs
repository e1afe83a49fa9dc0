//! A project in a temporary directory, with a cache of its own, and `pipe` run in it.

pub mod chromium;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A temporary project.
pub struct Project {
    dir: TempDir,
    cache: PathBuf,
    env: Vec<(String, String)>,
}

/// What one invocation gave.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Project {
    /// An empty project.
    pub fn new() -> Project {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("work")).unwrap();
        let cache = dir.path().join("cache");
        Project { dir, cache, env: Vec::new() }
    }

    /// A project with one pipeline file, `p.yaml`.
    pub fn with(yaml: &str) -> Project {
        let project = Project::new();
        project.write("p.yaml", yaml);
        project
    }

    /// The working directory.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    /// The store.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Sets an environment variable for every invocation.
    pub fn env(&mut self, name: &str, value: &str) {
        self.env.push((name.into(), value.into()));
    }

    /// Writes a file of the project.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Reads a file of the project.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap_or_default()
    }

    /// Lines that steps appended to `name`: how often something was executed.
    pub fn count(&self, name: &str) -> usize {
        self.read(name).lines().count()
    }

    /// The command `pipe ARGS` in this project.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        command.args(args).current_dir(self.path()).env("PIPE_CACHE", &self.cache);
        command.env_remove("XDG_CACHE_HOME").env("NO_COLOR", "1").stdin(Stdio::null());
        command.envs(self.env.iter().cloned());
        command
    }

    /// Runs `pipe ARGS` to its end.
    pub fn pipe(&self, args: &[&str]) -> Ran {
        let output = self.command(args).output().unwrap();
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// `pipe run p.yaml ARGS`, which must succeed; gives the last line without its time.
    pub fn run(&self, args: &[&str]) -> String {
        let ran = self.pipe(&[&["run", "p.yaml"], args].concat());
        assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
        ran.counts()
    }

    /// Starts `pipe ARGS` and leaves it running.
    pub fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until `condition` holds.
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let started = Instant::now();
        while !condition() {
            assert!(started.elapsed() < Duration::from_secs(180), "never happened: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Names of the steps that a run executed, from its events.
    pub fn executed(&self, args: &[&str]) -> Vec<String> {
        let ran = self.pipe(&[&["run", "p.yaml", "--json"], args].concat());
        assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
        let plan = self.newest_plan();
        let mut names: Vec<String> = ran
            .events()
            .filter(|e| e["e"]["kind"] == "launched")
            .map(|e| {
                plan["steps"][e["e"]["step"].as_u64().unwrap() as usize]["name"]
                    .as_str()
                    .unwrap()
                    .to_string()
            })
            .collect();
        names.sort();
        names
    }

    fn newest_plan(&self) -> serde_json::Value {
        let mut runs: Vec<PathBuf> =
            fs::read_dir(self.cache.join("runs")).unwrap().map(|i| i.unwrap().path()).collect();
        runs.sort_by_key(|run| fs::metadata(run.join("run.json")).unwrap().modified().unwrap());
        serde_json::from_slice(&fs::read(runs.last().unwrap().join("plan.json")).unwrap()).unwrap()
    }

    /// Digests by step and port of everything the pipeline made, from a run that finds all cached.
    pub fn digests(&self, args: &[&str]) -> Vec<String> {
        let ran = self.pipe(&[&["run", "p.yaml", "--json"], args].concat());
        assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
        let mut found: Vec<String> = ran
            .events()
            .filter(|e| e["e"]["kind"] == "cached")
            .flat_map(|e| {
                let step = e["e"]["step"].clone();
                let outputs = e["e"]["outputs"].as_array().unwrap().clone();
                outputs
                    .into_iter()
                    .map(move |o| format!("{step} {} {} {}", o["port"], o["index"], o["digest"]))
            })
            .collect();
        found.sort();
        assert!(!found.is_empty());
        found
    }

    /// Processes whose command line or working directory belongs to this project.
    pub fn processes(&self) -> Vec<u32> {
        let root = self.dir.path().to_string_lossy().into_owned();
        let mine = |pid: u32| {
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let zombie =
                state.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
            !zombie && (cwd.starts_with(&root) || String::from_utf8_lossy(&line).contains(&root))
        };
        let items = fs::read_dir("/proc").unwrap().flatten();
        let pids = items.filter_map(|item| item.file_name().to_str()?.parse().ok());
        pids.filter(|&pid| pid != std::process::id() && mine(pid)).collect()
    }
}

impl Ran {
    /// The last line without its time: `2 cached, 1 ran`.
    pub fn counts(&self) -> String {
        let last = self.stdout.lines().last().unwrap_or_default();
        last.split(" in ").next().unwrap_or_default().to_string()
    }

    /// Events of a run with `--json`.
    pub fn events(&self) -> impl Iterator<Item = serde_json::Value> + '_ {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap())
    }
}

/// Sends `signal` to `pid`.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
