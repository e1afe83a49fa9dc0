//! Reads the user's documents one by one: txt, jsonl, parquet, and the first two under gzip or zstd.
//! Memory is bounded by one document; what is no text is counted and left out.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::file::reader::{FileReader, SerializedFileReader};

/// Longest line (or paragraph) that is held in memory.
const LINE_BYTES_MAX: u64 = 64 << 20;
/// Rows of a parquet column read at once.
const ROWS: usize = 256;

/// What sort of file it is, from its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    container: Container,
    packing: Packing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    Txt,
    Jsonl,
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

/// The names that [`Format::of`] knows.
pub const KNOWN: &str =
    "`.txt`, `.jsonl`, `.ndjson` (each also with `.gz` or `.zst`) or `.parquet`";

impl Format {
    /// The format that the file's name tells, if it tells one.
    pub fn of(name: &str) -> Option<Format> {
        let name = name.to_ascii_lowercase();
        let (stem, packing) = match name.rsplit_once('.')? {
            (stem, "gz") => (stem, Packing::Gzip),
            (stem, "zst" | "zstd") => (stem, Packing::Zstd),
            _ => (name.as_str(), Packing::None),
        };
        let container = match stem.rsplit_once('.')?.1 {
            "txt" | "text" => Container::Txt,
            "jsonl" | "ndjson" => Container::Jsonl,
            "parquet" if packing == Packing::None => Container::Parquet,
            _ => return None,
        };
        Some(Format { container, packing })
    }
}

/// How documents are found in a file.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// The JSON field or parquet column that holds the text.
    pub field: &'a str,
    /// A txt file's paragraphs are joined to documents of at least so many bytes.
    pub paragraphs_bytes: usize,
}

/// What was left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Documents that are not UTF-8.
    pub invalid: u64,
    /// Documents of white space only.
    pub empty: u64,
}

/// Where documents go; an error stops the reading.
pub type Sink<'a> = dyn FnMut(&str) -> Result<()> + 'a;

/// All files under `root`, in sorted order of their paths; links are followed, a loop is an error.
pub fn walk(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    walk_into(root, 0, &mut found)?;
    Ok(found)
}

fn walk_into(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    ensure!(depth < 64, "{} is nested too deeply (a loop of links?)", folder.display());
    let list = || format!("cannot list {}", folder.display());
    let mut items = Vec::new();
    for item in std::fs::read_dir(folder).with_context(list)? {
        items.push(item.with_context(list)?.path());
    }
    items.sort();
    for item in items {
        if item.is_dir() {
            walk_into(&item, depth + 1, found)?;
        } else {
            found.push(item);
        }
    }
    Ok(())
}

/// Gives every document of the file at `path` to `sink`, in order.
pub fn documents(
    path: &Path,
    format: Format,
    reading: &Reading,
    skipped: &mut Skipped,
    sink: &mut Sink,
) -> Result<()> {
    let mut keep = |bytes: &[u8], skipped: &mut Skipped| match std::str::from_utf8(bytes) {
        Ok(text) if text.trim().is_empty() => {
            skipped.empty += 1;
            Ok(())
        }
        Ok(text) => sink(text),
        Err(_) => {
            skipped.invalid += 1;
            Ok(())
        }
    };
    match format.container {
        Container::Txt => paragraphs(&mut unpacked(path, format)?, reading, skipped, &mut keep),
        Container::Jsonl => lines(&mut unpacked(path, format)?, reading, skipped, &mut keep),
        Container::Parquet => column(path, reading, skipped, &mut keep),
    }
}

type Keep<'a> = dyn FnMut(&[u8], &mut Skipped) -> Result<()> + 'a;

