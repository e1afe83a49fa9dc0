//! The graph of a plan, drawn: [`layout`] says where everything goes, [`svg`] and [`terminal`] draw
//! it, [`text`] writes it for other tools. Knows no run, no cache and no terminal.

mod channel;
pub(crate) mod layout;
pub(crate) mod svg;
mod terminal;
mod text;

use std::collections::{BTreeMap, HashMap};

use crate::lookup;
use crate::plan;

pub use terminal::{Drawing, Piece};

/// Instances of one step of the file, or one step.
pub struct Group<'a> {
    /// Its name.
    pub name: &'a str,
    /// The stage's name.
    pub stage: &'a str,
    /// Positions in the plan.
    pub steps: Vec<usize>,
    /// Positions of the groups that it needs, among the groups.
    pub needs: Vec<usize>,
}

/// Steps by their name in the file, in order of first appearance.
pub fn groups(steps: &[plan::Step]) -> Vec<Group<'_>> {
    collect(steps, |step| &step.group)
}

/// Every step by itself.
pub fn singles(steps: &[plan::Step]) -> Vec<Group<'_>> {
    collect(steps, |step| &step.name)
}

fn collect(steps: &[plan::Step], name: impl Fn(&plan::Step) -> &str) -> Vec<Group<'_>> {
    let mut groups: Vec<Group> = Vec::new();
    let mut by_name: HashMap<&str, usize> = HashMap::new();
    let mut group_of = Vec::with_capacity(steps.len());
    for (at, step) in steps.iter().enumerate() {
        let group = *by_name.entry(name(step)).or_insert_with(|| {
            let (name, stage) = (name(step), step.stage.as_str());
            groups.push(Group { name, stage, steps: Vec::new(), needs: Vec::new() });
            groups.len() - 1
        });
        groups[group].steps.push(at);
        group_of.push(group);
    }
    for (at, step) in steps.iter().enumerate() {
        let to = group_of[at];
        for need in lookup::needs(step) {
            let Some(&from) = group_of.get(need) else { continue };
            if from != to && !groups[to].needs.contains(&from) {
                groups[to].needs.push(from);
            }
        }
    }
    groups
}

/// What would become of a step in a run now; in order of how much it matters for a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Its result is there.
    Cached,
    /// Something upstream runs first; the same bytes from there cut it off.
    Maybe,
    /// It runs.
    Runs,
    /// It cannot run.
    Broken,
    /// It failed in the newest run, and its result is not there.
    Failed,
}

impl State {
    /// For people; also the class in a drawing.
    pub fn word(self) -> &'static str {
        match self {
            State::Cached => "cached",
            State::Maybe => "maybe",
            State::Runs => "runs",
            State::Broken => "broken",
            State::Failed => "failed",
        }
    }
}

/// A node as it is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// `align ×24`, or `align[2]`.
    pub name: String,
    /// The stage's name.
    pub stage: String,
    /// The state that matters most, if states are known.
    pub state: Option<State>,
    /// `2 runs, 22 cached`, if states are known.
    pub states: String,
    /// Positions of the nodes that it needs.
    pub needs: Vec<usize>,
}

/// A graph to be drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// Name of the pipeline.
    pub name: String,
    /// In the order of the plan.
    pub nodes: Vec<Node>,
}

impl Graph {
    /// The graph of `plan`: a node for each step of the file, or for each instance of it.
    pub fn of(plan: &plan::Plan, expand: bool, states: Option<&HashMap<usize, State>>) -> Graph {
        let groups = if expand { singles(&plan.steps) } else { groups(&plan.steps) };
        let nodes = groups.into_iter().map(|group| Node::of(group, states)).collect();
        Graph { name: plan.name.clone(), nodes }
    }
}

impl Node {
    fn of(group: Group<'_>, states: Option<&HashMap<usize, State>>) -> Node {
        let mut counts: BTreeMap<State, usize> = BTreeMap::new();
        for state in group.steps.iter().filter_map(|step| states?.get(step)) {
            *counts.entry(*state).or_default() += 1;
        }
        let words: Vec<String> = match counts.len() {
            1 => counts.keys().map(|state| state.word().into()).collect(),
            _ => counts.iter().rev().map(|(state, n)| format!("{n} {}", state.word())).collect(),
        };
        Node {
            name: match group.steps.len() {
                1 => group.name.into(),
                many => format!("{} ×{many}", group.name),
            },
            stage: group.stage.into(),
            state: counts.keys().next_back().copied(),
            states: words.join(", "),
            needs: group.needs,
        }
    }
}

#[cfg(test)]
mod tests;
