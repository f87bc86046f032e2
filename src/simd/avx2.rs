//! Vectors of AVX2, each in two registers.

#![expect(unsafe_code, reason = "intrinsics, which the processor must have")]
#![expect(clippy::undocumented_unsafe_blocks, reason = "one condition for all, stated above the implementation")]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T0, _mm_add_ps, _mm_cvtsi32_si128, _mm_max_ps, _mm_prefetch, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_blendv_epi8, _mm256_blendv_ps, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_cmpeq_epi32, _mm256_cmpgt_epi32, _mm256_cvtepi32_ps, _mm256_cvtps_epi32,
    _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_maskload_epi32,
    _mm256_max_epi32, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_permute2x128_si256,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_shuffle_epi8,
    _mm256_slli_epi16, _mm256_slli_epi32, _mm256_srai_epi32, _mm256_srl_epi32, _mm256_srli_epi16, _mm256_sub_epi32,
    _mm256_unpackhi_epi8, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi8, _mm256_unpacklo_epi32,
    _mm256_unpacklo_epi64,
};
use std::hint::black_box;

use zerocopy::transmute;

use super::plain::{DOUBLED_E2M1, E2M1_BYTES, Plain};
use super::vectors::Vectors;

/// AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2 {
    /// Ones in the upper half of each 32-bit lane. A compiler that knows a mask makes blends of `vpand`, which fewer units of
    /// a processor can do, those that shuffle.
    high_halves: __m256i,
}

impl Avx2 {
    /// # Safety
    /// The processor must have these instructions.
    pub(super) unsafe fn new() -> Self {
        Self { high_halves: transmute!(black_box([-1 << 16; 8])) }
    }
}

/// For `vpshufb` within each half of registers that hold four scale bytes over and over: byte 0, 1, 2 or 3 of them as the
/// lowest of each lane of a half. A negative index gives zero.
const SPREAD: [[i8; 32]; 2] = {
    let mut indices = [[-1; 32]; 2];
    let mut byte = 0;
    while byte < 64 {
        #[expect(clippy::cast_possible_truncation, reason = "0 .. 4")]
        {
            indices[byte / 32][byte % 32] = (byte / 16) as i8;
        }
        byte += 4;
    }
    indices
};

/// For `vpshufb`: of every four bytes the first two to the lower half, the last two to the upper one, so that unpacking
/// either gives a word to each lane.
const PAIRS: [i8; 16] = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15];

// SAFETY of all blocks below: a value of the type exists only where the processor has the instructions. None of them
// touches memory, but `_mm_prefetch`, which reads nothing and takes any address, and the one in `load_first_words`.
//
// No closures around them: those would not be compiled for these instructions.
impl Vectors for Avx2 {
    type Floats = [__m256; 2];
    type Words = [__m256i; 2];
    const HAS_MANY_REGISTERS: bool = false;
    const HAS_BF16_DOT: bool = false;

