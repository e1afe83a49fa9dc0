//! Scalars as numbers, truth values, ranges, durations and sizes; nodes as JSON without a type.
//!
//! Pure functions of text. Numbers may be written `2_000_000`, `2e6` or `0x1f`.

use serde_json::{Number, Value as Json};

use super::yaml::{Node, Value};

/// Most items of a range: far beyond any matrix, small enough to hold.
pub const MAX_RANGE: i128 = 1_000_000;

/// `true` or `false`.
pub fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

/// A whole number, `2e6` included.
pub fn integer(text: &str) -> Option<i128> {
    let digits = number_text(text)?;
    let (sign, body) = match digits.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, digits.strip_prefix('+').unwrap_or(&digits)),
    };
    if let Some(hex) = body.strip_prefix("0x") {
        return i128::from_str_radix(hex, 16).ok().filter(|_| !hex.starts_with(['+', '-']));
    }
    if !body.is_empty() && body.bytes().all(|b| b.is_ascii_digit()) {
        return body.parse::<i128>().ok().map(|v| sign * v);
    }
    let value = float(text)?;
    // Whole numbers are exact in an f64 up to 2^53.
    (value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0).then_some(value as i128)
}

/// A finite number.
pub fn float(text: &str) -> Option<f64> {
    let digits = number_text(text)?;
    let body = digits.strip_prefix(['-', '+']).unwrap_or(&digits);
    if let Some(hex) = body.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16)
            .ok()
            .filter(|_| !hex.starts_with('+'))
            .map(|v| v as f64);
    }
    let starts = body.bytes().next().is_some_and(|b| b.is_ascii_digit() || b == b'.');
    let plain = body.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    if !starts || !plain || !body.bytes().any(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|v: &f64| v.is_finite())
}

/// The text without underscores between digits.
fn number_text(text: &str) -> Option<String> {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_hexdigit());
    let mut previous = None;
    let mut characters = text.chars().peekable();
    let mut out = String::with_capacity(text.len());
    while let Some(c) = characters.next() {
        if c != '_' {
            out.push(c);
        } else if !digit(previous) || !digit(characters.peek().copied()) {
            return None;
        }
        previous = Some(c);
    }
    Some(out)
}

/// `a..b`, `b` excluded: `None` when it is no range at all.
pub fn range(text: &str) -> Option<Result<std::ops::Range<i128>, String>> {
    let (from, to) = text.split_once("..")?;
    let (from, to) = (integer(from.trim())?, integer(to.trim())?);
    Some(match to.saturating_sub(from) {
        n if n > MAX_RANGE => Err(format!("`{text}` has more than {MAX_RANGE} values")),
        _ => Ok(from..to),
    })
}

/// `90`, `10m`, `2h`, `1.5d`: seconds.
pub fn duration(text: &str) -> Option<f64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic() && !matches!(c, 'e' | 'E'));
    let (number, unit) = text.split_at(at.unwrap_or(text.len()));
    let factor = match unit.trim() {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    float(number.trim()).map(|n| n * factor).filter(|s| *s > 0.0 && *s < 1e10)
}

/// `8GiB`, `500MB`, `1024`: bytes.
pub fn bytes(text: &str) -> Option<u64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic() && !matches!(c, 'e' | 'E'));
    let (number, unit) = text.split_at(at.unwrap_or(text.len()));
    let factor: f64 = match unit.trim() {
        "" | "B" => 1.0,
        "KB" | "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => 1024f64.powi(2),
        "GiB" => 1024f64.powi(3),
        "TiB" => 1024f64.powi(4),
        _ => return None,
    };
    let value = float(number.trim())? * factor;
    (0.0..1e18).contains(&value).then_some(value as u64)
}

/// A node as JSON, each scalar read as what it looks like.
pub fn json(node: &Node) -> Json {
    match &node.value {
        Value::Null | Value::Broken => Json::Null,
        Value::Scalar { text, quoted: true } => Json::String(text.clone()),
        Value::Scalar { text, quoted: false } => scalar(text),
        Value::Seq(items) => items.iter().map(json).collect(),
        Value::Map(entries) => {
            Json::Object(entries.iter().map(|(k, v)| (k.text.clone(), json(v))).collect())
        }
    }
}

/// A plain scalar as what it looks like.
pub fn scalar(text: &str) -> Json {
    if let Some(truth) = boolean(text) {
        return Json::Bool(truth);
    }
    let whole = !text.contains(['.', 'e', 'E']) || text.starts_with("0x");
    if whole && let Some(number) = integer(text).and_then(Number::from_i128) {
        return Json::Number(number);
    }
    match float(text).and_then(Number::from_f64) {
        Some(number) => Json::Number(number),
        None => Json::String(text.to_string()),
    }
}
