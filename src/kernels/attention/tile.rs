//! Rows of queries against blocks of keys.

use std::iter::zip;
use std::ops::Range;

use super::super::floats::{Floats, FloatsMut, from_bf16};
use super::super::packed::{F32Line, Operand};
use super::Attention;
use super::block::{Ahead, Block, KEYS, Rows, Span, VECTORS};
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
        let rows_of = |group: usize| [inputs.key, inputs.value].map(|all| tile.rows_of(all, group));
        // All heads of a block, for they stand side by side.
        let heads = tile.groups.clone().enumerate();
        let mut work = blocks.iter().flat_map(|block| heads.clone().map(|head| (*block, head))).peekable();
        let mut block = Block::new();
        while let Some((number, (place, group))) = work.next() {
            let [keys, values] = rows_of(group);
            block.read(vectors, keys, values, positions, tile.spans[number], number * KEYS);
            let ahead = work.peek().map(|&(number, (_, group))| Ahead::new(rows_of(group), number * KEYS));
            state.see(vectors, place, &queries, &seen, &block, ahead);
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
    /// How many vectors hold the values of the same 64 bytes: one has the first of each lane, the next the second.
    per_lane: usize,
    /// Of each row the largest score so far; −∞ before any.
    largest: Vec<f32>,
    /// Of each row the sum of e^(score − largest), in 16 parts.
    totals: Vec<F32Line>,
    /// Of each row the vectors of the sum of values, each times its e^(score − largest).
    mixed: Vec<F32Line>,
    /// Of rows in work the scores with all keys of a block.
    scores: Vec<F32Line>,
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
        let mut totals = vec![F32Line([0.0; 16]); tile.groups.len() * rows];
        if let Some(sinks) = inputs.sinks.filter(|_| has_sinks) {
            let heads = inputs.heads_of_group();
            for (place, group) in tile.groups.clone().enumerate() {
                for row in 0..tile.rows() {
                    let sink = sinks.get(group * heads + row % heads);
                    largest[place * rows + row] = sink;
                    // 1; 0 for −∞, and NaN for what is no logit.
                    totals[place * rows + row].0[0] = (sink - base(sink)).exp();
                }
            }
        }
        let per_lane = match inputs.value {
            Floats::Bf16(_) => 2,
            Floats::F32(_) => 1,
        };
        // As many vectors as the values of a block are widened to.
        let width = per_lane * inputs.head_dim.div_ceil(16 * per_lane);
        let mixed = vec![F32Line([0.0; 16]); largest.len() * width];
        let scores = vec![F32Line([0.0; 16]); ROWS * VECTORS];
        Self {
            head_dim: inputs.head_dim,
            rows: tile.rows(),
            padded_rows: rows,
            width,
            per_lane,
            largest,
            totals,
            mixed,
            scores,
        }
    }

    /// Adds a block to what the rows of a group know; asks for what is `ahead`.
    #[inline(always)]
    fn see<V: Vectors>(
        &mut self,
        vectors: V,
        group: usize,
        queries: &[f32],
        seen: &[Span],
        block: &Block,
        mut ahead: Option<Ahead<'_>>,
    ) {
        let (width, length) = (self.width, self.head_dim);
        for (first, seen) in (group * self.padded_rows..).step_by(ROWS).zip(seen.as_chunks::<ROWS>().0) {
            if !seen.iter().any(|seen| seen.meets(block.span)) {
                continue;
            }
            let queries = split_rows(&queries[first * length..(first + ROWS) * length]);
            let scores = &mut self.scores;
            scores.fill(F32Line([0.0; 16]));
            multiply(vectors, queries, &block.keys, [vectors.splat(1.0); ROWS], scores, None);
            let mut factors = [vectors.zero(); ROWS];
            for (row, scores) in scores.as_chunks_mut::<VECTORS>().0.iter_mut().enumerate() {
                if !(block.is_full && seen[row].holds(block.span)) {
                    hide(vectors, scores, seen[row], block);
                }
                let (largest, total) = (&mut self.largest[first + row], &mut self.totals[first + row]);
                factors[row] = softmax(vectors, scores, largest, total);
            }
            let mixed = &mut self.mixed[first * width..(first + ROWS) * width];
            let shares = split_rows(<F32Line as Operand<V>>::lanes(scores));
            multiply(vectors, shares, &block.values, factors, mixed, ahead.take());
        }
    }
}

/// Rows that stand one behind the other.
#[inline(always)]
fn split_rows(values: &[f32]) -> [&[f32]; ROWS] {
    let length = values.len() / ROWS;
    [0, 1, 2, 3].map(|row: usize| &values[row * length..(row + 1) * length])
}

/// −∞ for keys that a query does not see.
#[inline(always)]
fn hide<V: Vectors>(vectors: V, scores: &mut [F32Line; VECTORS], seen: Span, block: &Block) {
    for (score, positions) in zip(scores, &block.positions) {
        let positions = vectors.load_words(zerocopy::transmute_ref!(positions));
        score.0 = vectors.store_f32(vectors.within(vectors.load_f32(&score.0), positions, seen.first, seen.last));
    }
}

