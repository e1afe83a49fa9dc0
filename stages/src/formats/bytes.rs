//! The bytes of a file, mapped or owned, and a cursor that never reads past their end. Knows no
//! format.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use memmap2::Mmap;

use super::fixed;

/// Bytes that several readers share.
#[derive(Clone)]
pub struct Bytes(Arc<dyn AsRef<[u8]> + Send + Sync>);

impl Bytes {
    /// Maps the regular file at `path` (or behind a link).
    pub fn map(path: &Path) -> Result<Bytes> {
        let file =
            std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        if !file.metadata().is_ok_and(|found| found.is_file()) {
            bail!("{} is no regular file", path.display());
        }
        // SAFETY: inputs of a stage are immutable objects of the store, read-only on disk.
        let map = unsafe { Mmap::map(&file) }
            .with_context(|| format!("cannot map {}", path.display()))?;
        Ok(Bytes(Arc::new(map)))
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Bytes(Arc::new(bytes))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// Reads little-endian numbers from the front of bytes.
#[derive(Clone, Default)]
pub struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Starts at byte `at`.
    pub fn new(bytes: &'a [u8], at: usize) -> Cursor<'a> {
        Cursor { bytes, at }
    }

    /// Where the next byte lies.
    pub fn at(&self) -> usize {
        self.at
    }

    /// The next `count` bytes; a count beyond the end is an error.
    pub fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(found) = usize::try_from(count).ok().and_then(|count| rest.get(..count)) else {
            bail!("{count} bytes are needed at byte {}, there are {}", self.at, rest.len());
        };
        self.at += found.len();
        Ok(found)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(fixed(self.take(N as u64)?))
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn i32(&mut self) -> Result<i32> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    pub fn f32(&mut self) -> Result<f32> {
        Ok(f32::from_le_bytes(self.array()?))
    }

    /// The bytes up to the next line break, which is skipped.
    pub fn line(&mut self) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(length) = rest.iter().position(|&b| b == b'\n') else {
            bail!("a line that begins at byte {} never ends", self.at);
        };
        self.at += length + 1;
        Ok(&rest[..length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_stops_at_the_end() {
        let bytes = [1, 2, 0, 0, 0, b'a', b'\n', 9];
        let mut cursor = Cursor::new(&bytes, 0);
        assert_eq!((cursor.u8().unwrap(), cursor.u32().unwrap()), (1, 2));
        assert_eq!((cursor.line().unwrap(), cursor.at()), (&b"a"[..], 7));
        assert!(cursor.clone().line().unwrap_err().to_string().contains("never ends"));
        let text = cursor.take(u64::MAX).unwrap_err().to_string();
        assert_eq!(text, format!("{} bytes are needed at byte 7, there are 1", u64::MAX));
        assert_eq!(cursor.take(1).unwrap(), [9]);
        assert!(cursor.u8().is_err() && Cursor::new(&bytes, 99).u8().is_err());
    }

    #[test]
    fn only_regular_files_are_mapped() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Bytes::map(dir.path()).is_err());
        let path = dir.path().join("x");
        std::fs::write(&path, b"").unwrap();
        assert_eq!(Bytes::map(&path).unwrap().len(), 0);
    }
}
