//! Whole blocks of codes to floats: a table of every scale byte and code, read code by code or sixteen codes at once.

#[cfg(target_arch = "x86_64")]
use zerocopy::{IntoBytes, transmute};

use super::{BLOCK_BYTES, MX_BLOCK_SIZE, decode_one};
use crate::cast::{Counts, OnOverflow, Target};
use crate::simd::Level;

/// Decoded values of every scale byte and code, as bits of one target dtype.
#[derive(Debug)]
pub struct DecodeTable {
    target: Target,
    /// For each scale byte, the sixteen values of its codes.
    rows: Vec<Row>,
}

/// The values of the sixteen codes under one scale byte.
#[derive(Debug, Default)]
struct Row {
    /// Their bits.
    bits: [u32; 16],
    /// The same byte by byte, as shuffles look them up: the lowest byte of all values, then the next one.
    planes: [[u8; 16]; 4],
    /// Codes that overflow the target, as a bit set.
    overflow: u16,
    /// Codes that are not zero but decode to zero.
    underflow: u16,
}

impl DecodeTable {
    /// The table for `target`; finite values beyond its range follow `on_overflow`.
    #[must_use]
    pub fn new(target: Target, on_overflow: OnOverflow) -> Self {
        let row = |scale: u8| {
            let mut row = Row::default();
            for code in 0..16u8 {
                let cast = target.round(decode_one(code, scale), on_overflow);
                row.bits[usize::from(code)] = cast.bits;
                for (plane, byte) in row.planes.iter_mut().zip(cast.bits.to_le_bytes()) {
                    plane[usize::from(code)] = byte;
                }
                row.overflow |= u16::from(cast.overflows) << code;
                row.underflow |= u16::from(cast.underflows) << code;
            }
            row
        };
        Self { target, rows: (0..=255).map(row).collect() }
    }

    /// Decodes whole blocks: 16 code bytes and one scale byte make 32 values.
    ///
    /// # Panics
    /// When the lengths of the three slices disagree.
    pub fn decode(&self, blocks: &[u8], scales: &[u8], out: &mut [u8]) -> Counts {
        self.decode_with(Level::best(), blocks, scales, out)
    }

    /// [`DecodeTable::decode`] with chosen vector instructions: all levels give the same bytes and counts.
    ///
    /// # Panics
    /// As [`DecodeTable::decode`].
    pub fn decode_with(&self, level: Level, blocks: &[u8], scales: &[u8], out: &mut [u8]) -> Counts {
        match self.target {
            Target::F32 => self.decode_as::<4>(level, blocks, scales, out),
            Target::F16 | Target::Bf16 => self.decode_as::<2>(level, blocks, scales, out),
        }
    }

    #[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "calls a function compiled for other processors"))]
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "one level there yet"))]
    fn decode_as<const N: usize>(&self, level: Level, blocks: &[u8], scales: &[u8], out: &mut [u8]) -> Counts {
        #[cfg(target_arch = "x86_64")]
        if level.has_avx2() {
            // SAFETY: the level is proof of AVX2.
            return unsafe { self.decode_shuffled::<N>(blocks, scales, out) };
        }
        self.decode_blocks::<N>(blocks, scales, out, |row, codes, values| {
            let value = |code: u8| *row.bits[usize::from(code)].to_le_bytes().first_chunk().expect("N is 2 or 4");
            for (&byte, pair) in codes.iter().zip(values.as_chunks_mut::<N>().0.as_chunks_mut::<2>().0) {
                *pair = [value(byte & 0xf), value(byte >> 4)];
            }
        })
    }

    /// Sixteen codes at once: a shuffle looks up one byte of sixteen values.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn decode_shuffled<const N: usize>(&self, blocks: &[u8], scales: &[u8], out: &mut [u8]) -> Counts {
        use std::arch::x86_64::{
            __m128i, _mm_and_si128, _mm_set1_epi8, _mm_shuffle_epi8, _mm_srli_epi16, _mm_unpackhi_epi8,
            _mm_unpackhi_epi16, _mm_unpacklo_epi8, _mm_unpacklo_epi16,
        };

        let nibble = _mm_set1_epi8(0xf);
        self.decode_blocks::<N>(blocks, scales, out, |row, codes, values| {
            let tables: [__m128i; 4] = transmute!(row.planes);
            let bytes: __m128i = transmute!(*codes);
            let (even, odd) = (_mm_and_si128(bytes, nibble), _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble));
            let halves = [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)];
            for (codes, values) in halves.into_iter().zip(values.chunks_exact_mut(16 * N)) {
                let plane = |byte: usize| _mm_shuffle_epi8(tables[byte], codes);
                let low = [_mm_unpacklo_epi8(plane(0), plane(1)), _mm_unpackhi_epi8(plane(0), plane(1))];
                if N == 2 {
                    values.copy_from_slice(low.as_bytes());
                } else {
                    let high = [_mm_unpacklo_epi8(plane(2), plane(3)), _mm_unpackhi_epi8(plane(2), plane(3))];
                    let whole = [
                        _mm_unpacklo_epi16(low[0], high[0]),
                        _mm_unpackhi_epi16(low[0], high[0]),
                        _mm_unpacklo_epi16(low[1], high[1]),
                        _mm_unpackhi_epi16(low[1], high[1]),
                    ];
                    values.copy_from_slice(whole.as_bytes());
                }
            }
        })
    }

    /// Has each block decoded by `decode_block`, from its row and its codes, and counts what was lost.
    #[inline(always)]
    fn decode_blocks<const N: usize>(
        &self,
        blocks: &[u8],
        scales: &[u8],
        out: &mut [u8],
        decode_block: impl Fn(&Row, &[u8; BLOCK_BYTES], &mut [u8]),
    ) -> Counts {
        let (blocks, rest) = blocks.as_chunks::<BLOCK_BYTES>();
        assert!(rest.is_empty() && out.len().is_multiple_of(N * MX_BLOCK_SIZE), "whole blocks");
        let groups = out.chunks_exact_mut(N * MX_BLOCK_SIZE);
        assert!(blocks.len() == scales.len() && groups.len() == scales.len(), "one scale per block");
        let mut counts = Counts::default();
        for ((codes, &scale), values) in blocks.iter().zip(scales).zip(groups) {
            let row = &self.rows[usize::from(scale)];
            decode_block(row, codes, values);
            if row.overflow | row.underflow != 0 {
                counts.merge(count_codes(codes, scale, row.overflow, row.underflow));
            }
        }
        counts
    }
}

/// Counts the codes of one block that are in the sets.
fn count_codes(codes: &[u8], scale: u8, overflow: u16, underflow: u16) -> Counts {
    let mut counts = Counts::default();
    for code in codes.iter().flat_map(|byte| [byte & 0xf, byte >> 4]) {
        counts.underflow += u64::from(underflow >> code & 1);
        if overflow >> code & 1 == 1 {
            counts.overflow += 1;
            counts.largest = counts.largest.max(decode_one(code, scale).abs());
        }
    }
    counts
}
