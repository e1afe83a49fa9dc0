//! The graph of a plan as SVG, from top to bottom: a node for each step of the file (its matrix
//! instances together), a layer for each rank, lines of one origin sharing their way down.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::data::{Run, State};
use super::markup::{clip, duration};

/// More nodes are not drawn.
const MOST_NODES: usize = 150;
const NODE_HEIGHT: f64 = 40.0;
const RANK_HEIGHT: f64 = 68.0;
const GAP: f64 = 28.0;
const THREAD: f64 = 10.0;

/// What stands in a layer: a node, or the way of a node's line past that layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    Node(usize),
    Thread { from: usize, rank: usize },
}

/// Where everything goes.
struct Layout {
    layers: Vec<Vec<Item>>,
    /// Upper and lower end of every line.
    lines: Vec<(Item, Item)>,
    /// Centre of every item.
    x: BTreeMap<Item, f64>,
    width: f64,
}

/// Draws the graph of `run`.
pub(super) fn dag(run: &Run) -> String {
    let n = run.groups.len();
    if n == 0 {
        return "<p class=none>The plan has no steps.</p>".into();
    }
    if n > MOST_NODES {
        return format!("<p class=none>The graph has {n} nodes, too many to be drawn.</p>");
    }
    let labels: Vec<Label> = (0..n).map(|group| Label::of(run, group)).collect();
    let widths: Vec<f64> = labels.iter().map(Label::width).collect();
    let needs: Vec<Vec<usize>> = run.groups.iter().map(|group| group.needs.clone()).collect();
    let layout = Layout::of(&needs, &widths);
    let height = layout.layers.len() as f64 * RANK_HEIGHT - (RANK_HEIGHT - NODE_HEIGHT) + 4.0;
    let mut out = format!(
        "<div class=scroll><svg class=dag viewBox=\"0 0 {w:.0} {height:.0}\" width={w:.0} height={height:.0} role=img aria-label=\"graph of steps\">",
        w = layout.width
    );
    out.push_str("<defs><marker id=tip viewBox=\"0 0 6 6\" refX=5.5 refY=3 markerWidth=6 markerHeight=6 orient=auto><path d=\"M0 0L6 3L0 6z\"/></marker></defs>");
    for &(upper, lower) in &layout.lines {
        layout.line(&mut out, upper, lower);
    }
    for layer in &layout.layers {
        for &item in layer {
            match item {
                Item::Node(group) => labels[group].draw(&mut out, group, &layout, widths[group]),
                Item::Thread { rank, .. } => {
                    let (x, y) = (layout.x[&item], top(rank));
                    let _ = write!(out, "<path class=edge d=\"M{x:.1} {y:.1}v{NODE_HEIGHT}\"/>");
                }
            }
        }
    }
    out.push_str("</svg></div>");
    out
}

fn top(rank: usize) -> f64 {
    2.0 + rank as f64 * RANK_HEIGHT
}

/// Rank of every node: the longest way from a node that needs nothing. Instances of two groups may
/// need each other crosswise; the lines that would close a circle are left out of the count.
fn ranks(needs: &[Vec<usize>]) -> Vec<usize> {
    let n = needs.len();
    let mut left: Vec<usize> = needs.iter().map(Vec::len).collect();
    let (mut rank, mut done) = (vec![0; n], vec![false; n]);
    for _ in 0..n {
        let free = (0..n).find(|&v| !done[v] && left[v] == 0);
        let Some(v) = free.or_else(|| (0..n).find(|&v| !done[v])) else { break };
        done[v] = true;
        rank[v] = needs[v]
            .iter()
            .filter(|&&u| done[u] && u != v)
            .map(|&u| rank[u] + 1)
            .max()
            .unwrap_or(0);
        for (w, needs) in needs.iter().enumerate() {
            if needs.contains(&v) {
                left[w] = left[w].saturating_sub(1);
            }
        }
    }
    rank
}

impl Layout {
    fn of(needs: &[Vec<usize>], widths: &[f64]) -> Layout {
        let rank = ranks(needs);
        let mut layout = Layout {
            layers: vec![Vec::new(); rank.iter().max().map_or(0, |deepest| deepest + 1)],
            lines: Vec::new(),
            x: BTreeMap::new(),
            width: 0.0,
        };
        for (node, &rank) in rank.iter().enumerate() {
            layout.layers[rank].push(Item::Node(node));
        }
        for (to, needs) in needs.iter().enumerate() {
            for &from in needs {
                layout.connect(from, to, &rank);
            }
        }
        layout.lines.sort_unstable();
        layout.lines.dedup();
        layout.order();
        layout.place(widths);
        layout
    }

