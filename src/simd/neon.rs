//! Vectors of NEON, each in four registers.
//!
//! All processors of the target have it: closures are compiled for it like all else.

#![expect(unsafe_code, reason = "intrinsics")]
#![expect(clippy::undocumented_unsafe_blocks, reason = "one condition for all, stated above the implementation")]

use std::arch::aarch64::{
    float32x4_t, int8x16_t, uint8x16_t, uint32x4_t, vaddq_f32, vaddq_s32, vaddvq_f32, vandq_u8, vandq_u32, vbslq_f32,
    vceqq_u32, vcgeq_s32, vcgtq_f32, vcleq_s32, vcltq_f32, vcvtq_f32_s32, vcvtq_s32_f32, vdupq_n_f32, vdupq_n_s32,
    vdupq_n_u8, vdupq_n_u32, vfmaq_f32, vget_low_s8, vmaxnmq_f32, vmaxnmvq_f32, vmaxq_u32, vmlal_high_s8, vmlal_s8,
    vmull_high_s8, vmull_s8, vmulq_f32, vorrq_u32, vpadalq_s16, vpaddq_s16, vqtbl1q_u8, vreinterpretq_f32_s32,
    vreinterpretq_f32_u32, vreinterpretq_s32_u32, vreinterpretq_u8_u32, vreinterpretq_u32_u8, vshlq_n_s32, vshlq_n_u32,
    vshlq_u32, vshrq_n_s32, vshrq_n_u8, vsubq_s32, vtrn1q_u8, vtrn1q_u32, vtrn1q_u64, vtrn2q_u8, vtrn2q_u32,
    vtrn2q_u64,
};
use std::array::from_fn;

use zerocopy::transmute;

use super::plain::{DOUBLED_E2M1, E2M1_BYTES, Plain};
use super::vectors::Vectors;

/// NEON.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon;

// SAFETY of all blocks below: every processor of the target has the instructions, and none of them touches memory.
impl Vectors for Neon {
    type Floats = [float32x4_t; 4];
    type Words = [uint32x4_t; 4];
    const HAS_MANY_REGISTERS: bool = false;
    const HAS_BF16_DOT: bool = false;

    #[inline(always)]
    fn zero(self) -> [float32x4_t; 4] {
        self.splat(0.0)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [float32x4_t; 4] {
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn splat_words(self, word: u32) -> [uint32x4_t; 4] {
        unsafe { [vdupq_n_u32(word); 4] }
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; 16]) -> [float32x4_t; 4] {
        transmute!(*values)
    }

    #[inline(always)]
    fn store_f32(self, values: [float32x4_t; 4]) -> [f32; 16] {
        transmute!(values)
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; 64]) -> [uint32x4_t; 4] {
        transmute!(*bytes)
    }

    #[inline(always)]
    fn load_words(self, words: &[u32; 16]) -> [uint32x4_t; 4] {
        transmute!(*words)
    }

    #[inline(always)]
    fn store_bf16(self, words: [uint32x4_t; 4]) -> [u16; 32] {
        transmute!(words)
    }

    #[inline(always)]
    fn transpose(self, rows: [[uint32x4_t; 4]; 16]) -> [[uint32x4_t; 4]; 16] {
        let mut columns = rows;
        for block in 0..4 {
            for quarter in 0..4 {
                let part = transpose(from_fn(|row| rows[4 * block + row][quarter]));
                for (column, part) in columns[4 * quarter..].iter_mut().zip(part) {
                    column[block] = part;
                }
            }
        }
        columns
    }

    #[inline(always)]
    fn add(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { from_fn(|i| vaddq_f32(a[i], b[i])) }
    }

    #[inline(always)]
    fn mul(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { from_fn(|i| vmulq_f32(a[i], b[i])) }
    }

    #[inline(always)]
    fn mul_add(self, a: [float32x4_t; 4], b: [float32x4_t; 4], c: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }

