//! Plans as bytes, kept under the digests of all that they were made from, so that a long pipeline
//! is not parsed and checked anew by every run. Knows every field of a plan, and no cache.
//!
//! Texts are written once and named by number: most of a matrix is the same text again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use cache::Digest;
use serde_json::{Map, Number, Value};

use super::{Output, Place, Plan, Port, Resources, Source, Step, Use};

/// Raised with every change of a plan's fields.
const MAGIC: &[u8] = b"pipe plan 3\n";

/// The plan as bytes.
pub fn render(plan: &Plan) -> Vec<u8> {
    let mut to = Writer::default();
    to.text(&plan.name);
    to.path(&plan.file);
    to.list(&plan.steps, Writer::step);
    to.list(&plan.outputs, |to, output| {
        to.text(&output.name);
        to.source(&output.source);
        to.path(&output.to);
        to.place(&output.place);
    });
    let mut texts = Vec::new();
    put(&mut texts, to.texts.len() as u64);
    for text in &to.texts {
        put(&mut texts, text.len() as u64);
        texts.extend_from_slice(text.as_bytes());
    }
    let body = [texts, to.bytes].concat();
    [MAGIC, Digest::of(&body).as_bytes(), &body].concat()
}

/// The plan in bytes that [`render`] made; `None` of any others.
pub fn parse(bytes: &[u8]) -> Option<Plan> {
    let (sum, body) = bytes.strip_prefix(MAGIC)?.split_at_checked(32)?;
    if Digest::of(body).as_bytes() != sum {
        return None;
    }
    let mut from = Reader { bytes: body, texts: Vec::new() };
    let texts = from.number()? as usize;
    for _ in 0..texts {
        let len = from.number()? as usize;
        let text = std::str::from_utf8(from.take(len)?).ok()?;
        from.texts.push(text);
    }
    let (name, file) = (from.text()?, from.path()?);
    let steps = from.list(Reader::step)?;
    let outputs = from.list(|from| {
        let (name, source) = (from.text()?, from.source()?);
        Some(Output { name, source, to: from.path()?, place: from.place()? })
    })?;
    Some(Plan { name, file, steps, outputs })
}

/// Seven bits a byte, the lowest first.
fn put(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    texts: Vec<String>,
    known: HashMap<String, u64>,
}

impl Writer {
    fn number(&mut self, number: u64) {
        put(&mut self.bytes, number);
    }

    fn text(&mut self, text: &str) {
        let number = match self.known.get(text) {
            Some(&number) => number,
            None => {
                let number = self.texts.len() as u64;
                self.texts.push(text.to_string());
                self.known.insert(text.to_string(), number);
                number
            }
        };
        self.number(number);
    }

    /// A path of a plan was text when it was read.
    fn path(&mut self, path: &Path) {
        self.text(&path.to_string_lossy());
    }

    fn list<T>(&mut self, items: &[T], mut one: impl FnMut(&mut Writer, &T)) {
        self.number(items.len() as u64);
        items.iter().for_each(|item| one(self, item));
    }

    fn maybe(&mut self, number: Option<u64>) {
        self.number(number.map_or(0, |n| n.saturating_add(1)));
    }

    fn maybe_text(&mut self, text: Option<&str>) {
        self.number(u64::from(text.is_some()));
        self.text(text.unwrap_or_default());
    }

    fn maybe_float(&mut self, number: Option<f64>) {
        self.number(u64::from(number.is_some()));
        self.bytes.extend_from_slice(&number.unwrap_or_default().to_le_bytes());
    }

    fn place(&mut self, place: &Place) {
        self.text(&place.file);
        self.number(place.line as u64);
        self.number(place.column as u64);
    }

