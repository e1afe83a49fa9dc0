//! `pipe init`: a commented starter pipeline for the models and the text that are found.

mod find;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use self::find::{Model, Text};
use super::Wrong;
use crate::cli::Settings;
use crate::cli::look::Init;
use crate::out::{self, bytes, clean};

const STARTER: &str = include_str!("starter.yaml");
/// More models are not listed in the file.
const MOST_LISTED: usize = 12;

pub fn init(args: Init) -> Result<ExitCode> {
    let path = &args.output;
    if path.exists() && !args.force {
        bail!(Wrong(format!(
            "{} is there already\nhint: name another file with `-o`, or replace it with `--force`",
            path.display()
        )));
    }
    let here = std::env::current_dir()?;
    let mut models = find::models(&here);
    models.extend(find::of_hub(&super::hub().cache));
    let texts = find::texts(&here);
    for model in &models {
        out::message(format!(
            "found   {} ({}, {})",
            clean(&model.reference),
            model.kind,
            bytes(model.bytes)
        ));
    }
    match texts.first() {
        Some(text) => {
            out::message(format!("found   {} ({} of text)", clean(&text.glob), bytes(text.bytes)));
        }
        None => out::message("note    no text is here: the pipeline takes the embedded sample"),
    }
    let text = match models.first() {
        Some(_) => starter(&models, texts.first(), path),
        None => {
            out::message(
                "note    no model is here: the pipeline trains a small teacher of its own",
            );
            own_teacher(texts.first(), path)
        }
    };
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    // What was written must be right: a wrong starter would be our mistake.
    super::load(Some(path), &Settings::default())?;
    out::line(path.display().to_string());
    out::message(format!(
        "hint: `pipe run {}` runs it, `pipe plan {0}` tells what it would do",
        path.display()
    ));
    Ok(ExitCode::SUCCESS)
}

/// A pipeline with the smallest model as the teacher, and the others to choose from.
fn starter(models: &[Model], text: Option<&Text>, path: &Path) -> String {
    let teacher = &models[0];
    let mut others = String::new();
    for model in models.iter().skip(1).take(MOST_LISTED) {
        others += &format!("  # teacher: {} ({})\n", quoted(&model.reference), bytes(model.bytes));
    }
    let try_layers = match teacher.layers {
        Some(n @ 3..) => format!("[{}, {}]", n / 3, 2 * n / 3),
        _ => "[0, 1]".into(),
    };
    let file = plain(&path.display().to_string());
    let uses = [
        (format!("pipe plan {file}"), "what would run"),
        (
            format!("pipe run {file} --profile try"),
            "two layers and few tokens: whether it works here",
        ),
        (format!("pipe run {file}"), "the whole; it wants a GPU"),
        ("pipe report".into(), "what came out"),
    ];
    let fields = [
        ("@TEACHER_NAME@", plain(&teacher.reference)),
        ("@TEACHER@", quoted(&teacher.reference)),
        ("@OTHERS@", others),
        ("@USE@", usage(&uses)),
        ("@NAME@", quoted(&stem(path))),
        ("@CORPUS@", corpus(text)),
        ("@TRY@", try_layers),
    ];
    // What is put in is not looked at again.
    let mut rest = STARTER;
    let mut out = String::new();
    while let Some((at, (mark, value))) = fields
        .iter()
        .filter_map(|field| Some((rest.find(field.0)?, field)))
        .min_by_key(|(at, _)| *at)
    {
        out += &rest[..at];
        out += value;
        rest = &rest[at + mark.len()..];
    }
    out + rest
}

/// The embedded pipeline, with the text that was found, a name, and words of its own at the top.
fn own_teacher(text: Option<&Text>, path: &Path) -> String {
    let body: Vec<&str> =
        super::EMBEDDED.1.lines().skip_while(|line| line.starts_with('#')).collect();
    let body = body.join("\n").replacen("corpus: []", &format!("corpus: {}", corpus(text)), 1);
    let body = body.replacen("name: mohawk", &format!("name: {}", quoted(&stem(path))), 1);
    let of = if text.is_some() { "your own text" } else { "the embedded sample" };
    let file = plain(&path.display().to_string());
    let uses = usage(&[
        (format!("pipe plan {file}"), "what would run"),
        (format!("pipe run {file}"), "all of it: minutes on a CPU"),
        ("pipe report".into(), "what came out"),
    ]);
    format!(
        "# A small Transformer of {of}, and a Mamba-2 student of it, made by `pipe init`. Change\n\
         # what you like: only what depends on it is done again.\n\
         #\n\
         {uses}{body}\n"
    )
}

/// Commands and what they do, side by side in a comment.
fn usage(rows: &[(String, &str)]) -> String {
    let width = rows.iter().map(|(command, _)| command.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(command, does)| format!("#   {command:<width$}   {does}\n")).collect()
}

/// The name of a file, without its ending.
fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn corpus(text: Option<&Text>) -> String {
    text.map_or("[]".into(), |text| format!("[{}]", quoted(&text.glob)))
}

/// A string of YAML that is taken as it is: JSON's are YAML's, and `${` means itself.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text.replace("${", "$${")).to_string()
}

/// A name in a comment.
fn plain(text: &str) -> String {
    clean(text).replace('\n', " ")
}
