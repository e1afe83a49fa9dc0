//! The digest of bytes that come in pieces and in any order. Blake3 is a tree, so that pieces of a
//! power of two of bytes are hashed each for itself and then joined. Knows no files.

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, left_subtree_len};
use blake3::hazmat::{merge_subtrees_non_root, merge_subtrees_root};

use crate::digest::Digest;

/// What a piece adds to the whole: its chaining value, or the digest when it is all there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node([u8; 32]);

/// A piece that comes bit by bit.
pub(super) struct Growing {
    hasher: Hasher,
    offset: u64,
    length: u64,
    total: u64,
}

impl Growing {
    /// One that begins at `offset`, of `total` bytes in all.
    pub fn new(offset: u64, total: u64) -> Growing {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(offset);
        Growing { hasher, offset, length: 0, total }
    }

    pub fn add(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn node(&self) -> Node {
        if self.offset == 0 && self.length == self.total {
            return Node(*self.hasher.finalize().as_bytes());
        }
        Node(self.hasher.finalize_non_root())
    }
}

impl Node {
    /// Of the bytes from `offset` on, of `total` in all.
    pub fn of(offset: u64, total: u64, bytes: &[u8]) -> Node {
        let mut growing = Growing::new(offset, total);
        growing.add(bytes);
        growing.node()
    }

    pub fn hex(&self) -> String {
        Digest::from_bytes(self.0).to_string()
    }
}

/// The digest of `total` bytes in pieces of `piece` bytes, the last one shorter.
pub(super) fn join(nodes: &[Node], piece: u64, total: u64) -> Digest {
    debug_assert!(piece.is_power_of_two() && piece >= 1024);
    debug_assert_eq!(nodes.len() as u64, total.div_ceil(piece).max(1));
    let [left, right] = match nodes {
        [one] => return Digest::from_bytes(one.0),
        _ => halves(nodes, piece, total),
    };
    Digest::from_bytes(*merge_subtrees_root(&left, &right, Mode::Hash).as_bytes())
}

fn halves(nodes: &[Node], piece: u64, total: u64) -> [[u8; 32]; 2] {
    let left = left_subtree_len(total);
    let (a, b) = nodes.split_at((left / piece) as usize);
    [value(a, piece, left), value(b, piece, total - left)]
}

fn value(nodes: &[Node], piece: u64, total: u64) -> [u8; 32] {
    if let [one] = nodes {
        return one.0;
    }
    let [left, right] = halves(nodes, piece, total);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_is_hashed_at_once() {
        let bytes: Vec<u8> = (0..70_000u32).map(|i| (i * 31 % 251) as u8).collect();
        for piece in [1024, 4096, 16_384] {
            let edges = [0, 1, 1023, 1024, 1025, 4095, 4096, 4097, 8192, 12_289, 16_384, 16_385];
            for total in edges.into_iter().chain([32_768, 49_153, 65_536, 70_000]) {
                let bytes = &bytes[..total];
                let mut nodes: Vec<Node> = bytes
                    .chunks(piece)
                    .enumerate()
                    .map(|(i, part)| {
                        let (a, b) = part.split_at(part.len() / 3);
                        let mut growing = Growing::new((i * piece) as u64, total as u64);
                        growing.add(a);
                        growing.add(b);
                        assert_eq!(growing.length(), part.len() as u64);
                        growing.node()
                    })
                    .collect();
                if total == 0 {
                    nodes.push(Node::of(0, 0, &[]));
                }
                let found = join(&nodes, piece as u64, total as u64);
                assert_eq!(found, Digest::of(bytes), "{total} in pieces of {piece}");
            }
        }
    }
}
