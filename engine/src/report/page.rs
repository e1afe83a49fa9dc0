//! The page: its sections in order, its bound in size, style and script inlined.

use super::data::{Run, Step};
use super::headline::{evaluations, failures, headline};
use super::markup::clip;
use super::metrics::Evaluation;
use super::{costs, dag, evaluations as tables, figures, gantt, matrices, steps};

/// The page is smaller than 2 MB, whatever the record.
const MOST_BYTES: usize = 1_900_000;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = concat!(include_str!("chart.js"), include_str!("page.js"));
/// Nothing is loaded from anywhere, and the file says so to the browser.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

struct Section {
    id: &'static str,
    title: &'static str,
    body: String,
}

/// The whole file; with `refresh` it loads itself anew every so many seconds.
pub(super) fn page(run: &Run, refresh: Option<u32>) -> String {
    let found = evaluations(run);
    let section = |id, title, body| Section { id, title, body };
    let mut sections = vec![
        section("result", "Teacher and student", result(&found)),
        section("curves", "Training", figures::curves(run)),
        section("layers", "Layer by layer", figures::layers(run, &found)),
        section("matrices", "Attention and mixing matrices", matrices::pictures(&found)),
        section("graph", "Graph", dag::dag(run)),
        section("times", "Time", gantt::gantt(run)),
        section("costs", "Costs", costs::table(run)),
        section("steps", "Steps", steps::table(run)),
        section("notes", "Notes", steps::notes(run)),
        section("provenance", "Provenance", steps::provenance(run) + &steps::sources(run)),
    ];
    sections.retain(|section| !section.body.is_empty());
    let top = headline(run) + &failures(run);
    fit(&mut sections, MOST_BYTES.saturating_sub(top.len() + STYLE.len() + SCRIPT.len() + 4096));
    let mut out = format!(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy content=\"{POLICY}\">\
         <meta name=viewport content=\"width=device-width,initial-scale=1\"><meta name=color-scheme content=\"light dark\">\
         <title>{} · {}</title><style>{STYLE}</style></head><body{}><main>{top}<nav>",
        clip(&run.past.info.pipeline, 120),
        clip(&run.past.info.id, 60),
        refresh.map(|seconds| format!(" data-refresh={seconds}")).unwrap_or_default()
    );
    for Section { id, title, .. } in &sections {
        out += &format!("<a href=\"#{id}\">{title}</a>");
    }
    out.push_str("</nav>");
    for Section { id, title, body } in &sections {
        out += &format!("<section id={id}><h2>{title}</h2>{body}</section>");
    }
    out += &format!(
        "</main><div id=tip-box role=status></div><script>{SCRIPT}</script></body></html>\n"
    );
    out
}

/// The tables; accuracies by task and recall over distance beside a single one or below many.
fn result(found: &[(&Step, &Evaluation)]) -> String {
    let recall = figures::recall(found);
    let (drawn, tables) = match found {
        [(_, one)] => (tables::tasks(one) + &recall, tables::tables(found)),
        _ => (recall, tables::tables(found)),
    };
    match (found.len(), drawn.is_empty()) {
        (_, true) => tables,
        (1, false) => {
            format!("<div class=pair><div>{tables}</div><div class=stack>{drawn}</div></div>")
        }
        (_, false) => format!("{tables}<div class=\"grid below\">{drawn}</div>"),
    }
}

/// Empties the biggest sections until all are within `most` bytes.
fn fit(sections: &mut [Section], most: usize) {
    while sections.iter().map(|section| section.body.len()).sum::<usize>() > most {
        let Some(biggest) = sections.iter_mut().max_by_key(|section| section.body.len()) else {
            return;
        };
        biggest.body = "<p class=none>Left out: the page would be too big.</p>".into();
    }
}
