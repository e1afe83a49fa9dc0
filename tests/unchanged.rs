//! Runs that have nothing to do are told without being made; every kind of change is noticed.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{Project, Ran};

/// A file, a directory, a pattern, a step of an included file, and an output.
fn project() -> Project {
    let project = Project::with(
        "include: more.yaml
params: { word: hello }
steps:
  file:
    stage: command
    in: { text: ./in.txt }
    run: 'cat ${in.text} > ${out.text}; echo ${params.word} >> ${out.text}'
    out: { text: file.txt }
  folder:
    stage: command
    in: { text: ./folder }
    run: 'cat ${in.text}/* > ${out.text}'
    out: { text: folder.txt }
  many:
    stage: command
    in: { text: './many/*.txt' }
    run: 'cat ${in.text} > ${out.text}'
    out: { text: many.txt }
outputs: { file: { from: file.text, to: out/file.txt } }
",
    );
    project.write(
        "more.yaml",
        "params: { other: 1 }
steps:
  included: { stage: command, run: 'echo ${params.other} > ${out.text}', out: { text: i.txt } }
",
    );
    for name in ["in.txt", "folder/a", "many/a.txt"] {
        project.write(name, "text");
    }
    project
}

/// Directories of records, the newest last.
fn records(project: &Project) -> Vec<PathBuf> {
    let runs = fs::read_dir(project.cache().join("runs")).unwrap();
    let mut runs: Vec<PathBuf> = runs.map(|item| item.unwrap().path()).collect();
    runs.sort_by_key(|run| fs::metadata(run.join("run.json")).unwrap().modified().unwrap());
    runs
}

/// Whether the newest run was told without being made.
fn told(project: &Project) -> bool {
    let events = fs::read_to_string(records(project).last().unwrap().join("events.jsonl"));
    events.unwrap().contains(r#""kind":"unchanged""#)
}

fn run(project: &Project) -> Ran {
    project.pipe(&["run", "p.yaml"])
}

/// Long enough for a change to show in the times of a file.
fn settle() {
    std::thread::sleep(Duration::from_millis(2300));
}

/// A change, and what the next run says then.
type Change = (&'static str, fn(&Project), &'static str);

/// Writes other bytes of the same length, with the old times.
fn edit_unseen(project: &Project) {
    let path = project.path().join("in.txt");
    let before = fs::metadata(&path).unwrap();
    fs::write(&path, "TEXT").unwrap();
    let times = FileTimes::new().set_modified(before.modified().unwrap());
    File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.mtime(), after.len()), (before.mtime(), before.len()));
}

/// Puts another file of the same size and times in its place.
fn replace_unseen(project: &Project) {
    let (path, new) = (project.path().join("in.txt"), project.path().join("new"));
    fs::write(&new, "TEXT").unwrap();
    let times = FileTimes::new().set_modified(fs::metadata(&path).unwrap().modified().unwrap());
    File::options().write(true).open(&new).unwrap().set_times(times).unwrap();
    fs::rename(new, path).unwrap();
}

fn index(project: &Project, kind: &str) -> PathBuf {
    let items = fs::read_dir(project.cache().join("index")).unwrap().flatten();
    let mut paths = items.map(|item| item.path());
    paths.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(kind)).unwrap()
}

fn entries(project: &Project) -> Vec<PathBuf> {
    let shards = fs::read_dir(project.cache().join("entries")).unwrap().flatten();
    let mut found: Vec<PathBuf> =
        shards.flat_map(|s| fs::read_dir(s.path()).unwrap().flatten()).map(|e| e.path()).collect();
    found.sort();
    found
}

const CHANGES: [Change; 14] = [
    (
        "pipeline",
        |p| p.write("p.yaml", &p.read("p.yaml").replace("hello", "hallo")),
        "3 cached, 1 ran",
    ),
    (
        "include",
        |p| p.write("more.yaml", &p.read("more.yaml").replace("1", "2")),
        "3 cached, 1 ran",
    ),
    ("a comment", |p| p.write("p.yaml", &(p.read("p.yaml") + "# x\n")), "4 cached, 0 ran"),
    ("input", |p| p.write("in.txt", "other"), "3 cached, 1 ran"),
    ("input, size and time kept", edit_unseen, "3 cached, 1 ran"),
    ("another input, size and time kept", replace_unseen, "3 cached, 1 ran"),
    ("a file in a folder", |p| p.write("folder/a", "TEXT"), "3 cached, 1 ran"),
    ("one more in a folder", |p| p.write("folder/b", "b"), "3 cached, 1 ran"),
    ("one more match", |p| p.write("many/b.txt", "b"), "3 cached, 1 ran"),
    ("an entry less", |p| fs::remove_file(&entries(p)[0]).unwrap(), "3 cached, 1 ran"),
    (
        "an output less",
        |p| fs::remove_file(p.path().join("out/file.txt")).unwrap(),
        "4 cached, 0 ran",
    ),
    ("the record", |p| fs::remove_dir_all(&records(p)[1]).unwrap(), "4 cached, 0 ran"),
    ("no memo", |p| fs::remove_file(index(p, "memo-")).unwrap(), "4 cached, 0 ran"),
    (
        "a damaged memo",
        |p| {
            let path = index(p, "memo-");
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes).unwrap();
        },
        "4 cached, 0 ran",
    ),
];

