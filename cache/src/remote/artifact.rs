//! In which form a remote holds an artifact, and whether all of it is there. Moves no bytes.

use futures_util::{StreamExt, TryStreamExt, stream};

use crate::cache::Cache;
use crate::digest::Digest;
use crate::entry::{Entry, Output};
use crate::recipe::{Part, Recipe};
use crate::remote::inner::Inner;
use crate::remote::{Trouble, layout};
use crate::tree::{self, Kind};

/// A recipe may not be larger, in bytes.
const LARGEST_RECIPE: u64 = 64 << 20;
/// Small requests at once, for one caller.
pub(super) const REQUESTS: usize = 32;

/// How a remote holds an artifact.
#[derive(Debug, Clone)]
pub(super) enum Form {
    /// One object of these bytes.
    Blob(Part),
    Recipe(Box<Recipe>),
}

/// All artifacts of an entry: its outputs and, as one more, its log.
pub fn artifacts(entry: &Entry) -> Vec<Output> {
    let log = entry.log.iter().map(|(digest, bytes)| Output {
        port: "log".to_string(),
        index: None,
        name: "log".to_string(),
        kind: Kind::File,
        digest: *digest,
        bytes: *bytes,
    });
    entry.outputs.iter().cloned().chain(log).collect()
}

impl Form {
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = match self {
            Form::Blob(part) => vec![*part],
            Form::Recipe(recipe) => recipe.parts().copied().collect(),
        };
        parts.sort_by_key(|part| part.digest);
        parts.dedup();
        parts
    }
}

impl Inner {
    /// The form in which the remote holds `output`; none when it does not. Objects of a recipe are
    /// not looked at.
    pub async fn form(&self, output: &Output, recipe_first: bool) -> Result<Option<Form>, Trouble> {
        let blob = Part { digest: output.digest, bytes: output.bytes };
        if self.is_damaged(&output.digest) {
            return Ok(None);
        }
        if output.kind == Kind::Dir {
            return self.recipe_form(output).await;
        }
        if recipe_first && let Some(form) = self.recipe_form(output).await? {
            return Ok(Some(form));
        }
        if self.has(&blob).await? {
            return Ok(Some(Form::Blob(blob)));
        }
        if recipe_first { Ok(None) } else { self.recipe_form(output).await }
    }

    /// As [`Inner::form`], for moving bytes: a recipe is preferred, since some of its objects may
    /// be here; and what was found damaged before is tried again.
    pub async fn best_form(&self, output: &Output) -> Result<Option<Form>, Trouble> {
        if output.kind == Kind::Dir {
            return self.recipe_form(output).await;
        }
        let part = Part { digest: output.digest, bytes: output.bytes };
        let blob = layout::object(&part.digest);
        let (recipe, blob) = tokio::join!(self.recipe_form(output), self.head(&blob));
        if let Some(form) = recipe? {
            return Ok(Some(form));
        }
        // Of whatever size: that it is damaged is found, and told, when it comes.
        Ok(blob.map_err(|f| self.trouble(f))?.map(|_| Form::Blob(part)))
    }

    async fn recipe_form(&self, output: &Output) -> Result<Option<Form>, Trouble> {
        let name = layout::recipe(&output.digest);
        let read = self.read(&name, LARGEST_RECIPE).await.map_err(|f| self.trouble(f))?;
        let Some(bytes) = read else { return Ok(None) };
        let parsed = str::from_utf8(&bytes).map_err(|e| e.to_string());
        let recipe = parsed.and_then(|text| Recipe::parse(text, &output.digest));
        // A damaged one counts as none: a push puts it anew.
        let fits = |r: &Recipe| {
            (r.kind, r.bytes) == (output.kind, output.bytes)
                && tree::listing_digest(r).is_none_or(|found| found == r.digest)
        };
        Ok(recipe.ok().filter(fits).map(|recipe| Form::Recipe(Box::new(recipe))))
    }

    /// Whether an object of these bytes is there, by its size.
    pub async fn has(&self, part: &Part) -> Result<bool, Trouble> {
        if self.is_damaged(&part.digest) {
            return Ok(false);
        }
        if self.known(&part.digest) == Some(part.bytes) {
            return Ok(true);
        }
        let size = self.head(&layout::object(&part.digest)).await.map_err(|f| self.trouble(f))?;
        let there = size == Some(part.bytes);
        if there {
            self.remember(&part.digest, part.bytes);
        }
        Ok(there)
    }

    /// Those of `parts` that are neither there nor, when a cache is given, here.
    pub async fn lacking(
        &self,
        cache: Option<&Cache>,
        parts: Vec<Part>,
    ) -> Result<Vec<Part>, Trouble> {
        let here = |part: &Part| cache.is_some_and(|cache| has_object(cache, part));
        let ask = parts.into_iter().filter(|part| !here(part));
        let asked = ask.map(async |part| Ok::<_, Trouble>((part, self.has(&part).await?)));
        let asked = stream::iter(asked);
        let answers: Vec<(Part, bool)> = asked.buffer_unordered(REQUESTS).try_collect().await?;
        Ok(answers.into_iter().filter(|(_, there)| !there).map(|(part, _)| part).collect())
    }

    /// The first artifact of `entry` of which not all bytes are to be had, if any.
    pub async fn incomplete(
        &self,
        cache: Option<&Cache>,
        entry: &Entry,
        recipes: &[Digest],
    ) -> Result<Option<Digest>, Trouble> {
        let here = |o: &Output| cache.is_some_and(|cache| cache.present(o));
        let ask = artifacts(entry).into_iter().filter(|o| !here(o));
        let forms = stream::iter(ask.map(async |output| {
            let form = self.form(&output, recipes.contains(&output.digest)).await?;
            Ok::<_, Trouble>((output.digest, form))
        }));
        let mut forms = forms.buffer_unordered(REQUESTS);
        let mut parts = Vec::new();
        while let Some((digest, form)) = forms.try_next().await? {
            match form {
                None => return Ok(Some(digest)),
                Some(Form::Blob(_)) => {}
                Some(form) => parts.extend(form.parts()),
            }
        }
        drop(forms);
        parts.sort_by_key(|part| part.digest);
        parts.dedup();
        Ok(self.lacking(cache, parts).await?.first().map(|part| part.digest))
    }
}

/// Whether the cache has an object of these bytes, by its size.
pub(super) fn has_object(cache: &Cache, part: &Part) -> bool {
    tree::measure(&cache.object(&part.digest)) == Some((Kind::File, part.bytes))
}
