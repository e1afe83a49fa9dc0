//! Plans as bytes, kept under the digests of all that they were made from, so that a long pipeline
//! is not parsed and checked anew by every run. Knows every field of a plan, and no cache.
//!
//! Texts, parameters, origins and what else many steps have in common, as instances of a matrix and
//! steps of one kind do, are written once and named by number; steps lie in pieces that are read side
//! by side.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use cache::Digest;
use rayon::prelude::*;

use super::params::{self, Params, cut, put, put_value};
use super::shared::{Shared, Text};
use super::{Output, Place, Plan, Port, Resources, Source, Step, Use};

/// Raised with every change of a plan's fields.
const MAGIC: &[u8] = b"pipe plan 5\n";
/// Steps in a piece.
const PIECE: usize = 1024;
/// Parts of a table that are held to be shared.
const LATELY: usize = 64;

/// The plan as bytes.
pub fn render(plan: &Plan) -> Vec<u8> {
    let mut to = Writer::default();
    to.text(&plan.name);
    to.path(&plan.file);
    to.list(&plan.outputs, |to, output| {
        to.text(&output.name);
        to.source(&output.source);
        to.path(&output.to);
        to.place(&output.place);
    });
    let rest = std::mem::take(&mut to.bytes);
    let mut pieces = Vec::new();
    for steps in plan.steps.chunks(PIECE) {
        to.list(steps, Writer::step);
        pieces.push(std::mem::take(&mut to.bytes));
    }
    let mut body = Vec::new();
    put_all(&mut body, to.texts.all());
    put_all(&mut body, to.params.all());
    put_all(&mut body, to.common.all());
    put_all(&mut body, to.origins.all());
    put_all(&mut body, &pieces);
    body.extend_from_slice(&rest);
    [MAGIC, Digest::of(&body).as_bytes(), &body].concat()
}

fn put_all(to: &mut Vec<u8>, all: &[Vec<u8>]) {
    put(to, all.len() as u64);
    for bytes in all {
        put(to, bytes.len() as u64);
        to.extend_from_slice(bytes);
    }
}

/// The plan in bytes that [`render`] made; `None` of any others.
pub fn parse(bytes: &[u8]) -> Option<Plan> {
    let (sum, mut body) = bytes.strip_prefix(MAGIC)?.split_at_checked(32)?;
    if Digest::of(body).as_bytes() != sum {
        return None;
    }
    let texts = take_all(&mut body)?;
    let texts: Option<Vec<&str>> = texts.into_iter().map(|b| std::str::from_utf8(b).ok()).collect();
    let (params, common) = (take_all(&mut body)?, take_all(&mut body)?);
    let (origins, pieces) = (take_all(&mut body)?, take_all(&mut body)?);
    let tables = Tables { texts: texts?, params, common, origins };
    let steps = pieces.into_par_iter().map(|bytes| Reader::of(bytes, &tables).list(Reader::step));
    let steps: Vec<Vec<Step>> = steps.collect::<Option<_>>()?;
    let mut from = Reader::of(body, &tables);
    let (name, file) = (from.text()?.to_string(), from.path()?);
    let outputs = from.list(|from| {
        let (name, source) = (from.text()?.to_string(), from.source()?);
        Some(Output { name, source, to: from.path()?, place: from.place()? })
    })?;
    let mut all = Vec::with_capacity(steps.iter().map(Vec::len).sum());
    steps.into_iter().for_each(|piece| all.extend(piece));
    Some(Plan { name, file, steps: all, outputs })
}

fn take_all<'a>(from: &mut &'a [u8]) -> Option<Vec<&'a [u8]>> {
    let count = params::number(from)? as usize;
    // An item has a byte at least.
    let mut all = Vec::with_capacity(count.min(from.len()));
    for _ in 0..count {
        let len = params::number(from)? as usize;
        all.push(cut(from, len)?);
    }
    Some(all)
}

/// Bytes by number, equal ones once.
#[derive(Default)]
struct Table {
    all: Vec<Vec<u8>>,
    known: HashMap<Vec<u8>, u64>,
}

impl Table {
    fn number(&mut self, bytes: &[u8]) -> u64 {
        if let Some(&number) = self.known.get(bytes) {
            return number;
        }
        let number = self.all.len() as u64;
        self.all.push(bytes.to_vec());
        self.known.insert(bytes.to_vec(), number);
        number
    }

