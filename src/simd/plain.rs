//! Vectors as plain arrays: for processors without others, and the oracle of those.

use super::Vectors;
use crate::mxfp4::E2M1;

/// The low and the high bytes of the sixteen values as bfloat16, for instructions that look up bytes.
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    expect(dead_code, reason = "no such instructions")
)]
pub(super) const E2M1_BYTES: [[u8; 16]; 2] = {
    let mut bytes = [[0; 16]; 2];
    let mut code = 0;
    while code < 16 {
        [_, _, bytes[0][code], bytes[1][code]] = E2M1[code].to_bits().to_le_bytes();
        code += 1;
    }
    bytes
};

/// What is added to twice a value of E2M1, all of which are integers within ±12, to make it an unsigned byte.
pub(crate) const E2M1_BIAS: i32 = 12;

/// Twice the sixteen values, biased.
pub(super) const DOUBLED_E2M1: [u8; 16] = {
    let mut bytes = [0; 16];
    let mut code = 0;
    while code < 16 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 .. 24")]
        {
            bytes[code] = ((2.0 * E2M1[code]) as i32 + E2M1_BIAS) as u8;
        }
        code += 1;
    }
    bytes
};

/// Arrays.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plain;

impl Vectors for Plain {
    type Floats = [f32; 16];
    type Words = [u32; 16];
    const HAS_MANY_REGISTERS: bool = false;
    const HAS_BF16_DOT: bool = false;

    #[inline(always)]
    fn zero(self) -> [f32; 16] {
        [0.0; 16]
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; 16]) -> [f32; 16] {
        *values
    }

    #[inline(always)]
    fn store_f32(self, values: [f32; 16]) -> [f32; 16] {
        values
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; 64]) -> [u32; 16] {
        let mut words = [0; 16];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }

    #[inline(always)]
    fn load_words(self, words: &[u32; 16]) -> [u32; 16] {
        *words
    }

    #[inline(always)]
    fn store_bf16(self, words: [u32; 16]) -> [u16; 32] {
        let mut halves = [0; 32];
        for (halves, word) in halves.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *halves = halves_of(word);
        }
        halves
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        // Without the instruction, rounding once takes a call for every lane.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
        } else {
            std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
        }
    }

    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| if a[lane] < b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn scale(self, a: [f32; 16], n: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| {
            // Two factors, for one might not be a float. The first product is exact.
            #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
            let n = n[lane] as i32;
            a[lane] * power_of_two(n >> 1) * power_of_two(n - (n >> 1))
        })
    }

    #[inline(always)]
    fn sum(self, a: [f32; 16]) -> f32 {
        let mut lanes = a;
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    fn largest(self, a: [f32; 16]) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |largest, lane| if lane > largest { lane } else { largest })
    }

    #[inline(always)]
    fn within(self, values: [f32; 16], positions: [u32; 16], first: i32, last: i32) -> [f32; 16] {
        std::array::from_fn(|lane| {
            let position = positions[lane].cast_signed();
            if first <= position && position <= last { values[lane] } else { f32::NEG_INFINITY }
        })
    }

    #[inline(always)]
    fn floats(self, words: [u32; 16]) -> [f32; 16] {
        words.map(f32::from_bits)
    }

    #[inline(always)]
    fn e2m1_pair(self, codes: [u32; 16], number: u32) -> [[f32; 16]; 2] {
        [0, 16].map(|half| codes.map(|word| E2M1[(word >> (half + 4 * number) & 0xf) as usize]))
    }

    #[inline(always)]
    fn e2m1_bf16(self, codes: [u32; 16], shift: u32) -> [u32; 16] {
        codes.map(|word| word_of(halves_of(word).map(|half| bf16(E2M1[usize::from(half >> shift & 0xf)]))))
    }

    #[inline(always)]
    fn splat_words(self, word: u32) -> [u32; 16] {
        [word; 16]
    }

    #[inline(always)]
    fn transpose(self, rows: [[u32; 16]; 16]) -> [[u32; 16]; 16] {
        let mut columns = [[0; 16]; 16];
        for (i, row) in rows.iter().enumerate() {
            for (column, word) in columns.iter_mut().zip(row) {
                column[i] = *word;
            }
        }
        columns
    }

    #[inline(always)]
    fn e8m0(self, scales: [u32; 16], shift: u32) -> [f32; 16] {
        scales.map(|scales| scale(byte(scales, shift)))
    }

    #[inline(always)]
    fn e8m0_normal(self, scales: u32) -> [f32; 16] {
        std::array::from_fn(|lane| scale(scales.to_le_bytes()[lane / 4]))
    }

    /// The scale bytes themselves.
    #[inline(always)]
    fn exponents(self, scales: [u32; 16], shift: u32) -> [u32; 16] {
        scales.map(|scales| u32::from(byte(scales, shift)))
    }

    /// Right for all bytes.
    #[inline(always)]
    fn add_exponents(self, values: [u32; 16], _: [u32; 16], _: u32, exponents: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|lane| {
            word_of(halves_of(values[lane]).map(|half| bf16(float(half) * scale(byte(exponents[lane], 0)))))
        })
    }

    #[inline(always)]
    fn e2m1_bytes(self, codes: [u32; 16]) -> [[u32; 16]; 2] {
        [0, 4].map(|shift| {
            codes.map(|word| {
                u32::from_le_bytes(word.to_le_bytes().map(|byte| DOUBLED_E2M1[usize::from(byte >> shift & 0xf)]))
            })
        })
    }

    #[inline(always)]
    fn dot_bytes<const S: usize>(self, unsigned: [[u32; 16]; S], signed: [[u32; 16]; S], sums: [u32; 16]) -> [u32; 16] {
        let mut sums = sums;
        for step in 0..S {
            for lane in 0..16 {
                let (a, b) = (unsigned[step][lane].to_le_bytes(), signed[step][lane].to_le_bytes());
                let products = [0, 1, 2, 3].map(|byte| i32::from(a[byte]) * i32::from(b[byte].cast_signed()));
                sums[lane] = sums[lane].wrapping_add_signed(products.into_iter().sum());
            }
        }
        sums
    }

    #[inline(always)]
    #[expect(clippy::cast_precision_loss, reason = "rounds, as it says")]
    fn floats_of_ints(self, ints: [u32; 16]) -> [f32; 16] {
        ints.map(|int| int.cast_signed() as f32)
    }

    #[inline(always)]
    fn bf16_even(self, words: [u32; 16]) -> [f32; 16] {
        words.map(|word| f32::from_bits(word << 16))
    }

    #[inline(always)]
    fn bf16_odd(self, words: [u32; 16]) -> [f32; 16] {
        words.map(|word| f32::from_bits(word & 0xffff_0000))
    }

    #[inline(always)]
    fn prefetch(self, _: &[u8], _: usize) {}
}

/// 2^(byte − 127), NaN for 255.
fn scale(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22), // subnormal
        u8::MAX => f32::NAN,
        byte => f32::from_bits(u32::from(byte) << 23),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "takes it apart")]
fn byte(word: u32, shift: u32) -> u8 {
    (word >> shift) as u8
}

/// 2^n for n in −126 ..= 127.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n + 127).cast_unsigned() << 23)
}

fn float(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// The upper half of a float whose lower half is zero, or that is NaN.
fn bf16(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

#[expect(clippy::cast_possible_truncation, reason = "takes it apart")]
fn halves_of(word: u32) -> [u16; 2] {
    [word as u16, (word >> 16) as u16]
}

fn word_of([even, odd]: [u16; 2]) -> u32 {
    u32::from(odd) << 16 | u32::from(even)
}
