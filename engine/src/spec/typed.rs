//! Checks a node against a stage's JSON Schema and gives it the type the schema asks for.
//!
//! Goes on after a problem, so that all come at once. Reads what schemars writes: `$ref`, `anyOf`
//! for options, `oneOf`/`enum`/`const` for enums, bounds and formats of numbers.

use serde_json::{Map, Number, Value as Json};

use super::source::{Problem, Problems, Span};
use super::value;
use super::yaml::{Node, Value};
use crate::diagnostic::suggest;

/// A stage's schema, ready to check parameters.
pub struct Typed<'a> {
    root: &'a Json,
    stage: &'a str,
}

/// The value, or `None` when something was wrong and has been said.
type Checked = Option<Json>;

impl<'a> Typed<'a> {
    /// Over the schema of `stage`.
    pub fn new(stage: &'a str, root: &'a Json) -> Typed<'a> {
        Typed { root, stage }
    }

    /// All parameters of one step. `around` is where to complain about what is not there.
    pub fn params(&self, node: &Node, around: Span, problems: &mut Problems) -> Checked {
        if node.entries().is_none() && !matches!(node.value, Value::Broken) {
            let message = format!("`with` takes a map of parameters, not {}", node.describe());
            problems.push(Problem::new(node.here(), message));
            return None;
        }
        if matches!(node.value, Value::Broken) {
            return None;
        }
        self.object(self.root, node, "", around, problems)
    }

    fn walk(&self, schema: &Json, node: &Node, path: &str, problems: &mut Problems) -> Checked {
        let schema = self.resolve(schema);
        if matches!(node.value, Value::Broken) {
            return None;
        }
        if let Some(choices) = schema.get("anyOf").or(schema.get("oneOf")).and_then(Json::as_array)
        {
            return self.choice(choices, node, path, problems);
        }
        if let Some(values) = schema.get("enum").and_then(Json::as_array) {
            return self.one_of(values, node, path, problems);
        }
        if let Some(value) = schema.get("const") {
            return self.one_of(std::slice::from_ref(value), node, path, problems);
        }
        let types = types(schema);
        if node.is_null() && types.contains(&"null") {
            return Some(Json::Null);
        }
        match types.iter().find(|t| **t != "null").copied() {
            Some("object") => self.object(schema, node, path, node.here(), problems),
            Some("array") => self.array(schema, node, path, problems),
            Some("string") => self.string(node, path, problems),
            Some("boolean") => {
                let truth = node.unquoted().and_then(value::boolean);
                truth
                    .map(Json::Bool)
                    .or_else(|| self.wrong(node, path, "`true` or `false`", problems))
            }
            Some("integer") => self.integer(schema, node, path, problems),
            Some("number") => self.number(schema, node, path, problems),
            Some("null") => self.wrong(node, path, "nothing", problems),
            _ => Some(value::json(node)),
        }
    }

    /// Follows `$ref` and a lone `allOf`.
    fn resolve<'s>(&'s self, mut schema: &'s Json) -> &'s Json {
        for _ in 0..32 {
            let target =
                schema.get("$ref").and_then(Json::as_str).and_then(|r| r.strip_prefix('#'));
            let next = match (target, schema.get("allOf").and_then(Json::as_array)) {
                (Some(pointer), _) => self.root.pointer(pointer),
                (None, Some(all)) if all.len() == 1 => all.first(),
                _ => None,
            };
            match next {
                Some(next) => schema = next,
                None => break,
            }
        }
        schema
    }

    fn object(
        &self,
        schema: &Json,
        node: &Node,
        path: &str,
        around: Span,
        problems: &mut Problems,
    ) -> Checked {
        let Some(entries) = node.entries() else {
            return self.wrong(node, path, "a map", problems);
        };
        let nothing = Map::new();
        let properties = schema.get("properties").and_then(Json::as_object).unwrap_or(&nothing);
        let others = schema.get("additionalProperties");
        let mut made = Map::new();
        let mut whole = true;
        for (key, child) in entries {
            let inner = join(path, &key.text);
            let checked = match (properties.get(&key.text), others) {
                (Some(schema), _) => self.walk(schema, child, &inner, problems),
                (None, Some(Json::Bool(false))) => {
                    problems.push(self.unknown(&key.text, key.span, path, properties));
                    None
                }
                (None, Some(schema @ Json::Object(_))) => {
                    self.walk(schema, child, &inner, problems)
                }
                (None, _) => Some(value::json(child)),
            };
            match checked {
                Some(value) => drop(made.insert(key.text.clone(), value)),
                None => whole = false,
            }
        }
        for name in schema.get("required").and_then(Json::as_array).into_iter().flatten() {
            let name = name.as_str().unwrap_or_default();
            if !entries.iter().any(|(key, _)| key.text == name) {
                let message =
                    format!("stage `{}` needs {}", self.stage, self.name(&join(path, name)));
                let doc = properties.get(name).and_then(|p| p.get("description"));
                let doc = doc.and_then(Json::as_str).map(|d| d.lines().next().unwrap_or(d));
                let doc = doc.map_or(String::new(), |d| format!("     # {d}"));
                problems.push(
                    Problem::new(around, message)
                        .hint(format!("add `{name}: …` under `with`{doc}")),
                );
                whole = false;
            }
        }
        whole.then_some(Json::Object(made))
    }

    fn unknown(&self, name: &str, span: Span, path: &str, known: &Map<String, Json>) -> Problem {
        let (message, what) = match path {
            "" => (format!("stage `{}` has no parameter `{name}`", self.stage), "parameters"),
            _ => (format!("`{path}` has no field `{name}`"), "fields"),
        };
        let none = known.is_empty().then(|| "it takes none".to_string());
        Problem::new(span, message)
            .maybe_hint(suggest(name, what, known.keys().map(String::as_str)).or(none))
    }

    fn array(&self, schema: &Json, node: &Node, path: &str, problems: &mut Problems) -> Checked {
        let Value::Seq(items) = &node.value else {
            // A range stands for the list of its numbers.
            if let Some(range) = node.text().and_then(value::range) {
                return self.range(range, node, path, problems);
            }
            let text = node.text().map(|t| format!("write `[{t}]`"));
            let problem = self.complaint(node, path, "a list").maybe_hint(text);
            problems.push(problem);
            return None;
        };
        let each = schema.get("items");
        let prefix = schema.get("prefixItems").and_then(Json::as_array);
        let anything = Json::Bool(true);
        let mut made = Vec::with_capacity(items.len());
        let mut whole = true;
        for (index, item) in items.iter().enumerate() {
            let inner = format!("{path}[{index}]");
            let schema = prefix.and_then(|p| p.get(index)).or(each).unwrap_or(&anything);
            let schema = self.resolve(schema);
            let numbers = types(schema).contains(&"integer");
            match item.text().and_then(value::range).filter(|_| numbers) {
                Some(Ok(range)) => made.extend(range.map(number)),
                Some(Err(_)) => whole = false,
                None => match self.walk(schema, item, &inner, problems) {
                    Some(value) => made.push(value),
                    None => whole = false,
                },
            }
        }
        let least = schema.get("minItems").and_then(Json::as_u64).unwrap_or(0);
        let most = schema.get("maxItems").and_then(Json::as_u64).unwrap_or(u64::MAX);
        if whole && !(least..=most).contains(&(made.len() as u64)) {
            let want = match (least, most) {
                (l, m) if l == m => format!("{l} items"),
                (l, u64::MAX) => format!("at least {l} items"),
                (l, m) => format!("{l} to {m} items"),
            };
            let message = format!("{} takes {want}, not {}", self.name(path), made.len());
            problems.push(Problem::new(node.here(), message));
            return None;
        }
        whole.then_some(Json::Array(made))
    }

    fn range(
        &self,
        range: Result<std::ops::Range<i128>, String>,
        node: &Node,
        path: &str,
        problems: &mut Problems,
    ) -> Checked {
        match range {
            Ok(range) => Some(range.map(number).collect()),
            Err(message) => {
                let message = format!("{}: {message}", self.name(path));
                problems.push(Problem::new(node.here(), message));
                None
            }
        }
    }

    fn string(&self, node: &Node, path: &str, problems: &mut Problems) -> Checked {
        match &node.value {
            Value::Scalar { text, quoted: false } if value::boolean(text).is_some() => {
                let problem = self.complaint(node, path, "a string");
                problems.push(problem.hint(format!("quote it: `\"{text}\"`")));
                None
            }
            Value::Scalar { text, .. } => Some(Json::String(text.clone())),
            _ => self.wrong(node, path, "a string", problems),
        }
    }

    fn integer(&self, schema: &Json, node: &Node, path: &str, problems: &mut Problems) -> Checked {
        let Some(value) = node.unquoted().and_then(value::integer) else {
            return self.wrong(node, path, "a whole number", problems);
        };
        let (least, most) = match schema.get("format").and_then(Json::as_str) {
            Some("uint8") => (0, u8::MAX.into()),
            Some("uint16") => (0, u16::MAX.into()),
            Some("uint32") => (0, u32::MAX.into()),
            Some("uint" | "uint64") => (0, u64::MAX.into()),
            Some("int8") => (i8::MIN.into(), i8::MAX.into()),
            Some("int16") => (i16::MIN.into(), i16::MAX.into()),
            Some("int32") => (i32::MIN.into(), i32::MAX.into()),
            _ => (i128::from(i64::MIN), i128::from(u64::MAX)),
        };
        let bound = |name: &str| schema.get(name).and_then(Json::as_f64);
        let least = bound("minimum").map_or(least, |m| least.max(m as i128));
        let most = bound("maximum").map_or(most, |m| most.min(m as i128));
        if (least..=most).contains(&value) {
            return Some(number(value));
        }
        let want =
            if value < least { format!("at least {least}") } else { format!("at most {most}") };
        let message = format!("{} must be {want}, not {value}", self.name(path));
        problems.push(self.at(node, message));
        None
    }

    fn number(&self, schema: &Json, node: &Node, path: &str, problems: &mut Problems) -> Checked {
        let parsed = node.unquoted().and_then(|t| Some((t, value::float(t)?)));
        let Some((text, value)) = parsed else {
            return self.wrong(node, path, "a number", problems);
        };
        let bound = |name: &str| schema.get(name).and_then(Json::as_f64);
        let bounds = [
            (bound("minimum"), "at least", value >= bound("minimum").unwrap_or(value)),
            (bound("maximum"), "at most", value <= bound("maximum").unwrap_or(value)),
            (
                bound("exclusiveMinimum"),
                "above",
                bound("exclusiveMinimum").is_none_or(|b| value > b),
            ),
            (
                bound("exclusiveMaximum"),
                "below",
                bound("exclusiveMaximum").is_none_or(|b| value < b),
            ),
        ];
        if let Some((limit, word, _)) = bounds.into_iter().find(|(_, _, holds)| !holds) {
            let limit = limit.unwrap_or_default();
            let message = format!("{} must be {word} {limit}, not {text}", self.name(path));
            problems.push(self.at(node, message));
            return None;
        }
        match value::scalar(text) {
            whole @ Json::Number(_) => Some(whole),
            _ => Number::from_f64(value).map(Json::Number),
        }
    }

    fn one_of(&self, values: &[Json], node: &Node, path: &str, problems: &mut Problems) -> Checked {
        let same = |value: &&Json| match (value, node.text()) {
            (Json::String(s), Some(text)) => s == text,
            (other, _) => **other == value::json(node),
        };
        if let Some(value) = values.iter().find(same) {
            return Some(value.clone());
        }
        let names: Vec<&str> = values.iter().filter_map(Json::as_str).collect();
        let word = node.text().unwrap_or_default();
        let want = names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
        let want = if names.len() == 1 { want } else { format!("one of {want}") };
        let near = crate::diagnostic::closest(word, names).map(|n| format!("did you mean `{n}`?"));
        let problem = self.complaint(node, path, &want).maybe_hint(near);
        problems.push(problem);
        None
    }

    /// `anyOf`/`oneOf`: an option, an enum whose variants have docs, or variants with fields.
    fn choice(
        &self,
        choices: &[Json],
        node: &Node,
        path: &str,
        problems: &mut Problems,
    ) -> Checked {
        let choices: Vec<&Json> = choices.iter().map(|c| self.resolve(c)).collect();
        let nullable = |s: &Json| types(s).contains(&"null");
        if node.is_null() && choices.iter().any(|c| nullable(c)) {
            return Some(Json::Null);
        }
        let real: Vec<&Json> = choices.iter().copied().filter(|c| types(c) != ["null"]).collect();
        if let [only] = real[..] {
            return self.walk(only, node, path, problems);
        }
        let literals: Option<Vec<Json>> =
            real.iter().map(|c| literals(c)).collect::<Option<Vec<_>>>().map(|v| v.concat());
        if let Some(values) = literals {
            return self.one_of(&values, node, path, problems);
        }
        if !matches!(node.value, Value::Map(_) | Value::Seq(_)) {
            let fitting =
                real.iter().find_map(|c| self.walk(c, node, path, &mut Problems::default()));
            return fitting.or_else(|| self.wrong(node, path, &any_of(&real), problems));
        }
        let mut best: Option<(usize, Problems)> = None;
        for choice in &real {
            let mut found = Problems::default();
            if let Some(value) = self.walk(choice, node, path, &mut found) {
                return Some(value);
            }
            // The variant that fits the shape best explains itself best.
            let rank = found.len() + if fits(choice, node) { 0 } else { 1000 };
            if best.as_ref().is_none_or(|(least, _)| rank < *least) {
                best = Some((rank, found));
            }
        }
        match best {
            Some((rank, found)) if rank < 1000 => problems.append(found),
            _ => {
                self.wrong(node, path, &any_of(&real), problems);
            }
        }
        None
    }

    /// `parameter `a.b``, or what the whole is called.
    fn name(&self, path: &str) -> String {
        if path.is_empty() { "`with`".into() } else { format!("parameter `{path}`") }
    }

    fn wrong(&self, node: &Node, path: &str, want: &str, problems: &mut Problems) -> Checked {
        let problem = self.complaint(node, path, want);
        problems.push(match (&node.value, want) {
            (
                Value::Scalar { quoted: true, text },
                "a number" | "a whole number" | "`true` or `false`",
            ) if value::float(text).is_some() || value::boolean(text).is_some() => {
                problem.hint(format!("remove the quotes: `{text}`"))
            }
            _ => problem.maybe_hint(self.told(path)),
        });
        None
    }

    /// What the parameter at `path` is, and its default.
    fn told(&self, path: &str) -> Option<String> {
        let name = path.split(['.', '[']).next()?;
        let field = self.root.get("properties")?.get(name)?;
        let doc = field.get("description")?.as_str()?;
        let doc = doc.split_whitespace().collect::<Vec<_>>().join(" ");
        let doc = doc.trim_end_matches('.');
        Some(match field.get("default") {
            Some(default) => format!("`{name}`: {doc}; by default {default}"),
            None => format!("`{name}`: {doc}"),
        })
    }

    fn complaint(&self, node: &Node, path: &str, want: &str) -> Problem {
        let message = format!("{} takes {want}, not {}", self.name(path), node.describe());
        self.at(node, message)
    }

    /// At the value; where it came through a `${…}`, its origin is told too.
    fn at(&self, node: &Node, message: String) -> Problem {
        let problem = Problem::new(node.here(), message);
        match node.via {
            Some(_) => problem.related(node.span, "the value is from here"),
            None => problem,
        }
    }
}

