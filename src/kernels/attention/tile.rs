//! Rows of queries against blocks of keys.

use std::iter::zip;
use std::ops::Range;

use super::super::floats::{Floats, FloatsMut, from_bf16};
use super::Attention;
use super::block::{Block, KEYS, Rows, Span, VECTORS};
use crate::simd::{Level, VectorKernel, Vectors, exp};

/// Rows of queries whose sums are in registers at once.
const ROWS: usize = 4;

/// Tokens of one row of the batch, with the query heads that share some heads of keys.
#[derive(Debug)]
pub(super) struct Tile<'a> {
    pub(super) inputs: &'a Attention<'a>,
    /// Of each block of the row's keys.
    pub(super) spans: &'a [Span],
    /// Of the batch.
    pub(super) row: usize,
    /// Heads of keys.
    pub(super) groups: Range<usize>,
    pub(super) tokens: Range<usize>,
}

impl<'a> Tile<'a> {
    /// The work on one of `parts` equal parts of the blocks that the tile sees.
    pub(super) fn part(&self, part: usize, parts: usize) -> Part<'_> {
        Part { tile: self, number: part, of: parts }
    }

    /// Rows of queries that a group has.
    fn rows(&self) -> usize {
        self.tokens.len() * self.inputs.heads_of_group()
    }

    /// The same with rows that see nothing, which make them a multiple of [`ROWS`].
    fn padded_rows(&self) -> usize {
        self.rows().next_multiple_of(ROWS)
    }

    /// What the rows of a group see.
    fn seen(&self) -> Vec<Span> {
        let first = self.row * self.inputs.queries();
        let positions = &self.inputs.query_positions[first + self.tokens.start..first + self.tokens.end];
        let mut seen = vec![Span::NOTHING; self.padded_rows()];
        for (position, seen) in zip(positions, seen.chunks_mut(self.inputs.heads_of_group())) {
            seen.fill(self.inputs.seen_from(*position));
        }
        seen
    }

    /// Rows of queries, scaled, of all groups.
    #[inline(always)]
    fn queries(&self) -> Vec<f32> {
        let (heads, head_dim, scale) = (self.inputs.heads_of_group(), self.inputs.head_dim, self.inputs.scale);
        let mut queries = vec![0.0; self.groups.len() * self.padded_rows() * head_dim];
        for (group, out) in zip(self.groups.clone(), queries.chunks_mut(self.padded_rows() * head_dim)) {
            for (token, out) in zip(self.tokens.clone(), out.chunks_mut(heads * head_dim)) {
                let token = self.row * self.inputs.queries() + token;
                match self.inputs.query.from((token * self.inputs.heads + group * heads) * head_dim) {
                    Floats::Bf16(values) => zip(out, values).for_each(|(out, value)| *out = from_bf16(*value) * scale),
                    Floats::F32(values) => zip(out, values).for_each(|(out, value)| *out = value * scale),
                }
            }
        }
        queries
    }

    /// A head of the keys or the values.
    fn rows_of(&self, all: Floats<'a>, group: usize) -> Rows<'a> {
        let (stride, head_dim) = (self.inputs.key_heads * self.inputs.head_dim, self.inputs.head_dim);
        let first = self.row * self.inputs.keys() * stride + group * head_dim;
        Rows { values: all.from(first), stride, head_dim }
    }
}

/// A tile and some of the blocks that it sees.
pub(super) struct Part<'a> {
    tile: &'a Tile<'a>,
    number: usize,
    of: usize,
}

impl VectorKernel for Part<'_> {
    type Output = State;

    #[inline(always)]
    fn run<V: Vectors>(self, vectors: V) -> State {
        let Self { tile, number: part, of: parts } = self;
        let inputs = tile.inputs;
        let (queries, seen) = (tile.queries(), tile.seen());
        // The sink is a score of one part alone.
        let mut state = State::new(tile, part == 0);
        let all = seen.iter().copied().fold(Span::NOTHING, Span::and);
        let blocks: Vec<usize> = (0..tile.spans.len()).filter(|block| tile.spans[*block].meets(all)).collect();
        let blocks = &blocks[blocks.len() * part / parts..blocks.len() * (part + 1) / parts];
        let positions = &inputs.key_positions[tile.row * inputs.keys()..(tile.row + 1) * inputs.keys()];
        let mut block = Block::new();
        for &number in blocks {
            // All heads of a block, for they stand side by side.
            for (place, group) in tile.groups.clone().enumerate() {
                let (keys, values) = (tile.rows_of(inputs.key, group), tile.rows_of(inputs.value, group));
                block.read(vectors, keys, values, positions, number * KEYS);
                state.see(vectors, place, &queries, &seen, &block, tile.spans[number]);
            }
        }
        state
    }
}

/// What rows of queries know after some blocks.
pub(super) struct State {
    /// D.
    head_dim: usize,
    /// Rows of a group, without and with those that see nothing.
    rows: usize,
    padded_rows: usize,
    /// Vectors of values in a row.
    width: usize,
    /// Of each row the largest score so far; −∞ before any.
    largest: Vec<f32>,
    /// Of each row the sum of e^(score − largest), in 16 parts.
    totals: Vec<[f32; 16]>,
    /// Of each row the vectors of the sum of values, each times its e^(score − largest).
    mixed: Vec<[f32; 16]>,
}

