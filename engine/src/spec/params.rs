//! The pipeline's parameters, filled in where one names another.

use std::collections::HashMap;

use super::scope::Scope;
use super::source::{Problem, Problems};
use super::yaml::{Key, Node, Value};
use crate::interpolate::{Piece, pieces};

#[derive(Clone, Copy, PartialEq)]
enum Mark {
    New,
    Open,
    Done,
}

/// `params` with every `${params.…}` in it filled in, each after those it names.
pub fn fill(params: &Node, problems: &mut Problems) -> Node {
    let entries = params.entries().unwrap_or_default();
    let index: HashMap<&str, usize> =
        entries.iter().enumerate().map(|(i, (key, _))| (key.text.as_str(), i)).collect();
    let mut filled = Filled {
        entries,
        index,
        marks: vec![Mark::New; entries.len()],
        done: params.clone(),
        chain: Vec::new(),
    };
    for (at, (key, node)) in entries.iter().enumerate() {
        if !super::layers::is_name(&key.text) {
            let message = format!("`{}` cannot name a parameter", super::yaml::shorten(&key.text));
            problems.push(Problem::new(key.span, message).hint(super::layers::NAME_RULE));
        }
        if !names(node).is_empty() {
            filled.visit(at, problems);
        }
    }
    filled.done
}

struct Filled<'a> {
    entries: &'a [(Key, Node)],
    index: HashMap<&'a str, usize>,
    marks: Vec<Mark>,
    done: Node,
    chain: Vec<usize>,
}

/// Longest chain of parameters that name one another; each link is a recursion.
const MAX_CHAIN: usize = 200;

impl Filled<'_> {
    fn visit(&mut self, at: usize, problems: &mut Problems) {
        let (key, node) = &self.entries[at];
        let looped = self.marks[at] == Mark::Open || self.chain.len() > MAX_CHAIN;
        if looped {
            let from = self.chain.iter().position(|&i| i == at).unwrap_or(0);
            let mut names: Vec<&str> =
                self.chain[from..].iter().map(|&i| self.entries[i].0.text.as_str()).collect();
            names.push(&key.text);
            names.truncate(12);
            let message =
                format!("parameters name one another in a circle: `{}`", names.join("` → `"));
            problems.push(Problem::new(node.span, message));
            self.put(at, Value::Broken);
            return;
        }
        if self.marks[at] == Mark::Done {
            return;
        }
        self.marks[at] = Mark::Open;
        self.chain.push(at);
        for name in names(node) {
            if let Some(&other) = self.index.get(name.as_str()) {
                self.visit(other, problems);
            }
        }
        self.chain.pop();
        self.marks[at] = Mark::Done;
        let broken = matches!(self.done.get(&key.text), Some(Node { value: Value::Broken, .. }));
        if !broken {
            let scope = Scope { params: Some(&self.done), ..Scope::default() };
            let node = scope.fill(node, problems);
            if let Value::Map(done) = &mut self.done.value {
                done[at].1 = node;
            }
        }
    }

    fn put(&mut self, at: usize, value: Value) {
        if let Value::Map(done) = &mut self.done.value {
            done[at].1.value = value;
        }
    }
}

/// The parameters (first part of their path) that a node names.
fn names(node: &Node) -> Vec<String> {
    match &node.value {
        Value::Scalar { text, .. } => {
            let holes = pieces(text).unwrap_or_default().into_iter();
            let first = |piece: Piece<'_>| match piece {
                Piece::Hole { name, .. } => {
                    let rest = name.strip_prefix("params.")?;
                    Some(rest.split('.').next().unwrap_or(rest).to_string())
                }
                Piece::Text(_) => None,
            };
            holes.filter_map(first).collect()
        }
        Value::Seq(items) => items.iter().flat_map(names).collect(),
        Value::Map(entries) => entries.iter().flat_map(|(_, node)| names(node)).collect(),
        _ => Vec::new(),
    }
}
