//! A conversation as the tokens a model reads: of every turn only what is new. Knows no model.
//!
//! A conversation is written by the model's own chat template; without one as ChatML if the
//! tokenizer knows its marks, else as lines that begin with `User:` and `Assistant:`.

use anyhow::{Result, ensure};

use super::about::Words;
use super::template::{Message, Template};

/// How a conversation is written.
enum Form {
    Template(Box<Template>),
    ChatMl,
    Plain,
}

/// A conversation between a user and a model. What the model said stays read as it said it: also
/// special tokens that are no text, and spellings that the tokenizer would not choose.
pub struct Conversation<'a> {
    words: &'a Words,
    form: Form,
    system: Option<String>,
    messages: Vec<Message>,
    /// The text up to the newest answer.
    asked: String,
    /// All that the model has read.
    read: Vec<u32>,
    /// What it said last and did not read.
    unread: Option<u32>,
    /// Whether it said more than the answer.
    cut: bool,
}

/// What a model has to read for a turn.
#[derive(Debug, PartialEq, Eq)]
pub struct Turn {
    /// At least one token.
    pub tokens: Vec<u32>,
    /// Whether they are the whole conversation, to be read from nothing.
    pub afresh: bool,
}

impl<'a> Conversation<'a> {
    /// Before the first turn; `system` stands before all of them.
    pub fn new(words: &'a Words, system: Option<String>) -> Result<Conversation<'a>> {
        let knows = |mark: &str| words.tokenizer.token_to_id(mark).is_some();
        let form = match words.template()? {
            Some(template) => Form::Template(Box::new(template)),
            None if knows("<|im_start|>") && knows("<|im_end|>") => Form::ChatMl,
            None => Form::Plain,
        };
        let mut new = Conversation {
            words,
            form,
            system,
            messages: Vec::new(),
            asked: String::new(),
            read: Vec::new(),
            unread: None,
            cut: false,
        };
        new.reset();
        Ok(new)
    }

    /// Forgets all turns.
    pub fn reset(&mut self) {
        let system = |content: &String| Message { role: "system", content: content.clone() };
        self.messages = self.system.iter().map(system).collect();
        self.asked.clear();
        self.read.clear();
        self.unread = None;
        self.cut = false;
    }

    /// Texts that end an answer beside the tokens that do.
    pub fn stops(&self) -> &'static [&'static str] {
        match self.form {
            Form::Plain => &["\nUser:"],
            _ => &[],
        }
    }

    /// The user says `text`.
    pub fn ask(&mut self, text: &str) -> Result<Turn> {
        self.messages.push(Message { role: "user", content: text.into() });
        let turn = self.turn();
        if turn.is_err() {
            self.messages.pop();
        }
        turn
    }

    fn turn(&mut self) -> Result<Turn> {
        let whole = self.render()?;
        let mut tokens = self.words.encode(&whole)?;
        if let (Form::Plain, Some(first)) = (&self.form, self.words.first) {
            tokens.insert(0, first);
        }
        ensure!(!tokens.is_empty(), "the model's chat template writes nothing");
        let afresh = match self.news(&tokens, &whole)? {
            Some(news) => {
                tokens = news;
                false
            }
            None => {
                self.read.clear();
                true
            }
        };
        self.asked = whole;
        self.read.extend(&tokens);
        Ok(Turn { tokens, afresh })
    }

    /// What of the conversation was not read yet; `None` if what was read is not its beginning.
    fn news(&self, tokens: &[u32], whole: &str) -> Result<Option<Vec<u32>>> {
        if self.read.is_empty() {
            return Ok(None);
        }
        if let Some(rest) = tokens.strip_prefix(&self.read[..]).filter(|rest| !rest.is_empty()) {
            return Ok(Some(rest.to_vec()));
        }
        if self.cut {
            return Ok(None);
        }
        // The model chose other tokens for its answer than the tokenizer does for the same text.
        let answers = self.messages.iter().rev().filter(|message| message.role == "assistant");
        let Some(answer) = answers.map(|message| &message.content).next() else { return Ok(None) };
        let since = whole.strip_prefix(self.asked.as_str());
        let rest = since.and_then(|since| {
            let trimmed = || since.trim_start().strip_prefix(answer.trim());
            since.strip_prefix(answer.as_str()).or_else(trimmed)
        });
        let Some(rest) = rest else { return Ok(None) };
        // The template has its own mark for the end of an answer.
        let unread = self.unread.filter(|token| !self.words.ends.contains(token));
        let news: Vec<u32> = unread.into_iter().chain(self.words.encode(rest)?).collect();
        Ok(Some(news).filter(|news| !news.is_empty()))
    }

    /// The model answered `text` by `tokens`, of which it read all but the last; `cut`: they say
    /// more than `text`, up to a stop string.
    pub fn answered(&mut self, text: String, tokens: &[u32], cut: bool) {
        self.cut = cut;
        self.messages.push(Message { role: "assistant", content: text });
        let (last, before) = tokens.split_last().map_or((None, tokens), |(l, b)| (Some(*l), b));
        self.read.extend(before);
        self.unread = last;
    }

