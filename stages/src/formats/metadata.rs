//! The key-value metadata of a GGUF file. Values stay in the file's bytes: they are checked when
//! the file is opened and decoded when asked for. Knows no keys but those it is asked for.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context as _, Result, anyhow, bail};

use super::bytes::{Bytes, Cursor};

/// Arrays in arrays in arrays: no file has more.
const DEPTH: usize = 4;

/// A longer key or name is no name (the format's own bound for keys).
const NAME: u64 = 65535;

/// The metadata of one file.
pub struct Metadata {
    bytes: Bytes,
    entries: BTreeMap<String, (Kind, Range<usize>)>,
}

/// The type of a value, as numbered in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

/// One value; integers and floats of every width are widened, without loss.
#[derive(Clone, Debug)]
pub enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Str(&'a str),
    Array(Array<'a>),
}

/// An array that is decoded element by element.
#[derive(Clone, Debug)]
pub struct Array<'a> {
    /// What its elements are.
    pub kind: Kind,
    /// How many there are.
    pub len: usize,
    bytes: &'a [u8],
}

impl Kind {
    fn read(cursor: &mut Cursor) -> Result<Kind> {
        const KINDS: [Kind; 13] = [
            Kind::U8,
            Kind::I8,
            Kind::U16,
            Kind::I16,
            Kind::U32,
            Kind::I32,
            Kind::F32,
            Kind::Bool,
            Kind::Str,
            Kind::Array,
            Kind::U64,
            Kind::I64,
            Kind::F64,
        ];
        let id = cursor.u32()?;
        let kind = KINDS.get(id as usize).copied();
        kind.ok_or_else(|| anyhow!("type {id} before byte {} is none of GGUF's", cursor.at()))
    }

    /// Bytes of a value of fixed size.
    fn size(self) -> Option<u64> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::Str | Kind::Array => None,
        }
    }
}

impl Metadata {
    /// Reads `count` entries at the cursor, which belongs to `bytes`.
    pub(super) fn read(bytes: &Bytes, cursor: &mut Cursor, count: u64) -> Result<Metadata> {
        let mut entries = BTreeMap::new();
        for number in 0..count {
            let key = name(cursor).with_context(|| format!("metadata entry {number}"))?;
            let (kind, range) = skip_entry(cursor).with_context(|| format!("metadata `{key}`"))?;
            if entries.insert(key.clone(), (kind, range)).is_some() {
                bail!("metadata `{key}` is given twice");
            }
        }
        Ok(Metadata { bytes: bytes.clone(), entries })
    }

    /// Every key, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a value called `key`.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The value called `key`; an error if there is none or if it is text that is not UTF-8.
    pub fn get(&self, key: &str) -> Result<Value<'_>> {
        let Some((kind, range)) = self.entries.get(key) else {
            bail!("the file's metadata has no `{key}`");
        };
        let mut cursor = Cursor::new(&self.bytes[range.clone()], 0);
        value(*kind, &mut cursor).with_context(|| format!("metadata `{key}`"))
    }

    /// The integer called `key`, of any width.
    pub fn u64(&self, key: &str) -> Result<u64> {
        let found = self.get(key)?;
        found.unsigned().ok_or_else(|| other(key, &found, "an unsigned integer"))
    }

    /// The integer called `key`, of any width, if it fits.
    pub fn u32(&self, key: &str) -> Result<u32> {
        let found = self.u64(key)?;
        u32::try_from(found).with_context(|| format!("metadata `{key}` is {found}"))
    }

    /// The integer called `key`, of any width, if it fits.
    pub fn usize(&self, key: &str) -> Result<usize> {
        let found = self.u64(key)?;
        usize::try_from(found).with_context(|| format!("metadata `{key}` is {found}"))
    }

    /// The floating-point number called `key`, rounded to f32.
    pub fn f32(&self, key: &str) -> Result<f32> {
        match self.get(key)? {
            Value::Float(number) => Ok(number as f32),
            found => Err(other(key, &found, "a floating-point number")),
        }
    }

    /// The truth value called `key`.
    pub fn bool(&self, key: &str) -> Result<bool> {
        match self.get(key)? {
            Value::Bool(truth) => Ok(truth),
            found => Err(other(key, &found, "a truth value")),
        }
    }

    /// The text called `key`.
    pub fn str(&self, key: &str) -> Result<&str> {
        match self.get(key)? {
            Value::Str(text) => Ok(text),
            found => Err(other(key, &found, "a text")),
        }
    }

    /// The texts called `key`.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        self.list(key, "texts", |found| match found {
            Value::Str(text) => Some(text),
            _ => None,
        })
    }

    /// The floating-point numbers called `key`, rounded to f32.
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>> {
        self.list(key, "floating-point numbers", |found| match found {
            Value::Float(number) => Some(number as f32),
            _ => None,
        })
    }

    /// The integers called `key`, of any width.
    pub fn i64s(&self, key: &str) -> Result<Vec<i64>> {
        self.list(key, "integers", |found| match found {
            Value::Signed(number) => Some(number),
            Value::Unsigned(number) => i64::try_from(number).ok(),
            _ => None,
        })
    }

    fn list<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        pick: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Vec<T>> {
        let array = match self.get(key)? {
            Value::Array(array) => array,
            found => return Err(other(key, &found, &format!("an array of {wanted}"))),
        };
        let kind = array.kind;
        let pick = |(at, found): (usize, Result<Value<'a>>)| {
            let found = found.with_context(|| format!("metadata `{key}`, element {at}"))?;
            pick(found).ok_or_else(|| {
                anyhow!("metadata `{key}` is an array of {kind:?}, wanted {wanted} (element {at})")
            })
        };
        array.iter().enumerate().map(pick).collect()
    }
}

