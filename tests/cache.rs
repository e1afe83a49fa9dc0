//! `pipe cache …`: what is told, what goes, and that running work never notices.

use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{Project, Ran};

/// A large artifact that is made at once, one that depends on it, and an output.
fn project() -> Project {
    Project::with(
        "params: { word: hello }
steps:
  large: { stage: command, run: [sh, -c, 'head -c 300000 /dev/zero > ${out.o}; echo told'], out: [o] }
  small: { stage: command, in: { i: large.o }, run: [sh, -c, 'wc -c < ${in.i} > ${out.o}; echo ${params.word} >> ${out.o}'], out: [o] }
outputs: { o: { from: small.o, to: o.txt } }
",
    )
}

fn ok(ran: Ran) -> String {
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    ran.stdout
}

fn json(project: &Project, args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&ok(project.pipe(args))).unwrap()
}

fn of<'a>(all: &'a serde_json::Value, step: &str) -> &'a serde_json::Value {
    all.as_array().unwrap().iter().find(|one| one["step"] == step).unwrap()
}

#[test]
fn what_is_there_is_told_and_what_is_kept_stays() {
    let project = project();
    assert_eq!(ok(project.pipe(&["cache", "ls"])), "no results\n");
    project.run(&[]);
    project.run(&[]);
    let listed = ok(project.pipe(&["cache", "ls"]));
    let line = |step: &str| listed.lines().find(|line| line.contains(step)).unwrap().to_string();
    for part in ["large", "command", "300.0 kB", "(1 hit)", "today", "2 runs"] {
        assert!(line("large").contains(part), "{part} in {listed}");
    }
    assert!(listed.lines().nth(1).unwrap().contains("large"), "the largest first: {listed}");
    assert!(listed.contains("2 results, 300.0 kB in all"), "{listed}");
    let all = json(&project, &["cache", "ls", "--json", "--sort", "used"]);
    assert_eq!((&all.as_array().unwrap().len(), &of(&all, "small")["state"]), (&2, &"here".into()));
    assert_eq!(json(&project, &["cache", "ls", "small", "--json"]).as_array().unwrap().len(), 1);

    // Runs keep it, and it is told so.
    let kept = project.pipe(&["cache", "gc", "--max-size", "1kB"]);
    assert!(
        kept.stderr.contains("more than --max-size stay: 300.0 kB are kept by 2 runs"),
        "{}",
        kept.stderr
    );
    assert!(ok(kept).starts_with("freed 0 B of "));

    let pinned = ok(project.pipe(&["cache", "pin", "small", "--reason", "the paper's"]));
    assert!(pinned.starts_with("`small` (") && pinned.ends_with(") is pinned\n"), "{pinned}");
    let gc = ["cache", "gc", "--max-size", "0", "--keep-runs", "0", "--no-grace"];
    let dry = ok(project.pipe(&[&gc[..], &["--dry-run"]].concat()));
    assert!(dry.contains("large") && dry.contains("to make room"), "{dry}");
    assert!(dry.contains("300.0 kB  1 result to make room\nwould free 300.0 kB of "), "{dry}");
    assert!(!dry.contains("small"), "{dry}");
    assert_eq!(of(&json(&project, &["cache", "ls", "--json"]), "large")["state"], "here");
    let done = json(&project, &[&gc[..], &["--json"]].concat());
    assert_eq!(done["done"]["freed_bytes"], 300_005, "with its log");
    let listed = ok(project.pipe(&["cache", "ls"]));
    assert!(listed.contains("evicted") && listed.contains("a pin: the paper's"), "{listed}");

    // A hit needs no bytes; who does need them makes them again.
    assert_eq!(project.run(&[]), "2 cached, 0 ran");
    assert!(project.pipe(&["log", "large"]).stderr.contains("was evicted"));
    let again = project.pipe(&["run", "p.yaml", "--set", "word=there"]);
    assert_eq!(again.counts(), "1 cached, 2 ran", "{}{}", again.stdout, again.stderr);
    assert!(again.stderr.contains("`large` runs again"), "{}", again.stderr);
    assert_eq!(project.read("o.txt"), "300000\nthere\n");
}

