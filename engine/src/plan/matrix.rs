//! The instances of a step: every combination of its axes' values, named by value.
//!
//! Knows axes and values; not what a step does with them.

use std::collections::{HashMap, HashSet};

use super::reference::coordinates;
use crate::diagnostic::suggest;
use crate::spec::layers::{NAME_RULE, is_name};
use crate::spec::source::{Problem, Problems, Span};
use crate::spec::value;
use crate::spec::yaml::{Node, Value};

/// Most instances of one step.
const MAX_INSTANCES: usize = 1_000_000;

/// The instances of one step.
#[derive(Debug, Default)]
pub struct Matrix {
    /// In declared order; none when the step has no matrix.
    pub axes: Vec<String>,
    /// For each instance its value on each axis.
    pub rows: Vec<Vec<Node>>,
    exact: HashMap<String, usize>,
    /// Instances by axis and value.
    slices: HashMap<(usize, String), Vec<usize>>,
}

impl Matrix {
    /// The one instance of a step without a matrix.
    pub fn single() -> Matrix {
        Matrix { rows: vec![Vec::new()], ..Matrix::default() }
    }

    /// From a filled `matrix:` field.
    pub fn of(field: &Node, problems: &mut Problems) -> Matrix {
        let Some(entries) = field.entries() else {
            if !matches!(field.value, Value::Broken) {
                let message = format!("`matrix` takes axes, not {}", field.describe());
                let problem = Problem::new(field.here(), message);
                problems.push(problem.hint("write `matrix: { layer: 0..3 }`"));
            }
            return Matrix::default();
        };
        let known = problems.len();
        let mut matrix = Matrix::default();
        let mut values = Vec::new();
        let mut whole = true;
        for (key, node) in entries.iter().filter(|(key, _)| key.text != "exclude") {
            if !is_name(&key.text) {
                let message = format!("`{}` cannot name an axis", key.text);
                problems.push(Problem::new(key.span, message).hint(NAME_RULE));
            }
            matrix.axes.push(key.text.clone());
            match axis(&key.text, node, problems) {
                Some(axis) => values.push(axis),
                None => whole = false,
            }
        }
        let count = values.iter().try_fold(1usize, |n, axis| n.checked_mul(axis.len()));
        if whole && count.is_none_or(|n| n > MAX_INSTANCES) {
            let message = format!("`matrix` has more than {MAX_INSTANCES} instances");
            problems.push(Problem::new(field.here(), message));
            whole = false;
        }
        if !whole {
            return matrix;
        }
        let exclude = field.get("exclude").map(|node| matrix.exclude(node, problems));
        matrix.combine(&values, &exclude.unwrap_or_default());
        if matrix.rows.is_empty() && problems.len() == known {
            let message = "`matrix` has no instances";
            let hint = "every axis needs a value, and `exclude` must leave something";
            problems.push(Problem::new(field.here(), message).hint(hint));
        }
        matrix
    }

    /// All combinations but the excluded, the first axis slowest.
    fn combine(&mut self, values: &[Vec<Node>], exclude: &[Vec<Option<HashSet<String>>>]) {
        let canon: Vec<Vec<String>> =
            values.iter().map(|axis| axis.iter().map(canonical).collect()).collect();
        let total: usize = values.iter().map(Vec::len).product();
        let mut at = vec![0usize; values.len()];
        for _ in 0..total {
            let matches = |rule: &Vec<Option<HashSet<String>>>| {
                rule.iter().enumerate().all(|(axis, set)| {
                    set.as_ref().is_none_or(|set| set.contains(&canon[axis][at[axis]]))
                })
            };
            if !exclude.iter().any(matches) {
                let index = self.rows.len();
                for axis in 0..values.len() {
                    self.slices
                        .entry((axis, canon[axis][at[axis]].clone()))
                        .or_default()
                        .push(index);
                }
                let exact: Vec<&str> = at.iter().zip(&canon).map(|(&i, c)| c[i].as_str()).collect();
                self.exact.insert(exact.join(","), index);
                self.rows.push(at.iter().zip(values).map(|(&i, v)| v[i].clone()).collect());
            }
            for axis in (0..values.len()).rev() {
                at[axis] += 1;
                if at[axis] < values[axis].len() {
                    break;
                }
                at[axis] = 0;
            }
        }
    }

