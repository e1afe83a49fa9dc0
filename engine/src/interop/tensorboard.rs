//! Event files of TensorBoard: records with checksums around the few protobuf fields that scalars
//! need. One directory a step, which TensorBoard shows as a run.

use std::collections::BTreeMap;

use super::crc32c::masked;
use super::{Course, plain};
use crate::run::Past;

/// Event files by their path below the directory to write.
pub fn files(past: &Past, courses: &[Course]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for (step, course) in past.plan.steps.iter().zip(courses) {
        if course.points.is_empty() && course.facts.metrics.is_empty() {
            continue;
        }
        let started = past.info.started_s;
        let mut file = record(&version(started));
        for point in &course.points {
            let scalars = point.values.iter().map(|(name, value)| (name.as_str(), *value));
            file.extend(record(&event(started + point.t, point.at, scalars)));
        }
        // What was measured in the end stands where the work ended.
        let end = course.points.last();
        let (at, t) = end.map_or((0, 0.0), |point| (point.at, point.t));
        let named: Vec<(String, f64)> =
            course.facts.metrics.iter().map(|(n, v)| (format!("result/{n}"), *v)).collect();
        if !named.is_empty() {
            let scalars = named.iter().map(|(name, value)| (name.as_str(), *value));
            file.extend(record(&event(started + t, at, scalars)));
        }
        let name = format!("events.out.tfevents.{}.{}", started as u64, past.info.id);
        files.insert(format!("{}/{name}", plain(&step.name)), file);
    }
    files
}

/// `length, crc(length), bytes, crc(bytes)`.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked(&length).to_le_bytes());
    out.extend(bytes);
    out.extend(masked(bytes).to_le_bytes());
    out
}

/// `Event { wall_time = 1, file_version = 3 }`, the first of a file.
fn version(time: f64) -> Vec<u8> {
    let mut out = fixed64(1, time);
    out.extend(delimited(3, b"brain.Event:2"));
    out
}

/// `Event { wall_time = 1, step = 2, summary = 5 { value = 1 { tag = 1, simple_value = 2 } } }`.
fn event<'a>(time: f64, step: u64, scalars: impl Iterator<Item = (&'a str, f64)>) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in scalars {
        let mut one = delimited(1, tag.as_bytes());
        one.push(2 << 3 | 5);
        one.extend((value as f32).to_le_bytes());
        summary.extend(delimited(1, &one));
    }
    let mut out = fixed64(1, time);
    out.push(2 << 3);
    out.extend(varint(step));
    out.extend(delimited(5, &summary));
    out
}

fn fixed64(field: u8, value: f64) -> Vec<u8> {
    let mut out = vec![field << 3 | 1];
    out.extend(value.to_le_bytes());
    out
}

fn delimited(field: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    out.extend(varint(bytes.len() as u64));
    out.extend(bytes);
    out
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_length() {
        assert_eq!(varint(0), [0]);
        assert_eq!(varint(300), [0xac, 0x02], "the example of protobuf's own page");
        assert_eq!(varint(u64::MAX).len(), 10);
    }

    /// The bytes that protobuf gives for the same message, by its published wire format.
    #[test]
    fn a_scalar_is_this_message() {
        let bytes = event(1.5, 7, [("loss", 0.25)].into_iter());
        let mut wanted = vec![0x09];
        wanted.extend(1.5f64.to_le_bytes());
        wanted.extend([0x10, 7, 0x2a, 13, 0x0a, 11, 0x0a, 4]);
        wanted.extend(b"loss");
        wanted.push(0x15);
        wanted.extend(0.25f32.to_le_bytes());
        assert_eq!(bytes, wanted);
        let framed = record(&bytes);
        assert_eq!(framed.len(), bytes.len() + 16);
        assert_eq!(framed[..8], (bytes.len() as u64).to_le_bytes());
    }
}
