//! Lines between two ranks of a drawing in characters: down from where they leave, along a row of
//! their own, down to where they arrive. Where two lines cross, the upright one is in front.

/// A line that leaves one item for one or more below it.
#[derive(Clone, Debug)]
pub(super) struct Net {
    /// Column where it leaves.
    pub exit: usize,
    /// Columns where it arrives; all different from those of other nets.
    pub entries: Vec<usize>,
}

const UP: u8 = 1;
const DOWN: u8 = 2;
const LEFT: u8 = 4;
const RIGHT: u8 = 8;

#[derive(Clone, Copy)]
struct Cell {
    sides: u8,
    net: usize,
}

impl Net {
    /// First and last column.
    fn span(&self) -> (usize, usize) {
        let all = || self.entries.iter().copied().chain([self.exit]);
        (all().min().unwrap_or(self.exit), all().max().unwrap_or(self.exit))
    }

    fn straight(&self) -> bool {
        self.span().0 == self.span().1
    }
}

/// Draws `nets` in rows of `width` characters.
pub(super) fn route(nets: &[Net], width: usize) -> Vec<Vec<char>> {
    let rows = rows(nets);
    let height = rows.iter().map(|row| row + 1).max().unwrap_or(0).max(1);
    let mut cells = vec![vec![Cell { sides: 0, net: usize::MAX }; width]; height];
    // Rows first: what is upright comes over them.
    for (at, (net, &row)) in nets.iter().zip(&rows).enumerate() {
        let (from, to) = net.span();
        if net.straight() {
            continue;
        }
        for (x, cell) in cells[row].iter_mut().enumerate().take(to + 1).skip(from) {
            let sides = if x > from { LEFT } else { 0 } | if x < to { RIGHT } else { 0 };
            *cell = Cell { sides, net: at };
        }
    }
    for (at, (net, &row)) in nets.iter().zip(&rows).enumerate() {
        upright(&mut cells, at, net.exit, 0, row, UP);
        if net.straight() {
            upright(&mut cells, at, net.exit, 0, height - 1, UP | DOWN);
            continue;
        }
        for &entry in &net.entries {
            upright(&mut cells, at, entry, row, height - 1, DOWN);
        }
    }
    cells.iter().map(|row| row.iter().map(|cell| letter(cell.sides)).collect()).collect()
}

/// A line down column `x`, open at the `ends` that go on beyond the rows.
fn upright(cells: &mut [Vec<Cell>], net: usize, x: usize, from: usize, to: usize, ends: u8) {
    for (y, row) in cells.iter_mut().enumerate().take(to + 1).skip(from) {
        let mut sides = 0;
        if y > from || ends & UP != 0 {
            sides |= UP;
        }
        if y < to || ends & DOWN != 0 {
            sides |= DOWN;
        }
        let cell = &mut row[x];
        match cell.net == net {
            true => cell.sides |= sides,
            false => *cell = Cell { sides, net },
        }
    }
}

/// A row for every net, so that none runs along another: those that leave where another arrives come
/// first, the others go where there is room.
fn rows(nets: &[Net]) -> Vec<usize> {
    let first = |a: &Net, b: &Net| b.entries.contains(&a.exit);
    let mut order: Vec<usize> = (0..nets.len()).collect();
    order.sort_by_key(|&net| {
        let (from, to) = nets[net].span();
        (to - from, from)
    });
    let mut rows: Vec<Option<usize>> = vec![None; nets.len()];
    while let Some(&any) = order.first() {
        let free = |&&net: &&usize| {
            order.iter().all(|&other| other == net || !first(&nets[other], &nets[net]))
        };
        let net = order.iter().find(free).copied().unwrap_or(any);
        order.retain(|&other| other != net);
        if nets[net].straight() {
            rows[net] = Some(0);
            continue;
        }
        let (from, to) = nets[net].span();
        let taken = |row: usize| {
            (0..nets.len()).any(|other| {
                let (a, b) = nets[other].span();
                let along = rows[other] == Some(row) && !nets[other].straight();
                along && a <= to + 1 && from <= b + 1
            })
        };
        let above =
            (0..nets.len()).filter(|&other| other != net && first(&nets[other], &nets[net]));
        let least = above.filter_map(|other| rows[other]).map(|row| row + 1).max().unwrap_or(0);
        rows[net] = (least..).find(|&row| !taken(row));
    }
    rows.into_iter().flatten().collect()
}

