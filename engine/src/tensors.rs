//! A safetensors artifact as a stage sees it: names, dtypes, shapes and mapped bytes.
//!
//! Stages read weights through this and never by path, so that a store may keep tensors apart.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use cache::Pieces;
use memmap2::Mmap;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};

/// The tensors of one artifact, mapped.
pub struct Tensors {
    maps: Vec<Mmap>,
    items: Vec<Item>,
    metadata: Vec<(String, String)>,
}

struct Item {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    map: usize,
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
    /// Maps and validates the file at `path`, which may be the recipe of one that a store keeps in
    /// parts; a truncated or lying header is an error.
    pub fn open(path: &Path) -> Result<Tensors> {
        let wrong = || format!("{} is no valid safetensors file", path.display());
        let Some(pieces) = Pieces::open(path)? else {
            let map = map(path)?;
            let (start, header) = SafeTensors::read_metadata(&map).with_context(wrong)?;
            let whole = start + 8..map.len();
            return Tensors::of(header, vec![map], &[whole]).with_context(wrong);
        };
        let mut maps = Vec::with_capacity(pieces.parts.len());
        for (part, bytes) in &pieces.parts {
            let map = map(part)?;
            if map.len() as u64 != *bytes {
                bail!("{} was cut off", part.display());
            }
            maps.push(map);
        }
        let (start, header) = first_header(&maps).with_context(wrong)?;
        let mut at = 0;
        let mut extents = Vec::with_capacity(maps.len());
        for map in &maps {
            extents.push(at..at + map.len());
            at += map.len();
        }
        // Offsets of tensors count from the end of the header.
        let shifted: Vec<_> = extents.iter().map(|e| e.start.max(start)..e.end).collect();
        Tensors::of(header, maps, &shifted).with_context(wrong)
    }

    /// `extents`: which bytes of the file each map holds, the header left out. A tensor lies within
    /// one of them.
    fn of(
        header: Metadata,
        maps: Vec<Mmap>,
        extents: &[std::ops::Range<usize>],
    ) -> Result<Tensors> {
        let start = extents.first().map_or(0, |first| first.start);
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let mut items = Vec::new();
        for (name, info) in header.tensors() {
            let (from, to) = (start + info.data_offsets.0, start + info.data_offsets.1);
            let map = extents.partition_point(|e| e.end <= from).min(extents.len() - 1);
            let extent = &extents[map];
            if to < from || from < extent.start || to > extent.end {
                bail!("tensor `{name}` lies outside of its part");
            }
            // Maps are of whole parts: the first one begins with the header.
            let origin = extent.end - maps[map].len();
            items.push(Item {
                name,
                dtype: info.dtype,
                shape: info.shape.clone(),
                map,
                range: from - origin..to - origin,
            });
        }
        items.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Tensors { maps, items, metadata })
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
        Some(View {
            dtype: item.dtype,
            shape: &item.shape,
            bytes: &self.maps[item.map][item.range.clone()],
        })
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

fn map(path: &Path) -> Result<Mmap> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    // SAFETY: artifacts are immutable objects of the store, read-only on disk.
    unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))
}

/// The header at the beginning of the first part, and its end.
fn first_header(maps: &[Mmap]) -> Result<(usize, Metadata)> {
    let first: &[u8] = maps.first().map_or(&[], |map| map);
    let word: [u8; 8] = first.get(..8).context("it is too short")?.try_into()?;
    let end = usize::try_from(u64::from_le_bytes(word))?.checked_add(8).context("no header")?;
    let header: Metadata = serde_json::from_slice(first.get(8..end).context("no header")?)?;
    let total: usize = maps.iter().map(|map| map.len()).sum();
    if end + header.data_len() != total {
        bail!("its parts have {total} bytes, its header wants {}", end + header.data_len());
    }
    Ok((end, header))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cache::{Cache, Key};

    /// A file with a big tensor, a small one, an empty one and a big one again.
    fn file(path: &Path) -> Vec<u8> {
        let bytes: Vec<u8> = (0..20_000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let view = |range: std::ops::Range<usize>| {
            let data = &bytes[range.start * 4..range.end * 4];
            safetensors::tensor::TensorView::new(Dtype::F32, vec![range.len()], data).unwrap()
        };
        let tensors = [
            ("a", view(0..6000)),
            ("b", view(6000..6003)),
            ("c", view(0..0)),
            ("d", view(6003..20_000)),
            ("e", view(1..2)),
        ];
        let note = [("kind".to_string(), "model".to_string())];
        let bytes = safetensors::serialize(tensors, Some(note.into())).unwrap();
        std::fs::write(path, &bytes).unwrap();
        bytes
    }

    #[test]
    fn a_file_in_parts_reads_as_the_file_and_is_put_together_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("cache")).unwrap();
        let attempt = cache.attempt(&Key::of(b"k")).unwrap();
        let path = attempt.dir.join("model.safetensors");
        let bytes = file(&path);
        let plain = dir.path().join("plain");
        std::fs::write(&plain, &bytes).unwrap();
        let output = attempt.absorb("model", None, "model.safetensors", &path).unwrap();
        assert_eq!((output.digest, output.bytes), (cache::Digest::of(&bytes), bytes.len() as u64));
        let recipe = cache.recipe(&output.digest).expect("it is kept in parts");
        assert_eq!(recipe.parts().count(), 5, "header, a, b, d, e");
        assert!(cache.present(&output));
        cache.check(&output).unwrap();
        cache.verify(&output).unwrap();

        let (parts, whole) =
            (Tensors::open(&cache.path(&output.digest)).unwrap(), Tensors::open(&plain).unwrap());
        assert_eq!(parts.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
        for name in whole.names() {
            let (a, b) = (parts.get(name).unwrap(), whole.get(name).unwrap());
            assert_eq!((a.dtype, a.shape, a.bytes), (b.dtype, b.shape, b.bytes), "{name}");
        }
        assert_eq!(parts.metadata("kind"), Some("model"));
        let out = dir.path().join("out");
        let made = cache.whole(&output, || out.clone()).unwrap();
        assert_eq!(std::fs::read(made).unwrap(), bytes);
    }
}
