//! Artifacts, from a remote into the cache: what is missing here, object by object, and then put
//! together as their recipes say. Nothing gets its name before its digest was right.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures_util::{StreamExt, TryStreamExt, stream};

use crate::cache::Cache;
use crate::crash_point;
use crate::entry::Output;
use crate::error::Error;
use crate::parts;
use crate::recipe::{Part, Recipe};
use crate::remote::artifact::{Form, has_object};
use crate::remote::assemble::Building;
use crate::remote::blob::{Sink, Transfer};
use crate::remote::inner::{Length, Remote, Way, blocking, unless};
use crate::remote::patience::Patience;
use crate::remote::progress::Progress;
use crate::remote::transport::Fault;
use crate::remote::{Trouble, assemble, layout};
use crate::store;
use crate::tree::Kind;

/// Objects on their way at once.
const OBJECTS: usize = 16;

/// What a fetch moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Artifacts that were not in the cache and now are.
    pub artifacts: u64,
    /// Bytes that came over the network.
    pub bytes: u64,
}

impl Remote {
    /// Brings the bytes of `outputs` into the cache; those that are there already cost nothing.
    /// They are not durable yet; the next group commit makes them so, and after a loss of power they
    /// are hashed before use. A lease of the caller's own should hold them before, so that they stay
    /// also afterwards. A fetch that breaks off, also by a kill, is gone on with by the next.
    ///
    /// # Errors
    /// [`Trouble::Missing`] and [`Trouble::Damaged`]: the bytes have to be made again.
    /// [`Trouble::Unavailable`] when nothing came for as long as patience lasts. What came whole
    /// before an error stays.
    pub fn fetch(
        &self,
        cache: &Cache,
        outputs: &[Output],
        progress: &Progress,
        cancel: &AtomicBool,
    ) -> Result<Fetched, Trouble> {
        let mut wanted: Vec<&Output> = outputs.iter().filter(|o| !cache.present(o)).collect();
        wanted.sort_by_key(|output| (output.digest, output.kind));
        wanted.dedup_by_key(|output| (output.digest, output.kind));
        if wanted.is_empty() {
            return Ok(Fetched::default());
        }
        let transfer = Transfer {
            inner: self.inner.clone(),
            cache: cache.clone(),
            progress: progress.clone(),
            patience: Arc::new(Patience::new(self.inner.settings.timeouts.patience)),
        };
        let work = unless(cancel, transfer.fetch(&wanted));
        let fetched = self.work(Way::Read, Length::Transfer, work)?;
        for output in wanted {
            self.inner.set_damaged(&output.digest, false);
            cache.believe(output);
        }
        Ok(fetched)
    }
}

impl Transfer {
    async fn fetch(&self, wanted: &[&Output]) -> Result<Fetched, Trouble> {
        // Before anything is looked for or gets its name: a collection may be at work.
        let lease = self.cache.lease("a fetch from a remote")?;
        lease.hold(&wanted.iter().map(|output| output.digest).collect::<Vec<_>>())?;
        self.patiently(async || self.inner.ready(false).await).await?;
        wanted.iter().for_each(|output| self.progress.expect(output.bytes));
        // First the objects of all artifacts that go into the cache as they are, many at once.
        let forms = wanted.iter().map(async |o| Ok::<_, Trouble>((*o, self.locate(o).await?)));
        let forms: Vec<_> = stream::iter(forms).buffered(OBJECTS).try_collect().await?;
        let names = forms.iter().flat_map(|(_, form)| form.parts()).map(|part| part.digest);
        lease.hold(&names.collect::<Vec<_>>())?;
        let mut parts = HashMap::new();
        for (output, form) in &forms {
            if output.kind == Kind::File {
                let plain = form.parts();
                // Parts that a file has twice are not moved twice.
                let once: u64 = plain.iter().map(|part| part.bytes).sum();
                self.progress.moved(output.bytes - once.min(output.bytes));
                parts.extend(plain.into_iter().map(|part| (part.digest, part)));
            }
        }
        let mut bytes = self.bring_all(parts.into_values().collect()).await?;
        for (output, form) in forms {
            bytes += match (form, output.kind) {
                (Form::Blob(_), _) => 0,
                (Form::Recipe(recipe), Kind::File) => self.join(recipe).await?,
                (Form::Recipe(recipe), Kind::Dir) => self.build(&recipe).await?,
            };
        }
        Ok(Fetched { artifacts: wanted.len() as u64, bytes })
    }

    /// How the remote holds an artifact; tried for as long as patience lasts.
    async fn locate(&self, output: &Output) -> Result<Form, Trouble> {
        let form = self.patiently(|| self.inner.best_form(output)).await?;
        let remote = self.inner.name.clone();
        form.ok_or(Trouble::Missing { remote, digest: output.digest })
    }

