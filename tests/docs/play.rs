//! Does what a page says, in a private directory with a private home and cache, and no network.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::expect;
use super::page::Part;

/// `cargo run --release -- ARGS` is `pipe ARGS`; nothing else is built here.
const CARGO: &str = "#!/bin/sh
[ \"$1 $2 $3\" = 'run --release --' ] || { echo \"cargo $*: not in tests of pages\" >&2; exit 1; }
shift 3
exec pipe \"$@\"
";

/// `small FILE…` cuts the budgets of pipelines, so that every step runs and none takes long: two updates
/// where a step of training names its seed, and few documents, sequences and questions.
const SMALL: &str = "#!/bin/sh
exec sed -i -E \\
    -e 's/^( *with: \\{.*seed: \"\\$\\{params.seed\\}\")/\\1, updates: 2/' \\
    -e 's/updates: [0-9e.]+, (.*)updates: 2/\\1updates: 2/' \\
    -e 's/min_recall: [0-9.]+/min_recall: 0/' \\
    -e 's/^( *seq): 128$/\\1: 64/; s/sequences: 512/sequences: 32/' \\
    -e 's/stage: text, in: [{] files: \"[$][{]params.corpus[}]\" [}]/&, with: { documents: 400 }/' \"$@\"
";

/// A reader at a terminal.
pub struct Reader {
    dir: TempDir,
    /// Where the last command left off.
    cwd: PathBuf,
}

impl Reader {
    /// A reader in an empty directory, who has `pipe` on the path.
    pub fn new() -> Reader {
        let dir = tempfile::tempdir().unwrap();
        for name in ["bin", "home", "work"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let bin = dir.path().join("bin");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pipe"), bin.join("pipe")).unwrap();
        for (name, text) in [("cargo", CARGO), ("small", SMALL)] {
            fs::write(bin.join(name), text).unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let cwd = dir.path().join("work");
        Reader { dir, cwd }
    }

    /// Does one part of a page. An error says what was not as the page has it.
    pub fn read(&mut self, part: &Part) -> Result<(), String> {
        match part {
            Part::Skip { .. } | Part::Other { .. } => Ok(()),
            Part::File { name, text } => {
                let path = self.cwd.join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).map_err(|error| format!("{name}: {error}"))
            }
            Part::Setup(script) => match self.run(script) {
                (true, _) => Ok(()),
                (false, printed) => Err(format!("setup failed:\n{script}\n{printed}")),
            },
            Part::Script { line, text, fails } => match self.run(text) {
                (well, _) if well != *fails => Ok(()),
                (_, printed) => Err(format!("line {line}:\n{text}\n{printed}")),
            },
            Part::Session { line, commands, fails } => {
                let last = commands.len() - 1;
                for (number, (command, quoted)) in commands.iter().enumerate() {
                    let (well, printed) = self.run(command);
                    let may_fail = *fails && number == last;
                    if well == may_fail {
                        return Err(format!("line {line}: `{command}` says\n{printed}"));
                    }
                    if let (false, Some(told)) =
                        (quoted.is_empty(), expect::difference(quoted, &printed))
                    {
                        return Err(format!("line {line}: `{command}`\n{told}"));
                    }
                }
                Ok(())
            }
        }
    }

    /// Whether a script ended well, and what it printed, on either stream.
    fn run(&mut self, script: &str) -> (bool, String) {
        let left = self.dir.path().join("cwd");
        let script = format!(
            "set -e -o pipefail\nexec 2>&1\ntrap 'pwd > {}' EXIT\n{script}",
            left.display()
        );
        let output = self.command(&script).output().unwrap();
        if let Ok(cwd) = fs::read_to_string(&left) {
            self.cwd = PathBuf::from(cwd.trim_end());
        }
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), printed + &String::from_utf8_lossy(&output.stderr))
    }

    fn command(&self, script: &str) -> Command {
        let dir = self.dir.path();
        let mut command = Command::new("bash");
        command.args(["-c", script]).current_dir(&self.cwd).stdin(Stdio::null());
        command.env_clear().env("LANG", "C.UTF-8").env("HOME", dir.join("home"));
        command.env("PATH", format!("{}:/usr/local/bin:/usr/bin:/bin", dir.join("bin").display()));
        command.env("PIPE_CACHE", dir.join("cache")).env("HF_HUB_OFFLINE", "1");
        command.env("ROOT", Path::new(env!("CARGO_MANIFEST_DIR")));
        command
    }
}
