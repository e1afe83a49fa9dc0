//! Places of their own in a remote, for what goes again: checkpoints of steps that are not done. Each
//! is a remote below the remote, so bytes come and go by the same ways and can be removed without a
//! look at anything else.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::entry::Output;
use crate::remote::inner::{Length, Remote, Way};
use crate::remote::transport::{Body, Fault, Piece, Put, Transport, Upload};
use crate::remote::{Trouble, layout};

/// The objects of another transport whose names begin with `dir`.
#[derive(Debug)]
struct Below {
    above: Arc<dyn Transport>,
    dir: String,
}

impl Below {
    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }
}

#[async_trait]
impl Transport for Below {
    async fn head(&self, name: &str) -> Result<u64, Fault> {
        self.above.head(&self.name(name)).await
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Body, Fault> {
        self.above.get(&self.name(name), range).await
    }

    async fn put(&self, name: &str, bytes: Bytes, put: Put) -> Result<(), Fault> {
        self.above.put(&self.name(name), bytes, put).await
    }

    async fn delete(&self, name: &str) -> Result<(), Fault> {
        self.above.delete(&self.name(name)).await
    }

    async fn begin(&self, name: &str) -> Result<String, Fault> {
        self.above.begin(&self.name(name)).await
    }

    async fn part(&self, upload: Upload<'_>, part: Piece) -> Result<String, Fault> {
        let name = self.name(upload.name);
        self.above.part(Upload { name: &name, id: upload.id }, part).await
    }

    async fn complete(&self, upload: Upload<'_>, parts: Vec<String>) -> Result<(), Fault> {
        let name = self.name(upload.name);
        self.above.complete(Upload { name: &name, id: upload.id }, parts).await
    }

    async fn abort(&self, upload: Upload<'_>) -> Result<(), Fault> {
        let name = self.name(upload.name);
        self.above.abort(Upload { name: &name, id: upload.id }).await
    }

    async fn list(&self, dir: &str) -> Result<Vec<String>, Fault> {
        let names = self.above.list(&self.name(dir)).await?;
        let own =
            |name: String| name.strip_prefix(&self.dir)?.strip_prefix('/').map(str::to_string);
        Ok(names.into_iter().filter_map(own).collect())
    }
}

impl Remote {
    /// The place for checkpoints that is called `name`: plain words, with `/` between.
    ///
    /// # Errors
    /// When no threads can be started.
    pub fn checkpoints(&self, name: &str) -> Result<Remote, Trouble> {
        let dir = format!("{}/{name}", layout::CHECKPOINTS);
        let below = Below { above: self.inner.transport.clone(), dir };
        Remote::over(Arc::new(below), self.name(), self.inner.settings.clone())
    }

    /// Names of places for checkpoints in which there are some, up to the first `/`.
    ///
    /// # Errors
    /// [`Trouble::Unavailable`], [`Trouble::Refused`].
    pub fn checkpointed(&self) -> Result<Vec<String>, Trouble> {
        self.second_words(layout::CHECKPOINTS)
    }

    /// Removes all of the place for checkpoints that is called `name`.
    ///
    /// # Errors
    /// As [`Remote::checkpointed`].
    pub fn checkpoints_drop(&self, name: &str) -> Result<(), Trouble> {
        let inner = &self.inner;
        let dir = format!("{}/{name}", layout::CHECKPOINTS);
        let work = async { inner.remove(&inner.list(&dir).await?).await };
        self.work(Way::Write, Length::Short, work)
    }

    /// Of a place for checkpoints, removes the bytes of all but `outputs`.
    ///
    /// # Errors
    /// As [`Remote::checkpointed`].
    pub fn keep_only(&self, outputs: &[Output]) -> Result<(), Trouble> {
        let inner = &self.inner;
        let work = async {
            let mut kept = Vec::new();
            for output in outputs {
                kept.push(layout::recipe(&output.digest));
                let form = inner.form(output, true).await?;
                let parts = form.map(|form| form.parts()).unwrap_or_default();
                kept.extend(parts.iter().map(|part| layout::object(&part.digest)));
            }
            let mut gone = Vec::new();
            for dir in ["objects", "recipes"] {
                let all = inner.list(dir).await?;
                gone.extend(all.into_iter().filter(|name| !kept.contains(name)));
            }
            inner.forget_all();
            inner.remove(&gone).await
        };
        self.work(Way::Write, Length::Short, work)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::Path;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::cache::Cache;
    use crate::remote::{Progress, Settings};
    use crate::tree::{self, Kind};

    fn files(dir: &Path) -> usize {
        let items = fs::read_dir(dir).into_iter().flatten().flatten();
        let count = |path: &Path| if path.is_dir() { files(path) } else { 1 };
        items.map(|item| count(&item.path())).sum()
    }

    #[test]
    fn places_are_apart_and_go_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let cache = Cache::open(path("cache")).unwrap();
        let bucket = path("bucket");
        fs::create_dir(&bucket).unwrap();
        let settings = Settings::new(bucket.display().to_string());
        let remote = Remote::open(settings, &|_| None).unwrap();
        let never = AtomicBool::new(false);
        let place = remote.checkpoints("run/a.b").unwrap();
        let send = |name: &str, text: &str| {
            fs::create_dir_all(path(name).join("deep")).unwrap();
            fs::write(path(name).join("deep/w"), text).unwrap();
            fs::write(path(name).join("same"), "same").unwrap();
            let (digest, kind, bytes) = tree::hash_path(path(name)).unwrap();
            assert_eq!(kind, Kind::Dir);
            let (port, name) = ("checkpoint".to_string(), name.to_string());
            let output = Output { port, index: None, name, kind, digest, bytes };
            let places = BTreeMap::from([(digest, path(&output.name))]);
            place.send(&cache, std::slice::from_ref(&output), &places, &never).unwrap();
            output
        };
        let all = ["1", "2", "3"].map(|name| send(name, name));
        assert_eq!(files(&bucket.join("objects")), 0);
        assert_eq!(files(&bucket.join("checkpoints/run/a.b/objects")), 4);
        place.keep_only(&all[1..]).unwrap();
        assert_eq!(files(&bucket.join("checkpoints/run/a.b/objects")), 3);
        let other = Cache::open(path("other")).unwrap();
        let fetch = |remote: &Remote, output: &Output| {
            remote.fetch(&other, std::slice::from_ref(output), &Progress::new(), &never)
        };
        let again = remote.checkpoints("run/a.b").unwrap();
        fetch(&again, &all[2]).unwrap();
        assert_eq!(fs::read(other.object(&all[2].digest).join("deep/w")).unwrap(), b"3");
        assert!(matches!(fetch(&again, &all[0]), Err(Trouble::Missing { .. })));
        assert!(matches!(fetch(&remote, &all[1]), Err(Trouble::Missing { .. })));
        assert_eq!(remote.checkpointed().unwrap(), ["run"]);
        remote.checkpoints_drop("run/a.b").unwrap();
        assert_eq!(files(&bucket.join("checkpoints")), 0);
        assert!(remote.checkpointed().unwrap().is_empty());
    }
}
