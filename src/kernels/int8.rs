//! Activations rounded to int8, with a scale for each block of 32: their products with MXFP4 codes are integers.
//!
//! ```text
//! scale = largest magnitude of the block / 127; q = round(x / scale), ties to even
//! dot   = sum over the block, or a quarter of it, of (twice the code's value) * q    exact
//! sum  += dot * (the weights' scale) * (scale / 2)                                   float32
//! ```
//!
//! Instructions multiply unsigned bytes by signed ones, so codes come [biased](E2M1_BIAS), and sums of integers start
//! with what takes that back.

use std::iter::zip;
use std::ops::Range;

use super::expand::{Products, rare_factors};
use super::matrix::{CHUNK_BYTES, Matrix, Row};
use super::packed::Rows;
use crate::mxfp4::{BLOCK_BYTES, MX_BLOCK_SIZE};
use crate::simd::{E2M1_BIAS, Kernel, Vectors};

/// Blocks of a chunk.
const BLOCKS: usize = CHUNK_BYTES / BLOCK_BYTES;

/// Lanes of a vector, each of four bytes, and those of one block.
const LANES: usize = 16;
const LANES_OF_BLOCK: usize = LANES / BLOCKS;

/// Rows of a matrix that are multiplied together, one to a lane.
const PANEL_ROWS: usize = LANES;

/// Rows of activations that are multiplied together: with AVX2 there are registers for the sums of so many.
const TILE_COLUMNS: usize = 4;

/// As many activations as a chunk has codes.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Int8Chunk {
    /// What the low nibbles of a chunk's bytes are multiplied by, and the high ones: int8.
    nibbles: [[u8; CHUNK_BYTES]; 2],
    /// Minus the sum of the values that a lane's bytes are multiplied by, times the bias.
    lane_starts: [i32; LANES],
    /// Half the scale of each lane's block.
    lane_half_scales: [f32; LANES],
    /// Minus the sum of each block's values, times the bias.
    starts: [i32; BLOCKS],
    /// Half the scale of each block; NaN where it has a NaN or an infinity.
    half_scales: [f32; BLOCKS],
}

impl Int8Chunk {
    pub(super) const ZERO: Self = Self {
        nibbles: [[0; CHUNK_BYTES]; 2],
        lane_starts: [0; LANES],
        lane_half_scales: [0.0; LANES],
        starts: [0; BLOCKS],
        half_scales: [0.0; BLOCKS],
    };

    /// What a lane's bytes are multiplied by when sixteen rows are transposed.
    #[inline(always)]
    fn word(&self, nibble: usize, lane: usize) -> u32 {
        u32::from_le_bytes(self.nibbles[nibble].as_chunks().0[lane])
    }
}

/// A row of activations, which is a whole number of chunks, becoming int8.
pub(super) struct Quantize<'a> {
    pub(super) values: &'a [f32],
    pub(super) chunks: &'a mut [Int8Chunk],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let blocks = self.values.as_chunks::<MX_BLOCK_SIZE>().0.as_chunks::<BLOCKS>().0;
        for (chunk, blocks) in zip(self.chunks, blocks) {
            for (number, values) in blocks.iter().enumerate() {
                let (bytes, scale) = quantize(values);
                for place in 0..BLOCK_BYTES {
                    chunk.nibbles[0][number * BLOCK_BYTES + place] = bytes[2 * place].cast_unsigned();
                    chunk.nibbles[1][number * BLOCK_BYTES + place] = bytes[2 * place + 1].cast_unsigned();
                }
                let lanes = number * LANES_OF_BLOCK..(number + 1) * LANES_OF_BLOCK;
                let starts = &mut chunk.lane_starts[lanes.clone()];
                // Four bytes of codes are eight values.
                for (start, bytes) in zip(&mut *starts, bytes.as_chunks::<8>().0) {
                    *start = -E2M1_BIAS * bytes.iter().map(|&byte| i32::from(byte)).sum::<i32>();
                }
                chunk.starts[number] = starts.iter().sum();
                chunk.lane_half_scales[lanes].fill(0.5 * scale);
                chunk.half_scales[number] = 0.5 * scale;
            }
        }
    }
}

/// A block in int8, and its scale.
#[inline(always)]
fn quantize(values: &[f32; MX_BLOCK_SIZE]) -> ([i8; MX_BLOCK_SIZE], f32) {
    // 1.5 * 2^23: added to a float of at most 2^22 it leaves no place for a fraction, and the lowest bits are the integer.
    const ROUNDS: f32 = 1.5 * 8_388_608.0;
    // Among bits without a sign those of infinities and NaN are the largest.
    let amax = f32::from_bits(values.iter().fold(0, |most, value| most.max(value.abs().to_bits())));
    let mut bytes = [0; MX_BLOCK_SIZE];
    if !amax.is_finite() {
        return (bytes, f32::NAN);
    }
    // Subnormal scales would be coarse: a block that has one consists of values that matter no more.
    let scale = (amax / 127.0).max(f32::MIN_POSITIVE);
    #[expect(clippy::cast_possible_truncation, reason = "within ±127")]
    for (byte, value) in zip(&mut bytes, values) {
        *byte = (value / scale + ROUNDS).to_bits() as i8;
    }
    (bytes, scale)
}

/// Products of MXFP4 with int8; `NORMAL` where all scale bytes are 1 .. 254.
pub(super) struct Int8<const NORMAL: bool>;

impl<V: Vectors, const NORMAL: bool> Products<V, Int8Chunk, 1> for Int8<NORMAL> {
    type Normal = Int8<true>;
    const PREFETCH_BYTES: usize = 2048;
    const HAS_SCALES: bool = true;

