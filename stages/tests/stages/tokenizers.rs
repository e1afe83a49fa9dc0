//! Tokenizers made from what models ship, against ids that plain Python gave
//! (`fixtures/make_token_ids.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use stages::tokenizer::gguf::Vocabulary;
use stages::tokenizer::{cached, directory, llama2c};
use tokenizers::Tokenizer;

/// The vocabulary of a GGUF file, as the stage `teacher` reads it.
fn gguf_vocabulary(path: &Path) -> Vocabulary {
    let file = stages::formats::Gguf::open(path).unwrap();
    stages::foreign::vocabulary(&file).unwrap().unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(name: &str) -> Value {
    let path = fixture("tokenizers").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn list<T: serde::de::DeserializeOwned>(value: &Value, key: &str) -> Vec<T> {
    serde_json::from_value(value[key].clone()).unwrap()
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
}

fn pieces(small: &Value) -> Vec<(f32, Vec<u8>)> {
    let pieces: Vec<(f32, String)> = list(small, "pieces");
    pieces.into_iter().map(|(score, piece)| (score, piece.into_bytes())).collect()
}

/// The same pieces as SentencePiece and GGUF have them.
fn as_gguf(pieces: &[(f32, Vec<u8>)]) -> Vocabulary {
    let text = |piece: &[u8]| String::from_utf8(piece.to_vec()).unwrap().replace(' ', "▁");
    let mut tokens = llama2c::SPECIAL.map(String::from).to_vec();
    tokens.extend(pieces[3..].iter().map(|(_, piece)| text(piece)));
    let kind = |id| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    };
    Vocabulary {
        model: "llama".into(),
        scores: Some(pieces.iter().map(|(score, _)| *score).collect()),
        kinds: Some((0..tokens.len()).map(kind).collect()),
        tokens,
        bos: Some(1),
        add_bos: true,
        add_space_prefix: true,
        ..Vocabulary::default()
    }
}

/// What SentencePiece has other names for than llama2.c.
fn plain(text: &str) -> bool {
    !["▁", "<s>", "</s>", "<unk>"].iter().any(|odd| text.contains(odd))
}

#[test]
fn a_small_byte_level_vocabulary_gives_the_same_ids() {
    let small = json("small.json");
    let vocabulary = gguf_vocabulary(&fixture("models/gguf/tiny.gguf"));
    assert_eq!(vocabulary.tokens, list::<String>(&small, "tokens"));
    assert_eq!(vocabulary.merges, list::<String>(&small, "merges"));
    let tokenizer = vocabulary.tokenizer().unwrap();
    // What is written and read again is the same.
    let again = tokenizer.to_string(false).unwrap().parse::<Tokenizer>().unwrap();
    let texts: Vec<String> = list(&small, "texts");
    let wanted: Vec<Vec<u32>> = list(&small, "bpe_ids");
    assert!(wanted.len() >= 180);
    for (text, wanted) in texts.iter().zip(wanted) {
        assert_eq!(ids(&tokenizer, text), wanted, "{text:?}");
        assert_eq!(ids(&again, text), wanted, "{text:?}");
        assert_eq!(tokenizer.decode(&wanted, false).unwrap(), *text);
    }
    let about = vocabulary.about();
    assert_eq!((about.bos, about.eos, about.add_bos), (Some(1), vec![2], Some(false)));
    assert!(about.chat_template.unwrap().contains("<|im_start|>"));
}

#[test]
fn a_small_vocabulary_of_scores_gives_the_same_ids() {
    let small = json("small.json");
    let pieces = pieces(&small);
    let tokenizer = llama2c::tokenizer(&pieces).unwrap();
    let sentencepiece = as_gguf(&pieces).tokenizer().unwrap();
    let texts: Vec<String> = list(&small, "texts");
    let wanted: Vec<Option<Vec<u32>>> = list(&small, "piece_ids");
    for (text, wanted) in texts.iter().zip(wanted) {
        let found = ids(&tokenizer, text);
        assert_eq!(tokenizer.decode(&found, false).unwrap(), *text);
        assert!(wanted.is_none_or(|wanted| wanted == found), "{text:?}");
        if plain(text) {
            assert_eq!(ids(&sentencepiece, text), found, "{text:?}");
            assert_eq!(sentencepiece.decode(&found, false).unwrap(), *text);
        }
    }
    let with_bos = sentencepiece.encode_fast("<s>the</s>", true).unwrap();
    assert_eq!(
        (with_bos.get_ids()[..2].to_vec(), with_bos.get_ids().last()),
        (vec![1, 1], Some(&2))
    );
}

/// The documents of a file, cut as `make_token_ids.py` does.
fn documents(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.split('\n').filter(|line| !line.is_empty());
    let prose = path.parent().unwrap().ends_with("text") && path.extension().unwrap() == "jsonl";
    let mut found = Vec::new();
    for line in lines.take(2500) {
        if !prose {
            found.push(line.to_string());
            continue;
        }
        let line: Value = serde_json::from_str(line).unwrap();
        let parts = line["text"].as_str().unwrap().split("\n\n").filter(|part| !part.is_empty());
        found.extend(parts.map(String::from));
    }
    found.truncate(2500);
    found
}

/// Ids of every file's documents and of the odd texts, against the digests in `fixture`.
fn check_digests(tokenizer: Tokenizer, data: &Path, fixture: &str, odd: impl Fn(&str) -> bool) {
    let wanted: BTreeMap<String, Value> = serde_json::from_value(json(fixture)).unwrap();
    let texts: Vec<String> = list(&json("small.json"), "texts");
    let encoder = cached::Encoder::new(tokenizer, 1);
    let mut total = 0;
    for (name, wanted) in wanted {
        let documents = match name.as_str() {
            "nasty" => texts.iter().filter(|text| odd(text)).cloned().collect(),
            _ => documents(&data.join(&name)),
        };
        let (mut hasher, mut tokens) = (blake3::Hasher::new(), 0);
        for document in &documents {
            let ids = encoder.ids(document).unwrap();
            hasher.update(&(ids.len() as u32).to_le_bytes());
            for id in &ids {
                hasher.update(&id.to_le_bytes());
            }
            tokens += ids.len();
        }
        let found = (documents.len() as u64, tokens as u64, hasher.finalize().to_hex().to_string());
        let number = |key: &str| wanted[key].as_u64().unwrap();
        let digest = wanted["blake3"].as_str().unwrap();
        assert_eq!(found, (number("documents"), number("tokens"), digest.into()), "{name}");
        total += documents.len();
    }
    assert!(total >= 10_000, "{total} documents");
}

/// The folder or file that an environment variable names; says so where there is none.
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn given(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).map(PathBuf::from);
    if path.is_none() {
        eprintln!("skipped: {name} is not set");
    }
    path
}

