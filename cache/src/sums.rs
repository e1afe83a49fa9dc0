//! A file with the digest of its rest in front, written a piece at a time: it may be great, and a run
//! has its plan in memory beside it. Knows no meaning.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// So many bytes wait to be written together.
const PIECE: usize = 1 << 18;

/// What is written.
pub(crate) struct Summed<'a> {
    file: &'a File,
    piece: Vec<u8>,
    hash: blake3::Hasher,
    /// Where the digest goes.
    at: u64,
    failed: Option<io::Error>,
}

impl<'a> Summed<'a> {
    /// Begins `file`, which is empty, with `front` and room for the digest.
    pub fn begin(mut file: &'a File, front: &[u8]) -> io::Result<Summed<'a>> {
        file.write_all(front)?;
        file.write_all(&[0; 32])?;
        let (piece, hash) = (Vec::with_capacity(PIECE + PIECE / 4), blake3::Hasher::new());
        Ok(Summed { file, piece, hash, at: front.len() as u64, failed: None })
    }

    /// Adds bytes. That they could not be written is told at the end.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE {
            self.flush();
        }
    }

    /// Adds a number.
    pub fn put(&mut self, word: u32) {
        self.extend_from_slice(&word.to_le_bytes());
    }

    fn flush(&mut self) {
        // Threads take longer to start than a small piece to hash.
        match self.piece.len() < PIECE {
            true => self.hash.update(&self.piece),
            false => self.hash.update_rayon(&self.piece),
        };
        if self.failed.is_none() {
            self.failed = self.file.write_all(&self.piece).err();
        }
        self.piece.clear();
    }

    /// Writes what is left, and the digest.
    pub fn end(mut self) -> io::Result<()> {
        self.flush();
        match self.failed {
            Some(error) => Err(error),
            None => self.file.write_all_at(self.hash.finalize().as_bytes(), self.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_in_front_is_that_of_the_rest_however_long_it_is() {
        for numbers in [0, 1, 1000, 200_000] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            let file = File::create_new(&path).unwrap();
            let mut summed = Summed::begin(&file, b"front").unwrap();
            let mut rest = Vec::new();
            for number in 0..numbers {
                summed.put(number);
                rest.extend_from_slice(&number.to_le_bytes());
            }
            summed.extend_from_slice(&rest);
            rest.extend_from_within(..);
            summed.end().unwrap();
            let written = std::fs::read(&path).unwrap();
            assert_eq!(&written[..5], b"front");
            assert_eq!(written[5..37], *blake3::hash(&rest).as_bytes(), "{numbers}");
            assert_eq!(written[37..], rest);
        }
    }
}
