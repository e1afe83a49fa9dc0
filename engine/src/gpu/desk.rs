//! Hands the GPUs of one run out to its steps: each to one step at a time, and to one run of the
//! machine at a time.
//!
//! A GPU stays locked for a while after a step, as long as its worker stays warm. Steps that want
//! several get all or none, so nobody waits while holding some.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::lock::{self, Lock, Locked};
use super::{Gpu, size};

/// The GPUs of one run.
pub(crate) struct Desk {
    places: Vec<Place>,
    locks: PathBuf,
}

struct Place {
    gpu: Gpu,
    lock: Option<Lock>,
    taken: bool,
    since: Instant,
}

/// What a step asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// How many GPUs.
    pub count: usize,
    /// Bytes free on each; 0 for whatever there is.
    pub memory: u64,
    /// The name of the step.
    pub step: &'a str,
    /// Shown to other runs.
    pub who: &'a str,
}

/// What it gets.
#[derive(Debug, PartialEq)]
pub(crate) enum Granted {
    /// These, by UUID.
    Gpus(Vec<String>),
    /// Others hold them: who.
    Busy(String),
    /// There are enough, but too little memory is free on them: the message.
    Short(String),
    /// They cannot be locked at all.
    Broken(String),
}

impl Desk {
    /// All free; locks are files in `locks`.
    pub fn new(gpus: &[Gpu], locks: &Path) -> Desk {
        let place =
            |gpu: &Gpu| Place { gpu: gpu.clone(), lock: None, taken: false, since: Instant::now() };
        Desk { places: gpus.iter().map(place).collect(), locks: locks.to_path_buf() }
    }