/// The scores so far have shares of e^(score − base): of the largest, where there is any.
#[inline(always)]
fn base(largest: f32) -> f32 {
    if largest == f32::NEG_INFINITY { 0.0 } else { largest }
}

impl State {
    /// Before any block; with the sinks or without.
    fn new(tile: &Tile<'_>, has_sinks: bool) -> Self {
        let (inputs, rows) = (tile.inputs, tile.padded_rows());
        let mut largest = vec![f32::NEG_INFINITY; tile.groups.len() * rows];
        let mut totals = vec![[0.0; 16]; tile.groups.len() * rows];
        if let Some(sinks) = inputs.sinks.filter(|_| has_sinks) {
            let heads = inputs.heads_of_group();
            for (place, group) in tile.groups.clone().enumerate() {
                for row in 0..tile.rows() {
                    let sink = sinks.get(group * heads + row % heads);
                    largest[place * rows + row] = sink;
                    // 1; 0 for −∞, and NaN for what is no logit.
                    totals[place * rows + row][0] = (sink - base(sink)).exp();
                }
            }
        }
        // As many vectors as the values of a block are widened to.
        let width = match inputs.value {
            Floats::Bf16(_) => 2 * inputs.head_dim.div_ceil(32),
            Floats::F32(_) => inputs.head_dim.div_ceil(16),
        };
        let mixed = vec![[0.0; 16]; largest.len() * width];
        Self { head_dim: inputs.head_dim, rows: tile.rows(), padded_rows: rows, width, largest, totals, mixed }
    }

    /// Adds a block, whose keys are at positions of `span`, to what the rows of a group know.
    #[inline(always)]
    fn see<V: Vectors>(&mut self, vectors: V, group: usize, queries: &[f32], seen: &[Span], block: &Block, span: Span) {
        let (width, length) = (self.width, self.head_dim);
        for (first, seen) in (group * self.padded_rows..).step_by(ROWS).zip(seen.as_chunks::<ROWS>().0) {
            if !seen.iter().any(|seen| seen.meets(span)) {
                continue;
            }
            let queries = &queries[first * length..(first + ROWS) * length];
            let mixed = &mut self.mixed[first * width..(first + ROWS) * width];
            let scores = scores(vectors, queries, block);
            let mut shares = [[[0.0; 16]; VECTORS]; ROWS];
            let mut factors = [vectors.zero(); ROWS];
            for row in 0..ROWS {
                let is_whole = block.is_full && seen[row].holds(span);
                let scores = if is_whole { scores[row] } else { hide(vectors, scores[row], seen[row], block) };
                (shares[row], factors[row]) =
                    softmax(vectors, scores, &mut self.largest[first + row], &mut self.totals[first + row]);
            }
            let shares = [0, 1, 2, 3].map(|row: usize| shares[row].as_flattened());
            for first in (0..width).step_by(4) {
                match width - first {
                    1 => mix::<V, 1>(vectors, shares, factors, &block.values, mixed, width, first),
                    2 => mix::<V, 2>(vectors, shares, factors, &block.values, mixed, width, first),
                    3 => mix::<V, 3>(vectors, shares, factors, &block.values, mixed, width, first),
                    _ => mix::<V, 4>(vectors, shares, factors, &block.values, mixed, width, first),
                }
            }
        }
    }
}

/// The scores of some rows with all keys of a block.
#[inline(always)]
fn scores<V: Vectors>(vectors: V, queries: &[f32], block: &Block) -> [[V::Floats; VECTORS]; ROWS] {
    let length = queries.len() / ROWS;
    let rows = [0, 1, 2, 3].map(|row: usize| &queries[row * length..(row + 1) * length]);
    multiply(vectors, rows, &block.keys, VECTORS, 0, [[vectors.zero(); VECTORS]; ROWS])
}

/// −∞ for keys that a query does not see.
#[inline(always)]
fn hide<V: Vectors>(vectors: V, scores: [V::Floats; VECTORS], seen: Span, block: &Block) -> [V::Floats; VECTORS] {
    let mut scores = scores;
    for (score, positions) in zip(&mut scores, &block.positions) {
        let positions = vectors.load(zerocopy::transmute_ref!(positions));
        *score = vectors.within(*score, positions, seen.first, seen.last);
    }
    scores
}

/// e^(score − the largest so far) of a row, and the factor of what was before.
#[inline(always)]
fn softmax<V: Vectors>(
    vectors: V,
    scores: [V::Floats; VECTORS],
    largest: &mut f32,
    total: &mut [f32; 16],
) -> ([[f32; 16]; VECTORS], V::Floats) {
    let mut most = scores[0];
    for score in &scores[1..] {
        most = vectors.max(most, *score);
    }
    let before = *largest;
    *largest = before.max(vectors.largest(most));
    let base = base(*largest);
    let factor = exp(vectors, vectors.splat(before - base));
    let mut sum = vectors.mul(vectors.load_f32(total), factor);
    let mut shares = [[0.0; 16]; VECTORS];
    for (share, score) in zip(&mut shares, scores) {
        let value = exp(vectors, vectors.add(score, vectors.splat(-base)));
        sum = vectors.add(sum, value);
        *share = vectors.store_f32(value);
    }
    *total = vectors.store_f32(sum);
    (shares, factor)
}