    #[inline(always)]
    fn add_products<const M: usize>(
        vectors: V,
        codes: V::Words,
        scales: u32,
        x: [&[Int8Chunk; 1]; M],
        sums: &mut [V::Floats; M],
    ) {
        let codes = vectors.e2m1_bytes(codes);
        let factors = if NORMAL { vectors.e8m0_normal(scales) } else { rare_factors(vectors, scales) };
        for m in 0..M {
            let [x] = x[m];
            let bytes = [vectors.load(&x.nibbles[0]), vectors.load(&x.nibbles[1])];
            let dots = vectors.dot_bytes(codes, bytes, vectors.load_words(zerocopy::transmute_ref!(&x.lane_starts)));
            let products = vectors.mul(vectors.floats_of_ints(dots), factors);
            sums[m] = vectors.mul_add(products, vectors.load_f32(&x.lane_half_scales), sums[m]);
        }
    }
}

/// Some rows of a matrix times many rows of activations: `out[column * rows.len() + row]`.
///
/// Sixteen rows make a panel, as with other activations. A chunk of it is expanded once and meets all columns, whose sums
/// stay in the cache.
#[inline(always)]
pub(super) fn multiply<V: Vectors>(
    vectors: V,
    x: &Rows<Int8Chunk>,
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    columns: &[usize],
    out: &mut [f32],
) {
    let height = rows.len();
    let mut sums = vec![[0.0; PANEL_ROWS]; columns.len()];
    for first in (0..height).step_by(PANEL_ROWS) {
        // Behind the last row it is there again, for nobody.
        let row = |lane: usize| matrix.row((rows.start + first + lane).min(rows.end - 1));
        let panel_rows: [Row<'_>; PANEL_ROWS] = std::array::from_fn(row);
        sums.fill([0.0; PANEL_ROWS]);
        for number in 0..panel_rows[0].chunk_count() {
            let panel = PanelChunk::expand(vectors, &panel_rows, number);
            let (tiles, rest) = columns.as_chunks::<TILE_COLUMNS>();
            let (tile_sums, rest_sums) = sums.as_chunks_mut::<TILE_COLUMNS>();
            for (columns, sums) in zip(tiles, tile_sums) {
                panel.add_products(vectors, x, number, columns, sums);
            }
            for (&column, sums) in zip(rest, rest_sums) {
                panel.add_products(vectors, x, number, &[column], std::array::from_mut(sums));
            }
        }
        let count = (height - first).min(PANEL_ROWS);
        for (out, sums) in zip(out.chunks_exact_mut(height), &sums) {
            out[first..first + count].copy_from_slice(&sums[..count]);
        }
    }
}

/// A chunk of sixteen rows, one in each lane.
struct PanelChunk<V: Vectors> {
    /// For each word of the rows its low nibbles and its high ones.
    codes: [[V::Words; 2]; LANES],
    factors: [V::Floats; BLOCKS],
    blocks: usize,
}

impl<V: Vectors> PanelChunk<V> {
    #[inline(always)]
    fn expand(vectors: V, rows: &[Row<'_>; PANEL_ROWS], number: usize) -> Self {
        let mut words = [rows[0].load(vectors, number); PANEL_ROWS];
        let mut scales = [rows[0].scales(number); PANEL_ROWS];
        for lane in 1..PANEL_ROWS {
            words[lane] = rows[lane].load(vectors, number);
            scales[lane] = rows[lane].scales(number);
        }
        let words = vectors.transpose(words);
        let mut codes = [[words[0]; 2]; LANES];
        for lane in 0..LANES {
            codes[lane] = vectors.e2m1_bytes(words[lane]);
        }
        let scales = vectors.load_words(&scales);
        let mut factors = [vectors.zero(); BLOCKS];
        for (factors, number) in factors.iter_mut().zip(0u32..) {
            *factors = vectors.e8m0(scales, 8 * number);
        }
        Self { codes, factors, blocks: (rows[0].scales.len() - number * BLOCKS).min(BLOCKS) }
    }

    /// Adds the products with chunk `number` of each of M columns to their sums.
    #[inline(always)]
    fn add_products<const M: usize>(
        &self,
        vectors: V,
        x: &Rows<Int8Chunk>,
        number: usize,
        columns: &[usize; M],
        sums: &mut [[f32; PANEL_ROWS]; M],
    ) {
        let x = columns.map(|column| &x.get(column)[number]);
        let mut totals = [vectors.zero(); M];
        for m in 0..M {
            totals[m] = vectors.load_f32(&sums[m]);
        }
        for block in 0..self.blocks {
            let first = block * LANES_OF_BLOCK;
            let mut dots = [vectors.splat_words(0); M];
            for m in 0..M {
                dots[m] = vectors.splat_words(x[m].starts[block].cast_unsigned());
            }
            for lane in (first..first + LANES_OF_BLOCK).step_by(2) {
                let ([low, high], [next_low, next_high]) = (self.codes[lane], self.codes[lane + 1]);
                let codes = [low, high, next_low, next_high];
                for m in 0..M {
                    let word = |nibble: usize, lane: usize| x[m].word(nibble, lane);
                    let bytes = [
                        vectors.splat_words(word(0, lane)),
                        vectors.splat_words(word(1, lane)),
                        vectors.splat_words(word(0, lane + 1)),
                        vectors.splat_words(word(1, lane + 1)),
                    ];
                    dots[m] = vectors.dot_bytes(codes, bytes, dots[m]);
                }
            }
            for m in 0..M {
                let products = vectors.mul(vectors.floats_of_ints(dots[m]), self.factors[block]);
                totals[m] = vectors.mul_add(products, vectors.splat(x[m].half_scales[block]), totals[m]);
            }
        }
        for m in 0..M {
            sums[m] = vectors.store_f32(totals[m]);
        }
    }
}
