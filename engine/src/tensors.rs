//! A safetensors artifact as a stage sees it: names, dtypes, shapes and mapped bytes.
//!
//! Stages read weights through this and never by path, so that a store may keep tensors apart.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

/// The tensors of one artifact, mapped.
pub struct Tensors {
    map: Mmap,
    items: Vec<Item>,
    metadata: Vec<(String, String)>,
}

struct Item {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// One tensor: a view into the mapped artifact.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: &'a [usize],
    /// Its bytes, little-endian.
    pub bytes: &'a [u8],
}

impl Tensors {
    /// Maps and validates the file at `path`; a truncated or lying header is an error.
    pub fn open(path: &Path) -> Result<Tensors> {
        let file =
            std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        // SAFETY: artifacts are immutable objects of the store, read-only on disk.
        let map = unsafe { Mmap::map(&file) }
            .with_context(|| format!("cannot map {}", path.display()))?;
        let wrong = || format!("{} is no valid safetensors file", path.display());
        let (_, header) = SafeTensors::read_metadata(&map).with_context(wrong)?;
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let parsed = SafeTensors::deserialize(&map).with_context(wrong)?;
        let base = map.as_ptr() as usize;
        let mut items: Vec<Item> = parsed
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let start = view.data().as_ptr() as usize - base;
                let range = start..start + view.data().len();
                Item { name, dtype: view.dtype(), shape: view.shape().to_vec(), range }
            })
            .collect();
        items.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Tensors { map, items, metadata })
    }

    /// Names in sorted order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.items.iter().map(|item| item.name.as_str())
    }

    /// The value of `name` in the header's metadata.
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<View<'_>> {
        let at = self.items.binary_search_by(|item| item.name.as_str().cmp(name)).ok()?;
        let item = &self.items[at];
        Some(View { dtype: item.dtype, shape: &item.shape, bytes: &self.map[item.range.clone()] })
    }

    /// The f32 tensor called `name`, which must have `shape`, copied out.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let Some(view) = self.get(name) else { bail!("tensor `{name}` is missing") };
        if view.dtype != Dtype::F32 || view.shape != shape {
            bail!("tensor `{name}` is {:?} {:?}, expected F32 {shape:?}", view.dtype, view.shape);
        }
        let word = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(view.bytes.chunks_exact(4).map(word).collect())
    }
}
