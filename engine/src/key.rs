//! Pure: what decides a step's output → its pre-image → its key; and the difference of two.
//!
//! | value | in the key | why |
//! |---|---|---|
//! | key format version, stage name, stage `VERSION` | yes | same inputs, new code, other bytes |
//! | resolved parameters, defaults filled in, sorted | yes | the value, not the YAML: comments and order are free |
//! | input digests by port, with the number of list items | yes | equal bytes upstream stop the ripple |
//! | seed, dtype, device kind | yes (they are parameters) | they change the numbers |
//! | base names of inputs | only where the stage reads them (`command`, `text`) | a format may hang on them |
//! | repository and commit of inputs from a hub | yes, beside their digests | the revision is part of what was asked |
//! | environment variables | only those a command declares (they are parameters) | |
//! | step name, pipeline name, position | no | renaming must not retrain |
//! | absolute paths, times, host, user, thread count, GPU index | no | caches move between machines |
//!
//! One walk makes both the key and its explanation, so `why` can never disagree with the key.

use std::collections::BTreeMap;

use cache::{Digest, Key};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Raised when the meaning of a pre-image changes.
pub const FORMAT: u32 = 1;

/// Everything that decides the output of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreImage {
    /// [`FORMAT`].
    pub format: u32,
    /// Input artifacts by port.
    pub inputs: BTreeMap<String, Vec<InputId>>,
    /// Canonical parameters.
    pub params: Value,
    /// Stage name.
    pub stage: String,
    /// Stage version.
    pub version: u32,
}

/// What identifies one input artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputId {
    /// Digest of its bytes.
    pub digest: Digest,
    /// Number within a list artifact.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub index: Option<u32>,
    /// Base name, where it matters; of what is from a hub `owner/name@commit`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
}

impl PreImage {
    /// The canonical text: JSON with sorted keys and no spaces. Quoting makes it unambiguous.
    pub fn text(&self) -> String {
        // Fields and ports are declared and kept in sorted order.
        serde_json::to_string(self).expect("a pre-image is plain data")
    }

    /// The pre-image in `text`, if it is one.
    pub fn parse(text: &str) -> Option<PreImage> {
        serde_json::from_str(text).ok()
    }

    /// The name of the canonical text.
    pub fn key(&self) -> Key {
        Key::of(self.text().as_bytes())
    }
}

/// One difference between two pre-images.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "what")]
pub enum Difference {
    /// Another kind of work altogether.
    Stage {
        /// Earlier stage.
        old: String,
        /// Stage now.
        new: String,
    },
    /// The stage's code has another version (or the key format has).
    Version {
        /// Earlier version.
        old: u32,
        /// Version now.
        new: u32,
    },
    /// A parameter; nested ones are dotted.
    Param {
        /// `schedule.warmup`.
        name: String,
        /// Earlier value.
        old: Option<Value>,
        /// Value now.
        new: Option<Value>,
    },
    /// The artifacts at a port.
    Input {
        /// The port.
        port: String,
        /// Earlier artifacts.
        old: Vec<InputId>,
        /// Artifacts now.
        new: Vec<InputId>,
    },
}

/// Everything in which `new` differs from `old`; empty iff their keys are equal.
pub fn differences(old: &PreImage, new: &PreImage) -> Vec<Difference> {
    let mut found = Vec::new();
    if old.stage != new.stage {
        found.push(Difference::Stage { old: old.stage.clone(), new: new.stage.clone() });
    }
    if (old.version, old.format) != (new.version, new.format) {
        found.push(Difference::Version { old: old.version, new: new.version });
    }
    params("", Some(&old.params), Some(&new.params), &mut found);
    let ports: std::collections::BTreeSet<&String> =
        old.inputs.keys().chain(new.inputs.keys()).collect();
    for port in ports {
        let of = |image: &PreImage| image.inputs.get(port).cloned().unwrap_or_default();
        let (old, new) = (of(old), of(new));
        if old != new {
            found.push(Difference::Input { port: port.clone(), old, new });
        }
    }
    found
}

fn params(name: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<Difference>) {
    if old == new {
        return;
    }
    if let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) {
        let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
        for inner in names {
            let path = if name.is_empty() { inner.clone() } else { format!("{name}.{inner}") };
            params(&path, a.get(inner), b.get(inner), found);
        }
        return;
    }
    found.push(Difference::Param { name: name.into(), old: old.cloned(), new: new.cloned() });
}

/// How many differences [`differences`] finds, made without them; not counted beyond `most`.
pub fn count(old: &PreImage, new: &PreImage, most: usize) -> usize {
    let mut found = usize::from(old.stage != new.stage);
    found += usize::from((old.version, old.format) != (new.version, new.format));
    let gone =
        old.inputs.iter().filter(|(port, ids)| !ids.is_empty() && !new.inputs.contains_key(*port));
    let other = new.inputs.iter().filter(|(port, ids)| match old.inputs.get(*port) {
        Some(old) => old != *ids,
        None => !ids.is_empty(),
    });
    found += gone.count() + other.count();
    if found < most {
        found += count_params(Some(&old.params), Some(&new.params), most - found);
    }
    found
}