#[test]
fn every_kind_of_change_is_noticed() {
    let all: Vec<(Project, Change)> = CHANGES.into_iter().map(|c| (project(), c)).collect();
    for (project, _) in &all {
        assert_eq!(project.run(&[]), "0 cached, 4 ran");
    }
    settle();
    for (project, (what, change, expected)) in &all {
        assert_eq!(project.run(&[]), "4 cached, 0 ran", "{what}");
        assert!(!told(project), "{what}: nothing is known yet");
        assert_eq!(project.run(&[]), "4 cached, 0 ran", "{what}");
        assert!(told(project), "{what}");
        change(project);
        let ran = run(project);
        assert_eq!(ran.code, Some(0), "{what}: {}", ran.stderr);
        assert_eq!(ran.counts(), *expected, "{what}");
        assert!(!told(project), "{what}");
        assert!(project.path().join("out/file.txt").exists(), "{what}");
    }
}

#[test]
fn a_repeated_run_reads_as_any_other_and_asks_as_much_as_it_is_told_to() {
    let project = project();
    project.run(&[]);
    settle();
    project.run(&[]);
    let status = project.pipe(&["status", "--json"]).stdout;
    project.run(&[]);
    assert!(told(&project));
    let counted = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let steps = |text: &str| counted(text)["steps"].clone();
    assert_eq!(steps(&project.pipe(&["status", "--json"]).stdout), steps(&status));
    assert_eq!(project.run(&["--paranoid"]), "4 cached, 0 ran");
    assert!(!told(&project), "--paranoid looks");
    assert_eq!(project.run(&["--set", "word=hallo"]), "3 cached, 1 ran");
    assert!(!told(&project), "another question");
    assert_eq!(project.run(&[]), "4 cached, 0 ran");
    fs::remove_file(project.path().join("in.txt")).unwrap();
    let ran = run(&project);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("in.txt"), "{}", ran.stderr);
}

#[test]
fn a_file_that_is_included_by_two_names_is_watched_by_both() {
    let project = project();
    let (text, link) = (project.read("p.yaml"), project.path().join("link.yaml"));
    project.write("p.yaml", &text.replace("more.yaml", "[more.yaml, link.yaml]"));
    std::os::unix::fs::symlink("more.yaml", &link).unwrap();
    settle();
    assert_eq!(project.run(&[]), "0 cached, 4 ran");
    assert_eq!(project.run(&[]), "4 cached, 0 ran");
    fs::remove_file(&link).unwrap();
    fs::write(&link, "params: [wrong]\n").unwrap();
    let ran = run(&project);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
}

#[test]
fn what_is_too_young_proves_nothing() {
    let project = project();
    settle();
    project.run(&[]);
    // Edits within one tick of the clock, of one length: each must be seen.
    for turn in 0..10 {
        project.write("in.txt", &format!("text{turn}"));
        assert_eq!(project.run(&[]), "3 cached, 1 ran", "turn {turn}");
        assert_eq!(project.run(&[]), "4 cached, 0 ran", "turn {turn}");
        assert!(!told(&project), "turn {turn}");
    }
}

/// Whether the plan of the newest run is that of an earlier one, by its file; so is its YAML then.
fn same_plan(project: &Project) -> bool {
    let record = records(project).pop().unwrap();
    let linked = |path: &Path| fs::metadata(path).unwrap().nlink() > 1;
    let plan = linked(&record.join("plan.json"));
    let items = fs::read_dir(record).unwrap().map(|item| item.unwrap().path());
    let is_source = |path: &PathBuf| path.to_string_lossy().contains("/source-");
    let sources: Vec<PathBuf> = items.filter(is_source).collect();
    assert!(!sources.is_empty() && sources.iter().all(|source| linked(source) == plan));
    plan
}