    /// Takes what is wished for, or nothing. `evict` ends the idle worker on a GPU, if there is one,
    /// and tells whether there was: what it holds is free then.
    pub fn take(&mut self, wish: Wish<'_>, evict: &mut dyn FnMut(&str) -> bool) -> Granted {
        // Where a worker may be warm first.
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.retain(|&at| !self.places[at].taken);
        order.sort_by_key(|&at| self.places[at].lock.is_none());
        let (mut got, mut new, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for at in order {
            if got.len() == wish.count {
                break;
            }
            let place = &mut self.places[at];
            if place.lock.is_none() {
                match lock::lock(&self.locks, &place.gpu.uuid, wish.who) {
                    Ok(Locked::Mine(lock)) => place.lock = Some(lock),
                    Ok(Locked::Busy(who)) => {
                        refused.push(Granted::Busy(format!("{}, which {who} uses", place.gpu)));
                        continue;
                    }
                    Err(error) => {
                        refused.push(unlockable(&place.gpu, &self.locks, &error));
                        continue;
                    }
                }
                new.push(at);
            }
            match place.lacking(&wish, evict) {
                None => got.push(at),
                Some(text) => refused.push(Granted::Short(text)),
            }
        }
        let enough = got.len() == wish.count;
        for at in new.into_iter().filter(|at| !enough || !got.contains(at)) {
            self.places[at].lock = None;
        }
        if !enough {
            return self.refusal(refused);
        }
        got.iter().for_each(|&at| self.places[at].taken = true);
        Granted::Gpus(got.into_iter().map(|at| self.places[at].gpu.uuid.clone()).collect())
    }

    /// The refusal to tell: as long as somebody may give a GPU back, there is something to wait for.
    fn refusal(&self, refused: Vec<Granted>) -> Granted {
        let ours = |place: &Place| {
            Granted::Busy(format!("{}, which another step of this run uses", place.gpu))
        };
        let ours = self.places.iter().filter(|place| place.taken).map(ours);
        let rank = |granted: &Granted| match granted {
            Granted::Busy(_) => 0,
            Granted::Short(_) => 1,
            _ => 2,
        };
        let none = || Granted::Busy("a GPU".into());
        refused.into_iter().chain(ours).min_by_key(rank).unwrap_or_else(none)
    }

    /// Takes GPUs back after a step.
    pub fn give_back(&mut self, uuids: &[String]) {
        for place in self.places.iter_mut().filter(|place| uuids.contains(&place.gpu.uuid)) {
            (place.taken, place.since) = (false, Instant::now());
        }
    }

    /// Those that no step has used for so long, though they are still ours.
    pub fn idle(&self, since: Duration) -> Vec<String> {
        let idle =
            |place: &&Place| !place.taken && place.lock.is_some() && place.since.elapsed() >= since;
        self.places.iter().filter(idle).map(|place| place.gpu.uuid.clone()).collect()
    }

    /// Gives a GPU to whoever wants it. Its worker must have ended before.
    pub fn release(&mut self, uuid: &str) {
        for place in self.places.iter_mut().filter(|place| place.gpu.uuid == *uuid && !place.taken)
        {
            place.lock = None;
        }
    }
}

impl Place {
    /// What there is too little of, after ending what of ours holds memory there.
    fn lacking(&self, wish: &Wish<'_>, evict: &mut dyn FnMut(&str) -> bool) -> Option<String> {
        if wish.memory == 0 {
            return None;
        }
        let short = || (self.gpu.free)().filter(|free| *free < wish.memory);
        let mut free = short()?;
        if evict(&self.gpu.uuid) {
            free = short()?;
        }
        Some(format!(
            "{} has {} free of {}, and `{}` needs {} (`resources.vram`): another process uses it\n\
             hint: end that process (`nvidia-smi` lists it), name other GPUs in \
             CUDA_VISIBLE_DEVICES, or lower `resources.vram`",
            self.gpu,
            size(free),
            size(self.gpu.memory),
            wish.step,
            size(wish.memory),
        ))
    }
}

fn unlockable(gpu: &Gpu, locks: &Path, error: &std::io::Error) -> Granted {
    Granted::Broken(format!(
        "cannot lock {gpu} for this run: {error}\nhint: look at `{}`",
        lock::file(locks, &gpu.uuid).display()
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::gpu::tests::fake;

    const GIB: u64 = 1 << 30;

    fn wish(count: usize, gib: u64) -> Wish<'static> {
        Wish { count, memory: gib * GIB, step: "a", who: "run 1" }
    }

    fn taken(desk: &mut Desk, wish: Wish<'_>) -> Granted {
        desk.take(wish, &mut |_| false)
    }

    fn uuids(indices: &[u32]) -> Vec<String> {
        indices.iter().map(|i| format!("GPU-fake-{i}")).collect()
    }

    fn gpus(indices: &[u32]) -> Granted {
        Granted::Gpus(uuids(indices))
    }

    fn desks(free: &[u64]) -> (tempfile::TempDir, Desk, Desk) {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<Gpu> =
            (0..).zip(free).map(|(i, free)| fake(i, 80 * GIB, free * GIB)).collect();
        let (one, two) = (Desk::new(&all, dir.path()), Desk::new(&all, dir.path()));
        (dir, one, two)
    }

    #[test]
    fn each_to_one_step_and_one_run() {
        let (_dir, mut one, mut two) = desks(&[80, 80]);
        assert_eq!(taken(&mut one, wish(1, 0)), gpus(&[0]));
        assert_eq!(taken(&mut two, wish(1, 0)), gpus(&[1]));
        let held = |i| Granted::Busy(format!("GPU {i} (Fake), which run 1 uses"));
        assert_eq!(taken(&mut one, wish(1, 0)), held(1));
        let ours = "GPU 1 (Fake), which another step of this run uses";
        assert_eq!(taken(&mut two, wish(2, 0)), held(0));
        two.give_back(&uuids(&[1]));
        assert_eq!(taken(&mut one, wish(2, 0)), held(1));
        assert_eq!(taken(&mut two, wish(1, 0)), gpus(&[1]));
        one.give_back(&uuids(&[0]));
        one.release("GPU-fake-0");
        assert_eq!(taken(&mut two, wish(2, 0)), Granted::Busy(ours.into()));
        assert_eq!(taken(&mut one, wish(1, 0)), gpus(&[0]));
        one.give_back(&uuids(&[0]));
        assert_eq!(taken(&mut two, wish(1, 0)), held(0), "still warm");
        assert_eq!(one.idle(Duration::ZERO), uuids(&[0]));
        one.release("GPU-fake-0");
        assert_eq!(taken(&mut two, wish(1, 0)), gpus(&[0]));
        drop(two);
        assert_eq!(taken(&mut one, wish(2, 0)), gpus(&[0, 1]));
        assert_eq!(one.idle(Duration::ZERO), uuids(&[]));
    }

    #[test]
    fn all_or_none() {
        let (_dir, mut one, mut two) = desks(&[80, 80, 80]);
        assert_eq!(taken(&mut two, wish(1, 0)), gpus(&[0]));
        assert!(matches!(taken(&mut one, wish(3, 0)), Granted::Busy(_)));
        assert_eq!(taken(&mut two, wish(2, 0)), gpus(&[1, 2]), "none was kept");
    }

    #[test]
    fn a_warm_one_comes_first() {
        let (_dir, mut one, _) = desks(&[80, 80]);
        assert_eq!(taken(&mut one, wish(1, 0)), gpus(&[0]));
        assert_eq!(taken(&mut one, wish(1, 0)), gpus(&[1]));
        one.give_back(&uuids(&[1]));
        one.give_back(&uuids(&[0]));
        one.release("GPU-fake-0");
        assert_eq!(taken(&mut one, wish(1, 0)), gpus(&[1]));
    }

    #[test]
    fn another_is_tried_where_memory_is_short() {
        let (_dir, mut one, mut two) = desks(&[3, 80]);
        assert_eq!(taken(&mut one, wish(1, 8)), gpus(&[1]));
        assert_eq!(taken(&mut two, wish(1, 2)), gpus(&[0]), "it was not kept");
        two.give_back(&uuids(&[0]));
        two.release("GPU-fake-0");
        for desk in [&mut one, &mut two] {
            let told = taken(desk, wish(1, 8));
            assert!(matches!(told, Granted::Busy(_)), "the other one may come back: {told:?}");
        }
        one.give_back(&uuids(&[1]));
        let Granted::Short(text) = taken(&mut one, wish(2, 8)) else { panic!() };
        let wanted =
            "GPU 0 (Fake) has 3.0 GiB free of 80.0 GiB, and `a` needs 8.0 GiB (`resources.vram`)";
        assert!(text.starts_with(wanted), "{text}");
        assert!(text.contains("\nhint: ") && text.contains("nvidia-smi"), "{text}");
    }

    #[test]
    fn a_warm_worker_of_ours_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let free = Arc::new(AtomicU64::new(GIB));
        let now = free.clone();
        let gpu =
            Gpu { free: Arc::new(move || Some(now.load(Ordering::SeqCst))), ..fake(0, 9 * GIB, 0) };
        let mut desk = Desk::new(&[gpu], dir.path());
        let mut evicted = Vec::new();
        let mut evict = |uuid: &str| {
            evicted.push(uuid.to_string());
            free.store(9 * GIB, Ordering::SeqCst);
            true
        };
        assert_eq!(desk.take(wish(1, 8), &mut evict), gpus(&[0]));
        assert_eq!(evicted, uuids(&[0]));
    }

    #[test]
    fn a_driver_that_does_not_tell_is_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let gpu = Gpu { free: Arc::new(|| None), ..fake(0, GIB, 0) };
        assert_eq!(taken(&mut Desk::new(&[gpu], dir.path()), wish(1, 8)), gpus(&[0]));
    }

    #[test]
    fn locks_that_cannot_be_made_are_told() {
        let mut desk = Desk::new(&[fake(0, GIB, GIB)], Path::new("/nowhere"));
        let Granted::Broken(text) = taken(&mut desk, wish(1, 0)) else { panic!() };
        assert!(text.contains("/nowhere/pipe-GPU-fake-0.lock"), "{text}");
    }
}
