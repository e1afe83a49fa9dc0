//! Worker processes, and those that are started before it is known what for: to start takes a process
//! longer than to look up whether one is needed.
//!
//! Knows no pool and no steps.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::MemfdFlags;

use crate::pool::Kind;

/// A worker process without GPUs that has no step yet. It ends when this is dropped.
pub struct Early {
    /// Until somebody takes it.
    started: Option<Started>,
}

/// Our end of its socket, the process, and what it says before its first step.
pub(crate) type Started = (UnixStream, Child, File);

impl Early {
    /// Starts one with these arguments of this binary, for the cache at `store`.
    ///
    /// # Errors
    /// The system starts no process more.
    pub fn start(args: &[String], store: &Path) -> io::Result<Early> {
        let said = File::from(rustix::fs::memfd_create("worker", MemfdFlags::CLOEXEC)?);
        let (stream, child) = process(args, store, &said, &Kind::Cpu(1))?;
        Ok(Early { started: Some((stream, child, said)) })
    }

    /// The process, unless it has ended already: whoever starts another one learns why.
    pub(crate) fn alive(mut self) -> Option<Started> {
        let (stream, mut child, said) = self.started.take()?;
        matches!(child.try_wait(), Ok(None)).then_some((stream, child, said))
    }

    /// The id of the process.
    pub fn id(&self) -> Option<u32> {
        Some(self.started.as_ref()?.1.id())
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        if let Some((_, mut child, _)) = self.started.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A new worker process of `kind` and our end of its socket; what it says before its first step goes
/// to `output`.
pub(crate) fn process(
    args: &[String],
    store: &Path,
    output: &File,
    kind: &Kind,
) -> io::Result<(UnixStream, Child)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.args(args).arg(store);
    command.stdin(Stdio::from(OwnedFd::from(theirs)));
    command.stdout(output.try_clone()?).stderr(output.try_clone()?);
    if let Kind::Gpus(uuids) = kind {
        command.env("CUDA_VISIBLE_DEVICES", uuids.join(","));
    }
    // A Ctrl-C in the terminal goes to the leader alone, which then asks nicely.
    command.process_group(0);
    Ok((ours, command.spawn()?))
}

/// Adds what an early worker said to the log of the step that it was to run.
pub(crate) fn tell(mut said: File, log: &Path) -> io::Result<()> {
    let mut text = Vec::new();
    said.rewind()?;
    said.read_to_end(&mut text)?;
    if text.is_empty() {
        return Ok(());
    }
    File::options().create(true).append(true).open(log)?.write_all(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_before_the_step_is_in_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "before\n").unwrap();
        let said = || File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        let mut words = said();
        words.write_all(b"it cannot go on\n").unwrap();
        tell(words, &log).unwrap();
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "before\nit cannot go on\n");
        let none = dir.path().join("none");
        tell(said(), &none).unwrap();
        assert!(!none.exists(), "there was nothing to tell");
    }
}
