//! The token that begins a document.

use anyhow::{Result, bail};
use tokenizers::Tokenizer;

/// What it is called by those who train tokenizers, most telling first.
const USUAL: [&str; 4] = ["<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>"];

/// Name and id of `wanted`, else of the first of the usual ones that the tokenizer has.
pub fn separator(tokenizer: &Tokenizer, wanted: Option<&str>) -> Result<(String, u32)> {
    let find = |name: &str| Some((name.to_string(), tokenizer.token_to_id(name)?));
    let found = match wanted {
        Some(name) => find(name),
        None => USUAL.into_iter().find_map(find),
    };
    match (found, wanted) {
        (Some(found), _) => Ok(found),
        (None, Some(name)) => bail!("the tokenizer has no token `{name}`; set `separator`"),
        (None, None) => bail!(
            "the tokenizer has none of {}; name the token that begins a document with `separator`",
            USUAL.map(|name| format!("`{name}`")).join(", ")
        ),
    }
}
