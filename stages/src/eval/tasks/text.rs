//! Text as the harness' language handles it, where that differs from ours.

/// Python's `str.isspace` of one character: four control characters more than Unicode's property.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str.strip`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Python's `str.capitalize`: the first character in title case, all others in lower case.
pub fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    // Of the whole text, since a sigma looks at what is before it.
    let lower = text.to_lowercase();
    let rest = lower.chars().skip(first.to_lowercase().count());
    title(first).into_iter().chain(rest).collect()
}

/// Title case, right for all but Greek letters with an iota below.
fn title(c: char) -> Vec<char> {
    let upper: Vec<char> = c.to_uppercase().collect();
    match (c, upper.as_slice()) {
        ('Ǆ'..='ǆ', _) => vec!['ǅ'],
        ('Ǉ'..='ǉ', _) => vec!['ǈ'],
        ('Ǌ'..='ǌ', _) => vec!['ǋ'],
        ('Ǳ'..='ǳ', _) => vec!['ǲ'],
        ('ა'..='ჿ', _) => vec![c],
        ('ŉ', _) | (_, [_]) => upper,
        (_, [first, rest @ ..]) => {
            let lower = rest.iter().flat_map(|c| c.to_lowercase());
            std::iter::once(*first).chain(lower).collect()
        }
        (_, []) => vec![c],
    }
}

/// `text` without the shortest spans from `[` to `]` on one line: Python's `re.sub(r"\[.*?\]", "", text)`.
pub fn without_brackets(text: &str) -> String {
    let (mut kept, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(open) = rest.find('[') {
        let (before, from) = rest.split_at(open);
        kept.push_str(before);
        let end = from.find([']', '\n']).map_or(from.len(), |at| at + 1);
        let (span, after) = from.split_at(end);
        if !span.ends_with(']') {
            kept.push_str(span);
        }
        rest = after;
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capitals_are_those_of_python() {
        let pairs = [
            ("", ""),
            ("he RUNS", "He runs"),
            ("[header] How", "[header] how"),
            ("ßa", "Ssa"),
            ("ﬁx", "Fix"),
            ("ǆungla", "ǅungla"),
            ("ŉX", "ʼNx"),
            ("იᲐ", "ია"),
            ("ΑΣ ΣΑ", "Ας σα"),
            ("İI", "İi"),
            ("1A", "1a"),
        ];
        for (text, wanted) in pairs {
            assert_eq!(capitalize(text), wanted, "{text}");
        }
    }

    #[test]
    fn brackets_go_with_what_is_in_them_but_not_across_lines() {
        let pairs = [
            ("a [b] c", "a  c"),
            ("[a[b]c]", "c]"),
            ("[a\nb] [c]", "[a\nb] "),
            ("x ] y [", "x ] y ["),
            ("[]é[é]é", "éé"),
            ("[\n[x]", "[\n"),
        ];
        for (text, wanted) in pairs {
            assert_eq!(without_brackets(text), wanted, "{text}");
        }
        assert_eq!(strip("\u{1f} \u{a0}a b\u{2003}\n"), "a b");
    }
}
