//! The order of steps: each after all it needs, declared order among ties; or the cycles.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};

use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, NodeIndex};

/// Positions in order; or cycles, in each of which every member needs the next and the last the
/// first, one for every knot of the graph.
pub fn order(count: usize, edges: &[(usize, usize)]) -> Result<Vec<usize>, Vec<Vec<usize>>> {
    let mut graph: DiGraph<(), (), u32> = DiGraph::with_capacity(count, edges.len());
    for _ in 0..count {
        graph.add_node(());
    }
    for &(from, to) in edges {
        graph.add_edge(NodeIndex::new(from), NodeIndex::new(to), ());
    }
    let mut missing: Vec<usize> = vec![0; count];
    edges.iter().for_each(|&(_, to)| missing[to] += 1);
    let mut ready: BinaryHeap<Reverse<usize>> =
        (0..count).filter(|&i| missing[i] == 0).map(Reverse).collect();
    let mut ordered = Vec::with_capacity(count);
    while let Some(Reverse(next)) = ready.pop() {
        ordered.push(next);
        for after in graph.neighbors(NodeIndex::new(next)) {
            missing[after.index()] -= 1;
            if missing[after.index()] == 0 {
                ready.push(Reverse(after.index()));
            }
        }
    }
    if ordered.len() == count { Ok(ordered) } else { Err(cycles(&graph)) }
}

fn cycles(graph: &DiGraph<(), (), u32>) -> Vec<Vec<usize>> {
    let knots = kosaraju_scc(graph)
        .into_iter()
        .filter(|knot| knot.len() > 1 || knot.first().is_some_and(|&n| graph.contains_edge(n, n)));
    let mut cycles: Vec<Vec<usize>> = knots.map(|knot| cycle(graph, &knot)).collect();
    cycles.sort_by_key(|cycle| cycle.iter().min().copied());
    cycles
}

/// A shortest walk through a knot, from its earliest member.
fn cycle(graph: &DiGraph<(), (), u32>, knot: &[NodeIndex<u32>]) -> Vec<usize> {
    let members: HashSet<NodeIndex<u32>> = knot.iter().copied().collect();
    let Some(start) = knot.iter().copied().min() else { return Vec::new() };
    // Breadth first from `start` back to `start`.
    let mut from: HashMap<NodeIndex<u32>, NodeIndex<u32>> = HashMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(node) = queue.pop_front() {
        for next in graph.neighbors(node).filter(|next| members.contains(next)) {
            if next == start {
                let mut walk = vec![node.index()];
                let mut at = node;
                while at != start {
                    at = from[&at];
                    walk.push(at.index());
                }
                return walk; // from what comes last to what comes first: each needs the next
            }
            if let Entry::Vacant(slot) = from.entry(next) {
                slot.insert(node);
                queue.push_back(next);
            }
        }
    }
    Vec::new()
}
