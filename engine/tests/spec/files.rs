//! Pipelines of several files: includes, `--params`, paths, and what a run keeps of them.

use std::fs;
use std::path::Path;

use engine::plan::Place;
use engine::spec::{Options, load};

use crate::toys::{TOYS, check_file, options};

/// A directory with these files, and options whose current directory it is.
fn project(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Options) {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, bytes) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("a directory");
        fs::write(path, bytes).expect("a file");
    }
    let options = Options { cwd: dir.path().to_path_buf(), ..options() };
    (dir, options)
}

fn told(files: &[(&str, &[u8])]) -> String {
    let (_dir, options) = project(files);
    check_file(Path::new("p.yaml"), &options)
}

#[test]
fn parameters_of_the_including_file_win_and_paths_stay_where_they_were_written() {
    let told = told(&[
        ("p.yaml", b"include: sub/t.yaml\nparams: { n: 2 }\nsteps: { b: { stage: concat, in: { head: a.text, parts: ['./x.txt', '${params.data}', '${params.dir}/y.txt'] }, with: { n: '${params.n}' } } }"),
        ("sub/t.yaml", b"params: { n: 1, data: ./y.txt, dir: ./deep/.. }\nsteps: { a: { stage: concat, in: { parts: './*.txt' }, with: { n: '${params.n}' } } }"),
        ("x.txt", b""),
        ("sub/y.txt", b""),
        ("sub/deep/z", b""),
    ]);
    assert_eq!(
        told,
        "a: concat parts<-CWD/sub/*.txt n=2\n\
         b: concat parts<-CWD/x.txt+CWD/sub/y.txt+CWD/sub/deep/../y.txt head<-a.text n=2\n"
    );
}

#[test]
fn a_path_in_a_set_starts_from_the_current_directory() {
    let (dir, mut options) = project(&[
        ("sub/p.yaml", b"params: { data: ./y.txt }\nsteps: { a: { stage: text, in: { files: '${params.data}' } } }"),
        ("z.txt", b""),
    ]);
    options.sets = vec!["data=./z.txt".into()];
    assert_eq!(check_file(Path::new("sub/p.yaml"), &options), "a: text files<-CWD/z.txt\n");
    options.sets = vec!["steps.a.in.files=[./z.txt, ../z.txt]".into()];
    let told = check_file(Path::new("sub/p.yaml"), &options);
    assert!(told.contains("no such file or directory: `../z.txt`"), "{told}");
    drop(dir);
}

#[test]
fn steps_of_one_name_in_two_files_name_both_lines() {
    let told = told(&[
        ("p.yaml", b"include: [t.yaml]\nsteps:\n  b: { stage: concat }\n  a: { stage: concat }\n"),
        ("t.yaml", b"steps:\n  a: { stage: concat }\n"),
    ]);
    insta::assert_snapshot!(told, @r"
    error: step `a` is there twice
     --> p.yaml:4:3
      |
    4 |   a: { stage: concat }
      |   ^
     ::: t.yaml:2:3: first written here
      hint: rename one; parameters, unlike steps, override one another
    ");
}

#[test]
fn a_file_included_twice_counts_once_and_a_circle_is_an_error() {
    let twice = told(&[
        ("p.yaml", b"include: [a.yaml, b.yaml]\nsteps: { x: { stage: concat } }"),
        ("a.yaml", b"include: c.yaml"),
        ("b.yaml", b"include: ./c.yaml"),
        ("c.yaml", b"steps: { c: { stage: concat } }"),
    ]);
    assert_eq!(twice, "c: concat\nx: concat\n");
    let circle =
        told(&[("p.yaml", b"include: a.yaml\nsteps: {}"), ("a.yaml", b"include: ./p.yaml")]);
    insta::assert_snapshot!(circle, @r"
    error: `./p.yaml` includes itself, directly or through others
     --> a.yaml:1:10
      |
    1 | include: ./p.yaml
      |          ^^^^^^^^
      hint: remove one of the includes
    ");
}

#[test]
fn files_that_cannot_be_read() {
    let missing = told(&[("p.yaml", b"include:\n  - sub/t.yaml\nsteps: {}")]);
    insta::assert_snapshot!(missing, @r"
    error: cannot read `sub/t.yaml`: it does not exist
     --> p.yaml:2:5
      |
    2 |   - sub/t.yaml
      |     ^^^^^^^^^^
      hint: looked for `CWD/sub/t.yaml`
    ");
    insta::assert_snapshot!(told(&[]), @r"
    error: cannot read `p.yaml`: it does not exist
     --> p.yaml
    ");
    let latin = told(&[("p.yaml", b"steps:\n  a: { stage: caf\xe9 }\n")]);
    insta::assert_snapshot!(latin, @"
    error: not UTF-8 text
     --> p.yaml:2:18
      |
    2 |   a: { stage: caf\u{fffd} }
      |                  ^
      hint: save the file as UTF-8
    ");
}

#[test]
fn a_params_file_lies_between_profiles_and_sets() {
    let (_dir, mut options) = project(&[
        ("p.yaml", b"params: { n: 1, lr: 1, cap: 1 }\nprofiles: { x: { params: { n: 2, lr: 2, cap: 2 } } }\nsteps: { a: { stage: concat, with: { n: '${params.n}', lr: '${params.lr}', cap: '${params.cap}' } } }"),
        ("q.yaml", b"lr: 3\ncap: 3\n"),
        ("bad.yaml", b"rl: 3\n"),
    ]);
    options.profiles = vec!["x".into()];
    options.params_files = vec!["q.yaml".into()];
    options.sets = vec!["cap=4".into()];
    assert_eq!(check_file(Path::new("p.yaml"), &options), "a: concat cap=4 lr=3.0 n=2\n");
    let loaded = load(Path::new("p.yaml"), &options, &TOYS).expect("right");
    let place = |file: &str, line, column| Place { file: file.into(), line, column };
    let origins = &loaded.plan.steps[0].origins;
    assert_eq!(origins["n"], place("p.yaml", 2, 31));
    assert_eq!(origins["lr"], place("q.yaml", 1, 5));
    assert_eq!(origins["cap"], place("--set", 0, 5));
    assert_eq!(loaded.params, serde_json::json!({ "n": 2, "lr": 3, "cap": 4 }));
    let read: Vec<&str> = loaded.sources.iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!(read.len(), 2);
    assert!(read[0].starts_with("params:") && read[1].starts_with("lr: 3"));
    options.params_files = vec!["bad.yaml".into(), "none.yaml".into()];
    insta::assert_snapshot!(check_file(Path::new("p.yaml"), &options), @r"
    error: unknown parameter `rl`
     --> bad.yaml:1:1
      |
    1 | rl: 3
      | ^^
      hint: did you mean `lr`?

    error: cannot read `none.yaml`: it does not exist
     --> none.yaml
      hint: files there: `bad.yaml`, `p.yaml`, `q.yaml`
    ");
}
