//! Text that carries its own checksum: a first line `<kind> <version> <blake3>`, then the body.
//! Knows nothing of what the body says.

use crate::digest::Digest;

/// Puts the line in front of `body`.
pub(crate) fn seal(kind: &str, version: u32, body: &str) -> String {
    format!("{kind} {version} {}\n{body}", Digest::of(body.as_bytes()))
}

/// The body, if the line is of this kind and version and the checksum holds; else what is wrong.
pub(crate) fn open<'a>(kind: &str, version: u32, text: &'a str) -> Result<&'a str, String> {
    let (line, body) = text.split_once('\n').ok_or("its first line is cut off")?;
    let mut words = line.split(' ');
    let mut word = || words.next().unwrap_or_default();
    if word() != kind {
        return Err(format!("it does not start with `{kind}`"));
    }
    let found = word();
    if found != version.to_string() {
        return Err(format!("its version is `{found}`, this build knows `{version}`"));
    }
    if word() != Digest::of(body.as_bytes()).to_string() {
        return Err("its checksum does not match".to_string());
    }
    Ok(body)
}