    #[inline(always)]
    fn zero(self) -> [__m256; 2] {
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; 16]) -> [__m256; 2] {
        transmute!(*values)
    }

    #[inline(always)]
    fn store_f32(self, values: [__m256; 2]) -> [f32; 16] {
        transmute!(values)
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; 64]) -> [__m256i; 2] {
        transmute!(*bytes)
    }

    #[inline(always)]
    fn load_part(self, bytes: &[u8]) -> [__m256i; 2] {
        let (words, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            let mut whole = [0; 64];
            whole[..bytes.len()].copy_from_slice(bytes);
            return self.load(&whole);
        }
        [load_first_words(self, words), load_first_words(self, words.get(8..).unwrap_or_default())]
    }

    #[inline(always)]
    fn load_words(self, words: &[u32; 16]) -> [__m256i; 2] {
        transmute!(*words)
    }

    #[inline(always)]
    fn store_bf16(self, words: [__m256i; 2]) -> [u16; 32] {
        transmute!(words)
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn min(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn scale(self, a: [__m256; 2], n: [__m256; 2]) -> [__m256; 2] {
        [scale(self, a[0], n[0]), scale(self, a[1], n[1])]
    }

    #[inline(always)]
    fn sum(self, a: [__m256; 2]) -> f32 {
        let quarters: [f32; 4] = unsafe {
            let half = _mm256_add_ps(a[0], a[1]);
            transmute!(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half)))
        };
        (quarters[0] + quarters[2]) + (quarters[1] + quarters[3])
    }

    #[inline(always)]
    fn largest(self, a: [__m256; 2]) -> f32 {
        let quarters: [f32; 4] = unsafe {
            let half = _mm256_max_ps(a[0], a[1]);
            transmute!(_mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half)))
        };
        quarters[0].max(quarters[2]).max(quarters[1].max(quarters[3]))
    }

    #[inline(always)]
    fn within(self, values: [__m256; 2], positions: [__m256i; 2], first: i32, last: i32) -> [__m256; 2] {
        [within(self, values[0], positions[0], first, last), within(self, values[1], positions[1], first, last)]
    }

    #[inline(always)]
    fn floats(self, words: [__m256i; 2]) -> [__m256; 2] {
        unsafe { [_mm256_castsi256_ps(words[0]), _mm256_castsi256_ps(words[1])] }
    }

    #[inline(always)]
    fn e2m1_pair(self, codes: [__m256i; 2], number: u32) -> [[__m256; 2]; 2] {
        let values = [e2m1_bf16(self, codes[0], number), e2m1_bf16(self, codes[1], number)];
        [self.bf16_even(values), self.bf16_odd(values)]
    }

    #[inline(always)]
    fn e2m1_dot<const M: usize>(self, codes: [__m256i; 2], values: [&[[f32; 16]; 8]; M]) -> [[__m256; 2]; M] {
        let mut sums = [self.zero(); M];
        for half in 0..2 {
            let dots = e2m1_dot(self, codes[half], half, values);
            for m in 0..M {
                sums[m][half] = dots[m];
            }
        }
        sums
    }

    /// Not used: bfloat16 is converted to f32.
    #[inline(always)]
    fn e2m1_bf16(self, codes: [__m256i; 2], shift: u32) -> [__m256i; 2] {
        transmute!(Plain.e2m1_bf16(transmute!(codes), shift))
    }

    #[inline(always)]
    fn splat_words(self, word: u32) -> [__m256i; 2] {
        unsafe { [_mm256_set1_epi32(word.cast_signed()); 2] }
    }

    #[inline(always)]
    fn transpose(self, rows: [[__m256i; 2]; 16]) -> [[__m256i; 2]; 16] {
        let mut columns = rows;
        for half in 0..2 {
            let mut high = [rows[0][half]; 8];
            let mut low = high;
            for row in 0..8 {
                (low[row], high[row]) = (rows[row][half], rows[8 + row][half]);
            }
            let (low, high) = (transpose(self, low), transpose(self, high));
            for column in 0..8 {
                columns[8 * half + column] = [low[column], high[column]];
            }
        }
        columns
    }

    #[inline(always)]
    fn e8m0(self, scales: [__m256i; 2], shift: u32) -> [__m256; 2] {
        [e8m0(self, scales[0], shift), e8m0(self, scales[1], shift)]
    }

    #[inline(always)]
    fn e8m0_normal(self, scales: u32) -> [__m256; 2] {
        unsafe {
            let scales = _mm256_set1_epi32(scales.cast_signed());
            let (low, high) = (
                _mm256_shuffle_epi8(scales, transmute!(SPREAD[0])),
                _mm256_shuffle_epi8(scales, transmute!(SPREAD[1])),
            );
            [_mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high))]
        }
    }

    /// Not used, as above.
    #[inline(always)]
    fn exponents(self, scales: [__m256i; 2], shift: u32) -> [__m256i; 2] {
        transmute!(Plain.exponents(transmute!(scales), shift))
    }

    /// Not used, as above.
    #[inline(always)]
    fn add_exponents(
        self,
        values: [__m256i; 2],
        codes: [__m256i; 2],
        shift: u32,
        exponents: [__m256i; 2],
    ) -> [__m256i; 2] {
        transmute!(Plain.add_exponents(transmute!(values), transmute!(codes), shift, transmute!(exponents)))
    }

    #[inline(always)]
    fn e2m1_bytes(self, codes: [__m256i; 2]) -> [[__m256i; 2]; 2] {
        unsafe {
            let (mask, table) = (_mm256_set1_epi8(0xf), transmute!([DOUBLED_E2M1; 2]));
            let mut bytes = [codes; 2];
            for half in 0..2 {
                bytes[0][half] = _mm256_shuffle_epi8(table, _mm256_and_si256(codes[half], mask));
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes[half]), mask);
                bytes[1][half] = _mm256_shuffle_epi8(table, high);
            }
            bytes
        }
    }

    #[inline(always)]
    fn dot_bytes<const S: usize>(
        self,
        unsigned: [[__m256i; 2]; S],
        signed: [[__m256i; 2]; S],
        sums: [__m256i; 2],
    ) -> [__m256i; 2] {
        let mut sums = sums;
        for half in 0..2 {
            unsafe {
                // Four times two products of at most 24 * 127 are less than 16 bits hold.
                let mut pairs = _mm256_maddubs_epi16(unsigned[0][half], signed[0][half]);
                for step in 1..S {
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(unsigned[step][half], signed[step][half]));
                }
                sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
        sums
    }

    #[inline(always)]
    fn floats_of_ints(self, ints: [__m256i; 2]) -> [__m256; 2] {
        unsafe { [_mm256_cvtepi32_ps(ints[0]), _mm256_cvtepi32_ps(ints[1])] }
    }

    #[inline(always)]
    fn bf16_even(self, words: [__m256i; 2]) -> [__m256; 2] {
        unsafe {
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words[0])),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words[1])),
            ]
        }
    }

    #[inline(always)]
    fn bf16_odd(self, words: [__m256i; 2]) -> [__m256; 2] {
        unsafe {
            [
                _mm256_castsi256_ps(_mm256_and_si256(words[0], self.high_halves)),
                _mm256_castsi256_ps(_mm256_and_si256(words[1], self.high_halves)),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(self, bytes: &[u8], ahead: usize) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) }
    }
}

