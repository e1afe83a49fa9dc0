//! The index of a zip archive of uncompressed entries, with the 64-bit extension: what torch
//! writes. Sizes come from the central directory. Layout: PKWARE's APPNOTE, sections 4.3 and 4.5.3.
//! Knows nothing of what the entries hold, and decompresses nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context as _, Result, anyhow, bail};

use super::bytes::Cursor;

const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const CENTRAL: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";

/// Bytes of the end record without its comment.
const END_SIZE: usize = 22;

/// Where the central directory lies.
struct Directory {
    entries: u64,
    size: u64,
    offset: u64,
}

/// Every entry's bytes within the archive, by name.
pub fn entries(bytes: &[u8]) -> Result<BTreeMap<String, Range<usize>>> {
    let directory = directory(bytes)?;
    let mut cursor = Cursor::new(bytes, usize::try_from(directory.offset)?);
    let central = cursor.take(directory.size).context("the zip archive's directory")?;
    let mut cursor = Cursor::new(central, 0);
    let data = &bytes[..directory.offset as usize];
    let mut found = BTreeMap::new();
    for number in 0..directory.entries {
        let (name, range) =
            entry(data, &mut cursor).with_context(|| format!("entry {number} of the archive"))?;
        if found.contains_key(&name) {
            bail!("the archive has two entries `{name}`");
        }
        found.insert(name, range);
    }
    if cursor.at() != central.len() {
        bail!("the archive's directory has {} bytes, its entries {}", central.len(), cursor.at());
    }
    let mut order: Vec<(&String, &Range<usize>)> =
        found.iter().filter(|(_, range)| !range.is_empty()).collect();
    order.sort_by_key(|(_, range)| range.start);
    if let Some(pair) = order.windows(2).find(|pair| pair[0].1.end > pair[1].1.start) {
        bail!("the archive's entries `{}` and `{}` overlap", pair[0].0, pair[1].0);
    }
    Ok(found)
}

fn directory(bytes: &[u8]) -> Result<Directory> {
    // The end record is followed by a comment of at most 65535 bytes that says its length.
    let last = bytes.len().checked_sub(END_SIZE);
    let first = bytes.len().saturating_sub(END_SIZE + usize::from(u16::MAX));
    let is_end = |&at: &usize| {
        let comment = u16::from_le_bytes([bytes[at + 20], bytes[at + 21]]);
        bytes[at..].starts_with(END) && at + END_SIZE + usize::from(comment) == bytes.len()
    };
    let end = last.and_then(|last| (first..=last).rev().find(is_end));
    let Some(end) = end else {
        bail!("this is no zip archive, or it is cut short: it has no end record")
    };
    if let Some(locator) = end.checked_sub(20).filter(|&at| bytes[at..].starts_with(LOCATOR_64)) {
        return directory_64(bytes, locator).context("the zip archive's 64-bit end record");
    }
    let mut cursor = Cursor::new(bytes, end + 4);
    let (disk, other) = (cursor.u16()?, cursor.u16()?);
    let (here, entries) = (cursor.u16()?, cursor.u16()?);
    let (size, offset) = (cursor.u32()?, cursor.u32()?);
    if (disk, other) != (0, 0) || here != entries {
        bail!("zip archives in several parts are not read");
    }
    Ok(Directory { entries: entries.into(), size: size.into(), offset: offset.into() })
}

fn directory_64(bytes: &[u8], locator: usize) -> Result<Directory> {
    let mut cursor = Cursor::new(bytes, locator + 4);
    let (disk, at, disks) = (cursor.u32()?, cursor.u64()?, cursor.u32()?);
    let mut cursor = Cursor::new(bytes, usize::try_from(at)?);
    if cursor.take(4)? != END_64 || disk != 0 || disks > 1 {
        bail!("it is not where it should be");
    }
    cursor.take(8 + 2 + 2)?;
    let (disk, other) = (cursor.u32()?, cursor.u32()?);
    let (here, entries) = (cursor.u64()?, cursor.u64()?);
    if (disk, other) != (0, 0) || here != entries {
        bail!("zip archives in several parts are not read");
    }
    Ok(Directory { entries, size: cursor.u64()?, offset: cursor.u64()? })
}

