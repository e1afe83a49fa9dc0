//! Brings what steps want of a hub, on threads of its own: steps that want none of it go on.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use cache::Cache;

use super::{Executor, Heard};
use crate::event::Event;
use crate::hub::{self, Reference, Work};
use crate::inputs::Fetched;
use crate::lookup;
use crate::schedule::State;

/// What a fetching thread says.
pub(super) enum Said {
    /// How far it is.
    Note(String),
    /// It ended; the text after `hf:`, and what came.
    Done(String, Box<Result<Fetched, String>>),
}

/// What was fetched, and who waits for more.
pub(super) struct Fetching<'a> {
    settings: &'a hub::Settings,
    sender: Sender<Heard>,
    cancel: Arc<AtomicBool>,
    found: BTreeMap<String, Result<Fetched, String>>,
    waiting: BTreeSet<usize>,
}

impl<'a> Fetching<'a> {
    pub(super) fn new(settings: &'a hub::Settings, sender: Sender<Heard>) -> Fetching<'a> {
        let cancel = Arc::new(AtomicBool::new(false));
        let (found, waiting) = (BTreeMap::new(), BTreeSet::new());
        Fetching { settings, sender, cancel, found, waiting }
    }

    /// What came, or why it did not, by the text after `hf:`.
    pub(super) fn found(&self) -> &BTreeMap<String, Result<Fetched, String>> {
        &self.found
    }

    /// Lets the threads end; half files stay for the next run.
    pub(super) fn stop(&mut self) {
        self.waiting.clear();
        self.cancel.store(true, Ordering::Relaxed);
    }

    fn start(&self, name: String, cache: Cache) {
        let (settings, sender, cancel) =
            (self.settings.clone(), self.sender.clone(), self.cancel.clone());
        std::thread::spawn(move || {
            let notes = sender.clone();
            let say = |text| drop(notes.send(Heard::Hub(Said::Note(text))));
            let work = Work { cancel: &cancel, say: &say };
            let result = catch_unwind(AssertUnwindSafe(|| fetch(&settings, &name, &cache, &work)));
            let result = result.unwrap_or_else(|_| Err(format!("fetching `hf:{name}` panicked")));
            let _ = sender.send(Heard::Hub(Said::Done(name, Box::new(result))));
        });
    }
}

fn fetch(
    settings: &hub::Settings,
    name: &str,
    cache: &Cache,
    work: &Work<'_>,
) -> Result<Fetched, String> {
    let reference = Reference::parse(name).map_err(|bad| bad.message)?;
    let snapshot = hub::fetch(settings, &reference, work).map_err(|e| e.to_string())?;
    Fetched::read(cache, snapshot)
}

impl Executor<'_> {
    /// One thread for each thing that is wanted of a hub.
    pub(super) fn start_fetching(&mut self) {
        for name in lookup::hub_names(self.plan, &self.steps) {
            self.fetching.start(name, self.cache.clone());
        }
    }

    /// Whether a step must wait; it is looked at again when what it wants is here.
    pub(super) fn waits_for_hub(&mut self, at: usize) -> bool {
        let names = lookup::hub_names(self.plan, &[self.steps[at]]);
        let waits = names.iter().any(|name| !self.fetching.found.contains_key(name));
        if waits {
            self.fetching.waiting.insert(at);
        }
        waits
    }

    pub(super) fn hub_said(&mut self, said: Said) {
        match said {
            Said::Note(text) => self.emit(Event::Note { text }),
            Said::Done(name, result) => {
                self.fetching.found.insert(name, *result);
                for at in std::mem::take(&mut self.fetching.waiting) {
                    // A failure elsewhere may have skipped it meanwhile.
                    if self.schedule.state(at) == State::Ready {
                        self.look(at);
                    }
                }
            }
        }
    }
}