    /// `exclude: [{ layer: 2, seed: [1, 2] }]`: for each rule, the values on each axis it names.
    fn exclude(&self, node: &Node, problems: &mut Problems) -> Vec<Vec<Option<HashSet<String>>>> {
        let Value::Seq(items) = &node.value else {
            let message = format!("`exclude` takes a list of maps, not {}", node.describe());
            problems
                .push(Problem::new(node.here(), message).hint("write `exclude: [{ layer: 2 }]`"));
            return Vec::new();
        };
        let mut rules = Vec::new();
        for item in items {
            let mut rule = vec![None; self.axes.len()];
            let Some(entries) = item.entries().filter(|e| !e.is_empty()) else {
                let message = format!("`exclude` takes maps of axes, not {}", item.describe());
                problems.push(Problem::new(item.here(), message));
                continue;
            };
            for (key, node) in entries {
                match self.axes.iter().position(|axis| *axis == key.text) {
                    Some(at) => {
                        let nodes = items_of(node, problems);
                        rule[at] = Some(nodes.iter().map(canonical).collect());
                    }
                    None => {
                        let message = format!("`exclude` names an unknown axis `{}`", key.text);
                        let hint = suggest(&key.text, "axes", self.axes.iter().map(String::as_str));
                        problems.push(Problem::new(key.span, message).maybe_hint(hint));
                    }
                }
            }
            if rule.iter().any(Option::is_some) {
                rules.push(rule);
            }
        }
        rules
    }

    /// The instance's name after the step's: `[2]`, `[lr=3e-4,seed=1]`, or nothing.
    pub fn suffix(&self, row: usize) -> String {
        let texts = self.rows[row].iter().map(|node| node.text().unwrap_or_default());
        match self.axes.len() {
            0 => String::new(),
            1 => format!("[{}]", texts.collect::<String>()),
            _ => {
                let pairs =
                    self.axes.iter().zip(texts).map(|(axis, text)| format!("{axis}={text}"));
                format!("[{}]", pairs.collect::<Vec<_>>().join(","))
            }
        }
    }

    /// The instances a selector means, in declared order; or what is wrong, and advice.
    pub fn select(&self, step: &str, select: &str) -> Result<Vec<usize>, (String, Option<String>)> {
        let wanted = self.wanted(step, select)?;
        if wanted.iter().all(Option::is_none) {
            return Ok((0..self.rows.len()).collect());
        }
        let texts: Option<Vec<&str>> = wanted.iter().map(|v| v.as_deref()).collect();
        if let Some(texts) = texts
            && let Some(&row) = self.exact.get(&texts.join(","))
        {
            return Ok(vec![row]);
        }
        let nothing = Vec::new();
        let slices: Vec<(usize, &Vec<usize>)> = wanted
            .iter()
            .enumerate()
            .filter_map(|(axis, value)| Some((axis, value.as_ref()?)))
            .map(|(axis, value)| {
                (axis, self.slices.get(&(axis, value.clone())).unwrap_or(&nothing))
            })
            .collect();
        if let Some((axis, _)) = slices.iter().find(|(_, rows)| rows.is_empty()) {
            return Err(self.no_value(step, *axis, wanted[*axis].as_deref().unwrap_or_default()));
        }
        let shortest =
            slices.iter().min_by_key(|(_, rows)| rows.len()).map_or(&nothing, |(_, r)| r);
        let fits = |row: &usize| slices.iter().all(|(_, rows)| rows.binary_search(row).is_ok());
        let rows: Vec<usize> = shortest.iter().copied().filter(fits).collect();
        match rows.is_empty() {
            true => Err((format!("`{step}[{select}]` is excluded from the matrix"), None)),
            false => Ok(rows),
        }
    }

    /// The value wanted on each axis, canonical; `None` for all.
    fn wanted(
        &self,
        step: &str,
        select: &str,
    ) -> Result<Vec<Option<String>>, (String, Option<String>)> {
        let given = coordinates(select);
        let mut wanted = vec![None; self.axes.len()];
        if let [(None, None)] = given[..] {
            return Ok(wanted);
        }
        let mut said = vec![false; self.axes.len()];
        for (axis, value) in &given {
            let at = match axis {
                None if self.axes.len() == 1 && given.len() == 1 => 0,
                None => {
                    return Err((
                        format!("`{step}[{select}]` does not say on which axis"),
                        Some(self.example(step)),
                    ));
                }
                Some(axis) => match self.axes.iter().position(|a| a == axis) {
                    Some(at) => at,
                    None => {
                        let hint = suggest(axis, "axes", self.axes.iter().map(String::as_str));
                        return Err((format!("`{step}` has no axis `{axis}`"), hint));
                    }
                },
            };
            said[at] = true;
            wanted[at] = value.map(canonical_text);
        }
        match said.iter().position(|said| !said) {
            Some(at) => {
                let message =
                    format!("`{step}[{select}]` says nothing of axis `{}`", self.axes[at]);
                Err((message, Some(self.example(step))))
            }
            None => Ok(wanted),
        }
    }

