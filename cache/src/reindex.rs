//! Makes the index anew from the entries, keeping what only it knows: when each was last used.

use std::collections::{HashMap, HashSet};

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Key;
use crate::error::Result;
use crate::index::{Index, Row};

const BATCH: usize = 512;

/// What an index was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reindexed {
    /// Entries with a row now.
    pub entries: usize,
    /// Damaged ones, which have none; they are reported.
    pub damaged: usize,
}

impl Cache {
    /// Reads every entry and gives it a row. `None` where there can be no index, as on network file
    /// systems.
    ///
    /// # Errors
    /// When entries cannot be listed.
    pub fn reindex(&self) -> Result<Option<Reindexed>> {
        self.flush_index();
        let Some(index) = self.inner.index() else { return Ok(None) };
        let uses = index.uses().unwrap_or_default();
        let uses: HashMap<Key, i64> = uses.into_iter().map(|(key, used, _)| (key, used)).collect();
        let keys = self.keys()?;
        let mut made = HashSet::new();
        for part in keys.chunks(BATCH) {
            let rows = part.iter().filter_map(|key| self.row(key)).map(|row| {
                let at = row.created / 1_000_000_000;
                Row { last_used: uses.get(&row.key).copied().unwrap_or(0).max(at), ..row }
            });
            let rows: Vec<Row> = rows.collect();
            if index.put(&rows).is_none() {
                return Ok(None);
            }
            made.extend(rows.iter().map(|row| row.key));
            crash_point!("reindex.after-batch");
        }
        let stale: Vec<Key> = stale(index, &made);
        if !stale.is_empty() {
            index.delete(&stale);
        }
        Ok(Some(Reindexed { entries: made.len(), damaged: keys.len() - made.len() }))
    }
}

fn stale(index: &Index, made: &HashSet<Key>) -> Vec<Key> {
    index.keys().unwrap_or_default().into_iter().filter(|key| !made.contains(key)).collect()
}
