//! A result, from the cache to a remote: objects, then recipes, then the entry, so that whoever
//! finds the entry finds the bytes. Several machines may do so at once: objects are what their
//! digest says, whoever puts them, and of entries the first stays.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Digest;
use crate::entry::{Entry, Output};
use crate::recipe::{Part, Recipe};
use crate::remote::artifact::{Form, artifacts, has_object};
use crate::remote::blob::Transfer;
use crate::remote::envelope::Envelope;
use crate::remote::find::There;
use crate::remote::inner::{Length, Remote, Way, blocking, unless};
use crate::remote::patience::Patience;
use crate::remote::progress::Progress;
use crate::remote::transport::{Fault, Put};
use crate::remote::upload::{Source, drop_old};
use crate::remote::{Trouble, layout};
use crate::tree::Kind;

/// Objects on their way at once.
const OBJECTS: usize = 16;

/// What a push did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Whether the entry was written; false when the remote had it.
    pub entry: bool,
    /// Whether the remote had, and keeps, a result of the key that is not this one.
    pub diverged: bool,
    /// Objects that the remote did not have.
    pub objects: u64,
    /// Bytes that went over the network, of objects.
    pub bytes: u64,
}

/// What has to be there before the entry.
#[derive(Default)]
pub(super) struct Load {
    pub sources: HashMap<Digest, Source>,
    pub recipes: Vec<Recipe>,
    /// Artifacts that have a recipe, those that are there included.
    pub split: Vec<Digest>,
}

impl Remote {
    /// Puts a result and its bytes into the remote, unless they are there.
    ///
    /// A push that breaks off, also by a kill, is gone on with by the next. Bytes that the remote
    /// has need not be in the cache.
    ///
    /// # Errors
    /// [`Trouble::Lost`]: bytes are neither here nor there. [`Trouble::Local`]: bytes here are
    /// damaged; they are not sent. [`Trouble::Unavailable`] when nothing went for as long as
    /// patience lasts; [`Trouble::Refused`].
    pub fn push(
        &self,
        cache: &Cache,
        entry: &Entry,
        progress: &Progress,
        cancel: &AtomicBool,
    ) -> Result<Sent, Trouble> {
        let transfer = Transfer {
            inner: self.inner.clone(),
            cache: cache.clone(),
            progress: progress.clone(),
            patience: Arc::new(Patience::new(self.inner.settings.timeouts.patience)),
        };
        let work = unless(cancel, transfer.push(entry));
        let sent = self.work(Way::Write, Length::Transfer, work)?;
        self.settle(cache, &entry.key);
        Ok(sent)
    }
}

impl Transfer {
    async fn push(&self, entry: &Entry) -> Result<Sent, Trouble> {
        self.patiently(async || self.inner.ready(true).await).await?;
        if !self.inner.tidied.swap(true, Ordering::Relaxed) {
            let _ = drop_old(self).await;
        }
        let mut sent = Sent::default();
        let mut signed = Vec::new();
        let there = self.patiently(async || self.inner.entry(&entry.key).await).await?;
        let replace = match &there {
            There::Nothing => false,
            There::Damaged(_) => true,
            There::Whole(old) => match self.keep(old, entry).await? {
                Some(diverged) => return Ok(Sent { diverged, ..sent }),
                None => {
                    if old.entry == *entry {
                        signed.clone_from(&old.signatures);
                    }
                    true
                }
            },
        };
        let lease = self.cache.lease("a push to a remote")?;
        lease.hold(&artifacts(entry).iter().map(|output| output.digest).collect::<Vec<_>>())?;
        let load = self.load(&artifacts(entry), &BTreeMap::new()).await?;
        sent.objects = load.sources.len() as u64;
        sent.bytes = self.send_load(&load).await?;
        crash_point!("push.before-entry");
        let mut envelope = Envelope::new(entry, load.split)?;
        envelope.signatures = signed;
        sent.entry = self.send_entry(entry, envelope, replace).await?;
        crash_point!("push.after-entry");
        Ok(sent)
    }

    /// Whether an entry that is there stays: it is believed and all of it is there. Says whether
    /// it is another result.
    async fn keep(&self, old: &Envelope, entry: &Entry) -> Result<Option<bool>, Trouble> {
        if old.acceptable(&self.inner.settings.trust).is_err() {
            return Ok(None);
        }
        // Signed by others only: one of ours may be asked for where theirs is not listed.
        let unsigned = self.inner.settings.sign_with.as_ref().is_some_and(|key| {
            let by_us = |s| key.public().made(s, &old.text);
            old.entry == *entry && !old.signatures.iter().any(by_us)
        });
        let complete = async || self.inner.incomplete(None, &old.entry, &old.recipes).await;
        let lacks = unsigned || self.patiently(complete).await?.is_some();
        Ok((!lacks).then(|| !old.entry.agrees(entry)))
    }

