//! Chat templates of the hub: Jinja, with what transformers adds to it. Knows no tokens.
//!
//! A template comes with a model, so it is not trusted: it has a budget of steps, reads no file, and
//! sees nothing but the messages and the names of a few tokens.

use anyhow::{Context as _, Result, anyhow};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, context};
use serde::Serialize;

/// One part of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What was said.
    pub content: String,
}

/// A compiled template.
pub struct Template {
    environment: Environment<'static>,
    /// Texts of the tokens that begin and end a text; empty if there are none.
    tokens: [String; 2],
}

/// Steps that rendering may take: far more than any conversation needs.
const FUEL: u64 = 20_000_000;
const NAME: &str = "chat_template";

impl Template {
    /// Compiles `source`; `tokens` are the texts of the tokens that begin and end a text.
    pub fn new(source: &str, tokens: [String; 2]) -> Result<Template> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| anyhow!("{error}"))?);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise);
        environment.add_filter("tojson", to_json);
        environment.set_unknown_method_callback(method);
        environment
            .add_template_owned(NAME, source.to_string())
            .context("the model's chat template cannot be read")?;
        Ok(Template { environment, tokens })
    }

    /// The conversation as one text; with `ask`, up to where the assistant's next words begin.
    pub fn render(&self, messages: &[Message], ask: bool) -> Result<String> {
        let [bos, eos] = &self.tokens;
        let scene = context! {
            messages => Serde(messages),
            add_generation_prompt => ask,
            bos_token => bos,
            eos_token => eos,
            tools => (),
            documents => (),
        };
        let template = self.environment.get_template(NAME)?;
        template.render(scene).context("the model's chat template refuses this conversation")
    }
}

fn raise(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// As Python's `json.dumps(value, ensure_ascii=False)` writes it, which transformers uses.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<Value> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let wrong = |error| Error::new(ErrorKind::BadSerialization, "no JSON").with_source(error);
    let mut text = Vec::new();
    match indent {
        Some(indent) => {
            let blanks = vec![b' '; indent.min(16)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&blanks);
            let mut writer = serde_json::Serializer::with_formatter(&mut text, pretty);
            value.serialize(&mut writer).map_err(wrong)?;
        }
        None => {
            let mut writer = serde_json::Serializer::with_formatter(&mut text, Spaced);
            value.serialize(&mut writer).map_err(wrong)?;
        }
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&text).into_owned()))
}

/// A blank after `,` and `:`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The methods of Python's strings and dictionaries that templates call.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if value.kind() == ValueKind::Map {
        return match name {
            "items" => state.apply_filter("items", std::slice::from_ref(value)),
            "keys" => state.apply_filter("list", std::slice::from_ref(value)),
            "get" => {
                let (key, default): (&Value, Option<Value>) = from_args(args)?;
                let found = value.get_item(key).ok().filter(|found| !found.is_undefined());
                Ok(found.or(default).unwrap_or(Value::from(())))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        };
    }
    let text = value.as_str().ok_or_else(|| Error::from(ErrorKind::UnknownMethod))?;
    if let "strip" | "lstrip" | "rstrip" = name {
        let (set,): (Option<&str>,) = from_args(args)?;
        let drop = |c: char| set.map_or(c.is_whitespace(), |set| set.contains(c));
        let text = if name == "rstrip" { text } else { text.trim_start_matches(drop) };
        return Ok(if name == "lstrip" { text } else { text.trim_end_matches(drop) }.into());
    }
    match name {
        "startswith" => from_args(args).map(|(with,): (&str,)| text.starts_with(with).into()),
        "endswith" => from_args(args).map(|(with,): (&str,)| text.ends_with(with).into()),
        "upper" => Ok(text.to_uppercase().into()),
        "lower" => Ok(text.to_lowercase().into()),
        "title" => state.apply_filter("title", std::slice::from_ref(value)),
        "replace" => from_args(args).map(|(a, b): (&str, &str)| text.replace(a, b).into()),
        "split" => {
            let (by, most): (Option<&str>, Option<usize>) = from_args(args)?;
            let most = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let parts: Vec<&str> = match by {
                Some(by) => text.splitn(most, by).collect(),
                None => text.split_whitespace().collect(),
            };
            Ok(Serde(parts).into())
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &'static str, content: &str) -> Message {
        Message { role, content: content.into() }
    }

    fn render(source: &str, messages: &[Message], ask: bool) -> Result<String> {
        Template::new(source, ["<s>".into(), "</s>".into()])?.render(messages, ask)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let source = "{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'user' %}
U: {{ message['content'] | trim }}
    {%- elif message.role == 'assistant' %}
A: {{ message.content + eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
A:
{% endif %}
";
        let talk = [message("user", " hi "), message("assistant", "yes"), message("user", "<b>&'")];
        let want = "<s>\nU: hiA: yes</s>\nU: <b>&'A:\n";
        assert_eq!(render(source, &talk, true).unwrap(), want);
    }

    #[test]
    fn what_templates_of_the_hub_use_is_there() {
        let talk = [message("system", " S "), message("user", "a</think>b")];
        let cases = [
            ("{{ messages[0]['content'].strip() }}", "S"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{{ messages[1].content.split('</think>')[-1] }}", "b"),
            ("{{ messages[1].content.split('</think>')|last }}", "b"),
            ("{% for m in messages[1:] %}{{ m.role }}{% endfor %}", "user"),
            (
                "{% for m in messages[::-1] %}{{ m.role }}{{ loop.first }}{% break %}{% endfor %}",
                "userTrue",
            ),
            ("{{ messages[1]|tojson }}", r#"{"role": "user", "content": "a</think>b"}"#),
            ("{{ {'a': [1, 2]}|tojson(indent=1) }}", "{\n \"a\": [\n  1,\n  2\n ]\n}"),
            (
                "{{ tools is none }}{{ tools is defined }}{{ strftime_now is defined }}",
                "TrueTrueFalse",
            ),
            ("{% if not tools %}none{% endif %}{{ 'x'.startswith('x') }}", "noneTrue"),
            ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }}", "[a]"),
            ("{% for k, v in messages[0].items() %}{{ k }},{% endfor %}", "role,content,"),
            (
                "{{ messages[0].get('name', 'x') }}{{ 'a' if messages[0].name is defined else 'b' }}",
                "xb",
            ),
            (
                "{{ (messages|length % 2 == 0) }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
                "True1",
            ),
        ];
        for (source, want) in cases {
            let got = render(source, &talk, false);
            assert_eq!(got.map_err(|e| format!("{e:#}")), Ok(want.to_string()), "{source}");
        }
    }

    #[test]
    fn what_a_template_refuses_is_told() {
        let told = |source: &str| format!("{:#}", render(source, &[], true).unwrap_err());
        let refusal = told("{{ raise_exception('Only user and assistant roles!') }}");
        assert!(refusal.contains("Only user and assistant roles!"), "{refusal}");
        assert!(told("{% if %}").contains("cannot be read"));
        assert!(told("{{ 'a'.nothing() }}").contains("unknown method"));
        assert!(told("{% include 'etc' %}").contains("cannot be read"));
    }

    #[test]
    fn a_template_without_end_is_stopped() {
        let loops = "{% for a in range(9999) %}".repeat(4) + &"{% endfor %}".repeat(4);
        let error = render(&loops, &[], true).unwrap_err();
        assert!(format!("{error:#}").contains("fuel"), "{error:#}");
    }
}
