//! The vocabulary of a GGUF file, read the simplest way: trusted files only, for tests and benches.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use stages::tokenizer::gguf::Vocabulary;

/// A metadata value, as far as vocabularies have them.
enum Value {
    Number(u64),
    Text(String),
    Texts(Vec<String>),
    Numbers(Vec<u64>),
}

struct Reader(BufReader<File>);

impl Reader {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn number(&mut self, bytes: usize) -> u64 {
        let mut whole = [0; 8];
        whole[..bytes].copy_from_slice(&self.bytes(bytes));
        u64::from_le_bytes(whole)
    }

    fn text(&mut self) -> String {
        let length = self.number(8) as usize;
        String::from_utf8(self.bytes(length)).unwrap()
    }

    /// Kinds as GGUF numbers them; numbers keep their bits.
    fn value(&mut self, kind: u64) -> Value {
        match kind {
            0 | 1 | 7 => Value::Number(self.number(1)),
            2 | 3 => Value::Number(self.number(2)),
            4..=6 => Value::Number(self.number(4)),
            8 => Value::Text(self.text()),
            10..=12 => Value::Number(self.number(8)),
            9 => {
                let (kind, count) = (self.number(4), self.number(8));
                if kind == 8 {
                    return Value::Texts((0..count).map(|_| self.text()).collect());
                }
                let number = |_| match self.value(kind) {
                    Value::Number(number) => number,
                    _ => panic!("a list of lists"),
                };
                Value::Numbers((0..count).map(number).collect())
            }
            _ => panic!("value kind {kind}"),
        }
    }
}

/// Reads `tokenizer.*`.
pub fn read(path: &Path) -> Vocabulary {
    let mut reader = Reader(BufReader::new(File::open(path).unwrap()));
    assert_eq!(reader.bytes(4), b"GGUF");
    let (_, _, count) = (reader.number(4), reader.number(8), reader.number(8));
    let mut found = HashMap::new();
    for _ in 0..count {
        let (key, kind) = (reader.text(), reader.number(4));
        found.insert(key, reader.value(kind));
    }
    let mut take = |key: &str| found.remove(&format!("tokenizer.{key}"));
    let text = |value| match value {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    };
    let number = |value| match value {
        Some(Value::Number(number)) => Some(number as u32),
        _ => None,
    };
    let texts = |value| match value {
        Some(Value::Texts(texts)) => texts,
        _ => Vec::new(),
    };
    let numbers = |value| match value {
        Some(Value::Numbers(numbers)) => Some(numbers),
        _ => None,
    };
    Vocabulary {
        model: text(take("ggml.model")).unwrap(),
        pre: text(take("ggml.pre")).unwrap_or_default(),
        tokens: texts(take("ggml.tokens")),
        scores: numbers(take("ggml.scores"))
            .map(|bits| bits.into_iter().map(|bits| f32::from_bits(bits as u32)).collect()),
        kinds: numbers(take("ggml.token_type"))
            .map(|kinds| kinds.into_iter().map(|kind| kind as i32).collect()),
        merges: texts(take("ggml.merges")),
        bos: number(take("ggml.bos_token_id")),
        eos: number(take("ggml.eos_token_id")),
        unk: number(take("ggml.unknown_token_id")),
        pad: number(take("ggml.padding_token_id")),
        add_bos: number(take("ggml.add_bos_token")) == Some(1),
        add_space_prefix: number(take("ggml.add_space_prefix")) == Some(1),
        chat_template: text(take("chat_template")),
    }
}
