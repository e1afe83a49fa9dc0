//! llama2.c's first file format (`export.py --version 0`) under Hugging Face's names, and its
//! tokenizer file. Knows the order of the tensors; knows no model.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use safetensors::Dtype;

use super::bytes::{Bytes, Cursor};
use super::{Checkpoint, Stored, TensorInfo, decode, unpermute_rows};

/// Bytes of the header: seven numbers.
const HEADER: usize = 28;

/// The head of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Width of the residual stream.
    pub dim: usize,
    /// Width between the two matrices of the feed-forward.
    pub hidden_dim: usize,
    pub layers: usize,
    /// Query heads of `dim / heads` each.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    pub vocab: usize,
    /// Positions it was trained for.
    pub seq_len: usize,
    /// Whether the output head is the embedding.
    pub shared_head: bool,
}

/// An open llama2.c model.
pub struct Llama2c {
    bytes: Bytes,
    header: Header,
    tensors: BTreeMap<String, Placed>,
}

struct Placed {
    info: TensorInfo,
    range: Range<usize>,
    /// Heads whose rows are in pairs in the file.
    paired: Option<usize>,
}

/// A run of one tensor per layer (or one for the model): name after the layer's, rows, columns.
struct Run {
    name: &'static str,
    per_layer: bool,
    shape: Vec<usize>,
    paired: Option<usize>,
}

impl Header {
    fn read(bytes: &[u8]) -> Result<Header> {
        let mut cursor = Cursor::new(bytes, 0);
        if bytes.starts_with(b"24ka") {
            bail!("llama2.c's later formats are not read; export with `--version 0`");
        }
        let mut numbers = [0usize; 7];
        let mut negative = false;
        for (i, number) in numbers.iter_mut().enumerate() {
            let found = cursor.i32().context("the header of a llama2.c file")?;
            if found == 0 || (found < 0 && i != 5) {
                bail!("this is no llama2.c file: number {i} of its header is {found}");
            }
            negative |= found < 0;
            *number = found.unsigned_abs() as usize;
        }
        let [dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len] = numbers;
        let shared_head = !negative;
        let header =
            Header { dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len, shared_head };
        let head_dim = dim / heads;
        if dim % heads != 0 || head_dim % 2 != 0 || head_dim == 0 || heads % kv_heads != 0 {
            bail!("this is no llama2.c file: its heads do not divide its width: {header:?}");
        }
        Ok(header)
    }

    /// Size of one head.
    pub fn head_dim(&self) -> usize {
        self.dim / self.heads
    }

    /// What the file holds, in its order. The two tables of the rotation have no name.
    fn runs(&self) -> Vec<Run> {
        let (dim, kv) = (self.dim, self.kv_heads * self.head_dim());
        let layer = |name, shape: &[usize]| Run {
            name,
            per_layer: true,
            shape: shape.to_vec(),
            paired: None,
        };
        let model = |name, shape: &[usize]| Run { per_layer: false, ..layer(name, shape) };
        let paired = |heads, run| Run { paired: Some(heads), ..run };
        let table = [self.seq_len, self.head_dim() / 2];
        let mut runs = vec![
            model("model.embed_tokens.weight", &[self.vocab, dim]),
            layer("input_layernorm.weight", &[dim]),
            paired(self.heads, layer("self_attn.q_proj.weight", &[dim, dim])),
            paired(self.kv_heads, layer("self_attn.k_proj.weight", &[kv, dim])),
            layer("self_attn.v_proj.weight", &[kv, dim]),
            layer("self_attn.o_proj.weight", &[dim, dim]),
            layer("post_attention_layernorm.weight", &[dim]),
            layer("mlp.gate_proj.weight", &[self.hidden_dim, dim]),
            layer("mlp.down_proj.weight", &[dim, self.hidden_dim]),
            layer("mlp.up_proj.weight", &[self.hidden_dim, dim]),
            model("model.norm.weight", &[dim]),
            model("", &table),
            model("", &table),
        ];
        if !self.shared_head {
            runs.push(model("lm_head.weight", &[self.vocab, dim]));
        }
        runs
    }
}