    fn all(&self) -> &[Vec<u8>] {
        &self.all
    }
}

#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    texts: Table,
    params: Table,
    common: Table,
    origins: Table,
}

impl Writer {
    fn number(&mut self, number: u64) {
        put(&mut self.bytes, number);
    }

    fn text(&mut self, text: &str) {
        let number = self.texts.number(text.as_bytes());
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

    fn step(&mut self, step: &Step) {
        // Every field, so that a new one is not forgotten.
        #[rustfmt::skip]
        let Step {
            name, group, coords, stage, params, inputs, after, ports, resources, retries, timeout_s,
            cache, secrets, place, origins, uses, auto,
        } = step;
        self.text(name);
        self.list(coords, |to, (axis, value)| {
            to.text(axis);
            put_value(&mut to.bytes, value);
        });
        let params = self.params.number(params.bytes());
        self.number(params);
        self.list(inputs, |to, port| {
            to.text(&port.name);
            to.number(u64::from(port.named) + 2 * u64::from(port.list));
            to.place(&port.place);
            to.list(&port.sources, Writer::source);
        });
        self.list(after, |to, at| to.number(*at as u64));
        self.text(group);
        self.place(place);
        let own = std::mem::take(&mut self.bytes);
        self.number(origins.len() as u64);
        for (name, place) in origins.iter() {
            self.text(name);
            self.place(place);
        }
        let origins = self.origins.number(&std::mem::take(&mut self.bytes));
        self.text(stage);
        self.list(ports, |to, (name, list, file)| {
            to.text(name);
            to.number(u64::from(*list));
            to.text(file);
        });
        let Resources { cpu, gpu, memory, vram, gpu_type, time_s } = &**resources;
        self.maybe(cpu.map(u64::from));
        for number in [u64::from(*gpu), *memory, *vram, u64::from(*retries)] {
            self.number(number);
        }
        self.maybe_text(gpu_type.as_deref());
        self.maybe_float(*time_s);
        self.maybe_float(*timeout_s);
        self.number(u64::from(*cache));
        self.list(secrets, |to, name| to.text(name));
        self.list(uses, |to, one| {
            let Use { parameter, name, value, place } = one;
            to.text(parameter);
            to.text(name);
            to.text(value);
            to.place(place);
        });
        self.maybe_text(auto.as_deref());
        let common = std::mem::replace(&mut self.bytes, own);
        let common = self.common.number(&common);
        self.number(origins);
        self.number(common);
    }
}

/// What steps name by number.
struct Tables<'a> {
    texts: Vec<&'a str>,
    params: Vec<&'a [u8]>,
    common: Vec<&'a [u8]>,
    origins: Vec<&'a [u8]>,
}

/// What was made of the parts of a table lately, to be shared by all that name them. Each piece has
/// its own: threads that count who shares one and the same part would hold each other up.
struct Lately<T>([Option<(usize, T)>; LATELY]);

impl<T> Default for Lately<T> {
    fn default() -> Lately<T> {
        Lately(std::array::from_fn(|_| None))
    }
}

impl<T: Clone> Lately<T> {
    fn known(&self, at: usize) -> Option<T> {
        let (of, made) = self.0[at % LATELY].as_ref()?;
        (*of == at).then(|| made.clone())
    }

