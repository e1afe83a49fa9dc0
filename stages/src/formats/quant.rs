//! ggml's block-quantised types as f32. The layouts and the order of the operations are those of
//! llama.cpp (ggml/src/ggml-quants.c, `dequantize_row_*`; gguf-py, `quants.py`), so that values
//! are equal bit for bit. Knows no files.

use anyhow::{Result, bail};
use rayon::prelude::*;

/// A block-quantised type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum Quant {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

/// The sixteen levels of IQ4_NL and IQ4_XS.
const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Elements that one task decodes.
const TASK: usize = 1 << 14;

impl Quant {
    /// Its name in ggml.
    pub fn name(self) -> &'static str {
        match self {
            Quant::Q4_0 => "Q4_0",
            Quant::Q4_1 => "Q4_1",
            Quant::Q5_0 => "Q5_0",
            Quant::Q5_1 => "Q5_1",
            Quant::Q8_0 => "Q8_0",
            Quant::Q2_K => "Q2_K",
            Quant::Q3_K => "Q3_K",
            Quant::Q4_K => "Q4_K",
            Quant::Q5_K => "Q5_K",
            Quant::Q6_K => "Q6_K",
            Quant::IQ4_NL => "IQ4_NL",
            Quant::IQ4_XS => "IQ4_XS",
        }
    }

    /// Elements and bytes of one block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Quant::Q4_0 | Quant::IQ4_NL => (32, 18),
            Quant::Q4_1 => (32, 20),
            Quant::Q5_0 => (32, 22),
            Quant::Q5_1 => (32, 24),
            Quant::Q8_0 => (32, 34),
            Quant::Q2_K => (256, 84),
            Quant::Q3_K => (256, 110),
            Quant::Q4_K => (256, 144),
            Quant::Q5_K => (256, 176),
            Quant::Q6_K => (256, 210),
            Quant::IQ4_XS => (256, 136),
        }
    }

    /// Decodes whole blocks; `out` has exactly their elements.
    pub fn dequantise(self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        let (elements, size) = self.block();
        let blocks = bytes.len() / size;
        if !bytes.len().is_multiple_of(size) || blocks.checked_mul(elements) != Some(out.len()) {
            bail!("{} bytes of {} are not {} elements", bytes.len(), self.name(), out.len());
        }
        match self {
            Quant::Q4_0 => each(bytes, out, q4_0),
            Quant::Q4_1 => each(bytes, out, q4_1),
            Quant::Q5_0 => each(bytes, out, q5_0),
            Quant::Q5_1 => each(bytes, out, q5_1),
            Quant::Q8_0 => each(bytes, out, q8_0),
            Quant::Q2_K => each(bytes, out, q2_k),
            Quant::Q3_K => each(bytes, out, q3_k),
            Quant::Q4_K => each(bytes, out, q4_k),
            Quant::Q5_K => each(bytes, out, q5_k),
            Quant::Q6_K => each(bytes, out, q6_k),
            Quant::IQ4_NL => each(bytes, out, iq4_nl),
            Quant::IQ4_XS => each(bytes, out, iq4_xs),
        }
        Ok(())
    }
}

/// Runs `unpack` on every block of `B` bytes and `E` elements.
fn each<const B: usize, const E: usize>(
    bytes: &[u8],
    out: &mut [f32],
    unpack: fn(&[u8; B], &mut [f32; E]),
) {
    let blocks = TASK / E;
    bytes.par_chunks(blocks * B).zip(out.par_chunks_mut(blocks * E)).for_each(|(from, to)| {
        for (block, values) in from.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
            unpack(block, values);
        }
    });
}

/// The half-precision number at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half(block, 0);
    for (i, byte) in block[2..].iter().enumerate() {
        out[i] = scale * f32::from((byte & 15) as i8 - 8);
        out[i + 16] = scale * f32::from((byte >> 4) as i8 - 8);
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, min) = (half(block, 0), half(block, 2));
    for (i, byte) in block[4..].iter().enumerate() {
        out[i] = scale * f32::from(byte & 15) + min;
        out[i + 16] = scale * f32::from(byte >> 4) + min;
    }
}

/// The 5-bit numbers i and i + 16 of a block: four low bits each, and a word of fifth bits.
fn five(low: &[u8], high: [u8; 4], i: usize) -> (u8, u8) {
    let high = u32::from_le_bytes(high) >> i;
    ((low[i] & 15) | ((high & 1) << 4) as u8, (low[i] >> 4) | ((high >> 16 & 1) << 4) as u8)
}

fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half(block, 0);
    let high = [block[2], block[3], block[4], block[5]];
    for i in 0..16 {
        let (a, b) = five(&block[6..], high, i);
        out[i] = scale * f32::from(a as i8 - 16);
        out[i + 16] = scale * f32::from(b as i8 - 16);
    }
}

fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, min) = (half(block, 0), half(block, 2));
    let high = [block[4], block[5], block[6], block[7]];
    for i in 0..16 {
        let (a, b) = five(&block[8..], high, i);
        out[i] = scale * f32::from(a) + min;
        out[i + 16] = scale * f32::from(b) + min;
    }
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half(block, 0);
    for (to, &byte) in out.iter_mut().zip(&block[2..]) {
        *to = f32::from(byte as i8) * scale;
    }
}

