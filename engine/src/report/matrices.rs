//! The teacher's attention beside the student's mixing matrix, as pictures: a cell a pair of tokens,
//! darker for more. Knows rows of thousandths, no steps.

use std::fmt::Write;

use serde_json::{Value, json};

use super::data::Step;
use super::markup::{clip, json as in_script, num};
use super::metrics::Evaluation;

/// Most tokens of a picture; what claims more is no picture of ours.
const MOST_TOKENS: usize = 256;
/// Pictures of one page.
const MOST_PICTURES: usize = 48;
/// Shades of one sign.
const SHADES: usize = 10;

/// Both matrices of one head.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    layer: i64,
    head: i64,
    distance: Option<f64>,
    /// Rows of lower triangles, in thousandths.
    teacher: Vec<Vec<i64>>,
    student: Vec<Vec<i64>>,
}

impl Picture {
    /// What a metrics artifact says; nothing if it is no pair of triangles of the same size.
    pub fn of(value: &Value) -> Option<Picture> {
        let rows = |name: &str| -> Option<Vec<Vec<i64>>> {
            let list = value.get(name)?.as_array().filter(|rows| rows.len() <= MOST_TOKENS)?;
            let row = |(l, row): (usize, &Value)| -> Option<Vec<i64>> {
                let words = row.as_str()?.split(' ');
                let row: Vec<i64> = words.map(|word| word.parse().ok()).collect::<Option<_>>()?;
                (row.len() == l + 1).then_some(row)
            };
            list.iter().enumerate().map(row).collect()
        };
        let (teacher, student) = (rows("teacher")?, rows("student")?);
        (teacher.len() == student.len() && !teacher.is_empty()).then_some(Picture {
            layer: value.get("layer")?.as_i64()?,
            head: value.get("head")?.as_i64()?,
            distance: value.get("distance").and_then(Value::as_f64),
            teacher,
            student,
        })
    }
}

/// All pictures of the evaluations in `found`.
pub(super) fn pictures(found: &[(&Step, &Evaluation)]) -> String {
    let with: Vec<_> = found.iter().filter(|(_, e)| !e.pictures.is_empty()).collect();
    let mut out = String::new();
    let mut left = MOST_PICTURES;
    for (i, (step, evaluation)) in with.iter().enumerate() {
        let shown = evaluation.pictures.iter().take(left);
        let drawn: String = shown.map(picture).collect();
        left = left.saturating_sub(evaluation.pictures.len());
        // Of several evaluations the first is open.
        let _ = match (with.len(), drawn.is_empty()) {
            (_, true) => Ok(()),
            (1, false) => write!(out, "<div class=grid>{drawn}</div>"),
            (_, false) => write!(
                out,
                "<details class=more{}><summary><code>{}</code></summary><div class=grid>{drawn}</div></details>",
                if i == 0 { " open" } else { "" },
                clip(&step.plan.name, 160)
            ),
        };
    }
    if out.is_empty() {
        return out;
    }
    format!(
        "<p class=small>Row: the token that looks; column: the token it looks at; both from the first held-out text. \
         Each student layer is given what the teacher’s layer was given. Darker is more (by the square root), orange is below zero.</p>{out}"
    )
}

fn picture(picture: &Picture) -> String {
    let Picture { layer, head, distance, teacher, student } = picture;
    let most = teacher.iter().chain(student).flatten().map(|x| x.unsigned_abs()).max().unwrap_or(1);
    // Attention is 1000 at most; a matrix far above it must not hide it.
    let most = most.clamp(1, 1000) as f64;
    let apart = distance.map_or(String::new(), |d| format!("‖M − A‖ / ‖A‖ = {}", num(d)));
    let mut out = format!(
        "<figure class=pictures><figcaption><b>layer {layer}, head {head}</b> <span>{apart}</span></figcaption><div class=two>"
    );
    for (name, side, rows) in [
        ("teacher", "teacher: attention A", teacher),
        ("student", "student: mixing matrix M", student),
    ] {
        let n = rows.len();
        let _ = write!(
            out,
            "<div><svg class=mx viewBox=\"0 0 {n} {n}\" role=img aria-label=\"{side}, layer {layer}, head {head}\"><path class=edge d=\"M0 0L{n} {n}H0z\"/>{}</svg><small>{name}</small></div>",
            shades(rows, most)
        );
    }
    let text = |rows: &[Vec<i64>]| -> Vec<String> {
        let row = |row: &Vec<i64>| row.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
        rows.iter().map(row).collect()
    };
    let data = json!({ "t": text(teacher), "s": text(student) });
    let _ = write!(
        out,
        "</div><script type=\"application/json\">{}</script></figure>",
        in_script(&data)
    );
    out
}

/// One path a shade: runs of equal cells in a row are one stroke.
fn shades(rows: &[Vec<i64>], most: f64) -> String {
    let shade = |x: i64| {
        let size = (x.unsigned_abs() as f64 / most).min(1.0).sqrt() * SHADES as f64;
        (size.round() as usize, x < 0)
    };
    let mut paths = vec![String::new(); 2 * (SHADES + 1)];
    for (y, row) in rows.iter().enumerate() {
        let mut x = 0;
        while x < row.len() {
            let (level, below) = shade(row[x]);
            let run = row[x..].iter().take_while(|v| shade(**v) == (level, below)).count();
            if level > 0 {
                let path = &mut paths[2 * level + usize::from(below)];
                let _ = write!(path, "M{x} {y}.5h{run}");
            }
            x += run;
        }
    }
    let mut out = String::new();
    for (i, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
        let class = if i % 2 == 1 { " class=below" } else { "" };
        let opacity = (i / 2) as f64 / SHADES as f64;
        let _ = write!(out, "<path{class} opacity={opacity} d=\"{path}\"/>");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(teacher: Value, student: Value) -> Option<Picture> {
        Picture::of(
            &json!({ "layer": 1, "head": 0, "distance": 0.25, "teacher": teacher, "student": student }),
        )
    }

    #[test]
    fn pictures_are_pairs_of_triangles() {
        let found = made(json!(["1000", "250 750"]), json!(["900", "-10 40"])).unwrap();
        let drawn = picture(&found);
        assert!(drawn.contains("layer 1, head 0") && drawn.contains("= 0.25"), "{drawn}");
        // 250 of 1000 is half as dark as 1000, by the square root.
        assert!(drawn.contains("<path opacity=0.5 d=\"M0 1.5h1\"/>"), "{drawn}");
        assert!(drawn.contains("<path class=below opacity=0.1 d=\"M0 1.5h1\"/>"), "{drawn}");
        for (teacher, student) in [
            (json!(["1", "2"]), json!(["1", "2 3"])),
            (json!(["1"]), json!(["1", "2 3"])),
            (json!([]), json!([])),
            (json!(["x"]), json!(["1"])),
            (json!(7), json!(["1"])),
            (json!(["1"]), json!(["99999999999999999999999"])),
        ] {
            assert!(made(teacher.clone(), student).is_none(), "{teacher}");
        }
    }

    #[test]
    fn equal_neighbours_are_one_stroke() {
        let rows = [vec![1000], vec![1000, 1000], vec![0, 1000, 1000]];
        assert_eq!(shades(&rows, 1000.0), "<path opacity=1 d=\"M0 0.5h1M0 1.5h2M1 2.5h2\"/>");
    }
}
