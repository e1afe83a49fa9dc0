//! Slurm by its commands: `sbatch`, `squeue`, `sacct`, `scancel`, `sinfo`. Knows no steps.

mod queue;
pub(crate) mod script;
mod site;

use std::collections::HashSet;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub use script::leader as leader_arguments;
pub use site::Site;

use super::batch::{Array, Batch, Cancel, Refusal, Status};
use super::settings::Settings;

/// After so long a command counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);
/// So many names fit into one question.
const MOST_NAMES: usize = 200;

/// A site's Slurm.
#[derive(Clone, Debug)]
pub struct Slurm {
    /// Where, and for whom.
    pub settings: Settings,
    /// Variables of this process' environment that jobs shall not see.
    pub hidden: Vec<String>,
    /// Whether `sacct` may know something.
    accounting: bool,
}

impl Slurm {
    /// Nothing is asked yet.
    pub fn new(settings: Settings, hidden: Vec<String>) -> Slurm {
        Slurm { settings, hidden, accounting: true }
    }

    /// What the site has.
    ///
    /// # Errors
    /// In one line, what is missing.
    pub fn site(&self) -> Result<Site, String> {
        let partition = self.settings.partition.as_deref();
        let text = self.ask("sinfo", &["-h".into(), "-o".into(), site::SINFO.into()])?;
        let found = site::site(&text, partition).ok_or_else(|| match partition {
            Some(name) => format!("there is no partition `{name}`"),
            None => "`sinfo` names no partition".to_string(),
        });
        let mut found = found?;
        let config = self.ask("scontrol", &["show".into(), "config".into()]).unwrap_or_default();
        if let Some(max) = site::max_array(&config) {
            found.max_array = max;
        }
        Ok(found)
    }

    /// Submits a script as one job and gives its id.
    ///
    /// # Errors
    /// What Slurm says.
    pub fn submit_script(&self, arguments: &[String]) -> Result<String, String> {
        id_of(&self.ask("sbatch", arguments)?).ok_or_else(|| "`sbatch` gave no id".to_string())
    }

    /// Runs a command to its end; what it printed, or what it complained of.
    fn ask(&self, program: &str, arguments: &[String]) -> Result<String, String> {
        let said = self.call(program, arguments)?;
        match said.well {
            true => Ok(said.stdout),
            false => Err(format!("`{program}`: {}", said.complaint())),
        }
    }

    fn call(&self, program: &str, arguments: &[String]) -> Result<Said, String> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in &self.hidden {
            command.env_remove(name);
        }
        let mut child = command.spawn().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => format!("there is no `{program}` on this machine"),
            _ => format!("cannot start `{program}`: {e}"),
        })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let out = std::thread::spawn(move || read(stdout));
        let err = std::thread::spawn(move || read(stderr));
        let started = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if started.elapsed() < PATIENCE => {
                    let pause = started.elapsed().min(Duration::from_millis(50)) / 4;
                    std::thread::sleep(pause.max(Duration::from_millis(1)));
                }
                _ => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
            }
        };
        let (stdout, stderr) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
        let well = status.is_some_and(|status| status.success());
        Ok(Said { well, ended: status.is_some_and(|s| s.code().is_some()), stdout, stderr })
    }

    /// `scancel`, which also complains of jobs that are over: only that nobody heard it is an error.
    fn end(&self, arguments: &[String]) -> Result<(), String> {
        let said = self.call("scancel", arguments)?;
        match said.well || matches!(said.refusal(), Refusal::Never(_)) {
            true => Ok(()),
            false => Err(format!("`scancel`: {}", said.complaint())),
        }
    }

    /// Accounting's word on arrays by name, where `squeue` has forgotten them.
    fn sacct(&mut self, names: &[String]) -> Vec<Status> {
        if !self.accounting {
            return Vec::new();
        }
        let args = ["-X", "-P", "-n", "-S", "now-30days", "-o", queue::SACCT];
        let mut args: Vec<String> = args.map(String::from).to_vec();
        args.push(format!("--name={}", names.join(",")));
        match self.ask("sacct", &args) {
            Ok(text) => text.lines().filter_map(queue::sacct_line).collect(),
            Err(_) => {
                self.accounting = false;
                Vec::new()
            }
        }
    }
}

impl Batch for Slurm {
    fn submit(&mut self, array: &Array) -> Result<String, Refusal> {
        let said = self
            .call("sbatch", &script::arguments(&self.settings, array))
            .map_err(Refusal::Never)?;
        if said.well {
            return id_of(&said.stdout).ok_or(Refusal::Unsure("`sbatch` gave no id".into()));
        }
        Err(said.refusal())
    }

