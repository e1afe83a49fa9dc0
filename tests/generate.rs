//! Text from the models of a pipeline: repeatable, continuous, in constant memory, and told what is
//! wrong.

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::support::{Project, Ran};

const TINY: &str = include_str!("cases/tiny.yaml");

/// A project with a teacher and a student.
fn models() -> Project {
    let project = Project::with(TINY);
    project.run(&["--until", "student"]);
    project
}

/// `pipe ARGS` with `input` on standard input.
fn fed(project: &Project, args: &[&str], input: &[u8]) -> Ran {
    let mut command = project.command(args);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// The objects that `pipe generate ARGS --json` prints.
fn samples(project: &Project, args: &[&str]) -> Vec<Value> {
    let ran = project.pipe(&[&["generate"], args, &["--json"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    ran.events().collect()
}

fn sample(project: &Project, args: &[&str]) -> Value {
    samples(project, args).remove(0)
}

#[test]
fn equal_seeds_give_equal_texts_and_greedy_ones_go_on_where_they_ended() {
    let project = models();
    for step in ["teacher", "student"] {
        let of = |rest: &[&str]| {
            sample(
                &project,
                &[&[step, "--prompt", "The", "--endless", "--max-tokens"], rest].concat(),
            )
        };
        let seeded = |seed: &str| of(&["30", "--seed", seed])["tokens"].clone();
        assert_eq!(seeded("1"), seeded("1"));
        assert_ne!(seeded("1"), seeded("2"));
        assert_ne!(of(&["30"])["seed"], of(&["30"])["seed"], "another one every time");

        let greedy = |n: &str| of(&[n, "--temperature", "0"]);
        let long = greedy("20");
        assert_eq!(
            long,
            greedy("20")
                .as_object()
                .map(|o| {
                    let mut o = o.clone();
                    for name in ["tokens_per_second", "prompt_tokens_per_second", "seed"] {
                        o[name] = long[name].clone();
                    }
                    Value::Object(o)
                })
                .unwrap()
        );
        assert_eq!(long["tokens"].as_array().unwrap().len(), 20);
        assert_eq!(long["stopped"], "max tokens");
        assert!(long["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert!(long["prompt_tokens"].as_u64().unwrap() >= 2, "a separator comes first");
        let short = greedy("7");
        assert_eq!(long["tokens"].as_array().unwrap()[..7], *short["tokens"].as_array().unwrap());

        // What is printed is what JSON has, on a line of its own.
        let args = ["generate", step, "--prompt", "The", "--endless", "--temperature", "0"];
        let plain = project.pipe(&[&args[..], &["--max-tokens", "20"]].concat());
        let text = long["text"].as_str().unwrap();
        assert_eq!(plain.stdout.trim_end_matches('\n'), text.trim_end_matches('\n'));
        assert!(plain.stdout.ends_with('\n') && plain.stderr.is_empty(), "{}", plain.stderr);
    }
}

#[test]
fn samples_prompts_and_ends() {
    let project = models();
    let of = |rest: &[&str]| sample(&project, &[&["student", "--max-tokens", "12"], rest].concat());
    let three = samples(&project, &["student", "--count", "3", "--seed", "5", "--endless"]);
    assert_eq!(three.len(), 3);
    assert_ne!(three[0]["tokens"], three[1]["tokens"]);
    let again = samples(&project, &["student", "--count", "1", "--seed", "5", "--endless"]);
    assert_eq!(three[0]["tokens"], again[0]["tokens"]);

    // No prompt and an empty one: the beginning of a text; its token is put first once.
    assert_eq!(of(&[])["prompt_tokens"], 1);
    assert_eq!(of(&["--prompt", ""])["prompt_tokens"], 1);
    assert_eq!(of(&["--prompt", "<|endoftext|>"])["prompt_tokens"], 1);
    let whole = of(&["--prompt", "The lake"])["prompt_tokens"].as_u64().unwrap();
    let raw = of(&["--prompt", "The lake", "--raw"])["prompt_tokens"].as_u64().unwrap();
    assert_eq!(raw + 1, whole);
    let piped =
        fed(&project, &["generate", "student", "--prompt", "-", "--json"], "The lake".as_bytes());
    let piped: Value = serde_json::from_str(&piped.stdout).unwrap();
    assert_eq!(piped["prompt_tokens"].as_u64(), Some(whole));

    let greedy = |rest: &[&str]| of(&[&["--temperature", "0", "--endless"], rest].concat());
    let text = greedy(&[])["text"].as_str().unwrap().to_string();
    let (at, stop) = text.char_indices().nth(4).unwrap();
    let first = text.find(stop).unwrap();
    let stopped = greedy(&["--stop", &stop.to_string()]);
    assert!(first <= at);
    assert_eq!((stopped["text"].as_str().unwrap()), &text[..first]);
    assert_eq!(stopped["stopped"], format!("stop {:?}", stop.to_string()));
}

#[test]
fn what_is_wrong_with_a_model_or_a_prompt_is_told() {
    let project = Project::with(TINY);
    let told = |args: &[&str], input: &[u8], part: &str| {
        let ran = fed(&project, args, input);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{args:?} {}", ran.stderr);
        assert!(ran.stderr.contains(part), "{args:?}: {}", ran.stderr);
    };
    let step = |name, rest: &[&'static str], part| {
        told(&[&["generate", name, "-f", "p.yaml"], rest].concat(), b"", part);
    };
    step("teacher", &[], "`teacher` has no result yet\nhint: `pipe run");
    step("teacher", &[], "p.yaml --until teacher`");
    step("teachr", &[], "did you mean `teacher`");
    step("corpus", &[], "step `corpus` has no output `model`");
    step("signals", &["--port", "layer"], "is a list");
    step("align", &[], "means 2 steps");
    step("./nothing.safetensors", &[], "no model file `./nothing.safetensors`");
    step("teacher", &["--temperature=-1"], "the temperature is -1");
    step("teacher", &["--top-p", "0"], "top-p is 0");
    step("teacher", &["--max-tokens", "0"], "--max-tokens");
    told(&["chat", "teacher", "-f", "p.yaml"], b"", "has no result yet");
    told(&["bench", "decode", "teacher", "-f", "p.yaml"], b"", "has no result yet");
    told(&["bench", "decode", "x", "--contexts", "1q"], b"", "8k or 1m");
    if cfg!(not(any(feature = "cuda", feature = "emulate"))) {
        told(&["bench", "gpu"], b"", "no CUDA");
    }

    project.run(&["--until", "student"]);
    told(&["generate", "student", "--prompt", "-"], b"ab\xffc", "not UTF-8 (at byte 2)");
    step("student", &["--raw"], "no prompt");
    // Another model's tokenizer.
    let object = tokenizer(&project);
    let larger = object.replace("\"merges\": [", "\"merges\": [ ");
    assert_ne!(larger, object);
    let mut parsed: Value = serde_json::from_str(&larger).unwrap();
    let mut token = parsed["added_tokens"][0].clone();
    (token["id"], token["content"]) = (9000.into(), "<|far|>".into());
    parsed["added_tokens"].as_array_mut().unwrap().push(token);
    parsed["model"]["vocab"]["<|far|>"] = 9000.into();
    project.write("far.json", &parsed.to_string());
    let far = ["--tokenizer", "far.json", "--prompt", "a <|far|>"];
    told(&[&["generate", "student"], &far[..]].concat(), b"", "token 9000 (`<|far|>`)");
    project.write("bad.safetensors", "not a model");
    project.write("tokenizer.json", &object);
    let ran = project.pipe(&["generate", "./bad.safetensors"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("`./bad.safetensors`"), "{}", ran.stderr);
    project.write("broken.json", "{}");
    let ran = project.pipe(&["generate", "student", "--tokenizer", "broken.json"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("`broken.json` is no valid tokenizer"), "{}", ran.stderr);
}

/// The tokenizer that the pipeline made.
fn tokenizer(project: &Project) -> String {
    fs::read_to_string(object(project, "tokenizer", "tokenizer")).unwrap()
}

/// Puts the artifact `port` of `step`, which the store may keep in parts, into the new file `to`.
fn fetch(project: &Project, step: &str, port: &str, to: &std::path::Path) {
    let output = shown(project, step, port);
    let digest = output["digest"].as_str().unwrap().rsplit(':').next().unwrap();
    let output = cache::Output {
        port: port.into(),
        index: None,
        name: "file".into(),
        kind: cache::Kind::File,
        digest: digest.parse().unwrap(),
        bytes: output["bytes"].as_u64().unwrap_or_default(),
    };
    let cache = cache::Cache::open(project.cache()).unwrap();
    let path = cache.whole(&output, || to.to_path_buf()).unwrap();
    if path != to {
        fs::copy(path, to).unwrap();
    }
}

fn shown(project: &Project, step: &str, port: &str) -> Value {
    let shown = project.pipe(&["show", step, "-f", "p.yaml", "--json"]).stdout;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    shown["outputs"].as_array().unwrap().iter().find(|o| o["port"] == port).unwrap().clone()
}

/// Where the artifact `port` of `step` is.
fn object(project: &Project, step: &str, port: &str) -> std::path::PathBuf {
    let output = shown(project, step, port);
    let digest = output["digest"].as_str().unwrap();
    let digest = digest.rsplit(':').next().unwrap().to_string();
    let mut found = Vec::new();
    walk(&project.cache().join("objects"), &mut found);
    let fits = |path: &std::path::PathBuf| {
        let name: String = path.iter().map(|part| part.to_string_lossy()).collect();
        name.ends_with(&digest)
    };
    found.into_iter().find(fits).unwrap_or_else(|| panic!("no object {digest}"))
}

fn walk(dir: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
    for item in fs::read_dir(dir).unwrap().flatten() {
        match item.path().is_dir() {
            true => walk(&item.path(), found),
            false => found.push(item.path()),
        }
    }
}

#[test]
fn a_model_can_be_named_by_its_file() {
    let project = models();
    fetch(&project, "student", "model", &project.path().join("s.safetensors"));
    let args = ["--prompt", "The", "--temperature", "0", "--max-tokens", "9"];
    let ran = project.pipe(&[&["generate", "s.safetensors"], &args[..]].concat());
    assert!(ran.code == Some(2) && ran.stderr.contains("--tokenizer FILE"), "{}", ran.stderr);
    project.write("tokenizer.json", &tokenizer(&project));
    let by_path = sample(&project, &[&["s.safetensors"], &args[..]].concat());
    let by_name = sample(&project, &[&["student"], &args[..]].concat());
    assert_eq!(by_path["tokens"], by_name["tokens"]);
}

#[test]
fn a_chat_goes_on_over_a_pipe() {
    let project = models();
    let args = ["chat", "student", "--temperature", "0", "--max-tokens", "8", "--stats"];
    let talk = |input: &str| fed(&project, &args, input.as_bytes());
    let ran = talk("Where is the lake?\n\n/reset\nWhere is the lake?\nAnd then?");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let stats: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!(stats.len(), 3, "{}", ran.stderr);
    assert!(stats.iter().all(|line| line.contains("prompt ") && line.contains("state ")));
    // The second turn is read without the first one.
    let read = |line: &str| -> usize {
        line.split("prompt ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    assert!(read(stats[2]) < read(stats[0]) + 10, "{}", ran.stderr);
    assert_eq!(read(stats[0]), read(stats[1]));
    let once = talk("Where is the lake?\n").stdout;
    assert!(ran.stdout.starts_with(&format!("{once}{once}")), "{:?} {once:?}", ran.stdout);
    let ended = talk("/exit\nWhere?\n");
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), ""));
    let wrong = fed(&project, &args, b"\xff\n");
    assert!(wrong.code == Some(2) && wrong.stderr.contains("not UTF-8"), "{}", wrong.stderr);
}

#[test]
fn decoding_is_measured() {
    let project = models();
    let args =
        ["bench", "decode", "teacher", "student", "--contexts", "100,2k,512g", "--tokens", "3"];
    let ran = project.pipe(&[&args[..], &["--json"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let told: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&told["tokens"], &told["context"]), (&3.into(), &"pretended".into()));
    let results = told["results"].as_array().unwrap();
    assert_eq!(results.len(), 6);
    let of = |model: &str, context: u64| {
        let fits = |one: &&Value| one["model"] == model && one["context"] == context;
        results.iter().find(fits).unwrap()
    };
    for (model, context) in
        [("teacher", 100), ("teacher", 2048), ("student", 100), ("student", 2048)]
    {
        let one = of(model, context);
        for name in ["tokens_per_second", "process_bytes", "process_anonymous_bytes", "speed_ratio"]
        {
            assert!(one[name].as_f64().unwrap() > 0.0, "{name} in {one}");
        }
    }
    let state = |model, context| of(model, context)["state_bytes"].as_u64().unwrap();
    assert_eq!(state("student", 100), state("student", 2048));
    // Two layers of keys and values of 16 numbers, with little room to spare.
    let need = 2 * 2 * 16 * 4 * 2048;
    assert!((need..need * 11 / 10).contains(&state("teacher", 2048)));
    assert!(of("student", 2048)["state_ratio"].as_f64().unwrap() < 0.1);
    assert_eq!(of("teacher", 2048)["speed_ratio"], 1.0);
    // More than any machine has: told before it is tried. To a student it is nothing.
    let skipped = of("teacher", 512 << 30)["skipped"].as_str().unwrap();
    assert!(skipped.contains("TB, and"), "{skipped}");
    assert!(of("student", 512 << 30)["tokens_per_second"].as_f64().unwrap() > 0.0);

    let read =
        project.pipe(&[&args[..4], &["--contexts", "300", "--read", "--tokens", "2"]].concat());
    assert_eq!(read.code, Some(0), "{}", read.stderr);
    assert!(read.stdout.contains("read") && read.stdout.lines().count() == 4, "{}", read.stdout);
}

/// Anonymous memory of `child`, in kB.
fn anonymous(child: &Child) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Generates `tokens` tokens; memory (kB) once the first few hundred are there and when nearly all
/// are. The program waits whenever the pipe, made as small as can be, is full.
fn memory(project: &Project, step: &str, tokens: u64, how: &[&str]) -> (u64, u64) {
    let count = tokens.to_string();
    let args = ["generate", step, "--endless", "--max-tokens", &count];
    let mut child = project.start(&[&args[..], how].concat());
    let mut stdout = child.stdout.take().unwrap();
    rustix::pipe::fcntl_setpipe_size(&stdout, 4096).unwrap();
    let (mut buffer, mut read, mut all) = ([0; 2048], 0, Vec::new());
    loop {
        let n = stdout.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        read += n as u64;
        all.extend(anonymous(&child));
    }
    assert!(child.wait().unwrap().success());
    assert!(read > tokens / 2, "{read} bytes of text for {tokens} tokens");
    (all[1], *all.last().unwrap())
}

#[test]
fn a_long_text_of_a_student_takes_no_more_memory_than_a_short_one() {
    let project = models();
    let (early, late) = memory(&project, "student", 131_072, &["--seed", "1"]);
    assert!(late <= early + 256, "{early} kB grew to {late} kB");
    let state = |n| {
        let args = ["student", "--endless", "--temperature", "0", "--max-tokens", n];
        sample(&project, &args)["state_bytes"].as_u64().unwrap()
    };
    assert_eq!(state("1024"), state("4096"));
    // What is measured can be seen to grow: 256 bytes a token of context.
    let args = ["bench", "decode", "teacher", "--contexts", "100,65536", "--tokens", "2", "--json"];
    let ran = project.pipe(&args);
    let shown: Value = serde_json::from_str(&ran.stdout).unwrap();
    let bytes = |i: usize| shown["results"][i]["process_anonymous_bytes"].as_u64().unwrap();
    assert!(bytes(1) >= bytes(0) + 256 * 60_000, "{shown}");
}
