//! Tables of answers: aligned for people, CSV and JSON for programs.

use std::cmp::Ordering;

use serde_json::{Map, Value};

use crate::out::{self, Paint, clean};

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// There is none.
    Nothing,
    /// Words.
    Text(String),
    /// A number.
    Number(f64),
    /// A number that people read as this.
    Shown(f64, String),
}

impl Cell {
    fn value(&self) -> Value {
        match self {
            Cell::Nothing => Value::Null,
            Cell::Text(text) => text.clone().into(),
            Cell::Number(number) | Cell::Shown(number, _) => exact(*number),
        }
    }

    fn shown(&self) -> String {
        match self {
            Cell::Nothing => "-".into(),
            Cell::Text(text) | Cell::Shown(_, text) => clean(text).replace(['\n', '\t'], " "),
            Cell::Number(number) => short(*number),
        }
    }

    fn number(&self) -> Option<f64> {
        match self {
            Cell::Number(number) | Cell::Shown(number, _) => Some(*number),
            _ => None,
        }
    }
}

impl From<&Value> for Cell {
    fn from(value: &Value) -> Cell {
        match value {
            Value::Null => Cell::Nothing,
            Value::Number(number) => Cell::Number(number.as_f64().unwrap_or(f64::NAN)),
            Value::String(text) => Cell::Text(text.clone()),
            other => Cell::Text(other.to_string()),
        }
    }
}

/// How a table is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    Csv,
    Json,
}

impl Format {
    /// Of the usual flags.
    pub fn of(json: bool, csv: bool) -> Format {
        match (json, csv) {
            (true, _) => Format::Json,
            (_, true) => Format::Csv,
            _ => Format::Text,
        }
    }
}

/// Rows of cells under names.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// Sorts by a column; rows without a value come last either way.
    pub fn sort(&mut self, column: usize, reverse: bool) {
        self.rows.sort_by(|a, b| {
            let (a, b) = (&a[column], &b[column]);
            match (a.number(), b.number()) {
                (Some(a), Some(b)) if reverse => b.total_cmp(&a),
                (Some(a), Some(b)) => a.total_cmp(&b),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => Ordering::Equal,
            }
        });
    }

    /// Leaves out columns that say nothing, but for the first.
    pub fn drop_empty(&mut self) {
        let nothing = |at: usize| self.rows.iter().all(|row| row[at] == Cell::Nothing);
        for at in (1..self.columns.len()).rev().filter(|at| nothing(*at)).collect::<Vec<_>>() {
            self.columns.remove(at);
            self.rows.iter_mut().for_each(|row| drop(row.remove(at)));
        }
    }

    /// Prints it.
    pub fn print(&self, format: Format) {
        match format {
            Format::Text => self.lines(Paint::stdout()).iter().for_each(out::line),
            Format::Csv => self.csv().iter().for_each(out::line),
            Format::Json => {
                let row = |row: &Vec<Cell>| {
                    let named = self.columns.iter().cloned().zip(row.iter().map(Cell::value));
                    Value::Object(named.collect::<Map<_, _>>())
                };
                let all: Vec<Value> = self.rows.iter().map(row).collect();
                out::line(serde_json::to_string_pretty(&all).unwrap_or_default());
            }
        }
    }

    fn lines(&self, paint: Paint) -> Vec<String> {
        let shown: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.iter().map(Cell::shown).collect()).collect();
        let long = |text: &String| text.chars().count();
        let width = |at: usize| {
            shown.iter().map(|row| long(&row[at])).chain([long(&self.columns[at])]).max()
        };
        let widths: Vec<usize> = (0..self.columns.len()).filter_map(width).collect();
        let right = |at: usize| self.rows.iter().any(|row| row[at].number().is_some());
        let line = |cells: &[String]| {
            let padded = cells.iter().zip(&widths).enumerate().map(|(at, (cell, width))| {
                if right(at) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_string()
        };
        let head = paint.bold(&line(&self.columns.iter().map(|c| clean(c)).collect::<Vec<_>>()));
        std::iter::once(head).chain(shown.iter().map(|row| line(row))).collect()
    }

    /// As RFC 4180 has it.
    fn csv(&self) -> Vec<String> {
        let head = self.columns.iter().map(|column| field(column)).collect::<Vec<_>>().join(",");
        let row = |row: &Vec<Cell>| {
            let cells = row.iter().map(|cell| match cell.value() {
                Value::Null => String::new(),
                Value::String(text) => field(&text),
                other => other.to_string(),
            });
            cells.collect::<Vec<_>>().join(",")
        };
        std::iter::once(head).chain(self.rows.iter().map(row)).collect()
    }
}

fn field(text: &str) -> String {
    match text.contains(['"', ',', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.into(),
    }
}

/// Whole numbers without a point; what is no number is a word, as JSON has none for it.
fn exact(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 9e15 {
        return Value::from(number as i64);
    }
    if number.is_finite() { Value::from(number) } else { Value::from(number.to_string()) }
}

/// Five digits of a number.
pub fn short(number: f64) -> String {
    let size = number.abs();
    if number.fract() == 0.0 && size < 1e9 {
        return format!("{number:.0}");
    }
    if !number.is_finite() || !(1e-4..1e7).contains(&size) {
        return format!("{number:.4e}");
    }
    let digits = (4 - size.log10().floor() as i32).clamp(0, 8) as usize;
    let text = format!("{number:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table {
            columns: vec!["name".into(), "loss".into()],
            rows: vec![
                vec![Cell::Text("a, \"b\"".into()), Cell::Nothing],
                vec![Cell::Text("c\u{1b}[2J".into()), Cell::Number(2.5)],
                vec![Cell::Text("d".into()), Cell::Shown(0.25, "a quarter".into())],
            ],
        }
    }

    #[test]
    fn text_is_aligned_and_clean() {
        let lines = table().lines(Paint(false));
        assert_eq!(
            lines,
            ["name         loss", "a, \"b\"          -", "c[2J          2.5", "d       a quarter"]
        );
    }

    #[test]
    fn csv_is_quoted_and_exact() {
        assert_eq!(table().csv(), ["name,loss", "\"a, \"\"b\"\"\",", "c\u{1b}[2J,2.5", "d,0.25"]);
    }

    #[test]
    fn what_is_missing_sorts_last() {
        let mut table = table();
        let order = |table: &Table| -> String {
            table.rows.iter().map(|row| row[0].shown().chars().next().unwrap()).collect()
        };
        table.sort(1, false);
        assert_eq!(order(&table), "dca");
        table.sort(1, true);
        assert_eq!(order(&table), "cda");
    }

    #[test]
    fn numbers_have_five_digits() {
        let shown: Vec<String> =
            [3.0, 0.123456789, 12.5, 1234.5678, 3e-7, f64::NAN].map(short).into();
        assert_eq!(shown, ["3", "0.12346", "12.5", "1234.6", "3.0000e-7", "NaN"]);
    }
}
