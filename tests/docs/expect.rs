//! Whether what a command printed is what a page quotes. A quoted line `...` stands for any lines, `...`
//! within a line for any text, and any time (`1.2 s`, `3 min 05 s`) for any other.

/// `None` if it is; else what differs, for people.
pub fn difference(quoted: &[String], printed: &str) -> Option<String> {
    let quoted: Vec<String> = quoted.iter().map(|line| without_times(line.trim_end())).collect();
    let lines: Vec<String> = printed.lines().map(|line| without_times(line.trim_end())).collect();
    let same = all(&quoted, &lines);
    (!same).then(|| format!("quoted:\n{}\n\nprinted:\n{printed}", quoted.join("\n")))
}

fn all(quoted: &[String], lines: &[String]) -> bool {
    match (quoted.split_first(), lines.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first.trim() == "..." => {
            (0..=lines.len()).any(|skipped| all(rest, &lines[skipped..]))
        }
        (Some((first, rest)), Some((line, others))) => one(first, line) && all(rest, others),
        _ => false,
    }
}

/// One line, whose `...` stand for any text.
fn one(quoted: &str, line: &str) -> bool {
    match quoted.split_once("...") {
        None => quoted == line,
        Some((head, rest)) => line.strip_prefix(head).is_some_and(|tail| {
            (0..=tail.len())
                .filter(|&at| tail.is_char_boundary(at))
                .any(|at| one(rest, &tail[at..]))
        }),
    }
}

/// Every time as `TIME`, and the spaces before it, which line things up, as one.
fn without_times(line: &str) -> String {
    let mut out: Vec<String> = Vec::new();
    let words: Vec<&str> = line.split(' ').collect();
    let mut at = 0;
    while at < words.len() {
        let after = words.get(at + 1).and_then(|word| after_unit(word));
        match (before_number(words[at]), after) {
            (Some(before), Some(after)) => {
                while out.last().is_some_and(String::is_empty) {
                    out.pop();
                }
                // `3 min 05 s` is one time.
                if out.last().is_some_and(|word| word.ends_with("TIME")) && before.is_empty() {
                    *out.last_mut().unwrap() += after;
                } else {
                    out.push(format!("{before}TIME{after}"));
                }
                at += 2;
            }
            _ => {
                out.push(words[at].into());
                at += 1;
            }
        }
    }
    out.join(" ")
}

/// What stands before a number in a word of nothing else: an opening bracket, or nothing.
fn before_number(word: &str) -> Option<&str> {
    let number = word.trim_start_matches('(');
    let is = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    is.then(|| &word[..word.len() - number.len()])
}

/// What follows a unit of time in a word of nothing else.
fn after_unit(word: &str) -> Option<&str> {
    let letters = word.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(word.len());
    let (unit, after) = word.split_at(letters);
    let ends = after.chars().all(|c| ",.):;".contains(c));
    (matches!(unit, "ms" | "s" | "min" | "h") && ends).then_some(after)
}

#[test]
fn quotes_may_leave_things_out() {
    let quoted = |text: &str| text.lines().map(String::from).collect::<Vec<_>>();
    for (quote, printed) in [
        ("a\nb", "a\nb\n"),
        ("a\n...\nd", "a\nb\nc\nd\n"),
        ("...\nd", "d\n"),
        ("done    corpus 12 ms", "done    corpus 1.3 s\n"),
        ("5 cached, 0 ran in 1 ms (saved 1 min 46 s)", "5 cached, 0 ran in 2.0 s (saved 4 s)\n"),
        ("perplexity ..., recall ...", "perplexity 3.2, recall 99 %\n"),
        ("2 ran in 12 ms...", "2 ran in 3 min 05 s (the cache saved 1 s)\n"),
        ("2 ran in 12 ms...", "2 ran in 1 s\n"),
    ] {
        assert_eq!(difference(&quoted(quote), printed), None, "{quote}");
    }
    for (quote, printed) in [
        ("a", "a\nb\n"),
        ("a\n...\nd", "a\nb\n"),
        ("done    corpus 12 ms", "done    tokens 12 ms\n"),
        ("5 cached in 1 ms", "6 cached in 1 ms\n"),
        ("perplexity ..., recall ...", "perplexity 3.2\n"),
    ] {
        assert!(difference(&quoted(quote), printed).is_some(), "{quote}");
    }
}
