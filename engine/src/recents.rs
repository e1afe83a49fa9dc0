//! Earlier results of stages, for a command that asks for many steps: what there is of a stage is
//! listed once, each entry read and parsed once. Gives what [`Cache::recent`] gives.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use cache::{Cache, Entry, Key};

use crate::key::PreImage;

/// An earlier result and what decided it; none where that cannot be read.
#[derive(Debug)]
pub struct Recent {
    /// The result.
    pub entry: Arc<Entry>,
    /// What decided it.
    pub image: Option<PreImage>,
}

/// What was asked so far. One view of the cache: of what is published meanwhile nothing is known.
pub struct Recents<'a> {
    cache: &'a Cache,
    stages: RefCell<HashMap<String, Rc<Stage>>>,
    read: RefCell<HashMap<Key, Option<Rc<Recent>>>>,
}

/// The results of one stage, the newest first.
struct Stage {
    newest: RefCell<HashMap<usize, Rc<[Rc<Recent>]>>>,
    keys: Vec<(String, Key)>,
    /// Positions of those of each step.
    steps: HashMap<String, Vec<usize>>,
}

impl<'a> Recents<'a> {
    /// Nothing is asked yet.
    pub fn new(cache: &'a Cache) -> Recents<'a> {
        Recents { cache, stages: RefCell::default(), read: RefCell::default() }
    }

    /// Results of `stage`, at most so many: those of `step` first, then the newest first.
    pub fn of(&self, stage: &str, step: &str, limit: usize) -> Vec<Rc<Recent>> {
        let stage = self.stage(stage);
        let own = stage.steps.get(step).into_iter().flatten().map(|&at| &stage.keys[at]);
        let others = stage.keys.iter().filter(|(other, _)| other != step);
        own.chain(others).take(limit).filter_map(|(_, key)| self.recent(key)).collect()
    }

    /// As [`Recents::of`], where there is none of `step`: the same for all such steps.
    pub fn of_others(&self, stage: &str, step: &str, limit: usize) -> Option<Rc<[Rc<Recent>]>> {
        let of = self.stage(stage);
        if of.steps.contains_key(step) {
            return None;
        }
        let found = of.newest.borrow().get(&limit).cloned();
        Some(found.unwrap_or_else(|| {
            let found: Rc<[Rc<Recent>]> = self.of(stage, step, limit).into();
            of.newest.borrow_mut().insert(limit, found.clone());
            found
        }))
    }

    fn stage(&self, name: &str) -> Rc<Stage> {
        let list = || {
            let keys = self.cache.keys_of(name);
            let mut steps: HashMap<String, Vec<usize>> = HashMap::new();
            for (at, (step, _)) in keys.iter().enumerate() {
                steps.entry(step.clone()).or_default().push(at);
            }
            Rc::new(Stage { newest: RefCell::default(), keys, steps })
        };
        let mut stages = self.stages.borrow_mut();
        match stages.get(name) {
            Some(stage) => stage.clone(),
            None => stages.entry(name.into()).or_insert_with(list).clone(),
        }
    }

    fn recent(&self, key: &Key) -> Option<Rc<Recent>> {
        let read = || {
            let entry = Arc::new(self.cache.entry_of(key)?);
            Some(Rc::new(Recent { image: PreImage::parse(&entry.preimage), entry }))
        };
        self.read.borrow_mut().entry(*key).or_insert_with(read).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cache::Publication;

    #[test]
    fn it_gives_what_the_cache_gives() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let committer = cache.committer(|_| {});
        for n in 0..30 {
            let (stage, step) = (format!("stage{}", n % 2), format!("step{}", n % 7));
            let provenance = serde_json::json!({ "stage": stage, "step": step });
            let entry = Entry::new(format!("pre-image {n}"), Vec::new(), None, provenance);
            committer.publish(Publication::imported(entry)).unwrap();
            committer.flush().unwrap();
            // Times of the files tell the newest.
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let recents = Recents::new(&cache);
        for stage in ["stage0", "stage1", "none"] {
            for (step, limit) in [("step3", 2), ("step3", 5), ("step0", 100), ("new", 4), ("", 0)] {
                let keys = |entries: &[Entry]| entries.iter().map(|e| e.key).collect::<Vec<_>>();
                let found: Vec<Key> =
                    recents.of(stage, step, limit).iter().map(|recent| recent.entry.key).collect();
                assert_eq!(
                    found,
                    keys(&cache.recent(stage, step, limit)),
                    "{stage} {step} {limit}"
                );
            }
        }
    }
}
