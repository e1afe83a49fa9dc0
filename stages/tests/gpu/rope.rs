//! Rotary positions against the CPU's.

use stages::gpu::ops::rope::{Positions, Table, rope};
use stages::ops::rope as cpu;

use crate::support::{close, devices, full, half, normal, read, same};

#[test]
fn turns_there_and_back() {
    // (batch, seq, heads, dim, rotary, first position, back)
    let cases = [
        (3, 37, 4, 64, 64, 0, false),
        (1, 5, 2, 64, 32, 11, true),
        (2, 9, 1, 32, 12, 0, false),
        (1, 1, 3, 128, 128, 3, false),
    ];
    for (batch, seq, heads, dim, rotary, first, back) in cases {
        let (n, stride) = (batch * seq, heads * dim + 40);
        let frequencies = cpu::Rope { dim, rotary, theta: 1e4, scaling: None }.frequencies();
        let positions = first + seq;
        let angles = |of: fn(f64) -> f64| -> Vec<f32> {
            let angle =
                |i: usize| (i / frequencies.len()) as f64 * frequencies[i % frequencies.len()];
            (0..positions * frequencies.len()).map(|i| of(angle(i)) as f32).collect()
        };
        let x = normal(1, n * stride, 1.0);
        let mut wanted = x.clone();
        let table = cpu::Table::with(first, seq, dim, &frequencies);
        table.rotate(&mut wanted, stride, heads, seq, back);
        // The same positions twice: from the host's number and from the device's.
        let mut results = Vec::new();
        for gpu in devices() {
            let (cos, sin) = (full(&gpu, &angles(f64::cos)), full(&gpu, &angles(f64::sin)));
            let before = gpu.buf("test", &vec![first as i32; batch]).unwrap();
            let table = Table { cos: cos.all(), sin: sin.all(), dim, rotary };
            for positions in [
                Positions { seq, first, before: None },
                Positions { seq, first: 0, before: Some((before.all(), 1)) },
            ] {
                let qkv = half(&gpu, &x);
                rope(&gpu, (qkv.all(), stride), n, heads, table, positions, back);
                results.push(read(&gpu, qkv.all()));
            }
        }
        close("turned", &results[0], &wanted, 1e-2);
        same("turned", &results);
    }
}
