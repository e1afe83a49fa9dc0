//! Whole pages, drawn from made-up records; `pipe report` draws real ones to be looked at.

use std::collections::BTreeMap;
use std::fs;

use cache::{Cache, Digest, Key, Kind, Output};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{html, html_live};
use crate::event::{Event, Failure, Stamped, Summary};
use crate::plan::{Place, Plan, Port, Resources, Source, Step, Text};
use crate::run::{Info, Past};
use crate::stage::Report;

const LIMIT: usize = 2_000_000;

/// A record in the making.
struct Made {
    dir: TempDir,
    cache: Cache,
    past: Past,
    t: f64,
}

impl Made {
    fn new(pipeline: &str) -> Made {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("cache")).unwrap();
        let record = dir.path().join("record");
        fs::create_dir(&record).unwrap();
        let info = Info {
            id: "20261123-170102-3fa9".into(),
            pipeline: pipeline.into(),
            file: format!("/home/ada/work/{pipeline}.yaml").into(),
            cwd: "/home/ada/work".into(),
            args: ["pipe", "run", "pipelines/mohawk.yaml", "--set", "align.lr=2e-3"]
                .map(String::from)
                .into(),
            started_s: 1_795_453_262.25,
            build: "0.1.0 (c0ffee)".into(),
            pid: 0,
        };
        let plan = Plan {
            name: pipeline.into(),
            file: info.file.clone(),
            steps: Vec::new(),
            outputs: Vec::new(),
        };
        Made {
            dir,
            cache,
            past: Past { info, plan: plan.into(), events: Vec::new(), dir: record },
            t: 0.0,
        }
    }

    /// Adds a step that needs all steps of the groups in `needs`.
    fn step(
        &mut self,
        name: &str,
        stage: &str,
        coords: &[(&str, Value)],
        params: Value,
        needs: &[&str],
    ) -> usize {
        let place = Place {
            file: "/home/ada/work/mohawk.yaml".into(),
            line: 12 + self.past.plan.steps.len(),
            column: 3,
        };
        let found = self
            .past
            .plan
            .steps
            .iter()
            .enumerate()
            .filter(|(_, step)| needs.contains(&step.group.as_str()));
        let sources: Vec<Source> =
            found.map(|(step, _)| Source::Step { step, port: "x".into(), index: None }).collect();
        let coords: Vec<(Text, Value)> =
            coords.iter().map(|(axis, value)| (Text::from(*axis), value.clone())).collect();
        let shown: Vec<String> = coords
            .iter()
            .map(|(axis, value)| match coords.len() {
                1 => value.to_string(),
                _ => format!("{axis}={}", value.to_string().replace('"', "")),
            })
            .collect();
        let full = if shown.is_empty() {
            name.to_string()
        } else {
            format!("{name}[{}]", shown.join(","))
        };
        std::sync::Arc::make_mut(&mut self.past.plan).steps.push(Step {
            name: full,
            group: name.into(),
            coords,
            stage: stage.into(),
            params: params.into(),
            inputs: vec![Port {
                name: "x".into(),
                named: false,
                list: true,
                place: place.clone(),
                sources,
            }],
            after: Vec::new(),
            ports: vec![("metrics".into(), false, "metrics.json".into())].into(),
            resources: Resources::default().into(),
            retries: 0,
            timeout_s: None,
            cache: true,
            secrets: Vec::new().into(),
            place: place.clone(),
            origins: BTreeMap::from([("lr".to_string(), place)]).into(),
            uses: Vec::new().into(),
            auto: None,
        });
        self.past.plan.steps.len() - 1
    }

    fn event(&mut self, event: Event) {
        self.past.events.push(Stamped { t: self.t, event });
    }

    fn key(step: usize) -> Key {
        Key::of(format!("step {step}").as_bytes())
    }

    /// Puts `metrics` into the store; with `None`, there is only a tensor file.
    fn outputs(&self, step: usize, metrics: Option<&Value>) -> Vec<Output> {
        let bytes = 180_000 + 7919 * step as u64;
        let digest = Digest::of(&step.to_le_bytes());
        let mut all = vec![Output {
            port: "model".into(),
            index: None,
            name: "model.safetensors".into(),
            kind: Kind::File,
            digest,
            bytes,
        }];
        if let Some(metrics) = metrics {
            let text = metrics.to_string();
            let digest = Digest::of(text.as_bytes());
            let path = self.cache.object(&digest);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, &text).unwrap();
            all.push(Output {
                port: "metrics".into(),
                index: None,
                name: "metrics.json".into(),
                kind: Kind::File,
                digest,
                bytes: text.len() as u64,
            });
        }
        all
    }

    fn launch(&mut self, step: usize) {
        let dir = "attempts/x".into();
        self.event(Event::Launched { step, key: Made::key(step), attempt: 1, dir, resumed: None });
    }

    fn finish(&mut self, step: usize, seconds: f64, metrics: Option<&Value>) {
        let outputs = self.outputs(step, metrics);
        self.event(Event::Finished { step, key: Made::key(step), seconds, outputs });
    }

    /// Runs a step for `seconds`.
    fn ran(&mut self, step: usize, seconds: f64, metrics: Option<&Value>) {
        self.launch(step);
        self.progress(step, 0);
        self.t += seconds;
        self.progress(step, (seconds * 44_000.0) as u64);
        self.finish(step, seconds, metrics);
    }

    fn progress(&mut self, step: usize, done: u64) {
        let report = Report::Progress { done, total: 1 << 22, unit: "tokens".into() };
        self.event(Event::Reported { step, report });
    }

    fn cached(&mut self, step: usize, saved_s: f64, metrics: Option<&Value>) {
        let outputs = self.outputs(step, metrics);
        self.event(Event::Cached { step, key: Made::key(step), saved_s, outputs });
    }

    fn ended(&mut self, summary: Summary) {
        let seconds = self.t;
        self.event(Event::Ended { summary: Summary { seconds, ..summary } });
    }

    /// The page, checked for what every page must be.
    fn page(&self) -> String {
        let page = html(&self.past, &self.cache);
        assert!(page.len() < LIMIT, "{} bytes", page.len());
        assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
        for network in ["http://", "https://", "src=", "@import", "url(http"] {
            assert!(!page.contains(network), "{network}");
        }
        assert!(!page.contains("NaN"), "a number that is none");
        page
    }
}

