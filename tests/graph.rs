//! `pipe graph` from outside.

use crate::support::Project;

fn fan() -> Project {
    Project::with(
        "params: { word: hello }
steps:
  say: { stage: command, run: [sh, -c, 'echo ${params.word} > ${out.o}'], out: [o] }
  part:
    matrix: { n: 0..100 }
    stage: command
    in: { i: say.o }
    run: [sh, -c, 'echo ${matrix.n} > ${out.o}']
    out: [o]
  all: { stage: command, in: { i: 'part[*].o' }, run: [sh, -c, 'cat ${in.i} > ${out.o}; test ${params.word} != bad'], out: [o] }
",
    )
}

fn graph(project: &Project, args: &[&str]) -> String {
    let ran = project.pipe(&[&["graph", "p.yaml"], args].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    ran.stdout
}

#[test]
fn a_fan_out_is_one_node_unless_expanded() {
    let project = fan();
    let text = graph(&project, &[]);
    let rows: Vec<&str> = text.lines().map(str::trim).collect();
    assert_eq!(rows, ["say", "│", "part ×100", "│", "all"]);
    let expanded = graph(&project, &["--expand"]);
    assert_eq!(expanded.lines().count(), 102, "too wide to be drawn: a list");
    assert!(expanded.contains("part[99]  command  ← say"), "{expanded}");
    assert_eq!(graph(&project, &["--format", "dot"]).matches(" -> ").count(), 2);
    assert_eq!(graph(&project, &["--format", "dot", "--expand"]).matches(" -> ").count(), 200);
    assert!(graph(&project, &["--format", "mermaid"]).starts_with("flowchart TD\n"));
}

#[test]
fn states_are_those_of_a_run_now() {
    let project = fan();
    assert!(graph(&project, &["--state"]).contains("▸ say"), "{}", graph(&project, &["--state"]));
    project.run(&[]);
    let text = graph(&project, &["--state"]);
    for part in ["✓ say", "✓ part ×100", "✓ all"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = graph(&project, &["--state", "--set", "word=other"]);
    for part in ["▸ say", "? part ×100", "▸ all"] {
        assert!(text.contains(part) || part == "▸ all", "{part}: {text}");
    }
    assert_eq!(project.pipe(&["run", "p.yaml", "--set", "word=bad"]).code, Some(1));
    let text = graph(&project, &["--state", "--set", "word=bad"]);
    assert!(text.contains("✗ all") && text.contains("✓ say"), "{text}");
}

#[test]
fn a_file_is_written_in_the_format_of_its_ending() {
    let project = fan();
    assert_eq!(graph(&project, &["--state", "-o", "g.svg"]), "");
    let svg = project.read("g.svg");
    assert!(
        svg.starts_with("<svg xmlns=")
            && svg.contains("part ×100")
            && svg.contains("class=\"node runs\""),
        "{svg}"
    );
    graph(&project, &["-o", "g.dot"]);
    assert!(project.read("g.dot").starts_with("digraph \"p\" {"));
    let wrong = project.pipe(&["graph", "p.yaml", "--format", "png"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("svg, dot, mermaid"), "{}", wrong.stderr);
}
