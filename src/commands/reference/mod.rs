//! The reference as Markdown, from the types: commands from the parser's definitions, stages and the
//! pipeline file from their schemas. `docs/reference/` is what `pipe man --markdown -o` writes.

mod commands;
mod file;
mod stages;

/// Every page: its file name and its text.
pub fn pages() -> [(&'static str, String); 3] {
    [
        ("commands.md", commands::page()),
        ("pipeline-file.md", file::page()),
        ("stages.md", stages::page()),
    ]
}

/// What every page begins with.
fn head(title: &str) -> String {
    format!("<!-- Written by `pipe man --markdown`; edit the types, not this. -->\n\n# {title}\n\n")
}

/// Text in a cell of a table: without a bar of its own.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// One line that ends like a sentence, whatever it ends with.
fn sentence(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.ends_with(['.', ':', '?']) { text } else { format!("{text}.") }
}
