//! Pins: results that are to stay whatever is collected. One small sealed file a key, `pins/<key>`.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Key;
use crate::error::{At, Error, Result};
use crate::lease::Lock;
use crate::loss;
use crate::sealed;
use crate::tree;

const KIND: &str = "pipe-pin";
const VERSION: u32 = 1;

/// A result that stays, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    pub key: Key,
    /// For people.
    pub reason: String,
    /// Seconds since 1970.
    pub since: u64,
}

impl Cache {
    /// Pins the result of `key`, which need not be there; `false` when it was pinned before, which
    /// then only has the new reason.
    ///
    /// # Errors
    /// When the pin cannot be written.
    pub fn pin(&self, key: &Key, reason: &str) -> Result<bool> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let pin = Pin { key: *key, reason: reason.to_string(), since };
        let body = serde_json::to_string(&pin).expect("texts and numbers only");
        let (path, staged) = (self.layout().pin(key), self.layout().staging());
        let write = || {
            let mut file = File::create_new(&staged)?;
            self.layout().access().admit(&file)?;
            file.write_all(sealed::seal(KIND, VERSION, &(body + "\n")).as_bytes())?;
            loss::wrote(&staged);
            tree::sync_one(&staged)
        };
        write().inspect_err(|_| drop(fs::remove_file(&staged))).at("write", &staged)?;
        let lock = Lock::shared(self.layout())?;
        let new = !path.exists();
        if path.is_dir() {
            self.layout().discard(&path)?; // somebody's mistake; a pin it is all the same
        }
        crash_point!("pin.before-rename");
        loss::replacing(&path);
        fs::rename(&staged, &path).at("create", &path)?;
        loss::named(&path, Some(&staged));
        drop(lock);
        crash_point!("pin.before-sync");
        self.sync_pins()?;
        crash_point!("pin.after-sync");
        Ok(new)
    }

    /// Removes the pin of `key`; `false` when there is none.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn unpin(&self, key: &Key) -> Result<bool> {
        let path = self.layout().pin(key);
        loss::removing(&path);
        match fs::remove_file(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            result => result.at("remove", &path)?,
        }
        crash_point!("unpin.before-sync");
        self.sync_pins()?;
        crash_point!("unpin.after-sync");
        Ok(true)
    }

    /// Every pin, in the order of keys. A damaged one still pins, by its name.
    ///
    /// # Errors
    /// When pins cannot be listed or read: then it is not known what is to stay.
    pub fn pins(&self) -> Result<Vec<Pin>> {
        let dir = self.layout().dir("pins");
        let mut pins = Vec::new();
        for item in fs::read_dir(&dir).at("list", &dir)? {
            let item = item.at("list", &dir)?;
            let Some(key) = item.file_name().to_str().and_then(|name| name.parse::<Key>().ok())
            else {
                continue;
            };
            let damaged = || Pin { key, reason: "(the pin is damaged)".into(), since: 0 };
            pins.extend(read(&item.path(), &key)?.map(|pin| pin.unwrap_or_else(|_| damaged())));
        }
        pins.sort_by_key(|pin| pin.key);
        Ok(pins)
    }

    /// The keys with an entry or a pin that begin with `prefix`, sorted.
    ///
    /// # Errors
    /// When entries or pins cannot be listed.
    pub fn keys_like(&self, prefix: &str) -> Result<Vec<Key>> {
        let mut keys = self.keys()?;
        keys.extend(self.pins()?.into_iter().map(|pin| pin.key));
        keys.retain(|key| key.to_string().starts_with(prefix));
        keys.sort();
        keys.dedup();
        Ok(keys)
    }

    fn sync_pins(&self) -> Result<()> {
        let dir = self.layout().dir("pins");
        tree::sync_one(&dir).at("sync", &dir)
    }
}

/// The pin at `path`, or what is wrong with it; `None` when there is none.
pub(crate) fn read(path: &Path, key: &Key) -> Result<Option<Result<Pin, String>>> {
    let bytes = match tree::read_plain(path) {
        Ok(None) => return Ok(None),
        Ok(Some((bytes, _))) => bytes,
        Err(Error::Damaged { what, .. }) => return Ok(Some(Err(what))),
        Err(error) => return Err(error),
    };
    Ok(Some(parse(&bytes, key)))
}

fn parse(bytes: &[u8], key: &Key) -> Result<Pin, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_string())?;
    let body = sealed::open(KIND, VERSION, text)?;
    let pin: Pin = serde_json::from_str(body).map_err(|e| e.to_string())?;
    match pin.key == *key {
        true => Ok(pin),
        false => Err(format!("it is the pin of another key, `{}`", pin.key)),
    }
}