/// The first eight words, and zeros where there are fewer.
#[inline(always)]
fn load_first_words(_: Avx2, words: &[[u8; 4]]) -> __m256i {
    const LANES: [i32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
    let count = i32::try_from(words.len()).unwrap_or(i32::MAX);
    // SAFETY: as above. Only words of the slice are read.
    unsafe {
        let is_there = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), transmute!(LANES));
        _mm256_maskload_epi32(words.as_ptr().cast(), is_there)
    }
}

#[inline(always)]
fn scale(vectors: Avx2, a: __m256, n: __m256) -> __m256 {
    // SAFETY: as above.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        // Two factors, for one might not be a float. The first product is exact.
        let half = _mm256_srai_epi32::<1>(n);
        _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(vectors, half)), power_of_two(vectors, _mm256_sub_epi32(n, half)))
    }
}

/// 2^n for n in −126 ..= 127.
#[inline(always)]
fn power_of_two(_: Avx2, n: __m256i) -> __m256 {
    // SAFETY: as above.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)))) }
}

#[inline(always)]
fn within(_: Avx2, values: __m256, positions: __m256i, first: i32, last: i32) -> __m256 {
    // SAFETY: as above.
    unsafe {
        let is_before = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), positions);
        let is_behind = _mm256_cmpgt_epi32(positions, _mm256_set1_epi32(last));
        let is_out = _mm256_castsi256_ps(_mm256_or_si256(is_before, is_behind));
        _mm256_blendv_ps(values, _mm256_set1_ps(f32::NEG_INFINITY), is_out)
    }
}

/// How far to shift; constant where the caller's is.
#[inline(always)]
fn count(shift: u32) -> __m128i {
    // SAFETY: every processor of the target has it.
    unsafe { _mm_cvtsi32_si128(shift.cast_signed()) }
}

