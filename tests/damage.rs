//! Bytes of the cache that are flipped, cut, zeroed, swapped or gone: found before a step sees them,
//! in the middle of a run too, and the step that made them runs again.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::support::Project;

const KINDS: [&str; 5] = ["flip", "cut", "zero", "swap", "remove"];

/// `first` makes two files, `second` one of them longer; `last` waits for the word and reads all.
fn project() -> Project {
    let project = Project::new();
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "params: {{ word: one }}
steps:
  first:
    stage: command
    run: [sh, -c, 'echo x >> {dir}/first; echo left > ${{out.left}}; echo mine > ${{out.right}}']
    out: [left, right]
  gate:
    stage: command
    in: {{ left: first.left }}
    run: [sh, -c, 'echo x >> {dir}/gate; while [ ! -e {dir}/open ]; do sleep 0.02; done; echo ${{params.word}} > ${{out.o}}']
    out: [o]
  last:
    stage: command
    in: {{ left: first.left, right: first.right, gate: gate.o }}
    run: [sh, -c, 'cat ${{in.left}} ${{in.right}} ${{in.gate}} > ${{out.o}}']
    out: [o]
outputs: {{ o: {{ from: last.o, to: o.txt }} }}
"
        ),
    );
    project
}

/// The objects that hold exactly these texts.
fn objects(project: &Project, text: &str) -> Vec<PathBuf> {
    let shards = fs::read_dir(project.cache().join("objects")).unwrap();
    let items = shards.flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap());
    let paths = items.map(|item| item.unwrap().path());
    paths.filter(|path| fs::read(path).is_ok_and(|bytes| bytes == text.as_bytes())).collect()
}

fn write(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Does `kind` to the object that holds `left`.
fn damage(project: &Project, kind: &str) {
    let [path] = &objects(project, "left\n")[..] else { panic!("one object holds it") };
    match kind {
        "flip" => write(path, b"lefT\n"),
        "cut" => write(path, b"lef"),
        "zero" => write(path, &[0; 5]),
        "remove" => fs::remove_file(path).unwrap(),
        _ => {
            let [other] = &objects(project, "mine\n")[..] else { panic!("one object holds it") };
            let middle = path.with_extension("swap");
            fs::rename(path, &middle).unwrap();
            fs::rename(other, path).unwrap();
            fs::rename(&middle, other).unwrap();
        }
    }
}

#[test]
fn damage_between_runs_is_found_and_made_good() {
    for kind in KINDS {
        let project = project();
        project.write("open", "");
        assert_eq!(project.run(&[]), "0 cached, 3 ran", "{kind}");
        damage(&project, kind);
        // What is cached needs no bytes: `last` runs for its new input and needs them.
        let ran = project.run(&["--set", "word=two"]);
        assert_eq!(project.read("o.txt"), "left\nmine\ntwo\n", "{kind}");
        assert_eq!(project.count("first"), 2, "{kind}: {ran}");
        assert_eq!(project.run(&["--set", "word=two"]), "3 cached, 0 ran", "{kind}");
    }
}

#[test]
fn damage_in_the_middle_of_a_run_is_found_and_made_good() {
    for kind in KINDS {
        let project = project();
        let run = project.start(&["run", "p.yaml"]);
        project.wait_until("the gate is reached", || project.count("gate") == 1);
        damage(&project, kind);
        project.write("open", "");
        let output = run.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{kind}: {stderr}");
        assert_eq!(project.read("o.txt"), "left\nmine\none\n", "{kind}");
        assert_eq!(project.count("first"), 2, "{kind}: {stderr}");
        assert_eq!(project.run(&[]), "3 cached, 0 ran", "{kind}");
    }
}

#[test]
fn verify_would_find_nothing_left() {
    let project = project();
    project.write("open", "");
    project.run(&[]);
    damage(&project, "flip");
    project.run(&["--set", "word=two"]);
    let [path] = &objects(&project, "left\n")[..] else { panic!("it is there once") };
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o444);
}

/// Harms that need no knowledge of what a file says.
fn harm(path: &Path, how: &str) {
    let bytes = fs::read(path).unwrap();
    fs::remove_file(path).unwrap();
    match how {
        "flip" => {
            let flip = |(i, b): (usize, &u8)| if i == bytes.len() / 2 { b ^ 1 } else { *b };
            fs::write(path, bytes.iter().enumerate().map(flip).collect::<Vec<u8>>()).unwrap();
        }
        "cut" => fs::write(path, &bytes[..bytes.len() / 2]).unwrap(),
        "zero" => fs::write(path, vec![0; bytes.len()]).unwrap(),
        "dir" => fs::create_dir(path).unwrap(),
        "link" => std::os::unix::fs::symlink(path.file_name().unwrap(), path).unwrap(),
        _ => {}
    }
}

#[test]
fn records_and_marks_that_are_damaged_cost_nothing_but_themselves() {
    for how in ["flip", "cut", "remove", "dir", "link"] {
        for name in ["run.json", "plan.json", "events.jsonl", "mark"] {
            let project = project();
            project.write("open", "");
            project.run(&[]);
            let runs = fs::read_dir(project.cache().join("runs")).unwrap();
            let record = runs.map(|item| item.unwrap().path()).next().unwrap();
            let marks = fs::read_dir(project.cache().join("delivered")).unwrap();
            let mark = marks.map(|item| item.unwrap().path()).next().unwrap();
            let path = if name == "mark" { mark } else { record.join(name) };
            harm(&path, how);
            let what = format!("{how} {name}");
            for verb in [
                &["show", "last"][..],
                &["why", "last"],
                &["log", "last"],
                &["plan", "p.yaml"],
                &["report"],
            ] {
                let ran = project.pipe(verb);
                assert!(ran.code.is_some_and(|code| code < 3), "{what}: {verb:?} {:?}", ran.code);
                assert!(!ran.stderr.contains("panicked"), "{what}: {}", ran.stderr);
            }
            // Another result is delivered; without its mark the file counts as the user's.
            let ran = project.pipe(&["run", "p.yaml", "--set", "word=two"]);
            let told = format!("{what}: {}{}", ran.stdout, ran.stderr);
            assert!(!told.contains("panicked"), "{told}");
            match name == "mark" && ran.code != Some(0) {
                true => {
                    assert!(told.contains("was not written by this pipeline"), "{told}");
                    assert_eq!(project.read("o.txt"), "left\nmine\none\n", "{what}");
                }
                false => assert_eq!(project.read("o.txt"), "left\nmine\ntwo\n", "{told}"),
            }
        }
    }
}

#[test]
fn a_damaged_entry_is_told_in_the_run_that_meets_it() {
    let project = project();
    project.write("open", "");
    assert_eq!(project.run(&[]), "0 cached, 3 ran");
    let all = files_below(&project.cache().join("entries"));
    assert_eq!(all.len(), 3);
    write(&all[0], b"{}");
    let ran = project.pipe(&["run", "p.yaml"]);
    let told = format!("{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.code, Some(0), "{told}");
    assert!(told.contains("is damaged and not used"), "{told}");
    let again = project.pipe(&["run", "p.yaml"]);
    assert!(!format!("{}{}", again.stdout, again.stderr).contains("damaged"), "told once");
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let items = fs::read_dir(dir).unwrap().map(|item| item.unwrap().path());
    items.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}
