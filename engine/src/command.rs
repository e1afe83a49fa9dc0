//! The stage `command`: any program, any language, in an empty private directory.
//!
//! Inputs appear as `in/<port>/<name>`, outputs are made below `out/`, all relative to the current
//! directory, so that a program which prints its arguments prints the same everywhere. Standard
//! input is closed; of the environment only what is listed below passes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, Signal, pidfd_open};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::interpolate;
use crate::mask::Masks;
use crate::places;
use crate::plain::{self, Plain};
use crate::spawn::{Child, Program};
use crate::stage::{Cancelled, Context, Ports, Stage};

/// Variables of the user's environment that every command gets.
const PASSED: [&str; 10] = [
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "CUDA_HOME",
];
/// How long a program may take to stop after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// How often a cancel is looked for.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// How often a changed `${checkpoint}` is sealed while the program runs.
const SEAL_EVERY: Duration = Duration::from_secs(10);
/// Name of the directory of a command in that of its attempt.
pub(crate) const WORK: &str = "work";

/// See the module.
pub struct Command;

/// What to run; written as fields of the step itself, not under `with`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The program and its arguments.
    pub run: Vec<String>,
    /// Output ports and the file names that the program makes (by default the port's name).
    #[serde(default)]
    pub out: BTreeMap<String, Option<String>>,
    /// Environment variables; part of the key, and visible.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

impl Stage for Command {
    const NAME: &'static str = "command";
    const VERSION: u32 = 1;
    const DOC: &'static str = "Runs any program in an empty private directory.";
    type Params = Params;

    fn ports() -> Ports {
        Ports { inputs: &[], outputs: &[] }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let bad = |name: &&String| {
            name.is_empty() || name.starts_with('/') || name.split('/').any(|p| p == "..")
        };
        let outs = params.out.iter().map(|(port, name)| name.as_ref().unwrap_or(port));
        let mut found: Vec<_> = outs
            .filter(bad)
            .map(|name| {
                ("out".to_string(), format!("`{name}` is no path inside the step's directory"))
            })
            .collect();
        if params.run.is_empty() {
            found.push(("run".into(), "nothing to run".into()));
        }
        found
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let work = Work::prepare(params, ctx)?;
        let arguments = work.fill_run(&params.run)?;
        let result = work.execute(&arguments, params, ctx);
        work.seal(ctx)?;
        let (program, status) = result?;
        if !status.success() {
            bail!("`{program}` {}", describe(status));
        }
        work.collect(params, ctx)
    }
}

/// The private directory of one attempt.
struct Work {
    dir: PathBuf,
    /// What `${in.port}` and its like stand for, relative to `dir`.
    values: BTreeMap<String, Vec<String>>,
}

impl Work {
    fn prepare(params: &Params, ctx: &mut Context) -> Result<Work> {
        let dir = ctx.dir().join(WORK);
        let place = || format!("cannot prepare {}", dir.display());
        Work::fill(dir.clone(), params, ctx).with_context(place)
    }

    fn fill(dir: PathBuf, params: &Params, ctx: &mut Context) -> Result<Work> {
        places::make(&dir, &wanted(ctx.inputs.keys()))?;
        let mut values = BTreeMap::new();
        for (port, inputs) in &ctx.inputs {
            let folder = Path::new("in").join(port);
            let mut paths = Vec::new();
            for (i, input) in inputs.iter().enumerate() {
                let mut path = folder.join(&input.name);
                if inputs.len() > 1 && dir.join(&path).symlink_metadata().is_ok() {
                    path = folder.join(i.to_string()).join(&input.name);
                    fs::create_dir_all(dir.join(&path).parent().unwrap_or(&dir))?;
                }
                std::os::unix::fs::symlink(&input.path, dir.join(&path))?;
                paths.push(path.to_string_lossy().into_owned());
            }
            values.insert(format!("in.{port}"), paths);
        }
        for (port, name) in &params.out {
            let name = name.as_ref().unwrap_or(port);
            let path = Path::new("out").join(name);
            if name.contains('/') {
                fs::create_dir_all(dir.join(&path).parent().unwrap_or(&dir))?;
            }
            values.insert(format!("out.{port}"), vec![path.to_string_lossy().into_owned()]);
        }
        values.insert("scratch".into(), vec!["scratch".into()]);
        values.insert("checkpoint".into(), vec!["checkpoint".into()]);
        if let Some(sealed) = ctx.checkpoint_latest() {
            copy_tree(&sealed.dir, &dir.join("checkpoint"))?;
        }
        Ok(Work { dir, values })
    }

    /// Fills in what the plan left open.
    fn fill_run(&self, run: &[String]) -> Result<Vec<String>> {
        interpolate::fill_run(run, &|name| self.value(name)).map_err(|e| anyhow!(e))
    }

