//! Rows of a matrix times rows of activations.
//!
//! One row of activations is multiplied by codes as they are expanded: the matrix comes from memory once, and that is
//! what takes the time. For more, a few rows of the matrix are expanded into a buffer that stays in the cache, and each
//! tile of `TILE_ROWS` by `TILE_COLUMNS` sums is held in registers.

use std::cell::Cell;
use std::ops::Range;

use super::matrix::{Chunk, Format, Matrix, Row};
use super::packed::{Operand, Packed, Rows};
use crate::simd::{Level, Plain, VectorKernel, Vectors};

/// Rows of a matrix in a tile.
const TILE_ROWS: usize = 6;

/// Rows of activations in a tile.
const TILE_COLUMNS: usize = 4;

/// Rows of a matrix that are expanded together when there are several rows of activations: of 2880 values 138 KB in
/// bfloat16 and 276 KB in float32, which a second-level cache holds beside what else is there.
const BLOCK_ROWS: usize = 4 * TILE_ROWS;

/// Bytes of a matrix that one task reads when there is one row of activations: enough that tasks cost nothing beside it.
const TASK_BYTES: usize = 1 << 18;

/// Rows of a matrix that one task multiplies by so many rows of activations.
pub(super) fn rows_of_task(matrix: &Matrix<'_>, columns: usize) -> usize {
    if columns == 1 { TASK_BYTES.div_ceil(matrix.row_bytes().max(1)) } else { BLOCK_ROWS }
}

/// How far ahead of the row in work lines are asked for; 4 KiB measured best by far (a Xeon with AVX-512, 2026-11).
const PREFETCH_BYTES: usize = 4096;

/// Some rows of a matrix times some rows of activations: `out[row * columns.len() + column]`.
pub(super) struct Product<'a> {
    pub(super) matrix: &'a Matrix<'a>,
    /// Rows of the matrix.
    pub(super) rows: Range<usize>,
    pub(super) x: &'a Packed,
    /// Rows of `x`.
    pub(super) columns: &'a [usize],
    pub(super) out: &'a mut [f32],
}

impl Product<'_> {
    /// Computes it with the vectors of `level`, which `x` must have been packed for.
    pub(super) fn run(self, level: Level) {
        assert!(self.out.len() == self.rows.len() * self.columns.len(), "a place for each sum");
        level.run_vectors(self);
    }
}

impl VectorKernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vectors>(self, vectors: V) {
        let Self { matrix, rows, x, columns, out } = self;
        match (x, matrix.format()) {
            (Packed::F32(x), Format::Mxfp4) => multiply::<V, _, Mxfp4, 8>(vectors, x, matrix, rows, columns, out),
            (Packed::Bf16(x), Format::Mxfp4) => multiply::<V, _, Mxfp4, 4>(vectors, x, matrix, rows, columns, out),
            (Packed::F32(x), Format::Bf16) => multiply::<V, _, Bf16, 2>(vectors, x, matrix, rows, columns, out),
            (Packed::Bf16(x), Format::Bf16) => multiply::<V, _, Bf16, 1>(vectors, x, matrix, rows, columns, out),
        }
    }
}

#[inline(always)]
fn multiply<V: Vectors, X: Operand<V> + Scratch, F: Expand<V, X, N>, const N: usize>(
    vectors: V,
    x: &Rows<X>,
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    columns: &[usize],
    out: &mut [f32],
) {
    if let &[column] = columns {
        for (row, out) in rows.zip(out) {
            *out = dot::<V, X, F, N>(vectors, matrix.row(row), x.get(column));
        }
        return;
    }
    // Taken out rather than borrowed: a closure would not be compiled for these vectors.
    let mut scratch = X::take_scratch();
    for start in rows.clone().step_by(BLOCK_ROWS) {
        let block = start..rows.end.min(start + BLOCK_ROWS);
        scratch.clear();
        for row in block.clone() {
            expand_row::<V, X, F, N>(vectors, matrix.row(row), &mut scratch);
        }
        let out = &mut out[(block.start - rows.start) * columns.len()..][..block.len() * columns.len()];
        multiply_block(vectors, &scratch, block.len(), x, columns, out);
    }
    X::keep_scratch(scratch);
}

/// Expanded rows times rows of activations, tile by tile.
#[inline(always)]
fn multiply_block<V: Vectors, X: Operand<V>>(
    vectors: V,
    expanded: &[X],
    rows: usize,
    x: &Rows<X>,
    columns: &[usize],
    out: &mut [f32],
) {
    let length = expanded.len() / rows.max(1);
    let (tiles, rest) = columns.as_chunks::<TILE_COLUMNS>();
    let mut place = 0;
    for tile in tiles {
        multiply_columns(vectors, expanded, length, tile.map(|column| x.get(column)), out, columns.len(), place);
        place += TILE_COLUMNS;
    }
    match *rest {
        [a] => multiply_columns(vectors, expanded, length, [x.get(a)], out, columns.len(), place),
        [a, b] => multiply_columns(vectors, expanded, length, [x.get(a), x.get(b)], out, columns.len(), place),
        [a, b, c] => {
            multiply_columns(vectors, expanded, length, [x.get(a), x.get(b), x.get(c)], out, columns.len(), place);
        }
        _ => {}
    }
}

