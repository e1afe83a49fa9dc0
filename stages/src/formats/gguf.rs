//! GGUF files (versions 2 and 3, little-endian), as in ggml's `docs/gguf.md`. Knows the container
//! and ggml's element types; knows no architecture.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use safetensors::Dtype;

use super::bytes::{Bytes, Cursor};
use super::metadata::{self, Metadata};
use super::{Checkpoint, Quant, Stored, TensorInfo, count, decode};

/// ggml's own bound.
const MAX_DIMS: u32 = 4;

/// An open GGUF file.
pub struct Gguf {
    bytes: Bytes,
    version: u32,
    metadata: Metadata,
    tensors: BTreeMap<String, Placed>,
}

struct Placed {
    info: TensorInfo,
    /// From the start of the file.
    range: Range<usize>,
}

/// A tensor as the header gives it: with an offset into the data that follow.
struct Described {
    name: String,
    info: TensorInfo,
    offset: u64,
    size: usize,
}

impl Gguf {
    /// Maps and checks the file at `path`: a damaged, truncated or lying header is an error, and
    /// so is a tensor of a type that cannot be read.
    pub fn open(path: &Path) -> Result<Gguf> {
        Gguf::from_bytes(Bytes::map(path)?).with_context(|| path.display().to_string())
    }

    /// The same from bytes.
    pub fn from_bytes(bytes: Bytes) -> Result<Gguf> {
        let mut cursor = Cursor::new(&bytes, 0);
        let version = version(&mut cursor)?;
        let (tensors, entries) = (cursor.u64()?, cursor.u64()?);
        let metadata = Metadata::read(&bytes, &mut cursor, entries)?;
        let described: Vec<Described> = (0..tensors)
            .map(|number| describe(&mut cursor).with_context(|| format!("tensor {number}")))
            .collect::<Result<_>>()?;
        let alignment = alignment(&metadata)?;
        let start = (cursor.at() as u64)
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| anyhow!("`general.alignment` is {alignment}"))?;
        let tensors = place(described, start, alignment, bytes.len())?;
        Ok(Gguf { bytes, version, metadata, tensors })
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The version of the container, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }
}

impl Checkpoint for Gguf {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|placed| &placed.info)
    }

    fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let Some(placed) = self.tensors.get(name) else { bail!("tensor `{name}` is missing") };
        decode(name, &placed.info, &self.bytes[placed.range.clone()], out)
    }

    fn plain(&self, name: &str) -> Option<(Dtype, &[u8])> {
        let placed = self.tensors.get(name)?;
        Some((placed.info.stored.plain()?, &self.bytes[placed.range.clone()]))
    }
}

fn version(cursor: &mut Cursor) -> Result<u32> {
    if cursor.take(4).ok() != Some(b"GGUF") {
        bail!("this is no GGUF file: it does not begin with `GGUF`");
    }
    match cursor.u32()? {
        version @ (2 | 3) => Ok(version),
        version if version.swap_bytes() <= 0xffff => {
            bail!("the GGUF file is big-endian; convert it to little-endian")
        }
        version => bail!("GGUF version {version} is not read, only 2 and 3"),
    }
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let found = if metadata.has(KEY) { metadata.u32(KEY)? } else { 32 };
    if !found.is_power_of_two() {
        bail!("metadata `{KEY}` is {found}, wanted a power of two");
    }
    Ok(found.into())
}

fn describe(cursor: &mut Cursor) -> Result<Described> {
    let name = metadata::name(cursor)?;
    let wrong = || format!("`{name}`");
    let dims = cursor.u32()?;
    if dims > MAX_DIMS {
        bail!("`{name}` has {dims} dimensions, ggml has at most {MAX_DIMS}");
    }
    let mut shape = Vec::new();
    for _ in 0..dims {
        shape.push(usize::try_from(cursor.u64()?).with_context(wrong)?);
    }
    let (kind, offset) = (cursor.u32()?, cursor.u64()?);
    let (stored, elements, bytes) = stored(kind).with_context(wrong)?;
    // The file's first dimension is the innermost one; blocks never cross its rows.
    let row = shape.first().copied().unwrap_or(1);
    shape.reverse();
    let blocks = count(&shape).filter(|_| row.is_multiple_of(elements)).map(|n| n / elements);
    let Some(size) = blocks.and_then(|blocks| blocks.checked_mul(bytes)) else {
        bail!("`{name}` cannot have shape {shape:?} as {}", stored.name());
    };
    Ok(Described { name, info: TensorInfo { shape, stored }, offset, size })
}

