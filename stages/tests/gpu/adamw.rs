//! Updates of several learners against the CPU's optimiser: equal bits, given an equal factor.

use stages::gpu::ops::adamw::{Flat, Updates};
use stages::train::adamw::{AdamW, Group, Rule};
use stages::train::clip;

use crate::support::{devices, full, half, normal, poison, read, read_full};

fn group(range: std::ops::Range<usize>, decay: f32) -> Group {
    Group { range, decay, scale: 1.0 }
}

#[test]
fn updates_are_those_of_the_cpu_bit_for_bit() {
    // Odd offsets and lengths, more than a chunk, and gaps that belong to nobody.
    let groups =
        [vec![group(0..20_000, 0.1), group(20_003..20_012, 0.0)], vec![group(20_016..20_777, 0.1)]];
    let (len, rate, limit) = (20_800, 1e-3f32, 1.0);
    let old = normal(1, len, 1.0);
    for gpu in devices() {
        let updates = Updates::new(&gpu, &groups, Rule::default(), limit, 4).unwrap();
        let (params, grads) = (full(&gpu, &old), full(&gpu, &vec![0.0; len]));
        let (m, v) = (full(&gpu, &vec![0.0; len]), full(&gpu, &vec![0.0; len]));
        let (shadow, loss, lr) = (half(&gpu, &old), full(&gpu, &[1.0, 2.0]), full(&gpu, &[rate]));
        let slot = poison::<u32>(&gpu, 1);
        let mut optimisers = groups.each_ref().map(|_| AdamW::new(len, Rule::default()));
        let mut expect = old.clone();
        for update in 0..4u32 {
            let mut g = normal(10 + u64::from(update), len, if update == 1 { 1e-4 } else { 0.1 });
            if update == 2 {
                g[20_100] = f32::NAN;
            }
            gpu.upload(grads.all(), &g);
            gpu.upload(slot.all(), &[update]);
            gpu.upload(loss.all(), &[if update == 3 { f32::INFINITY } else { 1.5 }, 2.0]);
            let flat = Flat {
                params: params.all(),
                grads: grads.all(),
                m: m.all(),
                v: v.all(),
                shadow: Some(shadow.all()),
            };
            updates.step(&gpu, flat, Some((loss.all(), loss.all())), (lr.all(), slot.all()), true);
            let at = update as usize;
            let records = updates.records(&gpu, at..at + 1).unwrap();
            for (i, (record, optimiser)) in records.iter().zip(&mut optimisers).enumerate() {
                let norm = clip::norm(groups[i].iter().map(|group| &g[group.range.clone()]));
                let finite = norm.is_finite() && record.loss.is_finite();
                assert_eq!(record.factor > 0.0, finite, "learner {i}");
                let Some(factor) = clip::factor(norm, f64::from(limit)).filter(|_| finite) else {
                    continue;
                };
                assert!((f64::from(record.norm) / norm - 1.0).abs() < 1e-6);
                assert!((record.factor / factor - 1.0).abs() < 1e-6);
                optimiser.update(&mut expect, &g, &groups[i], rate, record.factor);
            }
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&read_full(&gpu, params.all())), bits(&expect), "update {update}");
            let sum = |of: fn(&AdamW) -> &Vec<f32>| -> Vec<f32> {
                (0..len).map(|i| optimisers.iter().map(|o| of(o)[i]).sum()).collect()
            };
            // Learners share no parameter, so the other one's moment is 0.
            assert_eq!(read_full(&gpu, m.all()), sum(|o| &o.m));
            assert_eq!(read_full(&gpu, v.all()), sum(|o| &o.v));
            let rounded: Vec<f32> =
                expect.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
            assert_eq!(read(&gpu, shadow.all()), rounded);
            let left = read_full(&gpu, grads.all());
            let zero =
                |range: &std::ops::Range<usize>| left[range.clone()].iter().all(|g| *g == 0.0);
            assert!(groups.iter().flatten().all(|group| zero(&group.range)) && left[20_001] != 0.0);
        }
        assert_eq!(gpu.download(updates.made_i.all()).unwrap(), [3, 3]);
        assert_eq!(gpu.download(updates.skipped_i.all()).unwrap(), [1, 1]);
    }
}
