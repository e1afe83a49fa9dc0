//! `pipe chat STEP`: a conversation, line by line. The model reads of every turn only what is new.

use std::io::{BufRead, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result};
use signal_hook::consts::SIGINT;
use stages::generate::chat::Conversation;
use stages::generate::sample::Sampler;
use stages::generate::stream::Pieces;
use stages::generate::{self as make, Limits, Reason};
use stages::models::decode::Decoder;

use super::Wrong;
use super::speech::{Speaker, Stats, reason};
use crate::cli::Chat;
use crate::out;

/// Longest turn, in bytes: far beyond what is typed, so that no endless line fills the memory.
const LONGEST: u64 = 16 << 20;

pub fn chat(args: Chat) -> Result<ExitCode> {
    let speaker = Speaker::open(&args.step, &args.model, &args.speech)?;
    let talk = Conversation::new(&speaker.words, args.system.clone())?;
    let mut stops = args.speech.stop.clone();
    stops.extend(talk.stops().iter().map(|stop| stop.to_string()));
    let mut room = Room {
        decoder: Decoder::new(&speaker.model, &speaker.params.flat),
        sampler: Sampler::new(&speaker.sampling, 0)?,
        pieces: speaker.words.pieces(false)?,
        limits: speaker.limits(args.max_tokens, &stops, false),
        interrupt: Interrupt::listen()?,
        stats: args.speech.stats || std::io::stderr().is_terminal(),
        speaker: &speaker,
        talk,
    };
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    loop {
        if terminal {
            out::piece("> ");
        }
        let Some(line) = line()? else { break };
        match line.trim() {
            "" => {}
            "/exit" => return Ok(ExitCode::SUCCESS),
            "/reset" => room.reset(),
            text => room.turn(text)?,
        }
    }
    if terminal {
        out::line("");
    }
    Ok(ExitCode::SUCCESS)
}

/// The next line of standard input.
fn line() -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let mut stdin = std::io::Read::take(std::io::stdin().lock(), LONGEST);
    let read = stdin.read_until(b'\n', &mut bytes).context("cannot read standard input")?;
    if read as u64 == LONGEST {
        return Err(Wrong("a line on standard input is longer than 16 MB".into()).into());
    }
    let wrong = |_| Wrong("a line on standard input is not UTF-8".into());
    Ok((read > 0).then(|| String::from_utf8(bytes).map_err(wrong)).transpose()?)
}

/// Ctrl-C: ends the program while it waits, and only the answer while it speaks.
struct Interrupt {
    waiting: Arc<AtomicBool>,
    pressed: Arc<AtomicBool>,
}

impl Interrupt {
    fn listen() -> Result<Interrupt> {
        let new = Interrupt {
            waiting: Arc::new(AtomicBool::new(true)),
            pressed: Arc::new(AtomicBool::new(false)),
        };
        let wrong = "cannot listen for signals";
        signal_hook::flag::register_conditional_shutdown(SIGINT, 130, new.waiting.clone())
            .context(wrong)?;
        signal_hook::flag::register(SIGINT, new.pressed.clone()).context(wrong)?;
        Ok(new)
    }

    /// Whether there was none.
    fn none(&self) -> bool {
        !self.pressed.load(Ordering::Relaxed)
    }
}

/// A conversation with what the model remembers of it.
struct Room<'a> {
    speaker: &'a Speaker,
    talk: Conversation<'a>,
    decoder: Decoder<'a>,
    sampler: Sampler,
    pieces: Pieces<'a>,
    limits: Limits,
    interrupt: Interrupt,
    stats: bool,
}

impl Room<'_> {
    fn forget(&mut self) {
        self.decoder = Decoder::new(&self.speaker.model, &self.speaker.params.flat);
    }

    fn reset(&mut self) {
        self.talk.reset();
        self.forget();
    }

    /// Reads what the user says and answers.
    fn turn(&mut self, text: &str) -> Result<()> {
        self.interrupt.pressed.store(false, Ordering::Relaxed);
        self.interrupt.waiting.store(false, Ordering::Relaxed);
        let answered = self.answer(text);
        self.interrupt.waiting.store(true, Ordering::Relaxed);
        answered
    }

    fn answer(&mut self, text: &str) -> Result<()> {
        let turn = self.talk.ask(text)?;
        if turn.afresh {
            self.forget();
        }
        let started = Instant::now();
        let go_on = || self.interrupt.none();
        let heard = make::listen(&mut self.decoder, &turn.tokens, &mut self.sampler, &go_on);
        let Some(logits) = heard.map(<[f32]>::to_vec) else {
            out::message("interrupted: the conversation begins again");
            self.reset();
            return Ok(());
        };
        let prompt_seconds = started.elapsed().as_secs_f64();
        let (mut answer, mut tokens) = (String::new(), Vec::new());
        let mut hear = |token: Option<u32>, part: &str| {
            // Some models begin an answer with the blank after `Assistant:`.
            let told = if answer.is_empty() { part.trim_start_matches(' ') } else { part };
            out::piece(told);
            answer.push_str(part);
            tokens.extend(token);
            self.interrupt.none()
        };
        let started = Instant::now();
        let spoken = make::speak(
            &mut self.decoder,
            &logits,
            &mut self.sampler,
            (&self.pieces, true),
            &self.limits,
            &mut hear,
        )?;
        out::line("");
        if self.stats {
            let stats = Stats {
                prompt_tokens: turn.tokens.len(),
                prompt_seconds,
                tokens: spoken.tokens,
                seconds: started.elapsed().as_secs_f64(),
                state_bytes: self.decoder.bytes(),
            };
            out::message(format!("{}, {}", stats.line(), reason(&spoken.reason)));
        }
        let cut = matches!(spoken.reason, Reason::Stop(_));
        self.talk.answered(answer, &tokens, cut);
        Ok(())
    }
}
