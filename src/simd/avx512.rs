//! Vectors of AVX-512, each in one register.

#![expect(unsafe_code, reason = "intrinsics, which the processor must have")]
#![expect(clippy::undocumented_unsafe_blocks, reason = "one condition for all, stated above the implementation")]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_cvtsi32_si128, _mm_prefetch, _mm512_add_epi16, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cmpeq_epi32_mask, _mm512_cmpge_epi32_mask,
    _mm512_cvtepi32_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_madd_epi16,
    _mm512_maddubs_epi16, _mm512_mask_add_epi16, _mm512_mask_cmple_epi32_mask, _mm512_mask_mov_epi32,
    _mm512_mask_mov_ps, _mm512_maskz_loadu_epi8, _mm512_max_epi32, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_or_si512, _mm512_permutexvar_epi16, _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    _mm512_scalef_ps, _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_shuffle_epi8, _mm512_shuffle_i32x4, _mm512_slli_epi16, _mm512_slli_epi32, _mm512_srl_epi16,
    _mm512_srl_epi32, _mm512_srli_epi16, _mm512_sub_epi16, _mm512_test_epi16_mask, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use zerocopy::transmute;

use super::Vectors;
use super::plain::DOUBLED_E2M1;
use crate::mxfp4::E2M1;

/// AVX-512 F, BW, DQ and VL, FMA; with `DOTS`, its products of bfloat16 and those of bytes as well.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const DOTS: bool>(());

impl<const DOTS: bool> Avx512<DOTS> {
    /// # Safety
    /// The processor must have these instructions.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// The sixteen values as bfloat16, twice: `vpermw` looks at five bits of an index.
const E2M1_BF16: [u16; 32] = {
    let mut table = [0; 32];
    let mut code = 0;
    while code < 32 {
        table[code] = (E2M1[code % 16].to_bits() >> 16) as u16;
        code += 1;
    }
    table
};

/// For `vpshufb` within each quarter of a register that holds four scale bytes over and over: quarter i's byte i, as the
/// lowest byte of every lane. A negative index gives zero.
const SPREAD: [i8; 64] = {
    let mut indices = [-1; 64];
    let mut byte = 0;
    while byte < 64 {
        #[expect(clippy::cast_possible_truncation, reason = "0 .. 4")]
        {
            indices[byte] = (byte / 16) as i8;
        }
        byte += 4;
    }
    indices
};

// SAFETY of all blocks below: a value of the type exists only where the processor has the instructions. None of them
// touches memory, but `_mm_prefetch`, which reads nothing and takes any address, and the one in `load_part`.
impl<const DOTS: bool> Vectors for Avx512<DOTS> {
    type Floats = __m512;
    type Words = __m512i;
    const HAS_MANY_REGISTERS: bool = true;
    const HAS_BF16_DOT: bool = DOTS;

