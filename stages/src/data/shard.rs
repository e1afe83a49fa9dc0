//! Token shards: fixed-length sequences of token ids in one mapped file. Knows no text.
//!
//! ```text
//! "PIPETOK1" | u32 LE length of the header | JSON header, padded with blanks to a multiple of 64
//! | sequences × seq tokens, LE, u16 (u32 when vocab > 65,536) | answers × 32 bytes, if any
//! ```
//!
//! Documents are packed: each is preceded by the separator, all are joined and cut at `seq`; what
//! is left after the last full sequence is dropped.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"PIPETOK1";
/// Magic, length and JSON together; a multiple of 64, so that tokens are aligned.
const HEAD_BYTES: usize = 256;
/// Longest header that a reader accepts.
const HEAD_BYTES_MAX: usize = 1 << 16;

/// What the file says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    vocab: u32,
    seq: u32,
    sequences: u64,
    dtype: Dtype,
    separator: u32,
    tokens: u64,
    documents: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    answers: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// How a token is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    U16,
    U32,
}

impl Dtype {
    fn of(vocab: u32) -> Dtype {
        if vocab > 1 << 16 { Dtype::U32 } else { Dtype::U16 }
    }

    fn bytes(self) -> usize {
        match self {
            Dtype::U16 => 2,
            Dtype::U32 => 4,
        }
    }
}

/// An answer of a held-out document: tokens that follow from a fact stated earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Answer {
    /// The sequence it is in.
    pub sequence: u32,
    /// Position of its first token in the sequence; at least 1.
    pub start: u32,
    /// Position after its last token.
    pub end: u32,
    /// Position of the first token of its fact, in the same sequence.
    pub fact_start: u32,
    /// Position after the last token of its fact.
    pub fact_end: u32,
    /// How many distinct answers a guesser would choose from.
    pub candidates: u32,
    /// 1 for a repeated line (copying), 0 for a fact (recall).
    pub copy: u32,
    /// The document within the shard.
    pub document: u32,
}

/// The tokens of one sequence, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens<'a> {
    /// Of a vocabulary of at most 65,536.
    U16(&'a [u16]),
    /// Of a larger one.
    U32(&'a [u32]),
}

impl Tokens<'_> {
    /// The token at `position`.
    pub fn get(&self, position: usize) -> u32 {
        match self {
            Tokens::U16(tokens) => u32::from(tokens[position]),
            Tokens::U32(tokens) => tokens[position],
        }
    }
}

/// A shard, mapped and checked.
pub struct TokenShard {
    map: Mmap,
    header: Header,
    data: usize,
}

impl TokenShard {
    /// Maps and checks the file at `path`: length, header, and that every token is below `vocab`.
    pub fn open(path: &Path) -> Result<TokenShard> {
        let wrong = || format!("{} is no valid token shard", path.display());
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let length = file.metadata().with_context(wrong)?.len();
        if length < 12 {
            return Err(anyhow::anyhow!("it ends after {length} bytes")).with_context(wrong);
        }
        // SAFETY: artifacts are immutable objects of the store, read-only on disk.
        let map = unsafe { Mmap::map(&file) }.with_context(wrong)?;
        let (header, data) = parse(&map).with_context(wrong)?;
        let shard = TokenShard { map, header, data };
        shard.check_tokens().with_context(wrong)?;
        shard.check_answers().with_context(wrong)?;
        Ok(shard)
    }

    /// Tokens of each sequence.
    pub fn seq(&self) -> usize {
        self.header.seq as usize
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.header.sequences as usize
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.header.sequences == 0
    }

    /// Size of the vocabulary; every token is below it.
    pub fn vocab(&self) -> usize {
        self.header.vocab as usize
    }

    /// The token that precedes every document.
    pub fn separator(&self) -> u32 {
        self.header.separator
    }

    /// Number of documents that were packed.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// Sequence `i` of a shard of 16-bit tokens; panics out of range, or when
    /// [`TokenShard::vocab`] is above 65,536 (then use [`TokenShard::tokens`]).
    pub fn sequence(&self, i: usize) -> &[u16] {
        match self.tokens(i) {
            Tokens::U16(tokens) => tokens,
            Tokens::U32(_) => panic!("a vocabulary of {} needs 32-bit tokens", self.vocab()),
        }
    }