#[test]
fn pins_go_by_step_and_by_key() {
    let project = project();
    let no_run = project.pipe(&["cache", "pin", "small"]);
    assert_eq!(no_run.code, Some(2));
    assert!(no_run.stderr.contains("no pipeline was run in this directory"), "{}", no_run.stderr);
    project.run(&[]);
    let wrong = project.pipe(&["cache", "pin", "smal"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("small"), "{}", wrong.stderr);
    let later = project.pipe(&["cache", "pin", "small", "--set", "word=never"]);
    assert!(
        later.code == Some(2) && later.stderr.contains("`small` has no result yet"),
        "{}",
        later.stderr
    );
    let all = json(&project, &["cache", "ls", "--json"]);
    let key = of(&all, "small")["key"].as_str().unwrap().to_string();
    for name in [&key[..], &key[..10], "small"] {
        assert!(ok(project.pipe(&["cache", "pin", name])).contains(" is pinned"));
        assert!(ok(project.pipe(&["cache", "pin", name])).contains("was pinned before"));
        assert!(ok(project.pipe(&["cache", "unpin", name])).contains("is not pinned any more"));
        assert!(ok(project.pipe(&["cache", "unpin", name])).contains("was not pinned"));
    }
    let nobody = project.pipe(&["cache", "pin", &"0".repeat(64)]);
    assert!(
        nobody.code == Some(2) && nobody.stderr.contains("no result of key"),
        "{}",
        nobody.stderr
    );
}

#[test]
fn space_is_told_by_kind_and_wrong_arguments_by_name() {
    let project = project();
    project.run(&[]);
    let told = ok(project.pipe(&["cache", "du"]));
    for kind in ["objects", "parts", "recipes", "attempts", "entries", "runs", "index", "all"] {
        assert!(told.lines().any(|line| line.starts_with(kind)), "{kind} in {told}");
    }
    assert!(told.contains("sharing saves 0 B"), "{told}");
    let usage = json(&project, &["cache", "du", "--json"]);
    assert_eq!(usage["kinds"]["entries"]["items"], 2);
    assert_eq!(usage["apparent_bytes"], usage["stored_bytes"]);
    for (flag, value, hint) in [
        ("--max-size", "much", "200GB"),
        ("--older-than", "30", "30d"),
        ("--keep-runs", "-1", "keep-runs"),
    ] {
        let wrong = project.pipe(&["cache", "gc", &format!("{flag}={value}")]);
        assert!(wrong.code == Some(2) && wrong.stderr.contains(hint), "{}", wrong.stderr);
    }
    assert_eq!(project.pipe(&["cache", "gc", "--forget"]).code, Some(2), "of what age?");
    for verb in ["ls", "gc", "pin", "unpin", "du", "verify", "rebuild"] {
        let help = ok(project.pipe(&["cache", verb, "--help"]));
        assert!(help.contains("Example") && help.contains(&format!("pipe cache {verb}")), "{help}");
    }
}

#[test]
fn damage_is_named_repaired_and_made_again() {
    let project = project();
    project.run(&[]);
    assert!(ok(project.pipe(&["cache", "verify"])).contains("2 entries, 0 recipes and 3 objects"));
    let large = large_object(&project);
    let mut bytes = std::fs::read(&large).unwrap();
    bytes[1000] = 7;
    std::fs::remove_file(&large).unwrap();
    std::fs::write(&large, bytes).unwrap();
    let found = project.pipe(&["cache", "verify"]);
    assert_eq!(found.code, Some(1));
    for part in ["damaged", &large.display().to_string(), "needed by `large` ("] {
        assert!(found.stdout.contains(part), "{part} in {}", found.stdout);
    }
    assert!(found.stderr.contains("hint: `pipe cache verify --repair`"), "{}", found.stderr);
    let repaired = ok(project.pipe(&["cache", "verify", "--repair", "--json"]));
    let repaired: serde_json::Value = serde_json::from_str(&repaired).unwrap();
    assert_eq!(repaired["damage"][0]["repaired"], true);
    assert!(ok(project.pipe(&["cache", "verify"])).contains("all is well"));
    let again = project.pipe(&["run", "p.yaml", "--set", "word=there"]);
    assert_eq!(again.counts(), "1 cached, 2 ran");
    assert!(ok(project.pipe(&["cache", "verify"])).contains("all is well"));

    std::fs::remove_dir_all(project.cache().join("index")).unwrap();
    assert_eq!(ok(project.pipe(&["cache", "rebuild"])), "the index has 3 entries\n");
}

fn large_object(project: &Project) -> std::path::PathBuf {
    let shards = std::fs::read_dir(project.cache().join("objects")).unwrap().flatten();
    let objects = shards.flat_map(|shard| std::fs::read_dir(shard.path()).unwrap().flatten());
    let large = |path: &std::path::PathBuf| std::fs::metadata(path).unwrap().len() == 300_000;
    objects.map(|item| item.path()).find(large).unwrap()
}

/// Steps that take a moment each, the first one the same in every run.
fn chain(name: &str, dir: &str) -> String {
    let step = |step: &str, from: &str| {
        format!(
            "  {step}: {{ stage: command, in: {{ i: {from}.o }}, out: [o], run: [sh, -c, 'echo x >> {dir}/{name}-{step}-${{params.n}}; sleep 0.05; cat ${{in.i}} > ${{out.o}}; echo {name}-{step}-${{params.n}} >> ${{out.o}}'] }}\n"
        )
    };
    format!(
        "params: {{ n: 0 }}
steps:
  base: {{ stage: command, run: [sh, -c, 'echo base > ${{out.o}}'], out: [o] }}
{}{}{}{}outputs: {{ o: {{ from: d.o, to: '{name}-${{params.n}}.txt' }} }}
",
        step("a", "base"),
        step("b", "a"),
        step("c", "a"),
        step("d", "b")
    )
}

#[test]
fn collections_in_a_tight_loop_beside_three_pipelines() {
    let project = Project::new();
    let dir = project.path().display().to_string();
    let names = ["p", "q", "r"];
    names.iter().for_each(|name| project.write(&format!("{name}.yaml"), &chain(name, &dir)));
    // None of the runs keeps anything but by being at work; then five of each do.
    beside(&project, "0", 0..3 * soak());
    beside(&project, "5", 3 * soak()..3 * soak() + 5);
    let all = json(&project, &["cache", "ls", "--json"]);
    let kept = all.as_array().unwrap().iter().filter(|one| one["kept_by"] != serde_json::json!([]));
    let states: Vec<_> = kept.map(|one| one["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["here"; 5 * 3 * 4 + 1]);
    assert!(ok(project.pipe(&["cache", "verify"])).contains("all is well"));
}

/// `PIPE_SOAK` lengthens it.
fn soak() -> usize {
    std::env::var("PIPE_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Ends the loop, also when something else failed.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn beside(project: &Project, keep: &str, rounds: std::ops::Range<usize>) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collections = scope.spawn(|| {
            let args = ["cache", "gc", "--max-size=0", "--no-grace", "--json", "--keep-runs", keep];
            let mut freed = 0;
            while !done.load(Ordering::Relaxed) {
                freed += json(project, &args)["done"]["freed_bytes"].as_u64().unwrap();
            }
            freed
        });
        let ends = Ends(&done);
        for round in rounds {
            three(project, round);
        }
        std::thread::sleep(Duration::from_millis(300));
        drop(ends);
        let freed = collections.join().unwrap();
        assert!(keep == "5" || freed > 0, "nothing was ever collected");
    });
}

/// One run of each pipeline, at once: all right, and no step of theirs twice.
fn three(project: &Project, round: usize) {
    let names = ["p", "q", "r"];
    let start = |name: &&str| -> Child {
        let (file, n) = (format!("{name}.yaml"), format!("n={round}"));
        project.start(&["run", &file, "--set", &n, "--jobs", "2"])
    };
    let runs: Vec<Child> = names.iter().map(start).collect();
    for (name, run) in names.iter().zip(runs) {
        let output = run.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name} {round}: {stderr}");
        let line = |step: &str| format!("{name}-{step}-{round}\n");
        let expected = format!("base\n{}{}{}", line("a"), line("b"), line("d"));
        assert_eq!(project.read(&format!("{name}-{round}.txt")), expected, "{stderr}");
        for step in ["a", "b", "c", "d"] {
            assert_eq!(project.count(&format!("{name}-{step}-{round}")), 1, "{step}: {stderr}");
        }
    }
}
