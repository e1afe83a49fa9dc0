//! Buffers of pieces, used again and again: memory that is new costs the kernel more time than
//! filling it. Knows no objects.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

use crate::remote::inner::locked;

/// So many are kept.
const KEPT: usize = 8;
/// Smaller ones are not worth it.
const LEAST: usize = 1 << 20;

/// Buffers that nobody uses now.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// One that somebody uses; it goes back when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Buffers {
    /// An empty one with room for so many bytes.
    pub fn take(&self, room: usize) -> Buffer {
        let used = if room < LEAST { None } else { locked(&self.free).pop() };
        let mut bytes = used.unwrap_or_default();
        bytes.reserve_exact(room);
        Buffer { bytes, home: self.clone() }
    }

    /// Gives the memory back.
    pub fn clear(&self) {
        locked(&self.free).clear();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = locked(&self.home.free);
        if self.bytes.capacity() >= LEAST && free.len() < KEPT {
            self.bytes.clear();
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
