//! The report in a real browser, on a desktop and on a phone, light and dark: nothing outside becomes
//! script, the page's own script works, nothing sticks out. Screenshots stay in the target's `tmp`.

#![allow(clippy::print_stdout)] // what is skipped, and where pictures are, is said

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::Project;
use crate::support::chromium::{Chromium, Page};

const DESKTOP: (u32, u32) = (1200, 900);
const PHONE: (u32, u32) = (390, 844);
/// Would set this if it ever ran.
const EVIL: &str = "<script>window.evil=1</script><img src=x onerror=window.evil=1>";
/// The same as an instance may be called: it would be an error of the page if it ran.
const NAME: &str = "<script>evil()</script>";

fn browser() -> Option<Chromium> {
    let browser = Chromium::start();
    if browser.is_none() {
        println!("skipped: there is no chromium (PIPE_TEST_CHROMIUM names one)");
    }
    browser
}

/// Lower triangles of `n` tokens, in thousandths.
fn triangle(n: usize, value: fn(usize, usize) -> i64) -> Vec<String> {
    let row = |l| (0..=l).map(|k| value(l, k).to_string()).collect::<Vec<_>>().join(" ");
    (0..n).map(row).collect()
}

/// A run with everything that a report can show, hostile wherever text is free, and one failure.
fn project() -> (Project, PathBuf) {
    let project = Project::new();
    let curve: Vec<Value> = (0..200)
        .map(|i| json!([i * 10, { "loss": 5.0 / f64::from(1 + i), "lr": 0.003, EVIL: 1 }]))
        .collect();
    let layers: Vec<Value> = (0..3)
        .map(|l| json!({ "layer": l, "before": { "distance": 3.0 + f64::from(l) }, "after": { "distance": 0.5 } }))
        .collect();
    let training = json!({ "kind": "training", "curve": curve, "final": { "layers": layers } });
    let figures = |recall: f64| {
        json!({ "perplexity": 7.0, "nats": 1.9, "nats_se": 0.01, "recall": recall,
            "recall_se": 0.02, "chance": 0.25, "copy": 0.5, "answers": 900, EVIL: 3 })
    };
    let task = |name: &str| {
        let acc = |acc: f64| json!({ "acc": acc, "acc_stderr": 0.03 });
        json!({ "task": name, "n": 200, "metric": "acc", "chance": 0.5,
            "teacher": acc(0.7), "student": acc(0.66) })
    };
    let picture = |layer: u32, head: u32| {
        json!({ "layer": layer, "head": head, "distance": 0.31,
            "teacher": triangle(32, |l, _| 1000 / (l as i64 + 1)),
            "student": triangle(32, |l, k| 900 / (l as i64 + 1) - 5 * (k as i64 % 3)) })
    };
    let evaluation = json!({ "kind": "evaluation", "teacher": figures(0.9), "student": figures(0.8),
        "ratios": { "perplexity": 1.04 }, "agreement": { "top1": 0.9, "kl": 0.02 },
        "layers": layers, "tasks": [task("piqa"), task(EVIL)],
        "recall_by_distance": [{ "from": 4, "to": 8, "n": 90, "teacher": 0.9, "student": 0.8 }],
        "matrices": [picture(0, 0), picture(0, 1), picture(2, 0)] });
    project.write("training.json", &training.to_string());
    project.write("evaluation.json", &evaluation.to_string());
    project.write(
        "p.yaml",
        &format!(
            "name: '{EVIL}'
steps:
  train:
    matrix: {{ v: [plain, '{NAME}'] }}
    stage: command
    in: {{ i: ./training.json }}
    run: [sh, -c, 'cp ${{in.i}} ${{out.metrics}}']
    out: {{ metrics: metrics.json }}
  evaluate:
    stage: command
    in: {{ i: ./evaluation.json, a: 'train[*].metrics' }}
    run: [cp, '${{in.i}}', '${{out.metrics}}']
    out: {{ metrics: metrics.json }}
  breaks:
    stage: command
    in: {{ a: evaluate.metrics }}
    run: [sh, -c, 'echo \"{EVIL}\"; exit 3']
    out: [o]
"
        ),
    );
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!(ran.code, Some(1), "{}{}", ran.stdout, ran.stderr);
    let ran = project.pipe(&["report", "-o", "report.html"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let report = project.path().join("report.html");
    (project, report)
}

/// What must hold of every page.
fn well(page: &mut Page, width: u32) {
    assert_eq!(page.troubles(), Vec::<String>::new());
    assert_eq!(page.value("window.evil ?? 0"), 0, "outside text became script");
    let wide = page.value("document.documentElement.scrollWidth");
    assert_eq!(wide, width, "the page scrolls sideways");
    let out = "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, .tip') \
               && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))";
    assert_eq!(page.value(out), json!([]), "these stick out");
}

#[test]
fn a_hostile_report_is_harmless_and_fits_every_screen() {
    let Some(mut browser) = browser() else { return };
    let (_project, report) = project();
    for (size, name) in [(DESKTOP, "desktop"), (PHONE, "phone")] {
        for dark in [false, true] {
            let mut page = browser.open(&report, size, dark);
            // Folded parts have to fit as well.
            page.value("document.querySelectorAll('details').forEach((fold) => fold.open = true)");
            well(&mut page, size.0);
            let shade = if dark { "dark" } else { "light" };
            let path = page.screenshot(&format!("report-{name}-{shade}.png"));
            println!("{}", path.display());
            let paper = page.value("getComputedStyle(document.body).backgroundColor");
            let sum: u32 = paper
                .as_str()
                .unwrap()
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|n| n.parse::<u32>().ok())
                .sum();
            assert_eq!(sum < 380, dark, "{paper}");
        }
    }
    let mut page = browser.open(&report, DESKTOP, false);
    let text = page.value("document.body.innerText");
    for shown in [EVIL, NAME] {
        assert!(text.as_str().unwrap().contains(shown), "{shown} is shown as text");
    }
    for (wanted, count) in
        [("section.failures article", 1), ("svg.mx", 6), ("figure.whiskers circle title", 8)]
    {
        let found = page.value(&format!("document.querySelectorAll('{wanted}').length"));
        assert_eq!(found, count, "{wanted}");
    }
}

/// Middle of the first figure of curves, and its ends from left to right, in the window.
const PLACE: &str = "(() => { const svg = document.querySelector('#curves figure.chart > svg'); svg.scrollIntoView({ block: 'center' }); \
                     const box = svg.getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; })()";

#[test]
fn curves_zoom_and_tell_their_values() {
    let Some(mut browser) = browser() else { return };
    let (_project, report) = project();
    let mut page = browser.open(&report, DESKTOP, false);
    let place: Vec<f64> = serde_json::from_value(page.value(PLACE)).unwrap();
    let at = |x: f64, y: f64| (place[0] + x * place[2], place[1] + y * place[3]);
    let shown = "document.querySelector('#curves .plot').innerHTML";
    let first = page.value(shown);
    page.hover(at(0.5, 0.5));
    let tip = page.value("document.getElementById('tip-box').innerText");
    assert!(tip.as_str().unwrap().starts_with("update 9"), "{tip}");
    page.drag(&[at(0.3, 0.5), at(0.4, 0.5), at(0.6, 0.5)]);
    let zoomed = page.value(shown);
    assert_ne!(zoomed, first, "a part is drawn larger");
    let hidden = "document.querySelector('#curves .reset').hidden";
    assert_eq!(page.value(hidden), false);
    page.hover(at(0.5, 0.5));
    let tip = page.value("document.getElementById('tip-box').innerText");
    let told: f64 =
        tip.as_str().unwrap()[7..].lines().next().unwrap().replace(',', "").parse().unwrap();
    assert!((600.0..1100.0).contains(&told), "{tip}");
    let state = "document.querySelector('#curves figure.chart').classList.contains('islog')";
    let before = page.value(state);
    page.value("document.querySelector('#curves button.scale').click()");
    assert_ne!(page.value(state), before);
    assert_ne!(page.value(shown), zoomed, "the other kind of axis");
    well(&mut page, DESKTOP.0);
    println!("{}", page.screenshot("report-zoomed.png").display());
    page.value("document.querySelector('#curves .reset').click()");
    assert_eq!(page.value(hidden), true);
    // Cells of the pictures tell theirs, too.
    page.value("document.querySelector('svg.mx').scrollIntoView({ block: 'center' })");
    let place = "(() => { const box = document.querySelector('svg.mx').getBoundingClientRect(); return [box.left + 1, box.bottom - 1]; })()";
    let place: Vec<f64> = serde_json::from_value(page.value(place)).unwrap();
    page.hover((place[0], place[1]));
    let tip = page.value("document.getElementById('tip-box').innerText");
    let lines: Vec<&str> = tip.as_str().unwrap().lines().collect();
    assert_eq!(lines[0], "token 31 looks at token 0");
    assert_eq!(page.troubles(), Vec::<String>::new());
}

#[test]
fn a_page_of_a_run_that_goes_on_follows_it() {
    let Some(mut browser) = browser() else { return };
    let project = Project::new();
    let gate = project.path().join("gate").display().to_string();
    let step = format!("while [ ! -e {gate} ]; do sleep 0.05; done; echo 1 > ${{out.o}}");
    project.write("p.yaml", &format!(
        "steps:\n  first: {{ stage: command, run: [sh, -c, 'echo 1 > ${{out.o}}'], out: [o] }}\n  \
         second: {{ stage: command, in: {{ i: first.o }}, run: [sh, -c, '{step}'], out: [o] }}\n"
    ));
    let mut run = project.start(&["run", "p.yaml"]);
    project.wait_until("the record begins", || {
        project.pipe(&["status"]).stdout.contains("running second")
    });
    let mut watch = project.start(&["report", "--watch=1"]);
    let report = project.path().join("report.html");
    project.wait_until("there is a page", || report.exists());
    let mut page = browser.open(&report, PHONE, false);
    let state = "document.querySelector('h1 .state').innerText";
    assert_eq!(page.value(state), "no end recorded");
    page.value("document.querySelector('#provenance details').open = true; scrollTo(0, 300)");
    page.wait_for("Page.loadEventFired");
    assert_eq!(page.value("document.querySelector('#provenance details').open"), true);
    // A loaded machine lays the page out a moment after it is loaded.
    for tries in 0.. {
        if page.value("Math.abs(scrollY - 300) < 2") == true {
            break;
        }
        assert!(tries < 200, "it stays where its reader is");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    project.write("gate", "");
    assert!(run.wait().unwrap().success());
    assert!(watch.wait().unwrap().success(), "it ends with the run");
    while page.value(state) != "done" {
        page.wait_for("Page.loadEventFired");
    }
    assert_eq!(page.value("document.body.dataset.refresh ?? 'none'"), "none");
    assert_eq!(page.troubles(), Vec::<String>::new());
    let left: Vec<_> = std::fs::read_dir(project.path())
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".tmp"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