    fn keep(&mut self, at: usize, made: T) -> T {
        self.0[at % LATELY].insert((at, made)).1.clone()
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    tables: &'a Tables<'a>,
    texts: Lately<Text>,
    params: Lately<Params>,
    common: Lately<Step>,
    origins: Lately<Shared<BTreeMap<String, Place>>>,
}

impl<'a> Reader<'a> {
    fn of(bytes: &'a [u8], tables: &'a Tables<'a>) -> Reader<'a> {
        let (texts, params, common, origins) = Default::default();
        Reader { bytes, tables, texts, params, common, origins }
    }

    fn number(&mut self) -> Option<u64> {
        params::number(&mut self.bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        Some(self.number()? == 1)
    }

    fn small(&mut self) -> Option<u32> {
        self.number()?.try_into().ok()
    }

    fn text(&mut self) -> Option<&'a str> {
        let at = self.number()? as usize;
        self.tables.texts.get(at).copied()
    }

    fn shared(&mut self) -> Option<Text> {
        let at = self.number()? as usize;
        match self.texts.known(at) {
            Some(text) => Some(text),
            None => Some(self.texts.keep(at, Text::from(*self.tables.texts.get(at)?))),
        }
    }

    /// What `read` makes of the bytes of a table, unless that was made lately.
    fn part<T: Clone>(
        &mut self,
        table: &[&'a [u8]],
        lately: impl Fn(&mut Self) -> &mut Lately<T>,
        read: impl Fn(&mut Self) -> Option<T>,
    ) -> Option<T> {
        let at = self.number()? as usize;
        if let Some(known) = lately(self).known(at) {
            return Some(known);
        }
        let rest = std::mem::replace(&mut self.bytes, table.get(at)?);
        let made = read(self)?;
        self.bytes = rest;
        Some(lately(self).keep(at, made))
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
        Some(there.then(|| text.to_string()))
    }

    fn maybe_float(&mut self) -> Option<Option<f64>> {
        let there = self.flag()?;
        let number = f64::from_le_bytes(cut(&mut self.bytes, 8)?.try_into().ok()?);
        Some(there.then_some(number))
    }

    fn place(&mut self) -> Option<Place> {
        let file = self.shared()?;
        Some(Place { file, line: self.number()? as usize, column: self.number()? as usize })
    }

    fn source(&mut self) -> Option<Source> {
        Some(match self.number()? {
            0 => {
                let step = self.number()? as usize;
                Source::Step { step, port: self.shared()?, index: self.maybe()? }
            }
            1 => Source::Path { path: self.path()? },
            2 => Source::Hub { name: self.text()?.to_string() },
            _ => return None,
        })
    }

    fn port(&mut self) -> Option<Port> {
        let (name, flags) = (self.shared()?, self.number()?);
        let (named, list) = (flags & 1 == 1, flags & 2 == 2);
        Some(Port { name, named, list, place: self.place()?, sources: self.list(Reader::source)? })
    }

    fn step(&mut self) -> Option<Step> {
        let name = self.text()?.to_string();
        let coords = self.list(|from| Some((from.shared()?, params::take(&mut from.bytes)?)))?;
        let Tables { params, common, origins, .. } = self.tables;
        let of = |from: &mut Self| Some(Params::of_bytes(from.bytes));
        let params = self.part(params, |from| &mut from.params, of)?;
        let inputs = self.list(Reader::port)?;
        let after = self.list(|from| Some(from.number()? as usize))?;
        let (group, place) = (self.shared()?, self.place()?);
        let origins = self.part(origins, |from| &mut from.origins, Reader::origins)?;
        let common = self.part(common, |from| &mut from.common, Reader::common)?;
        Some(Step { name, group, coords, params, inputs, after, place, origins, ..common })
    }

    fn origins(&mut self) -> Option<Shared<BTreeMap<String, Place>>> {
        let mut origins = BTreeMap::new();
        // One by one: to collect them would sort them.
        for _ in 0..self.number()? {
            origins.insert(self.text()?.to_string(), self.place()?);
        }
        Some(origins.into())
    }

    /// A step without what is its own.
    fn common(&mut self) -> Option<Step> {
        let own = |text: Option<&str>| text.map(str::to_string);
        let mut step = Step { stage: self.shared()?, ..Step::default() };
        step.ports = Shared::from(
            self.list(|from| Some((own(from.text())?, from.flag()?, own(from.text())?)))?,
        );
        let cpu = self.maybe()?;
        let (gpu, memory, vram) = (self.small()?, self.number()?, self.number()?);
        step.retries = self.small()?;
        let (gpu_type, time_s) = (self.maybe_text()?, self.maybe_float()?);
        step.resources = Resources { cpu, gpu, memory, vram, gpu_type, time_s }.into();
        step.timeout_s = self.maybe_float()?;
        step.cache = self.flag()?;
        step.secrets = self.list(|from| own(from.text()))?.into();
        step.uses = Shared::from(self.list(|from| {
            let (parameter, name) = (own(from.text())?, own(from.text())?);
            Some(Use { parameter, name, value: own(from.text())?, place: from.place()? })
        })?);
        step.auto = self.maybe_text()?.map(Text::from);
        Some(step)
    }
}

#[cfg(test)]
mod tests;
