//! Blocks of keys and values: which positions they hold, and how they become rows to multiply by.

use zerocopy::{Immutable, IntoBytes};

use super::super::floats::Floats;
use super::super::packed::F32Line;
use crate::simd::Vectors;

/// Vectors of scores that a row of queries has in a block.
pub(super) const VECTORS: usize = 2;

/// Keys in a block.
pub(super) const KEYS: usize = 16 * VECTORS;

/// Positions from the first to the last, both among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: i32,
    pub(super) last: i32,
}

impl Span {
    pub(super) const NOTHING: Self = Self { first: i32::MAX, last: -1 };

    /// The least that holds all keys which are there.
    pub(super) fn of_keys(positions: &[i32]) -> Self {
        positions
            .iter()
            .filter(|&&position| position >= 0)
            .fold(Self::NOTHING, |span, &position| span.and(Self { first: position, last: position }))
    }

    /// The least that holds both.
    pub(super) fn and(self, other: Self) -> Self {
        Self { first: self.first.min(other.first), last: self.last.max(other.last) }
    }

    /// Whether a position may be in both.
    pub(super) fn meets(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Whether all positions of the other are in this.
    pub(super) fn holds(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

/// Keys and values of one head in a row of the batch: [S, G, D] from that head's first value on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) values: Floats<'a>,
    /// From a key to the next: G · D.
    pub(super) stride: usize,
    /// D.
    pub(super) head_dim: usize,
}

/// Keys and values of one head that are to be read next. They are asked for line by line while there is work on others: a
/// processor that is asked for all of them at once waits, for it keeps track of few.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ahead<'a> {
    keys: Bytes<'a>,
    values: Bytes<'a>,
}

/// Rows as they stand in memory.
#[derive(Debug, Clone, Copy)]
struct Bytes<'a> {
    rows: &'a [u8],
    /// From a row to the next.
    stride: usize,
    /// Sixteen values.
    vector: usize,
}

impl<'a> Ahead<'a> {
    /// Keys and values from a key on.
    pub(super) fn new([keys, values]: [Rows<'a>; 2], start: usize) -> Self {
        Self { keys: Bytes::new(keys, start), values: Bytes::new(values, start) }
    }

    /// Asks for a vector of a key, and for one of its value. There may be no such key: nothing is read.
    #[inline(always)]
    pub(super) fn ask<V: Vectors>(&self, vectors: V, key: usize, number: usize) {
        for Bytes { rows, stride, vector } in [self.keys, self.values] {
            vectors.prefetch(rows, key * stride + number * vector);
        }
    }
}

impl<'a> Bytes<'a> {
    fn new(rows: Rows<'a>, start: usize) -> Self {
        let first = start * rows.stride;
        let (bytes, size) = match rows.values {
            Floats::Bf16(values) => (values[first..].as_bytes(), size_of::<u16>()),
            Floats::F32(values) => (values[first..].as_bytes(), size_of::<f32>()),
        };
        Self { rows: bytes, stride: rows.stride * size, vector: 16 * size }
    }
}

/// A block's keys, turned, and its values, both widened to float32.
pub(super) struct Block {
    /// For each dimension the vectors of all keys.
    pub(super) keys: Vec<F32Line>,
    /// For each key the vectors of all dimensions; of bfloat16, which stands two to a lane, those of even ones and of odd
    /// ones in turn.
    pub(super) values: Vec<F32Line>,
    /// Of the keys; below 0 for those that are not there.
    pub(super) positions: [[i32; 16]; VECTORS],
    /// Of the keys that are there.
    pub(super) span: Span,
    /// Whether all keys are there.
    pub(super) is_full: bool,
}

impl Block {
    pub(super) fn new() -> Self {
        Self {
            keys: Vec::new(),
            values: Vec::new(),
            positions: [[-1; 16]; VECTORS],
            span: Span::NOTHING,
            is_full: false,
        }
    }

