//! Readers of checkpoint files that others wrote: GGUF, safetensors, `torch.save`, llama2.c. Knows
//! names, shapes and element types; knows no model, and runs nothing that a file contains.

mod bytes;
pub mod directory;
pub mod gguf;
pub mod llama2c;
pub mod metadata;
pub mod pickle;
pub mod quant;
pub mod safetensors_file;
pub mod torch_file;
mod zip;

use anyhow::{Result, bail};
use safetensors::Dtype;

pub use bytes::Bytes;
pub use directory::Directory;
pub use gguf::Gguf;
pub use llama2c::Llama2c;
pub use quant::Quant;
pub use safetensors_file::SafetensorsFile;
pub use torch_file::TorchFile;

/// Element type as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    F32,
    F16,
    BF16,
    F64,
    /// Blocks of one of ggml's types.
    Quantised(Quant),
    /// Anything else, by name (integers, 8-bit floats): listed, but never read as weights.
    Other(String),
}

/// What a file says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Row-major, outermost dimension first. The product fits and is backed by bytes of the file.
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub stored: Stored,
}

impl TensorInfo {
    /// The number of its elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A file (or set of files) of named tensors.
pub trait Checkpoint: Send + Sync {
    /// Every tensor's name, sorted.
    fn names(&self) -> Vec<&str>;

    /// Shape and element type of tensor `name`.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// Copies tensor `name` out as f32; `out` has exactly its elements. An error if there is no
    /// such tensor, if it holds no floating-point numbers, or if `out` has another size.
    fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()>;

    /// The tensor's bytes if it is stored as plain contiguous little-endian F32, F16 or BF16 in the
    /// order that `read_f32` gives (so it can be copied without loss).
    fn plain(&self, name: &str) -> Option<(Dtype, &[u8])>;
}

impl Stored {
    /// Bytes per element of the plain types.
    fn width(&self) -> Option<usize> {
        match self {
            Stored::F16 | Stored::BF16 => Some(2),
            Stored::F32 => Some(4),
            Stored::F64 => Some(8),
            Stored::Quantised(_) | Stored::Other(_) => None,
        }
    }

    /// The type in safetensors' words, where `Checkpoint::plain` may hand it out.
    fn plain(&self) -> Option<Dtype> {
        match self {
            Stored::F32 => Some(Dtype::F32),
            Stored::F16 => Some(Dtype::F16),
            Stored::BF16 => Some(Dtype::BF16),
            _ => None,
        }
    }

    /// What to call it in a message.
    pub fn name(&self) -> &str {
        match self {
            Stored::F32 => "F32",
            Stored::F16 => "F16",
            Stored::BF16 => "BF16",
            Stored::F64 => "F64",
            Stored::Quantised(quant) => quant.name(),
            Stored::Other(name) => name,
        }
    }

    /// Element number `at` of `bytes`, which hold a plain type.
    fn element(&self, bytes: &[u8], at: usize) -> f32 {
        let word = |width: usize| &bytes[at * width..][..width];
        match self {
            Stored::F32 => f32::from_le_bytes(fixed(word(4))),
            Stored::F16 => half::f16::from_le_bytes(fixed(word(2))).to_f32(),
            Stored::BF16 => half::bf16::from_le_bytes(fixed(word(2))).to_f32(),
            Stored::F64 => f64::from_le_bytes(fixed(word(8))) as f32,
            Stored::Quantised(_) | Stored::Other(_) => unreachable!("no plain type"),
        }
    }
}

fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

/// The number of elements of `shape`, if it can be counted.
fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}

/// Refuses an `out` of another size than tensor `name`.
fn check_room(name: &str, info: &TensorInfo, out: &[f32]) -> Result<()> {
    if out.len() != info.elements() {
        bail!(
            "tensor `{name}` has {} elements {:?}, there is room for {}",
            info.elements(),
            info.shape,
            out.len()
        );
    }
    Ok(())
}

