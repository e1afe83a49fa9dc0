//! The weights of a published directory: element types, how many files, and the bytes. Knows no
//! configuration format.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use engine::tensors::{Tensors, View};
use safetensors::Dtype;
use serde_json::json;

use crate::models::config::Config;
use crate::models::file::{Spec, Writer, read_f32};
use crate::models::model::Model;

/// The file of an unsharded model.
pub const SINGLE: &str = "model.safetensors";
/// What says which tensor is in which file.
pub const INDEX: &str = "model.safetensors.index.json";
/// Elements that are converted at a time.
const PIECE: usize = 1 << 20;

/// How weights are to be written.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// F32, BF16 or F16; `None`: as stored.
    pub dtype: Option<Dtype>,
    /// Bytes of tensors in a file, at most (a larger tensor gets a file of its own).
    pub shard_bytes: u64,
}

/// One file and its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// `model.safetensors`, or `model-00001-of-00003.safetensors`.
    pub file: String,
    /// What it holds.
    pub tensors: Vec<Spec>,
}

/// The user asked to stop.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// `f32`, `bf16` or `f16`.
pub fn parse_dtype(text: &str) -> Result<Dtype> {
    Ok(match text {
        "f32" => Dtype::F32,
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        _ => bail!("`{text}` is no element type of weights; `f32`, `bf16` and `f16` are"),
    })
}

/// What torch calls an element type: `float32`.
pub fn dtype_name(dtype: Dtype) -> Result<&'static str> {
    Ok(match dtype {
        Dtype::F32 => "float32",
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        other => bail!("weights of {other:?} are not written"),
    })
}

/// Bytes: `5GB`, `200MB`, `1GiB`, `4096`.
pub fn parse_size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        other => bail!("`{text}`: `{other}` is no unit; `KB`, `MB`, `GB`, `KiB`, `MiB`, `GiB` are"),
    };
    let wrong = || format!("`{text}` is no size\nhint: write `5GB`");
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).with_context(wrong)?;
    ensure!(bytes > 0, "a file of 0 bytes holds no tensor");
    Ok(bytes)
}

/// The structure of the model in a file that [`Model::save`] wrote; every tensor must be there, of
/// its shape and an element type of weights, and no other.
pub fn open(tensors: &Tensors) -> Result<Model> {
    let text = tensors.metadata("config").context("it has no `config` in its metadata")?;
    let config: Config = serde_json::from_str(text).context("its `config` cannot be read")?;
    let model = Model::new(config)?;
    for file in model.layout.files() {
        let name = &file.name;
        let view = tensors.get(name).with_context(|| format!("it has no tensor `{name}`"))?;
        ensure!(
            view.shape == file.shape,
            "its tensor `{name}` is {:?}, the model needs {:?}",
            view.shape,
            file.shape
        );
        dtype_name(view.dtype).with_context(|| format!("its tensor `{name}`"))?;
    }
    let known: std::collections::HashSet<&str> =
        model.layout.files().iter().map(|file| &file.name[..]).collect();
    match tensors.names().find(|name| !known.contains(name)) {
        Some(name) => bail!("it has a tensor `{name}` that its model does not"),
        None => Ok(model),
    }
}

/// The element type that most of a model has, by bytes.
pub fn main_dtype(specs: &[Spec]) -> Dtype {
    let mut bytes: BTreeMap<&'static str, (u64, Dtype)> = BTreeMap::new();
    for spec in specs {
        let name = dtype_name(spec.1).unwrap_or_default();
        bytes.entry(name).or_insert((0, spec.1)).0 += size(spec);
    }
    bytes.values().max_by_key(|(bytes, _)| *bytes).map_or(Dtype::F32, |(_, dtype)| *dtype)
}

/// All tensors of `model`, which is in `tensors`, in the model's order, as they will be written.
pub fn specs(model: &Model, tensors: &Tensors, dtype: Option<Dtype>) -> Vec<Spec> {
    let stored = |name: &str| tensors.get(name).map_or(Dtype::F32, |view| view.dtype);
    let spec = |file: &crate::models::params::FileTensor| {
        (file.name.clone(), dtype.unwrap_or_else(|| stored(&file.name)), file.shape.clone())
    };
    model.layout.files().iter().map(spec).collect()
}

/// Bytes of a tensor.
pub fn size((_, dtype, shape): &Spec) -> u64 {
    shape.iter().product::<usize>() as u64 * dtype.bitsize() as u64 / 8
}

