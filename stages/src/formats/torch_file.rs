//! Files of `torch.save`: a zip archive with a pickle and one entry per storage. Knows views into
//! storages; knows no module, and runs nothing that the pickle names.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use safetensors::Dtype;

use super::bytes::Bytes;
use super::pickle::{self, Element, View};
use super::{Checkpoint, Stored, TensorInfo, check_room, count, decode, zip};

/// An open file of `torch.save`: a state dict, or a dict with one as `state_dict` or `model`.
pub struct TorchFile {
    bytes: Bytes,
    tensors: BTreeMap<String, Placed>,
}

struct Placed {
    info: TensorInfo,
    /// Its elements if they are contiguous, else the storage from its first element on.
    range: Range<usize>,
    /// Elements between neighbours, per dimension.
    stride: Vec<usize>,
    contiguous: bool,
}

type Entries = BTreeMap<String, Range<usize>>;

impl TorchFile {
    /// Maps and checks the file at `path`; tensors that lie outside their storage are an error.
    pub fn open(path: &Path) -> Result<TorchFile> {
        TorchFile::from_bytes(Bytes::map(path)?).with_context(|| path.display().to_string())
    }

    /// The same from bytes.
    pub fn from_bytes(bytes: Bytes) -> Result<TorchFile> {
        if bytes.first() == Some(&0x80) {
            bail!(
                "this is a file of torch before 1.6 or a bare pickle; load it with torch and save \
                 it again, best as safetensors"
            );
        }
        let entries = zip::entries(&bytes)?;
        let root = root(&entries)?;
        if let Some(order) = entries.get(&format!("{root}/byteorder"))
            && &bytes[order.clone()] != b"little"
        {
            bail!("the archive's numbers are not little-endian; save it again on such a machine");
        }
        let views = pickle::tensors(&bytes[entries[&format!("{root}/data.pkl")].clone()])?;
        let mut tensors = BTreeMap::new();
        for (name, view) in views {
            let placed = place(view, root, &entries).with_context(|| format!("tensor `{name}`"))?;
            tensors.insert(name, placed);
        }
        Ok(TorchFile { bytes, tensors })
    }
}

impl Checkpoint for TorchFile {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|placed| &placed.info)
    }

    fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let Some(placed) = self.tensors.get(name) else { bail!("tensor `{name}` is missing") };
        let bytes = &self.bytes[placed.range.clone()];
        if placed.contiguous || placed.info.stored.width().is_none() {
            return decode(name, &placed.info, bytes, out);
        }
        check_room(name, &placed.info, out)?;
        gather(placed, bytes, out);
        Ok(())
    }

    fn plain(&self, name: &str) -> Option<(Dtype, &[u8])> {
        let placed = self.tensors.get(name).filter(|placed| placed.contiguous)?;
        Some((placed.info.stored.plain()?, &self.bytes[placed.range.clone()]))
    }
}

/// The folder of the archive that has the pickle.
fn root(entries: &Entries) -> Result<&str> {
    let mut roots = entries
        .keys()
        .filter_map(|name| name.strip_suffix("/data.pkl").filter(|root| !root.contains('/')));
    let (Some(root), None) = (roots.next(), roots.next()) else {
        bail!("the zip archive has no (single) `data.pkl`: `torch.save` did not write it");
    };
    if entries.contains_key(&format!("{root}/constants.pkl")) {
        bail!("this is a TorchScript archive; save the model's state dict instead");
    }
    Ok(root)
}

fn stored(element: Element) -> (Stored, usize) {
    let other = |name: &str, width| (Stored::Other(name.into()), width);
    match element {
        Element::Float => (Stored::F32, 4),
        Element::Half => (Stored::F16, 2),
        Element::BFloat16 => (Stored::BF16, 2),
        Element::Double => (Stored::F64, 8),
        Element::Long => other("I64", 8),
        Element::Int => other("I32", 4),
        Element::Short => other("I16", 2),
        Element::Char => other("I8", 1),
        Element::Byte => other("U8", 1),
        Element::Bool => other("BOOL", 1),
    }
}

/// Finds a view's bytes, all of which must lie in its storage.
fn place(view: View, root: &str, entries: &Entries) -> Result<Placed> {
    let (stored, width) = stored(view.element);
    let Some(storage) = entries.get(&format!("{root}/data/{}", view.storage)) else {
        bail!("the archive has no storage `{}`", view.storage);
    };
    if view.length.checked_mul(width).is_none_or(|bytes| bytes > storage.len()) {
        bail!(
            "storage `{}` has {} bytes, too few for {} elements of {}",
            view.storage,
            storage.len(),
            view.length,
            stored.name()
        );
    }
    let elements = count(&view.shape);
    let end = if elements == Some(0) { Some(view.offset) } else { end(&view) };
    // Views that repeat elements (`expand`) would be larger than the file.
    if elements.is_none_or(|n| n > view.length) || end.is_none_or(|end| end > view.length) {
        bail!(
            "sizes {:?}, strides {:?} at {} do not fit into storage `{}` of {} elements",
            view.shape,
            view.stride,
            view.offset,
            view.storage,
            view.length
        );
    }
    let contiguous = contiguous(&view);
    let last = if contiguous { view.offset + elements.unwrap_or(0) } else { view.length };
    let range = storage.start + view.offset * width..storage.start + last * width;
    Ok(Placed {
        info: TensorInfo { shape: view.shape, stored },
        range,
        stride: view.stride,
        contiguous,
    })
}

