//! Whose entries are believed, and who may read keys.

use std::sync::Arc;

use cache::remote::{Found, Remote, Settings, SigningKey, Trust};

use crate::made::*;
use crate::memory::{Client, Memory};
use crate::support::*;

struct Lab {
    store: Arc<Memory>,
    home: Home,
}

impl Lab {
    fn new() -> Lab {
        Lab { store: Arc::default(), home: Home::new() }
    }

    fn key(&self, name: &str) -> SigningKey {
        let path = self.home.dir.path().join(name);
        SigningKey::read(&path).or_else(|_| SigningKey::generate(&path, name)).unwrap()
    }

    /// A remote of somebody who believes these, and signs as this one.
    fn of(&self, believes: &[&str], signs: Option<&str>) -> Remote {
        let mut settings = Settings::new("memory");
        let keys = believes.iter().map(|name| self.key(name).public().clone());
        settings.trust = Trust::Keys(keys.collect());
        settings.sign_with = signs.map(|name| self.key(name));
        Client::new(&self.store, 1).remote_with(settings)
    }

    fn trusting(&self) -> Remote {
        Client::new(&self.store, 1).remote()
    }
}

#[test]
fn an_entry_needs_a_signature_of_a_listed_key() {
    let lab = Lab::new();
    let entry = result(&lab.home.cache, "one", false);
    push(&lab.trusting(), &lab.home.cache, &entry).unwrap();
    let reader = Home::new();
    for believes in [&["ann"][..], &[]] {
        let Found::Rejected(why) = lab.of(believes, None).find(&reader.cache, &entry.key) else {
            panic!()
        };
        assert!(why.contains("signed") || why.contains("no key is listed"), "{why}");
    }
    // Whoever signs replaces what nobody signed.
    assert!(push(&lab.of(&["ann"], Some("ann")), &lab.home.cache, &entry).unwrap().entry);
    pull(&lab.of(&["bob", "ann"], None), &reader.cache, &entry.key);
    let other = lab.of(&["bob"], None).find(&reader.cache, &entry.key);
    assert!(matches!(other, Found::Rejected(_)), "{other:?}");
    pull(&lab.trusting(), &Home::new().cache, &entry.key);
}

#[test]
fn several_may_sign_the_same() {
    let lab = Lab::new();
    let entry = result(&lab.home.cache, "one", false);
    for name in ["ann", "bob"] {
        let remote = lab.of(&["ann", "bob"], Some(name));
        assert!(push(&remote, &lab.home.cache, &entry).unwrap().entry);
        assert!(!push(&remote, &lab.home.cache, &entry).unwrap().entry);
    }
    for name in ["ann", "bob"] {
        hit(lab.of(&[name], None).find(&lab.home.cache, &entry.key));
    }
}

#[test]
fn a_believed_result_is_not_replaced_by_another() {
    let lab = Lab::new();
    let (first, _) = put(&lab.home.cache, "one", "first");
    push(&lab.of(&["ann"], Some("ann")), &lab.home.cache, &first).unwrap();
    let other = Home::new();
    let (second, _) = put(&other.cache, "one", "second");
    let sent = push(&lab.of(&["ann", "bob"], Some("bob")), &other.cache, &second).unwrap();
    assert!(sent.diverged && !sent.entry);
    // Somebody who does not believe it puts another in its place, with bytes of its own.
    assert!(push(&lab.of(&["bob"], Some("bob")), &other.cache, &second).unwrap().entry);
    assert_eq!(hit(lab.of(&["bob"], None).find(&other.cache, &second.key)), second);
}
