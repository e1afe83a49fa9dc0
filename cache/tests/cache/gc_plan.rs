//! What is planned to go, from facts alone: by example, and by random facts against a slow count.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use cache::gc::{
    Blob, Facts, Holder, Keeper, Name, Plan, Policy, Product, Record, Root, Trial, Why,
};
use cache::{Digest, Key};
use proptest::prelude::*;

fn days(n: u64) -> Duration {
    Duration::from_secs(n * 86_400)
}

fn blob(n: usize, bytes: u64, age: Duration) -> Blob {
    Blob { name: Name::Object(Digest::of(&n.to_le_bytes())), bytes, age, part: false }
}

fn product(n: usize, seconds: f64, blobs: &[usize]) -> Product {
    Product {
        key: Key::of(&n.to_le_bytes()),
        step: format!("s{n}"),
        stage: "toy".into(),
        seconds,
        idle: days(1),
        bytes: 0,
        here: 0,
        blobs: blobs.to_vec(),
        roots: Vec::new(),
        artifacts: Vec::new(),
        in_use: false,
        evidence: None,
    }
}

fn holder(by: Keeper, trial: Option<usize>, blobs: &[usize]) -> Holder {
    Holder { by, trial, who: String::new(), blobs: blobs.to_vec() }
}

/// Results with a blob of their own each, of these bytes and seconds.
fn apart(sizes: &[(u64, f64)]) -> Facts {
    let mut facts = Facts::default();
    for (i, &(bytes, seconds)) in sizes.iter().enumerate() {
        facts.blobs.push(blob(i, bytes, days(2)));
        facts.products.push(product(i, seconds, &[i]));
    }
    facts
}

fn at_most(max_size: u64) -> Policy {
    Policy { max_size: Some(max_size), ..Policy::default() }
}

/// Results evicted, by number.
fn evicted(plan: &Plan) -> Vec<usize> {
    let mut all: Vec<usize> = plan.evictions.iter().map(|e| e.product).collect();
    all.sort_unstable();
    all
}

#[test]
fn least_seconds_per_byte_go_first_and_no_more_than_needed() {
    let facts = apart(&[(100, 1000.0), (100, 10.0), (100, 100.0), (10, 0.5), (50, 5000.0)]);
    assert_eq!(Plan::new(&facts, &Policy::default()).evictions, []);
    let plan = Plan::new(&facts, &at_most(300));
    assert_eq!((evicted(&plan), plan.before, plan.after), (vec![1], 360, 260));
    let plan = Plan::new(&facts, &at_most(250));
    assert_eq!((evicted(&plan), plan.after), (vec![1, 3], 250));
    let plan = Plan::new(&facts, &at_most(240));
    assert_eq!((evicted(&plan), plan.after), (vec![1, 2], 160), "the small one need not go");
    assert_eq!(evicted(&Plan::new(&facts, &at_most(0))), [0, 1, 2, 3, 4]);
    let mut equal = apart(&[(10, 1.0), (10, 1.0)]);
    equal.products[1].idle = days(3);
    assert_eq!(evicted(&Plan::new(&equal, &at_most(10))), [1], "the longest unused");
}

#[test]
fn shared_bytes_go_with_the_last_that_needs_them() {
    // 0 and 1 share blob 0, which is large; 2 has its own.
    let mut facts = apart(&[(100, 10.0), (1, 10.0), (100, 15.0)]);
    facts.products[1].blobs = vec![0, 1];
    let plan = Plan::new(&facts, &at_most(120));
    assert_eq!((evicted(&plan), plan.after), (vec![2], 101), "20 seconds for the shared 100");
    facts.products[2].seconds = 50.0;
    let plan = Plan::new(&facts, &at_most(120));
    assert_eq!((evicted(&plan), plan.after), (vec![0, 1], 100));
    let bytes: Vec<u64> = plan.evictions.iter().map(|e| e.bytes).collect();
    assert_eq!(bytes.iter().sum::<u64>(), 101);
    // What a kept result needs is no gain.
    facts.products[1].roots = vec![Root::Run("r".into())];
    facts.keepers = vec![(Keeper::Run, 1)];
    let plan = Plan::new(&facts, &at_most(120));
    assert_eq!((evicted(&plan), plan.after), (vec![2], 101));
    assert_eq!((plan.kept[0].by, plan.kept[0].bytes), (Keeper::Run, 101));
}