/// A falling, noisy curve, reproducible.
fn falling(updates: u64, from: f64, to: f64, seed: u64) -> Vec<Value> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    };
    let at = |u: u64| u as f64 / updates as f64;
    let loss =
        |u: u64, noise: f64| (to + (from - to) * (-7.0 * at(u)).exp()) * (1.0 + 0.06 * noise);
    (0..=updates)
        .step_by(10)
        .map(|u| json!([u, { "loss": loss(u, noise()), "lr": 3e-3 * (1.0 - at(u)) }]))
        .collect()
}

fn evaluation(perplexity: f64, recall: f64) -> Value {
    let bucket = |i: i32| {
        json!({ "from": 1 << (i + 2), "to": 1 << (i + 3), "n": 400 + 31 * i,
        "teacher": 1.0 - 0.002 * f64::from(i), "student": recall - 0.012 * f64::from(i) })
    };
    json!({
        "kind": "evaluation",
        "teacher": { "perplexity": 5.871, "recall": 0.998, "copy": 0.994, "chance": 0.2271, "answers": 2412, "loss": 1.770 },
        "student": { "perplexity": perplexity, "recall": recall, "copy": 0.981, "chance": 0.2271, "answers": 2412, "loss": perplexity.ln() },
        "agreement": { "argmax": 0.953, "kl": 0.0213 },
        "ratios": { "perplexity": perplexity / 5.871, "recall": recall / 0.998 },
        "layers": [{ "layer": 0, "distance": 0.031 }, { "layer": 1, "distance": 0.058 }, { "layer": 2, "distance": 0.094 }],
        "recall_by_distance": (0..5).map(bucket).collect::<Vec<_>>(),
        "tasks": [{ "task": "piqa", "n": 900, "metric": "acc", "chance": 0.5,
            "teacher": { "acc": 0.7, "acc_stderr": 0.02 }, "student": { "acc": 0.68, "acc_stderr": 0.02 } }],
        "matrices": [{ "layer": 2, "head": 1, "distance": 0.25, "teacher": ["1000", "400 600"], "student": ["950", "380 -20"] },
            { "layer": "no", "teacher": ["1"], "student": ["1"] }],
        "tokens": 131_072,
    })
}