/// Deals `specs` out to files of at most `shard_bytes`, in order.
pub fn shards(specs: Vec<Spec>, shard_bytes: u64) -> Vec<Shard> {
    let mut groups: Vec<(u64, Vec<Spec>)> = Vec::new();
    for spec in specs {
        let bytes = size(&spec);
        match groups.last_mut() {
            Some((total, group)) if bytes <= shard_bytes.saturating_sub(*total) => {
                *total += bytes;
                group.push(spec);
            }
            _ => groups.push((bytes, vec![spec])),
        }
    }
    let count = groups.len();
    let name = |i: usize| match count {
        1 => SINGLE.to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    let named = groups.into_iter().enumerate();
    named.map(|(i, (_, tensors))| Shard { file: name(i), tensors }).collect()
}

/// The text of the index over `shards`; `None` for a single file.
pub fn index(shards: &[Shard]) -> Option<String> {
    if shards.len() < 2 {
        return None;
    }
    let all = || shards.iter().flat_map(|shard| shard.tensors.iter().map(move |t| (shard, t)));
    let map: BTreeMap<&str, &str> =
        all().map(|(shard, (name, ..))| (&name[..], &shard.file[..])).collect();
    let parameters: usize = all().map(|(_, (.., shape))| shape.iter().product::<usize>()).sum();
    let bytes: u64 = all().map(|(_, spec)| size(spec)).sum();
    let index = json!({
        "metadata": {"total_parameters": parameters, "total_size": bytes},
        "weight_map": map,
    });
    Some(format!("{index:#}\n"))
}

/// Writes one file from `tensors`; `stop` is asked between pieces.
pub fn write(dir: &Path, shard: &Shard, tensors: &Tensors, stop: &dyn Fn() -> bool) -> Result<()> {
    // Without it transformers 4 takes a file for no one's.
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let mut writer = Writer::create(&dir.join(&shard.file), &shard.tensors, &metadata)?;
    let mut buffers = Buffers::default();
    for (name, dtype, _) in &shard.tensors {
        let view = tensors.get(name).with_context(|| format!("no tensor `{name}`"))?;
        let step = PIECE * view.dtype.bitsize() / 8;
        for bytes in view.bytes.chunks(step) {
            if stop() {
                bail!(Interrupted);
            }
            let piece = View { bytes, ..view };
            writer.append(name, buffers.convert(name, piece, *dtype)?)?;
        }
    }
    writer.finish()
}

/// Pieces on their way.
#[derive(Default)]
struct Buffers {
    values: Vec<f32>,
    halves: Vec<u16>,
}

impl Buffers {
    /// The bytes of `piece` as `dtype`, rounded to the nearest. A finite value that becomes
    /// infinite is an error.
    fn convert<'a>(&'a mut self, name: &str, piece: View<'a>, dtype: Dtype) -> Result<&'a [u8]> {
        if piece.dtype == dtype {
            return Ok(piece.bytes);
        }
        self.values.resize(piece.bytes.len() * 8 / piece.dtype.bitsize(), 0.0);
        read_f32(name, piece, &mut self.values)?;
        let half: fn(f32) -> (u16, bool) = match dtype {
            Dtype::F32 => return Ok(bytemuck::cast_slice(&self.values)),
            Dtype::BF16 => |v| {
                let h = half::bf16::from_f32(v);
                (h.to_bits(), h.is_infinite())
            },
            Dtype::F16 => |v| {
                let h = half::f16::from_f32(v);
                (h.to_bits(), h.is_infinite())
            },
            other => bail!("weights of {other:?} are not written"),
        };
        self.halves.clear();
        for &value in &self.values {
            let (bits, infinite) = half(value);
            if infinite && value.is_finite() {
                bail!(
                    "tensor `{name}` has the value {value}, which is too large for {}\nhint: \
                     `bf16` and `f32` hold it",
                    dtype_name(dtype)?
                );
            }
            self.halves.push(bits);
        }
        Ok(bytemuck::cast_slice(&self.halves))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, elements: usize) -> Spec {
        (name.into(), Dtype::F32, vec![elements])
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("5GB").unwrap(), 5_000_000_000);
        assert_eq!(parse_size("2KiB").unwrap(), 2048);
        assert_eq!(parse_size("17").unwrap(), 17);
        for wrong in ["", "GB", "1.5GB", "-1", "5XB", "0", "99999999999GB", "5é"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn files_are_filled_in_order_and_a_large_tensor_has_its_own() {
        let specs = vec![spec("a", 10), spec("b", 10), spec("c", 50), spec("d", 1)];
        let dealt = shards(specs.clone(), 80);
        let names: Vec<Vec<&str>> =
            dealt.iter().map(|s| s.tensors.iter().map(|t| &t.0[..]).collect()).collect();
        assert_eq!(names, [vec!["a", "b"], vec!["c"], vec!["d"]]);
        assert_eq!(dealt[2].file, "model-00003-of-00003.safetensors");
        let index: serde_json::Value = serde_json::from_str(&index(&dealt).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], 71 * 4);
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00003.safetensors");
        let one = shards(specs, u64::MAX);
        assert_eq!((one.len(), &one[0].file[..]), (1, SINGLE));
        assert_eq!(super::index(&one), None);
    }

    #[test]
    fn halves_are_rounded_and_never_become_infinite() {
        let values = [1.0f32, 1.003_906_3, -65_504.0, f32::INFINITY];
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = |bytes| View { dtype: Dtype::F32, shape: &[4], bytes };
        let mut buffers = Buffers::default();
        let bf16 = buffers.convert("w", view(&bytes), Dtype::BF16).unwrap();
        assert_eq!(bf16[..2], half::bf16::from_f32(1.0).to_le_bytes());
        assert_eq!(bf16[2..4], half::bf16::from_f32(1.003_906_3).to_le_bytes());
        assert!(buffers.convert("w", view(&bytes), Dtype::F16).is_ok());
        let large = 70_000f32.to_le_bytes();
        let error = buffers.convert("w", view(&large), Dtype::F16).unwrap_err().to_string();
        assert!(error.contains("`w`") && error.contains("70000"), "{error}");
    }
}