    fn poll(&mut self, names: &[String]) -> Result<Vec<Status>, String> {
        let mut all: Vec<Status> = Vec::new();
        for part in names.chunks(MOST_NAMES) {
            let mut args: Vec<String> =
                ["-h", "-r", "-t", "all", "-o", queue::SQUEUE].map(String::from).to_vec();
            args.push(format!("--name={}", part.join(",")));
            let text = self.ask("squeue", &args)?;
            all.extend(text.lines().filter_map(queue::squeue_line));
        }
        let known: HashSet<&str> = all.iter().map(|status| &status.name[..]).collect();
        let unknown: Vec<String> =
            names.iter().filter(|name| !known.contains(&name[..])).cloned().collect();
        if !unknown.is_empty() {
            let told = self.sacct(&unknown);
            all.extend(told);
        }
        Ok(all)
    }

    fn cancel(&mut self, ids: &[String], how: Cancel) -> Result<(), String> {
        for part in ids.chunks(MOST_NAMES) {
            let with = |args: &[&str]| -> Vec<String> {
                args.iter().map(|arg| arg.to_string()).chain(part.iter().cloned()).collect()
            };
            match how {
                Cancel::Now => self.end(&with(&["-Q"]))?,
                Cancel::Gently => {
                    self.end(&with(&["-Q", "-t", "PENDING"]))?;
                    self.end(&with(&["-Q", "-b", "-s", "USR1", "-t", "RUNNING"]))?;
                }
            }
        }
        Ok(())
    }
}

/// What a command said.
struct Said {
    well: bool,
    /// By itself, not by a signal.
    ended: bool,
    stdout: String,
    stderr: String,
}

impl Said {
    /// The last thing it complained of, without its own name.
    fn complaint(&self) -> String {
        let line = self.stderr.lines().rev().find(|line| !line.trim().is_empty());
        let Some(line) = line else { return "it ended without a word".into() };
        line.split_once("error: ").map_or(line, |(_, rest)| rest).trim().to_string()
    }

    /// What its failure means.
    fn refusal(&self) -> Refusal {
        match self.ended {
            true => refusal(&self.stderr, self.complaint()),
            false => Refusal::Unsure(self.complaint()),
        }
    }
}

fn read(stream: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `123` or `123;cluster`, on the last line.
fn id_of(text: &str) -> Option<String> {
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    let id = line.split(';').next()?.trim();
    (!id.is_empty() && id.chars().all(|c| c.is_ascii_digit())).then(|| id.to_string())
}

/// What a complaint of Slurm's means; `complaint` is its last line.
fn refusal(stderr: &str, complaint: String) -> Refusal {
    let text = stderr.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    // Limits by name: `QOSMaxSubmitJobPerUserLimit` passes, `QOSMaxWallDurationPerJobLimit` does not.
    let mut limits = text.split(|c: char| !c.is_alphanumeric()).filter(|word| {
        word.ends_with("limit") && (word.starts_with("qos") || word.starts_with("assoc"))
    });
    if has(&["timed out", "zero bytes", "unexpected message", "connection reset", "response"]) {
        Refusal::Unsure(complaint)
    } else if has(&["time limit is invalid"]) || limits.any(|word| !word.contains("submit")) {
        Refusal::Never(complaint)
    } else if has(&["unable to contact", "temporarily", "limit", "refused", "standby", "busy"]) {
        Refusal::Later(complaint)
    } else {
        Refusal::Never(complaint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_of_sbatch_as_they_were_seen() {
        let of = |line: &str| {
            let said =
                Said { well: false, ended: true, stdout: String::new(), stderr: line.into() };
            said.refusal()
        };
        assert_eq!(
            of(
                "sbatch: error: Batch job submission failed: Requested node configuration is not available"
            ),
            Refusal::Never(
                "Batch job submission failed: Requested node configuration is not available".into()
            )
        );
        let later = [
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        ];
        for line in later {
            assert!(matches!(of(line), Refusal::Later(_)), "{line}");
        }
        let never = [
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        ];
        for line in never {
            assert!(matches!(of(line), Refusal::Never(_)), "{line}");
        }
        let line =
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation";
        assert!(matches!(of(line), Refusal::Unsure(_)));
        assert!(matches!(of("sbatch: error: invalid partition specified: x"), Refusal::Never(_)));
    }

    #[test]
    fn ids_as_sbatch_gives_them() {
        assert_eq!(id_of("123\n").as_deref(), Some("123"));
        assert_eq!(id_of("note\n77;lab\n").as_deref(), Some("77"));
        assert_eq!(id_of("Submitted batch job 5"), None);
    }
}