fn letter(sides: u8) -> char {
    match sides {
        0 => ' ',
        s if s == UP | DOWN || s == UP || s == DOWN => '│',
        s if s == LEFT | RIGHT || s == LEFT || s == RIGHT => '─',
        s if s == DOWN | RIGHT => '╭',
        s if s == DOWN | LEFT => '╮',
        s if s == UP | RIGHT => '╰',
        s if s == UP | LEFT => '╯',
        s if s == UP | DOWN | RIGHT => '├',
        s if s == UP | DOWN | LEFT => '┤',
        s if s == LEFT | RIGHT | DOWN => '┬',
        s if s == LEFT | RIGHT | UP => '┴',
        _ => '┼',
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    /// Columns that are reached at the bottom by following the line from `exit`: read off the
    /// letters alone, as a person does.
    fn follow(rows: &[Vec<char>], exit: usize) -> BTreeSet<usize> {
        let sides = |c: char| (1..16).find(|&s| s & (s - 1) != 0 && letter(s) == c).unwrap_or(0);
        let mut seen = BTreeSet::new();
        let mut found = BTreeSet::new();
        let mut open = vec![(exit, 0usize, DOWN)];
        while let Some((x, y, heading)) = open.pop() {
            if y == rows.len() {
                found.insert(x);
                continue;
            }
            if !seen.insert((x, y, heading)) {
                continue;
            }
            let came = match heading {
                DOWN => UP,
                UP => DOWN,
                LEFT => RIGHT,
                _ => LEFT,
            };
            let here = sides(rows[y][x]);
            // A line that meets the side of an upright one goes on behind it.
            let ways = if here & came == 0 { heading } else { here & !came };
            for way in [UP, DOWN, LEFT, RIGHT].into_iter().filter(|way| ways & way != 0) {
                match way {
                    DOWN => open.push((x, y + 1, way)),
                    UP if y > 0 => open.push((x, y - 1, way)),
                    LEFT if x > 0 => open.push((x - 1, y, way)),
                    RIGHT if x + 1 < rows[y].len() => open.push((x + 1, y, way)),
                    _ => {}
                }
            }
        }
        found
    }

    fn text(rows: &[Vec<char>]) -> Vec<String> {
        rows.iter().map(|row| row.iter().collect::<String>().trim_end().to_string()).collect()
    }

    #[test]
    fn lines_read_well() {
        let nets = [Net { exit: 3, entries: vec![0, 3, 6] }];
        assert_eq!(text(&route(&nets, 7)), ["╭──┼──╮"]);
        let nets = [Net { exit: 0, entries: vec![4] }, Net { exit: 2, entries: vec![2] }];
        assert_eq!(text(&route(&nets, 5)), ["╰─│─╮"]);
        let nets = [Net { exit: 0, entries: vec![2] }, Net { exit: 4, entries: vec![6] }];
        assert_eq!(text(&route(&nets, 7)), ["╰─╮ ╰─╮"], "one row is enough for both");
    }

    proptest! {
        #[test]
        fn every_line_leads_where_it_should(
            ends in prop::collection::vec((0usize..5, any::<bool>()), 2..40)
        ) {
            // Every third column: an end at the bottom of one of five nets, or the top of one.
            let mut nets: Vec<Net> = Vec::new();
            let mut bottoms = vec![Vec::new(); 5];
            for (i, &(net, leaves)) in ends.iter().enumerate() {
                match leaves && nets.len() < 5 {
                    true => nets.push(Net { exit: 3 * i, entries: Vec::new() }),
                    false => bottoms[net].push(3 * i),
                }
            }
            for (net, entries) in nets.iter_mut().zip(bottoms) {
                net.entries = entries;
            }
            nets.retain(|net| !net.entries.is_empty());
            let rows = route(&nets, 3 * ends.len());
            for net in &nets {
                let wanted: BTreeSet<usize> = net.entries.iter().copied().collect();
                prop_assert_eq!(follow(&rows, net.exit), wanted, "{:#?}", text(&rows));
            }
        }
    }
}
