//! Numbers and texts as bytes, for files that only this build reads. Knows no meaning.

/// Reads from the front; `None` at the end of the bytes.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn word(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub fn text(&mut self) -> Option<&'a str> {
        let len = self.word()? as usize;
        std::str::from_utf8(self.take(len)?).ok()
    }
}

pub(crate) fn put(to: &mut Vec<u8>, word: u32) {
    to.extend_from_slice(&word.to_le_bytes());
}

pub(crate) fn put_text(to: &mut Vec<u8>, text: &str) {
    put(to, text.len() as u32);
    to.extend_from_slice(text.as_bytes());
}
