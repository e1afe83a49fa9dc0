//! GPUs that nobody has, from outside: what is planned, what a step sees, who waits for whom.

use std::process::Child;

use rustix::process::Signal;

use crate::support::{Project, signal};

/// A step that says which GPU it has and takes as long as there is a file `slow`.
fn project(gpus: &str) -> Project {
    let mut project = Project::new();
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "params: {{ word: a }}
steps:
  s:
    stage: command
    run: [sh, -c, 'echo ${{params.word}} $CUDA_VISIBLE_DEVICES >> {dir}/seen; while [ -e {dir}/slow ]; do sleep 0.02; done; echo 1 > ${{out.o}}']
    out: [o]
    resources: {{ gpu: 1, vram: 8GiB }}
"
        ),
    );
    project.env("PIPE_FAKE_GPUS", gpus);
    project
}

/// UUIDs of this process and test alone: locks are the machine's.
fn uuid(test: &str) -> String {
    format!("fake-{test}-{}", std::process::id())
}

#[test]
fn a_step_sees_the_gpu_that_it_was_given() {
    let uuid = uuid("sees");
    let mut project = project(&format!("{uuid}0,{uuid}1"));
    project.env("CUDA_VISIBLE_DEVICES", "1");
    let planned = project.pipe(&["plan", "p.yaml"]).stdout;
    assert!(planned.contains("never done before (1 GPU)"), "{planned}");
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.read("seen"), format!("a {uuid}1\n"));
    project.env("CUDA_VISIBLE_DEVICES", "");
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!(ran.code, Some(2));
    let told = "step `s` cannot run here: there is no GPU to use: CUDA_VISIBLE_DEVICES is empty";
    assert!(ran.stderr.contains(told) && ran.stderr.contains("p.yaml:7:23"), "{}", ran.stderr);
}

#[test]
fn too_little_memory_in_all_is_told_before_anything_runs() {
    let project = project(&format!("{}:4", uuid("small")));
    let ran = project.pipe(&["check", "p.yaml"]);
    assert_eq!(ran.code, Some(2));
    let told = "it wants 8.0 GiB of GPU memory, and no GPU has more than 4.0 GiB";
    assert!(ran.stderr.contains(told), "{}", ran.stderr);
}

#[test]
fn a_gpu_is_free_when_its_run_is_killed() {
    let project = project(&uuid("killed"));
    project.write("slow", "");
    let start = |word: &str| project.start(&["run", "p.yaml", "--set", &format!("word={word}")]);
    let mut first: Child = start("first");
    project.wait_until("the first step began", || project.count("seen") == 1);
    let second = start("second");
    std::thread::sleep(std::time::Duration::from_millis(400));
    assert_eq!(project.count("seen"), 1, "the second waits");
    signal(first.id(), Signal::KILL);
    first.wait().unwrap();
    project.wait_until("the second step began", || project.count("seen") == 2);
    std::fs::remove_file(project.path().join("slow")).unwrap();
    let output = second.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let told = "s waits for GPU 0 (Fake), which run ";
    assert!(
        stderr.contains(told) && stderr.contains(&format!("(process {})", first.id())),
        "{stderr}"
    );
}

#[test]
fn the_device_is_planned_and_shown() {
    let mut project = Project::with(
        "steps:
  corpus: { stage: text }
  tokenizer: { stage: train_tokenizer, in: { text: corpus.text } }
  tokens: { stage: tokenize, in: { text: corpus.text, tokenizer: tokenizer.tokenizer } }
  teacher: { stage: pretrain, in: { tokens: tokens.train } }
",
    );
    project.env("PIPE_FAKE_GPUS", "");
    let plan = |project: &Project| project.pipe(&["plan", "p.yaml"]).stdout;
    assert!(plan(&project).contains("after `tokens` (cpu)"), "{}", plan(&project));
    let show = |project: &Project| project.pipe(&["show", "teacher", "-f", "p.yaml"]).stdout;
    assert!(show(&project).contains("auto: PIPE_FAKE_GPUS names none"), "{}", show(&project));
    let ran = project.pipe(&["check", "p.yaml", "--set", "teacher.device=cuda"]);
    assert_eq!(ran.code, Some(2));
    let told = "`device: cuda`, but there is no GPU to use: PIPE_FAKE_GPUS names none";
    assert!(ran.stderr.contains(told), "{}", ran.stderr);

    project.env("PIPE_FAKE_GPUS", &uuid("planned"));
    assert!(plan(&project).contains("after `tokens` (cuda, 1 GPU)"), "{}", plan(&project));
    assert!(show(&project).contains("auto: there is a GPU"), "{}", show(&project));
    let json = project.pipe(&["plan", "p.yaml", "--json"]).stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["steps"][3]["device"], &json["steps"][3]["gpus"]),
        (&"cuda".into(), &1.into())
    );
    assert_eq!(json["steps"][0].get("device"), None);
}