/// Number `i` of 256 two-bit ones: 128 lie in 32 bytes, 32 at each shift.
fn two(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// 16 bytes of scale (low) and minimum (high), 64 bytes of levels, scale and minimum of all.
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scale, min) = (half(block, 80), half(block, 82));
    for (part, to) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = scale * f32::from(block[part] & 15);
        let min = min * f32::from(block[part] >> 4);
        for (i, to) in to.iter_mut().enumerate() {
            *to = scale * f32::from(two(&block[16..80], part * 16 + i)) - min;
        }
    }
}

/// 32 bytes of third bits (inverted), 64 of low bits, sixteen 6-bit scales in 12, scale of all.
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let scale = half(block, 108);
    let packed = &block[96..108];
    for (part, to) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = packed[part % 8] >> (part / 8 * 4) & 15;
        let high = packed[8 + part % 4] >> (part / 4 * 2) & 3;
        let scale = scale * f32::from((low | high << 4) as i8 - 32);
        for (i, to) in to.iter_mut().enumerate() {
            let at = part * 16 + i;
            let below = if block[at % 32] >> (at / 32) & 1 == 0 { 4 } else { 0 };
            *to = scale * f32::from(two(&block[32..96], at) as i8 - below);
        }
    }
}

/// The 6-bit scale and minimum of part `i` of eight, packed into 12 bytes.
fn scale_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        let last = packed[i + 4];
        ((last & 15) | (packed[i - 4] >> 6) << 4, (last >> 4) | (packed[i] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, min) = (half(block, 0), half(block, 2));
    for (part, to) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (s, m) = scale_min(&block[4..16], part);
        let (scale, min) = (scale * s, min * m);
        let levels = &block[16 + part / 2 * 32..][..32];
        for (to, level) in to.iter_mut().zip(levels) {
            *to = scale * f32::from(level >> (part % 2 * 4) & 15) - min;
        }
    }
}

fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (scale, min) = (half(block, 0), half(block, 2));
    for (part, to) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (s, m) = scale_min(&block[4..16], part);
        let (scale, min) = (scale * s, min * m);
        let levels = &block[48 + part / 2 * 32..][..32];
        for ((to, level), high) in to.iter_mut().zip(levels).zip(&block[16..48]) {
            let level = level >> (part % 2 * 4) & 15 | (high >> part & 1) << 4;
            *to = scale * f32::from(level) - min;
        }
    }
}

/// 128 bytes of low nibbles, 64 of high bits, sixteen 8-bit scales, scale of all.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = half(block, 208);
    for (part, to) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = scale * f32::from(block[192 + part] as i8);
        for (i, to) in to.iter_mut().enumerate() {
            let at = part * 16 + i;
            let low = block[at / 128 * 64 + at % 64] >> (at % 128 / 64 * 4) & 15;
            let level = low | two(&block[128..192], at) << 4;
            *to = scale * f32::from(level as i8 - 32);
        }
    }
}

fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half(block, 0);
    for (i, byte) in block[2..].iter().enumerate() {
        out[i] = scale * f32::from(LEVELS[usize::from(byte & 15)]);
        out[i + 16] = scale * f32::from(LEVELS[usize::from(byte >> 4)]);
    }
}

/// Scale of all, eight pairs of high bits, eight nibbles of low bits, 128 bytes of levels.
fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let scale = half(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (part, to) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = block[4 + part / 2] >> (part % 2 * 4) & 15;
        let part_scale = (low | ((high >> (part * 2) & 3) << 4) as u8) as i8 - 32;
        let scale = scale * f32::from(part_scale);
        for (i, byte) in block[8 + part * 16..][..16].iter().enumerate() {
            to[i] = scale * f32::from(LEVELS[usize::from(byte & 15)]);
            to[i + 16] = scale * f32::from(LEVELS[usize::from(byte >> 4)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_by_hand() {
        // Scale 0.5, minimum -1; level 3 in every low nibble, 15 in every high one.
        let mut block = vec![0x00, 0x38, 0x00, 0xbc];
        block.extend([0xf3; 16]);
        let mut out = [0.0; 32];
        Quant::Q4_1.dequantise(&block, &mut out).unwrap();
        assert_eq!((out[0], out[15], out[16], out[31]), (0.5, 0.5, 6.5, 6.5));
        let wrong = Quant::Q4_1.dequantise(&block[1..], &mut out).unwrap_err().to_string();
        assert_eq!(wrong, "19 bytes of Q4_1 are not 32 elements");
        assert!(Quant::Q4_1.dequantise(&block, &mut out[1..]).is_err());
    }

    #[test]
    fn tasks_do_not_change_values() {
        let (elements, size) = Quant::Q6_K.block();
        let bytes: Vec<u8> = (0..size * 200).map(|i| (i * 37 % 101) as u8).collect();
        let mut all = vec![0.0; elements * 200];
        Quant::Q6_K.dequantise(&bytes, &mut all).unwrap();
        for (block, values) in bytes.chunks(size).zip(all.chunks(elements)) {
            let mut one = vec![0.0; elements];
            Quant::Q6_K.dequantise(block, &mut one).unwrap();
            assert_eq!(one, values);
        }
    }
}
