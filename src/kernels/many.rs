//! Many rows of activations: a block of a matrix is expanded once into a buffer that stays in the cache.
//!
//! Sixteen rows of a matrix make a panel, in which each is a lane of every vector, and a value of the activations in all
//! lanes is multiplied by such a vector. Nothing is summed over lanes then, and little is read for a multiplication.

use std::cell::Cell;
use std::ops::Range;

use super::expand::Expand;
use super::matrix::{Matrix, Row};
use super::packed::{Bf16Line, F32Line, Operand, Rows};
use crate::simd::Vectors;

/// Rows of a matrix in a panel, as many as a vector has lanes.
const PANEL_ROWS: usize = 16;

/// Rows of a matrix that one task expands: of 2880 values 184 KB in bfloat16 and 369 KB in float32, which a second-level
/// cache holds beside activations.
pub(super) const BLOCK_ROWS: usize = 2 * PANEL_ROWS;

/// Some rows of a matrix times some rows of activations: `out[column * rows.len() + row]`.
#[inline(always)]
pub(super) fn multiply<V: Vectors, X: Operand<V> + Scratch, F: Expand<V, X, N>, const N: usize>(
    vectors: V,
    x: &Rows<X>,
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    columns: &[usize],
    out: &mut [f32],
) {
    if V::HAS_MANY_REGISTERS {
        multiply_panels::<V, X, F, N, 2, 12>(vectors, x, matrix, rows, columns, out);
    } else {
        multiply_panels::<V, X, F, N, 1, 6>(vectors, x, matrix, rows, columns, out);
    }
}

/// P panels and at most M columns at a time, so that all their sums are in registers.
#[inline(always)]
fn multiply_panels<
    V: Vectors,
    X: Operand<V> + Scratch,
    F: Expand<V, X, N>,
    const N: usize,
    const P: usize,
    const M: usize,
>(
    vectors: V,
    x: &Rows<X>,
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    columns: &[usize],
    out: &mut [f32],
) {
    let (height, vectors_of_panel) = (rows.len(), PANEL_ROWS * x.vectors_of_row());
    // Taken out rather than borrowed: a closure would not be compiled for these vectors.
    let mut scratch = X::take_scratch();
    scratch.resize(scratch.len().max(P * vectors_of_panel), X::ZERO);
    for first in (0..height).step_by(P * PANEL_ROWS) {
        let mut panels: [&[X]; P] = [&[]; P];
        let mut rest = scratch.as_mut_slice();
        for (number, done) in panels.iter_mut().enumerate() {
            let (panel, others) = rest.split_at_mut(vectors_of_panel);
            rest = others;
            // Behind the last row it is there again, for nobody.
            let row = |lane: usize| matrix.row((rows.start + first + number * PANEL_ROWS + lane).min(rows.end - 1));
            expand_panel::<V, X, F, N>(vectors, std::array::from_fn(row), panel);
            *done = panel;
        }
        let count = (height - first).min(P * PANEL_ROWS);
        let tiles = columns.len().div_ceil(M);
        let mut start = 0;
        for tile in 0..tiles {
            // As even as can be, for narrow tiles are slow.
            let end = start + (columns.len() - start).div_ceil(tiles - tile);
            let tile = Tile { panels, x, columns: &columns[start..end], out: &mut out[start * height..end * height] };
            tile.multiply(vectors, height, first, count);
            start = end;
        }
    }
    X::keep_scratch(scratch);
}

