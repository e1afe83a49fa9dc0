//! How long a transfer goes on trying: as long as something succeeds now and then. Knows no
//! transfer.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::remote::transport::Fault;

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Shared by all pieces of one transfer.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    moved: Mutex<Instant>,
}

/// The tries of one piece.
#[derive(Debug)]
pub(super) struct Tries<'p> {
    patience: &'p Patience,
    since: Instant,
    wait: Duration,
}

impl Patience {
    pub fn new(limit: Duration) -> Patience {
        Patience { limit, moved: Mutex::new(Instant::now()) }
    }

    pub fn tries(&self) -> Tries<'_> {
        Tries { patience: self, since: Instant::now(), wait: FIRST_WAIT }
    }

    fn idle(&self) -> Duration {
        self.moved.lock().unwrap_or_else(|e| e.into_inner()).elapsed()
    }
}

impl Tries<'_> {
    /// Something succeeded.
    pub fn moved(&mut self) {
        let now = Instant::now();
        *self.patience.moved.lock().unwrap_or_else(|e| e.into_inner()) = now;
        (self.since, self.wait) = (now, FIRST_WAIT);
    }

    /// Waits before another try; the fault comes back when there is none: it is not of the kind
    /// that passes, or nothing of the transfer moves any more, or this piece alone never does.
    pub async fn again(&mut self, fault: Fault) -> Result<(), Fault> {
        let limit = self.patience.limit;
        let (own, all) = (self.since.elapsed(), self.patience.idle());
        let over = own > limit && (all > limit || own > limit * 3);
        if over || !matches!(fault, Fault::Down(_)) {
            return Err(fault);
        }
        tokio::time::sleep(self.wait).await;
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
        Ok(())
    }
}