    #[inline(always)]
    fn min(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { from_fn(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i])) }
    }

    #[inline(always)]
    fn max(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }

    #[inline(always)]
    fn scale(self, a: [float32x4_t; 4], n: [float32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe {
            from_fn(|i| {
                // Two factors, for one might not be a float. The first product is exact.
                let n = vcvtq_s32_f32(n[i]);
                let half = vshrq_n_s32::<1>(n);
                let power_of_two = |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
                vmulq_f32(vmulq_f32(a[i], power_of_two(half)), power_of_two(vsubq_s32(n, half)))
            })
        }
    }

    #[inline(always)]
    fn sum(self, a: [float32x4_t; 4]) -> f32 {
        unsafe { vaddvq_f32(vaddq_f32(vaddq_f32(a[0], a[1]), vaddq_f32(a[2], a[3]))) }
    }

    #[inline(always)]
    fn largest(self, a: [float32x4_t; 4]) -> f32 {
        let [low, high] = [[a[0], a[1]], [a[2], a[3]]].map(|[a, b]| unsafe { vmaxnmq_f32(a, b) });
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(low, high)) }
    }

    #[inline(always)]
    fn within(self, values: [float32x4_t; 4], positions: [uint32x4_t; 4], first: i32, last: i32) -> [float32x4_t; 4] {
        from_fn(|i| unsafe {
            let position = vreinterpretq_s32_u32(positions[i]);
            let is_within = vandq_u32(vcgeq_s32(position, vdupq_n_s32(first)), vcleq_s32(position, vdupq_n_s32(last)));
            vbslq_f32(is_within, values[i], vdupq_n_f32(f32::NEG_INFINITY))
        })
    }

    #[inline(always)]
    fn floats(self, words: [uint32x4_t; 4]) -> [float32x4_t; 4] {
        transmute!(words)
    }

    #[inline(always)]
    fn e2m1_pair(self, codes: [uint32x4_t; 4], number: u32) -> [[float32x4_t; 4]; 2] {
        let values = codes.map(|codes| e2m1_bf16(codes, number));
        [self.bf16_even(values), self.bf16_odd(values)]
    }

    #[inline(always)]
    fn e2m1_bf16(self, codes: [uint32x4_t; 4], shift: u32) -> [uint32x4_t; 4] {
        codes.map(|codes| e2m1_bf16(codes, shift / 4))
    }

    #[inline(always)]
    fn e8m0(self, scales: [uint32x4_t; 4], shift: u32) -> [float32x4_t; 4] {
        unsafe {
            let right = vdupq_n_s32(-shift.cast_signed());
            scales.map(|scales| {
                let bytes = vandq_u32(vshlq_u32(scales, right), vdupq_n_u32(0xff));
                let nan = vceqq_u32(bytes, vdupq_n_u32(0xff));
                let factors = vmaxq_u32(vshlq_n_u32::<23>(bytes), vdupq_n_u32(1 << 22));
                vreinterpretq_f32_u32(vorrq_u32(factors, nan))
            })
        }
    }

    #[inline(always)]
    fn e8m0_normal(self, scales: u32) -> [float32x4_t; 4] {
        unsafe { scales.to_le_bytes().map(|byte| vreinterpretq_f32_u32(vdupq_n_u32(u32::from(byte) << 23))) }
    }

    /// Not used: bfloat16 is converted to f32.
    #[inline(always)]
    fn exponents(self, scales: [uint32x4_t; 4], shift: u32) -> [uint32x4_t; 4] {
        transmute!(Plain.exponents(transmute!(scales), shift))
    }

    /// Not used, as above.
    #[inline(always)]
    fn add_exponents(
        self,
        values: [uint32x4_t; 4],
        codes: [uint32x4_t; 4],
        shift: u32,
        exponents: [uint32x4_t; 4],
    ) -> [uint32x4_t; 4] {
        transmute!(Plain.add_exponents(transmute!(values), transmute!(codes), shift, transmute!(exponents)))
    }

    #[inline(always)]
    fn e2m1_bytes(self, codes: [uint32x4_t; 4]) -> [[uint32x4_t; 4]; 2] {
        let table: uint8x16_t = transmute!(DOUBLED_E2M1);
        let low = codes.map(|codes| unsafe { vqtbl1q_u8(table, vandq_u8(transmute!(codes), vdupq_n_u8(0xf))) });
        let high = codes.map(|codes| unsafe { vqtbl1q_u8(table, vshrq_n_u8::<4>(transmute!(codes))) });
        [transmute!(low), transmute!(high)]
    }

    #[inline(always)]
    fn dot_bytes<const S: usize>(
        self,
        unsigned: [[uint32x4_t; 4]; S],
        signed: [[uint32x4_t; 4]; S],
        sums: [uint32x4_t; 4],
    ) -> [uint32x4_t; 4] {
        from_fn(|quarter| unsafe {
            // Four products of at most 24 * 127, and twice that, are less than 16 bits hold.
            let (a, b): (int8x16_t, int8x16_t) = (transmute!(unsigned[0][quarter]), transmute!(signed[0][quarter]));
            let (mut low, mut high) = (vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
            for step in 1..S {
                let (a, b) = (transmute!(unsigned[step][quarter]), transmute!(signed[step][quarter]));
                (low, high) = (vmlal_s8(low, vget_low_s8(a), vget_low_s8(b)), vmlal_high_s8(high, a, b));
            }
            transmute!(vpadalq_s16(transmute!(sums[quarter]), vpaddq_s16(low, high)))
        })
    }

    #[inline(always)]
    fn floats_of_ints(self, ints: [uint32x4_t; 4]) -> [float32x4_t; 4] {
        ints.map(|ints| unsafe { vcvtq_f32_s32(transmute!(ints)) })
    }

    #[inline(always)]
    fn bf16_even(self, words: [uint32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { words.map(|words| vreinterpretq_f32_u32(vshlq_n_u32::<16>(words))) }
    }

    #[inline(always)]
    fn bf16_odd(self, words: [uint32x4_t; 4]) -> [float32x4_t; 4] {
        unsafe { words.map(|words| vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff_0000)))) }
    }

    /// Nothing: the instruction is not to be had in stable Rust.
    #[inline(always)]
    fn prefetch(self, _: &[u8], _: usize) {}
}