/// Values of sixteen rows, scaled, in the order of packed activations.
#[inline(always)]
fn expand_panel<V: Vectors, X: Operand<V>, F: Expand<V, X, N>, const N: usize>(
    vectors: V,
    rows: [Row<'_>; PANEL_ROWS],
    panel: &mut [X],
) {
    let (chunks, _) = panel.as_chunks_mut::<PANEL_ROWS>().0.as_chunks_mut::<N>();
    for (chunk, out) in chunks.iter_mut().enumerate() {
        let mut words = [rows[0].load(vectors, chunk); PANEL_ROWS];
        let mut scales = [rows[0].scales(chunk); PANEL_ROWS];
        for lane in 1..PANEL_ROWS {
            words[lane] = rows[lane].load(vectors, chunk);
            scales[lane] = rows[lane].scales(chunk);
        }
        F::expand(vectors, vectors.transpose(words), scales, out);
    }
}

/// P panels times a few columns.
struct Tile<'a, X, const P: usize> {
    panels: [&'a [X]; P],
    x: &'a Rows<X>,
    columns: &'a [usize],
    /// The results of these columns, for all rows.
    out: &'a mut [f32],
}

impl<X, const P: usize> Tile<'_, X, P> {
    /// Computes `count` results from the row `first` on, of `height`, for each column.
    #[inline(always)]
    fn multiply<V: Vectors>(self, vectors: V, height: usize, first: usize, count: usize)
    where
        X: Operand<V>,
    {
        match self.columns.len() {
            1 => self.multiply_columns::<V, 1>(vectors, height, first, count),
            2 => self.multiply_columns::<V, 2>(vectors, height, first, count),
            3 => self.multiply_columns::<V, 3>(vectors, height, first, count),
            4 => self.multiply_columns::<V, 4>(vectors, height, first, count),
            5 => self.multiply_columns::<V, 5>(vectors, height, first, count),
            6 => self.multiply_columns::<V, 6>(vectors, height, first, count),
            7 => self.multiply_columns::<V, 7>(vectors, height, first, count),
            8 => self.multiply_columns::<V, 8>(vectors, height, first, count),
            9 => self.multiply_columns::<V, 9>(vectors, height, first, count),
            10 => self.multiply_columns::<V, 10>(vectors, height, first, count),
            11 => self.multiply_columns::<V, 11>(vectors, height, first, count),
            12 => self.multiply_columns::<V, 12>(vectors, height, first, count),
            columns => unreachable!("{columns} columns in a tile"),
        }
    }

    #[inline(always)]
    fn multiply_columns<V: Vectors, const M: usize>(self, vectors: V, height: usize, first: usize, count: usize)
    where
        X: Operand<V>,
    {
        let x: [&[X::Lane]; M] = std::array::from_fn(|m| X::lanes(self.x.get(self.columns[m])));
        let sums = sums(vectors, self.panels, x);
        for (m, sums) in sums.into_iter().enumerate() {
            let out = &mut self.out[m * height + first..][..count];
            let mut values = [[0.0; PANEL_ROWS]; P];
            for p in 0..P {
                values[p] = vectors.store_f32(sums[p]);
            }
            out.copy_from_slice(&values.as_flattened()[..count]);
        }
    }
}

/// The sums of products of each of M columns with each of P panels.
#[inline(always)]
fn sums<V: Vectors, X: Operand<V>, const P: usize, const M: usize>(
    vectors: V,
    panels: [&[X]; P],
    x: [&[X::Lane]; M],
) -> [[V::Floats; P]; M] {
    // Told once that all are as long, the compiler checks no index in the loop.
    let length = panels[0].len();
    let (panels, x) = (panels.map(|panel| &panel[..length]), x.map(|x| &x[..length]));
    let mut sums = [[vectors.zero(); P]; M];
    for place in 0..length {
        let mut values = [panels[0][place].load(vectors); P];
        for p in 1..P {
            values[p] = panels[p][place].load(vectors);
        }
        for m in 0..M {
            let factor = X::splat(vectors, x[m][place]);
            for p in 0..P {
                sums[m][p] = X::mul_add(vectors, values[p], factor, sums[m][p]);
            }
        }
    }
    sums
}

/// A buffer for panels that each thread keeps: memory that is new is slow to touch.
pub(super) trait Scratch: Sized {
    fn take_scratch() -> Vec<Self>;
    fn keep_scratch(scratch: Vec<Self>);
}

thread_local! {
    static F32_SCRATCH: Cell<Vec<F32Line>> = const { Cell::new(Vec::new()) };
    static BF16_SCRATCH: Cell<Vec<Bf16Line>> = const { Cell::new(Vec::new()) };
}

impl Scratch for F32Line {
    fn take_scratch() -> Vec<Self> {
        F32_SCRATCH.take()
    }

    fn keep_scratch(scratch: Vec<Self>) {
        F32_SCRATCH.set(scratch);
    }
}

impl Scratch for Bf16Line {
    fn take_scratch() -> Vec<Self> {
        BF16_SCRATCH.take()
    }

    fn keep_scratch(scratch: Vec<Self>) {
        BF16_SCRATCH.set(scratch);
    }
}