impl Llama2c {
    /// Maps and checks the file at `path`, which must have exactly the size its header asks for.
    pub fn open(path: &Path) -> Result<Llama2c> {
        Llama2c::from_bytes(Bytes::map(path)?).with_context(|| path.display().to_string())
    }

    /// The same from bytes.
    pub fn from_bytes(bytes: Bytes) -> Result<Llama2c> {
        let header = Header::read(&bytes)?;
        let runs = header.runs();
        // Three numbers below 2^31 each; the sum of their products needs less than 100 bits.
        let size = |run: &Run| run.shape.iter().map(|&n| n as u128).product::<u128>() * 4;
        let copies = |run: &Run| if run.per_layer { header.layers } else { 1 };
        let wanted: u128 =
            HEADER as u128 + runs.iter().map(|run| size(run) * copies(run) as u128).sum::<u128>();
        if wanted != bytes.len() as u128 {
            bail!(
                "a llama2.c file with this header has {wanted} bytes, this one {}: {header:?}",
                bytes.len()
            );
        }
        let (mut tensors, mut start) = (BTreeMap::new(), HEADER);
        for run in &runs {
            for layer in 0..copies(run) {
                let range = start..start + size(run) as usize;
                start = range.end;
                let name = match run.per_layer {
                    true => format!("model.layers.{layer}.{}", run.name),
                    false => run.name.to_string(),
                };
                let info = TensorInfo { shape: run.shape.clone(), stored: Stored::F32 };
                tensors.insert(name, Placed { info, range, paired: run.paired });
            }
        }
        tensors.remove("");
        Ok(Llama2c { bytes, header, tensors })
    }

    /// The file's header.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Checkpoint for Llama2c {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|placed| &placed.info)
    }

    fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let Some(placed) = self.tensors.get(name) else { bail!("tensor `{name}` is missing") };
        decode(name, &placed.info, &self.bytes[placed.range.clone()], out)?;
        match placed.paired {
            Some(heads) => unpermute_rows(heads, self.header.head_dim(), out),
            None => Ok(()),
        }
    }

    /// None for query and key projections, whose rows are put into another order.
    fn plain(&self, name: &str) -> Option<(Dtype, &[u8])> {
        let placed = self.tensors.get(name).filter(|placed| placed.paired.is_none())?;
        Some((Dtype::F32, &self.bytes[placed.range.clone()]))
    }
}

/// llama2.c's tokenizer file (`tok512.bin`).
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// The longest token, in bytes, as the file says.
    pub max_token_length: usize,
    /// By id: the score by which merges are ranked, and the bytes.
    pub tokens: Vec<(f32, Vec<u8>)>,
}

impl Vocabulary {
    /// Reads the file at `path`, which must hold exactly `vocab` tokens.
    pub fn open(path: &Path, vocab: usize) -> Result<Vocabulary> {
        Vocabulary::from_bytes(&Bytes::map(path)?, vocab)
            .with_context(|| path.display().to_string())
    }

    /// The same from bytes.
    pub fn from_bytes(bytes: &[u8], vocab: usize) -> Result<Vocabulary> {
        let mut cursor = Cursor::new(bytes, 0);
        let max = cursor.i32().context("the longest token's length")?;
        let max_token_length = usize::try_from(max).context("the longest token's length")?;
        let mut tokens = Vec::new();
        for id in 0..vocab {
            let token = token(&mut cursor, max_token_length);
            tokens.push(token.with_context(|| format!("token {id} of {vocab}"))?);
        }
        if cursor.at() != bytes.len() {
            bail!("{vocab} tokens take {} bytes, the file has {}", cursor.at(), bytes.len());
        }
        Ok(Vocabulary { max_token_length, tokens })
    }
}

