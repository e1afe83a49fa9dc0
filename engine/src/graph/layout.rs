//! Where everything of a graph goes, from top to bottom: a layer for each rank, lines of one origin
//! sharing their way down. Knows no unit: widths are pixels or characters.

use std::collections::{BTreeMap, BTreeSet};

/// Distances of a drawing, in its own unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spacing {
    /// Between two neighbours of a layer.
    pub gap: f64,
    /// Width of a line that passes a layer.
    pub thread: f64,
}

/// What stands in a layer: a node, or the way of a node's line past that layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Item {
    Node(usize),
    Thread { from: usize, rank: usize },
}

/// Where everything goes.
pub(crate) struct Layout {
    /// Items from left to right, by rank.
    pub layers: Vec<Vec<Item>>,
    /// Upper and lower end of every line.
    pub lines: Vec<(Item, Item)>,
    /// Centre of every item.
    pub x: BTreeMap<Item, f64>,
    /// Of the whole.
    pub width: f64,
}

/// Rank of every node: the longest way from a node that needs nothing. Instances of two groups may
/// need each other crosswise; the lines that would close a circle are left out of the count.
fn ranks(needs: &[Vec<usize>]) -> Vec<usize> {
    let n = needs.len();
    let mut left: Vec<usize> = needs.iter().map(Vec::len).collect();
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); n];
    for (user, needs) in needs.iter().enumerate() {
        needs.iter().for_each(|&need| users[need].push(user));
    }
    let mut open: BTreeSet<usize> = (0..n).collect();
    let mut free: BTreeSet<usize> = (0..n).filter(|&v| left[v] == 0).collect();
    let mut rank = vec![0; n];
    while let Some(v) = free.first().or(open.first()).copied() {
        free.remove(&v);
        open.remove(&v);
        let above = needs[v].iter().filter(|&u| !open.contains(u) && *u != v);
        rank[v] = above.map(|&u| rank[u] + 1).max().unwrap_or(0);
        for &user in users[v].iter().filter(|user| open.contains(*user)) {
            left[user] = left[user].saturating_sub(1);
            if left[user] == 0 {
                free.insert(user);
            }
        }
    }
    rank
}

/// What lies above and below each item.
type Near = BTreeMap<Item, [Vec<Item>; 2]>;

impl Layout {
    /// Lays out nodes that need others, each so wide.
    pub fn of(needs: &[Vec<usize>], widths: &[f64], spacing: Spacing) -> Layout {
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
        let mut threads = BTreeSet::new();
        for (to, needs) in needs.iter().enumerate() {
            for &from in needs {
                layout.connect(from, to, &rank, &mut threads);
            }
        }
        layout.lines.sort_unstable();
        layout.lines.dedup();
        let mut near = Near::new();
        for &(upper, lower) in &layout.lines {
            near.entry(upper).or_default()[1].push(lower);
            near.entry(lower).or_default()[0].push(upper);
        }
        layout.order(&near);
        layout.place(&near, widths, spacing);
        layout
    }

    fn connect(&mut self, from: usize, to: usize, rank: &[usize], threads: &mut BTreeSet<Item>) {
        let mut upper = Item::Node(from);
        for between in rank[from] + 1..rank[to] {
            let thread = Item::Thread { from, rank: between };
            if threads.insert(thread) {
                self.layers[between].push(thread);
            }
            self.lines.push((upper, thread));
            upper = thread;
        }
        self.lines.push((upper, Item::Node(to)));
    }

    /// Orders each layer by the mean place of its neighbours, down and up a few times.
    fn order(&mut self, near: &Near) {
        let mut places: BTreeMap<Item, f64> = BTreeMap::new();
        let settle = |layer: &[Item], places: &mut BTreeMap<Item, f64>| {
            let len = layer.len() as f64;
            places
                .extend(layer.iter().enumerate().map(|(i, &item)| (item, (i as f64 + 0.5) / len)));
        };
        self.layers.iter().for_each(|layer| settle(layer, &mut places));
        let depth = self.layers.len();
        for sweep in 0..12 {
            let down = sweep % 2 == 0;
            for i in 0..depth {
                let layer = if down { i } else { depth - 1 - i };
                let mean = |item: Item| {
                    let near = near.get(&item).map_or(&[][..], |near| &near[usize::from(!down)]);
                    let sum: f64 = near.iter().map(|near| places[near]).sum();
                    if near.is_empty() { places[&item] } else { sum / near.len() as f64 }
                };
                let mut keyed: Vec<(f64, Item)> =
                    self.layers[layer].iter().map(|&item| (mean(item), item)).collect();
                keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
                self.layers[layer] = keyed.into_iter().map(|(_, item)| item).collect();
                settle(&self.layers[layer], &mut places);
            }
        }
    }

    /// Moves items towards their neighbours, threads hardest, without changing the order.
    fn place(&mut self, near: &Near, widths: &[f64], spacing: Spacing) {
        let width = |item: Item| match item {
            Item::Node(node) => widths[node],
            Item::Thread { .. } => spacing.thread,
        };
        for layer in &self.layers {
            let mut x = 0.0;
            for &item in layer {
                self.x.insert(item, x + width(item) / 2.0);
                x += width(item) + spacing.gap;
            }
        }
        let depth = self.layers.len();
        for round in 0..100 {
            for i in 0..depth {
                let layer = if round % 2 == 0 { i } else { depth - 1 - i };
                let items = &self.layers[layer];
                let wanted: Vec<(f64, f64)> =
                    items.iter().map(|&item| self.wanted(item, near)).collect();
                let apart: Vec<f64> = items
                    .windows(2)
                    .map(|pair| (width(pair[0]) + width(pair[1])) / 2.0 + spacing.gap)
                    .collect();
                for (&item, x) in items.iter().zip(settle(&wanted, &apart)) {
                    self.x.insert(item, x);
                }
            }
        }
        let ends = |side: f64| self.x.iter().map(move |(&item, x)| x + side * width(item) / 2.0);
        let left = ends(-1.0).fold(f64::INFINITY, f64::min);
        let right = ends(1.0).fold(0.0, f64::max);
        self.x.values_mut().for_each(|x| *x += 2.0 - left);
        self.width = right - left + 4.0;
    }

    /// The mean place of an item's neighbours, and how much it counts.
    fn wanted(&self, item: Item, near: &Near) -> (f64, f64) {
        let thread = |item: Item| matches!(item, Item::Thread { .. });
        let (mut sum, mut weight) = (0.0, 0.0);
        for near in near.get(&item).into_iter().flatten().flatten() {
            let w = if thread(item) && thread(*near) { 40.0 } else { 1.0 };
            (sum, weight) = (sum + w * self.x[near], weight + w);
        }
        if weight > 0.0 { (sum / weight, weight) } else { (self.x[&item], 0.1) }
    }

    /// The rank of every item.
    pub fn ranks(&self) -> BTreeMap<Item, usize> {
        let ranked = self.layers.iter().enumerate();
        ranked.flat_map(|(rank, layer)| layer.iter().map(move |&item| (item, rank))).collect()
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
        let spacing = Spacing { gap: 28.0, thread: 10.0 };
        let layout = Layout::of(&needs, &widths, spacing);
        let width = |item: Item| match item {
            Item::Node(node) => widths[node],
            Item::Thread { .. } => spacing.thread,
        };
        for pair in layout.layers.iter().flat_map(|layer| layer.windows(2)) {
            let gap =
                layout.x[&pair[1]] - layout.x[&pair[0]] - (width(pair[0]) + width(pair[1])) / 2.0;
            assert!(gap > spacing.gap - 1e-6, "{pair:?}: {gap}");
        }
    }
}