/// One beyond the last element of a view that has some.
fn end(view: &View) -> Option<usize> {
    view.shape
        .iter()
        .zip(&view.stride)
        .try_fold(view.offset.checked_add(1)?, |end, (size, stride)| {
            end.checked_add((size - 1).checked_mul(*stride)?)
        })
}

/// Whether elements lie one after the other, in row-major order.
fn contiguous(view: &View) -> bool {
    let mut next = 1usize;
    for (&size, &stride) in view.shape.iter().zip(&view.stride).rev() {
        if size != 1 && stride != next && !view.shape.contains(&0) {
            return false;
        }
        next = next.saturating_mul(size);
    }
    true
}

/// Copies a view out in row-major order.
fn gather(placed: &Placed, bytes: &[u8], out: &mut [f32]) {
    let (shape, stored) = (&placed.info.shape, &placed.info.stored);
    let (Some(&inner), Some(&step)) = (shape.last(), placed.stride.last()) else { return };
    let outer = shape.len() - 1;
    let (mut index, mut start) = (vec![0; outer], 0);
    for row in out.chunks_exact_mut(inner.max(1)) {
        for (i, to) in row.iter_mut().enumerate() {
            *to = stored.element(bytes, start + i * step);
        }
        // The next row: count up from the innermost of the outer dimensions.
        for dim in (0..outer).rev() {
            index[dim] += 1;
            start += placed.stride[dim];
            if index[dim] < shape[dim] {
                break;
            }
            start -= placed.stride[dim] * shape[dim];
            index[dim] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(length: usize, offset: usize, shape: &[usize], stride: &[usize]) -> View {
        let (shape, stride) = (shape.to_vec(), stride.to_vec());
        View { storage: "0".into(), element: Element::Double, length, offset, shape, stride }
    }

    fn placed(view: View) -> Result<Placed> {
        place(view, "r", &Entries::from([("r/data/0".to_string(), 0..48)]))
    }

    #[test]
    fn views_stay_in_their_storage() {
        assert!(placed(view(6, 0, &[2, 3], &[3, 1])).unwrap().contiguous);
        assert!(placed(view(6, 5, &[1, 1], &[99, 0])).unwrap().contiguous);
        assert!(!placed(view(6, 1, &[2, 2], &[1, 3])).unwrap().contiguous);
        assert!(placed(view(6, 6, &[0, 9], &[9, 1])).unwrap().contiguous);
        for wrong in [
            view(7, 0, &[7], &[1]),
            view(6, 1, &[2, 3], &[3, 1]),
            view(6, 7, &[0], &[1]),
            view(6, 0, &[1000], &[0]),
            view(6, 0, &[2], &[usize::MAX]),
            view(6, usize::MAX, &[1], &[1]),
            view(usize::MAX, 0, &[1], &[1]),
            view(6, 0, &[usize::MAX, 2], &[1, 1]),
        ] {
            assert!(placed(wrong.clone()).is_err(), "{wrong:?}");
        }
        assert!(place(view(1, 0, &[1], &[1]), "s", &Entries::new()).is_err());
    }

    #[test]
    fn a_view_of_three_dimensions_is_gathered() {
        let bytes: Vec<u8> = (0..24).flat_map(|i| f64::from(i).to_le_bytes()).collect();
        let entries = Entries::from([("r/data/0".to_string(), 0..bytes.len())]);
        let placed = place(view(24, 0, &[4, 2, 3], &[1, 12, 4]), "r", &entries).unwrap();
        let mut out = [0.0; 24];
        gather(&placed, &bytes, &mut out);
        let wanted = |i: usize| (i / 6 + i / 3 % 2 * 12 + i % 3 * 4) as f32;
        assert_eq!(out, std::array::from_fn(wanted));
    }

    #[test]
    fn old_files_get_a_hint() {
        let text = TorchFile::from_bytes(vec![0x80, 2, 0x8a, 10].into()).err().unwrap().to_string();
        assert!(text.contains("torch before 1.6"), "{text}");
        let text = TorchFile::from_bytes(vec![1; 100].into()).err().unwrap().to_string();
        assert!(text.contains("no zip archive"), "{text}");
    }
}
