//! What the user is told when something is wrong: the transcripts of `errors.md` beside this file.
//!
//! `BLESS=1 cargo test -p pipe --test outside errors` writes what is told now; read the difference.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Mutex;

use crate::support::Project;

/// A case: its heading, the files it starts from, and the transcript.
struct Case<'a> {
    name: &'a str,
    files: Vec<(&'a str, &'a str)>,
    transcript: &'a str,
}

#[test]
fn bad_input_is_told_what_where_and_what_to_do() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/errors.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, cases) = parse(&text);
    assert!(cases.len() > 30, "{} cases", cases.len());
    let told = all(&cases);
    if std::env::var_os("BLESS").is_some() {
        let mut blessed = format!("{}\n", head.trim_end());
        for (case, told) in cases.iter().zip(&told) {
            let _ = write!(blessed, "\n## {}\n\n", case.name);
            for (name, text) in &case.files {
                let _ = write!(blessed, "```{name}\n{text}```\n\n");
            }
            let _ = write!(blessed, "```console\n{told}```\n");
        }
        return std::fs::write(&path, blessed).unwrap();
    }
    let mut wrong = String::new();
    for (case, told) in cases.iter().zip(&told).filter(|(case, told)| case.transcript != **told) {
        let _ = write!(wrong, "## {}\n{}", case.name, difference(case.transcript, told));
    }
    assert!(wrong.is_empty(), "these differ from errors.md; BLESS=1 writes them:\n\n{wrong}");
}

/// Lines that one of them lacks: those expected with a `-`, those told with a `+`.
fn difference(expected: &str, told: &str) -> String {
    let lacks = |text: &str, line: &str| !text.lines().any(|other| other == line);
    let gone = expected.lines().filter(|line| lacks(told, line)).map(|line| format!("- {line}\n"));
    let new = told.lines().filter(|line| lacks(expected, line)).map(|line| format!("+ {line}\n"));
    let all: String = gone.chain(new).collect();
    if all.is_empty() { format!("other order or number of lines:\n{told}") } else { all }
}

/// Each case in a project of its own, a few at a time.
fn all(cases: &[Case<'_>]) -> Vec<String> {
    let told = Mutex::new(vec![String::new(); cases.len()]);
    let next = Mutex::new(0..cases.len());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(at) = next.lock().unwrap().next() else { return };
                    let transcript = play(&cases[at]);
                    told.lock().unwrap()[at] = transcript;
                }
            });
        }
    });
    told.into_inner().unwrap()
}

/// Runs the commands of a case: each with its standard error and its exit code.
fn play(case: &Case<'_>) -> String {
    let project = Project::new();
    for (name, text) in &case.files {
        project.write(name, "");
        std::fs::write(project.path().join(name), unescaped(text)).unwrap();
    }
    let mut told = String::new();
    for line in case.transcript.lines().filter_map(|line| line.strip_prefix("$ pipe ")) {
        let args: Vec<&str> = line.split_whitespace().collect();
        let ran = project.pipe(&args);
        let code = ran.code.unwrap();
        let stderr = ran.stderr.replace(&project.path().display().to_string(), "$DIR");
        let stderr = stderr.replace(&project.cache().display().to_string(), "$CACHE");
        let _ = write!(told, "$ pipe {line}\n{}", hexes(&stderr));
        if !told.ends_with('\n') {
            told.push('\n');
        }
        let _ = writeln!(told, "exit {code}");
    }
    told
}

/// Digests and keys differ from build to build: `$HEX` for each.
fn hexes(text: &str) -> String {
    let is_hex = |word: &str| word.len() == 64 && word.bytes().all(|b| b.is_ascii_hexdigit());
    let mut told = String::new();
    for part in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let word = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        told += &if is_hex(word) { part.replace(word, "$HEX") } else { part.to_string() };
    }
    // And the name of an attempt, from run to run.
    match told.find("attempts/$HEX/") {
        Some(at) if let Some(len) = told[at + 14..].find('/') => {
            told.replace_range(at + 14..at + 14 + len, "$ATTEMPT");
        }
        _ => {}
    }
    told
}

/// `\xff` stands for a byte that no text holds, so that such files can be written down here.
fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut parts = text.split("\\x");
    bytes.extend(parts.next().unwrap_or_default().bytes());
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend(part[2..].bytes());
    }
    bytes
}

fn parse(text: &str) -> (&str, Vec<Case<'_>>) {
    let mut parts = text.split("\n## ");
    let head = parts.next().unwrap_or_default();
    (head, parts.map(parse_case).collect())
}

fn parse_case(text: &str) -> Case<'_> {
    let (name, mut rest) = text.split_once('\n').unwrap();
    let mut case = Case { name, files: Vec::new(), transcript: "" };
    while let Some((_, block)) = rest.split_once("```") {
        let (name, body) = block.split_once('\n').unwrap();
        let end = body.find("```").unwrap();
        match name {
            "console" => case.transcript = &body[..end],
            file => case.files.push((file, &body[..end])),
        }
        rest = &body[end + 3..];
    }
    case
}