/// Adds values times their shares to some vectors of rows, after the factors of what was before.
#[inline(always)]
fn mix<V: Vectors, const N: usize>(
    vectors: V,
    shares: [&[f32]; ROWS],
    factors: [V::Floats; ROWS],
    values: &[[f32; 16]],
    mixed: &mut [[f32; 16]],
    width: usize,
    first: usize,
) {
    let mut sums = [[vectors.zero(); N]; ROWS];
    for row in 0..ROWS {
        for n in 0..N {
            sums[row][n] = vectors.mul(vectors.load_f32(&mixed[row * width + first + n]), factors[row]);
        }
    }
    let sums = multiply(vectors, shares, values, width, first, sums);
    for row in 0..ROWS {
        for n in 0..N {
            mixed[row * width + first + n] = vectors.store_f32(sums[row][n]);
        }
    }
}

/// Adds to sums the products of rows with N columns, from `first` on, of a matrix of so many columns.
#[inline(always)]
fn multiply<V: Vectors, const N: usize>(
    vectors: V,
    rows: [&[f32]; ROWS],
    matrix: &[[f32; 16]],
    columns: usize,
    first: usize,
    sums: [[V::Floats; N]; ROWS],
) -> [[V::Floats; N]; ROWS] {
    if V::HAS_MANY_REGISTERS {
        return multiply_at_once(vectors, rows, matrix, columns, first, sums);
    }
    let mut sums = sums;
    for n in 0..N {
        let column = [[sums[0][n]], [sums[1][n]], [sums[2][n]], [sums[3][n]]];
        for (sums, [sum]) in zip(&mut sums, multiply_at_once(vectors, rows, matrix, columns, first + n, column)) {
            sums[n] = sum;
        }
    }
    sums
}

/// As [`multiply`], with all sums in registers.
#[inline(always)]
fn multiply_at_once<V: Vectors, const N: usize>(
    vectors: V,
    rows: [&[f32]; ROWS],
    matrix: &[[f32; 16]],
    columns: usize,
    first: usize,
    sums: [[V::Floats; N]; ROWS],
) -> [[V::Floats; N]; ROWS] {
    let length = rows[0].len();
    // Told once that all are as long, the compiler checks no index in the loop.
    let rows = rows.map(|row| &row[..length]);
    let mut sums = sums;
    for (place, line) in matrix.chunks_exact(columns).enumerate().take(length) {
        let line: &[[f32; 16]; N] = line[first..].first_chunk().expect("there are so many columns");
        let mut loaded = [vectors.zero(); N];
        for n in 0..N {
            loaded[n] = vectors.load_f32(&line[n]);
        }
        for row in 0..ROWS {
            let factor = vectors.splat(rows[row][place]);
            for n in 0..N {
                sums[row][n] = vectors.mul_add(factor, loaded[n], sums[row][n]);
            }
        }
    }
    sums
}

/// Writes what rows know from several parts of their keys: for each group and each token the values of its heads.
pub(super) fn write(level: Level, parts: &[State], out: &mut [FloatsMut<'_>]) {
    level.run_vectors(Write { parts, out });
}

struct Write<'a, 'b> {
    parts: &'a [State],
    out: &'a mut [FloatsMut<'b>],
}

impl VectorKernel for Write<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vectors>(self, vectors: V) {
        let State { head_dim, rows, padded_rows, .. } = self.parts[0];
        let mut mixed = vec![0.0; head_dim];
        let mut row = 0;
        for out in self.out {
            for mut out in out.reborrow().chunks(head_dim) {
                merge(vectors, self.parts, row / rows * padded_rows + row % rows, &mut mixed);
                out.write([&mixed[..]]);
                row += 1;
            }
        }
    }
}

/// The mean of a row's values.
#[inline(always)]
fn merge<V: Vectors>(vectors: V, parts: &[State], row: usize, out: &mut [f32]) {
    let largest = parts.iter().fold(f32::NEG_INFINITY, |largest, part| largest.max(part.largest[row]));
    let mut total = vectors.zero();
    out.fill(0.0);
    for part in parts {
        let factor = (part.largest[row] - base(largest)).exp();
        total = vectors.mul_add(vectors.load_f32(&part.totals[row]), vectors.splat(factor), total);
        let mixed = &part.mixed[row * part.width..(row + 1) * part.width];
        zip(&mut *out, mixed.as_flattened()).for_each(|(out, mixed)| *out += mixed * factor);
    }
    let total = vectors.sum(total);
    if total != 0.0 {
        for out in out {
            *out /= total;
        }
    }
}