#[test]
fn a_long_plan_is_kept_and_made_anew_when_anything_it_is_made_of_changes() {
    let project = project();
    // So long that it is worth it.
    let padding = format!("{}# {}\n", project.read("p.yaml"), "x".repeat(70_000));
    project.write("p.yaml", &padding);
    project.write("params.yaml", "word: hello\n");
    let args = ["--params", "params.yaml"];
    let expect = |counts: &str, same: bool, what: &str| {
        assert_eq!(project.run(&args), counts, "{what}");
        assert_eq!(same_plan(&project), same, "{what}");
    };
    expect("0 cached, 4 ran", false, "first");
    expect("4 cached, 0 ran", true, "second");
    project.write("in.txt", "new");
    expect("3 cached, 1 ran", true, "an input is not part of the plan");
    project.write("params.yaml", "word: hallo\n");
    expect("3 cached, 1 ran", false, "parameters");
    expect("4 cached, 0 ran", true, "again");
    project.write("more.yaml", &project.read("more.yaml").replace("1", "2"));
    expect("3 cached, 1 ran", false, "an included file");
    project.write("p.yaml", &padding.replace("cat ${in.text}/*", "cat ${in.text}/a"));
    expect("3 cached, 1 ran", false, "the pipeline");
    fs::remove_dir_all(project.path().join("many")).unwrap();
    let ran = project.pipe(&[&["run", "p.yaml"][..], &args].concat());
    assert_eq!(ran.code, Some(2), "a missing file is a mistake of the pipeline: {}", ran.stderr);
    project.write("many/a.txt", "text");
    expect("4 cached, 0 ran", true, "it is back");
    let path = index(&project, "plan-");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(path, bytes).unwrap();
    expect("4 cached, 0 ran", false, "a damaged plan");
}

/// A pipeline so long that its plan is kept: `b` needs `a`, `c` and `d` need nobody.
fn long() -> Project {
    let step = |name: &str, reads: &str| {
        format!(
            "  {name}: {{ stage: command, in: {{ {reads} }}, run: 'find -L in -type f | sort | xargs cat > ${{out.text}}', \
             out: {{ text: t.txt }} }}\n"
        )
    };
    let steps = [
        step("a", "x: ./a.txt"),
        step("b", "x: a.text, y: ./b.txt"),
        step("c", "x: './many/*.txt'"),
        step("d", "x: ./folder"),
    ];
    let project = Project::with(&format!("steps:\n{}# {}\n", steps.concat(), "x".repeat(70_000)));
    for name in ["a.txt", "b.txt", "many/1.txt", "folder/1"] {
        project.write(name, name);
    }
    project
}

/// What the newest run's record says of every step: its state and what came out.
fn steps(project: &Project) -> serde_json::Value {
    let status = project.pipe(&["status", "--json"]).stdout;
    serde_json::from_str::<serde_json::Value>(&status).unwrap()["steps"].clone()
}

fn lose_objects(project: &Project) {
    for shard in fs::read_dir(project.cache().join("objects")).unwrap() {
        fs::remove_dir_all(shard.unwrap().path()).unwrap();
    }
}

fn events(project: &Project) -> String {
    fs::read_to_string(records(project).last().unwrap().join("events.jsonl")).unwrap()
}

