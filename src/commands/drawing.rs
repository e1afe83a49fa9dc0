//! The report that a run leaves beside its record.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Result;
use engine::event::{Event, Summary};
use engine::plan::Plan;
use engine::run::Reading;

use crate::console::Console;

/// Reports of more steps take longer than many a run of them, and are drawn on demand.
const DRAWN: usize = 2000;

/// The report of a run that goes on. To read its record takes most of the time, and is begun while
/// steps are at work.
pub struct Drawing {
    dir: PathBuf,
    plan: Arc<Plan>,
    reading: Option<JoinHandle<Result<Reading>>>,
}

impl Drawing {
    /// That of a run of `plan` recorded in `dir`.
    pub fn of(dir: &Path, plan: Arc<Plan>) -> Drawing {
        Drawing { dir: dir.to_path_buf(), plan, reading: None }
    }

    /// To be told of every event.
    pub fn hear(&mut self, event: &Event) {
        let begins = self.reading.is_none() && self.plan.steps.len() <= DRAWN;
        if begins && matches!(event, Event::Launched { .. }) {
            let (dir, plan) = (self.dir.clone(), self.plan.clone());
            let begin = move || Reading::begin(&dir, plan);
            self.reading = std::thread::Builder::new().spawn(begin).ok();
        }
    }

    /// Draws it if anything was done. Its failure is told and ends nothing.
    pub fn draw(self, summary: &Summary, cache: &cache::Cache, console: &mut Console<'_>) {
        if summary.ran + summary.failed == 0 {
            return;
        }
        if self.plan.steps.len() > DRAWN {
            return console.note("`pipe report` draws the report of a run of so many steps");
        }
        // What could not be begun is read at once.
        let begun = self.reading.and_then(|thread| thread.join().ok()?.ok());
        let begun = begun.map_or_else(|| Reading::begin(&self.dir, self.plan), Ok);
        let drawn = begun.map(Reading::finish).and_then(|past| {
            let path = self.dir.join("report.html");
            cache.write(&path, engine::report::html(&past, cache).as_bytes())?;
            // To take it apart takes longer than the process has left.
            std::mem::forget(past);
            Ok(path)
        });
        match drawn {
            Ok(path) => console.note(&format!("the report is at {}", path.display())),
            Err(error) => console.note(&format!("the report could not be drawn: {error:#}")),
        }
    }
}
