//! Graphs drawn by every means, from small plans.

use super::*;

fn node(name: &str, needs: &[usize], state: Option<State>) -> Node {
    let states = state.map_or(String::new(), |state| state.word().into());
    Node { name: name.into(), stage: "work".into(), state, states, needs: needs.to_vec() }
}

fn text(drawing: &Drawing) -> Vec<String> {
    let row = |row: &Vec<Piece>| row.iter().map(|piece| piece.text.as_str()).collect();
    drawing.rows.iter().map(row).map(|row: String| row.trim_end().to_string()).collect()
}

fn graph(nodes: Vec<Node>) -> Graph {
    Graph { name: "p".into(), nodes }
}

#[test]
fn a_chain_is_a_column() {
    let drawn = graph(vec![node("one", &[], None), node("two", &[0], None)]).drawing();
    assert_eq!(text(&drawn), ["one", " │", "two"]);
}

#[test]
fn a_diamond_splits_and_joins() {
    let drawn = graph(vec![
        node("top", &[], Some(State::Cached)),
        node("left", &[0], Some(State::Runs)),
        node("right", &[0], Some(State::Failed)),
        node("bottom", &[1, 2], Some(State::Maybe)),
    ])
    .drawing();
    let rows = text(&drawn);
    assert_eq!(rows.len(), 5, "{rows:#?}");
    for part in ["✓ top", "▸ left   ✗ right", "? bottom"] {
        assert!(rows.iter().any(|row| row.contains(part)), "{part}: {rows:#?}");
    }
    let coloured = |state| drawn.rows.iter().flatten().filter(|p| p.state == Some(state)).count();
    assert_eq!(coloured(State::Failed), 1);
}

#[test]
fn names_never_touch_whatever_the_graph() {
    let nodes = (0..40)
        .map(|v: usize| {
            let needs: Vec<usize> = (0..v).filter(|u| (u * 7 + v * 3).is_multiple_of(13)).collect();
            node(&format!("n{}", "x".repeat(v % 9)), &needs, None)
        })
        .collect();
    let graph = graph(nodes);
    let drawn = graph.drawing();
    for row in &drawn.rows {
        let mut before_is_name = false;
        for piece in row.iter().filter(|piece| !piece.text.is_empty()) {
            assert!(!(before_is_name && piece.name), "{row:?}");
            before_is_name = piece.name;
        }
    }
    let names = drawn.rows.iter().flatten().filter(|piece| piece.name).count();
    assert_eq!(names, 40);
    assert_eq!(graph.list().rows.len(), 40);
}

#[test]
fn text_for_other_tools_is_quoted() {
    let hostile =
        graph(vec![node("a\"]; x -> y; <b>\\", &[], None), node("b", &[0], Some(State::Runs))]);
    let dot = hostile.dot();
    assert!(dot.contains(r#"label="a\"]; x -> y; <b>\\\nwork""#), "{dot}");
    assert!(dot.contains("n0 -> n1;") && dot.contains("fillcolor=\"#e8f1f9\""), "{dot}");
    let mermaid = hostile.mermaid();
    assert!(
        mermaid.contains("n0[\"a#34;#93;#59; x -#62; y#59; #60;b#62;#92;<br/>work\"]"),
        "{mermaid}"
    );
    assert!(
        mermaid.contains("n0 --> n1") && mermaid.contains("n1[\"b<br/>runs\"]:::runs"),
        "{mermaid}"
    );
    let svg = hostile.svg();
    assert!(
        svg.contains("a&quot;]; x -&gt; y; &lt;b&gt;") && svg.starts_with("<svg xmlns="),
        "{svg}"
    );
}

#[test]
fn ten_thousand_steps_are_one_node_each_group() {
    let step = |group: &str, n: usize, needs: &[usize]| plan::Step {
        name: format!("{group}[{n}]"),
        group: group.into(),
        after: needs.to_vec(),
        ..plan::Step::default()
    };
    let mut steps: Vec<plan::Step> = (0..5000).map(|n| step("a", n, &[])).collect();
    steps.extend((0..5000).map(|n| step("b", n, &[n])));
    let plan = plan::Plan { name: "p".into(), steps, ..plan::Plan::default() };
    let states = (0..10_000)
        .map(|n| (n, if n == 7 { State::Failed } else { State::Cached }))
        .collect::<HashMap<_, _>>();
    let graph = Graph::of(&plan, false, Some(&states));
    assert_eq!(text(&graph.drawing()), ["✗ a ×5000", "    │", "✓ b ×5000"]);
    assert_eq!(graph.nodes[0].states, "1 failed, 4999 cached");
    assert_eq!(Graph::of(&plan, true, None).nodes.len(), 10_000);
}
