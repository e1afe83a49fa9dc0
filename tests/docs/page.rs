//! A page of Markdown as what a test does with it: blocks to run, files to write, and why some are
//! skipped.
//!
//! - ```` ```sh ```` is a script: it must end well. ```` ```console ```` has commands after `$ ` and, after
//!   each, what it prints; nothing there means that it is not compared.
//! - Comments before a block say what else to do: `<!-- test: file NAME -->` writes the block under that
//!   name, `<!-- test: skip REASON -->` leaves it, `<!-- test: fails -->` expects the last command to fail.
//! - `<!-- test: setup`, some lines of shell, `-->` does what the reader has done, or would wait for.

/// What a test does with a part of a page.
#[derive(Debug, PartialEq)]
pub enum Part {
    /// Lines of shell that a reader does not see.
    Setup(String),
    /// A block that is left, and why.
    Skip { line: usize, reason: String },
    /// A block that is a file.
    File { name: String, text: String },
    /// A script that must end well; or, if `fails`, must not.
    Script { line: usize, text: String, fails: bool },
    /// Commands, each with its lines of output as they are quoted.
    Session { line: usize, commands: Vec<(String, Vec<String>)>, fails: bool },
    /// A block in a language that nobody runs: `yaml`, or nothing at all.
    Other { line: usize, language: String },
}

/// The parts of a page in their order.
pub fn parse(text: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut directive: Option<String> = None;
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(start) = line.trim_start().strip_prefix("<!-- test:") {
            let mut whole = start.to_string();
            while !whole.contains("-->") {
                let (_, next) =
                    lines.next().ok_or(format!("line {number}: a comment without end"))?;
                whole = format!("{whole}\n{next}");
            }
            let whole = whole.split("-->").next().unwrap_or_default().trim().to_string();
            match whole.strip_prefix("setup\n") {
                Some(script) => parts.push(Part::Setup(script.into())),
                None => directive = Some(whole),
            }
        } else if let Some(language) = line.trim_start().strip_prefix("```") {
            let block: Vec<&str> = lines
                .by_ref()
                .map(|(_, line)| line)
                .take_while(|line| line.trim_start() != "```")
                .collect();
            parts.push(part(number + 1, language.trim(), &block, directive.take())?);
        } else if !line.trim().is_empty() && directive.is_some() {
            return Err(format!("line {}: a directive stands right before its block", number + 1));
        }
    }
    match directive {
        Some(directive) => Err(format!("`{directive}` belongs to no block")),
        None => Ok(parts),
    }
}

fn part(
    line: usize,
    language: &str,
    block: &[&str],
    directive: Option<String>,
) -> Result<Part, String> {
    let text = format!("{}\n", block.join("\n"));
    let directive = directive.unwrap_or_default();
    let fails = directive == "fails";
    let (verb, rest) = directive.split_once(' ').unwrap_or((&directive, ""));
    match (verb, language) {
        ("skip", _) if !rest.is_empty() => Ok(Part::Skip { line, reason: rest.into() }),
        ("file", _) if !rest.is_empty() => Ok(Part::File { name: rest.into(), text }),
        ("" | "fails", "sh") => Ok(Part::Script { line, text, fails }),
        ("" | "fails", "console") => {
            Ok(Part::Session { line, commands: commands(line, block)?, fails })
        }
        ("", "bash" | "shell") => Err(format!("line {line}: blocks to run are `sh` or `console`")),
        ("", _) => Ok(Part::Other { line, language: language.into() }),
        _ => Err(format!("line {line}: unknown directive `{directive}`")),
    }
}

/// Commands of a session with what each prints.
fn commands(line: usize, block: &[&str]) -> Result<Vec<(String, Vec<String>)>, String> {
    let mut commands: Vec<(String, Vec<String>)> = Vec::new();
    for text in block {
        match (text.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => commands.push((command.into(), Vec::new())),
            (None, Some((command, printed))) if printed.is_empty() && command.ends_with('\\') => {
                *command = format!("{command}\n{text}");
            }
            (None, Some((_, printed))) => printed.push(text.to_string()),
            (None, None) => return Err(format!("line {line}: a session begins with `$ `")),
        }
    }
    Ok(commands)
}

#[test]
fn a_page_is_taken_apart() {
    let page = "# A page\n\n```sh\ntrue\n```\n<!-- test: setup\nmkdir a\n-->\n<!-- test: file a/b.yaml -->\n```yaml\n\
                steps: {}\n```\n<!-- test: skip needs a GPU -->\n\n```sh\nnvcc\n```\n```console\n$ one \\\n  two\nprinted\n$ three\n```\n\
                ```\ntext\n```\n<!-- test: fails -->\n```sh\nfalse\n```\n";
    let text = String::from;
    assert_eq!(
        parse(page).unwrap(),
        [
            Part::Script { line: 3, text: text("true\n"), fails: false },
            Part::Setup(text("mkdir a")),
            Part::File { name: text("a/b.yaml"), text: text("steps: {}\n") },
            Part::Skip { line: 15, reason: text("needs a GPU") },
            Part::Session {
                line: 18,
                commands: vec![
                    (text("one \\\n  two"), vec![text("printed")]),
                    (text("three"), vec![])
                ],
                fails: false,
            },
            Part::Other { line: 24, language: text("") },
            Part::Script { line: 28, text: text("false\n"), fails: true },
        ]
    );
    for (wrong, why) in [
        ("<!-- test: skip -->\n```sh\n```\n", "unknown directive"),
        ("<!-- test: skip x -->\ntext\n```sh\n```\n", "right before"),
        ("<!-- test: skip x -->\n", "belongs to no block"),
        ("```bash\ntrue\n```\n", "are `sh` or `console`"),
        ("```console\ntrue\n```\n", "begins with"),
    ] {
        assert!(parse(wrong).unwrap_err().contains(why), "{wrong}");
    }
}