    /// Sequence `i`, whatever its width; panics out of range.
    pub fn tokens(&self, i: usize) -> Tokens<'_> {
        assert!(i < self.len(), "sequence {i} of {}", self.len());
        let bytes = self.seq() * self.header.dtype.bytes();
        let raw = &self.map[self.data + i * bytes..][..bytes];
        match self.header.dtype {
            Dtype::U16 => Tokens::U16(bytemuck::cast_slice(raw)),
            Dtype::U32 => Tokens::U32(bytemuck::cast_slice(raw)),
        }
    }

    /// Copies sequence `i` to `out`, which has [`TokenShard::seq`] elements.
    pub fn copy_to(&self, i: usize, out: &mut [u32]) {
        match self.tokens(i) {
            Tokens::U16(tokens) => {
                for (to, from) in out.iter_mut().zip(tokens) {
                    *to = u32::from(*from);
                }
            }
            Tokens::U32(tokens) => out.copy_from_slice(tokens),
        }
    }

    /// The answers to score, in order of sequence; empty for plain shards.
    pub fn answers(&self) -> &[Answer] {
        let tokens = self.header.tokens as usize * self.header.dtype.bytes();
        // `parse` made sure that the records are there; tokens end on no 4-byte boundary only
        // when there are none (`finish` pads).
        match self.header.answers {
            0 => &[],
            n => {
                let start = self.data + tokens.next_multiple_of(64);
                bytemuck::cast_slice(&self.map[start..][..n as usize * size_of::<Answer>()])
            }
        }
    }

    fn check_tokens(&self) -> Result<()> {
        let bytes = self.header.tokens as usize * self.header.dtype.bytes();
        let raw = &self.map[self.data..][..bytes];
        let largest = match self.header.dtype {
            Dtype::U16 => bytemuck::cast_slice::<_, u16>(raw).iter().copied().max().map(u32::from),
            Dtype::U32 => bytemuck::cast_slice::<_, u32>(raw).iter().copied().max(),
        };
        match largest {
            Some(token) if token >= self.header.vocab => {
                bail!("token {token} is outside its vocabulary of {}", self.header.vocab)
            }
            _ => Ok(()),
        }
    }

    fn check_answers(&self) -> Result<()> {
        let seq = self.header.seq;
        for (i, a) in self.answers().iter().enumerate() {
            let inside = u64::from(a.sequence) < self.header.sequences && a.end <= seq;
            let ordered = a.fact_start < a.fact_end && a.fact_end <= a.start && a.start < a.end;
            ensure!(
                inside && ordered && a.start > 0,
                "answer {i} lies outside its sequence: {a:?}"
            );
            ensure!(a.candidates > 0, "answer {i} has no candidates");
        }
        Ok(())
    }
}

/// The header and where the tokens start; every length is compared with the file's.
fn parse(map: &[u8]) -> Result<(Header, usize)> {
    ensure!(&map[..8] == MAGIC, "it does not start with `PIPETOK1` (or was never finished)");
    let length = u32::from_le_bytes(map[8..12].try_into().expect("four bytes")) as usize;
    let data = 12 + length;
    ensure!(data <= HEAD_BYTES_MAX, "its header claims {length} bytes");
    ensure!(data <= map.len(), "its header claims {length} bytes, but the file has {}", map.len());
    ensure!(data.is_multiple_of(64), "its header ends at byte {data}, which is no multiple of 64");
    let header: Header = serde_json::from_slice(&map[12..data]).context("in its header")?;
    ensure!(header.seq > 0 && header.vocab > 0, "its header says `seq` or `vocab` 0");
    ensure!(header.separator < header.vocab, "its separator is outside its vocabulary");
    ensure!(
        header.dtype == Dtype::of(header.vocab),
        "its header says {:?} tokens for a vocabulary of {}",
        header.dtype,
        header.vocab
    );
    let tokens = header.sequences.checked_mul(u64::from(header.seq));
    ensure!(tokens == Some(header.tokens), "its header contradicts itself about its tokens");
    match expected_bytes(&header, data as u64) {
        Some(expected) if expected == map.len() as u64 => Ok((header, data)),
        Some(expected) => bail!("it has {} bytes, its header claims {expected}", map.len()),
        None => bail!("its header claims more tokens than any file holds"),
    }
}