#[inline(always)]
fn multiply_columns<V: Vectors, X: Operand<V>, const M: usize>(
    vectors: V,
    expanded: &[X],
    length: usize,
    x: [&[X]; M],
    out: &mut [f32],
    stride: usize,
    place: usize,
) {
    let mut row = 0;
    for rows in expanded.chunks(TILE_ROWS * length.max(1)) {
        if rows.len() == TILE_ROWS * length {
            let w: [&[X]; TILE_ROWS] = std::array::from_fn(|number| &rows[number * length..(number + 1) * length]);
            for (number, sums) in tile(vectors, w, x).into_iter().enumerate() {
                out[(row + number) * stride + place..][..M].copy_from_slice(&sums);
            }
            row += TILE_ROWS;
        } else {
            for w in rows.chunks(length) {
                let [sums] = tile(vectors, [w], x);
                out[row * stride + place..][..M].copy_from_slice(&sums);
                row += 1;
            }
        }
    }
}

/// The sums of products of each of N rows with each of M.
#[inline(always)]
fn tile<V: Vectors, X: Operand<V>, const N: usize, const M: usize>(
    vectors: V,
    w: [&[X]; N],
    x: [&[X]; M],
) -> [[f32; M]; N] {
    let length = w[0].len();
    // Told once that all are as long, the compiler checks no index in the loop.
    let (w, x) = (w.map(|row| &row[..length]), x.map(|row| &row[..length]));
    let mut sums = [[vectors.zero(); M]; N];
    for place in 0..length {
        let mut loaded = [x[0][place].load(vectors); M];
        for m in 1..M {
            loaded[m] = x[m][place].load(vectors);
        }
        for n in 0..N {
            let factor = w[n][place].load(vectors);
            for m in 0..M {
                sums[n][m] = X::mul_add(vectors, factor, loaded[m], sums[n][m]);
            }
        }
    }
    let mut out = [[0.0; M]; N];
    for n in 0..N {
        for m in 0..M {
            out[n][m] = vectors.sum(sums[n][m]);
        }
    }
    out
}

/// One row times one row, expanded on the way.
#[inline(always)]
fn dot<V: Vectors, X: Operand<V>, F: Expand<V, X, N>, const N: usize>(vectors: V, row: Row<'_>, x: &[X]) -> f32 {
    let (x, _) = x.as_chunks::<N>();
    let (chunks, tail) = row.chunks();
    let whole = chunks.len();
    // Four sums, so that none waits for the one before.
    let mut sums = [vectors.zero(); 4];
    for (number, (chunk, x)) in chunks.zip(x).enumerate() {
        vectors.prefetch(chunk.bytes, PREFETCH_BYTES);
        sums[number % 4] = F::add_products(vectors, chunk, x, sums[number % 4]);
    }
    if let Some(chunk) = tail.chunk() {
        sums[0] = F::add_products(vectors, chunk, &x[whole], sums[0]);
    }
    vectors.sum(vectors.add(vectors.add(sums[0], sums[1]), vectors.add(sums[2], sums[3])))
}

/// Appends a row's values, scaled, in the order of packed activations.
#[inline(always)]
fn expand_row<V: Vectors, X: Operand<V>, F: Expand<V, X, N>, const N: usize>(
    vectors: V,
    row: Row<'_>,
    out: &mut Vec<X>,
) {
    let (chunks, tail) = row.chunks();
    for chunk in chunks {
        out.extend_from_slice(&F::expand(vectors, chunk));
    }
    if let Some(chunk) = tail.chunk() {
        out.extend_from_slice(&F::expand(vectors, chunk));
    }
}

