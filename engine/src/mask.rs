//! Takes secrets out of a stream of bytes that comes in pieces. Knows no processes.
//!
//! A piece may end in the middle of a secret: then that much is held back until it is known.

/// What stands in a log where a secret stood.
const STARS: &[u8] = b"***";

/// The filter of one stream.
pub(crate) struct Masks {
    masks: Vec<Vec<u8>>,
    held: Vec<u8>,
    /// So many bytes at the beginning of `held` belong to a secret that was written as stars.
    covered: usize,
}

impl Masks {
    /// Hides these values, without white space around them too, as JSON writes them, and the longer
    /// lines of those that have several (a private key, printed line by line).
    pub fn new<'a>(values: impl IntoIterator<Item = &'a str>) -> Masks {
        let mut masks: Vec<Vec<u8>> = Vec::new();
        for value in values {
            let lines = value.lines().filter(|line| line.len() >= 8);
            for text in [value, value.trim()].into_iter().chain(lines) {
                let quoted = serde_json::to_string(text).unwrap_or_default();
                let inner = quoted.trim_start_matches('"').trim_end_matches('"');
                // Some writers escape slashes, too.
                let forms = [text.to_string(), inner.to_string(), inner.replace('/', "\\/")];
                masks.extend(forms.into_iter().map(String::into_bytes));
            }
        }
        masks.retain(|mask| !mask.is_empty());
        masks.sort();
        masks.dedup();
        Masks { masks, held: Vec::new(), covered: 0 }
    }

    /// Takes the next piece; gives what can be told of it.
    pub fn take(&mut self, piece: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(piece);
        let begun = |at: &usize| {
            let rest = &self.held[*at..];
            self.masks.iter().any(|mask| mask.len() > rest.len() && mask.starts_with(rest))
        };
        let longest = self.masks.iter().map(Vec::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        let safe = (first..self.held.len()).find(begun).unwrap_or(self.held.len());
        self.emit(safe)
    }

    /// The rest, when nothing comes any more.
    pub fn end(&mut self) -> Vec<u8> {
        self.emit(self.held.len())
    }

    /// Everything before `safe`: no secret that is not whole yet begins there.
    fn emit(&mut self, safe: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(safe);
        let mut covered = self.covered;
        for at in 0..safe {
            let here = self.masks.iter().filter(|mask| self.held[at..].starts_with(mask));
            let end = here.map(|mask| at + mask.len()).max().unwrap_or(0);
            if at >= covered && end == 0 {
                out.push(self.held[at]);
            } else if at >= covered {
                out.extend_from_slice(STARS);
            }
            covered = covered.max(end);
        }
        self.covered = covered.saturating_sub(safe);
        self.held.drain(..safe);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text through the filter, in pieces of `size` bytes.
    fn through(masks: &[&str], text: &[u8], size: usize) -> String {
        let mut filter = Masks::new(masks.iter().copied());
        let mut out: Vec<u8> = text.chunks(size).flat_map(|piece| filter.take(piece)).collect();
        out.extend(filter.end());
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn a_secret_is_hidden_however_it_is_cut() {
        let secret = "s3cr\"et/with\\odd\tthings";
        let json = serde_json::to_string(secret).unwrap();
        let text = format!("a {secret} b {json} c {} s3cr", json.replace('/', "\\/"));
        for size in 1..text.len() {
            let told = through(&[secret], text.as_bytes(), size);
            assert_eq!(told, "a *** b \"***\" c \"***\" s3cr", "pieces of {size}");
        }
    }

    #[test]
    fn secrets_that_overlap_or_contain_each_other_leave_nothing() {
        for size in 1..8 {
            assert_eq!(through(&["abc", "abcdef"], b"abcdef abc abcd.", size), "*** *** ***d.");
            assert_eq!(through(&["xyz", "yzw"], b"-xyzw-", size), "-***-");
            assert_eq!(through(&["aa"], b"aaaaa-a", size), "***-a");
        }
    }

    #[test]
    fn lines_of_a_key_and_white_space_around_it() {
        let key = "-----BEGIN-----\nline of a key\nend\n";
        for size in [1, 5, 100] {
            assert_eq!(through(&[key], format!("x{key}y").as_bytes(), size), "x***y");
            assert_eq!(through(&[key], b"> line of a key <\nend", size), "> *** <\nend");
            assert_eq!(through(&["token\n"], b"a token.", size), "a ***.");
        }
    }

    #[test]
    fn what_is_no_text_passes_as_it_is_and_nothing_waits_for_nothing() {
        let mut filter = Masks::new(["secret"]);
        assert_eq!(filter.take(b"\xff\x00 progress 10 %\r"), b"\xff\x00 progress 10 %\r");
        assert_eq!(filter.take(b"sec"), b"");
        assert_eq!(filter.take(b"ond"), b"second");
        let mut none = Masks::new([""]);
        assert_eq!(none.take(b"all"), b"all");
    }
}
