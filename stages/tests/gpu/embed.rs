//! Embedding against the f32 code: rare and frequent tokens, runs that end with pieces or do not.

use stages::gpu::ops::embed;
use stages::ops;

use crate::support::{close, devices, full, half, normal, poison, read, read_full, same};

#[test]
fn gathers_rows_and_adds_their_gradients() {
    let frequent = |i: usize| if i.is_multiple_of(2) { 5 } else { i * 31 % 40 };
    type Case<'a> = (usize, usize, &'a dyn Fn(usize) -> usize);
    let cases: [Case; 5] = [
        (1, 8, &|_| 3),
        (130, 72, &|i| i * 17 % 40),
        (700, 40, &frequent),
        (515, 24, &|_| 39),
        (640, 2568, &|i| i / 128),
    ];
    let v = 40;
    for (n, d, id) in cases {
        let ids: Vec<u32> = (0..n).map(|i| id(i) as u32).collect();
        let (w, dx, old) = (normal(1, v * d, 1.0), normal(2, n * d, 1.0), normal(3, v * d, 1.0));
        let (mut x, mut dw) = (vec![0.0; n * d], old.clone());
        ops::embed::forward(d, &ids, &w, &mut x);
        ops::embed::backward(d, &ids, &dx, &mut dw);
        let results: Vec<_> = devices()
            .iter()
            .map(|gpu| {
                let (gw, gdx, gdw) = (half(gpu, &w), half(gpu, &dx), full(gpu, &old));
                let gids = gpu.buf("test", &ids).unwrap();
                let order = gpu.buf("test", &embed::order(&ids)).unwrap();
                let (gx, partial) = (poison(gpu, n * d), poison(gpu, embed::partial(n, d)));
                embed::forward(gpu, (n, d, v), gids.all(), gw.all(), gx.all());
                let by = (gids.all(), order.all());
                embed::backward(gpu, (n, d, v), by, gdx.all(), partial.all(), gdw.all());
                assert_eq!(read(gpu, gx.all()), x);
                let got = read_full(gpu, gdw.all());
                close("dw", &got, &dw, 1e-5);
                got
            })
            .collect();
        same("dw", &results);
    }
}