/// How a format's chunks become N vectors each.
trait Expand<V: Vectors, X: Operand<V>, const N: usize> {
    /// The products with N vectors, scaled, added to sums.
    fn add_products(vectors: V, chunk: Chunk<'_>, x: &[X; N], sums: V::Floats) -> V::Floats;
    /// The values, scaled.
    fn expand(vectors: V, chunk: Chunk<'_>) -> [X; N];
}

struct Mxfp4;

impl Mxfp4 {
    /// [`Expand::add_products`], for either dtype.
    #[inline(always)]
    fn products_of_codes<V: Vectors, X: Operand<V>, const N: usize>(
        vectors: V,
        chunk: Chunk<'_>,
        x: &[X; N],
        sums: V::Floats,
    ) -> V::Floats {
        let codes = vectors.load(chunk.bytes);
        // Two sums, so that one does not wait for the other.
        let mut products = [vectors.zero(); 2];
        for (number, x) in (0u32..).zip(x) {
            let half = &mut products[number as usize % 2];
            *half = X::mul_add(vectors, X::e2m1(vectors, codes, number), x.load(vectors), *half);
        }
        vectors.mul_add(vectors.add(products[0], products[1]), vectors.e8m0(chunk.scales), sums)
    }
}

impl<V: Vectors> Expand<V, [f32; 16], 8> for Mxfp4 {
    #[inline(always)]
    fn add_products(vectors: V, chunk: Chunk<'_>, x: &[[f32; 16]; 8], sums: V::Floats) -> V::Floats {
        Self::products_of_codes(vectors, chunk, x, sums)
    }

    #[inline(always)]
    fn expand(vectors: V, chunk: Chunk<'_>) -> [[f32; 16]; 8] {
        let (codes, factors) = (vectors.load(chunk.bytes), vectors.e8m0(chunk.scales));
        let mut values = [[0.0; 16]; 8];
        for (number, values) in (0u32..).zip(&mut values) {
            *values = vectors.store_f32(vectors.mul(vectors.e2m1(codes, 4 * number), factors));
        }
        values
    }
}

impl<V: Vectors> Expand<V, [u16; 32], 4> for Mxfp4 {
    #[inline(always)]
    fn add_products(vectors: V, chunk: Chunk<'_>, x: &[[u16; 32]; 4], sums: V::Floats) -> V::Floats {
        Self::products_of_codes(vectors, chunk, x, sums)
    }

    #[inline(always)]
    fn expand(vectors: V, chunk: Chunk<'_>) -> [[u16; 32]; 4] {
        // Exponents that stay within bfloat16's can be added to.
        if chunk.scales.iter().any(|scale| !(2..=252).contains(scale)) {
            return expand_rare(chunk);
        }
        let codes = vectors.load(chunk.bytes);
        let mut values = [[0; 32]; 4];
        for (number, values) in (0u32..).zip(&mut values) {
            let shift = 4 * number;
            let unscaled = vectors.e2m1_bf16(codes, shift);
            *values = vectors.store_bf16(vectors.scale_bf16(unscaled, codes, shift, chunk.scales));
        }
        values
    }
}

/// As `expand`, for scales so small or large that a value may be subnormal, infinite or NaN.
#[cold]
fn expand_rare(chunk: Chunk<'_>) -> [[u16; 32]; 4] {
    let codes = Plain.load(chunk.bytes);
    [0, 4, 8, 12].map(|shift| {
        let unscaled = Plain.e2m1_bf16(codes, shift);
        Plain.store_bf16(Plain.scale_bf16(unscaled, codes, shift, chunk.scales))
    })
}

struct Bf16;

impl<V: Vectors> Expand<V, [f32; 16], 2> for Bf16 {
    #[inline(always)]
    fn add_products(vectors: V, chunk: Chunk<'_>, x: &[[f32; 16]; 2], sums: V::Floats) -> V::Floats {
        let words = vectors.load(chunk.bytes);
        let sums = vectors.mul_add(vectors.bf16_even(words), vectors.load_f32(&x[0]), sums);
        vectors.mul_add(vectors.bf16_odd(words), vectors.load_f32(&x[1]), sums)
    }

    #[inline(always)]
    fn expand(vectors: V, chunk: Chunk<'_>) -> [[f32; 16]; 2] {
        let words = vectors.load(chunk.bytes);
        [vectors.store_f32(vectors.bf16_even(words)), vectors.store_f32(vectors.bf16_odd(words))]
    }
}

impl<V: Vectors> Expand<V, [u16; 32], 1> for Bf16 {
    #[inline(always)]
    fn add_products(vectors: V, chunk: Chunk<'_>, x: &[[u16; 32]; 1], sums: V::Floats) -> V::Floats {
        vectors.bf16_dot(vectors.load(chunk.bytes), x[0].load(vectors), sums)
    }

    #[inline(always)]
    fn expand(vectors: V, chunk: Chunk<'_>) -> [[u16; 32]; 1] {
        [vectors.store_bf16(vectors.load(chunk.bytes))]
    }
}

/// A buffer for expanded rows that each thread keeps: memory that is new is slow to touch.
trait Scratch: Sized {
    fn take_scratch() -> Vec<Self>;
    fn keep_scratch(scratch: Vec<Self>);
}

thread_local! {
    static F32_SCRATCH: Cell<Vec<[f32; 16]>> = const { Cell::new(Vec::new()) };
    static BF16_SCRATCH: Cell<Vec<[u16; 32]>> = const { Cell::new(Vec::new()) };
}

impl Scratch for [f32; 16] {
    fn take_scratch() -> Vec<Self> {
        F32_SCRATCH.take()
    }

    fn keep_scratch(scratch: Vec<Self>) {
        F32_SCRATCH.set(scratch);
    }
}

impl Scratch for [u16; 32] {
    fn take_scratch() -> Vec<Self> {
        BF16_SCRATCH.take()
    }

    fn keep_scratch(scratch: Vec<Self>) {
        BF16_SCRATCH.set(scratch);
    }
}