/// Makes of a row's scores e^(score − the largest so far); returns the factor of what was before.
#[inline(always)]
fn softmax<V: Vectors>(
    vectors: V,
    scores: &mut [F32Line; VECTORS],
    largest: &mut f32,
    total: &mut F32Line,
) -> V::Floats {
    let mut most = vectors.load_f32(&scores[0].0);
    for score in &scores[1..] {
        most = vectors.max(most, vectors.load_f32(&score.0));
    }
    let before = *largest;
    *largest = before.max(vectors.largest(most));
    let base = base(*largest);
    let factor = exp(vectors, vectors.splat(before - base));
    let mut sum = vectors.mul(vectors.load_f32(&total.0), factor);
    for score in scores {
        let share = exp(vectors, vectors.add(vectors.load_f32(&score.0), vectors.splat(-base)));
        sum = vectors.add(sum, share);
        score.0 = vectors.store_f32(share);
    }
    total.0 = vectors.store_f32(sum);
    factor
}

/// Adds to sums, times their row's factor, the products of rows with a matrix of as many columns as a row has sums.
#[inline(always)]
fn multiply<V: Vectors>(
    vectors: V,
    rows: [&[f32]; ROWS],
    matrix: &[F32Line],
    factors: [V::Floats; ROWS],
    sums: &mut [F32Line],
    ahead: Option<Ahead<'_>>,
) {
    // As many sums at once as there are registers for.
    let (columns, width) = (sums.len() / ROWS, if V::HAS_MANY_REGISTERS { 4 } else { 1 });
    for first in (0..columns).step_by(width) {
        match width.min(columns - first) {
            1 => multiply_columns::<V, 1>(vectors, rows, matrix, factors, sums, first, ahead),
            2 => multiply_columns::<V, 2>(vectors, rows, matrix, factors, sums, first, ahead),
            3 => multiply_columns::<V, 3>(vectors, rows, matrix, factors, sums, first, ahead),
            _ => multiply_columns::<V, 4>(vectors, rows, matrix, factors, sums, first, ahead),
        }
    }
}

/// As [`multiply`], N columns from `first` on, whose sums are in registers.
#[inline(always)]
fn multiply_columns<V: Vectors, const N: usize>(
    vectors: V,
    rows: [&[f32]; ROWS],
    matrix: &[F32Line],
    factors: [V::Floats; ROWS],
    out: &mut [F32Line],
    first: usize,
    ahead: Option<Ahead<'_>>,
) {
    let (length, columns) = (rows[0].len(), out.len() / ROWS);
    // Told once that all are as long, the compiler checks no index in the loop.
    let rows = rows.map(|row| &row[..length]);
    // From zero: with one sum from the first key to the last errors would grow with all keys, not with blocks of them.
    let mut sums = [[vectors.zero(); N]; ROWS];
    for (place, line) in matrix.chunks_exact(columns).enumerate().take(length) {
        let line: &[F32Line; N] = line[first..].first_chunk().expect("there are so many columns");
        if let Some(ahead) = ahead {
            for n in 0..N {
                ahead.ask(vectors, place, first + n);
            }
        }
        let mut loaded = [vectors.zero(); N];
        for n in 0..N {
            loaded[n] = vectors.load_f32(&line[n].0);
        }
        for row in 0..ROWS {
            let factor = vectors.splat(rows[row][place]);
            for n in 0..N {
                sums[row][n] = vectors.mul_add(factor, loaded[n], sums[row][n]);
            }
        }
    }
    for row in 0..ROWS {
        for n in 0..N {
            let out = &mut out[row * columns + first + n].0;
            *out = vectors.store_f32(vectors.mul_add(vectors.load_f32(out), factors[row], sums[row][n]));
        }
    }
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
        let State { head_dim, rows, padded_rows, width, per_lane, .. } = self.parts[0];
        let (mut mixed, mut ordered) = (vec![0.0; 16 * width], vec![0.0; 16 * width]);
        // As `tiles` has made it, `out` holds for each group its tokens, and for each of these its heads: the order of rows
        // in a state, but for those that pad a group.
        let mut row = 0;
        for out in self.out {
            for mut out in out.reborrow().chunks(head_dim) {
                merge(vectors, self.parts, row / rows * padded_rows + row % rows, &mut mixed);
                put_in_order(&mixed, per_lane, &mut ordered);
                out.write([&ordered[..head_dim]]);
                row += 1;
            }
        }
    }
}

/// Values of vectors, of which `per_lane` hold each a value of the same lanes, in the order of their dimensions.
#[inline(always)]
fn put_in_order(mixed: &[f32], per_lane: usize, ordered: &mut [f32]) {
    for (ordered, mixed) in zip(ordered.chunks_mut(16 * per_lane), mixed.chunks(16 * per_lane)) {
        for (first, vector) in mixed.as_chunks::<16>().0.iter().enumerate() {
            zip(ordered[first..].iter_mut().step_by(per_lane), vector).for_each(|(out, value)| *out = *value);
        }
    }
}

/// The mean of a row's values, as they stand in its vectors.
#[inline(always)]
fn merge<V: Vectors>(vectors: V, parts: &[State], row: usize, out: &mut [f32]) {
    let largest = parts.iter().fold(f32::NEG_INFINITY, |largest, part| largest.max(part.largest[row]));
    let mut total = vectors.zero();
    out.fill(0.0);
    for part in parts {
        let factor = (part.largest[row] - base(largest)).exp();
        total = vectors.mul_add(vectors.load_f32(&part.totals[row].0), vectors.splat(factor), total);
        let mixed = &part.mixed[row * part.width..(row + 1) * part.width];
        zip(&mut *out, <F32Line as Operand<V>>::lanes(mixed)).for_each(|(out, mixed)| *out += mixed * factor);
    }
    let total = vectors.sum(total);
    if total != 0.0 {
        for out in out {
            *out /= total;
        }
    }
}
