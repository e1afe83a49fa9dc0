//! A graph as SVG. Everything that is shown is escaped.

use std::fmt::Write;

use super::layout::{Item, Layout, Spacing};
use super::{Graph, State};
use crate::report::markup::clip;

const NODE_HEIGHT: f64 = 40.0;
const RANK_HEIGHT: f64 = 68.0;
const SPACING: Spacing = Spacing { gap: 28.0, thread: 10.0 };
/// Colours of a drawing that stands alone, light and dark.
const STYLE: &str = include_str!("style.css");

/// What stands on a node.
pub(crate) struct Label {
    pub name: String,
    pub below: String,
    /// Class of the node, for its colours.
    pub class: &'static str,
    pub title: String,
    /// Where a click leads.
    pub link: Option<String>,
}

impl Graph {
    /// The graph as a file of its own.
    pub fn svg(&self) -> String {
        let label = |node: &super::Node| Label {
            name: node.name.clone(),
            below: if node.states.is_empty() { node.stage.clone() } else { node.states.clone() },
            class: node.state.map_or("plain", State::word),
            title: format!("{} (stage {})", node.name, node.stage),
            link: None,
        };
        let labels: Vec<Label> = self.nodes.iter().map(label).collect();
        let needs: Vec<Vec<usize>> = self.nodes.iter().map(|node| node.needs.clone()).collect();
        draw(&labels, &needs, STYLE) + "\n"
    }
}

/// Draws nodes that need others; with a `style` of its own it can stand alone.
pub(crate) fn draw(labels: &[Label], needs: &[Vec<usize>], style: &str) -> String {
    let widths: Vec<f64> = labels.iter().map(Label::width).collect();
    let layout = Layout::of(needs, &widths, SPACING);
    let ranks = layout.ranks();
    let height = layout.layers.len() as f64 * RANK_HEIGHT - (RANK_HEIGHT - NODE_HEIGHT) + 4.0;
    // A page knows what an `svg` is; a file of its own has to say it.
    let space = if style.is_empty() { "" } else { " xmlns=\"http://www.w3.org/2000/svg\"" };
    let mut out = format!(
        "<svg{space} class=\"dag\" viewBox=\"0 0 {w:.0} {height:.0}\" width=\"{w:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"graph of steps\">",
        w = layout.width
    );
    if !style.is_empty() {
        let _ = write!(out, "<style>{style}</style>");
    }
    out.push_str("<defs><marker id=\"tip\" viewBox=\"0 0 6 6\" refX=\"5.5\" refY=\"3\" markerWidth=\"6\" markerHeight=\"6\" orient=\"auto\"><path d=\"M0 0L6 3L0 6z\"/></marker></defs>");
    for &(upper, lower) in &layout.lines {
        let ends = (layout.x[&upper], top(ranks[&upper]) + NODE_HEIGHT, layout.x[&lower]);
        line(&mut out, ends, top(ranks[&lower]), matches!(lower, Item::Node(_)));
    }
    for (&item, &rank) in &ranks {
        let (x, y) = (layout.x[&item], top(rank));
        match item {
            Item::Node(node) => labels[node].draw(&mut out, x, y, widths[node]),
            Item::Thread { .. } => {
                let _ = write!(out, "<path class=\"edge\" d=\"M{x:.1} {y:.1}v{NODE_HEIGHT}\"/>");
            }
        }
    }
    out.push_str("</svg>");
    out
}

fn top(rank: usize) -> f64 {
    2.0 + rank as f64 * RANK_HEIGHT
}

/// A line from `(x0, y0)` down to `(x1, y1)`, with a tip where a node is.
fn line(out: &mut String, (x0, y0, x1): (f64, f64, f64), y1: f64, node: bool) {
    let (tip, y1) = match node {
        true => (" marker-end=\"url(#tip)\"", y1 - 1.0),
        false => ("", y1),
    };
    let middle = (y0 + y1) / 2.0;
    let _ = write!(
        out,
        "<path class=\"edge\" d=\"M{x0:.1} {y0:.1}C{x0:.1} {middle:.1} {x1:.1} {middle:.1} {x1:.1} {y1:.1}\"{tip}/>"
    );
}

impl Label {
    fn width(&self) -> f64 {
        let name = self.name.chars().count() as f64 * 7.4;
        let below = self.below.chars().count() as f64 * 6.1;
        (name.max(below) + 26.0).max(84.0)
    }

    fn draw(&self, out: &mut String, x: f64, y: f64, width: f64) {
        if let Some(link) = &self.link {
            let _ = write!(out, "<a href=\"{}\">", clip(link, 200));
        }
        let _ = write!(
            out,
            "<g class=\"node {}\"><title>{}</title><rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{NODE_HEIGHT}\" rx=\"6\"/>\
             <text class=\"n\" x=\"{x:.1}\" y=\"{:.1}\">{}</text><text x=\"{x:.1}\" y=\"{:.1}\">{}</text></g>",
            self.class,
            clip(&self.title, 200),
            x - width / 2.0,
            y + 17.0,
            clip(&self.name, 48),
            y + 32.0,
            clip(&self.below, 80)
        );
        if self.link.is_some() {
            out.push_str("</a>");
        }
    }
}
