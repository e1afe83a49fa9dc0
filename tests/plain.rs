//! A command that needs no shell is started without one, and only its processes can tell.

use std::os::unix::fs::PermissionsExt;

use crate::support::Project;

/// How a run with this command ends, what the command printed, and what it made.
fn run(text: &str) -> (Option<i32>, String, String) {
    let mut project = Project::with(&format!(
        r#"steps:
  made:
    stage: command
    in: {{ src: "./a file.txt", tool: ./tool }}
    run: |
      {text}
    out: [o]
    env: {{ WORD: two words, PWD: /nowhere }}
    secrets: [HIDDEN]
  seen: {{ stage: command, in: {{ o: made.o }}, run: [cat, "${{in.o}}"] }}
"#
    ));
    project.env("HIDDEN", "pl4nted");
    project.write("a file.txt", "b\na\n");
    project.write("tool", "#!/bin/sh\necho \"$0 $*\"; echo \"$0\" >&2\n");
    let tool = project.path().join("tool");
    std::fs::set_permissions(tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    let code = project.pipe(&["run", "p.yaml"]).code;
    let log = |step: &str| project.pipe(&["log", step]).stdout;
    (code, log("made"), log("seen"))
}

/// The same behind a command of the shell's, which takes a shell.
fn by_shell(text: &str) -> (Option<i32>, String, String) {
    run(&format!(": ; {text}"))
}

#[test]
fn a_command_does_the_same_without_a_shell() {
    for text in [
        "sort < ${in.src} > ${out.o}",
        "sort ${in.src} -o ${out.o}",
        "cp -v ${in.src} ${out.o}",
        "printenv WORD > ${out.o}",
        "seq 3 > 'out/o'",
        "${in.tool} 'a  b' > ${out.o}",
        "setsid seq 3 > ${out.o}",
        "tee ${out.o} < ${in.src}",
        "printenv HIDDEN PATH > ${out.o}",
    ] {
        let (plain, shell) = (run(text), by_shell(text));
        assert_eq!(plain, shell, "{text}");
        assert_eq!(plain.0, Some(0), "{text}: {plain:?}");
        assert!(!plain.2.is_empty(), "{text}");
    }
    let pwd = "printenv PWD > ${out.o}";
    let (plain, shell) = (run(pwd).2, by_shell(pwd).2);
    assert!(plain.ends_with("/work\n"), "{plain}");
    assert_eq!(plain.matches('/').count(), shell.matches('/').count(), "{plain}{shell}");
}

#[test]
fn a_command_fails_the_same_without_a_shell() {
    for (text, told) in [
        ("no-such-program > ${out.o}", "not found"),
        ("./no-such-program", "not found"),
        ("cat ${in.src} > no/such/place", "no/such/place"),
        ("cat < no-such-file > ${out.o}", "no-such-file"),
        ("cat no-such-file > ${out.o}", "no-such-file"),
        ("cat ${in.src} nothing-else > out", "out"),
    ] {
        let (plain, shell) = (run(text), by_shell(text));
        assert_eq!(plain, shell, "{text}");
        assert!(plain.0 == Some(1) && plain.1.contains(told), "{text}: {plain:?}");
    }
}

#[test]
fn there_is_no_shell_between() {
    // The first of its group is the one that the worker starts.
    let text = "cut -d ' ' -f 1,5 /proc/self/stat > ${out.o}";
    let leads = |(_, _, ids): (_, _, String)| {
        let (own, group) = ids.trim().split_once(' ').unwrap();
        own == group
    };
    assert!(leads(run(text)));
    assert!(!leads(by_shell(&format!("{text}; :"))));
}