fn token(cursor: &mut Cursor, max: usize) -> Result<(f32, Vec<u8>)> {
    let (score, length) = (cursor.f32()?, cursor.i32()?);
    match u64::try_from(length) {
        Ok(size) if size <= max as u64 => Ok((score, cursor.take(size)?.to_vec())),
        _ => bail!("it has {length} bytes, the longest {max}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file whose element number i is i; dim 8, 2 heads of 4, 1 key-value head, 2 layers.
    fn file(vocab: i32, extra: usize) -> Bytes {
        let mut bytes: Vec<u8> =
            [8, 3, 2, 2, 1, vocab, 5].into_iter().flat_map(i32::to_le_bytes).collect();
        let layer = 8 + 64 + 32 + 32 + 64 + 8 + 24 * 3;
        let floats = 7 * 8 + 2 * layer + 8 + 2 * 5 * 2 + extra;
        bytes.extend((0..floats).flat_map(|i| (i as f32).to_le_bytes()));
        bytes.into()
    }

    fn read(model: &Llama2c, name: &str) -> Vec<f32> {
        let mut out = vec![0.0; model.info(name).unwrap().elements()];
        model.read_f32(name, &mut out).unwrap();
        out
    }

    #[test]
    fn tensors_lie_where_the_format_says() {
        let model = Llama2c::from_bytes(file(7, 0)).unwrap();
        assert_eq!(model.names().len(), 2 + 2 * 9);
        assert_eq!(model.header().head_dim(), 4);
        assert_eq!(read(&model, "model.embed_tokens.weight")[55], 55.0);
        assert_eq!(read(&model, "model.layers.1.input_layernorm.weight")[0], 56.0 + 8.0);
        // The second layer's queries: head 1, row 1 is its third row in the file.
        let start = 56 + 16 + 64;
        let query = read(&model, "model.layers.1.self_attn.q_proj.weight");
        assert_eq!(query[5 * 8], (start + 6 * 8) as f32);
        assert!(model.plain("model.layers.1.self_attn.q_proj.weight").is_none());
        let (_, bytes) = model.plain("model.norm.weight").unwrap();
        let first = (56 + 2 * (8 + 64 + 32 + 32 + 64 + 8 + 72)) as f32;
        assert_eq!(bytes[..4], first.to_le_bytes());
        assert_eq!(model.info("model.layers.0.mlp.down_proj.weight").unwrap().shape, [8, 3]);
        assert!(model.info("lm_head.weight").is_none());
    }

    #[test]
    fn a_negative_vocabulary_has_a_head_of_its_own() {
        let model = Llama2c::from_bytes(file(-7, 56)).unwrap();
        assert!(!model.header().shared_head && model.header().vocab == 7);
        let last = (56 + 2 * (8 + 64 + 32 + 32 + 64 + 8 + 72) + 8 + 20 + 55) as f32;
        assert_eq!(read(&model, "lm_head.weight")[55], last);
        assert!(Llama2c::from_bytes(file(-7, 0)).is_err());
        let text = Llama2c::from_bytes(file(7, 1)).err().unwrap().to_string();
        assert!(text.contains("has 2604 bytes, this one 2608"), "{text}");
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let with = |at: usize, number: i32| {
            let mut bytes = file(7, 0).to_vec();
            bytes[at * 4..][..4].copy_from_slice(&number.to_le_bytes());
            Llama2c::from_bytes(bytes.into()).err().unwrap().to_string()
        };
        for at in 0..7 {
            with(at, i32::MAX);
            assert!(with(at, 0).contains("no llama2.c file"));
            with(at, i32::MIN);
        }
        assert!(with(3, 3).contains("heads do not divide"));
        assert!(with(0, i32::from_le_bytes(*b"24ka")).contains("--version 0"));
    }

    #[test]
    fn a_vocabulary_fills_its_file() {
        let mut bytes = 2i32.to_le_bytes().to_vec();
        for (score, token) in [(0.5f32, &b"a"[..]), (-1.0, b"bc"), (0.0, b"")] {
            bytes.extend(score.to_le_bytes());
            bytes.extend((token.len() as i32).to_le_bytes());
            bytes.extend(token);
        }
        let found = Vocabulary::from_bytes(&bytes, 3).unwrap();
        assert_eq!((found.max_token_length, &found.tokens[1]), (2, &(-1.0, b"bc".to_vec())));
        let error = |bytes: &[u8], vocab| {
            format!("{:#}", Vocabulary::from_bytes(bytes, vocab).unwrap_err())
        };
        assert_eq!(error(&bytes, 2), "2 tokens take 23 bytes, the file has 31");
        assert!(error(&bytes, usize::MAX).starts_with("token 3 of"));
        bytes[0] = 1;
        assert_eq!(error(&bytes, 3), "token 1 of 3: it has 2 bytes, the longest 1");
    }
}
