//! One checkpoint at a time, written on a thread of its own while the stage goes on.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow};

use super::Checkpoint;

/// The checkpoint in flight, if there is one. Dropping it waits: whoever ends a step, by an error or
/// a panic too, leaves whole checkpoints.
#[derive(Default)]
pub(crate) struct Background(Option<(u64, JoinHandle<Result<PathBuf>>)>);

impl Background {
    /// Starts to write and seal; nothing may be in flight.
    pub(super) fn start(
        &mut self,
        dir: PathBuf,
        position: u64,
        write: impl FnOnce(&Path) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        debug_assert!(self.0.is_none(), "waited for before");
        let work = move || cache::checkpoint::save(&dir, position, write);
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        self.0 = Some((position, thread.context("cannot start a thread for the checkpoint")?));
        Ok(())
    }

    /// Waits for the one in flight: the sealed checkpoint, or why there is none.
    pub(super) fn wait(&mut self) -> Result<Option<Checkpoint>> {
        let Some((position, thread)) = self.0.take() else { return Ok(None) };
        let result = thread.join().unwrap_or_else(|_| Err(anyhow!("its writer panicked")));
        let dir =
            result.with_context(|| format!("the checkpoint at {position} was not written"))?;
        Ok(Some(Checkpoint { position, dir }))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // The stage's own error is the one to tell.
        let _ = self.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use anyhow::bail;

    use crate::command::Command;
    use crate::stage::Context;

    fn context(dir: &tempfile::TempDir) -> Context {
        Context::local::<Command>(dir.path(), &[])
    }

    fn position(ctx: &Context) -> Option<u64> {
        ctx.checkpoint_latest().map(|latest| latest.position)
    }

    #[test]
    fn the_stage_goes_on_and_the_next_one_waits() {
        let dir = tempfile::tempdir().unwrap();
        let mut ctx = context(&dir);
        let (go, wait) = channel::<()>();
        let done = Arc::new(AtomicBool::new(false));
        let first = done.clone();
        ctx.checkpoint_save_in_background(1, move |_| {
            let _ = wait.recv();
            std::thread::sleep(Duration::from_millis(50));
            first.store(true, Ordering::SeqCst);
            Ok(())
        })
        .unwrap();
        assert_eq!(position(&ctx), None, "not sealed yet, and here we are");
        go.send(()).unwrap();
        let before = done.clone();
        ctx.checkpoint_save_in_background(2, move |_| {
            assert!(before.load(Ordering::SeqCst));
            Ok(())
        })
        .unwrap();
        assert_eq!(position(&ctx), Some(1));
        // One that is not in the background waits too, so that the newest is the newest.
        ctx.checkpoint_save(3, |_| Ok(())).unwrap();
        assert_eq!(position(&ctx), Some(3));
        let left: Vec<_> = std::fs::read_dir(dir.path().join("checkpoints")).unwrap().collect();
        assert_eq!(left.len(), 2, "the newest and its seal");
    }

    #[test]
    fn what_went_wrong_is_told_once_and_the_one_before_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut ctx = context(&dir);
        ctx.checkpoint_save(1, |_| Ok(())).unwrap();
        ctx.checkpoint_save_in_background(2, |dir| {
            std::fs::write(dir.join("half"), "")?;
            bail!("the disk is full")
        })
        .unwrap();
        let error = ctx.checkpoint_save_in_background(3, |_| Ok(())).unwrap_err();
        assert_eq!(format!("{error:#}"), "the checkpoint at 2 was not written: the disk is full");
        ctx.checkpoint_save_in_background(4, |_| panic!("bad luck")).unwrap();
        let error = format!("{:#}", ctx.checkpoint_wait().unwrap_err());
        assert_eq!(error, "the checkpoint at 4 was not written: its writer panicked");
        ctx.checkpoint_wait().unwrap();
        assert_eq!(position(&context(&dir)), Some(1));
    }

    #[test]
    fn the_end_of_a_step_waits() {
        let dir = tempfile::tempdir().unwrap();
        let mut ctx = context(&dir);
        let slow = |_: &std::path::Path| {
            std::thread::sleep(Duration::from_millis(50));
            Ok(())
        };
        ctx.checkpoint_save_in_background(9, slow).unwrap();
        drop(ctx);
        assert_eq!(position(&context(&dir)), Some(9));
    }
}
