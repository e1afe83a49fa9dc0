//! A plan comes back whole, or not at all.

use serde_json::json;

use super::*;

fn place(line: usize) -> Place {
    Place { file: "pipe.yaml".into(), line, column: 300 }
}

fn plan() -> Plan {
    let sources = vec![
        Source::Step { step: 0, port: "model".into(), index: Some(u32::MAX) },
        Source::Path { path: "/a/b c".into() },
        Source::Hub { name: "o/n@main".into() },
    ];
    let params = json!({ "lr": 3e-4, "n": -7, "most": u64::MAX, "text": "ä\"", "none": null,
        "list": [true, false, [], {}], "run": ["sh", "-c", "cat ${in.x}"] });
    let step = Step {
        name: "align[2]".into(),
        group: "align".into(),
        coords: vec![("layer".into(), json!(2)), ("lr".into(), json!("3e-4"))],
        stage: "align".into(),
        params: params.into(),
        inputs: vec![Port {
            name: "in".into(),
            named: true,
            list: false,
            place: place(3),
            sources,
        }],
        after: vec![0, 200],
        ports: vec![("out".into(), true, "out.txt".into())].into(),
        resources: Resources {
            cpu: Some(0),
            gpu: 2,
            memory: u64::MAX,
            vram: 1 << 33,
            gpu_type: Some("h100".into()),
            time_s: Some(90.5),
        }
        .into(),
        retries: 1000,
        timeout_s: Some(0.25),
        cache: true,
        secrets: vec!["TOKEN".into()].into(),
        place: place(1),
        origins: BTreeMap::from([("lr".to_string(), place(9)), ("n".to_string(), place(0))]).into(),
        uses: vec![Use {
            parameter: "run".into(),
            name: "params.word".into(),
            value: "cat".into(),
            place: place(7),
        }]
        .into(),
        auto: Some("there is a GPU".into()),
    };
    let other = Step { auto: None, timeout_s: None, cache: false, ..step.clone() };
    let output = Output {
        name: "student".into(),
        source: Source::Step { step: 1, port: "model".into(), index: None },
        to: "/out".into(),
        place: place(20),
    };
    Plan {
        name: "bench".into(),
        file: "/x/pipe.yaml".into(),
        steps: vec![Step::default(), step, other],
        outputs: vec![output],
    }
}

#[test]
fn a_plan_comes_back_in_every_field() {
    let plan = plan();
    let back = parse(&render(&plan)).unwrap();
    assert_eq!(serde_json::to_value(&back).unwrap(), serde_json::to_value(&plan).unwrap());
}

#[test]
fn nothing_but_the_whole_is_read() {
    let bytes = render(&plan());
    for at in 0..bytes.len() {
        assert!(parse(&bytes[..at]).is_none(), "cut at {at}");
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        assert!(parse(&bytes).is_none(), "flip at {at}");
    }
}

#[test]
fn steps_of_many_kinds_in_turn_come_back_in_their_order() {
    let [_, like, _] = &plan().steps[..] else { panic!("there are three") };
    let step = |n: usize| {
        let (kind, of) = (n % 7, n % 150);
        let file = format!("{}.yaml", n % 90);
        let place = Place { file: file.as_str().into(), line: n, column: kind };
        Step {
            name: format!("s[{n}]"),
            group: format!("g{of}").into(),
            stage: format!("t{kind}").into(),
            params: json!({ "of": of }).into(),
            ports: vec![(format!("p{kind}"), false, format!("{of}.txt"))].into(),
            retries: kind as u32,
            origins: BTreeMap::from([(format!("o{kind}"), place.clone())]).into(),
            place,
            ..like.clone()
        }
    };
    let long = Plan { steps: (0..2500).map(step).collect(), ..plan() };
    let text = |plan: &Plan| serde_json::to_string(plan).unwrap();
    assert!(text(&parse(&render(&long)).unwrap()) == text(&long));
}
