//! `pipe generate STEP`: continues a text.

use std::io::{IsTerminal, Read};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::json;
use stages::generate::sample::Sampler;
use stages::generate::stream::Pieces;
use stages::generate::{self as make, Spoken};
use stages::models::decode::Decoder;

use super::Wrong;
use super::speech::{Speaker, Stats, reason};
use crate::cli::Generate;
use crate::out;

pub fn generate(args: Generate) -> Result<ExitCode> {
    let prompt = prompt(args.prompt.as_deref())?;
    let speaker = Speaker::open(&args.step, &args.model, &args.speech)?;
    let tokens = match args.raw {
        true => speaker.words.encode(&prompt),
        false => speaker.words.prompt(&prompt),
    };
    let tokens = tokens.map_err(|error| Wrong(error.to_string()))?;
    if tokens.is_empty() {
        return Err(Wrong("there is no prompt to read\nhint: leave out `--raw`".into()).into());
    }
    let pieces = speaker.words.pieces(args.special)?;
    let mut decoder = Decoder::new(&speaker.model, &speaker.params.flat);
    let started = Instant::now();
    let mut nothing = Sampler::new(&speaker.sampling, 0)?;
    let logits = make::listen(&mut decoder, &tokens, &mut nothing, &|| true);
    let logits = logits.context("the prompt was not read")?.to_vec();
    let prompt_seconds = started.elapsed().as_secs_f64();
    let heard = Heard { args: &args, speaker: &speaker, pieces, tokens, logits, prompt_seconds };
    for number in 1..args.count {
        heard.sample(number, decoder.clone())?;
    }
    heard.sample(args.count, decoder)?;
    Ok(ExitCode::SUCCESS)
}

/// The text to continue.
fn prompt(given: Option<&str>) -> Result<String> {
    match given {
        None => Ok(String::new()),
        Some("-") => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
            String::from_utf8(bytes).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                Wrong(format!("the prompt on standard input is not UTF-8 (at byte {at})")).into()
            })
        }
        Some(text) => Ok(text.into()),
    }
}

/// A prompt that was read.
struct Heard<'a> {
    args: &'a Generate,
    speaker: &'a Speaker,
    pieces: Pieces<'a>,
    tokens: Vec<u32>,
    logits: Vec<f32>,
    prompt_seconds: f64,
}

impl Heard<'_> {
    /// Makes and tells the `number`-th sample.
    fn sample(&self, number: u64, mut decoder: Decoder<'_>) -> Result<()> {
        let (args, speaker) = (self.args, self.speaker);
        if number > 1 && !args.json {
            out::line(format!("--- {number} of {}", args.count));
        }
        let limits = speaker.limits(args.max_tokens, &args.speech.stop, args.endless);
        let mut sampler = Sampler::new(&speaker.sampling, number - 1)?;
        sampler.saw(&self.tokens);
        // Only JSON has the text as a whole: what is printed is not kept.
        let (mut text, mut ids, mut ends_line) = (String::new(), Vec::new(), true);
        let mut hear = |token: Option<u32>, part: &str| {
            match args.json {
                true => {
                    text.push_str(part);
                    ids.extend(token);
                }
                false if part.is_empty() => {}
                false => {
                    out::piece(part);
                    ends_line = part.ends_with('\n');
                }
            }
            true
        };
        let inside = Some(self.tokens[self.tokens.len() - 1]) != speaker.words.first;
        let started = Instant::now();
        let spoken = make::speak(
            &mut decoder,
            &self.logits,
            &mut sampler,
            (&self.pieces, inside),
            &limits,
            &mut hear,
        )?;
        let stats = Stats {
            prompt_tokens: self.tokens.len(),
            prompt_seconds: self.prompt_seconds,
            tokens: spoken.tokens,
            seconds: started.elapsed().as_secs_f64(),
            state_bytes: decoder.bytes(),
        };
        match args.json {
            true => self.json(number, &text, &ids, &spoken, &stats),
            false if !ends_line => out::line(""),
            false => {}
        }
        if args.speech.stats || std::io::stderr().is_terminal() {
            let (seed, why) = (speaker.sampling.seed, reason(&spoken.reason));
            out::message(format!("{}, seed {seed}, {why}", stats.line()));
        }
        Ok(())
    }

    fn json(&self, number: u64, text: &str, ids: &[u32], spoken: &Spoken, stats: &Stats) {
        let object = json!({
            "text": text,
            "tokens": ids,
            "prompt_tokens": stats.prompt_tokens,
            "prompt_tokens_per_second": stats.prompt_rate(),
            "tokens_per_second": stats.rate(),
            "state_bytes": stats.state_bytes,
            "stopped": reason(&spoken.reason),
            "seed": self.speaker.sampling.seed,
            "sample": number,
        });
        out::line(object.to_string());
    }
}
