//! Rows of queries against blocks of keys.

use std::iter::zip;
use std::ops::Range;

use super::super::floats::{Floats, FloatsMut, from_bf16};
use super::Attention;
use super::block::{Block, KEYS, Rows, Span, VECTORS};
use crate::simd::{Level, VectorKernel, Vectors, exp};

/// Rows of queries whose sums are in registers at once.
const ROWS: usize = 4;

/// Tokens of one row of the batch, with the query heads that share a head of keys.
#[derive(Debug)]
pub(super) struct Tile<'a> {
    inputs: &'a Attention<'a>,
    /// Of each block of the row's keys.
    spans: &'a [Span],
    row: usize,
    group: usize,
    tokens: Range<usize>,
}

impl<'a> Tile<'a> {
    pub(super) fn new(
        inputs: &'a Attention<'a>,
        spans: &'a [Span],
        row: usize,
        group: usize,
        tokens: Range<usize>,
    ) -> Self {
        Self { inputs, spans, row, group, tokens }
    }

    /// The work on one of `parts` equal parts of the blocks that the tile sees.
    pub(super) fn part(&self, part: usize, parts: usize) -> Part<'_> {
        Part { tile: self, part, parts }
    }

    /// What each token sees.
    fn seen(&self) -> impl Iterator<Item = Span> {
        let first = self.row * self.inputs.queries();
        let positions = &self.inputs.query_positions[first + self.tokens.start..first + self.tokens.end];
        positions.iter().map(|position| self.inputs.seen_from(*position))
    }

    /// Its head of keys or values.
    fn rows_of(&self, all: Floats<'a>) -> Rows<'a> {
        let (stride, head_dim) = (self.inputs.key_heads * self.inputs.head_dim, self.inputs.head_dim);
        let first = self.row * self.inputs.keys() * stride + self.group * head_dim;
        Rows { values: all.from(first), stride, head_dim }
    }

    /// Rows of queries, scaled, and what each sees; the last ones, which make them a multiple of [`ROWS`], nothing.
    #[inline(always)]
    fn queries(&self) -> (Vec<f32>, Vec<Span>) {
        let (heads, head_dim, scale) = (self.inputs.heads_of_group(), self.inputs.head_dim, self.inputs.scale);
        let rows = (self.tokens.len() * heads).next_multiple_of(ROWS);
        let (mut queries, mut seen) = (vec![0.0; rows * head_dim], vec![Span::NOTHING; rows]);
        for (span, seen) in zip(self.seen(), seen.chunks_mut(heads)) {
            seen.fill(span);
        }
        for (token, out) in zip(self.tokens.clone(), queries.chunks_mut(heads * head_dim)) {
            let first =
                ((self.row * self.inputs.queries() + token) * self.inputs.heads + self.group * heads) * head_dim;
            match self.inputs.query.from(first) {
                Floats::Bf16(values) => zip(out, values).for_each(|(out, value)| *out = from_bf16(*value) * scale),
                Floats::F32(values) => zip(out, values).for_each(|(out, value)| *out = value * scale),
            }
        }
        (queries, seen)
    }
}

/// A tile and some of the blocks that it sees.
pub(super) struct Part<'a> {
    tile: &'a Tile<'a>,
    part: usize,
    parts: usize,
}

impl VectorKernel for Part<'_> {
    type Output = State;

    #[inline(always)]
    fn run<V: Vectors>(self, vectors: V) -> State {
        let Self { tile, part, parts } = self;
        let (queries, seen) = tile.queries();
        // The sink is a score of one part alone.
        let mut state = State::new(tile, seen.len(), part == 0);
        let all = seen.iter().copied().fold(Span::NOTHING, Span::and);
        let blocks: Vec<usize> = (0..tile.spans.len()).filter(|block| tile.spans[*block].meets(all)).collect();
        let blocks = &blocks[blocks.len() * part / parts..blocks.len() * (part + 1) / parts];
        let (keys, values) = (tile.rows_of(tile.inputs.key), tile.rows_of(tile.inputs.value));
        let first = tile.row * tile.inputs.keys();
        let positions = &tile.inputs.key_positions[first..first + tile.inputs.keys()];
        let mut block = Block::new();
        for &number in blocks {
            block.read(vectors, keys, values, positions, number * KEYS);
            state.see(vectors, &queries, &seen, &block, tile.spans[number]);
        }
        state
    }
}

/// What rows of queries know after some blocks.
pub(super) struct State {
    /// D.
    head_dim: usize,
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
    fn new(tile: &Tile<'_>, rows: usize, has_sinks: bool) -> Self {
        let inputs = tile.inputs;
        let mut largest = vec![f32::NEG_INFINITY; rows];
        let mut totals = vec![[0.0; 16]; rows];
        let heads = inputs.heads_of_group();
        if let Some(sinks) = inputs.sinks.filter(|_| has_sinks) {
            for (row, (largest, total)) in zip(&mut largest, &mut totals).enumerate().take(tile.tokens.len() * heads) {
                *largest = sinks.get(tile.group * heads + row % heads);
                // e^0, or NaN if the sink is infinite or NaN.
                total[0] = if *largest == f32::NEG_INFINITY { 0.0 } else { *largest - *largest + 1.0 };
            }
        }
        // As many vectors as the values of a block are widened to.
        let width = match inputs.value {
            Floats::Bf16(_) => 2 * inputs.head_dim.div_ceil(32),
            Floats::F32(_) => inputs.head_dim.div_ceil(16),
        };
        Self { head_dim: inputs.head_dim, largest, totals, mixed: vec![[0.0; 16]; rows * width] }
    }

    /// Adds a block, whose keys are at positions of `span`.
    #[inline(always)]
    fn see<V: Vectors>(&mut self, vectors: V, queries: &[f32], seen: &[Span], block: &Block, span: Span) {
        let width = self.mixed.len() / self.largest.len();
        let rows = zip(queries.chunks_exact(ROWS * self.head_dim), seen.as_chunks::<ROWS>().0);
        let known = zip(self.largest.as_chunks_mut::<ROWS>().0, self.totals.as_chunks_mut::<ROWS>().0);
        for ((queries, seen), ((largest, totals), mixed)) in
            rows.zip(known.zip(self.mixed.chunks_exact_mut(ROWS * width)))
        {
            if !seen.iter().any(|seen| seen.meets(span)) {
                continue;
            }
            let scores = scores(vectors, queries, block);
            let mut shares = [[[0.0; 16]; VECTORS]; ROWS];
            let mut factors = [vectors.zero(); ROWS];
            for row in 0..ROWS {
                let is_whole = block.is_full && seen[row].holds(span);
                let scores = if is_whole { scores[row] } else { hide(vectors, scores[row], seen[row], block) };
                (shares[row], factors[row]) = softmax(vectors, scores, &mut largest[row], &mut totals[row]);
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

/// Writes what rows know from several parts of their keys: for each token the values of its heads.
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
        let head_dim = self.parts[0].head_dim;
        let mut row = 0;
        let mut mixed = vec![0.0; head_dim];
        for out in self.out {
            for mut out in out.reborrow().chunks(head_dim) {
                merge(vectors, self.parts, row, &mut mixed);
                out.copy_from(mixed.iter().copied());
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
        let width = part.mixed.len() / part.largest.len();
        let mixed = &part.mixed[row * width..(row + 1) * width];
        zip(&mut *out, mixed.as_flattened()).for_each(|(out, mixed)| *out += mixed * factor);
    }
    let total = vectors.sum(total);
    if total != 0.0 {
        out.iter_mut().for_each(|out| *out /= total);
    }
}