    /// Objects into the cache; the bytes that came.
    async fn bring_all(&self, parts: Vec<Part>) -> Result<u64, Trouble> {
        let here = |part: &Part| has_object(&self.cache, part);
        let (there, missing): (Vec<_>, Vec<_>) = parts.into_iter().partition(here);
        there.iter().for_each(|part| self.progress.moved(part.bytes));
        let brought = stream::iter(missing.into_iter().map(async |part| {
            let bytes = self.bring(part, &Sink::Cache).await?;
            crash_point!("fetch.after-object");
            Ok::<_, Trouble>(bytes)
        }));
        brought.buffer_unordered(OBJECTS).try_fold(0, async |sum, bytes| Ok(sum + bytes)).await
    }

    /// Gives a file in parts its recipe, once its parts are seen to make it. Parts that were here
    /// before may be damaged: they are brought anew, once.
    async fn join(&self, recipe: Box<Recipe>) -> Result<u64, Trouble> {
        let mut moved = 0;
        for last in [false, true] {
            let (cache, tried) = (self.cache.clone(), recipe.clone());
            let checked = blocking(move || match parts::check(cache.layout(), &tried) {
                Ok(()) => parts::put_recipe(cache.layout(), &tried).map(|()| true),
                Err(Error::Damaged { .. } | Error::Missing { .. }) => Ok(false),
                Err(other) => Err(other),
            });
            if checked.await? {
                crash_point!("fetch.after-recipe");
                return Ok(moved);
            }
            if last || !self.discard_damaged(recipe.parts().copied().collect()).await? {
                break;
            }
            moved += self.bring_all(Form::Recipe(recipe.clone()).parts()).await?;
        }
        Err(self.wrong_recipe(&recipe))
    }

    /// Directories are built in `staging/`; the bytes that came.
    async fn build(&self, recipe: &Recipe) -> Result<u64, Trouble> {
        let mut moved = 0;
        for last in [false, true] {
            let building = Building::new(&self.cache, recipe)?;
            let files = building.wanted().into_iter();
            let files = stream::iter(files.map(|(part, to)| self.to_files(part, to)));
            let files = files.buffer_unordered(OBJECTS);
            moved += files.try_fold(0, async |sum, bytes| Ok(sum + bytes)).await?;
            crash_point!("fetch.before-directory");
            let (cache, recipe_again) = (self.cache.clone(), recipe.clone());
            if blocking(move || building.finish(&cache, &recipe_again)).await? {
                crash_point!("fetch.after-directory");
                return Ok(moved);
            }
            if last || !self.discard_damaged(recipe.parts().copied().collect()).await? {
                break;
            }
        }
        Err(self.wrong_recipe(recipe))
    }

    /// The bytes of `part` into new files: copied when the cache has them, and brought when not.
    async fn to_files(&self, part: Part, targets: Vec<PathBuf>) -> Result<u64, Trouble> {
        let [first, others @ ..] = &targets[..] else { return Ok(0) };
        let (mut moved, mut from) = (0, first.clone());
        let mut to = others.to_vec();
        if has_object(&self.cache, &part) {
            self.progress.moved(part.bytes);
            from = self.cache.object(&part.digest);
            to.push(first.clone());
        } else {
            moved = self.bring(part, &Sink::File(first.clone())).await?;
        }
        self.progress.moved(part.bytes * others.len() as u64);
        let copies = move || to.iter().try_for_each(|to| assemble::copy(&from, to));
        blocking(copies).await?;
        Ok(moved)
    }

    /// Does a small request for as long as patience lasts.
    pub async fn patiently<T>(
        &self,
        ask: impl AsyncFn() -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let mut tries = self.patience.tries();
        loop {
            match ask().await {
                Err(Trouble::Unavailable { why, .. }) => {
                    let again = tries.again(Fault::Down(why)).await;
                    again.map_err(|fault| self.inner.trouble(fault))?;
                }
                result => {
                    tries.moved();
                    return result;
                }
            }
        }
    }

    /// Whether any of these objects here was damaged; those are removed.
    async fn discard_damaged(&self, parts: Vec<Part>) -> Result<bool, Trouble> {
        let cache = self.cache.clone();
        let look = move || -> crate::Result<bool> {
            let mut any = false;
            for part in parts.iter().filter(|part| has_object(&cache, part)) {
                let object = cache.object(&part.digest);
                if store::check(&object, &part.digest, Kind::File).is_err() {
                    cache.layout().discard(&object)?;
                    any = true;
                }
            }
            Ok(any)
        };
        Ok(blocking(look).await?)
    }

    /// Good parts that do not make the whole.
    fn wrong_recipe(&self, recipe: &Recipe) -> Trouble {
        let digest = recipe.digest;
        self.inner.set_damaged(&digest, true);
        let what = format!("what `{}` says does not make it", layout::recipe(&digest));
        let damaged = Trouble::Damaged { remote: self.inner.name.clone(), digest, what };
        self.cache.report(damaged.to_string());
        damaged
    }
}