    fn fill_env(&self, env: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
        let fill = |(name, value): (&String, &String)| {
            let value = interpolate::fill(value, false, &|name| self.value(name));
            Ok((name.clone(), value.map_err(|e| anyhow!(e))?))
        };
        env.iter().map(fill).collect()
    }

    fn value(&self, name: &str) -> Result<Vec<String>, String> {
        let none = || format!("`${{{name}}}` stands for nothing here");
        self.values.get(name).cloned().ok_or_else(none)
    }

    /// What was started, and how it ended.
    fn execute(
        &self,
        arguments: &[String],
        params: &Params,
        ctx: &mut Context,
    ) -> Result<(String, ExitStatus)> {
        let secrets: Vec<(String, String)> = ctx
            .secrets()
            .iter()
            .filter_map(|n| Some((n.clone(), std::env::var(n).ok()?)))
            .collect();
        for name in ctx.secrets().to_vec() {
            if std::env::var_os(&name).is_none() {
                ctx.note(format!("`{name}` of `secrets` is not set in the environment"));
            }
        }
        let mut environment: BTreeMap<OsString, OsString> =
            PASSED.iter().filter_map(|name| Some((name.into(), std::env::var_os(name)?))).collect();
        let own = self.fill_env(&params.env)?.into_iter().chain(secrets.iter().cloned());
        environment.extend(own.map(|(name, value)| (name.into(), value.into())));
        // One pipe for both, so that nothing is put together of halves in the log.
        let (pipe, writer) = match secrets.is_empty() {
            true => (None, None),
            false => io::pipe().map(|(reader, writer)| (Some(reader), Some(writer)))?,
        };
        let environment = environment.into_iter().collect();
        let output = writer.as_ref().map(AsFd::as_fd);
        let (program, mut child) = self.start(arguments, environment, output)?;
        drop(writer); // this side's end of the pipe
        let masks = Masks::new(secrets.iter().map(|(_, value)| value.as_str()));
        let ended = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            if let Some(pipe) = pipe {
                scope.spawn(move || masked(pipe, masks, ended));
            }
            let status = self.wait(&mut child, ctx);
            ended.store(true, Ordering::SeqCst);
            Ok((program, status?))
        })
    }

    /// Starts the program, without a shell where that is the same.
    fn start(
        &self,
        arguments: &[String],
        environment: Vec<(OsString, OsString)>,
        output: Option<BorrowedFd<'_>>,
    ) -> Result<(String, Child)> {
        let input = File::open("/dev/null")?;
        let program = Program {
            name: &self.program(&arguments[0]),
            arguments: &arguments[1..],
            environment,
            dir: &self.dir,
            input: input.as_fd(),
            output,
            file: None,
        };
        if let Some(plain) = plain::plain(arguments)
            && let Ok(child) = self.start_plain(&plain, &program)
        {
            return Ok((plain.words[0].clone(), child));
        }
        let child = program.spawn().map_err(|error| cannot_run(&arguments[0], &error))?;
        Ok((arguments[0].clone(), child))
    }

    /// What a shell would start, as it would.
    fn start_plain(&self, plain: &Plain, shell: &Program<'_>) -> io::Result<Child> {
        let input = plain.input.as_ref().map(|file| File::open(self.dir.join(file)));
        let file = plain.output.as_ref().map(|file| File::create(self.dir.join(file)));
        let (input, file) = (input.transpose()?, file.transpose()?);
        let mut environment = shell.environment.clone();
        // Without it each shell searches where it likes.
        if !environment.iter().any(|(name, _)| name == "PATH") {
            return Err(ErrorKind::NotFound.into());
        }
        environment.retain(|(name, _)| name != "PWD");
        environment.push(("PWD".into(), self.dir.clone().into()));
        Program {
            name: Path::new(&plain.words[0]),
            arguments: &plain.words[1..],
            environment,
            input: input.as_ref().map_or(shell.input, AsFd::as_fd),
            file: file.as_ref().map(AsFd::as_fd),
            ..*shell
        }
        .spawn()
    }

    /// A program given as a path into the step's directory is found from there.
    fn program(&self, name: &str) -> PathBuf {
        if name.contains('/') { self.dir.join(name) } else { name.into() }
    }

    /// Waits for the program; passes a cancel on, first politely.
    fn wait(&self, child: &mut Child, ctx: &mut Context) -> Result<ExitStatus> {
        let group = child.id();
        // Tells the end at once; without it (an old kernel), it is asked for again and again.
        let ended = pidfd_open(group, PidfdFlags::empty()).ok();
        let (mut pause, mut asked, mut sealed) = (Duration::from_micros(200), None, Instant::now());
        loop {
            if let Some(status) = child.try_wait()? {
                if asked.is_some() {
                    return Err(Cancelled.into());
                }
                return Ok(status);
            }
            match asked {
                None if ctx.cancelled() => {
                    let _ = rustix::process::kill_process_group(group, Signal::TERM);
                    asked = Some(Instant::now());
                }
                Some(when) if when.elapsed() > GRACE => {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                }
                _ => {}
            }
            if sealed.elapsed() > SEAL_EVERY {
                self.seal(ctx)?;
                sealed = Instant::now();
            }
            match &ended {
                Some(ended) => {
                    let _ = poll(&mut [PollFd::new(ended, PollFlags::IN)], Some(&TICK));
                }
                None => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Seals what the program has put into `${checkpoint}`, unless it is just writing there.
    fn seal(&self, ctx: &mut Context) -> Result<()> {
        let dir = self.dir.join("checkpoint");
        let Some(newest) = newest_change(&dir) else { return Ok(()) };
        let Ok(position) = newest.duration_since(SystemTime::UNIX_EPOCH) else { return Ok(()) };
        let position = position.as_millis() as u64;
        if ctx.checkpoint_latest().is_some_and(|last| last.position >= position) {
            return Ok(());
        }
        let result = ctx.checkpoint_save(position, |to| {
            copy_tree(&dir, to)?;
            if newest_change(&dir) != Some(newest) {
                bail!("`${{checkpoint}}` changed while it was copied");
            }
            Ok(())
        });
        if let Err(error) = result {
            ctx.note(format!("checkpoint not sealed: {error:#}"));
        }
        Ok(())
    }

    fn collect(&self, params: &Params, ctx: &mut Context) -> Result<()> {
        let out = self.dir.join("out");
        if !params.out.is_empty() && !is_dir(&out) {
            bail!("the command put something else in the place of its directory `out`");
        }
        for (port, name) in &params.out {
            let made = out.join(name.as_ref().unwrap_or(port));
            if made.symlink_metadata().is_err() {
                bail!(
                    "the command ended well but made no `{}` for its output `{port}`\nhint: write it to `${{out.{port}}}`",
                    name.as_ref().unwrap_or(port)
                );
            }
            ctx.output_at(port, made)?;
        }
        Ok(())
    }
}

/// The directories that a command finds.
fn wanted<'a>(inputs: impl Iterator<Item = &'a String>) -> BTreeSet<PathBuf> {
    let mut places: BTreeSet<PathBuf> =
        ["", "out", "scratch", "checkpoint"].into_iter().map(PathBuf::from).collect();
    for port in inputs {
        places.extend(["in".into(), Path::new("in").join(port)]);
    }
    places
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended in an unknown way".into(),
    }
}