    fn connect(&mut self, from: usize, to: usize, rank: &[usize]) {
        let mut upper = Item::Node(from);
        for between in rank[from] + 1..rank[to] {
            let thread = Item::Thread { from, rank: between };
            if !self.layers[between].contains(&thread) {
                self.layers[between].push(thread);
            }
            self.lines.push((upper, thread));
            upper = thread;
        }
        self.lines.push((upper, Item::Node(to)));
    }

    /// Orders each layer by the mean place of its neighbours, down and up a few times.
    fn order(&mut self) {
        for sweep in 0..12 {
            let down = sweep % 2 == 0;
            let places: BTreeMap<Item, f64> = self
                .layers
                .iter()
                .flat_map(|layer| {
                    layer
                        .iter()
                        .enumerate()
                        .map(|(i, &item)| (item, (i as f64 + 0.5) / layer.len() as f64))
                })
                .collect();
            let mut places = places;
            let depth = self.layers.len();
            for i in 0..depth {
                let layer = if down { i } else { depth - 1 - i };
                let mean = |item: Item| {
                    let near = self.lines.iter().filter_map(|&(upper, lower)| match down {
                        true => (lower == item).then_some(upper),
                        false => (upper == item).then_some(lower),
                    });
                    let (sum, n) =
                        near.fold((0.0, 0.0), |(sum, n), near| (sum + places[&near], n + 1.0));
                    if n > 0.0 { sum / n } else { places[&item] }
                };
                let mut keyed: Vec<(f64, Item)> =
                    self.layers[layer].iter().map(|&item| (mean(item), item)).collect();
                keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
                let len = keyed.len() as f64;
                self.layers[layer] = keyed.into_iter().map(|(_, item)| item).collect();
                for (i, &item) in self.layers[layer].iter().enumerate() {
                    places.insert(item, (i as f64 + 0.5) / len);
                }
            }
        }
    }

    /// Moves items towards their neighbours, threads hardest, without changing the order.
    fn place(&mut self, widths: &[f64]) {
        let width = |item: Item| match item {
            Item::Node(node) => widths[node],
            Item::Thread { .. } => THREAD,
        };
        for layer in &self.layers {
            let mut x = 0.0;
            for &item in layer {
                self.x.insert(item, x + width(item) / 2.0);
                x += width(item) + GAP;
            }
        }
        let depth = self.layers.len();
        for round in 0..100 {
            for i in 0..depth {
                let layer = if round % 2 == 0 { i } else { depth - 1 - i };
                let items = &self.layers[layer];
                let wanted: Vec<(f64, f64)> = items.iter().map(|&item| self.wanted(item)).collect();
                let apart: Vec<f64> = items
                    .windows(2)
                    .map(|pair| (width(pair[0]) + width(pair[1])) / 2.0 + GAP)
                    .collect();
                for (&item, x) in items.iter().zip(settle(&wanted, &apart)) {
                    self.x.insert(item, x);
                }
            }
        }
        let left =
            self.x.iter().map(|(&item, x)| x - width(item) / 2.0).fold(f64::INFINITY, f64::min);
        let right = self.x.iter().map(|(&item, x)| x + width(item) / 2.0).fold(0.0, f64::max);
        self.x.values_mut().for_each(|x| *x += 2.0 - left);
        self.width = right - left + 4.0;
    }

    /// The mean place of an item's neighbours, and how much it counts.
    fn wanted(&self, item: Item) -> (f64, f64) {
        let thread = |item: Item| matches!(item, Item::Thread { .. });
        let (mut sum, mut weight) = (0.0, 0.0);
        for &(upper, lower) in &self.lines {
            let near = if upper == item {
                lower
            } else if lower == item {
                upper
            } else {
                continue;
            };
            let w = if thread(item) && thread(near) { 40.0 } else { 1.0 };
            (sum, weight) = (sum + w * self.x[&near], weight + w);
        }
        if weight > 0.0 { (sum / weight, weight) } else { (self.x[&item], 0.1) }
    }

    fn line(&self, out: &mut String, upper: Item, lower: Item) {
        let y = |item: Item| match item {
            Item::Node(_) => {
                self.layers.iter().position(|layer| layer.contains(&item)).unwrap_or(0)
            }
            Item::Thread { rank, .. } => rank,
        };
        let (x0, x1) = (self.x[&upper], self.x[&lower]);
        let (y0, y1) = (top(y(upper)) + NODE_HEIGHT, top(y(lower)));
        let (tip, y1) = match lower {
            Item::Node(_) => (" marker-end=\"url(#tip)\"", y1 - 1.0),
            Item::Thread { .. } => ("", y1),
        };
        let middle = (y0 + y1) / 2.0;
        let _ = write!(
            out,
            "<path class=edge d=\"M{x0:.1} {y0:.1}C{x0:.1} {middle:.1} {x1:.1} {middle:.1} {x1:.1} {y1:.1}\"{tip} />"
        );
    }
}