    fn source(&mut self, source: &Source) {
        match source {
            Source::Step { step, port, index } => {
                self.number(0);
                self.number(*step as u64);
                self.text(port);
                self.maybe(index.map(u64::from));
            }
            Source::Path { path } => {
                self.number(1);
                self.path(path);
            }
            Source::Hub { name } => {
                self.number(2);
                self.text(name);
            }
        }
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.number(0),
            Value::Bool(yes) => self.number(1 + u64::from(*yes)),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(n), _) => {
                    self.number(3);
                    self.number(n);
                }
                (_, Some(n)) => {
                    self.number(4);
                    self.number(n as u64);
                }
                _ => {
                    self.number(5);
                    let bits = number.as_f64().unwrap_or_default().to_bits();
                    self.bytes.extend_from_slice(&bits.to_le_bytes());
                }
            },
            Value::String(text) => {
                self.number(6);
                self.text(text);
            }
            Value::Array(items) => {
                self.number(7);
                self.list(items, Writer::value);
            }
            Value::Object(fields) => {
                self.number(8);
                self.number(fields.len() as u64);
                for (name, value) in fields {
                    self.text(name);
                    self.value(value);
                }
            }
        }
    }

    fn step(&mut self, step: &Step) {
        // Every field, so that a new one is not forgotten.
        #[rustfmt::skip]
        let Step {
            name, group, coords, stage, params, inputs, after, ports, resources, retries, timeout_s,
            cache, secrets, place, origins, uses, auto,
        } = step;
        self.text(name);
        self.text(group);
        self.list(coords, |to, (axis, value)| {
            to.text(axis);
            to.value(value);
        });
        self.text(stage);
        self.value(params);
        self.list(inputs, |to, port| {
            to.text(&port.name);
            to.number(u64::from(port.named) + 2 * u64::from(port.list));
            to.place(&port.place);
            to.list(&port.sources, Writer::source);
        });
        self.list(after, |to, at| to.number(*at as u64));
        self.list(ports, |to, (name, list, file)| {
            to.text(name);
            to.number(u64::from(*list));
            to.text(file);
        });
        let Resources { cpu, gpu, memory, vram, gpu_type, time_s } = resources;
        self.maybe(cpu.map(u64::from));
        for number in [u64::from(*gpu), *memory, *vram, u64::from(*retries)] {
            self.number(number);
        }
        self.maybe_text(gpu_type.as_deref());
        self.maybe_float(*time_s);
        self.maybe_float(*timeout_s);
        self.number(u64::from(*cache));
        self.list(secrets, |to, name| to.text(name));
        self.place(place);
        self.number(origins.len() as u64);
        for (name, place) in origins {
            self.text(name);
            self.place(place);
        }
        self.list(uses, |to, one| {
            let Use { parameter, name, value, place } = one;
            to.text(parameter);
            to.text(name);
            to.text(value);
            to.place(place);
        });
        self.maybe_text(auto.as_deref());
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    texts: Vec<&'a str>,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len)?;
        self.bytes = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u64> {
        let (mut number, mut shift) = (0u64, 0);
        loop {
            let (&byte, rest) = self.bytes.split_first()?;
            self.bytes = rest;
            number |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte < 0x80 {
                return Some(number);
            }
            shift += 7;
        }
    }

    fn flag(&mut self) -> Option<bool> {
        Some(self.number()? == 1)
    }

    fn small(&mut self) -> Option<u32> {
        self.number()?.try_into().ok()
    }

    fn text(&mut self) -> Option<String> {
        let at = self.number()? as usize;
        self.texts.get(at).map(|text| text.to_string())
    }

    fn path(&mut self) -> Option<PathBuf> {
        self.text().map(PathBuf::from)
    }

    fn list<T>(&mut self, mut one: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.number()? as usize;
        // An item has a byte at least.
        let mut items = Vec::with_capacity(count.min(self.bytes.len()));
        for _ in 0..count {
            items.push(one(self)?);
        }
        Some(items)
    }

    fn maybe(&mut self) -> Option<Option<u32>> {
        match self.number()? {
            0 => Some(None),
            n => Some(Some((n - 1).try_into().ok()?)),
        }
    }

    fn maybe_text(&mut self) -> Option<Option<String>> {
        let (there, text) = (self.flag()?, self.text()?);
        Some(there.then_some(text))
    }

    fn maybe_float(&mut self) -> Option<Option<f64>> {
        let (there, number) = (self.flag()?, self.float()?);
        Some(there.then_some(number))
    }

    fn place(&mut self) -> Option<Place> {
        let file = self.text()?;
        Some(Place { file, line: self.number()? as usize, column: self.number()? as usize })
    }

    fn source(&mut self) -> Option<Source> {
        Some(match self.number()? {
            0 => {
                let step = self.number()? as usize;
                Source::Step { step, port: self.text()?, index: self.maybe()? }
            }
            1 => Source::Path { path: self.path()? },
            2 => Source::Hub { name: self.text()? },
            _ => return None,
        })
    }

    fn float(&mut self) -> Option<f64> {
        Some(f64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn value(&mut self) -> Option<Value> {
        Some(match self.number()? {
            0 => Value::Null,
            1 => Value::Bool(false),
            2 => Value::Bool(true),
            3 => Value::Number(self.number()?.into()),
            4 => Value::Number((self.number()? as i64).into()),
            5 => Value::Number(Number::from_f64(self.float()?)?),
            6 => Value::String(self.text()?),
            7 => Value::Array(self.list(Reader::value)?),
            8 => {
                let count = self.number()?;
                let mut fields = Map::new();
                for _ in 0..count {
                    let name = self.text()?;
                    fields.insert(name, self.value()?);
                }
                Value::Object(fields)
            }
            _ => return None,
        })
    }

    fn port(&mut self) -> Option<Port> {
        let (name, flags) = (self.text()?, self.number()?);
        let (named, list) = (flags & 1 == 1, flags & 2 == 2);
        Some(Port { name, named, list, place: self.place()?, sources: self.list(Reader::source)? })
    }

    fn step(&mut self) -> Option<Step> {
        let mut step = Step {
            name: self.text()?,
            group: self.text()?,
            coords: self.list(|from| Some((from.text()?, from.value()?)))?,
            stage: self.text()?,
            params: self.value()?,
            inputs: self.list(Reader::port)?,
            after: self.list(|from| Some(from.number()? as usize))?,
            ports: self.list(|from| Some((from.text()?, from.flag()?, from.text()?)))?,
            ..Step::default()
        };
        let cpu = self.maybe()?;
        let (gpu, memory, vram) = (self.small()?, self.number()?, self.number()?);
        step.retries = self.small()?;
        let (gpu_type, time_s) = (self.maybe_text()?, self.maybe_float()?);
        step.resources = Resources { cpu, gpu, memory, vram, gpu_type, time_s };
        step.timeout_s = self.maybe_float()?;
        step.cache = self.flag()?;
        step.secrets = self.list(Reader::text)?;
        step.place = self.place()?;
        // One by one: to collect them would sort them.
        for _ in 0..self.number()? {
            let name = self.text()?;
            step.origins.insert(name, self.place()?);
        }
        step.uses = self.list(|from| {
            let (parameter, name, value) = (from.text()?, from.text()?, from.text()?);
            Some(Use { parameter, name, value, place: from.place()? })
        })?;
        step.auto = self.maybe_text()?;
        Some(step)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn place(line: usize) -> Place {
        Place { file: "pipe.yaml".into(), line, column: 300 }
    }

    fn plan() -> Plan {
        let sources = vec![
            Source::Step { step: 0, port: "model".into(), index: Some(u32::MAX) },
            Source::Path { path: "/a/b c".into() },
            Source::Hub { name: "o/n@main".into() },
        ];
        let params = json!({ "lr": 3e-4, "n": -7, "most": u64::MAX, "text": "ä\"", "none": null,
            "list": [true, false, [], {}], "run": ["sh", "-c", "cat ${in.x}"] });
        let step = Step {
            name: "align[2]".into(),
            group: "align".into(),
            coords: vec![("layer".into(), json!(2)), ("lr".into(), json!("3e-4"))],
            stage: "align".into(),
            params,
            inputs: vec![Port {
                name: "in".into(),
                named: true,
                list: false,
                place: place(3),
                sources,
            }],
            after: vec![0, 200],
            ports: vec![("out".into(), true, "out.txt".into())],
            resources: Resources {
                cpu: Some(0),
                gpu: 2,
                memory: u64::MAX,
                vram: 1 << 33,
                gpu_type: Some("h100".into()),
                time_s: Some(90.5),
            },
            retries: 1000,
            timeout_s: Some(0.25),
            cache: true,
            secrets: vec!["TOKEN".into()],
            place: place(1),
            origins: [("lr".to_string(), place(9)), ("n".to_string(), place(0))].into(),
            uses: vec![Use {
                parameter: "run".into(),
                name: "params.word".into(),
                value: "cat".into(),
                place: place(7),
            }],
            auto: Some("there is a GPU".into()),
        };
        let other = Step { auto: None, timeout_s: None, cache: false, ..step.clone() };
        let output = Output {
            name: "student".into(),
            source: Source::Step { step: 1, port: "model".into(), index: None },
            to: "/out".into(),
            place: place(20),
        };
        Plan {
            name: "bench".into(),
            file: "/x/pipe.yaml".into(),
            steps: vec![Step::default(), step, other],
            outputs: vec![output],
        }
    }

    #[test]
    fn a_plan_comes_back_in_every_field() {
        let plan = plan();
        let back = parse(&render(&plan)).unwrap();
        assert_eq!(serde_json::to_value(&back).unwrap(), serde_json::to_value(&plan).unwrap());
    }

    #[test]
    fn nothing_but_the_whole_is_read() {
        let bytes = render(&plan());
        for at in 0..bytes.len() {
            assert!(parse(&bytes[..at]).is_none(), "cut at {at}");
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert!(parse(&bytes).is_none(), "flip at {at}");
        }
    }
}