#[test]
fn roots_stay_whatever_is_asked_and_who_keeps_them_is_told() {
    let mut facts = apart(&[(1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0), (16, 0.0)]);
    facts.products[0].roots = vec![Root::Pin("why".into()), Root::Run("r".into())];
    facts.products[1].roots = vec![Root::Run("r".into())];
    facts.holders =
        vec![holder(Keeper::Lease, None, &[0, 2]), holder(Keeper::Attempt, None, &[2, 3])];
    let kinds = [Keeper::Pin, Keeper::Run, Keeper::Lease, Keeper::Attempt];
    facts.keepers = kinds.iter().map(|&kind| (kind, 1)).collect();
    facts.products.iter_mut().for_each(|p| p.idle = days(99));
    (2..4).for_each(|i| facts.products[i].in_use = true);
    let policy = Policy { older_than: Some(days(1)), forget: true, ..at_most(0) };
    let plan = Plan::new(&facts, &policy);
    assert_eq!((evicted(&plan), plan.after, plan.over(5)), (vec![4], 15, 10));
    let kept: Vec<_> = plan.kept.iter().map(|k| (k.by, k.bytes)).collect();
    assert_eq!(kept, [(kinds[0], 1), (kinds[1], 2), (kinds[2], 4), (kinds[3], 8)]);
    assert_eq!(plan.forget, [4], "in use or kept: not forgotten");
}

#[test]
fn age_takes_what_is_old_and_forgets_only_if_asked() {
    let mut facts = apart(&[(1, 9.0), (2, 9.0), (4, 9.0)]);
    facts.products[0].idle = days(30);
    facts.products[1].idle = days(29);
    facts.products[2].idle = days(31);
    facts.products[2].blobs.clear(); // evicted before
    let mut policy = Policy { older_than: Some(days(30)), ..Policy::default() };
    let plan = Plan::new(&facts, &policy);
    assert_eq!((evicted(&plan), &plan.forget[..]), (vec![0], &[][..]));
    assert_eq!(plan.evictions[0].why, Why::Age);
    policy.forget = true;
    assert_eq!(Plan::new(&facts, &policy).forget, [0, 2]);
}

#[test]
fn orphans_go_after_a_grace_and_attempts_after_their_time() {
    let mut facts = apart(&[]);
    facts.blobs = vec![
        blob(0, 1, Duration::from_secs(3599)),
        blob(1, 2, Duration::from_secs(3600)),
        blob(2, 4, days(1)),
        blob(3, 8, days(1)),
    ];
    let trial = |n: u64, idle, superseded| Trial {
        key: Key::of(&n.to_le_bytes()),
        dir: PathBuf::from(n.to_string()),
        bytes: 100,
        idle,
        finished: true,
        superseded,
    };
    facts.trials =
        vec![trial(0, days(14), false), trial(1, days(13), false), trial(2, days(1), true)];
    facts.holders =
        vec![holder(Keeper::Attempt, Some(0), &[2]), holder(Keeper::Attempt, Some(1), &[3])];
    let plan = Plan::new(&facts, &Policy::default());
    assert_eq!(plan.trials, [0, 2]);
    assert_eq!(plan.blobs, [(1, Why::Orphan), (2, Why::Orphan)], "what the old attempt made, too");
    assert_eq!((plan.before, plan.after, plan.young, plan.rest), (315, 109, 1, 100));
    let none = Policy { grace: Duration::ZERO, ..Policy::default() };
    assert_eq!(Plan::new(&facts, &none).blobs.len(), 3);
}

#[test]
fn records_of_runs_go_by_age_only() {
    let mut facts = apart(&[]);
    let record = |idle| Record { dir: PathBuf::new(), bytes: 5, idle };
    facts.records = vec![record(days(9)), record(days(11))];
    assert_eq!(Plan::new(&facts, &at_most(0)).records, [0; 0]);
    let policy = Policy { older_than: Some(days(10)), ..Policy::default() };
    let plan = Plan::new(&facts, &policy);
    assert_eq!((plan.records.as_slice(), plan.before, plan.after), (&[1][..], 10, 5));
}

#[test]
fn evidence_is_worth_nothing_and_a_blob_of_thousands_is_no_trouble() {
    let mut facts = apart(&[(10, 1.0), (10, 0.0)]);
    facts.products[1].evidence = Some(PathBuf::from("e"));
    assert_eq!(evicted(&Plan::new(&facts, &at_most(10))), [1]);
    // An empty log that everybody shares.
    let mut facts = Facts::default();
    facts.blobs.push(blob(0, 0, days(1)));
    for n in 1..20_000 {
        facts.blobs.push(blob(n, 10, days(1)));
        facts.products.push(product(n, n as f64, &[0, n]));
    }
    let plan = Plan::new(&facts, &at_most(100_000));
    assert_eq!((plan.after, plan.evictions.len()), (100_000, 9_999));
}

