//! Canonical parameters as bytes: a tenth of what they take as a tree of maps. Exact: what comes out
//! is what went in, numbers to the bit, since keys are made of it. Knows no parameter by name.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Number, Value};

/// The parameters of a step.
#[derive(Clone, PartialEq, Eq)]
pub struct Params(Arc<[u8]>);

impl Params {
    /// All of them.
    pub fn value(&self) -> Value {
        take(&mut &*self.0).unwrap_or_default()
    }

    /// The one called `name`.
    pub fn get(&self, name: &str) -> Option<Value> {
        let mut bytes = &*self.0;
        if number(&mut bytes)? != OBJECT {
            return None;
        }
        for _ in 0..number(&mut bytes)? {
            if bytes_of(&mut bytes)? == name.as_bytes() {
                return take(&mut bytes);
            }
            skip(&mut bytes)?;
        }
        None
    }

    /// As bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// And back: only of what [`Params::bytes`] gave, as a digest over it tells.
    pub(super) fn of_bytes(bytes: &[u8]) -> Params {
        Params(bytes.into())
    }

    /// Holds what `other` holds, if that is the same.
    pub fn like(&mut self, other: &Params) {
        if self == other {
            self.0 = other.0.clone();
        }
    }
}

impl From<Value> for Params {
    fn from(value: Value) -> Params {
        let mut bytes = Vec::new();
        put_value(&mut bytes, &value);
        Params(bytes.into())
    }
}

impl Default for Params {
    fn default() -> Params {
        Value::Null.into()
    }
}

impl fmt::Debug for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value().fmt(f)
    }
}

impl Serialize for Params {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.value().serialize(to)
    }
}

impl<'de> Deserialize<'de> for Params {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Params, D::Error> {
        Value::deserialize(from).map(Params::from)
    }
}

const ARRAY: u64 = 7;
const OBJECT: u64 = 8;

/// Seven bits a byte, the lowest first.
pub(super) fn put(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    put(to, text.len() as u64);
    to.extend_from_slice(text.as_bytes());
}

/// Appends a value.
pub(super) fn put_value(to: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null => put(to, 0),
        Value::Bool(yes) => put(to, 1 + u64::from(*yes)),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(n), _) => {
                put(to, 3);
                put(to, n);
            }
            (_, Some(n)) => {
                put(to, 4);
                put(to, n as u64);
            }
            _ => {
                put(to, 5);
                let bits = number.as_f64().unwrap_or_default().to_bits();
                to.extend_from_slice(&bits.to_le_bytes());
            }
        },
        Value::String(text) => {
            put(to, 6);
            put_text(to, text);
        }
        Value::Array(items) => {
            put(to, ARRAY);
            put(to, items.len() as u64);
            items.iter().for_each(|item| put_value(to, item));
        }
        Value::Object(fields) => {
            put(to, OBJECT);
            put(to, fields.len() as u64);
            for (name, value) in fields {
                put_text(to, name);
                put_value(to, value);
            }
        }
    }
}

/// A number from the front.
pub(super) fn number(from: &mut &[u8]) -> Option<u64> {
    let (mut number, mut shift) = (0u64, 0);
    loop {
        let (&byte, rest) = from.split_first()?;
        *from = rest;
        number |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte < 0x80 {
            return Some(number);
        }
        shift += 7;
    }
}

/// Bytes from the front.
pub(super) fn cut<'a>(from: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (cut, rest) = from.split_at_checked(len)?;
    *from = rest;
    Some(cut)
}

fn bytes_of<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = number(from)? as usize;
    cut(from, len)
}

fn text<'a>(from: &mut &'a [u8]) -> Option<&'a str> {
    std::str::from_utf8(bytes_of(from)?).ok()
}

fn float(from: &mut &[u8]) -> Option<f64> {
    Some(f64::from_le_bytes(cut(from, 8)?.try_into().ok()?))
}

/// A value from the front.
pub(super) fn take(from: &mut &[u8]) -> Option<Value> {
    Some(match number(from)? {
        0 => Value::Null,
        1 => Value::Bool(false),
        2 => Value::Bool(true),
        3 => Value::Number(number(from)?.into()),
        4 => Value::Number((number(from)? as i64).into()),
        5 => Value::Number(Number::from_f64(float(from)?)?),
        6 => Value::String(text(from)?.to_string()),
        ARRAY => {
            let count = number(from)?;
            Value::Array((0..count).map(|_| take(from)).collect::<Option<_>>()?)
        }
        OBJECT => {
            let mut fields = Map::new();
            for _ in 0..number(from)? {
                let name = text(from)?.to_string();
                fields.insert(name, take(from)?);
            }
            Value::Object(fields)
        }
        _ => return None,
    })
}

fn skip(from: &mut &[u8]) -> Option<()> {
    match number(from)? {
        0..=2 => {}
        3 | 4 => {
            number(from)?;
        }
        5 => {
            cut(from, 8)?;
        }
        6 => {
            bytes_of(from)?;
        }
        ARRAY => {
            for _ in 0..number(from)? {
                skip(from)?;
            }
        }
        OBJECT => {
            for _ in 0..number(from)? {
                bytes_of(from)?;
                skip(from)?;
            }
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            let list = prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from);
            let fields = prop::collection::btree_map("[a-c]{0,2}", inner, 0..4);
            prop_oneof![list, fields.prop_map(|f| Value::Object(f.into_iter().collect()))]
        })
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(value in values()) {
            let params = Params::from(value.clone());
            prop_assert_eq!(params.value().to_string(), value.to_string());
            for name in ["", "a", "b", "ab", "none"] {
                prop_assert_eq!(params.get(name), value.get(name).cloned());
            }
            prop_assert_eq!(&Params::of_bytes(params.bytes()), &params);
            let text = serde_json::to_string(&params).unwrap();
            prop_assert_eq!(text, value.to_string());
        }
    }

    #[test]
    fn numbers_are_exact_and_kinds_stay_apart() {
        let floats = [0.1, -0.0, 1.0, 3e-4, f64::MIN_POSITIVE, f64::MAX, 1.0 + f64::EPSILON];
        let value = json!({ "floats": floats, "whole": [1, -1, u64::MAX, i64::MIN] });
        let back = Params::from(value.clone()).value();
        for (n, float) in floats.iter().enumerate() {
            assert_eq!(back["floats"][n].as_f64().unwrap().to_bits(), float.to_bits());
        }
        assert_eq!(back.to_string(), value.to_string());
    }
}
