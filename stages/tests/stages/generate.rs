//! Chats with real decoders: what is read turn by turn against the whole conversation at once.

use std::path::PathBuf;

use serde_json::json;
use stages::generate::about::Words;
use stages::generate::chat::Conversation;
use stages::generate::sample::{Sampler, Sampling};
use stages::generate::{Limits, listen, speak};
use stages::models::Model;
use stages::models::decode::Decoder;

use crate::decode::all;
use crate::model::{close, weights};

const VOCAB: usize = 131;

/// The bytes of ASCII as `<0x41>`, then ChatML's marks and a separator.
fn tokenizer(dir: &tempfile::TempDir) -> PathBuf {
    let marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];
    let names = (0..128).map(|byte| format!("<0x{byte:02X}>"));
    let names = names.chain(marks.iter().map(|mark| mark.to_string())).zip(0..);
    let vocab: serde_json::Map<String, serde_json::Value> =
        names.map(|(name, id): (String, u32)| (name, id.into())).collect();
    let added = marks.iter().zip(128..).map(|(mark, id)| {
        json!({"id": id, "content": mark, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true}
    });
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    path
}

#[test]
fn a_chat_read_turn_by_turn_is_the_chat_read_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = tokenizer(&dir);
    for mut config in all(None) {
        config.vocab = VOCAB;
        let words = Words::open(&path, None, VOCAB, None).unwrap();
        assert_eq!(words.ends, [129, 130]);
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let mut talk = Conversation::new(&words, None).unwrap();
        let mut decoder = Decoder::new(&model, &params.flat);
        let mut sampler = Sampler::new(&Sampling::default(), 0).unwrap();
        let pieces = words.pieces(false).unwrap();
        // `<|im_start|>` within an answer would be read, but is no text of it: here it ends one.
        let ends = [&words.ends[..], &[128]].concat();
        let limits = Limits { tokens: 9, ends, stops: Vec::new() };
        let mut whole = String::new();
        for (number, ask) in ["hello", "and?", "bye"].iter().enumerate() {
            let turn = talk.ask(ask).unwrap();
            assert_eq!(turn.afresh, number == 0);
            let before = decoder.position();
            whole += &format!("<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n");
            let logits = listen(&mut decoder, &turn.tokens, &mut sampler, &|| true).unwrap();
            let logits = logits.to_vec();
            let mut again = Decoder::new(&model, &params.flat);
            let all = words.encode(&whole).unwrap();
            assert_eq!(before + turn.tokens.len(), all.len());
            assert_eq!(decoder.position(), all.len());
            assert_eq!(before == 0, number == 0, "only what is new is read");
            close("turn by turn", &logits, again.read(&all), 1e-4);
            let (mut answer, mut tokens) = (String::new(), Vec::new());
            let mut hear = |token: Option<u32>, part: &str| {
                answer.push_str(part);
                tokens.extend(token);
                true
            };
            speak(&mut decoder, &logits, &mut sampler, (&pieces, true), &limits, &mut hear)
                .unwrap();
            whole += &format!("{answer}<|im_end|>\n");
            talk.answered(answer, &tokens, false);
        }
    }
}
