//! Attention of grouped queries: each reads the keys and values that it sees from memory once, block by block.
//!
//! Some tokens and the query heads of a key head make a tile, or of several key heads if tokens are few. A block of keys
//! is turned and widened into buffers that stay in the cache, and all rows of the tile are worked on with them: scores,
//! the part of the softmax that is known by now, and the mix of values. Blocks that no query of a tile sees are left out,
//! wherever they stand.
//!
//! | module | what it knows |
//! |---|---|
//! | `block` | blocks of keys and values, and which positions they hold |
//! | `tile` | rows of queries, what they have seen, and how they see a block |

mod block;
mod tile;

use std::ops::Range;

use self::block::{KEYS, Span};
use self::tile::{State, Tile};
use super::floats::{Floats, FloatsMut};
use super::threads::{Threads, for_each};
use crate::simd::Level;

/// Rows of queries, tokens times heads, in one tile: what is known of them takes 64 KB for heads of 64.
const ROWS_OF_TILE: usize = 256;

/// The arrays of an attention and its constants.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// [B, T, N, D].
    pub query: Floats<'a>,
    /// [B, S, G, D].
    pub key: Floats<'a>,
    /// [B, S, G, D].
    pub value: Floats<'a>,
    /// [B, T]; below 0 for queries that see nothing.
    pub query_positions: &'a [i32],
    /// [B, S]; below 0 for keys that are not there.
    pub key_positions: &'a [i32],
    /// A logit more in the softmax of each of the N heads.
    pub sinks: Option<Floats<'a>>,
    /// Rows of the batch: B.
    pub batch: usize,
    /// Heads of queries: N.
    pub heads: usize,
    /// Heads of keys: G, which divides N.
    pub key_heads: usize,
    /// The size of a head: D.
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// How many keys a query sees, that at its own position among them; None for all up to its own.
    pub window: Option<u32>,
}

impl Attention<'_> {
    /// Heads of queries that share a head of keys.
    fn heads_of_group(&self) -> usize {
        self.heads / self.key_heads
    }

    fn queries(&self) -> usize {
        self.query_positions.len() / self.batch
    }

    fn keys(&self) -> usize {
        self.key_positions.len() / self.batch
    }

    /// Positions that a query at a position sees, from the first to the last.
    fn seen_from(&self, position: i32) -> Span {
        if position < 0 {
            return Span::NOTHING;
        }
        let first = self.window.map_or(0, |window| (i64::from(position) + 1 - i64::from(window)).max(0));
        // Behind the last position there is none to see.
        i32::try_from(first).map_or(Span::NOTHING, |first| Span { first, last: position })
    }

    fn check(&self, out: &FloatsMut<'_>) {
        assert!(self.batch > 0 && self.head_dim > 0, "rows of the batch, and heads of some size");
        assert!(self.key_heads > 0 && self.heads.is_multiple_of(self.key_heads), "whole groups of heads");
        let (queries, keys) = (self.batch * self.queries(), self.batch * self.keys());
        assert!(self.query_positions.len() == queries && self.key_positions.len() == keys, "a position for each");
        assert!(self.query.len() == queries * self.heads * self.head_dim, "a query for each position");
        assert!(self.key.len() == keys * self.key_heads * self.head_dim, "a key for each position");
        assert!(self.value.len() == self.key.len(), "a value for each key");
        assert!(self.sinks.is_none_or(|sinks| sinks.len() == self.heads), "a sink for each head");
        assert!(out.len() == self.query.len(), "a result for each query");
    }
}

/// The mean of the values that each query sees, weighted by the softmax of its scores: [B, T, N, D].
///
/// All between the arrays is float32. A query that sees nothing becomes zero. What stands at positions below 0 is not
/// read, be it NaN; a value that is NaN or infinite may reach queries that do not see it.
///
/// # Panics
/// When lengths do not fit.
///
/// Source: openai/gpt-oss, `gpt_oss/torch/model.py`, `sdpa`. The softmax block by block: Milakov and Gimelshein, "Online
/// normalizer calculation for softmax" (2018).
pub fn attention(level: Level, threads: &dyn Threads, inputs: &Attention<'_>, out: FloatsMut<'_>) {
    if out.is_empty() {
        return;
    }
    inputs.check(&out);
    let spans: Vec<Span> = if inputs.keys() == 0 {
        Vec::new()
    } else {
        let rows = inputs.key_positions.chunks(inputs.keys());
        rows.flat_map(|row| row.chunks(KEYS).map(Span::of_keys)).collect()
    };
    let tiles = tiles(inputs, &spans, out);
    let parts = (2 * threads.count()).div_ceil(tiles.len()).min(inputs.keys().div_ceil(KEYS)).max(1);
    if parts == 1 {
        for_each(threads, tiles, &|(tile, mut out)| {
            let state = level.run_vectors(tile.part(0, 1));
            tile::write(level, &[state], &mut out);
        });
        return;
    }
    // Too few tiles for the threads: each sees some of its keys in one task, and others in another.
    let mut states: Vec<Option<State>> = (0..tiles.len() * parts).map(|_| None).collect();
    for_each(threads, states.iter_mut().enumerate(), &|(task, state)| {
        *state = Some(level.run_vectors(tiles[task / parts].0.part(task % parts, parts)));
    });
    let states: Vec<State> = states.into_iter().map(|state| state.expect("each task made one")).collect();
    for_each(threads, tiles.into_iter().zip(states.chunks(parts)), &|((_, mut out), states)| {
        tile::write(level, states, &mut out);
    });
}

/// All tiles, each with its results: for each of its heads of keys and each of its tokens those of the group's heads.
fn tiles<'a>(inputs: &'a Attention<'a>, spans: &'a [Span], out: FloatsMut<'a>) -> Vec<(Tile<'a>, Vec<FloatsMut<'a>>)> {
    let (queries, groups, blocks) = (inputs.queries(), inputs.key_heads, spans.len() / inputs.batch);
    let tokens_of_tile = (ROWS_OF_TILE / inputs.heads_of_group()).clamp(1, queries);
    let groups_of_tile = (ROWS_OF_TILE / (inputs.heads_of_group() * tokens_of_tile)).clamp(1, groups);
    let mut out: Vec<Option<FloatsMut<'_>>> =
        out.chunks(inputs.heads_of_group() * inputs.head_dim).into_iter().map(Some).collect();
    let mut tiles = Vec::new();
    for row in 0..inputs.batch {
        let spans = &spans[row * blocks..(row + 1) * blocks];
        for start in (0..queries).step_by(tokens_of_tile) {
            let tokens: Range<usize> = start..queries.min(start + tokens_of_tile);
            for first in (0..groups).step_by(groups_of_tile) {
                let groups_of_tile = first..groups.min(first + groups_of_tile);
                let places = groups_of_tile
                    .clone()
                    .flat_map(|group| tokens.clone().map(move |token| (row * queries + token) * groups + group));
                let out = places.map(|place| out[place].take().expect("each is of one tile")).collect();
                tiles.push((Tile { inputs, spans, row, groups: groups_of_tile, tokens: tokens.clone() }, out));
            }
        }
    }
    tiles
}