/// The type numbered `id` in ggml's `enum ggml_type`, with the elements and bytes of a block.
fn stored(id: u32) -> Result<(Stored, usize, usize)> {
    let quant = match id {
        0 => return Ok((Stored::F32, 1, 4)),
        1 => return Ok((Stored::F16, 1, 2)),
        24 => return Ok((Stored::Other("I8".into()), 1, 1)),
        25 => return Ok((Stored::Other("I16".into()), 1, 2)),
        26 => return Ok((Stored::Other("I32".into()), 1, 4)),
        27 => return Ok((Stored::Other("I64".into()), 1, 8)),
        28 => return Ok((Stored::F64, 1, 8)),
        30 => return Ok((Stored::BF16, 1, 2)),
        2 => Quant::Q4_0,
        3 => Quant::Q4_1,
        6 => Quant::Q5_0,
        7 => Quant::Q5_1,
        8 => Quant::Q8_0,
        10 => Quant::Q2_K,
        11 => Quant::Q3_K,
        12 => Quant::Q4_K,
        13 => Quant::Q5_K,
        14 => Quant::Q6_K,
        20 => Quant::IQ4_NL,
        23 => Quant::IQ4_XS,
        other => bail!(
            "it is stored as {}, which is not read; requantise the model, say to Q8_0 or F16",
            unread(other)
        ),
    };
    let (elements, bytes) = quant.block();
    Ok((Stored::Quantised(quant), elements, bytes))
}

/// What to call a type that is not read.
fn unread(id: u32) -> String {
    let known = match id {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return format!("ggml type {id}"),
    };
    known.to_string()
}