#[test]
fn what_stands_is_settled_at_once_and_reads_as_if_it_had_been_looked_up() {
    let project = long();
    assert_eq!(project.run(&[]), "0 cached, 4 ran");
    settle();
    assert_eq!(project.run(&[]), "4 cached, 0 ran");
    for (turn, changed) in ["b.txt", "many/2.txt", "folder/1", "a.txt", "b.txt"].iter().enumerate()
    {
        project.write(changed, &format!("turn {turn}"));
        let ran = project.run(&[]);
        assert_eq!(ran, if *changed == "a.txt" { "2 cached, 2 ran" } else { "3 cached, 1 ran" });
        assert!(events(&project).contains(r#""but":["#), "{changed}: {}", events(&project));
        settle();
        assert_eq!(project.run(&[]), "4 cached, 0 ran", "{changed}: its stamps are noted now");
        assert_eq!(project.run(&[]), "4 cached, 0 ran", "{changed}");
        assert!(told(&project), "{changed}");
        let told = steps(&project);
        assert_eq!(project.run(&["--paranoid"]), "4 cached, 0 ran", "{changed}");
        assert!(!events(&project).contains("unchanged"), "{changed}");
        assert_eq!(told, steps(&project), "{changed}: as if each had been looked up");
    }
}

#[test]
fn a_small_change_of_many_steps_is_kept_beside_the_memo() {
    let project = Project::with(
        "steps:
  s: { matrix: { i: 0..300 }, stage: command, in: { x: './in/${matrix.i}' }, run: 'cat ${in.x} > ${out.y}', out: { y: y } }
outputs: { y: { from: 's[7].y', to: out/y } }
",
    );
    (0..300).for_each(|i| project.write(&format!("in/{i}"), &i.to_string()));
    assert_eq!(project.run(&[]), "0 cached, 300 ran");
    settle();
    assert_eq!(project.run(&[]), "300 cached, 0 ran");
    let memo = fs::read(index(&project, "memo-")).unwrap();
    for (turn, changed) in [250, 7, 0, 7].iter().enumerate() {
        let file = format!("in/{changed}");
        let before = project.read(&file);
        project.write(&file, &format!("turn {turn}"));
        assert_eq!(project.run(&[]), "299 cached, 1 ran", "{changed}");
        project.write(&file, &before);
        assert_eq!(project.run(&[]), "300 cached, 0 ran", "{changed} as it was");
        project.write(&file, &format!("turn {turn}"));
        assert_eq!(project.run(&[]), "300 cached, 0 ran", "{changed} again");
        assert_eq!(project.read("out/y"), project.read("in/7"));
        settle();
        assert_eq!(project.run(&[]), "300 cached, 0 ran");
        assert_eq!(project.run(&[]), "300 cached, 0 ran");
        assert!(told(&project), "{changed}");
        assert!(fs::read(index(&project, "memo-")).unwrap() == memo, "{changed}");
        assert!(fs::metadata(index(&project, "patch-")).unwrap().len() < memo.len() as u64 / 4);
    }
    let told = steps(&project);
    assert_eq!(project.run(&["--paranoid"]), "300 cached, 0 ran");
    assert_eq!(told, steps(&project), "as if each had been looked up");
    fs::remove_file(index(&project, "memo-")).unwrap();
    assert_eq!(project.run(&[]), "300 cached, 0 ran", "a patch of no memo is none");
    let patched = fs::read_dir(project.cache().join("index")).unwrap().flatten();
    let patch = |name: std::ffi::OsString| name.to_str().unwrap().starts_with("patch-");
    assert!(!patched.map(|item| item.file_name()).any(patch), "it went with the new memo");
}

#[test]
fn what_was_found_by_bytes_that_are_lost_is_not_found_by_those_made_again() {
    let step = |name: &str, reads: &str, run: &str| {
        format!(
            "  {name}: {{ stage: command, {reads} run: '{run} > ${{out.x}}', out: {{ x: x }} }}\n"
        )
    };
    let steps = [
        step("a", "", "date +%s%N"),
        step("b", "in: { x: a.x },", "cat ${in.x}"),
        step("c", "in: { x: a.x, y: ./c.txt },", "cat ${in.x} ${in.y}"),
    ];
    // So long that its plan is kept.
    let padding = "x".repeat(70_000);
    let project = Project::with(&format!("steps:\n{}# {padding}\n", steps.concat()));
    project.write("c.txt", "1");
    assert_eq!(project.run(&[]), "0 cached, 3 ran");
    settle();
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
    lose_objects(&project);
    project.write("c.txt", "2");
    settle();
    let ran = run(&project);
    assert_eq!(ran.counts(), "2 cached, 2 ran", "a is a hit first: {}", ran.stderr);
    assert!(ran.stderr.contains("keyed anew"), "{}", ran.stderr);
    assert_eq!(project.run(&[]), "2 cached, 1 ran", "b read what is no more");
    settle();
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
}

#[test]
fn lost_bytes_of_what_stands_are_made_again() {
    let project = long();
    assert_eq!(project.run(&[]), "0 cached, 4 ran");
    settle();
    assert_eq!(project.run(&[]), "4 cached, 0 ran");
    lose_objects(&project);
    project.write("b.txt", "other");
    let ran = run(&project);
    assert_eq!(ran.counts(), "3 cached, 2 ran", "a is a hit first: {}", ran.stderr);
    assert!(ran.stderr.contains("`a` runs again"), "{}", ran.stderr);
    settle();
    assert_eq!(project.run(&[]), "4 cached, 0 ran");
    // What it read then is not what is there now: no key may be made of that.
    lose_objects(&project);
    project.write("a.txt", "another");
    assert_eq!(project.run(&[]), "2 cached, 2 ran");
}
