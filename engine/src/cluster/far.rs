//! What is different for the leader's thread where nodes see none of this machine's directories.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Instant;

use cache::remote::Remote;

use super::Setup;
use super::batch::Shape;
use super::courier::{Carrier, Courier, News};
use super::desk::{self, Address};
use super::driver::{At, Driver, Inbox, Job};
use super::journal::Places;
use super::node::NO_CACHE;
use super::records::{self, ORDER};
use super::saved;
use crate::event::{Failure, Job as Told};
use crate::wire::Order;

/// What a run has left in a remote is removed by others so many seconds after it began: longer than
/// any run waits for its jobs.
const KEPT_S: f64 = 180.0 * 86_400.0;

/// By what nodes are reached that see none of this machine's directories.
pub(super) struct Far {
    pub address: Address,
    pub courier: Courier,
    remote: Remote,
}

impl Far {
    pub fn start(
        carrier: Carrier,
        setup: &Setup,
        places: &Places,
        tell: &Sender<Inbox>,
    ) -> io::Result<Far> {
        let remote = carrier.remote.clone();
        let address = Address::new(&remote, &setup.id);
        address.keep(&setup.run)?;
        let own = address.desk(&remote).expect("it was made for this one");
        let courier = Courier::start(carrier, own, places.mail(), tell.clone());
        Ok(Far { address, courier, remote })
    }

    /// Removes what the run has in the remote, and what others left there long ago. What cannot be
    /// removed now is, some day, by others.
    pub fn clear(self, run: &Path) {
        let own = self.courier.own.clone();
        drop(self.courier);
        if own.clear().is_ok() {
            desk::forget(run);
            desk::sweep(&self.remote, &crate::run::timestamp((crate::run::now() - KEPT_S) as u64));
        }
    }
}

impl Driver {
    /// Takes what the courier tells.
    pub fn take_news(&mut self, news: News) {
        match news {
            News::Looked(at) => self.looked = Some(at),
            News::Troubled(why) => self.tell_job(u64::MAX, Told::Troubled { why }),
            News::Ready(worker) if self.jobs.contains_key(&worker) => self.wait(worker, false),
            News::Waits(worker, reason) if self.jobs.contains_key(&worker) => {
                self.tell_job(worker, Told::Queued { job: String::new(), reason });
            }
            News::Refused(worker, answer) if self.jobs.contains_key(&worker) => {
                self.forget(worker);
                self.tell(worker, answer);
            }
            // Given up meanwhile.
            News::Ready(_) | News::Waits(..) | News::Refused(..) => {}
        }
    }

    /// Takes what an attempt of another leader came to.
    pub fn attach_finished(&mut self, worker: u64, attempt: String, dir: PathBuf) {
        let job = Job::new(dir, attempt.clone(), Shape::default(), None, At::Waiting);
        self.by_name.insert(attempt, worker);
        self.jobs.insert(worker, job);
        self.look_for_exit(worker);
        if self.jobs.contains_key(&worker) {
            self.lose(worker, Failure::Lost, "its record is gone".into());
        }
    }

    /// What tasks run, and what they read, so that each takes its own of these attempts.
    pub fn command_of(&self, attempts: &[String]) -> io::Result<(Vec<String>, String)> {
        let lines = attempts.join("\n") + "\n";
        let Some(far) = &self.far else {
            let list = self.places.jobs().join(format!("{}.list", self.numbers));
            fs::write(&list, lines)?;
            let command =
                [&self.store.display().to_string(), "--list", &list.display().to_string()];
            return Ok((command.map(String::from).to_vec(), String::new()));
        };
        let store = self.settings.node_cache.as_deref().unwrap_or(NO_CACHE);
        let Address { remote, run, word } = &far.address;
        let command = [store, "--list", "/dev/stdin", "--remote", remote, "--run", run];
        Ok((command.map(String::from).to_vec(), format!("{word}\n{lines}")))
    }

    /// Brings an order, and what its step needs, where a node finds it; it is submitted after.
    pub fn dispatch(&mut self, worker: u64) {
        let Some(shape) = self.jobs.get(&worker).map(|job| job.shape.clone()) else { return };
        let (limit_s, margin_s) = self.times(shape.time_s);
        let (dir, mut ordered) = self.ordered(worker, limit_s, margin_s);
        if let Order::Run { frozen, .. } = &ordered.order {
            ordered.checkpoint = saved::newest(&self.store, &frozen.key);
        }
        let kept = records::prepare(&dir)
            .and_then(|()| records::write_new(&records::path(&dir, ORDER), &ordered));
        match (kept, &self.far) {
            (Err(error), _) => {
                self.lose(worker, Failure::Lost, format!("cannot write its order: {error}"));
            }
            (_, Some(far)) => far.courier.send(worker, records::name_of(&dir), ordered),
            _ => {}
        }
    }

    /// Whether all records are here that were there at this moment. Those of nodes that share no
    /// directory come by a remote, which may not answer: nothing follows then.
    pub fn taken_since(&self, moment: Instant) -> bool {
        let Some(far) = &self.far else { return true };
        let taken = self.looked.is_some_and(|looked| looked > moment);
        if !taken {
            far.courier.look_soon();
        }
        taken
    }
}