/// As bfloat16 the values of the codes in bits 4 `number` .. of each 16-bit lane, `number` below 4.
#[inline(always)]
fn e2m1_bf16(codes: uint32x4_t, number: u32) -> uint32x4_t {
    unsafe {
        let codes = vreinterpretq_u8_u32(codes);
        let nibbles = if number.is_multiple_of(2) { vandq_u8(codes, vdupq_n_u8(0xf)) } else { vshrq_n_u8::<4>(codes) };
        let [low, high] = E2M1_BYTES.map(|bytes| -> uint8x16_t { vqtbl1q_u8(transmute!(bytes), nibbles) });
        // Bytes of both in turn: those of even places, or of odd ones.
        vreinterpretq_u32_u8(if number < 2 { vtrn1q_u8(low, high) } else { vtrn2q_u8(low, high) })
    }
}

/// Lane j of register i becomes lane i of register j.
#[inline(always)]
fn transpose([a, b, c, d]: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
    // SAFETY: as above.
    unsafe {
        let (even, odd) = ([vtrn1q_u32(a, b), vtrn1q_u32(c, d)], [vtrn2q_u32(a, b), vtrn2q_u32(c, d)]);
        let low = |[a, b]: [uint32x4_t; 2]| transmute!(vtrn1q_u64(transmute!(a), transmute!(b)));
        let high = |[a, b]: [uint32x4_t; 2]| transmute!(vtrn2q_u64(transmute!(a), transmute!(b)));
        [low(even), low(odd), high(even), high(odd)]
    }
}