/// Finds every tensor's bytes in a file of `length`; data begin at `start`.
fn place(
    described: Vec<Described>,
    start: u64,
    alignment: u64,
    length: usize,
) -> Result<BTreeMap<String, Placed>> {
    let mut tensors = BTreeMap::new();
    for Described { name, info, offset, size } in described {
        if offset % alignment != 0 {
            bail!("tensor `{name}` begins at {offset}, which is no multiple of {alignment}");
        }
        let first = start.checked_add(offset).and_then(|first| usize::try_from(first).ok());
        let Some((first, last)) = first
            .and_then(|first| Some((first, first.checked_add(size)?)))
            .filter(|&(_, last)| last <= length)
        else {
            bail!(
                "tensor `{name}` ({size} bytes at {offset} of the data, which begin at {start}) lies \
                 beyond the end of the file ({length} bytes): the file is cut short"
            );
        };
        let (placed, key) = (Placed { info, range: first..last }, name.clone());
        if tensors.insert(key, placed).is_some() {
            bail!("tensor `{name}` is given twice");
        }
    }
    let mut order: Vec<(&String, &Range<usize>)> =
        tensors.iter().map(|(name, placed)| (name, &placed.range)).collect();
    order.retain(|(_, range)| !range.is_empty());
    order.sort_by_key(|(_, range)| range.start);
    for pair in order.windows(2) {
        if pair[0].1.end > pair[1].1.start {
            bail!("tensors `{}` and `{}` overlap", pair[0].0, pair[1].0);
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&text(key), &kind.to_le_bytes()[..], value].concat()
    }

    fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend((dims.len() as u32).to_le_bytes());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    /// A file of version 2 with `data` bytes that count.
    fn file(entries: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
        let mut bytes = [&b"GGUF"[..], &2u32.to_le_bytes()].concat();
        bytes.extend((tensors.len() as u64).to_le_bytes());
        bytes.extend((entries.len() as u64).to_le_bytes());
        bytes.extend(entries.concat());
        bytes.extend(tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend((0..data).map(|i| i as u8));
        bytes
    }

    fn error(bytes: Vec<u8>) -> String {
        format!("{:#}", Gguf::from_bytes(bytes.into()).err().expect("an error"))
    }

    #[test]
    fn dimensions_are_reversed() {
        let tensors = [tensor("a", &[2, 3], 1, 32), tensor("b", &[], 0, 0)];
        let found = Gguf::from_bytes(file(&[], &tensors, 44).into()).unwrap();
        assert_eq!((found.version(), found.names()), (2, vec!["a", "b"]));
        assert_eq!(found.info("a").unwrap().shape, [3, 2]);
        let (dtype, bytes) = found.plain("a").unwrap();
        assert_eq!((dtype, bytes), (Dtype::F16, &(32..44).collect::<Vec<u8>>()[..]));
        assert!(found.read_f32("c", &mut []).unwrap_err().to_string().contains("`c` is missing"));
    }

    #[test]
    fn tensors_that_lie_wrong_are_refused() {
        let a = || tensor("a", &[32], 0, 0);
        let cut = error(file(&[], &[a(), tensor("b", &[4], 0, 128)], 143));
        assert!(cut.starts_with("tensor `b` (16 bytes at 128 of the data"), "{cut}");
        assert!(cut.ends_with("the file is cut short"), "{cut}");
        let over = error(file(&[], &[tensor("b", &[4], 0, 96), a()], 200));
        assert_eq!(over, "tensors `a` and `b` overlap");
        assert_eq!(error(file(&[], &[a(), a()], 256)), "tensor `a` is given twice");
        let odd = error(file(&[], &[tensor("a", &[1], 0, 4)], 64));
        assert_eq!(odd, "tensor `a` begins at 4, which is no multiple of 32");
        let wide = entry("general.alignment", 4, &64u32.to_le_bytes());
        assert!(error(file(&[wide], &[tensor("a", &[1], 0, 32)], 99)).contains("multiple of 64"));
        let wrong = entry("general.alignment", 4, &24u32.to_le_bytes());
        assert!(error(file(&[wrong], &[], 0)).contains("is 24, wanted a power of two"));
        for dims in [vec![u64::MAX, 2], vec![1 << 62, 32], vec![33], vec![16, 2]] {
            let text = error(file(&[], &[tensor("a", &dims, 2, 0)], 64));
            assert!(text.contains("`a` cannot have shape"), "{dims:?}: {text}");
        }
        assert!(error(file(&[], &[tensor("a", &[1; 5], 0, 0)], 64)).contains("5 dimensions"));
        let end = tensor("a", &[1], 0, u64::MAX - 31);
        assert!(error(file(&[], &[end], 64)).contains("beyond the end"));
    }

    #[test]
    fn types_that_are_not_read_are_refused_by_name() {
        let found = error(file(&[], &[tensor("a", &[256], 17, 0)], 200));
        assert!(
            found.contains("tensor 0: `a`: it is stored as IQ2_XS, which is not read"),
            "{found}"
        );
        assert!(error(file(&[], &[tensor("a", &[256], 99, 0)], 200)).contains("ggml type 99"));
    }

    #[test]
    fn what_is_no_gguf_is_refused() {
        assert!(error(b"GGML".to_vec()).contains("no GGUF file"));
        assert!(error(Vec::new()).contains("no GGUF file"));
        assert!(error(b"GGUF\0\0\0\x03".to_vec()).contains("big-endian"));
        assert!(error(b"GGUF\x01\0\0\0".to_vec()).contains("version 1 is not read"));
        let whole = file(&[entry("k", 8, &text("v"))], &[tensor("a", &[1], 0, 0)], 4);
        for length in 0..whole.len() {
            assert!(Gguf::from_bytes(whole[..length].to_vec().into()).is_err(), "{length}");
        }
        assert!(Gguf::from_bytes(whole.into()).is_ok());
    }

    #[test]
    fn metadata_that_lie_are_refused() {
        let twice = || entry("k", 0, &[1]);
        assert_eq!(error(file(&[twice(), twice()], &[], 0)), "metadata `k` is given twice");
        assert!(error(file(&[entry("k", 13, &[])], &[], 0)).contains("type 13"));
        assert!(error(file(&[entry("k", 7, &[2])], &[], 0)).contains("truth value"));
        // Arrays: of more texts or numbers than there are bytes, and of arrays without end.
        for kind in [8u32, 10, 9, 7] {
            let array = [&kind.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
            error(file(&[entry("k", 9, &array)], &[], 0));
        }
        let nest = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(100);
        assert!(error(file(&[entry("k", 9, &nest)], &[], 0)).contains("deeper than 4"));
        let long = [&u64::MAX.to_le_bytes()[..], b"k"].concat();
        assert!(error(file(&[long], &[], 0)).contains("a name of"));
        let bytes = [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
        let found = Gguf::from_bytes(file(&[entry("k", 8, &bytes)], &[], 0).into()).unwrap();
        assert!(format!("{:#}", found.metadata().str("k").unwrap_err()).contains("utf-8"));
    }
}
