//! The digest of bytes that come in pieces and in any order. Blake3 is a tree, so that pieces of a
//! power of two of bytes are hashed each for itself and then joined. Knows no files.

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, left_subtree_len};
use blake3::hazmat::{merge_subtrees_non_root, merge_subtrees_root};

use crate::digest::Digest;

/// What a piece adds to the whole: its chaining value, or the digest when it is all there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node([u8; 32]);

impl Node {
    /// Of the bytes from `offset` on, of `total` in all.
    pub fn of<'a>(offset: u64, total: u64, pieces: impl IntoIterator<Item = &'a [u8]>) -> Node {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(offset);
        let mut length = 0;
        for piece in pieces {
            hasher.update(piece);
            length += piece.len() as u64;
        }
        if offset == 0 && length == total {
            return Node(*hasher.finalize().as_bytes());
        }
        Node(hasher.finalize_non_root())
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
                        Node::of((i * piece) as u64, total as u64, [a, b])
                    })
                    .collect();
                if total == 0 {
                    nodes.push(Node::of(0, 0, []));
                }
                let found = join(&nodes, piece as u64, total as u64);
                assert_eq!(found, Digest::of(bytes), "{total} in pieces of {piece}");
            }
        }
    }
}
