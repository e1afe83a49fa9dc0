//! Removes what is left of attempts, beside the loop. Only tidiness: what stays is found and removed
//! with the next result of its key.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use cache::{Cache, Key};

/// So many attempts may wait to be removed; then whoever brings more waits, so that what is left of a
/// long run never fills the disk.
const BEHIND: usize = 1024;

/// A thread that removes attempts; dropping it waits until it is through.
pub(super) struct Tidy {
    sender: Option<SyncSender<Key>>,
    thread: Option<JoinHandle<()>>,
    cache: Cache,
    parks: bool,
}

impl Tidy {
    /// Nothing is started yet. `parks`: whether bare attempts are kept for other steps, which takes
    /// that nobody works in one that is over.
    pub fn new(cache: &Cache, parks: bool) -> Tidy {
        Tidy { sender: None, thread: None, cache: cache.clone(), parks }
    }

    /// Removes the attempts at `key` that nobody holds, soon.
    pub fn clean(&mut self, key: Key) {
        let sender = self.sender.get_or_insert_with(|| {
            let (sender, receiver) = sync_channel::<Key>(BEHIND);
            let (cache, parks) = (self.cache.clone(), self.parks);
            self.thread = Some(std::thread::spawn(move || {
                receiver.iter().for_each(|key| match parks {
                    true => cache.attempts_park(&key),
                    false => drop(cache.attempts_clean(&key)),
                });
            }));
            sender
        });
        let _ = sender.send(key);
    }
}

impl Drop for Tidy {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