    /// Reads the block whose first key is at `start`, of keys at `positions`; `span` is that of the block.
    #[inline(always)]
    pub(super) fn read<V: Vectors>(
        &mut self,
        vectors: V,
        keys: Rows<'_>,
        values: Rows<'_>,
        positions: &[i32],
        span: Span,
        start: usize,
    ) {
        let positions = &positions[start..positions.len().min(start + KEYS)];
        self.positions = [[-1; 16]; VECTORS];
        self.positions.as_flattened_mut()[..positions.len()].copy_from_slice(positions);
        self.span = span;
        self.is_full = self.positions.as_flattened().iter().all(|position| *position >= 0);
        let there = self.positions.as_flattened();
        match keys.values {
            Floats::Bf16(all) => turn::<V, u16, 2>(vectors, all, keys, there, start, &mut self.keys),
            Floats::F32(all) => turn::<V, f32, 1>(vectors, all, keys, there, start, &mut self.keys),
        }
        match values.values {
            Floats::Bf16(all) => widen::<V, u16, 2>(vectors, all, values, there, start, &mut self.values),
            Floats::F32(all) => widen::<V, f32, 1>(vectors, all, values, there, start, &mut self.values),
        }
    }
}

/// Values in memory, N vectors of float32 to 64 bytes.
trait Stored<V: Vectors, const N: usize>: Copy + IntoBytes + Immutable {
    /// Of each 32-bit lane the values, the first of all lanes before the second.
    fn of_lanes(vectors: V, words: V::Words) -> [V::Floats; N];
}

impl<V: Vectors> Stored<V, 2> for u16 {
    #[inline(always)]
    fn of_lanes(vectors: V, words: V::Words) -> [V::Floats; 2] {
        [vectors.bf16_even(words), vectors.bf16_odd(words)]
    }
}

impl<V: Vectors> Stored<V, 1> for f32 {
    #[inline(always)]
    fn of_lanes(vectors: V, words: V::Words) -> [V::Floats; 1] {
        [vectors.floats(words)]
    }
}

/// 64 bytes of a row, and zeros behind its end.
#[inline(always)]
fn load<V: Vectors, X: IntoBytes + Immutable>(vectors: V, row: &[X], chunk: usize) -> V::Words {
    let (whole, rest) = row.as_bytes().as_chunks();
    match whole.get(chunk) {
        Some(line) => vectors.load(line),
        None => vectors.load_part(rest),
    }
}

/// A key's values; none, which are read as zeros, of one that is not there.
#[inline(always)]
fn row_of<'a, X>(all: &'a [X], rows: &Rows<'_>, position: i32, key: usize) -> &'a [X] {
    if position < 0 { &[] } else { &all[key * rows.stride..][..rows.head_dim] }
}

/// For each dimension the values of all keys.
#[inline(always)]
fn turn<V: Vectors, X: Stored<V, N>, const N: usize>(
    vectors: V,
    all: &[X],
    rows: Rows<'_>,
    positions: &[i32],
    start: usize,
    out: &mut Vec<F32Line>,
) {
    let chunks = rows.head_dim.div_ceil(16 * N);
    out.resize(chunks * 16 * N * VECTORS, F32Line([0.0; 16]));
    for (place, positions) in positions.as_chunks::<16>().0.iter().enumerate() {
        let first = start + 16 * place;
        for (chunk, out) in out.chunks_exact_mut(16 * N * VECTORS).enumerate() {
            let mut lines = [load::<V, X>(vectors, &[], 0); 16];
            for (lane, (line, position)) in lines.iter_mut().zip(positions).enumerate() {
                *line = load(vectors, row_of(all, &rows, *position, first + lane), chunk);
            }
            let turned = vectors.transpose(lines);
            for (words, out) in turned.into_iter().zip(out.chunks_exact_mut(N * VECTORS)) {
                let floats = X::of_lanes(vectors, words);
                for n in 0..N {
                    out[n * VECTORS + place] = F32Line(vectors.store_f32(floats[n]));
                }
            }
        }
    }
}

/// For each key its values.
#[inline(always)]
fn widen<V: Vectors, X: Stored<V, N>, const N: usize>(
    vectors: V,
    all: &[X],
    rows: Rows<'_>,
    positions: &[i32],
    start: usize,
    out: &mut Vec<F32Line>,
) {
    let chunks = rows.head_dim.div_ceil(16 * N);
    out.resize(KEYS * chunks * N, F32Line([0.0; 16]));
    for ((key, position), out) in (start..).zip(positions).zip(out.chunks_exact_mut(chunks * N)) {
        let row = row_of(all, &rows, *position, key);
        for (chunk, out) in out.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            let floats = X::of_lanes(vectors, load(vectors, row, chunk));
            for n in 0..N {
                out[n] = F32Line(vectors.store_f32(floats[n]));
            }
        }
    }
}