/// Why a program did not start, and what helps.
fn cannot_run(program: &str, error: &io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        ErrorKind::NotFound if program.contains('/') => {
            "it, or the interpreter its first line names, is not there"
        }
        ErrorKind::NotFound => {
            "there is no such program in PATH; install it or name it by its path"
        }
        ErrorKind::PermissionDenied => {
            "make it executable (`chmod +x`) or name its interpreter first, as in `run: [sh, …]`"
        }
        _ => return anyhow::anyhow!("cannot run `{program}`: {error}"),
    };
    anyhow::anyhow!("cannot run `{program}`: {error}\nhint: {hint}")
}

/// Copies `pipe` to the log without the secrets. What the program leaves running may have the other
/// end open still: it is not waited for once the program has `ended`.
fn masked(mut pipe: PipeReader, mut masks: Masks, ended: &AtomicBool) {
    let mut piece = vec![0; 64 << 10];
    loop {
        let last = ended.load(Ordering::SeqCst);
        let ready = poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&TICK));
        match ready {
            Ok(0) if last => break,
            Ok(0) | Err(Errno::INTR) => continue,
            _ => {}
        }
        let told = match pipe.read(&mut piece) {
            Ok(n) if n > 0 => masks.take(&piece[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            _ => break,
        };
        let _ = io::stderr().write_all(&told);
    }
    let _ = io::stderr().write_all(&masks.end());
}

fn newest_change(dir: &Path) -> Option<SystemTime> {
    // Links are not followed: they may lead out, or round and round.
    let items = fs::read_dir(dir).ok().filter(|_| is_dir(dir))?;
    let of = |path: PathBuf| {
        let own = path.symlink_metadata().ok()?.modified().ok()?;
        Some(newest_change(&path).map_or(own, |inner| inner.max(own)))
    };
    items.flatten().filter_map(|item| of(item.path())).max()
}

fn is_dir(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|meta| meta.is_dir())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    if !is_dir(from) {
        bail!("{} is no directory", from.display());
    }
    let cannot = || format!("cannot copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to).with_context(cannot)?;
    for item in fs::read_dir(from).with_context(cannot)? {
        let (item, kind) = {
            let item = item?;
            let kind = item.file_type()?;
            (item, kind)
        };
        let target = to.join(item.file_name());
        if kind.is_dir() {
            copy_tree(&item.path(), &target)?;
        } else if kind.is_file() {
            reflink_copy::reflink_or_copy(item.path(), &target).with_context(cannot)?;
        }
    }
    Ok(())
}