fn unpacked(path: &Path, format: Format) -> Result<Box<dyn BufRead>> {
    let file = BufReader::with_capacity(1 << 18, File::open(path).context("cannot open it")?);
    Ok(match format.packing {
        Packing::None => Box::new(file),
        Packing::Gzip => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file))),
        Packing::Zstd => Box::new(BufReader::new(
            zstd::stream::read::Decoder::with_buffer(file).context("no zstd stream")?,
        )),
    })
}

/// Reads one line, its end included, into `line`; 0 at the end of the file.
fn read_line(input: &mut dyn BufRead, line: &mut Vec<u8>, number: u64) -> Result<usize> {
    let got = input.take(LINE_BYTES_MAX).read_until(b'\n', line).with_context(|| match number {
        1 => "it cannot be read".to_string(),
        n => format!("it breaks off after line {}", n - 1),
    })?;
    ensure!((got as u64) < LINE_BYTES_MAX, "line {number} is longer than 64 MiB");
    Ok(got)
}

/// Paragraphs, parted by blank lines, joined until there are enough bytes.
fn paragraphs(
    input: &mut dyn BufRead,
    reading: &Reading,
    skipped: &mut Skipped,
    keep: &mut Keep,
) -> Result<()> {
    let (mut gathered, mut line) = (Vec::new(), Vec::new());
    for number in 1.. {
        line.clear();
        let got = read_line(input, &mut line, number)?;
        let blank = line.iter().all(u8::is_ascii_whitespace);
        // A file without blank lines is cut at a line end, so that memory stays bounded.
        let full = gathered.len() >= reading.paragraphs_bytes;
        if got == 0 || (full && (blank || gathered.len() >= 16 * reading.paragraphs_bytes)) {
            if !gathered.is_empty() {
                keep(gathered.trim_ascii_end(), skipped)?;
            }
            gathered.clear();
        }
        if got == 0 {
            return Ok(());
        }
        if !(blank && gathered.is_empty()) {
            gathered.extend_from_slice(&line);
        }
    }
    Ok(())
}

/// One JSON object a line.
fn lines(
    input: &mut dyn BufRead,
    reading: &Reading,
    skipped: &mut Skipped,
    keep: &mut Keep,
) -> Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if read_line(input, &mut line, number)? == 0 {
            return Ok(());
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if std::str::from_utf8(&line).is_err() {
            skipped.invalid += 1;
            continue;
        }
        let text = json_field(&line, reading.field).with_context(|| format!("in line {number}"))?;
        keep(text.as_bytes(), skipped)?;
    }
    Ok(())
}

fn json_field(line: &[u8], field: &str) -> Result<String> {
    let value: serde_json::Value = serde_json::from_slice(line).context("no JSON")?;
    let Some(object) = value.as_object() else { bail!("it is no JSON object") };
    match object.get(field) {
        Some(serde_json::Value::String(text)) => Ok(text.clone()),
        Some(serde_json::Value::Null) => Ok(String::new()),
        Some(_) => bail!("`{field}` is no string; set `field` to the one that holds the text"),
        None => {
            let fields: Vec<String> = object.keys().map(|key| format!("`{key}`")).collect();
            bail!("there is no `{field}`, only {}; set `field`", fields.join(", "))
        }
    }
}

/// One row a document.
fn column(path: &Path, reading: &Reading, skipped: &mut Skipped, keep: &mut Keep) -> Result<()> {
    let file = File::open(path).context("cannot open it")?;
    let reader = SerializedFileReader::new(file).context("it is no valid parquet file")?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let paths: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
    let at = paths.iter().position(|path| path == reading.field).ok_or_else(|| {
        anyhow!(
            "there is no column `{}`, only `{}`; set `field`",
            reading.field,
            paths.join("`, `")
        )
    })?;
    let found = schema.column(at);
    ensure!(
        found.physical_type() == Type::BYTE_ARRAY && found.max_rep_level() == 0,
        "column `{}` holds no strings; set `field`",
        reading.field
    );
    for group in 0..reader.num_row_groups() {
        let place = || format!("in row group {group}");
        let rows = reader.get_row_group(group).with_context(place)?;
        match rows.get_column_reader(at).with_context(place)? {
            ColumnReader::ByteArrayColumnReader(column) => {
                strings(column, found.max_def_level(), skipped, keep).with_context(place)?
            }
            _ => bail!("column `{}` holds no strings", reading.field),
        }
    }
    Ok(())
}