#[test]
fn a_real_byte_level_vocabulary_gives_the_same_ids() {
    let (Some(data), Some(teacher)) = (given("PIPE_TEST_DATA"), given("PIPE_TEST_TEACHER")) else {
        return;
    };
    let vocabulary = gguf_vocabulary(&teacher);
    let tokenizer = vocabulary.tokenizer().unwrap();
    check_digests(tokenizer, &data, "smollm.json", |_| true);
}

#[test]
fn a_real_vocabulary_of_scores_gives_the_same_ids() {
    let Some(data) = given("PIPE_TEST_DATA") else { return };
    let file = std::fs::read(data.join("teacher-tiny/tok512.bin")).unwrap();
    let (mut pieces, mut rest) = (Vec::new(), &file[4..]);
    while let [a, b, c, d, e, f, g, h, tail @ ..] = rest {
        let (piece, tail) = tail.split_at(u32::from_le_bytes([*e, *f, *g, *h]) as usize);
        pieces.push((f32::from_le_bytes([*a, *b, *c, *d]), piece.to_vec()));
        rest = tail;
    }
    assert_eq!(pieces.len(), 512);
    let tokenizer = llama2c::tokenizer(&pieces).unwrap();
    check_digests(tokenizer.clone(), &data, "stories.json", |text| !text.contains('\0'));
    let sentencepiece = as_gguf(&pieces).tokenizer().unwrap();
    for document in documents(&data.join("text/books.jsonl")).iter().filter(|text| plain(text)) {
        let ids = ids(&tokenizer, document);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), *document);
        let other = sentencepiece.encode_fast(document.as_str(), true).unwrap();
        assert_eq!((other.get_ids()[0], &other.get_ids()[1..]), (1, &ids[..]));
    }
}

/// llama2.c's loop, as it stands: the best-scored adjacent pair, the leftmost of equals.
fn greedy(pieces: &[(f32, Vec<u8>)], text: &str) -> Vec<u32> {
    let id = |piece: &[u8]| pieces.iter().position(|(_, other)| other == piece).map(|id| id as u32);
    let mut ids = Vec::new();
    for character in format!(" {text}").chars().skip(usize::from(text.is_empty())) {
        let bytes = character.to_string().into_bytes();
        match id(&bytes) {
            Some(id) => ids.push(id),
            None => ids.extend(bytes.iter().map(|byte| u32::from(*byte) + 3)),
        }
    }
    loop {
        let mut best: Option<(f32, usize, u32)> = None;
        for at in 0..ids.len().saturating_sub(1) {
            let pair = [&pieces[ids[at] as usize].1[..], &pieces[ids[at + 1] as usize].1].concat();
            if let Some(id) = id(&pair) {
                let score = pieces[id as usize].0;
                if best.is_none_or(|(other, ..)| score > other) {
                    best = Some((score, at, id));
                }
            }
        }
        let Some((_, at, id)) = best else { return ids };
        ids.splice(at..at + 2, [id]);
    }
}

