//! One set of parameters that is trained as a unit: its own gradient norm, clip, optimiser step
//! and reaction to numbers that are none. Knows no model.

use anyhow::Result;
use engine::stage::Context;
use serde::{Deserialize, Serialize};

use crate::train::adamw::{AdamW, Group, Rule};
use crate::train::checkpoint::Saved;
use crate::train::clip;
use crate::train::run::{Guard, add};

/// Parameters with their optimiser.
pub struct Learner {
    /// For messages, curves and checkpoints: `layer 3`, `student`.
    pub name: String,
    /// All parameters, trained or not.
    pub params: Vec<f32>,
    /// Skipped updates.
    pub guard: Guard,
    pub(crate) groups: Vec<Group>,
    optimiser: AdamW,
    pub(crate) clip: f64,
    sum: Vec<f32>,
}

/// What a checkpoint holds of a learner besides its buffers.
#[derive(Serialize, Deserialize)]
pub struct Facts {
    updates: u64,
    guard: Guard,
}

impl Facts {
    /// Of a learner that has made `updates` updates.
    pub fn new(updates: u64, guard: Guard) -> Facts {
        Facts { updates, guard }
    }

    /// Updates made.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Updates skipped.
    pub fn guard(self) -> Guard {
        self.guard
    }
}

impl Learner {
    /// `params` of which `groups` are trained, with gradients clipped to norm `clip`.
    pub fn new(
        name: impl Into<String>,
        params: Vec<f32>,
        groups: Vec<Group>,
        clip: f64,
    ) -> Learner {
        let len = params.len();
        Learner {
            name: name.into(),
            params,
            guard: Guard::default(),
            groups,
            optimiser: AdamW::new(len, Rule::default()),
            clip,
            sum: vec![0.0; len],
        }
    }

    /// Makes update `update` with the sum of the shards' gradients, added in their order; gives
    /// the norm before clipping. If it or `loss` is not finite the update is skipped, and at the
    /// guard's bound the step fails.
    pub fn step<'a>(
        &mut self,
        ctx: &Context,
        update: u64,
        rate: f32,
        loss: f64,
        shards: impl Iterator<Item = &'a [f32]>,
    ) -> Result<f64> {
        for (i, shard) in shards.enumerate() {
            for Group { range, .. } in &self.groups {
                let (sum, part) = (&mut self.sum[range.clone()], &shard[range.clone()]);
                if i == 0 { sum.copy_from_slice(part) } else { add(sum, part) }
            }
        }
        let norm = clip::norm(self.groups.iter().map(|group| &self.sum[group.range.clone()]));
        let factor = clip::factor(norm, self.clip).filter(|_| loss.is_finite());
        self.guard.note(ctx, &self.name, update, factor.is_some())?;
        if let Some(factor) = factor {
            let Learner { optimiser, params, sum, groups, .. } = self;
            optimiser.update(params, sum, groups, rate, factor);
        }
        Ok(norm)
    }

    /// What a checkpoint needs besides [`Learner::buffers`].
    pub fn facts(&self) -> Facts {
        Facts { updates: self.optimiser.updates, guard: self.guard.clone() }
    }

    /// Weights and moments, named.
    pub fn buffers(&self) -> [(String, &[f32]); 3] {
        let Learner { name, params, optimiser, .. } = self;
        [
            (format!("{name}.params"), params),
            (format!("{name}.m"), &optimiser.m),
            (format!("{name}.v"), &optimiser.v),
        ]
    }

    /// Takes a checkpoint's place.
    pub fn restore(&mut self, saved: &Saved, facts: Facts) -> Result<()> {
        let name = &self.name;
        saved.read(&format!("{name}.params"), &mut self.params)?;
        saved.read(&format!("{name}.m"), &mut self.optimiser.m)?;
        saved.read(&format!("{name}.v"), &mut self.optimiser.v)?;
        self.optimiser.updates = facts.updates;
        self.guard = facts.guard;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::stage::{Diverged, In, Out, Ports, Stage};

    struct None;

    impl Stage for None {
        const NAME: &'static str = "none";
        const VERSION: u32 = 1;
        const DOC: &'static str = "";
        type Params = ();
        fn ports() -> Ports {
            const INPUTS: &[In] = &[];
            const OUTPUTS: &[Out] = &[];
            Ports { inputs: INPUTS, outputs: OUTPUTS }
        }
        fn run(_: &(), _: &mut Context) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn updates_with_numbers_that_are_none_are_skipped_and_too_many_end_the_step() {
        let dir = tempfile::tempdir().unwrap();
        let ctx = Context::local::<None>(dir.path(), &[]);
        let group = Group { range: 0..2, decay: 0.0, scale: 1.0 };
        let mut learner = Learner::new("layer 3", vec![1.0; 3], vec![group], 1.0);
        let (good, bad) = ([0.5f32, 0.5, f32::NAN], [f32::NAN, 0.0, 0.0]);
        let halves = || [&good[..], &good[..]].into_iter();
        learner.step(&ctx, 0, 0.1, 1.0, halves()).unwrap();
        assert!(learner.params[0] < 1.0 && learner.params[2] == 1.0);
        let before = learner.params.clone();
        learner.step(&ctx, 1, 0.1, 1.0, [&bad[..], &good[..]].into_iter()).unwrap();
        learner.step(&ctx, 2, 0.1, f64::NAN, halves()).unwrap();
        assert_eq!(learner.params, before);
        assert_eq!(learner.guard.skipped, 2);
        learner.step(&ctx, 3, 0.1, 1.0, halves()).unwrap();
        let mut end = Ok(0.0);
        for update in 4..20 {
            end = learner.step(&ctx, update, 0.1, f64::INFINITY, halves());
            if end.is_err() {
                break;
            }
        }
        let error = end.unwrap_err();
        let text = error.downcast_ref::<Diverged>().unwrap().0.clone();
        assert!(text.contains("layer 3 diverged at update 11") && text.contains("`lr`"), "{text}");
    }
}
