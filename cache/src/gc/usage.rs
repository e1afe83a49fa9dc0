//! What takes how much, counted from facts alone.

use std::collections::HashSet;

use super::plan::{Facts, Name};

/// Items and bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum {
    pub items: usize,
    pub bytes: u64,
}

/// What a cache consists of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage {
    /// Files and directories kept whole.
    pub objects: Sum,
    /// Parts of files of tensors.
    pub parts: Sum,
    /// The lists of those parts.
    pub recipes: Sum,
    /// Every other directory, by name.
    pub dirs: Vec<(String, Sum)>,
    /// All of it.
    pub bytes: u64,
    /// What artifacts and logs of all results would take by themselves, as far as they are there.
    pub apparent: u64,
    /// What they take, each byte once.
    pub stored: u64,
    /// Of the objects, parts and recipes, those that no result names.
    pub unnamed: Sum,
}

impl Facts {
    /// Counts.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        let named: HashSet<usize> = self.products.iter().flat_map(|p| &p.blobs).copied().collect();
        for (i, blob) in self.blobs.iter().enumerate() {
            let sum = match blob.name {
                Name::Recipe(_) => &mut usage.recipes,
                Name::Object(_) if blob.part => &mut usage.parts,
                Name::Object(_) => &mut usage.objects,
            };
            sum.add(blob.bytes);
            match named.contains(&i) {
                true => usage.stored += blob.bytes,
                false => usage.unnamed.add(blob.bytes),
            }
        }
        usage.apparent = self.products.iter().map(|product| product.here).sum();
        let sum = |&(items, bytes): &(usize, u64)| Sum { items, bytes };
        usage.dirs = self.dirs.iter().map(|(name, dir)| (name.clone(), sum(dir))).collect();
        let kept = [usage.objects, usage.parts, usage.recipes];
        let dirs = usage.dirs.iter().map(|(_, sum)| *sum);
        usage.bytes = kept.into_iter().chain(dirs).map(|sum| sum.bytes).sum();
        usage
    }
}

impl Sum {
    fn add(&mut self, bytes: u64) {
        self.items += 1;
        self.bytes += bytes;
    }
}
