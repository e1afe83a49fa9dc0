//! Casts, and rows by number.

use half::bf16;
use stages::gpu::ops::cast::{gather_rows, to_bf16, to_f32};
use stages::train::philox::Philox;

use crate::support::{devices, full, half, normal, poison, read, read_full};

#[test]
fn casts_round_to_nearest() {
    for n in [1, 7, 8, 5003] {
        let mut x = vec![0.0; n];
        Philox::new(1, "cast").fill_normal(1.0, &mut x);
        let wanted: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        for gpu in devices() {
            let (gx, narrow, back) = (full(&gpu, &x), poison(&gpu, n), poison(&gpu, n));
            to_bf16(&gpu, gx.all(), narrow.all());
            to_f32(&gpu, narrow.all(), back.all());
            assert_eq!(read(&gpu, narrow.all()), wanted);
            assert_eq!(read_full(&gpu, back.all()), wanted);
        }
    }
}

#[test]
fn rows_by_number() {
    let (d, wide, narrow) = (40, 56, 48);
    let x = normal(1, 20 * wide, 1.0);
    let index: Vec<u32> = (0..37).map(|i| i * 7 % 20).collect();
    for gpu in devices() {
        let (gx, out) = (half(&gpu, &x), poison(&gpu, 37 * narrow));
        let numbers = gpu.buf("numbers", &index).unwrap();
        gather_rows(&gpu, d, (gx.all(), wide), numbers.all(), (out.all(), narrow));
        for (row, number) in read(&gpu, out.all()).chunks(narrow).zip(&index) {
            assert_eq!(row[..d], x[*number as usize * wide..][..d]);
            assert!(row[d..].iter().all(|v| v.is_nan()), "written beyond the columns");
        }
    }
}
