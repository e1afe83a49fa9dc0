//! A graph in characters: names on the rows of their ranks, lines between. Colours are for who
//! prints it; marks say the same without them.

use std::collections::BTreeMap;

use super::channel::{self, Net};
use super::layout::{Item, Layout, Spacing};
use super::{Graph, Node, State};

/// Longer names are cut in their middle.
const MOST_NAME: usize = 40;

/// A piece of a row, with the state that colours it.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Plain text.
    pub text: String,
    /// Of the node; lines have none.
    pub state: Option<State>,
    /// Whether it is a name.
    pub name: bool,
}

/// Rows of pieces.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawing {
    /// From top to bottom.
    pub rows: Vec<Vec<Piece>>,
    /// Characters of the longest row.
    pub width: usize,
}

/// Where an item stands in its row.
#[derive(Clone, Copy)]
struct Place {
    left: usize,
    width: usize,
}

impl Place {
    fn centre(self) -> usize {
        self.left + self.width / 2
    }
}

impl State {
    /// One character for it.
    pub fn mark(self) -> char {
        match self {
            State::Cached => '✓',
            State::Maybe => '?',
            State::Runs => '▸',
            State::Broken => '!',
            State::Failed => '✗',
        }
    }
}

impl Graph {
    /// Draws it from top to bottom.
    pub fn drawing(&self) -> Drawing {
        let labels: Vec<String> = self.nodes.iter().map(label).collect();
        let needs: Vec<Vec<usize>> = self.nodes.iter().map(|node| node.needs.clone()).collect();
        // Every line arrives in a column of its own.
        let wide = |(label, needs): (&String, &Vec<usize>)| {
            label.chars().count().max(2 * needs.len().saturating_sub(1) + 1) as f64
        };
        let widths: Vec<f64> = labels.iter().zip(&needs).map(wide).collect();
        let layout = Layout::of(&needs, &widths, Spacing { gap: 3.0, thread: 1.0 });
        let places = places(&layout, &widths);
        let width = places.values().map(|place| place.left + place.width).max().unwrap_or(0);
        let mut rows = Vec::new();
        for (rank, layer) in layout.layers.iter().enumerate() {
            rows.push(self.row(layer, &labels, &places));
            let nets = nets(&layout, layer, layout.layers.get(rank + 1), &places);
            if !nets.is_empty() {
                let lines = channel::route(&nets, width);
                rows.extend(lines.into_iter().map(|row| vec![Piece::line(row)]));
            }
        }
        Drawing { rows, width }
    }

    /// A row for each node, in the order of the plan, for graphs too wide to be drawn.
    pub fn list(&self) -> Drawing {
        let labels: Vec<String> = self.nodes.iter().map(label).collect();
        let name = labels.iter().map(|l| l.chars().count()).max().unwrap_or(0);
        let stage = self.nodes.iter().map(|n| n.stage.chars().count()).max().unwrap_or(0);
        let states = self.nodes.iter().map(|n| n.states.chars().count()).max().unwrap_or(0);
        let row = |(node, label): (&Node, &String)| {
            let mut rest = format!("  {:<stage$}", node.stage);
            if states > 0 {
                rest += &format!("  {:<states$}", node.states);
            }
            let needs: Vec<&str> =
                node.needs.iter().take(3).map(|&need| self.nodes[need].name.as_str()).collect();
            if !needs.is_empty() {
                let more = if node.needs.len() > needs.len() { ", …" } else { "" };
                rest += &format!("  ← {}{more}", needs.join(", "));
            }
            let pad = " ".repeat(name - label.chars().count());
            let text = pad + rest.trim_end();
            vec![
                Piece { text: label.clone(), state: node.state, name: true },
                Piece { text, state: None, name: false },
            ]
        };
        let rows: Vec<Vec<Piece>> = self.nodes.iter().zip(&labels).map(row).collect();
        let long = |row: &Vec<Piece>| row.iter().map(|piece| piece.text.chars().count()).sum();
        Drawing { width: rows.iter().map(long).max().unwrap_or(0), rows }
    }

    /// The names of a rank, and the lines that pass it.
    fn row(&self, layer: &[Item], labels: &[String], places: &BTreeMap<Item, Place>) -> Vec<Piece> {
        let mut row = Vec::new();
        let mut at = 0;
        for item in layer {
            let place = places[item];
            let piece = match *item {
                Item::Thread { .. } => Piece::line(vec!['│']),
                Item::Node(node) => {
                    let text = labels[node].clone();
                    Piece { text, state: self.nodes[node].state, name: true }
                }
            };
            let long = piece.text.chars().count();
            let left = place.left + (place.width - long) / 2;
            row.push(Piece::line(vec![' '; left - at]));
            at = left + long;
            row.push(piece);
        }
        row
    }
}

