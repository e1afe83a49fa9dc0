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
