//! llama2.c's vocabulary (`tokenizer.bin`: scores and pieces) as a tokenizer that gives the same ids
//! as llama2.c's `encode` and decodes to the same text. Knows not how the file stores it.
//!
//! Ids 0 to 2 are unknown, beginning and end, 3 to 258 the bytes, the rest pieces in which a blank is a
//! blank. Text is preceded by a blank; characters that are no piece become bytes; then the adjacent
//! pair whose union has the best score is joined, the leftmost first, until there is none. The special
//! tokens are never found in text.

use anyhow::{Context as _, Result, ensure};
use tokenizers::Tokenizer;

use super::About;
use super::bpe::{self, Bpe, Kind};

/// What ids 0 to 2 are called, whatever the file has there.
pub const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
const BYTES: std::ops::Range<usize> = 3..259;

/// The tokenizer of `pieces`: score and UTF-8 of each id. Errors name the id that is wrong.
pub fn tokenizer(pieces: &[(f32, Vec<u8>)]) -> Result<Tokenizer> {
    let count = pieces.len();
    ensure!(
        count >= BYTES.end,
        "a vocabulary of {count} tokens has no room for bytes ({})",
        BYTES.end
    );
    let mut tokens: Vec<String> = SPECIAL.map(String::from).to_vec();
    for (id, (_, piece)) in pieces.iter().enumerate().skip(SPECIAL.len()) {
        let piece = std::str::from_utf8(piece);
        let piece = piece.with_context(|| format!("token {id} is no UTF-8"))?;
        let byte = id.wrapping_sub(BYTES.start);
        ensure!(
            !BYTES.contains(&id) || piece == format!("<0x{byte:02X}>"),
            "token {id} is {piece:?}, not byte {byte} (<0x{byte:02X}>)"
        );
        ensure!(!piece.is_empty(), "token {id} is empty");
        tokens.push(piece.into());
    }
    let ids = bpe::ids(&tokens)?;
    let mergeable: Vec<_> =
        (BYTES.end..count).map(|id| (id as u32, tokens[id].as_str(), pieces[id].0)).collect();
    let merges = bpe::merges_of_scores(&mergeable)?;
    let kind = Kind::Characters { blank: ' ', prefix: true };
    let unk = Some(SPECIAL[0].into());
    Bpe { ids, merges, added: Vec::new(), bos: None, unk, kind }.build()
}

/// llama2.c puts token 1 before every text, and stops at either.
pub fn about() -> About {
    About { bos: Some(1), eos: vec![2, 1], unk: Some(0), add_bos: Some(true), ..About::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(more: &[&str]) -> Vec<(f32, Vec<u8>)> {
        let mut pieces: Vec<(f32, Vec<u8>)> =
            ["<unk>", "\n<s>\n", "\n</s>\n"].map(|p| (0.0, p.into())).to_vec();
        pieces.extend((0..256).map(|byte| (0.0, format!("<0x{byte:02X}>").into())));
        pieces.extend(more.iter().enumerate().map(|(i, p)| (-(i as f32), p.as_bytes().to_vec())));
        pieces
    }

    fn refused(pieces: &[(f32, Vec<u8>)], message: &str) {
        let error = format!("{:#}", tokenizer(pieces).unwrap_err());
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn joins_the_best_and_falls_back_to_bytes() {
        let tokenizer = tokenizer(&pieces(&["ab", "bc", " a", "a", "b", "c", " "])).unwrap();
        let ids = |text: &str| tokenizer.encode_fast(text, true).unwrap().get_ids().to_vec();
        assert_eq!(ids("abc"), [265, 259, 264]);
        assert_eq!(ids("é\na"), [265, 3 + 0xC3, 3 + 0xA9, 3 + 10, 262]);
        assert_eq!(ids("<s>"), [265, 3 + 60, 3 + 115, 3 + 62]);
        assert_eq!(ids(""), [0; 0]);
        for text in ["abc", " é\n<s>▁ <0x0A>\0", "  a ", ""] {
            assert_eq!(tokenizer.decode(&ids(text), false).unwrap(), text);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        refused(&pieces(&[])[..200], "200 tokens has no room for bytes (259)");
        refused(&pieces(&["a", "a"]), "tokens 259 and 260 are both \"a\"");
        refused(&pieces(&["</s>"]), "tokens 2 and 259 are both");
        refused(&pieces(&["a", ""]), "token 260 is empty");
        let mut bad = pieces(&["a"]);
        bad[259].1 = vec![0xC3, 0x28];
        refused(&bad, "token 259 is no UTF-8");
        bad[259] = (f32::NAN, b"a".to_vec());
        refused(&bad, "score of token 259");
        bad[13].1 = b"<0x0B>".to_vec();
        refused(&bad, "token 13 is \"<0x0B>\", not byte 10 (<0x0A>)");
    }
}
