//! What `pipe bench gpu` measures, on a model that an emulator can run.

use stages::gpu::bench::ceilings::Ceilings;
use stages::gpu::bench::ops::{self, Op};
use stages::gpu::bench::phases::{self, Amount, Phase};
use stages::gpu::bench::subject::Subject;

/// The same choices as the two real ones.
fn subjects() -> [Subject; 2] {
    let tiny = || Subject::named("tiny").unwrap();
    [tiny(), tiny().as_phi()]
}

#[test]
fn phases_have_finite_figures() {
    for subject in subjects() {
        for (phase, name) in Phase::ALL {
            let gpu = stages::gpu::open().unwrap();
            let free = gpu.memory().unwrap().0;
            let amount = Amount { batch: 2, micro_batch: 1, updates: 2 };
            let found = phases::measure(&gpu, &subject, phase, amount, free).unwrap();
            let figures = [found.ms, found.tok_s, found.flops, found.peak_bytes as f64];
            assert!(figures.iter().all(|v| v.is_finite() && *v > 0.0), "{name}: {found:?}");
            assert_eq!((found.batch, found.micro_batch, found.seq), (2, 1, 64));
            let learns = !matches!(phase, Phase::Teacher | Phase::TeacherLogits);
            assert_eq!(found.loss.is_some(), learns, "{name}");
            assert!(found.loss.is_none_or(|loss| loss.is_finite() && loss > 0.0), "{found:?}");
        }
    }
}

#[test]
fn ops_have_finite_figures() {
    for subject in subjects() {
        let gpu = stages::gpu::open().unwrap();
        let ceilings = Ceilings::measure(&gpu, true).unwrap();
        let amount = Amount { batch: 1, micro_batch: 1, updates: 1 };
        let mut all: Vec<Op> = Vec::new();
        ops::measure(&gpu, &subject, amount, &mut |op| all.push(op)).unwrap();
        for op in &all {
            let figures = [op.ms, op.rate(), op.share(&ceilings)];
            assert!(figures.iter().all(|v| v.is_finite() && *v > 0.0), "{op:?}");
        }
        for name in ["scan back", "orient rows", "clip and adamw", "head dw"] {
            assert!(all.iter().any(|op| op.name == name), "{name}");
        }
    }
}
