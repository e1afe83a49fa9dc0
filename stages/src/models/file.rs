//! Model and signal files: safetensors with bytes that depend on the contents only. Knows no
//! training.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use engine::tensors::{Tensors, View};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::params::{FileTensor, Layout, Params};

/// Name, element type and shape of a tensor that a file will have.
pub type Spec = (String, Dtype, Vec<usize>);

/// A safetensors file whose tensors are written piece by piece, in any order: a file may be much
/// larger than memory.
pub struct Writer {
    file: File,
    tensors: BTreeMap<String, Placed>,
}

struct Placed {
    start: u64,
    len: u64,
    written: u64,
}

impl Writer {
    /// Creates the file with its header. Tensors are placed by element size (large first), then
    /// name; metadata is sorted.
    pub fn create(
        path: &Path,
        specs: &[Spec],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Writer> {
        let mut order: Vec<&Spec> = specs.iter().collect();
        order.sort_by_key(|(name, dtype, _)| (std::cmp::Reverse(dtype.bitsize()), name));
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let (mut tensors, mut end) = (BTreeMap::new(), 0u64);
        for (name, dtype, shape) in order {
            let elements = shape.iter().product::<usize>() as u64;
            let (start, len) = (end, elements * dtype.bitsize() as u64 / 8);
            end += len;
            let item = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            if header.insert(name.clone(), item).is_some() {
                bail!("tensor `{name}` is given twice");
            }
            tensors.insert(name.clone(), Placed { start, len, written: 0 });
        }
        let mut text = serde_json::to_vec(&Value::Object(header))?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let base = 8 + text.len() as u64;
        tensors.values_mut().for_each(|placed| placed.start += base);
        let create = || -> std::io::Result<File> {
            let file = File::options().write(true).create(true).truncate(true).open(path)?;
            file.write_all_at(&(text.len() as u64).to_le_bytes(), 0)?;
            file.write_all_at(&text, 8)?;
            file.set_len(base + end)?;
            Ok(file)
        };
        let file = create().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Writer { file, tensors })
    }

    /// Writes `bytes` at `offset` (in bytes) of tensor `name`.
    pub fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let Some(placed) = self.tensors.get_mut(name) else {
            bail!("no tensor `{name}` in the file")
        };
        if offset + bytes.len() as u64 > placed.len {
            bail!(
                "tensor `{name}` has {} bytes, cannot write up to {}",
                placed.len,
                offset + bytes.len() as u64
            );
        }
        self.file
            .write_all_at(bytes, placed.start + offset)
            .with_context(|| format!("cannot write tensor `{name}`"))?;
        placed.written += bytes.len() as u64;
        Ok(())
    }

    /// Writes `bytes` after what was written to `name` so far.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let at = self.tensors.get(name).map_or(0, |placed| placed.written);
        self.write_at(name, at, bytes)
    }

    /// Refuses a file of which some part was never written.
    pub fn finish(self) -> Result<()> {
        for (name, placed) in &self.tensors {
            if placed.written != placed.len {
                bail!("tensor `{name}` has {} of {} bytes", placed.written, placed.len);
            }
        }
        Ok(())
    }
}

/// Writes the selected tensors of `params` as f32 under their published names.
pub fn save(
    path: &Path,
    params: &Params,
    metadata: &BTreeMap<String, String>,
    select: impl Fn(&FileTensor) -> bool,
) -> Result<()> {
    let chosen: Vec<_> = params.layout().files().iter().filter(|file| select(file)).collect();
    let specs: Vec<Spec> =
        chosen.iter().map(|file| (file.name.clone(), Dtype::F32, file.shape.clone())).collect();
    let mut writer = Writer::create(path, &specs, metadata)?;
    for file in chosen {
        writer.append(&file.name, bytemuck::cast_slice(&params.flat[file.range.clone()]))?;
    }
    writer.finish()
}

/// Whether every selected tensor of `layout` is there with its shape.
pub fn check(
    layout: &Layout,
    tensors: &Tensors,
    select: impl Fn(&FileTensor) -> bool,
) -> Result<()> {
    for file in layout.files().iter().filter(|file| select(file)) {
        let Some(view) = tensors.get(&file.name) else {
            bail!("tensor `{}` is missing", file.name)
        };
        if view.shape != file.shape {
            bail!("tensor `{}` is {:?}, the model needs {:?}", file.name, view.shape, file.shape);
        }
    }
    Ok(())
}

/// Reads the selected tensors into `params`; every one must be there with its shape, as f32, bf16
/// or f16.
pub fn load(
    params: &mut Params,
    tensors: &Tensors,
    select: impl Fn(&FileTensor) -> bool,
) -> Result<()> {
    let layout = params.layout().clone();
    check(&layout, tensors, &select)?;
    for file in layout.files().iter().filter(|file| select(file)) {
        let view = tensors.get(&file.name).expect("checked above");
        read_f32(&file.name, view, &mut params.flat[file.range.clone()])?;
    }
    Ok(())
}

/// Copies a tensor of f32, bf16 or f16 out as f32.
pub fn read_f32(name: &str, view: View, out: &mut [f32]) -> Result<()> {
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match view.dtype {
        Dtype::F32 => {
            for (to, b) in out.iter_mut().zip(view.bytes.chunks_exact(4)) {
                *to = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Dtype::BF16 => {
            for (to, b) in out.iter_mut().zip(view.bytes.chunks_exact(2)) {
                *to = half::bf16::from_bits(half(b)).to_f32();
            }
        }
        Dtype::F16 => {
            for (to, b) in out.iter_mut().zip(view.bytes.chunks_exact(2)) {
                *to = half::f16::from_bits(half(b)).to_f32();
            }
        }
        other => bail!("tensor `{name}` is {other:?}; only F32, BF16 and F16 weights are read"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_make_a_valid_file_with_fixed_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let specs =
            [("b".to_string(), Dtype::U16, vec![3]), ("a".to_string(), Dtype::F32, vec![2, 2])];
        let metadata = BTreeMap::from([("config".into(), "{}".into()), ("a".into(), "x".into())]);
        let write = |name: &str, swap: bool| {
            let path = dir.path().join(name);
            let mut writer = Writer::create(&path, &specs, &metadata).unwrap();
            let halves = [(0u64, [1f32, 2.0]), (8, [3.0, 4.0])];
            for i in if swap { [1, 0] } else { [0, 1] } {
                let (at, values) = halves[i];
                writer.write_at("a", at, bytemuck::cast_slice(&values)).unwrap();
            }
            writer.append("b", &[7, 0]).unwrap();
            writer.append("b", &[8, 0, 9, 0]).unwrap();
            writer.finish().unwrap();
            path
        };
        let (one, two) = (write("one", false), write("two", true));
        assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
        let tensors = Tensors::open(&one).unwrap();
        assert_eq!(tensors.f32("a", &[2, 2]).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(tensors.get("b").unwrap().bytes, [7, 0, 8, 0, 9, 0]);
        assert_eq!(tensors.metadata("a"), Some("x"));
    }

    #[test]
    fn an_unwritten_part_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let specs = [("a".to_string(), Dtype::F32, vec![2])];
        let path = dir.path().join("x");
        let mut writer = Writer::create(&path, &specs, &BTreeMap::new()).unwrap();
        writer.append("a", &[0; 4]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("4 of 8"));
    }
}