impl<'a> Value<'a> {
    /// The value as an integer that is not negative.
    pub fn unsigned(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(number) => Some(number),
            Value::Signed(number) => u64::try_from(number).ok(),
            _ => None,
        }
    }
}

impl<'a> Array<'a> {
    /// Its elements in order; text that is not UTF-8 is an error.
    pub fn iter(&self) -> impl Iterator<Item = Result<Value<'a>>> + use<'a> {
        let (mut cursor, kind) = (Cursor::new(self.bytes, 0), self.kind);
        (0..self.len).map(move |_| value(kind, &mut cursor))
    }
}

fn other(key: &str, found: &Value, wanted: &str) -> anyhow::Error {
    let found = match found {
        Value::Unsigned(number) => number.to_string(),
        Value::Signed(number) => number.to_string(),
        Value::Float(number) => format!("{number:?}"),
        Value::Bool(truth) => truth.to_string(),
        Value::Str(text) => format!("the text {:?}", text.chars().take(40).collect::<String>()),
        Value::Array(array) => format!("an array of {} {:?}", array.len, array.kind),
    };
    anyhow!("metadata `{key}` is {found}, wanted {wanted}")
}

/// A key or a tensor's name.
pub(super) fn name(cursor: &mut Cursor) -> Result<String> {
    let length = cursor.u64()?;
    if length > NAME {
        bail!("a name of {length} bytes before byte {}: the file is damaged", cursor.at());
    }
    let bytes = cursor.take(length)?;
    let text = std::str::from_utf8(bytes);
    Ok(text.with_context(|| format!("the name before byte {}", cursor.at()))?.to_string())
}

fn skip_entry(cursor: &mut Cursor) -> Result<(Kind, Range<usize>)> {
    let kind = Kind::read(cursor)?;
    let start = cursor.at();
    skip(kind, cursor, DEPTH)?;
    Ok((kind, start..cursor.at()))
}

/// Steps over one value and checks everything about it but texts.
fn skip(kind: Kind, cursor: &mut Cursor, depth: usize) -> Result<()> {
    match kind {
        Kind::Str => {
            let length = cursor.u64()?;
            cursor.take(length)?;
        }
        Kind::Array => {
            let Some(depth) = depth.checked_sub(1) else {
                bail!("arrays lie deeper than {DEPTH} before byte {}", cursor.at());
            };
            let (kind, len) = (Kind::read(cursor)?, cursor.u64()?);
            usize::try_from(len).context("an array's length")?;
            match kind.size().filter(|_| kind != Kind::Bool) {
                Some(size) => drop(cursor.take(len.saturating_mul(size))?),
                // Every element takes bytes or fails, so a lying length ends with the file.
                None => (0..len).try_for_each(|_| skip(kind, cursor, depth))?,
            }
        }
        Kind::Bool => {
            let byte = cursor.u8()?;
            if byte > 1 {
                bail!("a truth value before byte {} is {byte}", cursor.at());
            }
        }
        _ => drop(cursor.take(kind.size().unwrap_or(0))?),
    }
    Ok(())
}

/// Decodes the value at the cursor, over which `skip` went.
fn value<'a>(kind: Kind, cursor: &mut Cursor<'a>) -> Result<Value<'a>> {
    Ok(match kind {
        Kind::U8 => Value::Unsigned(cursor.u8()?.into()),
        Kind::U16 => Value::Unsigned(cursor.u16()?.into()),
        Kind::U32 => Value::Unsigned(cursor.u32()?.into()),
        Kind::U64 => Value::Unsigned(cursor.u64()?),
        Kind::I8 => Value::Signed((cursor.u8()? as i8).into()),
        Kind::I16 => Value::Signed((cursor.u16()? as i16).into()),
        Kind::I32 => Value::Signed(cursor.i32()?.into()),
        Kind::I64 => Value::Signed(cursor.u64()? as i64),
        Kind::F32 => Value::Float(cursor.f32()?.into()),
        Kind::F64 => Value::Float(f64::from_bits(cursor.u64()?)),
        Kind::Bool => Value::Bool(cursor.u8()? != 0),
        Kind::Str => {
            let length = cursor.u64()?;
            Value::Str(std::str::from_utf8(cursor.take(length)?).context("text")?)
        }
        Kind::Array => {
            let (kind, len) = (Kind::read(cursor)?, usize::try_from(cursor.u64()?)?);
            let mut rest = cursor.clone();
            match kind.size() {
                Some(size) => drop(rest.take((len as u64).saturating_mul(size))?),
                None => (0..len).try_for_each(|_| skip(kind, &mut rest, DEPTH))?,
            }
            Value::Array(Array { kind, len, bytes: cursor.take((rest.at() - cursor.at()) as u64)? })
        }
    })
}