    /// Sends objects and then recipes; the bytes that went.
    pub async fn send_load(&self, load: &Load) -> Result<u64, Trouble> {
        let sizes = load.sources.values().map(|source| source.part.bytes);
        self.progress.expect(sizes.sum());
        let sending = stream::iter(load.sources.values().map(|source| self.send(source)));
        let sending = sending.buffer_unordered(OBJECTS);
        let bytes = sending.try_fold(0, async |sum, bytes| Ok(sum + bytes)).await?;
        crash_point!("push.before-recipes");
        let recipes = stream::iter(load.recipes.iter().map(|recipe| self.send_recipe(recipe)));
        recipes.buffer_unordered(OBJECTS).try_collect::<()>().await?;
        Ok(bytes)
    }

    /// What the remote lacks of the bytes of `outputs`, and where it is here: in the cache, or at
    /// one of `places`.
    pub async fn load(
        &self,
        outputs: &[Output],
        places: &BTreeMap<Digest, PathBuf>,
    ) -> Result<Load, Trouble> {
        let mut load = Load::default();
        for output in outputs {
            let form = async || {
                let form = self.inner.form(output, self.is_split(output)).await?;
                let Some(form) = form else { return Ok(None) };
                let lacking = self.inner.lacking(None, form.parts()).await?;
                Ok(lacking.is_empty().then_some(form))
            };
            match self.patiently(form).await? {
                Some(Form::Blob(_)) => {}
                Some(Form::Recipe(_)) => load.split.push(output.digest),
                None => match places.get(&output.digest) {
                    Some(place) => self.add_place(&mut load, output, place).await?,
                    None => self.add(&mut load, output).await?,
                },
            }
        }
        let parts: Vec<Part> = load.sources.values().map(|source| source.part).collect();
        let lacking = async || self.inner.lacking(None, parts.clone()).await;
        let lacking = self.patiently(lacking).await?;
        load.sources.retain(|digest, _| lacking.iter().any(|part| part.digest == *digest));
        Ok(load)
    }

    fn is_split(&self, output: &Output) -> bool {
        output.kind == Kind::File && self.cache.recipe(&output.digest).is_some()
    }

    /// Adds what an artifact here consists of.
    async fn add(&self, load: &mut Load, output: &Output) -> Result<(), Trouble> {
        let object = self.cache.object(&output.digest);
        let lost = Trouble::Lost { digest: output.digest };
        let whole = Part { digest: output.digest, bytes: output.bytes };
        if output.kind == Kind::File && has_object(&self.cache, &whole) {
            load.sources.insert(whole.digest, Source { part: whole, path: object });
            return Ok(());
        }
        if !self.cache.present(output) {
            return Err(lost);
        }
        let recipe = if output.kind == Kind::Dir {
            let dir = object.clone();
            let recipe = blocking(move || Recipe::of_dir(&dir)).await?;
            if recipe.digest != output.digest {
                let what = format!("their digest is `{}`", recipe.digest);
                return Err(self.damaged_here(object, what));
            }
            for item in &recipe.items {
                let path = object.join(&item.path);
                for part in &item.parts {
                    load.sources.insert(part.digest, Source { part: *part, path: path.clone() });
                }
            }
            recipe
        } else {
            let recipe = self.cache.recipe(&output.digest).ok_or(lost)?;
            // Each part is compared with its digest as it goes; that they make the whole, here.
            let (cache, output) = (self.cache.clone(), output.clone());
            blocking(move || cache.check(&output)).await?;
            for part in recipe.parts() {
                let path = self.cache.object(&part.digest);
                load.sources.insert(part.digest, Source { part: *part, path });
            }
            recipe
        };
        load.split.push(recipe.digest);
        load.recipes.push(recipe);
        Ok(())
    }

    async fn send_recipe(&self, recipe: &Recipe) -> Result<(), Trouble> {
        let text = Bytes::from(recipe.render());
        self.put_checked(&layout::recipe(&recipe.digest), text).await?;
        self.inner.set_damaged(&recipe.digest, false);
        Ok(())
    }

    /// Puts the entry; false when somebody else's was there first and stays.
    async fn send_entry(
        &self,
        entry: &Entry,
        mut envelope: Envelope,
        replace: bool,
    ) -> Result<bool, Trouble> {
        if let Some(key) = &self.inner.settings.sign_with {
            envelope.sign(key);
        }
        let name = layout::entry(&entry.key);
        let text = Bytes::from(envelope.render());
        if !replace {
            let put = async || match self.inner.transport.put(&name, text.clone(), Put::New).await {
                Ok(()) => Ok(false),
                Err(Fault::Exists) => Ok(true),
                Err(fault) => Err(self.inner.trouble(fault)),
            };
            let exists = self.patiently(put).await?;
            let there = self.patiently(async || self.inner.entry(&entry.key).await).await?;
            if let There::Whole(there) = there {
                let ours = there.text == envelope.text;
                if ours || exists && self.keep(&there, entry).await?.is_some() {
                    return Ok(ours);
                }
            }
        }
        self.put_checked(&name, text).await?;
        Ok(true)
    }

    pub fn damaged_here(&self, path: PathBuf, what: String) -> Trouble {
        let error = crate::Error::Damaged { path, what };
        self.cache.report(error.to_string());
        Trouble::Local(error)
    }
}
