//! Small objects of a run, which go with it: what its leader and jobs on machines without a common
//! file system tell each other. Knows nothing of what they say.

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::remote::artifact::REQUESTS;
use crate::remote::inner::{Inner, Length, Remote, Way};
use crate::remote::transport::{Fault, Put};
use crate::remote::{Trouble, layout};

/// A note may not be larger, in bytes.
const LARGEST: u64 = 64 << 20;

/// The notes of one run. A note is there whole or not at all.
#[derive(Debug, Clone)]
pub struct Notes {
    remote: Remote,
    run: String,
}

impl Remote {
    /// The notes of the run that is called `run`, a plain word.
    pub fn notes(&self, run: &str) -> Notes {
        Notes { remote: self.clone(), run: run.into() }
    }

    /// Names of the runs of which there are notes.
    ///
    /// # Errors
    /// [`Trouble::Unavailable`], [`Trouble::Refused`].
    pub fn noted_runs(&self) -> Result<Vec<String>, Trouble> {
        self.second_words(layout::NOTES)
    }

    /// The words that follow `dir` in names of objects, each once.
    pub(super) fn second_words(&self, dir: &str) -> Result<Vec<String>, Trouble> {
        let list = async || self.inner.list(dir).await;
        let names = self.work(Way::Read, Length::Short, list())?;
        let word = |name: &String| Some(name.split('/').nth(1)?.to_string());
        let mut words: Vec<String> = names.iter().filter_map(word).collect();
        words.sort_unstable();
        words.dedup();
        Ok(words)
    }
}

impl Notes {
    /// Names of all that are there.
    ///
    /// # Errors
    /// [`Trouble::Unavailable`], [`Trouble::Refused`].
    pub fn list(&self) -> Result<Vec<String>, Trouble> {
        let dir = layout::notes(&self.run);
        let list = async || self.remote.inner.list(&dir).await;
        let names = self.remote.work(Way::Read, Length::Short, list())?;
        let own = |name: String| name.strip_prefix(&dir)?.strip_prefix('/').map(str::to_string);
        Ok(names.into_iter().filter_map(own).collect())
    }

    /// Those of `names` that are there, in that order.
    ///
    /// # Errors
    /// As [`Notes::list`].
    pub fn read(&self, names: &[String]) -> Result<Vec<(String, Vec<u8>)>, Trouble> {
        let inner = &self.remote.inner;
        let one = async |name: &String| {
            let read = inner.read(&layout::note(&self.run, name), LARGEST).await;
            let read = read.map_err(|fault| inner.trouble(fault))?;
            Ok::<_, Trouble>(read.map(|bytes| (name.clone(), bytes.to_vec())))
        };
        let all = stream::iter(names.iter().map(one)).buffered(REQUESTS);
        let all = async { all.try_collect::<Vec<_>>().await };
        let all = self.remote.work(Way::Read, Length::Short, all)?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Writes a note, in place of one that is there.
    ///
    /// # Errors
    /// As [`Notes::list`].
    pub fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), Trouble> {
        let (inner, bytes) = (&self.remote.inner, Bytes::from(bytes));
        let (name, put) = (layout::note(&self.run, name), Put::Over);
        let work = async {
            inner.ready(true).await?;
            let put = || inner.transport.put(&name, bytes.clone(), put);
            inner.twice(put).await.map_err(|fault| inner.trouble(fault))
        };
        self.remote.work(Way::Write, Length::Short, work)
    }

    /// Writes a note that nobody has written; `false` when somebody has. Its bytes are the writer's
    /// own, so that one whose answer was lost finds its own note. Where a store cannot write only
    /// what is not there, two may both believe that they were first.
    ///
    /// # Errors
    /// As [`Notes::list`].
    pub fn put_new(&self, name: &str, bytes: Vec<u8>) -> Result<bool, Trouble> {
        let (inner, bytes) = (&self.remote.inner, Bytes::from(bytes));
        let name = layout::note(&self.run, name);
        let work = async {
            inner.ready(true).await?;
            let fail = |fault| inner.trouble(fault);
            let there = inner.read(&name, LARGEST).await.map_err(fail)?;
            if there.is_none() {
                let conditional = inner.conditional().await.map_err(fail)?;
                let put = if conditional { Put::New } else { Put::Over };
                match inner.twice(|| inner.transport.put(&name, bytes.clone(), put)).await {
                    Ok(()) | Err(Fault::Exists) => {}
                    Err(fault) => return Err(inner.trouble(fault)),
                }
            }
            let there = inner.read(&name, LARGEST).await.map_err(fail)?;
            Ok(there.as_ref() == Some(&bytes))
        };
        self.remote.work(Way::Write, Length::Short, work)
    }

    /// Removes notes; those that are not there are no error.
    ///
    /// # Errors
    /// As [`Notes::list`].
    pub fn remove(&self, names: &[String]) -> Result<(), Trouble> {
        let names: Vec<String> = names.iter().map(|name| layout::note(&self.run, name)).collect();
        self.remote.work(Way::Write, Length::Short, self.remote.inner.remove(&names))
    }
}

impl Inner {
    pub async fn remove(&self, names: &[String]) -> Result<(), Trouble> {
        let one = async |name: &String| {
            let deleted = self.transport.delete(name).await;
            deleted.map_err(|fault| self.trouble(fault))
        };
        let all = stream::iter(names.iter().map(one)).buffer_unordered(REQUESTS);
        all.try_collect::<Vec<()>>().await.map(drop)
    }

    pub async fn list(&self, dir: &str) -> Result<Vec<String>, Trouble> {
        self.twice(|| self.transport.list(dir)).await.map_err(|fault| self.trouble(fault))
    }
}