/// The default pipeline, as far as its last but `without` steps.
fn mohawk(made: &mut Made) -> Vec<usize> {
    let lr = json!({ "lr": 0.003, "updates": 600, "layers": [0], "seed": 17, "device": "cpu" });
    let mut all = vec![
        made.step("corpus", "text", &[], json!({ "documents": 12000 }), &[]),
        made.step("tokenizer", "train_tokenizer", &[], json!({ "vocabulary": 512 }), &["corpus"]),
        made.step(
            "tokens",
            "tokenize",
            &[],
            json!({ "seq": 128, "holdout": 0.02 }),
            &["corpus", "tokenizer"],
        ),
        made.step("teacher", "pretrain", &[], lr.clone(), &["tokens"]),
        made.step(
            "signals",
            "cache_teacher",
            &[],
            json!({ "sequences": 512, "attention": "qk" }),
            &["teacher", "tokens"],
        ),
    ];
    for layer in 0..3 {
        all.push(made.step(
            "orient",
            "orient",
            &[("layer", json!(layer))],
            json!({ "layers": [layer], "lr": 3e-3 }),
            &["teacher", "tokens", "signals"],
        ));
    }
    for layer in 0..3 {
        all.push(made.step(
            "align",
            "align",
            &[("layer", json!(layer))],
            json!({ "layers": [layer], "lr": 2e-3 }),
            &["orient", "tokens", "signals", "teacher"],
        ));
    }
    all.push(made.step("student", "assemble", &[], json!({}), &["teacher", "align"]));
    all.push(made.step("distill", "distill", &[], lr, &["student", "teacher", "tokens"]));
    all.push(made.step("evaluate", "evaluate", &[], json!({}), &["teacher", "distill", "tokens"]));
    all
}

fn training(curve: Vec<Value>, last: Value) -> Value {
    json!({ "kind": "training", "curve": curve, "final": last })
}

fn run_until_distill(made: &mut Made, steps: &[usize]) {
    let count = made.past.plan.steps.len();
    made.event(Event::Started { steps: count, jobs: 2 });
    made.cached(steps[0], 2.1, None);
    made.cached(steps[1], 0.8, None);
    made.ran(steps[2], 1.4, None);
    made.ran(
        steps[3],
        66.3,
        Some(&training(falling(2800, 6.2, 1.77, 3), json!({ "recall": 0.998 }))),
    );
    made.ran(steps[4], 3.2, None);
    for layer in 0..3 {
        let last = json!({ "loss": 0.31 + 0.1 * layer as f64, "norm": 5.2 - 0.4 * layer as f64 });
        made.ran(
            steps[5 + layer],
            9.0 + layer as f64,
            Some(&training(falling(600, 24.0, 0.3 + 0.1 * layer as f64, 5 + layer as u64), last)),
        );
    }
    for layer in 0..3 {
        let last = json!({ "layers": [{ "layer": layer, "before": { "distance": 0.42 + 0.1 * layer as f64 }, "after": { "distance": 0.051 + 0.02 * layer as f64 } }] });
        made.ran(
            steps[8 + layer],
            8.0,
            Some(&training(falling(500, 3.0, 0.4, 9 + layer as u64), last)),
        );
    }
    made.ran(steps[11], 0.1, None);
}

#[test]
fn a_finished_run_shows_everything() {
    let mut made = Made::new("mohawk");
    let steps = mohawk(&mut made);
    run_until_distill(&mut made, &steps);
    made.ran(
        steps[12],
        71.0,
        Some(&training(falling(1600, 2.9, 1.78, 2), json!({ "loss": 1.78 }))),
    );
    made.ran(steps[13], 4.4, Some(&evaluation(5.934, 0.9941)));
    made.event(Event::Note { text: "`orient[1]` gave other bytes than an earlier run with the same key; the earlier result stays, the evidence is kept".into() });
    made.ended(Summary { cached: 2, ran: 12, saved_s: 2.9, ..Summary::default() });
    fs::write(
        made.past.dir.join("source-0-mohawk.yaml"),
        "name: mohawk\nsteps:\n  corpus: { stage: text } # <script>\n",
    )
    .unwrap();
    let page = made.page();
    for wanted in [
        "1.011",
        "99.4 %",
        "22.7 %",
        "2 cached",
        "orient ×3",
        "loss beside ‖A‖_F",
        "before",
        "recall over distance",
        "id=provenance",
        "corpus: { stage: text } # &lt;script&gt;",
        "Time saved",
        "95.3 %",
        "tokens/s",
        "All 14 steps are done.",
        "is almost as good as its teacher",
        "piqa, student: 68.0 %, 64.1 % to 71.9 %",
        "layer 2, head 1",
        "class=below",
        "id=costs",
        "Saved by the cache",
    ] {
        assert!(page.contains(wanted), "{wanted} is not on the page");
    }
    assert!(!page.contains("class=failures") && !page.contains("data-refresh"));
    assert_eq!(page.matches("class=mx").count(), 2, "what is no picture is left out");
    assert!(html_live(&made.past, &made.cache, 7).contains("<body data-refresh=7>"));
}

