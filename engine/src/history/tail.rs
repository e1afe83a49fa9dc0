//! A file of lines that grows: what came since the last look, whole lines only.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::event::Stamped;

/// Most that is taken at a look.
const MOST: u64 = 16 << 20;

/// A growing file, read from its beginning.
pub struct Tail {
    file: File,
    rest: Vec<u8>,
}

impl Tail {
    /// Opens it; what it holds is new.
    pub fn open(path: &Path) -> io::Result<Tail> {
        Ok(Tail { file: File::open(path)?, rest: Vec::new() })
    }

    /// Whole lines that are new, each with its end.
    pub fn lines(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = std::mem::take(&mut self.rest);
        loop {
            let new = self.file.by_ref().take(MOST).read_to_end(&mut bytes)?;
            let end = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            // A line may be longer than what is taken at once.
            if end > 0 || new == 0 {
                self.rest = bytes.split_off(end);
                return Ok(bytes);
            }
        }
    }

    /// What follows the last whole line.
    pub fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.rest)
    }

    /// New events; lines that are none are left out.
    pub fn events(&mut self) -> io::Result<Vec<Stamped>> {
        let bytes = self.lines()?;
        let lines = bytes.split(|b| *b == b'\n');
        Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_come_once_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut file = File::create(&path).unwrap();
        let mut tail = Tail::open(&path).unwrap();
        assert_eq!(tail.lines().unwrap(), b"");
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(tail.lines().unwrap(), b"one\n");
        file.write_all(b"o\n").unwrap();
        assert_eq!(tail.lines().unwrap(), b"two\n");
        file.write_all(b"end").unwrap();
        assert_eq!((tail.lines().unwrap(), tail.rest()), (vec![], b"end".to_vec()));
    }
}
