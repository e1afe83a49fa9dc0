//! The grammar of `step[selector].port[index]`, and of `step@value`. Text in, parts out.

/// A reference, cut into parts that lie in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference<'a> {
    /// The step's name in the file.
    pub step: &'a str,
    /// Between the brackets, or after `@`.
    pub select: Option<&'a str>,
    /// The output port; a selection of steps has none.
    pub port: Option<&'a str>,
    /// Between the brackets after the port.
    pub index: Option<&'a str>,
}

/// Cuts `text`; says what is wrong with its form otherwise.
pub fn parse(text: &str) -> Result<Reference<'_>, String> {
    let end = text.find(['[', '@', '.']).unwrap_or(text.len());
    let (step, rest) = text.split_at(end);
    if step.is_empty() {
        return Err(match text.is_empty() {
            true => "a reference without text".to_string(),
            false => format!("`{text}` names no step"),
        });
    }
    let (select, rest) = match rest.chars().next() {
        Some('[') => {
            let close = rest.find(']').ok_or_else(|| format!("`[` without `]` in `{text}`"))?;
            (Some(&rest[1..close]), &rest[close + 1..])
        }
        Some('@') => at_form(&rest[1..]),
        _ => (None, rest),
    };
    if rest.is_empty() {
        return Ok(Reference { step, select, port: None, index: None });
    }
    let Some(rest) = rest.strip_prefix('.') else {
        return Err(format!(
            "expected `.` and a port after `{}`",
            &text[..text.len() - rest.len()]
        ));
    };
    let (port, index) = match rest.split_once('[') {
        None => (rest, None),
        Some((port, index)) => match index.strip_suffix(']') {
            Some(index) => (port, Some(index)),
            None => return Err(format!("`[` without `]` at the end of `{text}`")),
        },
    };
    let bad = |c: char| !(c.is_alphanumeric() || c == '_' || c == '-');
    if port.is_empty() || port.contains(bad) {
        return Err(format!("`{port}` in `{text}` is no name of a port"));
    }
    Ok(Reference { step, select, port: Some(port), index })
}

/// `2.block[1]` after an `@`. A value may hold dots (`0.1`), a port may not, and starts with no digit.
fn at_form(rest: &str) -> (Option<&str>, &str) {
    let body = rest.find('[').unwrap_or(rest.len());
    match rest[..body].rfind('.') {
        Some(dot) if !rest[dot + 1..].starts_with(|c: char| c.is_ascii_digit()) => {
            (Some(&rest[..dot]), &rest[dot..])
        }
        _ => (Some(rest), ""),
    }
}

/// A selector's coordinates: axis (if named) and value, `None` for `*`.
pub type Coordinate<'a> = (Option<&'a str>, Option<&'a str>);

/// Cuts `layer=2,seed=*` or `2` or `*`.
pub fn coordinates(select: &str) -> Vec<Coordinate<'_>> {
    let cut = |part| {
        let (axis, value) = match str::split_once(part, '=') {
            Some((axis, value)) => (Some(axis.trim()), value.trim()),
            None => (None, part.trim()),
        };
        (axis, (value != "*").then_some(value))
    };
    select.split(',').map(cut).collect()
}