fn number(value: i128) -> Json {
    Number::from_i128(value).map_or(Json::Null, Json::Number)
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_string() } else { format!("{path}.{name}") }
}

/// The `type`s of a schema.
fn types(schema: &Json) -> Vec<&str> {
    match schema.get("type") {
        Some(Json::String(one)) => vec![one],
        Some(Json::Array(several)) => several.iter().filter_map(Json::as_str).collect(),
        _ if schema.get("properties").is_some() => vec!["object"],
        _ => Vec::new(),
    }
}

/// The values of a schema that is only a list of literals.
fn literals(schema: &Json) -> Option<Vec<Json>> {
    match (schema.get("enum"), schema.get("const")) {
        (Some(Json::Array(values)), _) => Some(values.clone()),
        (_, Some(value)) => Some(vec![value.clone()]),
        _ => None,
    }
}

/// Whether a node has the shape of a schema, and the tag of a tagged variant.
fn fits(schema: &Json, node: &Node) -> bool {
    let types = types(schema);
    match &node.value {
        Value::Map(entries) => {
            types.contains(&"object")
                && schema.get("properties").and_then(Json::as_object).is_some_and(|properties| {
                    properties.iter().all(|(name, schema)| match literals(schema) {
                        None => true,
                        Some(values) => entries.iter().any(|(key, child)| {
                            key.text == *name && values.contains(&value::json(child))
                        }),
                    }) && (properties.len() != 1
                        || entries.iter().any(|(key, _)| properties.contains_key(&key.text)))
                })
        }
        Value::Seq(_) => types.contains(&"array"),
        _ => !types.contains(&"object") && !types.contains(&"array") && !types.is_empty(),
    }
}

/// What any of several schemas would take.
fn any_of(schemas: &[&Json]) -> String {
    let mut words: Vec<String> = Vec::new();
    for schema in schemas {
        let word = match literals(schema) {
            Some(values) => {
                let texts = values.iter().map(|v| format!("`{}`", v.as_str().unwrap_or_default()));
                texts.collect::<Vec<_>>().join(", ")
            }
            None => match types(schema).first() {
                Some(&"object") => {
                    match schema.get("required").and_then(|r| r.get(0)).and_then(Json::as_str) {
                        Some(name) => format!("a map with `{name}`"),
                        None => "a map".into(),
                    }
                }
                Some(&"array") => "a list".into(),
                Some(&"integer") => "a whole number".into(),
                Some(name) => format!("a {name}"),
                None => "something else".into(),
            },
        };
        if !words.contains(&word) {
            words.push(word);
        }
    }
    words.join(" or ")
}
