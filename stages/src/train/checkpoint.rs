//! What an interrupted training step needs to go on: f32 buffers and a few facts, bit for bit.
//!
//! One safetensors file in the checkpoint's directory. Knows buffers by name, not what they mean.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use engine::tensors::Tensors;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Serialize;
use serde::de::DeserializeOwned;

const FILE: &str = "state.safetensors";

/// Writes `buffers` and `facts` (position, counters, curve so far) into the directory `dir`.
pub fn write<F: Serialize>(dir: &Path, buffers: &[(String, &[f32])], facts: &F) -> Result<()> {
    let mut views = BTreeMap::new();
    for (name, values) in buffers {
        let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values))?;
        if views.insert(name.clone(), view).is_some() {
            bail!("checkpoint buffer `{name}` is given twice");
        }
    }
    let facts = HashMap::from([("facts".to_string(), serde_json::to_string(facts)?)]);
    let path = dir.join(FILE);
    safetensors::serialize_to_file(views, Some(facts), &path)
        .with_context(|| format!("cannot write checkpoint {}", path.display()))
}

/// A checkpoint opened for reading.
pub struct Saved {
    tensors: Tensors,
}

impl Saved {
    /// Opens what [`write`] left in `dir`.
    pub fn open(dir: &Path) -> Result<Saved> {
        Ok(Saved { tensors: Tensors::open(&dir.join(FILE))? })
    }

    /// The facts, as they were given.
    pub fn facts<F: DeserializeOwned>(&self) -> Result<F> {
        let text = self.tensors.metadata("facts").context("checkpoint has no `facts`")?;
        serde_json::from_str(text).context("checkpoint's `facts` cannot be read")
    }

    /// Copies buffer `name` into `out`, whose length must be the saved one.
    pub fn read(&self, name: &str, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.all(name, out.len())?);
        Ok(())
    }

    /// Buffer `name`, whose length must be `len`.
    pub fn all(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensors.f32(name, &[len]).context("checkpoint does not fit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let weights = [1.0f32, -0.0, f32::MIN_POSITIVE / 2.0, 0.1 + 0.2, f32::MAX];
        write(dir.path(), &[("w".into(), &weights), ("none".into(), &[])], &(7u64, 0.25)).unwrap();
        let saved = Saved::open(dir.path()).unwrap();
        assert_eq!(saved.facts::<(u64, f64)>().unwrap(), (7, 0.25));
        let mut back = [0.0; 5];
        saved.read("w", &mut back).unwrap();
        assert_eq!(back.map(f32::to_bits), weights.map(f32::to_bits));
        assert!(saved.read("w", &mut [0.0; 4]).is_err());
        assert!(saved.read("other", &mut back).is_err());
    }
}