    #[inline(always)]
    fn zero(self) -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; 16]) -> __m512 {
        transmute!(*values)
    }

    #[inline(always)]
    fn store_f32(self, values: __m512) -> [f32; 16] {
        transmute!(values)
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; 64]) -> __m512i {
        transmute!(*bytes)
    }

    #[inline(always)]
    fn load_words(self, words: &[u32; 16]) -> __m512i {
        transmute!(*words)
    }

    #[inline(always)]
    fn store_bf16(self, words: __m512i) -> [u16; 32] {
        transmute!(words)
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn scale(self, a: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(a, n) }
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(a) }
    }

    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn within(self, values: __m512, positions: __m512i, first: i32, last: i32) -> __m512 {
        unsafe {
            let is_behind_first = _mm512_cmpge_epi32_mask(positions, _mm512_set1_epi32(first));
            let is_in = _mm512_mask_cmple_epi32_mask(is_behind_first, positions, _mm512_set1_epi32(last));
            _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), is_in, values)
        }
    }

    #[inline(always)]
    fn floats(self, words: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(words) }
    }

    #[inline(always)]
    fn e2m1_pair(self, codes: __m512i, number: u32) -> [__m512; 2] {
        // `vpermps` looks at four bits of an index.
        unsafe {
            [
                _mm512_permutexvar_ps(_mm512_srl_epi32(codes, count(4 * number)), transmute!(E2M1)),
                _mm512_permutexvar_ps(_mm512_srl_epi32(codes, count(4 * number + 16)), transmute!(E2M1)),
            ]
        }
    }

    #[inline(always)]
    fn e2m1_bf16(self, codes: __m512i, shift: u32) -> __m512i {
        unsafe { _mm512_permutexvar_epi16(_mm512_srl_epi16(codes, count(shift)), transmute!(E2M1_BF16)) }
    }

    #[inline(always)]
    fn load_part(self, bytes: &[u8]) -> __m512i {
        let mask = !(u64::MAX.checked_shl(bytes.len().try_into().unwrap_or(u32::MAX)).unwrap_or(0));
        // SAFETY: only bytes of the slice are read.
        unsafe { _mm512_maskz_loadu_epi8(mask, bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn splat_words(self, word: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(word.cast_signed()) }
    }

    #[inline(always)]
    fn transpose(self, rows: [__m512i; 16]) -> [__m512i; 16] {
        unsafe {
            // Within quarters: quarter q of vector 4 i + c holds column 4 q + c of rows 4 i .. 4 i + 4.
            let mut quads = rows;
            for quad in quads.as_chunks_mut::<4>().0 {
                let [a, b, c, d] = *quad;
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                *quad = [
                    _mm512_unpacklo_epi64(ab, cd),
                    _mm512_unpackhi_epi64(ab, cd),
                    _mm512_unpacklo_epi64(ab_high, cd_high),
                    _mm512_unpackhi_epi64(ab_high, cd_high),
                ];
            }
            // Then whole quarters.
            let mut columns = quads;
            for c in 0..4 {
                let (a, b, third, d) = (quads[c], quads[4 + c], quads[8 + c], quads[12 + c]);
                let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
                let (even_high, odd_high) =
                    (_mm512_shuffle_i32x4::<0x88>(third, d), _mm512_shuffle_i32x4::<0xdd>(third, d));
                columns[c] = _mm512_shuffle_i32x4::<0x88>(even, even_high);
                columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd_high);
                columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even_high);
                columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_high);
            }
            columns
        }
    }

    #[inline(always)]
    fn e8m0(self, scales: __m512i, shift: u32) -> __m512 {
        unsafe {
            let bytes = _mm512_and_si512(_mm512_srl_epi32(scales, count(shift)), _mm512_set1_epi32(0xff));
            let exponents = _mm512_slli_epi32::<23>(bytes);
            let nan = _mm512_cmpeq_epi32_mask(exponents, _mm512_set1_epi32(0xff << 23));
            let factors = _mm512_max_epi32(exponents, _mm512_set1_epi32(1 << 22));
            _mm512_castsi512_ps(_mm512_mask_mov_epi32(factors, nan, _mm512_set1_epi32(-1)))
        }
    }

    #[inline(always)]
    fn e8m0_normal(self, scales: u32) -> __m512 {
        unsafe {
            let bytes = _mm512_shuffle_epi8(_mm512_set1_epi32(scales.cast_signed()), transmute!(SPREAD));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(bytes))
        }
    }

    #[inline(always)]
    fn exponents(self, scales: __m512i, shift: u32) -> __m512i {
        unsafe {
            let bytes = _mm512_and_si512(_mm512_srl_epi32(scales, count(shift)), _mm512_set1_epi32(0xff));
            let both = _mm512_or_si512(bytes, _mm512_slli_epi32::<16>(bytes));
            _mm512_slli_epi16::<7>(_mm512_sub_epi16(both, _mm512_set1_epi16(127)))
        }
    }

    #[inline(always)]
    fn add_exponents(self, values: __m512i, codes: __m512i, shift: u32, exponents: __m512i) -> __m512i {
        unsafe {
            let magnitude = _mm512_set1_epi16(7 << shift);
            // Zero has no exponent to add to.
            _mm512_mask_add_epi16(values, _mm512_test_epi16_mask(codes, magnitude), values, exponents)
        }
    }

    #[inline(always)]
    fn e2m1_bytes(self, codes: __m512i) -> [__m512i; 2] {
        unsafe {
            let (mask, table) = (_mm512_set1_epi8(0xf), transmute!([DOUBLED_E2M1; 4]));
            let (low, high) = (_mm512_and_si512(codes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask));
            [_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high)]
        }
    }

    #[inline(always)]
    fn dot_bytes<const S: usize>(self, unsigned: [__m512i; S], signed: [__m512i; S], sums: __m512i) -> __m512i {
        let mut sums = sums;
        if DOTS {
            for step in 0..S {
                sums = unsafe { _mm512_dpbusd_epi32(sums, unsigned[step], signed[step]) };
            }
            return sums;
        }
        unsafe {
            // Four times two products of at most 24 * 127 are less than 16 bits hold.
            let mut pairs = _mm512_maddubs_epi16(unsigned[0], signed[0]);
            for step in 1..S {
                pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(unsigned[step], signed[step]));
            }
            _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn floats_of_ints(self, ints: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(ints) }
    }

    #[inline(always)]
    fn bf16_even(self, words: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)) }
    }

    #[inline(always)]
    fn bf16_odd(self, words: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-1 << 16))) }
    }

    #[inline(always)]
    fn bf16_dot(self, a: __m512i, b: __m512i, sum: __m512) -> __m512 {
        if DOTS {
            let (a, b): (__m512bh, __m512bh) = (transmute!(a), transmute!(b));
            return unsafe { _mm512_dpbf16_ps(sum, a, b) };
        }
        let sum = self.mul_add(self.bf16_odd(a), self.bf16_odd(b), sum);
        self.mul_add(self.bf16_even(a), self.bf16_even(b), sum)
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], ahead: usize) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) }
    }
}

/// How far to shift; constant where the caller's is.
#[inline(always)]
fn count(shift: u32) -> std::arch::x86_64::__m128i {
    // SAFETY: every processor of the target has it.
    unsafe { _mm_cvtsi32_si128(shift.cast_signed()) }
}
