//! Numbered jobs over several threads; what comes back is in their order and depends on no thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use anyhow::Result;
use engine::stage::Context;

/// Does jobs `0..jobs`, each thread with a worker of its own from `start`; `done` hears, on this thread,
/// of every job that ended.
pub fn spread<T: Send, W: FnMut(usize) -> T>(
    ctx: &mut Context,
    jobs: usize,
    start: impl Fn() -> W + Sync,
    mut done: impl FnMut(&mut Context, usize),
) -> Result<Vec<T>> {
    let (next, cancel) = (AtomicUsize::new(0), ctx.cancel_flag());
    let mut found: Vec<Option<T>> = (0..jobs).map(|_| None).collect();
    std::thread::scope(|scope| {
        let (sender, results) = mpsc::channel();
        for _ in 0..ctx.threads().clamp(1, jobs.max(1)) {
            let (sender, next, cancel, start) = (sender.clone(), &next, &cancel, &start);
            scope.spawn(move || {
                let mut work = start();
                loop {
                    let job = next.fetch_add(1, Ordering::Relaxed);
                    if job >= jobs || cancel.load(Ordering::Relaxed) {
                        return;
                    }
                    if sender.send((job, work(job))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (job, result) in results {
            found[job] = Some(result);
            done(ctx, job);
        }
    });
    ctx.check_cancelled()?;
    Ok(found.into_iter().flatten().collect())
}
