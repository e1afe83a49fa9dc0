//! What goes wrong on a device: no room, a kernel that fails, numbers that are none.
#![cfg(all(feature = "emulate", not(feature = "cuda")))]

use engine::stage::{DeviceFault, Diverged, OutOfDeviceMemory};
use stages::gpu::emulator::Emulator;
use stages::gpu::launch::Gpu;
use stages::gpu::phases::distill::{Aim, Distill, driver};
use stages::gpu::phases::{Driver, Work as _};
use stages::models::transfer::{Sizes, student_config};
use stages::models::{Config, MixerKind, Model, Params, Trained};
use stages::ops::Dims;
use stages::train::layer::groups;
use stages::train::learner::Learner;

fn config() -> Config {
    Config {
        vocab: 48,
        d_model: 64,
        layers: vec![MixerKind::Attention; 4],
        heads: 2,
        kv_heads: 2,
        head_dim: 32,
        ffn: 96,
        tied: true,
        d_state: 16,
        ..Config::default()
    }
}

/// Phase 3 of a hybrid on a device with `gpu`'s limits.
fn phase(gpu: &Gpu, teacher: &Params) -> anyhow::Result<Driver<Distill>> {
    let of_teacher = Model::new(config()).unwrap();
    let sizes = Sizes { state: 16, taps: 4, chunk: 8 };
    let student = Model::new(student_config(&config(), sizes, &[1])).unwrap();
    let start = student.init(3);
    let groups = groups(&student.layout, 0.1, |_| true);
    let learner = Learner::new("student", start.flat, groups, 1.0);
    let tokens = |i: usize, out: &mut [u32]| {
        let each = out.iter_mut().enumerate();
        each.for_each(|(l, token)| *token = ((i * 7 + l * l * 3) % 48) as u32);
    };
    let dims = Dims { batch: 2, seq: 36 };
    let models = ((&of_teacher, teacher), (&student, &learner));
    driver(
        gpu,
        models.0,
        models.1,
        Trained::ALL,
        Box::new(tokens),
        Aim { batch: 2, dims, labels: 0.0 },
    )
}

fn teacher() -> Params {
    Model::new(config()).unwrap().init(5)
}

fn gpu(emulator: Emulator) -> Gpu {
    Gpu::new(Box::new(emulator))
}

#[test]
fn with_little_room_activations_are_formed_again_and_the_bits_stay() {
    let run = |gpu: &Gpu| {
        let mut phase = phase(gpu, &teacher())?;
        for update in 0..3 {
            phase.queue_update(1e-2, &[2 * update, 2 * update + 1])?;
        }
        let recomputes = phase.work.recomputes();
        anyhow::Ok((recomputes, gpu.allocated().1, phase.learners.params(0)?))
    };
    let (recomputes, peak, wanted) = run(&gpu(Emulator::new(false))).unwrap();
    assert!(!recomputes);
    let small = gpu(Emulator::with_memory(peak - 100_000));
    let (recomputes, less, found) = run(&small).unwrap();
    assert!(recomputes && less < peak);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(bits(&found) == bits(&wanted), "what is kept changed the bits");
}

#[test]
fn no_room_at_all_is_told_with_numbers_and_what_to_do() {
    let small = gpu(Emulator::with_memory(200_000));
    let Err(error) = phase(&small, &teacher()) else { panic!("it cannot fit") };
    let text = error.downcast_ref::<OutOfDeviceMemory>().expect("out of memory").to_string();
    assert!(text.contains("no room on the emulated GPU for"), "{text}");
    assert!(text.contains("GiB free") && text.contains("lower `micro_batch`"), "{text}");
}

#[test]
fn a_kernel_that_fails_is_named_and_nothing_follows_it() {
    let broken = gpu(Emulator::failing("swiglu_backward", "an illegal memory access"));
    let mut phase = phase(&broken, &teacher()).unwrap();
    let failed = phase.queue_update(1e-2, &[0, 1]);
    let error = failed.and_then(|()| broken.synchronise()).unwrap_err();
    let fault = error.downcast_ref::<DeviceFault>().expect("a fault of the device");
    let text = fault.to_string();
    assert!(text.contains("swiglu_backward: an illegal memory access"), "{text}");
    assert!(text.contains("PIPE_GPU_CHECK=1"), "{text}");
    let launched = broken.launched();
    assert!(phase.queue_update(1e-2, &[2, 3]).is_err());
    assert_eq!(broken.launched(), launched, "work was queued after a fault");
}

#[test]
fn updates_without_numbers_are_skipped_counted_and_end_the_step() {
    use stages::train::run::Trainer as _;
    let mut broken = teacher();
    broken.flat[100] = f32::NAN;
    let dir = tempfile::tempdir().unwrap();
    let ctx = engine::stage::Context::local::<stages::distill::Distill>(dir.path(), &[]);
    let fine = gpu(Emulator::new(false));
    let mut phase = phase(&fine, &broken).unwrap();
    let before = phase.learners.params(0).unwrap();
    for update in 0..3 {
        phase.queue_update(1e-2, &[2 * update, 2 * update + 1]).unwrap();
    }
    assert_eq!(phase.settle(&ctx, 3).unwrap().len(), 3);
    assert_eq!((phase.learners.guard(0).skipped, phase.healthy()), (3, false));
    assert_eq!(phase.learners.params(0).unwrap(), before, "a skipped update changed weights");
    for update in 0..8 {
        phase.queue_update(1e-2, &[2 * update, 2 * update + 1]).unwrap();
    }
    let error = phase.settle(&ctx, 11).unwrap_err();
    let text = &error.downcast_ref::<Diverged>().expect("it diverged").0;
    assert!(text.contains("student diverged") && text.contains("8 updates in a row"), "{text}");
    let _ = phase.work.recordable();
}
