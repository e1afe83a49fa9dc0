//! `${…}` in text: cutting a template into pieces, and filling a command's in the worker.
//!
//! `$${` is a literal `${`. Knows names only as text; what they mean is the caller's. The spec fills
//! what is known when a plan is made and leaves `in`, `out`, `checkpoint` and `scratch` of a command
//! in place, because paths are in no key.

/// A piece of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Text as it is, `$${` undone.
    Text(String),
    /// `${name}`.
    Hole {
        /// What stands between the braces, trimmed.
        name: &'a str,
        /// Byte at which `${` starts.
        at: usize,
        /// Bytes from `${` to `}`.
        len: usize,
    },
}

/// A `${` at this byte has no `}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclosed(pub usize);

/// Cuts `text` into pieces; neighbouring texts are one.
pub fn pieces(text: &str) -> Result<Vec<Piece<'_>>, Unclosed> {
    let mut pieces = Vec::new();
    let mut plain = String::new();
    let mut at = 0;
    while let Some(found) = text[at..].find('$') {
        plain.push_str(&text[at..at + found]);
        at += found;
        let rest = &text[at..];
        if rest.starts_with("$${") {
            plain.push_str("${");
            at += 3;
        } else if rest.starts_with("${") {
            let len = rest.find('}').ok_or(Unclosed(at))? + 1;
            if !plain.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut plain)));
            }
            pieces.push(Piece::Hole { name: rest[2..len - 1].trim(), at, len });
            at += len;
        } else {
            plain.push('$');
            at += 1;
        }
    }
    plain.push_str(&text[at..]);
    if !plain.is_empty() || pieces.is_empty() {
        pieces.push(Piece::Text(plain));
    }
    Ok(pieces)
}

/// Writes literal text so that [`pieces`] gives it back.
pub fn escape(text: &str) -> String {
    text.replace("${", "$${")
}

/// The text as one word of a POSIX shell.
pub fn shell_quote(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
    match !text.is_empty() && text.chars().all(safe) {
        true => text.to_string(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// Whether argument `index` of a command is a program text, into which values go shell-quoted: the
/// one after `-c`, or after `-ec`, `-lc` and the like of a shell.
pub fn is_script<S: AsRef<str>>(arguments: &[S], index: usize) -> bool {
    let Some(before) = index.checked_sub(1).and_then(|i| arguments.get(i)) else { return false };
    let program = arguments[0].as_ref().rsplit('/').next().unwrap_or_default();
    let shell = matches!(program, "sh" | "bash" | "dash" | "zsh" | "ksh" | "ash");
    match before.as_ref() {
        "-c" => true,
        flags if shell && index >= 2 => flags
            .strip_prefix('-')
            .and_then(|f| f.strip_suffix('c'))
            .is_some_and(|f| f.chars().all(|c| c.is_ascii_alphabetic())),
        _ => false,
    }
}

/// Fills what a plan left open in one text. A list is joined by spaces; with `quote`, each of its
/// items is quoted for a shell first.
pub fn fill(
    text: &str,
    quote: bool,
    lookup: &dyn Fn(&str) -> Result<Vec<String>, String>,
) -> Result<String, String> {
    let mut filled = String::new();
    for piece in pieces(text).map_err(|_| format!("`${{` without `}}` in `{text}`"))? {
        match piece {
            Piece::Text(text) => filled.push_str(&text),
            Piece::Hole { name, .. } => {
                let quoted = |v: String| if quote { shell_quote(&v) } else { v };
                let values: Vec<String> = lookup(name)?.into_iter().map(quoted).collect();
                filled.push_str(&values.join(" "));
            }
        }
    }
    Ok(filled)
}

/// Fills what a plan left open in a command's arguments. An argument that is only one `${…}`
/// becomes as many arguments as it has values; after `-c`, values are quoted for the shell.
pub fn fill_run(
    run: &[String],
    lookup: &dyn Fn(&str) -> Result<Vec<String>, String>,
) -> Result<Vec<String>, String> {
    let mut arguments = Vec::with_capacity(run.len());
    for (index, text) in run.iter().enumerate() {
        let quote = is_script(run, index);
        match pieces(text).as_deref() {
            Ok([Piece::Hole { name, .. }]) if !quote => arguments.extend(lookup(name)?),
            _ => arguments.push(fill(text, quote, lookup)?),
        }
    }
    Ok(arguments)
}
