//! Text that came from outside, made safe for a page, and numbers made readable. Knows no run.

/// `text` for HTML: escaped, without terminal sequences, control characters and direction
/// overrides; line breaks and tabs stay.
pub(crate) fn esc(text: &str) -> String {
    clip(text, usize::MAX)
}

/// The same, and at most `most` characters of it.
pub(crate) fn clip(text: &str, most: usize) -> String {
    let mut out = String::with_capacity(text.len().min(most) + 8);
    let mut left = most;
    for c in Printable(text.chars()) {
        if left == 0 {
            out.push('…');
            break;
        }
        left -= 1;
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// `value` as JSON that cannot end the script element it stands in.
pub(crate) fn json(value: &serde_json::Value) -> String {
    value.to_string().replace('<', "\\u003c").replace('&', "\\u0026")
}

/// Characters that a page may show: terminal sequences (`ESC [ … letter`) are dropped whole.
struct Printable<'a>(std::str::Chars<'a>);

impl Iterator for Printable<'_> {
    type Item = char;

    fn next(&mut self) -> Option<char> {
        loop {
            match self.0.next()? {
                '\u{1b}' => {
                    if self.0.as_str().starts_with('[') {
                        self.0.next();
                        self.0.find(|c| ('\u{40}'..='\u{7e}').contains(c));
                    }
                }
                c @ ('\n' | '\t') => return Some(c),
                c if c.is_control() => {}
                '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
                c => return Some(c),
            }
        }
    }
}

/// A number with four significant digits; very big and very small ones with an exponent.
pub(crate) fn num(value: f64) -> String {
    if value.is_nan() {
        return "not a number".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "∞".into() } else { "−∞".into() };
    }
    let size = value.abs();
    if size == 0.0 {
        return "0".into();
    }
    if value.fract() == 0.0 && size < 1e9 {
        return minus(&thousands(size as u64), value);
    }
    if !(1e-3..1e6).contains(&size) {
        let text = format!("{size:.2e}");
        return minus(&text.replace("e-", "e−"), value);
    }
    let digits = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
    minus(&format!("{size:.digits$}"), value)
}

fn minus(text: &str, value: f64) -> String {
    if value < 0.0 { format!("−{text}") } else { text.to_string() }
}

/// A count with separators: `12,345`.
pub(crate) fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A duration: `0.42 s`, `66 s`, `3 min 12 s`, `2 h 05 min`.
pub(crate) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    match seconds {
        s if s < 0.0005 => "0 s".into(),
        s if s < 1.0 => format!("{s:.2} s"),
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 89.5 => format!("{s:.0} s"),
        s if s < 3599.5 => {
            let whole = s.round() as u64;
            format!("{} min {:02} s", whole / 60, whole % 60)
        }
        s => {
            let minutes = (s / 60.0).round() as u64;
            format!("{} h {:02} min", thousands(minutes / 60), minutes % 60)
        }
    }
}

/// A size: `512 B`, `1.4 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    let mut size = count as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, next);
    }
    if unit == "B" { format!("{count} B") } else { format!("{size:.1} {unit}") }
}

/// A share of one: `99.6 %`.
pub(crate) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1} %", share * 100.0) } else { num(share) }
}

/// `1 step`, `2 steps`.
pub(crate) fn count(n: usize, one: &str) -> String {
    format!("{} {one}{}", thousands(n as u64), if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_becomes_harmless() {
        assert_eq!(
            esc("<script>alert('1')</script>&"),
            "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;"
        );
        assert_eq!(esc("a\u{1b}[31;1mred\u{1b}[0m\u{7}\u{0}b\u{202e}c\nd"), "aredbc\nd");
        assert_eq!(esc("cut \u{1b}[31"), "cut ");
        assert_eq!(clip("abcdef", 3), "abc…");
        assert_eq!(clip("abc", 3), "abc");
        let inside = json(&serde_json::json!({ "n": "</script><!--" }));
        assert!(!inside.contains('<'), "{inside}");
    }

    #[test]
    fn numbers_read_well() {
        let shown: Vec<String> =
            [0.0, 1.0, 12345.0, 0.12345, 12.3456, 3e-4, -1.5, f64::NAN, 1234.56].map(num).into();
        let wanted =
            ["0", "1", "12,345", "0.1235", "12.35", "3.00e−4", "−1.500", "not a number", "1235"];
        assert_eq!(shown, wanted);
        let shown: Vec<String> = [0.0, 0.42, 4.24, 66.2, 192.0, 7500.0].map(duration).into();
        assert_eq!(shown, ["0 s", "0.42 s", "4.2 s", "66 s", "3 min 12 s", "2 h 05 min"]);
        assert_eq!([bytes(512), bytes(1_500_000)], ["512 B", "1.4 MiB"]);
        assert_eq!(percent(0.9964), "99.6 %");
    }
}
