//! Random graphs: the cache changes what is executed, never what comes out.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use proptest::prelude::*;

use crate::toys::Bench;

/// One toy step: earlier steps it takes (a bit each), its text, how much of the result it keeps.
#[derive(Clone, Debug)]
struct Node {
    needs: u8,
    text: u8,
    take: usize,
}

fn node() -> impl Strategy<Value = Node> {
    let take = prop_oneof![Just(0), Just(2), Just(1 << 20)];
    (any::<u8>(), 0..3u8, take).prop_map(|(needs, text, take)| Node { needs, text, take })
}

fn needs(nodes: &[Node], at: usize) -> Vec<usize> {
    (0..at).filter(|&other| nodes[at].needs >> other & 1 == 1).collect()
}

fn yaml(nodes: &[Node]) -> String {
    let mut text = String::from("steps:\n");
    for (at, node) in nodes.iter().enumerate() {
        let parts: Vec<String> =
            needs(nodes, at).iter().map(|other| format!("s{other}.text")).collect();
        let parts = if parts.is_empty() {
            String::new()
        } else {
            format!("in: {{ parts: [{}] }}, ", parts.join(", "))
        };
        // The step's number in its text: no two steps have one key.
        let _ = writeln!(
            text,
            "  s{at}: {{ stage: concat, {parts}with: {{ text: '{}{at}', take: {} }} }}",
            node.text, node.take
        );
    }
    text
}

/// Text, characters kept, inputs' bytes.
type PreImage = (String, usize, Vec<String>);

/// What each step decides on (parameters, inputs' bytes) and makes, without any engine.
fn model(nodes: &[Node]) -> Vec<(PreImage, String)> {
    let mut all: Vec<(PreImage, String)> = Vec::new();
    for (at, node) in nodes.iter().enumerate() {
        let text = format!("{}{at}", node.text);
        let inputs: Vec<String> = needs(nodes, at).iter().map(|&o| all[o].1.clone()).collect();
        let made = (inputs.concat() + &text).chars().take(node.take).collect();
        all.push(((text, node.take, inputs), made));
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_changed_is_executed_and_nothing_else(
        before in prop::collection::vec(node(), 1..8),
        at in any::<prop::sample::Index>(),
        change in node(),
    ) {
        let mut after = before.clone();
        let at = at.index(after.len());
        (after[at].text, after[at].take) = (change.text, change.take);
        let warm = Bench::new();
        let first = warm.run(&yaml(&before));
        prop_assert_eq!(first.summary.ran, before.len());

        let cached = warm.run(&yaml(&after));
        let (old, new) = (model(&before), model(&after));
        let changed = (0..new.len()).filter(|&s| old[s].0 != new[s].0).map(|s| format!("s{s}"));
        let executed: BTreeSet<String> = cached.launched().into_iter().map(String::from).collect();
        prop_assert_eq!(executed, changed.collect::<BTreeSet<_>>());

        let cold = Bench::new().run(&yaml(&after));
        prop_assert_eq!(cached.digests(), cold.digests());
        for (s, (_, made)) in new.iter().enumerate() {
            prop_assert_eq!(&cached.text(&warm.cache, &format!("s{s}")), made);
        }
    }
}