fn count_params(old: Option<&Value>, new: Option<&Value>, most: usize) -> usize {
    let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) else {
        return usize::from(old != new);
    };
    let mut found = 0;
    for (name, old) in a {
        found += count_params(Some(old), b.get(name), most.saturating_sub(found));
        if found >= most {
            return found;
        }
    }
    found + b.keys().filter(|name| !a.contains_key(*name)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn image() -> PreImage {
        let digest = Digest::of(b"model");
        PreImage {
            format: FORMAT,
            inputs: [("model".to_string(), vec![InputId { digest, index: Some(2), name: None }])]
                .into(),
            params: json!({"lr": 0.003, "layers": [2], "schedule": {"warmup": 0.05}}),
            stage: "orient".into(),
            version: 1,
        }
    }

    fn changed(edit: impl FnOnce(&mut PreImage)) -> Vec<Difference> {
        let mut new = image();
        edit(&mut new);
        assert_ne!(image().key(), new.key());
        differences(&image(), &new)
    }

    proptest! {
        #[test]
        fn differences_are_counted_as_they_are_found(
            lr in 0..3u8, warm in 0..3u8, more in 0..3u8, digest in 0..3u8, port in 0..3u8, version in 1..3u32,
        ) {
            let mut new = image();
            new.version = version;
            match lr {
                0 => {}
                1 => new.params["lr"] = json!(1),
                _ => drop(new.params.as_object_mut().unwrap().remove("lr")),
            }
            match warm {
                0 => {}
                1 => new.params["schedule"]["warmup"] = json!(null),
                _ => new.params["schedule"] = json!({ "other": [1] }),
            }
            match more {
                0 => {}
                1 => new.params["more"] = json!({ "a": 1, "b": {} }),
                _ => new.params["layers"] = json!({}),
            }
            match digest {
                0 => {}
                1 => new.inputs.get_mut("model").unwrap()[0].index = None,
                _ => drop(new.inputs.insert("model".into(), Vec::new())),
            }
            match port {
                0 => {}
                1 => drop(new.inputs.insert("empty".into(), Vec::new())),
                _ => new.inputs = [("other".to_string(), new.inputs["model"].clone())].into(),
            }
            for (old, new) in [(&image(), &new), (&new, &image())] {
                let found = differences(old, new).len();
                prop_assert_eq!(count(old, new, usize::MAX), found);
                for most in 0..4 {
                    prop_assert_eq!(count(old, new, most).min(most), found.min(most));
                }
            }
        }
    }

    #[test]
    fn stage_changes_key() {
        let found = changed(|i| i.stage = "align".into());
        assert_eq!(found, [Difference::Stage { old: "orient".into(), new: "align".into() }]);
    }

    #[test]
    fn version_changes_key() {
        let found = changed(|i| i.version = 2);
        assert_eq!(found, [Difference::Version { old: 1, new: 2 }]);
    }

    #[test]
    fn nested_param_changes_key_and_is_named() {
        let found = changed(|i| i.params["schedule"]["warmup"] = json!(0.1));
        let Difference::Param { name, old, new } = &found[0] else { panic!("{found:?}") };
        assert_eq!(
            (name.as_str(), old, new),
            ("schedule.warmup", &Some(json!(0.05)), &Some(json!(0.1)))
        );
    }

    #[test]
    fn input_digest_number_and_name_change_key() {
        for edit in [
            (|i| i.digest = Digest::of(b"other")) as fn(&mut InputId),
            |i| i.index = Some(3),
            |i| i.index = None,
            |i| i.name = Some("a.jsonl".into()),
        ] {
            let found = changed(|i| edit(&mut i.inputs.get_mut("model").unwrap()[0]));
            assert!(matches!(&found[..], [Difference::Input { port, .. }] if port == "model"));
        }
    }

    #[test]
    fn port_changes_key() {
        let found = changed(|i| {
            let moved = i.inputs.remove("model").unwrap();
            i.inputs.insert("teacher".into(), moved);
        });
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn text_round_trips_and_keeps_key() {
        let parsed = PreImage::parse(&image().text()).unwrap();
        assert_eq!((parsed.key(), parsed), (image().key(), image()));
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            (-1e6f64..1e6).prop_map(Value::from),
            "[ -~]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[a-c\".]{1,2}", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_text_is_that_of_a_sorted_tree(params in value()) {
            let image = PreImage { params, ..image() };
            prop_assert_eq!(image.text(), serde_json::to_value(&image).unwrap().to_string());
        }

        #[test]
        fn keys_are_equal_iff_nothing_differs(a in value(), b in value()) {
            let (mut old, mut new) = (image(), image());
            (old.params, new.params) = (a, b);
            prop_assert_eq!(old.key() == new.key(), differences(&old, &new).is_empty());
        }
    }
}
