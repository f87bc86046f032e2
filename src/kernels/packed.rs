//! Rows of activations in the order in which chunks of a matrix expand.
//!
//! A chunk of 64 bytes expands to N vectors of L values: value `lane * N + j` of the chunk is in lane `lane` of vector
//! j, for that is what a shift of all lanes and a table make of codes. Activations are put into the same order once,
//! rather than each row of a matrix into theirs. When sixteen rows of a matrix are transposed and then expanded, lane
//! `lane` of vector j is multiplied by theirs: the order is right for that, too.

use std::iter::zip;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::floats::{Floats, from_bf16};
use super::int8::{Int8Chunk, Quantize};
use super::matrix::{CHUNK_BYTES, Format, Matrix};
use super::threads::{Threads, for_each};
use crate::simd::{Level, Vectors};

/// Sixteen float32 where a line of the cache begins: products of one row took some 7% longer where each load crossed
/// lines (AVX-512, 2026-11).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub(super) struct F32Line(pub(super) [f32; 16]);

/// As many bytes of bfloat16.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub(super) struct Bf16Line(pub(super) [u16; 32]);

/// The values of one vector.
pub(super) trait Operand<V: Vectors>: Copy + Send + Sync + 'static {
    /// What they are in registers.
    type Vector: Copy;
    /// What one 32-bit lane holds.
    type Lane: Copy;
    /// Nothing but zeros.
    const ZERO: Self;

    fn load(&self, vectors: V) -> Self::Vector;
    /// The lanes of vectors that stand behind each other.
    fn lanes(values: &[Self]) -> &[Self::Lane];
    /// One lane's content in all lanes.
    fn splat(vectors: V, lane: Self::Lane) -> Self::Vector;
    /// The products of two vectors added to sums.
    fn mul_add(vectors: V, a: Self::Vector, b: Self::Vector, sums: V::Floats) -> V::Floats;
}

impl<V: Vectors> Operand<V> for F32Line {
    type Vector = V::Floats;
    type Lane = f32;
    const ZERO: Self = Self([0.0; 16]);

    #[inline(always)]
    fn lanes(values: &[Self]) -> &[f32] {
        <[f32]>::ref_from_bytes(values.as_bytes()).expect("whole float32")
    }

    #[inline(always)]
    fn splat(vectors: V, lane: f32) -> V::Floats {
        vectors.splat(lane)
    }

    #[inline(always)]
    fn load(&self, vectors: V) -> V::Floats {
        vectors.load_f32(&self.0)
    }

    #[inline(always)]
    fn mul_add(vectors: V, a: V::Floats, b: V::Floats, sums: V::Floats) -> V::Floats {
        vectors.mul_add(a, b, sums)
    }
}

impl<V: Vectors> Operand<V> for Bf16Line {
    type Vector = V::Words;
    type Lane = [u16; 2];
    const ZERO: Self = Self([0; 32]);

    #[inline(always)]
    fn lanes(values: &[Self]) -> &[[u16; 2]] {
        <[[u16; 2]]>::ref_from_bytes(values.as_bytes()).expect("whole pairs of bfloat16")
    }

    #[inline(always)]
    fn splat(vectors: V, [even, odd]: [u16; 2]) -> V::Words {
        vectors.splat_words(u32::from(odd) << 16 | u32::from(even))
    }

    #[inline(always)]
    fn load(&self, vectors: V) -> V::Words {
        vectors.load(zerocopy::transmute_ref!(&self.0))
    }

    #[inline(always)]
    fn mul_add(vectors: V, a: V::Words, b: V::Words, sums: V::Floats) -> V::Floats {
        vectors.bf16_dot(a, b, sums)
    }
}

/// Packed rows: of float32, of bfloat16 for processors that multiply it, or of int8 for matrices that ask for it.
#[derive(Debug)]
pub(super) enum Packed {
    F32(Rows<F32Line>),
    Bf16(Rows<Bf16Line>),
    Int8(Rows<Int8Chunk>),
}

/// Packed rows of one length.
#[derive(Debug)]
pub(super) struct Rows<X> {
    vectors: Vec<X>,
    vectors_of_row: usize,
}

impl<X> Rows<X> {
    pub(super) fn vectors_of_row(&self) -> usize {
        self.vectors_of_row
    }

    #[inline(always)]
    pub(super) fn get(&self, row: usize) -> &[X] {
        &self.vectors[row * self.vectors_of_row..(row + 1) * self.vectors_of_row]
    }
}

