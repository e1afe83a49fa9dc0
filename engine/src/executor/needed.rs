//! Bytes that `outputs:` of the pipeline needs of a step that is cached: they are fetched, or the
//! step runs again, only where what the user has is not what it would get.

use std::path::Path;

use cache::Output;

use super::Executor;
use crate::plan::Source;

impl Executor<'_> {
    /// Artifacts of a step's result that are to be delivered, are not there, and were not delivered before.
    pub(super) fn undelivered(&self, step: usize, made: &[Output]) -> Vec<Output> {
        let mut wanted = Vec::new();
        for output in &self.plan.outputs {
            let Source::Step { step: from, port, index } = &output.source else { continue };
            if *from != step {
                continue;
            }
            let listed =
                self.plan.steps[step].ports.iter().any(|(name, list, _)| name == port && *list);
            let ours =
                made.iter().filter(|o| o.port == *port && (index.is_none() || o.index == *index));
            for artifact in ours.filter(|artifact| !self.cache.present(artifact)) {
                let in_folder = listed && index.is_none() && many(made, port);
                let to = if in_folder { output.to.join(&artifact.name) } else { output.to.clone() };
                if !self.delivered(artifact, &to) {
                    wanted.push(artifact.clone());
                }
            }
        }
        wanted
    }

    fn delivered(&self, artifact: &Output, to: &Path) -> bool {
        let found = to.symlink_metadata().ok().and_then(|_| self.cache.digest_of(to).ok());
        found.is_some_and(|(digest, ..)| digest == artifact.digest)
    }
}

fn many(made: &[Output], port: &str) -> bool {
    made.iter().filter(|o| o.port == port).count() != 1
}