impl Piece {
    fn line(letters: Vec<char>) -> Piece {
        Piece { text: letters.into_iter().collect(), state: None, name: false }
    }
}

fn label(node: &Node) -> String {
    let plain: Vec<char> = node.name.chars().filter(|c| !c.is_control()).collect();
    let name: String = match plain.len() {
        0..=MOST_NAME => plain.iter().collect(),
        n => plain[..19].iter().chain(&['…']).chain(&plain[n - 20..]).collect(),
    };
    node.state.map_or(name.clone(), |state| format!("{} {name}", state.mark()))
}

/// Whole columns for the places of a layout. A line that passes a rank stays under where it comes
/// from if nothing is in its way.
fn places(layout: &Layout, widths: &[f64]) -> BTreeMap<Item, Place> {
    let left = layout.layers.iter().flatten().map(|item| start(layout, widths, item));
    let least = left.fold(f64::INFINITY, f64::min);
    let mut places: BTreeMap<Item, Place> = BTreeMap::new();
    for layer in &layout.layers {
        let rough = |item: &Item| Place {
            left: (start(layout, widths, item) - least).round().max(0.0) as usize,
            width: wide(widths, item) as usize,
        };
        let all: Vec<Place> = layer.iter().map(rough).collect();
        let mut free_from = 0;
        for (i, item) in layer.iter().enumerate() {
            let mut place = all[i];
            place.left = place.left.max(free_from);
            let above = layout.lines.iter().find(|line| line.1 == *item).map(|line| line.0);
            if let (Item::Thread { .. }, Some(above)) = (item, above.and_then(|a| places.get(&a))) {
                let next = all.get(i + 1).map_or(usize::MAX, |next| next.left);
                let wanted = above.centre();
                let near = wanted.abs_diff(place.left) <= 2;
                if near && wanted >= free_from && wanted.saturating_add(2) <= next {
                    place.left = wanted;
                }
            }
            free_from = place.left + place.width + 1;
            places.insert(*item, place);
        }
    }
    places
}

fn wide(widths: &[f64], item: &Item) -> f64 {
    match item {
        Item::Node(node) => widths[*node],
        Item::Thread { .. } => 1.0,
    }
}

fn start(layout: &Layout, widths: &[f64], item: &Item) -> f64 {
    layout.x[item] - wide(widths, item) / 2.0
}

/// The lines from one rank to the next, with a column for each end.
fn nets(
    layout: &Layout,
    upper: &[Item],
    lower: Option<&Vec<Item>>,
    places: &BTreeMap<Item, Place>,
) -> Vec<Net> {
    let mut nets: Vec<(Item, Net)> = upper
        .iter()
        .map(|item| (*item, Net { exit: places[item].centre(), entries: Vec::new() }))
        .collect();
    for item in lower.into_iter().flatten() {
        let coming = |from: &Item| layout.lines.binary_search(&(*from, *item)).is_ok();
        let from: Vec<usize> = (0..nets.len()).filter(|&net| coming(&nets[net].0)).collect();
        let exits: Vec<usize> = nets.iter().map(|(_, net)| net.exit).collect();
        for (net, column) in from.iter().zip(columns(places[item], &from, &exits)) {
            nets[*net].1.entries.push(column);
        }
    }
    nets.into_iter().map(|(_, net)| net).filter(|net| !net.entries.is_empty()).collect()
}

/// Columns of `place` for lines of the nets `from`, from left to right as they come: straight below
/// if that is possible, and not below where another leaves, which could be taken for it.
fn columns(place: Place, from: &[usize], exits: &[usize]) -> Vec<usize> {
    let n = from.len();
    let mut taken: Vec<usize> = Vec::new();
    for (i, &net) in from.iter().enumerate() {
        let least = taken.last().map_or(place.left, |last| last + 1);
        let most = place.left + place.width - (n - i);
        let (least, most) = (least.min(most), most);
        let evenly = place.centre() as isize + 2 * i as isize - (n as isize - 1);
        let wanted = match (place.left..place.left + place.width).contains(&exits[net]) {
            true => exits[net],
            false => evenly.max(0) as usize,
        };
        let foreign = |x: usize| exits.iter().enumerate().any(|(at, exit)| at != net && *exit == x);
        let best = (least..=most).min_by_key(|&x| (foreign(x), x.abs_diff(wanted)));
        taken.push(best.unwrap_or(wanted));
    }
    taken
}