impl Packed {
    /// Rows of as many values as `matrix` has columns, for products with it or with others of its kind. bfloat16 stays
    /// what it is where `level` multiplies it.
    pub(super) fn new(level: Level, threads: &dyn Threads, x: Floats<'_>, matrix: &Matrix<'_>) -> Self {
        let columns = matrix.columns();
        let rows = x.len().checked_div(columns).unwrap_or(0);
        match x {
            Floats::Bf16(values) if level.has_bf16_dot() && !matrix.takes_int8() => {
                Self::Bf16(pack(threads, rows, matrix, |row, out| {
                    out.copy_from_slice(&values[row * columns..][..columns]);
                }))
            }
            Floats::Bf16(values) => Self::written(level, threads, rows, matrix, |row, out| {
                zip(out, &values[row * columns..]).for_each(|(out, value)| *out = from_bf16(*value));
            }),
            Floats::F32(values) => Self::written(level, threads, rows, matrix, |row, out| {
                out.copy_from_slice(&values[row * columns..][..columns]);
            }),
        }
    }

    /// As `new`, of rows in float32, each of which `write` writes.
    pub(super) fn written(
        level: Level,
        threads: &dyn Threads,
        rows: usize,
        matrix: &Matrix<'_>,
        write: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        if matrix.takes_int8() {
            Self::Int8(quantize(level, threads, rows, matrix.columns(), write))
        } else {
            Self::F32(pack(threads, rows, matrix, write))
        }
    }
}

/// Rows that one task packs: about as long as it takes to wake a thread.
const ROWS_OF_TASK: usize = 8;

/// Rows of T in lines of X.
fn pack<T, X>(
    threads: &dyn Threads,
    rows: usize,
    matrix: &Matrix<'_>,
    write: impl Fn(usize, &mut [T]) + Sync,
) -> Rows<X>
where
    T: Copy + FromBytes + IntoBytes,
    X: Clone + Send + FromBytes + IntoBytes,
{
    let lanes = CHUNK_BYTES / size_of::<T>();
    let columns = matrix.columns();
    let values_of_chunk = match matrix.format() {
        Format::Mxfp4 => 2 * CHUNK_BYTES,
        Format::Bf16 => CHUNK_BYTES / 2,
    };
    let vectors_of_chunk = values_of_chunk / lanes;
    let chunks_of_row = columns.div_ceil(values_of_chunk);
    let vectors_of_row = chunks_of_row * vectors_of_chunk;
    let mut vectors = vec![X::new_zeroed(); rows * vectors_of_row];
    let rows_of_task = vectors.chunks_mut((ROWS_OF_TASK * vectors_of_row).max(1));
    for_each(threads, rows_of_task.enumerate(), &|(task, vectors)| {
        let mut values = vec![T::new_zeroed(); chunks_of_row * values_of_chunk];
        for (row, vectors) in (task * ROWS_OF_TASK..).zip(vectors.chunks_exact_mut(vectors_of_row)) {
            write(row, &mut values[..columns]);
            let packed = <[T]>::mut_from_bytes(vectors.as_mut_bytes()).expect("whole values");
            for (packed, values) in zip(packed.chunks_exact_mut(values_of_chunk), values.chunks_exact(values_of_chunk))
            {
                for (lane, values) in values.chunks_exact(vectors_of_chunk).enumerate() {
                    zip(packed[lane..].iter_mut().step_by(lanes), values).for_each(|(packed, value)| *packed = *value);
                }
            }
        }
    });
    Rows { vectors, vectors_of_row }
}

fn quantize(
    level: Level,
    threads: &dyn Threads,
    rows: usize,
    columns: usize,
    write: impl Fn(usize, &mut [f32]) + Sync,
) -> Rows<Int8Chunk> {
    let chunks_of_row = columns.div_ceil(2 * CHUNK_BYTES);
    let mut chunks = vec![Int8Chunk::ZERO; rows * chunks_of_row];
    let rows_of_task = chunks.chunks_mut((ROWS_OF_TASK * chunks_of_row).max(1));
    for_each(threads, rows_of_task.enumerate(), &|(task, chunks)| {
        let mut values = vec![0.0; chunks_of_row * 2 * CHUNK_BYTES];
        for (row, chunks) in (task * ROWS_OF_TASK..).zip(chunks.chunks_exact_mut(chunks_of_row)) {
            write(row, &mut values[..columns]);
            level.run(Quantize { values: &values, chunks });
        }
    });
    Rows { vectors: chunks, vectors_of_row: chunks_of_row }
}
