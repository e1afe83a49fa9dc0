//! One safetensors file as a checkpoint. Knows no directory.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use engine::tensors::Tensors;
use safetensors::Dtype;

use super::{Checkpoint, Stored, TensorInfo, decode};

/// An open safetensors file.
pub struct SafetensorsFile {
    tensors: Tensors,
    infos: BTreeMap<String, TensorInfo>,
}

impl SafetensorsFile {
    /// Maps and validates the file at `path`.
    pub fn open(path: &Path) -> Result<SafetensorsFile> {
        let tensors = Tensors::open(path)?;
        let info = |name: &str| {
            let view = tensors.get(name)?;
            let info = TensorInfo { shape: view.shape.to_vec(), stored: stored(view.dtype) };
            Some((name.to_string(), info))
        };
        let infos = tensors.names().filter_map(info).collect();
        Ok(SafetensorsFile { tensors, infos })
    }
}

fn stored(dtype: Dtype) -> Stored {
    match dtype {
        Dtype::F32 => Stored::F32,
        Dtype::F16 => Stored::F16,
        Dtype::BF16 => Stored::BF16,
        Dtype::F64 => Stored::F64,
        other => Stored::Other(format!("{other:?}")),
    }
}

impl Checkpoint for SafetensorsFile {
    fn names(&self) -> Vec<&str> {
        self.infos.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos.get(name)
    }

    fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let (Some(info), Some(view)) = (self.infos.get(name), self.tensors.get(name)) else {
            bail!("tensor `{name}` is missing")
        };
        decode(name, info, view.bytes, out)
    }

    fn plain(&self, name: &str) -> Option<(Dtype, &[u8])> {
        let view = self.tensors.get(name)?;
        Some((self.infos.get(name)?.stored.plain()?, view.bytes))
    }
}