/// As bfloat16 the values of the codes in bits 4 `number` .. of each 16-bit lane, `number` below 4.
#[inline(always)]
fn e2m1_bf16(_: Avx2, codes: __m256i, number: u32) -> __m256i {
    // SAFETY: as above.
    unsafe {
        let nibbles = _mm256_and_si256(_mm256_srl_epi32(codes, count(number % 2 * 4)), _mm256_set1_epi8(0xf));
        let low = _mm256_shuffle_epi8(transmute!([E2M1_BYTES[0]; 2]), nibbles);
        let high = _mm256_shuffle_epi8(transmute!([E2M1_BYTES[1]; 2]), nibbles);
        let is_high = _mm256_set1_epi16(-1 << 8);
        if number < 2 {
            _mm256_blendv_epi8(low, _mm256_slli_epi16::<8>(high), is_high)
        } else {
            _mm256_blendv_epi8(_mm256_srli_epi16::<8>(low), high, is_high)
        }
    }
}

/// The products of all codes of eight lanes with the eighth values from 8 `half` on of each vector.
#[inline(always)]
fn e2m1_dot<const M: usize>(vectors: Avx2, codes: __m256i, half: usize, values: [&[[f32; 16]; 8]; M]) -> [__m256; M] {
    // SAFETY: as above.
    unsafe {
        let codes = _mm256_shuffle_epi8(codes, transmute!([PAIRS; 2]));
        let mask = _mm256_set1_epi8(0xf);
        let nibbles = [_mm256_and_si256(codes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask)];
        // A second sum where there is one column alone, so that fewer products wait for the one before.
        let other = usize::from(M == 1);
        let mut sums = [[_mm256_setzero_ps(); M]; 2];
        for (nibble, codes) in nibbles.into_iter().enumerate() {
            let low = _mm256_shuffle_epi8(transmute!([E2M1_BYTES[0]; 2]), codes);
            let high = _mm256_shuffle_epi8(transmute!([E2M1_BYTES[1]; 2]), codes);
            let pairs = [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)];
            for (number, words) in pairs.into_iter().enumerate() {
                let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words));
                let odd = _mm256_castsi256_ps(_mm256_and_si256(words, vectors.high_halves));
                let first = 4 * number + nibble;
                for m in 0..M {
                    let value = transmute!(values[m][first].as_chunks::<8>().0[half]);
                    sums[0][m] = _mm256_fmadd_ps(even, value, sums[0][m]);
                    let value = transmute!(values[m][first + 2].as_chunks::<8>().0[half]);
                    sums[other][m] = _mm256_fmadd_ps(odd, value, sums[other][m]);
                }
            }
        }
        if M == 1 {
            sums[0][0] = _mm256_add_ps(sums[0][0], sums[1][0]);
        }
        sums[0]
    }
}

#[inline(always)]
fn e8m0(_: Avx2, scales: __m256i, shift: u32) -> __m256 {
    // SAFETY: as above.
    unsafe {
        let bytes = _mm256_and_si256(_mm256_srl_epi32(scales, count(shift)), _mm256_set1_epi32(0xff));
        let exponents = _mm256_slli_epi32::<23>(bytes);
        let nan = _mm256_cmpeq_epi32(exponents, _mm256_set1_epi32(0xff << 23));
        let factors = _mm256_max_epi32(exponents, _mm256_set1_epi32(1 << 22));
        _mm256_castsi256_ps(_mm256_or_si256(factors, nan))
    }
}

/// Lane j of vector i becomes lane i of vector j.
#[inline(always)]
fn transpose(_: Avx2, rows: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: as above.
    unsafe {
        // Within halves: half h of vector 4 i + c holds column 4 h + c of rows 4 i .. 4 i + 4.
        let mut quads = rows;
        for quad in quads.as_chunks_mut::<4>().0 {
            let [a, b, c, d] = *quad;
            let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
            *quad = [
                _mm256_unpacklo_epi64(ab, cd),
                _mm256_unpackhi_epi64(ab, cd),
                _mm256_unpacklo_epi64(ab_high, cd_high),
                _mm256_unpackhi_epi64(ab_high, cd_high),
            ];
        }
        let mut columns = quads;
        for c in 0..4 {
            columns[c] = _mm256_permute2x128_si256::<0x20>(quads[c], quads[4 + c]);
            columns[4 + c] = _mm256_permute2x128_si256::<0x31>(quads[c], quads[4 + c]);
        }
        columns
    }
}