#[test]
fn a_failed_run_tells_why_on_top() {
    let mut made = Made::new("mohawk");
    let steps = mohawk(&mut made);
    run_until_distill(&mut made, &steps);
    made.launch(steps[12]);
    for at in (0..300).step_by(10) {
        let values = [("loss".to_string(), 2.9 + f64::from(at as u32) * 0.01)].into();
        made.event(Event::Reported { step: steps[12], report: Report::Metric { at, values } });
    }
    made.t += 21.0;
    let message =
        "training of the student diverged at update 297: most likely `lr` is too high <b>".into();
    let log = "update 280 loss 5.7\n\u{1b}[31mupdate 290 loss inf\u{1b}[0m\nnot finite".into();
    made.event(Event::Failed {
        step: steps[12],
        key: Some(Made::key(steps[12])),
        failure: Failure::Diverged,
        message,
        log,
        retry: false,
    });
    made.event(Event::Skipped { step: steps[13], because: Some(steps[12]) });
    made.ended(Summary {
        cached: 2,
        ran: 10,
        failed: 1,
        skipped: 1,
        saved_s: 2.9,
        ..Summary::default()
    });
    let page = made.page();
    let (red, graph) = (page.find("class=failures").unwrap(), page.find("id=graph").unwrap());
    assert!(red < graph && page[red..].contains("update 290 loss inf\nnot finite"));
    assert!(page.contains("too high &lt;b&gt;") && page.contains("1 failed · 1 skipped"));
    assert!(page.contains("<b>distill</b>"), "its curve comes from the events");
}

#[test]
fn several_evaluations_are_compared() {
    let mut made = Made::new("ablation");
    let teacher = made.step("teacher", "pretrain", &[], json!({}), &[]);
    made.cached(teacher, 66.3, Some(&training(falling(2800, 6.2, 1.77, 3), json!({}))));
    let arms = [("3", 6.9, 0.78), ("2-3", 6.2, 0.93), ("1-3", 5.95, 0.99)];
    for group in ["train", "evaluate"] {
        for (arm, perplexity, recall) in arms {
            for seed in 1..4 {
                let coords = [("phases", json!(arm)), ("seed", json!(seed))];
                let needs: &[&str] =
                    if group == "train" { &["teacher"] } else { &["train", "teacher"] };
                let stage = if group == "train" { "distill" } else { "evaluate" };
                let step = made.step(group, stage, &coords, json!({ "seed": seed }), needs);
                let off = 1.0 + 0.01 * seed as f64;
                let metrics = match group {
                    "train" => training(
                        falling(1600, 6.0, f64::ln(perplexity * off), seed as u64),
                        json!({ "loss": 1.8 }),
                    ),
                    _ => evaluation(perplexity * off, recall / off),
                };
                made.ran(step, 20.0 + seed as f64, Some(&metrics));
            }
        }
    }
    made.ended(Summary { cached: 1, ran: 18, saved_s: 66.3, ..Summary::default() });
    let page = made.page();
    assert!(page.contains("Over seeds") && page.contains("evaluate phases=1-3"));
    // Perplexity, ratio and recall, in both tables; what is the same everywhere is best nowhere.
    assert_eq!(page.matches("<i>best</i>").count(), 6);
}

