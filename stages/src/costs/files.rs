//! Bytes of files before they are written.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::sizes::block;
use crate::models::file::Spec;
use crate::models::params::FileTensor;
use crate::models::{Config, Model};

/// Bytes of what [`Writer`](crate::models::file::Writer) writes for these tensors and this metadata.
pub fn tensors(specs: &[Spec], metadata: &[(&str, String)]) -> u64 {
    let mut order: Vec<&Spec> = specs.iter().collect();
    order.sort_by_key(|(name, dtype, _)| (std::cmp::Reverse(dtype.bitsize()), name));
    let mut header = Map::new();
    if !metadata.is_empty() {
        let metadata: BTreeMap<&str, &String> = metadata.iter().map(|(k, v)| (*k, v)).collect();
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut end = 0u64;
    for (name, dtype, shape) in order {
        let start = end;
        end += shape.iter().product::<usize>() as u64 * dtype.bitsize() as u64 / 8;
        let item = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), item);
    }
    let text = Value::Object(header).to_string();
    8 + (text.len() as u64).next_multiple_of(8) + end
}

/// Bytes of a model file with f32 weights.
pub fn model(config: &Config) -> Option<u64> {
    let model = Model::new(config.clone()).ok()?;
    let specs: Vec<Spec> = model.layout.files().iter().map(spec).collect();
    Some(tensors(&specs, &[("config", serde_json::to_string(config).ok()?)]))
}

/// Bytes of the file of one layer of a student: of those of its tensors that `select` picks.
pub fn layer(config: &Config, number: usize, select: impl Fn(&FileTensor) -> bool) -> Option<u64> {
    let (_, layout) = block(config, number)?;
    let specs: Vec<Spec> = layout.files().iter().filter(|file| select(file)).map(spec).collect();
    let config = serde_json::to_string(config).ok()?;
    Some(tensors(&specs, &[("config", config), ("layer", number.to_string())]))
}

fn spec(file: &FileTensor) -> Spec {
    (file.name.clone(), Dtype::F32, file.shape.clone())
}
