//! Whether a remote has the result of a key, and all of it. Moves no bytes.

use crate::cache::Cache;
use crate::digest::Key;
use crate::entry::Entry;
use crate::remote::envelope::{Envelope, LARGEST};
use crate::remote::inner::{Inner, Length, Remote, Way};
use crate::remote::{Trouble, layout};

/// What a remote says of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// A result that may be used, and all of whose bytes are here or there.
    Hit(Box<Entry>),
    Miss,
    /// Something is there that is not used, and why: damaged, not signed, not complete.
    Rejected(String),
    /// Nobody knows, and why.
    Unavailable(String),
}

/// The object under an entry's name.
pub(super) enum There {
    Nothing,
    Damaged(String),
    Whole(Box<Envelope>),
}

impl Remote {
    /// The result of `key`, if the remote has one whose writer is believed and whose bytes can all
    /// be had. Takes at most [`Timeouts::find`](crate::remote::Timeouts); asks for no bytes.
    pub fn find(&self, cache: &Cache, key: &Key) -> Found {
        let limit = self.inner.settings.timeouts.find;
        let work = async {
            match tokio::time::timeout(limit, self.inner.find(cache, key)).await {
                Ok(found) => found,
                Err(_) => {
                    let why = format!("no answer in {} s", limit.as_secs_f32());
                    Err(self.inner.unavailable(why))
                }
            }
        };
        match self.work(Way::Read, Length::Short, work) {
            Ok(found) => found,
            Err(Trouble::Unavailable { why, .. } | Trouble::Refused { why, .. }) => {
                Found::Unavailable(why)
            }
            Err(other) => Found::Unavailable(other.to_string()),
        }
    }
}

impl Inner {
    async fn find(&self, cache: &Cache, key: &Key) -> Result<Found, Trouble> {
        self.ready(false).await?;
        let envelope = match self.entry(key).await? {
            There::Nothing => return Ok(Found::Miss),
            There::Damaged(what) => {
                return Ok(Found::Rejected(format!("the entry is damaged: {what}")));
            }
            There::Whole(envelope) => envelope,
        };
        if let Err(why) = envelope.acceptable(&self.settings.trust) {
            return Ok(Found::Rejected(format!("the entry is not used: {why}")));
        }
        let Envelope { entry, recipes, .. } = *envelope;
        Ok(match self.incomplete(Some(cache), &entry, &recipes).await? {
            None => Found::Hit(Box::new(entry)),
            Some(digest) => Found::Rejected(format!(
                "the entry is not complete: the bytes of `{}` are missing",
                digest.short()
            )),
        })
    }

    /// What is under the name of `key`'s entry.
    pub async fn entry(&self, key: &Key) -> Result<There, Trouble> {
        let name = layout::entry(key);
        let read = self.read(&name, LARGEST).await.map_err(|f| self.trouble(f))?;
        let Some(bytes) = read else { return Ok(There::Nothing) };
        Ok(match Envelope::parse(&bytes, key) {
            Ok(envelope) => There::Whole(Box::new(envelope)),
            Err(what) => There::Damaged(what),
        })
    }
}