#[test]
fn a_record_may_be_empty_torn_or_interrupted() {
    let made = Made::new("empty");
    assert!(made.page().contains("no end recorded"));

    let mut made = Made::new("mohawk");
    let steps = mohawk(&mut made);
    run_until_distill(&mut made, &steps);
    made.launch(steps[12]);
    made.t += 5.0;
    made.progress(steps[12], 1000);
    let page = made.page();
    assert!(page.contains("state running\">no end recorded") && page.contains("1 pending"));

    made.event(Event::Skipped { step: steps[12], because: None });
    made.event(Event::Finished {
        step: 999,
        key: Made::key(0),
        seconds: f64::INFINITY,
        outputs: Vec::new(),
    });
    made.ended(Summary {
        ran: 10,
        skipped: 2,
        interrupted: true,
        seconds: f64::NAN,
        ..Summary::default()
    });
    assert!(made.page().contains(">interrupted<"));
}

#[test]
fn lost_and_broken_metrics_are_said() {
    let mut made = Made::new("lost");
    let (gone, broken) = (
        made.step("gone", "distill", &[], json!({}), &[]),
        made.step("broken", "distill", &[], json!({}), &[]),
    );
    made.cached(gone, 1.0, Some(&json!({ "kind": "training", "curve": [] })));
    made.cached(broken, 1.0, Some(&json!({ "kind": "training", "curve": [[0, 1]] })));
    let Event::Cached { outputs, .. } = &made.past.events[0].event else { unreachable!() };
    fs::remove_file(made.cache.object(&outputs[1].digest)).unwrap();
    let Event::Cached { outputs, .. } = &made.past.events[1].event else { unreachable!() };
    fs::write(made.cache.object(&outputs[1].digest), "{").unwrap();
    let page = made.page();
    assert!(
        page.contains(
            "metrics of `gone` cannot be shown: their bytes are not in the store any more"
        )
    );
    assert!(page.contains("metrics of `broken` cannot be shown: they are no JSON"));
}

#[test]
fn hostile_names_are_only_text() {
    let evil = "<script>alert(1)</script>\u{202e}\"'&";
    let mut made = Made::new(evil);
    let step = made.step(
        evil,
        evil,
        &[(evil, json!(evil)), ("seed", json!(1))],
        json!({ evil: evil }),
        &[],
    );
    let mut metrics = evaluation(6.0, 0.9);
    metrics["student"][evil] = json!(1);
    metrics["layers"][0][evil] = json!(1);
    made.ran(step, 1.0, Some(&metrics));
    let step = made.step(evil, evil, &[(evil, json!(2))], json!({}), &[evil]);
    made.ran(
        step,
        1.0,
        Some(&training(
            vec![json!([0, { evil: 1.0 }]), json!([1, { evil: 2.0 }])],
            json!({ "layer": 1, "loss": 2.0, evil: 2 }),
        )),
    );
    made.launch(step);
    made.event(Event::Failed {
        step,
        key: None,
        failure: Failure::Error,
        message: evil.into(),
        log: evil.into(),
        retry: false,
    });
    made.event(Event::Note { text: evil.into() });
    made.past.info.args.push(evil.into());
    made.past.info.id = evil.into();
    fs::write(made.past.dir.join("source-0-<script>"), evil).unwrap();
    let page = made.page();
    assert!(!page.contains("<script>alert") && !page.contains('\u{202e}'));
    let scripts = page.matches("<script").count();
    assert_eq!(scripts, page.matches("</script>").count());
    assert_eq!(scripts, 1 + page.matches("<script type=\"application/json\">").count());
}

#[test]
fn ten_thousand_steps_fit() {
    let mut made = Made::new("many");
    let params = json!({ "text": "x".repeat(400) });
    for i in 0..10_000 {
        let step = made.step("work", "command", &[("i", json!(i))], params.clone(), &[]);
        made.t += 0.01;
        if i % 3 == 0 { made.ran(step, 0.01, None) } else { made.cached(step, 1.0, None) }
    }
    for i in 0..400 {
        made.step(&format!("lone{i}"), "command", &[], params.clone(), &[]);
    }
    made.ended(Summary { cached: 6666, ran: 3334, ..Summary::default() });
    let begun = std::time::Instant::now();
    let page = made.page();
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    assert!(page.contains("9,960 more instances of <code>work</code>"));
    let _ = made.dir.path();
}