    /// The conversation up to where the model's next words begin.
    fn render(&self) -> Result<String> {
        let lines = |open: &dyn Fn(&str) -> String, close: &str, begin: &str| {
            let one = |message: &Message| open(message.role) + &message.content + close;
            self.messages.iter().map(one).collect::<String>() + begin
        };
        Ok(match &self.form {
            Form::Template(template) => template.render(&self.messages, true)?,
            Form::ChatMl => {
                let open = |role: &str| format!("<|im_start|>{role}\n");
                lines(&open, "<|im_end|>\n", "<|im_start|>assistant\n")
            }
            Form::Plain => {
                let open = |role: &str| match role {
                    "user" => "User: ".to_string(),
                    "assistant" => "Assistant:".to_string(),
                    _ => String::new(),
                };
                lines(&open, "\n", "Assistant:")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::about::tests::words;

    /// All that a model reads over some turns, each answer given as text and tokens.
    struct Model {
        state: Vec<u32>,
        unread: Option<u32>,
    }

    impl Model {
        fn hear(&mut self, turn: Turn) -> bool {
            if turn.afresh {
                self.state.clear();
            }
            self.state.extend(&turn.tokens);
            turn.afresh
        }

        fn say(&mut self, talk: &mut Conversation<'_>, text: &str, tokens: &[u32], cut: bool) {
            let (last, before) = tokens.split_last().unwrap();
            self.state.extend(before);
            self.unread = Some(*last);
            talk.answered(text.into(), tokens, cut);
        }
    }

    fn new() -> Model {
        Model { state: Vec::new(), unread: None }
    }

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn of_every_turn_only_the_new_is_read_and_all_of_it_equals_reading_the_whole() {
        for template in [None, Some(CHATML)] {
            let words = words(template);
            let end = words.tokenizer.token_to_id("<|im_end|>").unwrap();
            let mut talk = Conversation::new(&words, Some("be kind".into())).unwrap();
            let mut model = new();
            let mut whole = "<|im_start|>system\nbe kind<|im_end|>\n".to_string();
            for (turn, (ask, answer)) in
                [("hi", "yes"), ("go on", ""), ("and", "no")].iter().enumerate()
            {
                assert_eq!(model.hear(talk.ask(ask).unwrap()), turn == 0);
                whole += &format!("<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n");
                assert_eq!(model.state, words.encode(&whole).unwrap(), "turn {turn}");
                let mut tokens = words.encode(answer).unwrap();
                tokens.push(end);
                model.say(&mut talk, answer, &tokens, false);
                whole += &format!("{answer}<|im_end|>\n");
            }
            talk.reset();
            assert!(model.hear(talk.ask("hi").unwrap()), "begins again");
        }
    }

    #[test]
    fn an_answer_in_other_tokens_or_with_blanks_around_is_not_read_again() {
        let trims = CHATML.replace("m.content", "m.content.strip()");
        let words = words(Some(&trims));
        let end = words.tokenizer.token_to_id("<|im_end|>").unwrap();
        let id = |token: &str| words.tokenizer.token_to_id(token).unwrap();
        let mut talk = Conversation::new(&words, None).unwrap();
        let mut model = new();
        model.hear(talk.ask("x").unwrap());
        // The tokenizer would write `yes` as one token; and `Ġ` is a blank.
        let tokens = [id("Ġ"), id("y"), id("e"), id("s"), end];
        model.say(&mut talk, " yes", &tokens, false);
        assert!(!model.hear(talk.ask("y").unwrap()));
        let text = words.tokenizer.decode(&model.state, false).unwrap();
        assert!(
            text.contains("assistant\n yes<|im_end|>\n<|im_start|>user\ny<|im_end|>"),
            "{text}"
        );
        // Broken off in the middle: the last token was not read and has to be.
        model.say(&mut talk, "yes", &[id("y"), id("e"), id("s")], false);
        assert!(!model.hear(talk.ask("z").unwrap()));
        let text = words.tokenizer.decode(&model.state, false).unwrap();
        assert!(text.contains("assistant\nyes<|im_end|>\n<|im_start|>user\nz"), "{text}");
    }

    #[test]
    fn a_model_that_said_too_much_reads_the_conversation_again() {
        let words = words(Some("{% for m in messages %}{{ m.content }};{% endfor %}"));
        let mut talk = Conversation::new(&words, None).unwrap();
        let mut model = new();
        model.hear(talk.ask("x").unwrap());
        model.say(&mut talk, "yes", &words.encode("yes no").unwrap(), true);
        assert!(model.hear(talk.ask("y").unwrap()));
        assert_eq!(model.state, words.encode("x;yes;y;").unwrap());
    }

    #[test]
    fn a_template_that_rewrites_the_past_is_read_again() {
        let words =
            words(Some("{{ messages|length }}{% for m in messages %}{{ m.content }};{% endfor %}"));
        let mut talk = Conversation::new(&words, None).unwrap();
        let mut model = new();
        model.hear(talk.ask("x").unwrap());
        model.say(&mut talk, "yes", &words.encode("yes").unwrap(), false);
        assert!(model.hear(talk.ask("y").unwrap()));
        assert_eq!(model.state, words.encode("3x;yes;y;").unwrap());
    }

    #[test]
    fn without_marks_a_conversation_is_lines() {
        let mut words = words(None);
        words.tokenizer = crate::generate::about::tests::plain();
        words.first = Some(0);
        let mut talk = Conversation::new(&words, None).unwrap();
        assert_eq!(talk.stops(), ["\nUser:"]);
        let turn = talk.ask("hi").unwrap();
        assert_eq!(turn.tokens[0], 0);
        assert_eq!(words.tokenizer.decode(&turn.tokens, true).unwrap(), "User: hi\nAssistant:");
    }

    #[test]
    fn a_refused_turn_is_as_if_it_had_not_been() {
        let refuses = "{% if messages|length > 1 %}{{ raise_exception('enough') }}{% endif %}x";
        let words = words(Some(refuses));
        let mut talk = Conversation::new(&words, None).unwrap();
        talk.ask("a").unwrap();
        talk.answered("b".into(), &[1], false);
        assert!(format!("{:#}", talk.ask("c").unwrap_err()).contains("enough"));
        assert_eq!(talk.messages.len(), 2);
    }
}
