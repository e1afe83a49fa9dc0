//! Programs whose outputs lead out of their directory, or are no files: refused, by name, and the
//! store and everything else stay as they were.

use std::fs;

use crate::support::Project;

/// One step that runs `script`, with `$THEIRS` outside and `$OUT` the path of its output.
fn project(script: &str) -> Project {
    let project = Project::new();
    project.write("theirs/file", "theirs");
    let theirs = project.path().join("theirs").display().to_string();
    project.write("s.sh", script);
    let program = project.path().join("s.sh").display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  s:
    stage: command
    env: {{ THEIRS: {theirs}, OUT: '${{out.o}}' }}
    run: [sh, -e, {program}]
    out: [o]
  t:
    stage: command
    in: {{ o: s.o }}
    run: [sh, -c, 'cat ${{in.o}} > ${{out.p}}']
    out: [p]
"
        ),
    );
    project
}

#[test]
fn outputs_that_are_no_files_of_the_step_are_refused() {
    let cases = [
        ("ln -s \"$THEIRS/file\" $OUT", "symbolic link"),
        ("ln -s no/such/file $OUT", "symbolic link"),
        ("ln -s /etc/passwd $OUT", "symbolic link"),
        ("mkdir $OUT; ln -s \"$THEIRS\" $OUT/up", "symbolic link"),
        ("mkdir $OUT; ln -s ../../../../../.. $OUT/up", "symbolic link"),
        ("mkfifo $OUT", "neither a file nor a directory"),
        ("mkdir -p $OUT/a/b; mkfifo $OUT/a/b/pipe", "neither a file nor a directory"),
        ("rmdir out; ln -s \"$THEIRS\" out; echo x > out/o", "in the place of its directory `out`"),
    ];
    for (script, wanted) in cases {
        let project = project(script);
        let ran = project.pipe(&["run", "p.yaml"]);
        assert_eq!(ran.code, Some(1), "{script}: {}", ran.stdout);
        assert!(ran.stderr.contains(wanted), "{script}: {}", ran.stderr);
        let left: Vec<_> = fs::read_dir(project.path().join("theirs")).unwrap().collect();
        assert!(left.len() <= 2, "{script}: {left:?}");
        // The program's own writes there are its own; what was there is there.
        assert_eq!(project.read("theirs/file"), "theirs", "{script}");
        let shards = fs::read_dir(project.cache().join("entries")).unwrap();
        assert_eq!(shards.count(), 0, "{script}: nothing is published");
    }
}

/// What a command puts beside its own directory leads nowhere.
#[test]
fn a_link_beside_the_outputs_is_not_followed() {
    let project = project("mkdir ../out; ln -s \"$THEIRS\" ../out/o; echo x > $OUT");
    assert_eq!(project.run(&[]), "0 cached, 2 ran");
    let left: Vec<_> = fs::read_dir(project.path().join("theirs")).unwrap().collect();
    assert_eq!((left.len(), project.read("theirs/file").as_str()), (1, "theirs"), "{left:?}");
    assert_eq!(project.run(&[]), "2 cached, 0 ran");
}

#[test]
fn a_hard_link_to_a_foreign_file_is_a_copy_and_the_file_stays_writable() {
    let project = project("ln \"$THEIRS/file\" $OUT");
    assert_eq!(project.run(&[]), "0 cached, 2 ran");
    project.write("theirs/file", "changed");
    project.write("p.yaml", &project.read("p.yaml").replace("cat ", "cat -- "));
    assert_eq!(project.run(&[]), "1 cached, 1 ran");
    let ran = project.pipe(&["show", "t", "--json"]);
    assert_eq!(ran.code, Some(0));
    assert_eq!(project.read("theirs/file"), "changed");
}

/// Links of a checkpoint are neither followed nor gone round in.
#[test]
fn a_checkpoint_full_of_links_is_no_trouble() {
    let script = "
for i in 1 2 3 4; do ln -s . checkpoint/round$i; done
ln -s \"$THEIRS\" checkpoint/theirs
echo 5 > checkpoint/n
if [ ! -e \"$THEIRS/again\" ]; then touch \"$THEIRS/again\"; exit 1; fi
echo x > $OUT
";
    let again = script.replace("ln -s", "ln -sfn");
    let project = project(&again);
    assert_eq!(project.pipe(&["run", "p.yaml"]).code, Some(1));
    assert_eq!(project.run(&[]), "0 cached, 2 ran");
    assert_eq!(project.read("theirs/file"), "theirs");
}

#[test]
fn what_a_program_puts_beside_its_directory_is_not_taken_for_ours() {
    let script = "
rm -f ../log; ln -s \"$THEIRS/file\" ../log
ln -s \"$THEIRS/file\" ../log.kept; ln -s \"$THEIRS/file\" ../attempt.json.tmp
echo told; echo x > $OUT
";
    let project = project(script);
    assert_eq!(project.run(&[]), "0 cached, 2 ran");
    assert_eq!(project.read("theirs/file"), "theirs");
    assert!(!project.pipe(&["log", "s"]).stdout.contains("theirs"));
}

#[test]
fn strange_names_in_a_directory_go_in_and_out() {
    let script = "
mkdir $OUT
printf 1 > \"$OUT/$(printf 'line\\nbreak')\"
printf 2 > \"$OUT/$(printf '\\033[31mred')\"
printf 3 > \"$OUT/$(printf '%0255d' 0)\"
printf 4 > \"$OUT/-rf\"
";
    let project = project(script);
    let yaml = project.read("p.yaml").replace("cat ${in.o}", "cat ${in.o}/*");
    project.write("p.yaml", &format!("{yaml}outputs: {{ o: {{ from: s.o, to: copy }} }}\n"));
    assert_eq!(project.run(&[]), "0 cached, 2 ran");
    let copied = project.path().join("copy");
    assert_eq!(fs::read_to_string(copied.join("line\nbreak")).unwrap(), "1");
    assert_eq!(fs::read_to_string(copied.join("\x1b[31mred")).unwrap(), "2");
    assert_eq!(fs::read_to_string(copied.join("0".repeat(255))).unwrap(), "3");
    let ran = project.pipe(&["show", "s"]);
    assert!(!ran.stdout.contains('\x1b') && !ran.stderr.contains('\x1b'), "{}", ran.stdout);
}
