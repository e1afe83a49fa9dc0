//! A model's directory: what is read, and what is refused.

use serde_json::json;

use super::*;

fn directory(files: &[(&str, String)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn gpt2() -> Vec<(&'static str, String)> {
    vec![
        ("vocab.json", json!({"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|endoftext|>": 4}).to_string()),
        ("merges.txt", "#version: 0.2\na b\n\n".into()),
        ("added_tokens.json", json!({"  ": 5}).to_string()),
    ]
}

fn with(name: &'static str, text: impl ToString) -> Vec<(&'static str, String)> {
    let mut files = gpt2();
    files.retain(|(other, _)| *other != name);
    files.push((name, text.to_string()));
    files
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, true).unwrap().get_ids().to_vec()
}

#[track_caller]
fn refused(files: &[(&str, String)], message: &str) {
    let error = format!("{:#}", load(directory(files).path()).unwrap_err());
    assert!(error.contains(message), "{error}");
}

#[test]
fn vocabulary_and_merges_make_a_tokenizer() {
    let tokenizer = load(directory(&gpt2()).path()).unwrap();
    assert_eq!(ids(&tokenizer, "ab  a<|endoftext|> b"), [2, 5, 0, 4, 3, 1]);
    assert_eq!(tokenizer.decode(&[2, 5, 4], true).unwrap(), "ab  ");
    let config = json!({"add_bos_token": true, "bos_token": {"content": "<s>"},
        "added_tokens_decoder": {"6": {"content": "<s>", "special": true}}});
    let tokenizer = load(directory(&with(CONFIG, config)).path()).unwrap();
    assert_eq!(ids(&tokenizer, "ab<s>"), [6, 2, 6]);
}

#[test]
fn a_tokenizer_json_is_taken_as_it_is_but_cuts_nothing() {
    let tokenizer = load(directory(&gpt2()).path()).unwrap();
    let mut value: Value = serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap();
    value["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
        "stride": 0});
    let padding = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
    value["padding"] = padding;
    let again = load(directory(&[(TOKENIZER, value.to_string())]).path()).unwrap();
    assert_eq!(ids(&again, "ab  a<|endoftext|> b"), [2, 5, 0, 4, 3, 1]);

    let broken = |change: &dyn Fn(&mut Value), message: &str| {
        let mut value = value.clone();
        change(&mut value);
        refused(&[(TOKENIZER, value.to_string())], message);
    };
    broken(&|v| v["model"]["merges"][0] = json!(["ab", "ababab"]), "\"ababab\", which is no token");
    broken(&|v| v["model"]["merges"][0] = json!(["ab", "ab"]), "makes \"abab\", which is no token");
    broken(&|v| v["model"]["merges"][0] = json!("a"), "merge 0 is not of two tokens");
    broken(&|v| v["model"]["continuing_subword_prefix"] = json!("##"), "lacks the prefix \"##\"");
    broken(&|v| v["model"]["dropout"] = json!(0.1), "makes ids random");
    let template = |name: &str, text: &str| {
        json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {"a": {"id": "a", "ids": [0],
            "tokens": ["a"]}}, "single": [{"SpecialToken": {"id": name, "type_id": 0}},
            {"Sequence": {"id": text, "type_id": 0}}]})
    };
    broken(
        &|v| v["post_processor"] = template("x", "A"),
        "\"x\", of which special_tokens has no ids",
    );
    broken(&|v| v["post_processor"] = template("a", "B"), "single has no text \"B\"");
    broken(&|v| v["model"]["type"] = json!("Other"), "`tokenizer.json` in");
    refused(&[(TOKENIZER, "{".into())], "is no valid tokenizer");
}

#[test]
fn what_does_not_fit_is_refused() {
    refused(&[], "looked for `tokenizer.json`, for `vocab.json` with `merges.txt`");
    refused(&[("tokenizer.model", "x".into())], "convert it with transformers");
    refused(&with("merges.txt", "a b c"), "`merges.txt`, line 1: \"a b c\" is not two tokens");
    refused(&with("merges.txt", "b a"), "makes \"ba\", which is no token");
    refused(&with("added_tokens.json", json!({"x": 9})), "\"x\" is 9, but there are 6 tokens");
    refused(&with("added_tokens.json", json!({"x": 2})), "are both 2");
    refused(&with("added_tokens.json", json!({"a": 5})), "token \"a\" is both 0 and 5");
    refused(&with("vocab.json", json!({"a": -1})), "token \"a\" has -1, which is no id");
    refused(&with("vocab.json", "[]"), "`vocab.json` in");
    refused(&with(CONFIG, json!({"tokenizer_class": "XTokenizer"})), "how `XTokenizer` cuts words");
    let unlike = json!({"added_tokens_decoder": {"5": {"content": "y"}}});
    refused(&with(CONFIG, unlike), "token 5 is \"y\" in `tokenizer_config.json`");
    refused(&with(CONFIG, json!({"bos_token": 3})), "bos_token is neither a text nor an object");
}

#[test]
fn what_files_say_about_special_tokens() {
    let mut files = with(
        CONFIG,
        json!({"bos_token": "<|endoftext|>", "eos_token": {"content": "b"}, "pad_token": "none",
            "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}),
    );
    files.push(("config.json", json!({"eos_token_id": 4, "pad_token_id": 3}).to_string()));
    let dir = directory(&files);
    let tokenizer = load(dir.path()).unwrap();
    let found = about(dir.path(), &tokenizer).unwrap();
    let wanted = About {
        bos: Some(4),
        eos: vec![4, 1],
        pad: Some(3),
        unk: None,
        add_bos: None,
        chat_template: Some("d".into()),
    };
    assert_eq!(found, wanted);
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    put("generation_config.json", "{\"eos_token_id\": [1, 2], \"bos_token_id\": 0}");
    put("chat_template.jinja", "jinja");
    let found = about(dir.path(), &tokenizer).unwrap();
    assert_eq!((found.eos, found.chat_template), (vec![1, 2], Some("jinja".into())));
    put(CONFIG, "{\"eos_token\": \"none\"}");
    let error = about(dir.path(), &tokenizer).unwrap_err().to_string();
    assert!(error.contains("eos_token is \"none\", which the tokenizer does not have"), "{error}");
    put(CONFIG, "{}");
    put("generation_config.json", "{\"eos_token_id\": -1}");
    assert!(about(dir.path(), &tokenizer).unwrap_err().to_string().contains("no token id"));
}
