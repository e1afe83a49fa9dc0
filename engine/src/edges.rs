//! Which steps each step of a schedule has to do with, in two lists however many steps there are.
//! Knows no states.

/// The ends of each step's edges.
pub(crate) struct Edges {
    /// Where in `ends` those of each step begin; one more, where the last end.
    starts: Vec<usize>,
    ends: Vec<u32>,
}

impl Edges {
    /// Of no step yet, with room for so many.
    pub fn with_capacity(steps: usize) -> Edges {
        let mut starts = Vec::with_capacity(steps + 1);
        starts.push(0);
        Edges { starts, ends: Vec::new() }
    }

    /// Adds a step with edges to `ends`.
    ///
    /// # Panics
    /// When an end is no step that was added before.
    pub fn push(&mut self, ends: &[usize]) {
        let step = self.starts.len() - 1;
        assert!(ends.iter().all(|&end| end < step), "steps come in topological order");
        let number = |&end: &usize| u32::try_from(end).expect("no plan has so many steps");
        self.ends.extend(ends.iter().map(number));
        self.starts.push(self.ends.len());
    }

    /// How many edges `step` has.
    pub fn count(&self, step: usize) -> usize {
        self.starts[step + 1] - self.starts[step]
    }

    /// The end of its edge number `nth`.
    pub fn end(&self, step: usize, nth: usize) -> usize {
        self.ends[self.starts[step] + nth] as usize
    }

    /// The ends of its edges.
    pub fn of(&self, step: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
        self.ends[self.starts[step]..self.starts[step + 1]].iter().map(|&end| end as usize)
    }

    /// The same edges by their ends, the beginnings in order.
    pub fn reversed(&self) -> Edges {
        let steps = self.starts.len() - 1;
        let mut starts = vec![0; steps + 1];
        self.ends.iter().for_each(|&end| starts[end as usize + 1] += 1);
        for step in 0..steps {
            starts[step + 1] += starts[step];
        }
        let mut next = starts.clone();
        let mut ends = vec![0; self.ends.len()];
        for step in 0..steps {
            for end in self.of(step) {
                // It was an end in `push` or could have been.
                ends[next[end]] = step as u32;
                next[end] += 1;
            }
        }
        Edges { starts, ends }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_found_from_both_sides() {
        let all: [&[usize]; 5] = [&[], &[0], &[0, 1], &[], &[3, 0]];
        let mut edges = Edges::with_capacity(5);
        all.iter().for_each(|ends| edges.push(ends));
        let reversed = edges.reversed();
        for (step, ends) in all.iter().enumerate() {
            assert_eq!(edges.of(step).collect::<Vec<_>>(), *ends);
            assert_eq!(edges.count(step), ends.len());
            assert!((0..ends.len()).all(|nth| edges.end(step, nth) == ends[nth]));
        }
        let expected: [&[usize]; 5] = [&[1, 2, 4], &[2], &[], &[4], &[]];
        for (step, beginnings) in expected.iter().enumerate() {
            assert_eq!(reversed.of(step).collect::<Vec<_>>(), *beginnings);
        }
    }
}
