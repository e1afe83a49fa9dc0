//! The report of a run: its record, and the metrics it names, as one HTML file that needs nothing
//! else. Works for any record, also of a run that failed, was killed, or still goes on.
//!
//! [`data`] and [`metrics`] read; [`chart`], [`bars`], [`whiskers`], [`matrices`], [`dag`] and [`gantt`]
//! draw; [`headline`], [`evaluations`], [`figures`], [`costs`] and [`steps`] are the page's sections,
//! [`page`] the page. No clock, no network, and nothing in here decides anything.

mod bars;
mod benchmarks;
mod chart;
mod costs;
mod dag;
mod data;
mod evaluations;
mod figures;
mod gantt;
mod headline;
pub(crate) mod markup;
mod matrices;
pub(crate) mod metrics;
mod page;
mod scale;
mod steps;
#[cfg(test)]
mod tests;
mod whiskers;

/// The run `past` as one self-contained HTML file of less than 2 MB. Metrics artifacts are read
/// from `cache`; where their bytes are gone, the page says so.
pub fn html(past: &crate::run::Past, cache: &cache::Cache) -> String {
    page::page(&data::Run::of(past, cache), None)
}

/// The same of a run that goes on: the page loads itself anew every `seconds`, and stays where its
/// reader is. Somebody has to write it anew as often, and at last [`html`].
pub fn html_live(past: &crate::run::Past, cache: &cache::Cache, seconds: u32) -> String {
    page::page(&data::Run::of(past, cache), Some(seconds))
}
