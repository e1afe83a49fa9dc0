//! Every command block of README.md and of `docs/` is run, in the order of its page, and what the pages
//! quote of output is compared; see `page.rs` for what the pages can say to this test.
//!
//! Budgets are cut by `small` (in `play.rs`) where a page would train for minutes: the commands are the
//! page's, the pipelines are copies with two updates a phase.

mod expect;
mod page;
mod play;

use std::fs;
use std::path::Path;

use page::Part;

/// Blocks that are skipped, by page: a network, a GPU, a model or a build is needed. One more has to be
/// counted here.
const SKIPPED: &[(&str, usize)] =
    &[("README.md", 6), ("docs/own-model.md", 2), ("docs/results.md", 1), ("docs/tutorial.md", 1)];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README.md, and every page right below `docs/`.
fn pages() -> Vec<String> {
    let items = fs::read_dir(root().join("docs")).unwrap().flatten();
    let names = items.map(|item| format!("docs/{}", item.file_name().to_string_lossy()));
    let mut pages: Vec<String> = names.filter(|name| name.ends_with(".md")).collect();
    pages.push("README.md".into());
    pages.sort();
    pages
}

fn parts(page: &str) -> Vec<Part> {
    let text = fs::read_to_string(root().join(page)).unwrap();
    page::parse(&text).unwrap_or_else(|error| panic!("{page}: {error}"))
}

/// Follows a page from its first block to its last.
fn follow(page: &str) {
    let mut reader = play::Reader::new();
    for part in parts(page) {
        if let Err(told) = reader.read(&part) {
            panic!("{page}: {told}");
        }
    }
}

macro_rules! followed {
    ($($name:ident: $page:literal,)*) => {
        const FOLLOWED: &[&str] = &[$($page),*];
        $(#[test]
        fn $name() {
            follow($page);
        })*
    };
}

followed! {
    the_readme_does_what_it_says: "README.md",
    the_tutorial_does_what_it_says: "docs/tutorial.md",
    caching_does_what_its_page_says: "docs/caching.md",
    an_own_model_does_what_its_page_says: "docs/own-model.md",
    a_stage_does_what_its_page_says: "docs/writing-a-stage.md",
    a_cluster_does_what_its_page_says: "docs/cluster.md",
    slurm_takes_what_its_page_says: "docs/slurm.md",
    an_engine_has_no_commands: "docs/adding-an-engine.md",
    results_say_how_they_were_made: "docs/results.md",
    comparisons_have_no_commands: "docs/comparison.md",
    the_index_has_no_commands: "docs/README.md",
}

#[test]
fn every_page_is_followed() {
    let mut followed = FOLLOWED.to_vec();
    followed.sort();
    assert_eq!(followed, pages());
}

#[test]
fn what_is_skipped_is_counted() {
    let mut skipped = Vec::new();
    for page in pages() {
        let count = parts(&page).iter().filter(|part| matches!(part, Part::Skip { .. })).count();
        if count > 0 {
            skipped.push((page, count));
        }
    }
    let expected: Vec<_> = SKIPPED.iter().map(|(page, n)| (page.to_string(), *n)).collect();
    assert_eq!(skipped, expected);
}

/// YAML that a reader would copy is a file of the page, so that something checks it.
#[test]
fn pipelines_on_pages_are_files() {
    for page in pages() {
        for part in parts(&page) {
            if let Part::Other { line, language } = part {
                assert_ne!(language, "yaml", "{page}:{line}");
            }
        }
    }
}

#[test]
fn links_lead_somewhere() {
    for page in pages() {
        let text = fs::read_to_string(root().join(&page)).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            let file = root().join(&page).parent().unwrap().join(path);
            assert!(file.exists(), "{page}: {link}");
        }
    }
}