/// A vocabulary as SentencePiece trains it: each piece is of two earlier ones.
fn grown(joins: &[(usize, usize)]) -> Vec<(f32, Vec<u8>)> {
    let mut words: Vec<String> = ["a", "b", " "].map(String::from).to_vec();
    for (left, right) in joins {
        let word = format!("{}{}", words[left % words.len()], words[right % words.len()]);
        if !words.contains(&word) && word.len() < 40 {
            words.push(word);
        }
    }
    // Characters come last, as in SentencePiece; their scores are never asked for.
    words.rotate_left(3);
    let mut pieces = pieces(&json("small.json"));
    pieces.truncate(259);
    pieces.extend(words.into_iter().enumerate().map(|(i, word)| (-(i as f32), word.into_bytes())));
    pieces
}

/// A change of bytes: at, to.
fn changed(text: &str, changes: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    for (at, to) in changes {
        let at = at % bytes.len();
        match to % 4 {
            0 => drop(bytes.remove(at)),
            1 => bytes.insert(at, *to),
            _ => bytes[at] = *to,
        }
    }
    bytes
}

proptest! {
    #[test]
    fn scores_merge_as_llama2c_does(
        joins in prop::collection::vec((0usize..40, 0usize..40), 0..30),
        text in "[ab é]{0,60}",
    ) {
        let pieces = grown(&joins);
        let tokenizer = llama2c::tokenizer(&pieces).unwrap();
        let found = ids(&tokenizer, &text);
        prop_assert_eq!(&found, &greedy(&pieces, &text));
        prop_assert_eq!(tokenizer.decode(&found, false).unwrap(), text);
    }

    #[test]
    fn mutated_vocabularies_do_not_panic(
        model in prop::sample::select(vec!["gpt2", "llama"]),
        pre in prop::sample::select(vec!["gpt-2", "smollm", "llama-bpe", "qwen2", "x"]),
        tokens in prop::collection::vec("[ab▁<>0xF]{0,6}|<0x0[0-9]>", 0..40),
        scores in prop::option::of(prop::collection::vec(any::<f32>(), 0..40)),
        kinds in prop::option::of(prop::collection::vec(0i32..8, 0..40)),
        merges in prop::collection::vec("[ab ]{0,5}", 0..5),
        named in prop::array::uniform4(prop::option::of(0u32..50)),
        fit in any::<bool>(),
        text in any::<String>(),
    ) {
        let [bos, eos, unk, pad] = named;
        let mut vocabulary = Vocabulary {
            model: model.into(), pre: pre.into(), tokens, scores, kinds, merges, bos, eos, unk, pad,
            add_bos: bos.is_some(), add_space_prefix: true, chat_template: None,
        };
        if fit {
            vocabulary.tokens.sort();
            vocabulary.tokens.dedup();
            let count = vocabulary.tokens.len();
            if let Some(scores) = &mut vocabulary.scores { scores.resize(count, 0.0) }
            if let Some(kinds) = &mut vocabulary.kinds { kinds.resize(count, 1) }
        }
        if let Ok(tokenizer) = vocabulary.tokenizer() {
            let ids = ids(&tokenizer, &text);
            tokenizer.decode(&ids, false).unwrap();
        }
    }

    #[test]
    fn mutated_pieces_do_not_panic(
        changes in prop::collection::vec((0usize..400, "[ab ]{0,3}", any::<u8>(), any::<f32>()), 1..6),
    ) {
        let mut pieces = grown(&[(0, 1), (3, 3), (2, 3)]);
        for (at, piece, byte, score) in changes {
            let at = at % pieces.len();
            let mut piece = piece.into_bytes();
            if byte > 127 { piece.push(byte) }
            pieces[at] = (score, piece);
        }
        let _ = llama2c::tokenizer(&pieces);
    }

    #[test]
    fn mutated_files_do_not_panic(
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..4),
        which in 0usize..4,
        text in "[a-c <|>é]{0,20}",
    ) {
        let vocabulary = Vocabulary {
            model: "gpt2".into(),
            pre: "smollm".into(),
            tokens: ["<|e|>", "a", "b", "ab", "Ġ", "Ġab"].map(String::from).to_vec(),
            kinds: Some(vec![3, 1, 1, 1, 1, 1]),
            merges: ["a b", "Ġ ab"].map(String::from).to_vec(),
            bos: Some(0),
            add_bos: true,
            ..Vocabulary::default()
        };
        let whole = vocabulary.tokenizer().unwrap().to_string(false).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("tokenizer.json", &whole[..]),
            ("vocab.json", r#"{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}"#),
            ("merges.txt", "#version: 0.2\na b\n"),
            ("tokenizer_config.json", r#"{"bos_token": "<s>", "eos_token": {"content": "b"},
                "added_tokens_decoder": {"4": {"content": "<s>", "special": true, "lstrip": true}}}"#),
        ];
        for (at, (name, text)) in files.iter().enumerate().skip(usize::from(which > 0)) {
            let bytes = if at == which { changed(text, &changes) } else { text.as_bytes().to_vec() };
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        if let Ok(tokenizer) = directory::load(dir.path()) {
            let _ = directory::about(dir.path(), &tokenizer);
            if let Ok(encoding) = tokenizer.encode_fast(text, true) {
                let _ = tokenizer.decode(encoding.get_ids(), false);
            }
        }
    }
}