/// The places nearest to the wanted ones (place, weight) that keep the order and stay `apart`:
/// isotonic regression by pooling neighbours.
fn settle(wanted: &[(f64, f64)], apart: &[f64]) -> Vec<f64> {
    let mut offset = vec![0.0];
    for gap in apart {
        offset.push(offset[offset.len() - 1] + gap);
    }
    let mut pools: Vec<(f64, f64, usize)> = Vec::new();
    for (&(x, weight), offset) in wanted.iter().zip(&offset) {
        pools.push((x - offset, weight, 1));
        while let [.., (x0, w0, n0), (x1, w1, n1)] = pools[..] {
            if x0 <= x1 {
                break;
            }
            pools.truncate(pools.len() - 2);
            pools.push(((x0 * w0 + x1 * w1) / (w0 + w1), w0 + w1, n0 + n1));
        }
    }
    let flat = pools.iter().flat_map(|&(x, _, n)| std::iter::repeat_n(x, n));
    flat.zip(&offset).map(|(x, offset)| x + offset).collect()
}

/// What stands on a node.
struct Label {
    name: String,
    below: String,
    state: State,
    title: String,
}

impl Label {
    fn of(run: &Run, group: usize) -> Label {
        let group = &run.groups[group];
        let steps = || group.steps.iter().map(|&step| &run.steps[step]);
        let state = steps().map(|step| step.state).max().unwrap_or(State::Apart);
        let mut counts: BTreeMap<State, usize> = BTreeMap::new();
        steps().for_each(|step| *counts.entry(step.state).or_default() += 1);
        let mut words: Vec<String> = match counts.len() {
            1 => vec![state.word().into()],
            _ => counts.iter().rev().map(|(state, n)| format!("{n} {}", state.word())).collect(),
        };
        let seconds: Vec<f64> = steps().filter_map(|step| step.seconds).collect();
        if !seconds.is_empty() && state != State::Skipped {
            words.push(duration(seconds.iter().sum()));
        }
        let many = group.steps.len();
        let mut name: String = group.name.chars().take(34).collect();
        if many > 1 {
            name = format!("{name} ×{many}");
        }
        let title = format!("{} (stage {}): {}", group.name, group.stage, words.join(", "));
        Label { name, below: words.join(" · "), state, title }
    }

    fn width(&self) -> f64 {
        let name = self.name.chars().count() as f64 * 7.4;
        let below = self.below.chars().count() as f64 * 6.1;
        (name.max(below) + 26.0).max(84.0)
    }

    fn draw(&self, out: &mut String, group: usize, layout: &Layout, width: f64) {
        let item = Item::Node(group);
        let rank = layout.layers.iter().position(|layer| layer.contains(&item)).unwrap_or(0);
        let (x, y) = (layout.x[&item], top(rank));
        let _ = write!(
            out,
            "<a href=\"#g{group}\"><g class=\"node {}\"><title>{}</title><rect x={:.1} y={y:.1} width={width:.1} height={NODE_HEIGHT} rx=6 />\
             <text class=n x={x:.1} y={:.1}>{}</text><text x={x:.1} y={:.1}>{}</text></g></a>",
            self.state.word(),
            clip(&self.title, 200),
            x - width / 2.0,
            y + 17.0,
            clip(&self.name, 48),
            y + 32.0,
            clip(&self.below, 80)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_longest_ways_and_circles_end() {
        assert_eq!(ranks(&[vec![], vec![0], vec![0, 1], vec![2, 0]]), [0, 1, 2, 3]);
        assert_eq!(ranks(&[vec![1], vec![0]]).len(), 2);
        assert_eq!(ranks(&[]), Vec::<usize>::new());
    }

    #[test]
    fn items_keep_order_and_distance() {
        let settled = settle(&[(5.0, 1.0), (4.0, 1.0), (100.0, 1.0)], &[10.0, 10.0]);
        assert_eq!(settled, [-0.5, 9.5, 100.0]);
    }

    #[test]
    fn nothing_overlaps_in_a_layer() {
        let needs: Vec<Vec<usize>> = (0..40)
            .map(|v: usize| (0..v).filter(|u| (u * 7 + v * 3).is_multiple_of(11)).collect())
            .collect();
        let widths: Vec<f64> = (0..40).map(|v| 80.0 + f64::from(v)).collect();
        let layout = Layout::of(&needs, &widths);
        let width = |item: Item| match item {
            Item::Node(node) => widths[node],
            Item::Thread { .. } => THREAD,
        };
        for pair in layout.layers.iter().flat_map(|layer| layer.windows(2)) {
            let gap =
                layout.x[&pair[1]] - layout.x[&pair[0]] - (width(pair[0]) + width(pair[1])) / 2.0;
            assert!(gap > GAP - 1e-6, "{pair:?}: {gap}");
        }
    }
}