/// Length of the whole file, or `None` when it overflows.
fn expected_bytes(header: &Header, data: u64) -> Option<u64> {
    let tokens = header.tokens.checked_mul(header.dtype.bytes() as u64)?;
    if header.answers == 0 {
        return data.checked_add(tokens);
    }
    let padded = tokens.checked_next_multiple_of(64)?;
    let answers = header.answers.checked_mul(size_of::<Answer>() as u64)?;
    data.checked_add(padded)?.checked_add(answers)
}

/// Writes a shard front to back; memory does not grow with it (but for answers).
pub struct ShardWriter {
    file: BufWriter<File>,
    path: PathBuf,
    header: Header,
    /// Tokens written of the sequence under way.
    filled: u32,
    /// Bytes of that sequence.
    partial: Vec<u8>,
    answers: Vec<Answer>,
}

impl ShardWriter {
    /// Starts the file at `path`: sequences of `seq` tokens below `vocab`, documents preceded by
    /// `separator`.
    pub fn create(path: &Path, vocab: usize, seq: usize, separator: u32) -> Result<ShardWriter> {
        let vocab = u32::try_from(vocab).context("the vocabulary is too large")?;
        let seq = u32::try_from(seq).context("the sequences are too long")?;
        ensure!(seq > 0 && separator < vocab, "a shard needs `seq` > 0 and a separator < `vocab`");
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEAD_BYTES])?;
        let header = Header {
            vocab,
            seq,
            sequences: 0,
            dtype: Dtype::of(vocab),
            separator,
            tokens: 0,
            documents: 0,
            answers: 0,
        };
        let path = path.to_path_buf();
        Ok(ShardWriter { file, path, header, filled: 0, partial: Vec::new(), answers: Vec::new() })
    }

    /// Appends the separator and the document. Returns where the document's first token went:
    /// sequence and position.
    pub fn document(&mut self, tokens: &[u32]) -> Result<(u64, u32)> {
        self.token(self.header.separator)?;
        self.header.documents += 1;
        let place = (self.header.sequences, self.filled);
        for token in tokens {
            self.token(*token)?;
        }
        Ok(place)
    }

    /// Number of full sequences so far.
    pub fn sequences(&self) -> u64 {
        self.header.sequences
    }

    /// Tokens written so far, the sequence under way included.
    pub fn written(&self) -> u64 {
        self.header.sequences * u64::from(self.header.seq) + u64::from(self.filled)
    }

    /// Remembers an answer; those of a sequence that stays unfinished are dropped.
    pub fn answer(&mut self, answer: Answer) {
        self.answers.push(answer);
    }

    fn token(&mut self, token: u32) -> Result<()> {
        ensure!(token < self.header.vocab, "token {token} ≥ vocabulary {}", self.header.vocab);
        match self.header.dtype {
            Dtype::U16 => self.partial.extend_from_slice(&(token as u16).to_le_bytes()),
            Dtype::U32 => self.partial.extend_from_slice(&token.to_le_bytes()),
        }
        self.filled += 1;
        if self.filled == self.header.seq {
            self.file.write_all(&self.partial).with_context(|| self.failed())?;
            self.partial.clear();
            self.filled = 0;
            self.header.sequences += 1;
        }
        Ok(())
    }

    /// Drops the unfinished sequence, writes answers and header. Returns the number of sequences
    /// and of answers.
    pub fn finish(mut self) -> Result<(u64, u64)> {
        let header = &mut self.header;
        header.tokens = header.sequences * u64::from(header.seq);
        self.answers.retain(|a| u64::from(a.sequence) < header.sequences);
        header.answers = self.answers.len() as u64;
        if header.answers > 0 {
            let bytes = header.tokens as usize * header.dtype.bytes();
            self.file.write_all(&vec![0; bytes.next_multiple_of(64) - bytes])?;
            self.file.write_all(bytemuck::cast_slice(&self.answers))?;
        }
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&((HEAD_BYTES - 12) as u32).to_le_bytes());
        head.extend_from_slice(&serde_json::to_vec(&self.header)?);
        ensure!(head.len() <= HEAD_BYTES, "the header of a shard outgrew its {HEAD_BYTES} bytes");
        head.resize(HEAD_BYTES, b' ');
        self.file.seek(SeekFrom::Start(0)).with_context(|| self.failed())?;
        self.file.write_all(&head).with_context(|| self.failed())?;
        self.file.flush().with_context(|| self.failed())?;
        Ok((self.header.sequences, self.header.answers))
    }

    fn failed(&self) -> String {
        format!("cannot write {}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(vocab: usize, documents: &[&[u32]], answers: &[Answer]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut writer = ShardWriter::create(file.path(), vocab, 4, 0).unwrap();
        for document in documents {
            writer.document(document).unwrap();
        }
        for answer in answers {
            writer.answer(*answer);
        }
        writer.finish().unwrap();
        file
    }

    fn error(bytes: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        format!("{:#}", TokenShard::open(file.path()).err().expect("an error"))
    }

    const ANSWER: Answer = Answer {
        sequence: 0,
        start: 2,
        end: 4,
        fact_start: 1,
        fact_end: 2,
        candidates: 3,
        copy: 0,
        document: 0,
    };

    #[test]
    fn documents_are_packed_and_cut_and_the_rest_is_dropped() {
        let file = written(512, &[&[5, 6], &[7, 8, 9], &[10]], &[]);
        let shard = TokenShard::open(file.path()).unwrap();
        assert_eq!((shard.len(), shard.seq(), shard.vocab(), shard.documents()), (2, 4, 512, 3));
        assert_eq!(shard.sequence(0), [0, 5, 6, 0]);
        assert_eq!(shard.sequence(1), [7, 8, 9, 0]);
        assert!(shard.answers().is_empty());
    }

    #[test]
    fn large_vocabularies_take_32_bits() {
        let file = written(70_000, &[&[69_999, 1, 2]], &[]);
        let shard = TokenShard::open(file.path()).unwrap();
        assert_eq!(shard.tokens(0), Tokens::U32(&[0, 69_999, 1, 2]));
        let mut out = [0; 4];
        shard.copy_to(0, &mut out);
        assert_eq!((out, shard.tokens(0).get(1)), ([0, 69_999, 1, 2], 69_999));
    }

    #[test]
    fn answers_come_back_and_those_of_a_dropped_sequence_do_not() {
        let lost = Answer { sequence: 1, ..ANSWER };
        let file = written(512, &[&[5, 6, 7, 8]], &[ANSWER, lost]);
        assert_eq!(TokenShard::open(file.path()).unwrap().answers(), [ANSWER]);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let file = written(512, &[&[5, 6, 7, 8, 9, 10, 11]], &[ANSWER]);
        let whole = std::fs::read(file.path()).unwrap();
        for length in 0..whole.len() {
            assert!(error(&whole[..length]).contains("is no valid token shard"), "at {length}");
        }
    }

    #[test]
    fn lying_headers_are_errors() {
        let file = written(512, &[&[5, 6, 7]], &[]);
        let whole = std::fs::read(file.path()).unwrap();
        let lie = |from: &str, to: &str| {
            let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let rest = &whole[at + from.len()..HEAD_BYTES];
            let mut head = [&whole[..at], to.as_bytes(), rest].concat();
            head.resize(HEAD_BYTES, b' ');
            error(&[&head, &whole[HEAD_BYTES..]].concat())
        };
        let huge = "\"sequences\":4611686018427387904";
        assert!(lie("\"sequences\":1", huge).contains("contradicts itself"));
        assert!(lie("\"sequences\":1,", "\"sequences\":2,").contains("contradicts itself"));
        assert!(lie("\"vocab\":512", "\"vocab\":6").contains("token 7 is outside"));
        assert!(lie("\"vocab\":512", "\"vocab\":99999").contains("U16 tokens"));
        assert!(lie("\"seq\":4", "\"seq\":0").contains("`seq` or `vocab` 0"));
        assert!(lie("\"vocab\"", "\"vocal\"").contains("in its header"));
        assert!(lie("PIPETOK1", "PIPETOK2").contains("PIPETOK1"));
        let mut long = whole.clone();
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(error(&long).contains("header claims"));
    }
}
