//! A `text.jsonl` artifact, mapped and cut into chunks at line ends, so that many threads can read it
//! and the result depends on none. Knows no tokenizer.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use engine::stage::Input;
use memmap2::Mmap;

use super::document::Document;

/// Bytes of a chunk, before it is widened to the next line end.
const CHUNK_BYTES: usize = 1 << 20;

/// One mapped file of documents.
pub struct Corpus {
    map: Mmap,
    name: String,
}

impl Corpus {
    /// Maps the artifact at `path`; an empty file is an error.
    pub fn open(path: &Path) -> Result<Corpus> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        // SAFETY: artifacts are immutable objects of the store, read-only on disk.
        let map = unsafe { Mmap::map(&file) }
            .with_context(|| format!("cannot map {}", path.display()))?;
        ensure!(!map.is_empty(), "`{name}` holds no documents");
        Ok(Corpus { map, name })
    }

    /// Maps all artifacts of a port.
    pub fn open_all(inputs: &[Input]) -> Result<Vec<Corpus>> {
        inputs.iter().map(|input| Corpus::open(&input.path)).collect()
    }

    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Ranges of whole lines that together are the file; they depend on the file only.
    pub fn chunks(&self) -> Vec<Range<usize>> {
        let mut chunks = Vec::new();
        let mut start = 0;
        while start < self.map.len() {
            let least = (start + CHUNK_BYTES).min(self.map.len());
            let rest = &self.map[least..];
            let end = match self.map[least - 1] {
                b'\n' => least,
                _ => {
                    rest.iter().position(|b| *b == b'\n').map_or(self.map.len(), |n| least + n + 1)
                }
            };
            chunks.push(start..end);
            start = end;
        }
        chunks
    }

    /// The lines of a chunk: their bytes, and a function that parses and checks the document.
    pub fn lines(
        &self,
        chunk: Range<usize>,
    ) -> impl Iterator<Item = (&[u8], impl FnOnce() -> Result<Document>)> {
        let base = self.map.as_ptr() as usize;
        self.map[chunk].split(|b| *b == b'\n').filter(|line| !line.trim_ascii().is_empty()).map(
            move |line| {
                let at = line.as_ptr() as usize - base;
                (line, move || self.parse(line, at))
            },
        )
    }

    fn parse(&self, line: &[u8], at: usize) -> Result<Document> {
        let place = || format!("`{}`, line {}", self.name, self.line_number(at));
        let document: Document = serde_json::from_slice(line).with_context(place)?;
        if let Some(bad) = document.bad_answer() {
            let [a, b] = bad.span;
            return Err(anyhow::anyhow!("the answer at {a}..{b} or its fact is not in the text"))
                .with_context(place);
        }
        Ok(document)
    }

    /// 1-based; only errors ask.
    fn line_number(&self, at: usize) -> usize {
        1 + self.map[..at].iter().filter(|b| **b == b'\n').count()
    }
}

/// Runs `work` where rayon uses `threads` threads.
pub fn parallel<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    Ok(pool.context("cannot start threads")?.install(work))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(text: &str) -> Corpus {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Corpus::open(file.path()).unwrap()
    }

    #[test]
    fn chunks_are_whole_lines_and_lose_nothing() {
        let line = format!("{{\"text\":\"{}\"}}\n", "x".repeat(300_000));
        let mut text = line.repeat(9);
        text.pop();
        let corpus = corpus(&text);
        let chunks = corpus.chunks();
        assert_eq!(chunks.len(), 3);
        assert_eq!(chunks.last().unwrap().end, text.len());
        let documents = chunks.into_iter().flat_map(|chunk| corpus.lines(chunk));
        assert_eq!(
            documents.map(|(_, parse)| parse().unwrap().text.len()).sum::<usize>(),
            2_700_000
        );
    }

    #[test]
    fn errors_name_the_line() {
        let text = "{\"text\":\"ab\"}\n{\"text\":\"ab\",\"answers\":[{\"span\":[1,9],\"fact_span\":[0,1],\"candidates\":2}]}\n{";
        let corpus = corpus(text);
        let errors: Vec<String> = corpus
            .lines(0..text.len())
            .filter_map(|(_, parse)| parse().err())
            .map(|error| format!("{error:#}"))
            .collect();
        assert_eq!(errors.len(), 2);
        assert!(errors[0].contains("line 2: the answer at 1..9"), "{}", errors[0]);
        assert!(errors[1].contains("line 3"), "{}", errors[1]);
    }
}