fn facts() -> impl Strategy<Value = Facts> {
    let blobs = prop::collection::vec((0u64..50, 0u64..7200), 1..14);
    let products = prop::collection::vec(
        (
            prop::collection::vec(any::<prop::sample::Index>(), 0..5),
            0u32..40,
            0u64..60,
            prop::bool::weighted(0.25),
        ),
        0..12,
    );
    let holders = prop::collection::vec(
        (any::<bool>(), prop::collection::vec(any::<prop::sample::Index>(), 0..3)),
        0..3,
    );
    (blobs, products, holders, 0u64..20).prop_map(|(blobs, products, holders, rest)| {
        let mut facts = Facts { rest, ..Facts::default() };
        for (n, (bytes, age)) in blobs.iter().enumerate() {
            facts.blobs.push(blob(n, *bytes, Duration::from_secs(*age)));
        }
        let places = |indices: &[prop::sample::Index]| -> Vec<usize> {
            let all: BTreeSet<usize> = indices.iter().map(|i| i.index(blobs.len())).collect();
            all.into_iter().collect()
        };
        for (n, (indices, seconds, idle, root)) in products.iter().enumerate() {
            let mut one = product(n, f64::from(*seconds), &places(indices));
            one.idle = days(*idle);
            one.in_use = n % 5 == 4;
            one.roots = root.then(|| Root::Run("r".into())).into_iter().collect();
            facts.products.push(one);
        }
        for (lease, indices) in &holders {
            let by = if *lease { Keeper::Lease } else { Keeper::Attempt };
            facts.holders.push(holder(by, None, &places(indices)));
        }
        facts
    })
}

/// What must not go.
fn needed(facts: &Facts) -> BTreeSet<usize> {
    let rooted = facts.products.iter().filter(|p| !p.roots.is_empty()).flat_map(|p| &p.blobs);
    let held = facts.holders.iter().flat_map(|holder| &holder.blobs);
    rooted.chain(held).copied().collect()
}

fn weight(facts: &Facts, blobs: &BTreeSet<usize>) -> u64 {
    blobs.iter().map(|&i| facts.blobs[i].bytes).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20 * crate::model::cases(), ..ProptestConfig::default() })]

    #[test]
    fn no_root_goes_sizes_add_up_and_the_limit_is_reached_if_it_can_be(
        facts in facts(),
        max_size in prop::option::of(0u64..300),
        older in prop::option::of(0u64..60),
        grace in prop::sample::select(vec![0u64, 3600]),
    ) {
        let policy = Policy {
            max_size,
            older_than: older.map(days),
            grace: Duration::from_secs(grace),
            forget: true,
            ..Policy::default()
        };
        let plan = Plan::new(&facts, &policy);
        let gone: BTreeSet<usize> = plan.blobs.iter().map(|(i, _)| *i).collect();
        prop_assert_eq!(gone.len(), plan.blobs.len(), "each once");
        let needed = needed(&facts);
        prop_assert!(gone.is_disjoint(&needed));
        let all: BTreeSet<usize> = (0..facts.blobs.len()).collect();
        prop_assert_eq!(plan.before, facts.rest + weight(&facts, &all));
        prop_assert_eq!(plan.after, plan.before - weight(&facts, &gone));

        let named: BTreeSet<usize> = facts.products.iter().flat_map(|p| &p.blobs).copied().collect();
        for i in all.difference(&named).filter(|i| !needed.contains(i)) {
            let old = facts.blobs[*i].age >= policy.grace;
            prop_assert_eq!(gone.contains(i), old, "an orphan goes by its age alone");
        }
        let loses = |p: &Product| p.blobs.iter().any(|i| gone.contains(i));
        for one in facts.products.iter().filter(|p| loses(p)) {
            let others = |i: &usize| facts.products.iter().any(|p| p.blobs.contains(i) && !loses(p));
            let stays = |i: &&usize| !gone.contains(i) && !needed.contains(i);
            prop_assert!(one.blobs.iter().filter(stays).all(others), "no result goes by half");
        }
        let sum: u64 = plan.evictions.iter().map(|e| e.bytes).sum();
        let orphans: BTreeSet<usize> =
            plan.blobs.iter().filter(|(_, why)| *why == Why::Orphan).map(|(i, _)| *i).collect();
        prop_assert_eq!(sum, weight(&facts, &gone) - weight(&facts, &orphans));
        for (n, one) in facts.products.iter().enumerate() {
            let aged = older.is_some_and(|limit| one.idle >= days(limit)) && one.roots.is_empty();
            prop_assert_eq!(plan.forget.contains(&n), aged && !one.in_use);
            let why = plan.evictions.iter().find(|e| e.product == n).map(|e| e.why);
            prop_assert_eq!(why.is_some(), loses(one));
            prop_assert!(why != Some(Why::Age) || aged);
            // Nothing goes for its size that could stay.
            if let (Some(Why::Size), Some(limit)) = (why, max_size) {
                let back: BTreeSet<usize> =
                    one.blobs.iter().filter(|i| gone.contains(i)).copied().collect();
                let over_anyway = plan.after > limit;
                prop_assert!(over_anyway || plan.after + weight(&facts, &back) > limit);
            }
        }
        if let Some(limit) = max_size {
            let young: BTreeSet<usize> = all.difference(&named).copied()
                .filter(|i| !needed.contains(i) && !gone.contains(i)).collect();
            let least = facts.rest + weight(&facts, &(&needed | &young));
            prop_assert!(plan.after <= limit.max(least), "{} of {limit}, least {least}", plan.after);
        } else {
            prop_assert!(plan.evictions.iter().all(|e| e.why == Why::Age));
        }
    }
}
