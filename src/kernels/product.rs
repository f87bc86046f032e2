//! Rows of a matrix times rows of activations, by one of two ways.

use std::ops::Range;

use super::expand::{Bf16, Expand, Mxfp4};
use super::few;
use super::int8::{self, Int8};
use super::many::{self, BLOCK_ROWS, Scratch};
use super::matrix::{Format, Matrix};
use super::packed::{Operand, Packed, Rows};
use crate::simd::{Level, VectorKernel, Vectors};

/// So many rows of activations are few: expanding a chunk for each of four costs less than transposing it, and of 2880
/// values four rows stay in a first-level cache.
const FEW: usize = 4;

/// Bytes of a matrix that one task reads when there are few: enough that tasks cost nothing beside it.
const TASK_BYTES: usize = 1 << 19;

/// Rows of a matrix that one task multiplies by so many rows of activations.
pub(super) fn rows_of_task(matrix: &Matrix<'_>, columns: usize) -> usize {
    if columns <= FEW { TASK_BYTES.div_ceil(matrix.row_bytes().max(1)) } else { BLOCK_ROWS }
}

/// The parts of a row of results, where one task after the other has written its part of all rows.
pub(super) fn parts_of(
    row: usize,
    results: &[f32],
    columns_of_task: usize,
    rows: usize,
) -> impl Iterator<Item = &[f32]> {
    results.chunks(columns_of_task * rows).map(move |results| {
        let columns = results.len() / rows;
        &results[row * columns..(row + 1) * columns]
    })
}

/// Some rows of a matrix times some rows of activations: `out[column * rows.len() + row]`.
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

    #[inline(always)]
    fn multiply<V: Vectors, X: Operand<V> + Scratch, F: Expand<V, X, N>, const N: usize>(
        self,
        vectors: V,
        x: &Rows<X>,
    ) {
        let Self { matrix, rows, columns, out, .. } = self;
        if columns.len() <= FEW {
            few::multiply::<V, X, F, N>(vectors, x, matrix, rows, columns, out);
        } else {
            many::multiply::<V, X, F, N>(vectors, x, matrix, rows, columns, out);
        }
    }
}

impl VectorKernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vectors>(self, vectors: V) {
        match (self.x, self.matrix.format()) {
            (Packed::F32(x), Format::Mxfp4) => self.multiply::<V, _, Mxfp4<false>, 8>(vectors, x),
            (Packed::Bf16(x), Format::Mxfp4) if V::HAS_BF16_DOT => self.multiply::<V, _, Mxfp4<false>, 4>(vectors, x),
            (Packed::Int8(x), _) => {
                let Self { matrix, rows, columns, out, .. } = self;
                if columns.len() <= FEW {
                    few::multiply::<V, _, Int8<false>, 1>(vectors, x, matrix, rows, columns, out);
                } else {
                    int8::multiply(vectors, x, matrix, rows, columns, out);
                }
            }
            (Packed::F32(x), Format::Bf16) => self.multiply::<V, _, Bf16, 2>(vectors, x),
            (Packed::Bf16(x), Format::Bf16) if V::HAS_BF16_DOT => self.multiply::<V, _, Bf16, 1>(vectors, x),
            (Packed::Bf16(_), _) => unreachable!("packed for other vectors"),
        }
    }
}