/// Reads one entry of the directory at the cursor; `data` is the archive before the directory.
fn entry(data: &[u8], cursor: &mut Cursor) -> Result<(String, Range<usize>)> {
    if cursor.take(4)? != CENTRAL {
        bail!("the directory is damaged");
    }
    cursor.take(4)?;
    let (flags, method) = (cursor.u16()?, cursor.u16()?);
    cursor.take(8)?;
    let (packed, size) = (cursor.u32()?, cursor.u32()?);
    let (name, extra, comment) = (cursor.u16()?, cursor.u16()?, cursor.u16()?);
    cursor.take(2 + 2 + 4)?;
    let offset = cursor.u32()?;
    let name = std::str::from_utf8(cursor.take(name.into())?).context("its name")?.to_string();
    let extra = cursor.take(extra.into())?;
    cursor.take(comment.into())?;
    let [size, packed, offset] =
        widen([size, packed, offset], extra).with_context(|| format!("`{name}`"))?;
    if method != 0 || flags & 1 != 0 || packed != size {
        bail!("`{name}` is compressed or encrypted; torch stores entries as they are");
    }
    let range = local(data, &name, offset, size).with_context(|| format!("`{name}`"))?;
    Ok((name, range))
}

/// Replaces every number that says "see the 64-bit field" by the next one there.
fn widen(numbers: [u32; 3], extra: &[u8]) -> Result<[u64; 3]> {
    let mut wide: &[u8] = &[];
    let mut cursor = Cursor::new(extra, 0);
    while cursor.at() + 4 <= extra.len() {
        let (id, size) = (cursor.u16()?, cursor.u16()?);
        let field = cursor.take(size.into())?;
        if id == 1 {
            wide = field;
        }
    }
    let mut wide = Cursor::new(wide, 0);
    let mut found = numbers.map(u64::from);
    for number in found.iter_mut().filter(|number| **number == u64::from(u32::MAX)) {
        *number = wide.u64().context("its 64-bit sizes")?;
    }
    Ok(found)
}

/// Where the bytes of an entry lie whose local header is at `offset`.
fn local(data: &[u8], name: &str, offset: u64, size: u64) -> Result<Range<usize>> {
    let mut cursor = Cursor::new(data, usize::try_from(offset)?);
    if cursor.take(4)? != LOCAL {
        bail!("there is no entry at byte {offset}");
    }
    cursor.take(22)?;
    let (length, extra) = (cursor.u16()?, cursor.u16()?);
    if cursor.take(length.into())? != name.as_bytes() {
        bail!("the entry at byte {offset} has another name");
    }
    cursor.take(extra.into())?;
    let start = cursor.at();
    cursor.take(size).map_err(|_| anyhow!("its {size} bytes lie beyond the end"))?;
    Ok(start..cursor.at())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of one stored entry, as Python's zipfile writes it.
    fn archive(method: u16, comment: &[u8]) -> Vec<u8> {
        let head = |signature: &[u8], central: bool| {
            let mut bytes = signature.to_vec();
            bytes.extend_from_slice(if central { &[20, 0, 20, 0] } else { &[20, 0] });
            bytes.extend([0, 0]);
            bytes.extend(method.to_le_bytes());
            bytes.extend([0; 8]);
            bytes.extend([3, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
            bytes
        };
        let mut bytes = head(LOCAL, false);
        bytes.extend(b"aXYZ");
        let at = bytes.len() as u32;
        bytes.extend(head(CENTRAL, true));
        bytes.extend([0; 14]);
        bytes.extend(b"a");
        let size = bytes.len() as u32 - at;
        bytes.extend(END);
        bytes.extend([0, 0, 0, 0, 1, 0, 1, 0]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(at.to_le_bytes());
        bytes.extend((comment.len() as u16).to_le_bytes());
        bytes.extend(comment);
        bytes
    }

    #[test]
    fn a_stored_entry_is_found() {
        for comment in [&b""[..], b"PK\x05\x06 a comment that looks like an end record"] {
            let bytes = archive(0, comment);
            let found = entries(&bytes).unwrap();
            assert_eq!(&bytes[found["a"].clone()], b"XYZ");
        }
    }

    #[test]
    fn compressed_and_cut_archives_are_refused() {
        let text = format!("{:#}", entries(&archive(8, b"")).unwrap_err());
        assert!(text.contains("`a` is compressed"), "{text}");
        let whole = archive(0, b"");
        for length in 0..whole.len() {
            assert!(entries(&whole[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn numbers_beyond_32_bits_are_in_an_extra_field() {
        let most = u32::MAX;
        let mut extra = vec![9, 9, 1, 0, 7, 1, 0, 16, 0];
        extra.extend((1u64 << 40).to_le_bytes());
        extra.extend((1u64 << 33).to_le_bytes());
        assert_eq!(widen([most, 5, most], &extra).unwrap(), [1 << 40, 5, 1 << 33]);
        assert_eq!(widen([4, 5, 6], &[]).unwrap(), [4, 5, 6]);
        assert!(widen([most; 3], &extra).is_err() && widen([most, 0, 0], &[]).is_err());
        assert!(widen([0; 3], &[1, 0, 99, 0]).is_err());
    }
}