    fn example(&self, step: &str) -> String {
        let pairs: Vec<String> = self.axes.iter().map(|axis| format!("{axis}=*")).collect();
        format!("write `{step}[{}]`, with a value in place of a `*`", pairs.join(","))
    }

    fn no_value(&self, step: &str, axis: usize, value: &str) -> (String, Option<String>) {
        let mut seen = HashSet::new();
        let texts: Vec<&str> = self.rows.iter().filter_map(|row| row[axis].text()).collect();
        let texts: Vec<&str> = texts.into_iter().filter(|text| seen.insert(*text)).collect();
        let listed = match texts.len() {
            n if n > 12 => format!("`{}` … `{}`", texts[0], texts[n - 1]),
            _ => texts.iter().map(|t| format!("`{t}`")).collect::<Vec<_>>().join(", "),
        };
        let name = &self.axes[axis];
        let message = format!("`{step}` has no instance with {name} `{value}`");
        (message, Some(format!("{name} is one of {listed}")))
    }
}

/// The values of one axis.
fn axis(name: &str, node: &Node, problems: &mut Problems) -> Option<Vec<Node>> {
    if matches!(node.value, Value::Broken) {
        return None;
    }
    if node.is_null() || matches!(node.value, Value::Map(_)) {
        let message = format!("axis `{name}` takes values, not {}", node.describe());
        let problem = Problem::new(node.here(), message);
        problems.push(problem.hint(format!("write `{name}: 0..3` or `{name}: [1, 2]`")));
        return None;
    }
    let known = problems.len();
    let values = items_of(node, problems);
    let mut seen: HashMap<String, Span> = HashMap::new();
    for value in &values {
        let Some(text) = value.text().filter(|_| usable(value)) else {
            let message = format!("axis `{name}`: {} cannot name an instance", value.describe());
            let hint = "values are numbers or words without spaces and `[`, `]`, `,`, `=`, `*`";
            problems.push(Problem::new(value.here(), message).hint(hint));
            continue;
        };
        if let Some(first) = seen.insert(canonical_text(text), value.here()) {
            let message = format!("axis `{name}` has the value `{text}` twice");
            problems.push(Problem::new(value.here(), message).related(first, "first written here"));
        }
    }
    if values.is_empty() && problems.len() == known {
        let message = format!("axis `{name}` has no values, so the step would have no instances");
        let problem = Problem::new(node.here(), message);
        problems
            .push(problem.hint("`a..b` does not include `b`; `matrix: null` takes a matrix away"));
    }
    (problems.len() == known).then_some(values)
}

/// A list's items, a range's numbers, or the value itself.
fn items_of(node: &Node, problems: &mut Problems) -> Vec<Node> {
    let items = match &node.value {
        Value::Seq(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    let mut values = Vec::new();
    for item in items {
        match item.text().and_then(value::range) {
            Some(Ok(range)) => values.extend(range.map(|n| Node {
                value: Value::Scalar { text: n.to_string(), quoted: false },
                ..*item
            })),
            Some(Err(message)) => problems.push(Problem::new(item.here(), message)),
            None => values.push(item.clone()),
        }
    }
    values
}

fn usable(node: &Node) -> bool {
    let bad = |c: char| c.is_whitespace() || c.is_control() || "[],=*".contains(c);
    node.text().is_some_and(|text| !text.is_empty() && !text.contains(bad))
}

fn canonical(node: &Node) -> String {
    canonical_text(node.text().unwrap_or_default())
}

/// One spelling for all spellings of a number.
pub fn canonical_text(text: &str) -> String {
    match value::float(text) {
        Some(number) if value::integer(text).is_none() => number.to_string(),
        _ => value::integer(text).map_or_else(|| text.to_string(), |n| n.to_string()),
    }
}
