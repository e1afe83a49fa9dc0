//! The board at all sizes.

use engine::plan::Step;
use unicode_width::UnicodeWidthStr;

use super::*;
use crate::usage::GpuUse;

fn step(name: &str) -> Step {
    Step { name: name.into(), group: name.into(), stage: "command".into(), ..Step::default() }
}

fn plan(names: &[&str]) -> Plan {
    Plan {
        name: "mohawk".into(),
        file: "p.yaml".into(),
        steps: names.iter().map(|name| step(name)).collect(),
        outputs: Vec::new(),
    }
}

fn at(t: f64, event: Event) -> Stamped {
    Stamped { t, event }
}

fn launched(t: f64, step: usize) -> Stamped {
    let key = cache::Key::of(b"k");
    at(t, Event::Launched { step, key, attempt: 1, dir: "d".into(), resumed: None })
}

fn progress(t: f64, step: usize, done: u64) -> Stamped {
    let report = Report::Progress { done, total: 10_000, unit: "tokens".into() };
    at(t, Event::Reported { step, report })
}

fn loss(t: f64, step: usize, loss: f64) -> Stamped {
    let values = [("grad_norm".to_string(), 9.0), ("loss".to_string(), loss)].into();
    at(t, Event::Reported { step, report: Report::Metric { at: 0, values } })
}

/// A run with one step done and two at work.
fn made() -> Board {
    let mut plan = plan(&["corpus", "teacher", "教師の歩み", "student"]);
    plan.steps[3].after = vec![1];
    let mut board = Board::new(&plan, vec![Some(1.0), None, None, Some(60.0)]);
    let key = cache::Key::of(b"k");
    board.take(&at(0.0, Event::Started { steps: 4, jobs: 2 }));
    board.take(&at(0.0, Event::Cached { step: 0, key, saved_s: 1.0, outputs: Vec::new() }));
    board.take(&launched(1.0, 1));
    board.take(&launched(1.0, 2));
    for i in 0..=20 {
        let t = 1.0 + f64::from(i);
        board.take(&progress(t, 1, 200 * u64::from(i as u32)));
        board.take(&loss(t, 1, 5.0 - 0.2 * f64::from(i)));
    }
    board
}

fn machine() -> Machine {
    let (used, memory) = (34_000_000_000, 80_000_000_000);
    let gpus = vec![GpuUse { index: 0, busy: Some(97), used, memory }];
    Machine { cpus: (1.94, 2), memory: 512_000_000, gpus }
}

fn drawn(board: &Board, width: usize, height: usize) -> Vec<String> {
    board.lines(21.0, &machine(), (width, height), Paint(false))
}

#[test]
fn a_wide_terminal_shows_everything() {
    let lines = drawn(&made(), 120, 24);
    assert_eq!(
        lines,
        [
            "mohawk  1 cached 2 running 1 to go  21.0 s, at least 1 min 30 s left",
            "▸ teacher     ━━━━━━──────────   40 %  200 tokens/s  loss 1.000  █▇▇▆▅▅▄▄▃▂▂▁  30 s left",
            "▸ 教師の歩み  for 20 s",
            "  cpu 1.9 of 2, memory 512.0 MB, GPU 0 97 %, 34.0 GB of 80.0 GB",
        ]
    );
}

#[test]
fn what_matters_most_stays_in_a_narrow_one() {
    let line = |width| drawn(&made(), width, 24)[1].trim_end().to_string();
    assert_eq!(line(70), "▸ teacher      40 %  200 tokens/s  loss 1.000  30 s left");
    assert_eq!(line(48), "▸ teacher      40 %  loss 1.000  30 s left");
    assert_eq!(line(34), "▸ teacher      40 %  30 s left");
    assert_eq!(line(24), "▸ teacher      40 %");
}

/// Whatever the size: fewer lines than the terminal has, and none that would wrap.
#[test]
fn no_size_is_overflown() {
    let names: Vec<String> = (0..40).map(|i| format!("long_name_of_a_step[{i}]")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut many = Board::new(&plan(&names), vec![None; 40]);
    (0..40).for_each(|step| many.take(&launched(0.0, step)));
    let waits = Event::Waiting { step: 3, holder: "process 7 of \u{1b}[31mhost".into() };
    many.take(&at(0.0, waits));
    for board in [&made(), &many, &Board::new(&plan(&[]), Vec::new())] {
        for width in (0..140).chain([1000]) {
            for height in [0, 1, 2, 3, 5, 24, 1000] {
                let lines = drawn(board, width, height);
                assert!(!lines.is_empty() && lines.len() <= height.saturating_sub(1).max(1));
                assert!(lines.len() <= MOST_LINES);
                for line in &lines {
                    assert!(line.width() < width.max(2), "{width}x{height}: {line:?}");
                    assert!(!line.contains(char::is_control), "{line:?}");
                }
            }
        }
    }
    let lines = drawn(&many, 80, 8);
    assert_eq!(lines.last().unwrap(), "… and 35 more at work");
}

#[test]
fn paint_changes_no_width() {
    let board = made();
    let plain = drawn(&board, 100, 24);
    let painted = board.lines(21.0, &machine(), (100, 24), Paint(true));
    let bare = |line: &String| {
        let mut out = String::new();
        let mut inside = false;
        for c in line.chars() {
            match c {
                '\u{1b}' => inside = true,
                'm' if inside => inside = false,
                c if !inside => out.push(c),
                _ => {}
            }
        }
        out
    };
    assert_eq!(painted.iter().map(bare).collect::<Vec<_>>(), plain);
    assert_ne!(painted, plain);
}

#[test]
fn the_time_left_follows_the_longest_way() {
    let mut board = made();
    // 30 s of `teacher`, then 60 s of `student`; of the other nothing is known.
    assert_eq!(board.left(21.0), Some((90.0, true)));
    board.expected[2] = Some(25.0);
    assert_eq!(board.left(21.0), Some((90.0, false)));
    board.expected[2] = Some(500.0);
    assert_eq!(board.left(21.0), Some((480.0, false)));
}

#[test]
fn curves_keep_their_shape_and_their_bound() {
    let mut losses = Losses::default();
    for i in 0..100_000 {
        losses.push(1e6 + f64::from(i));
    }
    losses.push(f64::NAN);
    assert!(losses.values.len() <= MOST_POINTS && losses.values.len() > MOST_POINTS / 4);
    assert_eq!(sparkline(&losses.values, 8), "▁▂▃▄▅▆▇█");
    assert_eq!(sparkline(&[3.0, 3.0], 8), "▁▁");
    assert_eq!(sparkline(&[1.0, 10.0, 100.0, 1000.0], 4), "▁▃▆█", "by powers");
}

#[test]
fn a_step_that_ends_leaves_the_board() {
    let mut board = made();
    let key = cache::Key::of(b"k");
    board.take(&at(22.0, Event::Finished { step: 1, key, seconds: 21.0, outputs: Vec::new() }));
    let lines = drawn(&board, 100, 24);
    assert!(lines[0].contains("1 ran 1 running 1 to go"), "{}", lines[0]);
    assert!(lines.iter().all(|line| !line.contains("teacher")) && board.curves.is_empty());
}
