//! Readers of foreign files against the values that Python reads from them: `fixtures/`.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use stages::formats::llama2c::Vocabulary;
use stages::formats::metadata::{Kind, Value};
use stages::formats::{
    Checkpoint, Directory, Gguf, Llama2c, SafetensorsFile, Stored, TorchFile, unpermute_rows,
};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(name)
}

pub fn read(from: &dyn Checkpoint, name: &str) -> Vec<f32> {
    let mut out = vec![f32::NAN; from.info(name).unwrap().elements()];
    from.read_f32(name, &mut out).unwrap();
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Every tensor of `wanted` is in `found`, equal bit for bit.
fn same(found: &dyn Checkpoint, wanted: &str) {
    let wanted = SafetensorsFile::open(&fixture(wanted)).unwrap();
    assert!(!wanted.names().is_empty());
    for name in wanted.names() {
        let info = found.info(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(info.shape, wanted.info(name).unwrap().shape, "{name}");
        assert!(bits(&read(found, name)) == bits(&read(&wanted, name)), "{name}");
    }
}

#[test]
fn every_gguf_type_is_read_as_python_reads_it() {
    let found = Gguf::open(&fixture("types.gguf")).unwrap();
    same(&found, "types.safetensors");
    assert_eq!((found.version(), found.names().len()), (3, 17));
    assert_eq!(found.info("Q4_K").unwrap().stored.name(), "Q4_K");
    assert_eq!(found.info("I32").unwrap().stored, Stored::Other("I32".into()));
    assert!(found.read_f32("I32", &mut [0.0; 5]).is_err());
    assert!(found.read_f32("Q4_K", &mut [0.0; 5]).is_err());
    for (name, plain) in [("F32", true), ("F16", true), ("BF16", true), ("F64", false)] {
        assert_eq!(found.plain(name).is_some(), plain, "{name}");
    }
    assert!(found.plain("Q8_0").is_none());
}

#[test]
fn gguf_metadata_of_every_kind() {
    let found = Gguf::open(&fixture("types.gguf")).unwrap();
    let meta = found.metadata();
    let number = |name: &str| meta.u64(&format!("test.{name}"));
    assert_eq!(number("uint8").unwrap(), 200);
    assert_eq!(number("uint16").unwrap(), 60000);
    assert_eq!(meta.u32("test.uint32").unwrap(), 4_000_000_000);
    assert_eq!(meta.usize("test.uint32").unwrap(), 4_000_000_000);
    assert_eq!(number("uint64").unwrap(), u64::MAX);
    for (name, wanted) in
        [("int8", -100), ("int16", -30000), ("int32", -2_000_000_000), ("int64", i64::MIN)]
    {
        let value = meta.get(&format!("test.{name}")).unwrap();
        assert!(matches!(value, Value::Signed(found) if found == wanted), "{value:?}");
    }
    assert_eq!((meta.f32("test.float32").unwrap(), meta.f32("test.float64").unwrap()), (0.1, 0.1));
    assert!(meta.bool("test.bool").unwrap());
    assert_eq!(meta.str("test.string").unwrap(), "Grüße");
    assert_eq!(meta.strings("test.strings").unwrap(), ["a", "", "日本"]);
    assert_eq!(meta.f32s("test.floats").unwrap(), [0.5, -1.5]);
    assert_eq!(meta.i64s("test.integers").unwrap(), [1, -2, 3]);
    assert_eq!(meta.i64s("test.bytes").unwrap(), [0, 255]);
    let Value::Array(nested) = meta.get("test.nested").unwrap() else { panic!("no array") };
    assert_eq!((nested.kind, nested.len), (Kind::Array, 2));
    let inner: Vec<usize> = nested
        .iter()
        .map(|item| match item.unwrap() {
            Value::Array(inner) => inner.iter().count(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(inner, [2, 1]);
    assert!(meta.has("general.architecture") && meta.keys().any(|key| key == "test.truths"));
}

#[test]
fn metadata_of_another_kind_say_what_they_are() {
    let found = Gguf::open(&fixture("types.gguf")).unwrap();
    let meta = found.metadata();
    let text = |error: anyhow::Error| format!("{error:#}");
    assert_eq!(
        text(meta.u32("test.string").unwrap_err()),
        "metadata `test.string` is the text \"Grüße\", wanted an unsigned integer"
    );
    assert_eq!(
        text(meta.u64("test.int8").unwrap_err()),
        "metadata `test.int8` is -100, wanted an unsigned integer"
    );
    assert!(text(meta.u32("test.uint64").unwrap_err()).contains("is 18446744073709551615"));
    assert_eq!(text(meta.str("x.y").unwrap_err()), "the file's metadata has no `x.y`");
    assert!(text(meta.strings("test.nested").unwrap_err()).contains("an array of Array"));
    assert!(text(meta.f32s("test.bool").unwrap_err()).contains("is true, wanted an array"));
    assert!(meta.f32("test.uint8").is_err() && meta.bool("test.uint8").is_err());
}

#[test]
fn torch_files_are_read_as_python_reads_them() {
    for name in ["torch.bin", "torch4.bin"] {
        let found = TorchFile::open(&fixture(name)).unwrap();
        same(&found, "torch.safetensors");
        assert_eq!(found.names().len(), 13);
        assert_eq!(found.info("count").unwrap().stored, Stored::Other("I64".into()));
        assert!(found.read_f32("count", &mut [0.0]).is_err());
        let base = found.plain("f32").unwrap().1;
        assert_eq!(found.plain("shared").unwrap(), (Dtype::F32, &base[24..72]));
        assert!(found.plain("transposed").is_none() && found.plain("column").is_none());
        assert_eq!(found.plain("bf16").unwrap().1.len(), 30);
    }
    let module = TorchFile::open(&fixture("module.bin")).unwrap();
    assert_eq!(module.names(), ["bias", "weight"]);
    same(&module, "module.safetensors");
}

#[test]
fn torch_files_with_more_than_tensors_are_refused() {
    let error = |name: &str| format!("{:#}", TorchFile::open(&fixture(name)).err().unwrap());
    let text = error("call.bin");
    assert!(text.contains("wants `posix.getcwd`; only dicts of plain tensors"), "{text}");
    assert!(error("legacy.bin").contains("torch before 1.6"));
    let text = error("expanded.bin");
    assert!(text.contains("tensor `big`") && text.contains("do not fit"), "{text}");
    let mut bytes = std::fs::read(fixture("torch.bin")).unwrap();
    let at = bytes.windows(6).position(|word| word == b"little").unwrap();
    bytes[at..at + 6].copy_from_slice(b"biggie");
    let text = TorchFile::from_bytes(bytes.into()).err().unwrap().to_string();
    assert!(text.contains("not little-endian"), "{text}");
}

/// A directory with `files` copied (or linked) from the fixtures.
fn directory(files: &[(&str, &str)], link: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in files {
        let to = dir.path().join(to);
        match link {
            true => std::os::unix::fs::symlink(fixture(from), to).unwrap(),
            false => drop(std::fs::copy(fixture(from), to).unwrap()),
        }
    }
    dir
}

const SHARDS: [(&str, &str); 3] = [
    ("shards/model.safetensors.index.json", "model.safetensors.index.json"),
    ("shards/model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    ("shards/model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors"),
];

#[test]
fn shards_are_one_checkpoint() {
    let linked = directory(&SHARDS, true);
    for dir in [fixture("shards"), linked.path().to_path_buf()] {
        let found = Directory::open(&dir).unwrap();
        assert_eq!(found.names(), ["a", "b", "c"]);
        assert_eq!(read(&found, "a"), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!((read(&found, "b"), read(&found, "c")), (vec![1.0; 4], vec![0.5; 3]));
        assert_eq!(found.plain("c").unwrap(), (Dtype::F16, &[0, 0x38, 0, 0x38, 0, 0x38][..]));
        assert_eq!(found.info("b").unwrap().stored, Stored::BF16);
        assert_eq!(found.files().len(), 3);
        assert!(found.info("d").is_none() && found.read_f32("d", &mut []).is_err());
    }
}

#[test]
fn a_directory_prefers_safetensors_to_pickles() {
    let both = [("module.safetensors", "model.safetensors"), ("torch.bin", "pytorch_model.bin")];
    let found = Directory::open(directory(&both, true).path()).unwrap();
    assert_eq!(found.names(), ["bias", "weight"]);
    let found = Directory::open(directory(&both[1..], true).path()).unwrap();
    same(&found, "torch.safetensors");
    // Pickles in shards.
    let dir = directory(&[("module.bin", "a.bin"), ("torch.bin", "b.bin")], false);
    let torch = TorchFile::open(&fixture("torch.bin")).unwrap();
    let mut map: serde_json::Map<String, serde_json::Value> =
        torch.names().iter().map(|name| (name.to_string(), "b.bin".into())).collect();
    map.extend(["bias", "weight"].map(|name| (name.to_string(), "a.bin".into())));
    let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.path().join("pytorch_model.bin.index.json"), index).unwrap();
    let found = Directory::open(dir.path()).unwrap();
    assert_eq!(found.names().len(), 15);
    same(&found, "torch.safetensors");
    same(&found, "module.safetensors");
}

#[test]
fn shards_and_index_must_agree() {
    let error = |edit: fn(&str) -> String, files: &[(&str, &str)]| {
        let dir = directory(files, false);
        let path = dir.path().join(SHARDS[0].1);
        let text = std::fs::read_to_string(fixture(SHARDS[0].0)).unwrap();
        std::fs::write(path, edit(&text)).unwrap();
        format!("{:#}", Directory::open(dir.path()).err().unwrap())
    };
    let text = error(|text| text.replace("\"c\"", "\"d\""), &SHARDS);
    assert!(text.contains("shard model-00002-of-00002.safetensors: it has tensor `c`"), "{text}");
    let text = error(
        |text| {
            text.replace(
                "{\n    \"a\"",
                "{\n    \"e\": \"model-00001-of-00002.safetensors\",\n    \"a\"",
            )
        },
        &SHARDS,
    );
    assert!(text.contains("00001-of-00002.safetensors: it lacks tensor `e`"), "{text}");
    let text = error(|text| text.replace("\"b\": \"model-00001", "\"b\": \"model-00002"), &SHARDS);
    assert!(text.contains("it has tensor `b`, which the index puts into model-00002"), "{text}");
    let text = error(str::to_string, &SHARDS[..2]);
    assert!(text.contains("shard model-00002-of-00002.safetensors: cannot open"), "{text}");
    let text = error(|text| text.replace("model-00002", "../model-00002"), &SHARDS);
    assert!(text.contains("which is no plain file name"), "{text}");
    let dangling = directory(&[("nowhere", "model.safetensors"), SHARDS[0]], true);
    assert!(Directory::open(dangling.path()).is_err());
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn the_smallest_real_llama2c_model() {
    let Some(data) = std::env::var_os("PIPE_TEST_DATA") else {
        return eprintln!("skipped: PIPE_TEST_DATA is not set");
    };
    let dir = Path::new(&data).join("teacher-tiny");
    let model = Llama2c::open(&dir.join("stories260K.bin")).unwrap();
    let header = model.header().clone();
    assert_eq!((header.dim, header.hidden_dim, header.layers, header.vocab), (64, 172, 5, 512));
    assert!(header.shared_head && (header.heads, header.kv_heads) == (8, 4));
    assert_eq!(model.names().len(), 2 + 5 * 9);
    // Final norms of trained models are no zeros, and the file's own first bytes are the embedding.
    assert!(read(&model, "model.norm.weight").iter().all(|w| (0.5..20.0).contains(w)));
    let bytes = std::fs::read(dir.join("stories260K.bin")).unwrap();
    let float = |at: usize| f32::from_le_bytes(bytes[28 + at * 4..][..4].try_into().unwrap());
    assert_eq!(read(&model, "model.embed_tokens.weight")[512 * 64 - 1], float(512 * 64 - 1));
    let start = 512 * 64 + 5 * 64 + 64 * 64;
    let mut query: Vec<f32> = (start..start + 64 * 64).map(float).collect();
    unpermute_rows(8, 8, &mut query).unwrap();
    assert_eq!(read(&model, "model.layers.1.self_attn.q_proj.weight"), query);
    let vocabulary = Vocabulary::open(&dir.join("tok512.bin"), 512).unwrap();
    let longest = vocabulary.tokens.iter().map(|(_, token)| token.len()).max();
    assert_eq!(
        (longest, &*vocabulary.tokens[13].1),
        (Some(vocabulary.max_token_length), &b"<0x0A>"[..])
    );
    assert!(Vocabulary::open(&dir.join("tok512.bin"), 511).is_err());
}