fn strings(
    mut column: ColumnReaderImpl<ByteArrayType>,
    max_def_level: i16,
    skipped: &mut Skipped,
    keep: &mut Keep,
) -> Result<()> {
    loop {
        let (mut values, mut levels) = (Vec::new(), Vec::new());
        let (records, ..) = column.read_records(ROWS, Some(&mut levels), None, &mut values)?;
        if records == 0 {
            return Ok(());
        }
        skipped.empty += levels.iter().filter(|level| **level < max_def_level).count() as u64;
        for value in &values {
            keep(value.data(), skipped)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: &[u8]) -> Result<(Vec<String>, Skipped)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let reading = Reading { field: "text", paragraphs_bytes: 8 };
        let (mut found, mut skipped) = (Vec::new(), Skipped::default());
        documents(&path, Format::of(name).unwrap(), &reading, &mut skipped, &mut |text| {
            found.push(text.to_string());
            Ok(())
        })?;
        Ok((found, skipped))
    }

    #[test]
    fn names_tell_formats() {
        for known in ["a.txt", "a.TXT.gz", "b.jsonl.zst", "c.ndjson", "d.parquet", "x.y.txt"] {
            assert!(Format::of(known).is_some(), "{known}");
        }
        for unknown in ["a", "a.gz", "a.md", "a.parquet.gz", ".zst"] {
            assert!(Format::of(unknown).is_none(), "{unknown}");
        }
    }

    #[test]
    fn paragraphs_are_gathered_and_long_ones_cut_at_lines() {
        let (found, _) = read("a.txt", b"one\n\n\ntwo two\n\nthree\n").unwrap();
        assert_eq!(found, ["one\n\n\ntwo two", "three"]);
        let (found, _) = read("a.txt", "abcdefg\n".repeat(40).as_bytes()).unwrap();
        assert_eq!(found.iter().map(|text| text.len() + 1).collect::<Vec<_>>(), [128, 128, 64]);
    }

    #[test]
    fn what_is_no_text_is_counted() {
        let jsonl = b"{\"text\":\"a\"}\n\n{\"text\":\" \"}\n{\"text\":\"\xff\"}\n{\"text\":null}\n";
        let (found, skipped) = read("a.jsonl", jsonl).unwrap();
        assert_eq!((found.len(), skipped), (1, Skipped { invalid: 1, empty: 2 }));
        let (found, skipped) = read("a.txt", b"\xff is broken\n\nwhole is this\n").unwrap();
        assert_eq!(
            (found.as_slice(), skipped.invalid),
            (["whole is this".to_string()].as_slice(), 1)
        );
    }

    #[test]
    fn errors_name_the_line_and_what_to_set() {
        let error = |name: &str, bytes: &[u8]| format!("{:#}", read(name, bytes).unwrap_err());
        let text = error("a.jsonl", b"{\"text\":\"a\"}\n{\"body\":1,\"id\":2}\n");
        assert_eq!(text, "in line 2: there is no `text`, only `body`, `id`; set `field`");
        assert!(error("a.jsonl", b"{\"text\":3}").contains("`text` is no string"));
        assert!(error("a.jsonl", b"{\"text\":").contains("in line 1: no JSON"));
        assert!(error("a.jsonl", b"[1]").contains("no JSON object"));
        assert!(error("a.parquet", b"PAR1 and nothing").contains("no valid parquet"));
        assert!(error("a.txt.gz", b"plain").contains("cannot be read"));
        assert!(error("a.txt.zst", b"plain").contains("cannot be read"));
    }
}
