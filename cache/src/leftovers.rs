//! The part of the scrub that is no result: pins, and what attempts left. A damaged pin is written
//! anew, since moving it away would unpin; what is damaged of an attempt is moved away.

use crate::attempt::{self, CHECKPOINTS};
use crate::checkpoint;
use crate::error::Result;
use crate::gc::attempts_in;
use crate::pins;
use crate::scrub::{Damage, Scrub, stamp};

impl Scrub<'_> {
    pub fn pins(&mut self) -> Result<()> {
        for pin in self.cache.pins()? {
            let path = self.cache.layout().pin(&pin.key);
            let Some(Err(what)) = pins::read(&path, &pin.key)? else { continue };
            if self.repair {
                self.cache.pin(&pin.key, "(its reason is lost)")?;
            }
            let needed_by = vec![(pin.key, String::new())];
            self.done.damage.push(Damage { path, what, needed_by, repaired: self.repair });
        }
        Ok(())
    }

    /// Also of attempts at work: what is named here is whole or absent.
    pub fn attempts(&mut self) -> Result<()> {
        for (key, dir) in attempts_in(self.cache)? {
            let needed_by = || vec![(key, String::new())];
            let json = dir.join(attempt::JSON);
            let before = stamp(&json);
            if let Err(what) = attempt::judge(&dir) {
                self.found(json, before, what, needed_by())?;
            }
            for (path, what) in checkpoint::damaged(&dir.join(CHECKPOINTS)) {
                let before = stamp(&path);
                self.found(path, before, what, needed_by())?;
            }
        }
        Ok(())
    }
}
