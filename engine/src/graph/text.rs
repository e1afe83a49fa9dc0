//! A graph as text for other tools: DOT and Mermaid. Names are quoted so that none can end its own
//! quotes.

use std::fmt::Write;

use super::{Graph, Node, State};

impl Graph {
    /// Graphviz.
    pub fn dot(&self) -> String {
        let mut out = format!("digraph {} {{\n", quoted(&self.name));
        out += "  node [shape=box, style=\"rounded,filled\", fontname=\"sans-serif\", fillcolor=\"#f2f2f3\"];\n";
        for (at, node) in self.nodes.iter().enumerate() {
            let fill = node.state.map_or(String::new(), |state| {
                format!(", fillcolor=\"{}\", color=\"{}\"", colours(state).0, colours(state).1)
            });
            let label = format!("{}\n{}", node.name, below(node));
            let _ = writeln!(out, "  n{at} [label={}{fill}];", quoted(&label));
        }
        for (from, to) in self.lines() {
            let _ = writeln!(out, "  n{from} -> n{to};");
        }
        out + "}\n"
    }

    /// Mermaid, as Markdown of many sites shows it.
    pub fn mermaid(&self) -> String {
        let mut out = String::from("flowchart TD\n");
        for (at, node) in self.nodes.iter().enumerate() {
            let class = node.state.map_or(String::new(), |state| format!(":::{}", state.word()));
            let (name, below) = (entities(&node.name), entities(below(node)));
            let _ = writeln!(out, "  n{at}[\"{name}<br/>{below}\"]{class}");
        }
        for (from, to) in self.lines() {
            let _ = writeln!(out, "  n{from} --> n{to}");
        }
        let states = [State::Cached, State::Maybe, State::Runs, State::Broken, State::Failed];
        for state in states.into_iter().filter(|s| self.nodes.iter().any(|n| n.state == Some(*s))) {
            let (fill, line) = colours(state);
            let _ = writeln!(
                out,
                "  classDef {} fill:{fill},stroke:{line},color:#1d1f23",
                state.word()
            );
        }
        out
    }

    /// From what is needed to what needs it.
    fn lines(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let nodes = self.nodes.iter().enumerate();
        nodes.flat_map(|(to, node)| node.needs.iter().map(move |&from| (from, to)))
    }
}

fn below(node: &Node) -> &str {
    if node.states.is_empty() { &node.stage } else { &node.states }
}

/// Fill and line.
fn colours(state: State) -> (&'static str, &'static str) {
    match state {
        State::Cached => ("#e7f4ee", "#1b7a5a"),
        State::Maybe => ("#fdf3dc", "#8a5a00"),
        State::Runs => ("#e8f1f9", "#0b62a4"),
        State::Broken | State::Failed => ("#fdeee8", "#b3320d"),
    }
}

/// A string of DOT.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out += "\\n",
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out + "\""
}

/// Text of Mermaid: what could mean something there is a number.
fn entities(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            c if c.is_alphanumeric() || " _-.,=×".contains(c) => out.push(c),
            c if c.is_control() => {}
            c => {
                let _ = write!(out, "#{};", u32::from(c));
            }
        }
    }
    out
}