/// Decodes the contiguous `bytes` of tensor `name` into `out`.
fn decode(name: &str, info: &TensorInfo, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    check_room(name, info, out)?;
    match &info.stored {
        Stored::Quantised(quant) => return quant.dequantise(bytes, out),
        Stored::Other(other) => bail!("tensor `{name}` holds {other}, no weights that are read"),
        _ => {}
    }
    let width = info.stored.width().unwrap_or(1);
    if bytes.len() / width != out.len() {
        bail!("tensor `{name}` has {} bytes for {} elements", bytes.len(), out.len());
    }
    let pairs = out.iter_mut().zip(bytes.chunks_exact(width));
    match info.stored {
        Stored::F32 => pairs.for_each(|(to, b)| *to = f32::from_le_bytes(fixed(b))),
        Stored::BF16 => {
            pairs.for_each(|(to, b)| *to = half::bf16::from_le_bytes(fixed(b)).to_f32())
        }
        Stored::F16 => pairs.for_each(|(to, b)| *to = half::f16::from_le_bytes(fixed(b)).to_f32()),
        _ => pairs.for_each(|(to, b)| *to = f64::from_le_bytes(fixed(b)) as f32),
    }
    Ok(())
}

/// Puts the rows of a query or key projection from the order of adjacent pairs, in which llama2.c
/// and llama.cpp rotate (2i with 2i+1), into Hugging Face's, which rotates halves (i with
/// i + `head_dim`/2). In each head, new row c·`head_dim`/2 + i is old row 2i + c. `rows` are
/// `heads` × `head_dim` rows of any one length (1 for a bias).
pub fn unpermute_rows<T: Copy>(heads: usize, head_dim: usize, rows: &mut [T]) -> Result<()> {
    let count = heads.checked_mul(head_dim).unwrap_or(0);
    if count == 0 || !head_dim.is_multiple_of(2) || !rows.len().is_multiple_of(count) {
        bail!("{} elements are no rows of {heads} heads of {head_dim}, by pairs", rows.len());
    }
    let (width, half) = (rows.len() / count, head_dim / 2);
    if width == 0 {
        return Ok(());
    }
    for head in rows.chunks_exact_mut(head_dim * width) {
        let old = head.to_vec();
        for (row, new) in head.chunks_exact_mut(width).enumerate() {
            let from = 2 * (row % half) + row / half;
            new.copy_from_slice(&old[from * width..][..width]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_in_each_head() {
        let mut rows: Vec<u32> = (0..16).collect();
        unpermute_rows(2, 4, &mut rows).unwrap();
        assert_eq!(rows, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        let mut bias = [0u8, 1, 2, 3, 4, 5];
        unpermute_rows(1, 6, &mut bias).unwrap();
        assert_eq!(bias, [0, 2, 4, 1, 3, 5]);
    }

    #[test]
    fn what_is_no_rows_of_heads_is_refused() {
        for (heads, dim) in [(1, 3), (2, 4), (0, 4), (usize::MAX, 2)] {
            assert!(unpermute_rows(heads, dim, &mut [0u8; 6]).is_err(), "{heads} {dim}");
        }
        assert!(unpermute_rows::<u8>(2, 4, &mut []).is_ok());
    }

    #[test]
    fn room_of_another_size_is_refused() {
        let info = TensorInfo { shape: vec![2], stored: Stored::F32 };
        let text = decode("w", &info, &[0; 8], &mut [0.0; 3]).unwrap_err().to_string();
        assert_eq!(text, "tensor `w` has 2 elements [2], there is room for 3");
        assert!(decode("w", &info, &[0; 4], &mut [0.0; 2]).is_err());
        let whole = TensorInfo { shape: vec![1], stored: Stored::Other("I64".into()) };
        let text = decode("n", &whole, &[0; 8], &mut [0.0]).unwrap_err().to_string();
        assert_eq!(text, "tensor `n` holds I64, no weights that are read");
    }
}
