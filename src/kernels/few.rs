//! A few rows of activations: codes are multiplied as they are expanded.
//!
//! The matrix comes from memory once, and that is what takes the time.

use std::iter::zip;
use std::ops::Range;

use super::expand::Expand;
use super::matrix::{Matrix, Row};
use super::packed::{Operand, Rows};
use crate::simd::Vectors;

/// How far ahead of the row in work lines are asked for; 4 KiB measured best by far (AVX-512, 2026-11).
const PREFETCH_BYTES: usize = 4096;

/// Some rows of a matrix times a few rows of activations: `out[column * rows.len() + row]`.
#[inline(always)]
pub(super) fn multiply<V: Vectors, X: Operand<V>, F: Expand<V, X, N>, const N: usize>(
    vectors: V,
    x: &Rows<X>,
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    columns: &[usize],
    out: &mut [f32],
) {
    // What is multiplied by one expanded chunk: of 2880 values four rows stay in a first-level cache.
    let (fours, rest) = columns.as_chunks::<4>();
    let (out_of_fours, out_of_rest) = out.split_at_mut(4 * fours.len() * rows.len());
    for (columns, out) in zip(fours, out_of_fours.chunks_exact_mut((4 * rows.len()).max(1))) {
        let x = columns.map(|column| x.get(column));
        multiply_columns::<V, X, F, N, 4, 1>(vectors, x, matrix, rows.clone(), out);
    }
    // Several sums for few columns, so that none waits for the one before.
    let (out, x) = (out_of_rest, |column| x.get(column));
    match *rest {
        [a] => multiply_columns::<V, X, F, N, 1, 4>(vectors, [x(a)], matrix, rows, out),
        [a, b] => multiply_columns::<V, X, F, N, 2, 2>(vectors, [x(a), x(b)], matrix, rows, out),
        [a, b, c] => multiply_columns::<V, X, F, N, 3, 2>(vectors, [x(a), x(b), x(c)], matrix, rows, out),
        _ => {}
    }
}

/// M columns with S sums each.
#[inline(always)]
fn multiply_columns<V: Vectors, X: Operand<V>, F: Expand<V, X, N>, const N: usize, const M: usize, const S: usize>(
    vectors: V,
    x: [&[X]; M],
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    out: &mut [f32],
) {
    let height = rows.len();
    for (number, row) in rows.enumerate() {
        let row = matrix.row(row);
        // Scales are normal numbers but in the rarest rows, and then take fewer instructions.
        let sums = if row.has_normal_scales() {
            dot::<V, X, F::Normal, N, M, S>(vectors, row, x)
        } else {
            dot::<V, X, F, N, M, S>(vectors, row, x)
        };
        for m in 0..M {
            out[m * height + number] = sums[m];
        }
    }
}

/// One row times each of M.
#[inline(always)]
fn dot<V: Vectors, X: Operand<V>, F: Expand<V, X, N>, const N: usize, const M: usize, const S: usize>(
    vectors: V,
    row: Row<'_>,
    x: [&[X]; M],
) -> [f32; M] {
    // Told once that all are as long, the compiler checks no index in the loop.
    let count = row.chunk_count();
    let x: [&[[X; N]]; M] = x.map(|x| &x.as_chunks().0[..count]);
    let mut sums = [[vectors.zero(); M]; S];
    let (whole, rest) = row.bytes.as_chunks();
    for (chunk, bytes) in whole.iter().enumerate() {
        vectors.prefetch(bytes, PREFETCH_BYTES);
        let x = x.map(|x| &x[chunk]);
        F::add_products(vectors, vectors.load(bytes), row.scales(chunk), x, &mut sums[chunk % S]);
    }
    if !rest.is_empty() {
        let x = x.map(|x| &x[count - 1]);
        F::add_products(vectors, vectors.load_part(rest), row.scales(count - 1), x, &mut sums[0]);
    }
    let mut out = [0.0; M];
    for m in 0..M {
        let mut sum = sums[0][m];
        for sums in &sums[1..] {
            sum = vectors.add(sum, sums[m]);
        }
        out[m] = vectors.sum(sum);
    }
    out
}
