//! A few rows of activations: codes are multiplied as they are expanded.
//!
//! The matrix comes from memory once, and that is what takes the time.

use std::ops::Range;

use super::expand::Products;
use super::matrix::{Matrix, Row};
use super::packed::Rows;
use crate::simd::Vectors;

/// Some rows of a matrix times a few rows of activations: `out[column * rows.len() + row]`.
#[inline(always)]
pub(super) fn multiply<V: Vectors, X, F: Products<V, X, N>, const N: usize>(
    vectors: V,
    x: &Rows<X>,
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    columns: &[usize],
    out: &mut [f32],
) {
    let x = |number: usize| x.get(columns[number]);
    // Several sums for few columns, so that none waits for the one before.
    let has_one_sum = F::HAS_SCALES && !V::HAS_MANY_REGISTERS;
    match columns.len() {
        0 => {}
        1 if has_one_sum => multiply_columns::<V, X, F, N, 1, 1>(vectors, [x(0)], matrix, rows, out),
        2 if has_one_sum => multiply_columns::<V, X, F, N, 2, 1>(vectors, [x(0), x(1)], matrix, rows, out),
        3 if has_one_sum => multiply_columns::<V, X, F, N, 3, 1>(vectors, [x(0), x(1), x(2)], matrix, rows, out),
        1 => multiply_columns::<V, X, F, N, 1, 4>(vectors, [x(0)], matrix, rows, out),
        2 => multiply_columns::<V, X, F, N, 2, 2>(vectors, [x(0), x(1)], matrix, rows, out),
        3 => multiply_columns::<V, X, F, N, 3, 2>(vectors, [x(0), x(1), x(2)], matrix, rows, out),
        4 => multiply_columns::<V, X, F, N, 4, 1>(vectors, [x(0), x(1), x(2), x(3)], matrix, rows, out),
        columns => unreachable!("{columns} columns are not few"),
    }
}

/// M columns with S sums each.
#[inline(always)]
fn multiply_columns<V: Vectors, X, F: Products<V, X, N>, const N: usize, const M: usize, const S: usize>(
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
fn dot<V: Vectors, X, F: Products<V, X, N>, const N: usize, const M: usize, const S: usize>(
    vectors: V,
    row: Row<'_>,
    x: [&[X]; M],
) -> [f32; M] {
    let mut sums = [[vectors.zero(); M]; S];
    let (whole, rest) = row.bytes.as_chunks();
    let x: [&[[X; N]]; M] = x.map(|x| x.as_chunks().0);
    let (groups, others) = whole.as_chunks::<S>();
    // Told once that all are as long, the compiler checks no index in the loop.
    let count = groups.len();
    let scale_groups = if F::HAS_SCALES { &row.whole_scales().as_chunks::<S>().0[..count] } else { &[] };
    let x_groups = x.map(|x| &x.as_chunks::<S>().0[..count]);
    for group in 0..count {
        for number in 0..S {
            let chunk = &groups[group][number];
            vectors.prefetch(chunk, F::PREFETCH_BYTES);
            let scales = if F::HAS_SCALES { u32::from_le_bytes(scale_groups[group][number]) } else { 0 };
            let x = x_groups.map(|x| &x[group][number]);
            F::add_products(vectors, vectors.load(chunk), scales, x, &mut sums[number]);
        }
    }
    for (chunk, bytes) in (S * groups.len()..).zip(others) {
        vectors.prefetch(bytes, F::PREFETCH_BYTES);
        F::add_products(vectors, vectors.load(bytes), row.scales(chunk), x.map(|x| &x[chunk]), &mut sums[0]);
    }
    if !rest.is_empty() {
        vectors.prefetch(rest, F::PREFETCH_BYTES);
        let (words, chunk) = (vectors.load_part(rest), whole.len());
        F::add_products(vectors, words, row.scales(chunk), x.map(|x| &x[chunk]), &mut sums[0]);
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
