//! What takes the time that its bytes take: products of one row, a mixture of experts for one token, the attention of
//! one query, each beside a read of the same memory on the same threads: `cargo bench --bench share_of_read`.
//!
//! Memory is shared with other machines, and its speed changes within seconds. So every job is timed right behind a
//! read, in rounds, and its share is the median of the shares of each round. Prints a Markdown table.

mod common;

use std::time::Instant;

use common::{RayonThreads, activations, noise, read, to_bf16};
use tensorport::kernels::{Attention, Experts, Floats, FloatsMut, Matrix, attention, linear, moe};
use tensorport::simd::Level;

/// Columns of gpt-oss: 22.5 chunks of codes.
const K: usize = 2880;

/// Rows of all matrices: more than any cache holds.
const N: usize = 1 << 17;

const ROUNDS: usize = 15;
const WARM_UPS: usize = 2;

fn main() {
    println!("| | GB/s | share of a read | from .. to | read, GB/s |");
    println!("|---|---|---|---|---|");
    one_row();
    mixture();
    one_query();
}

/// A line of the table: `work` uses `bytes`, `memory` is what is read beside it.
fn measure(name: &str, bytes: usize, memory: &[u8], mut work: impl FnMut()) {
    let mut rounds = Vec::new();
    for round in 0..WARM_UPS + ROUNDS {
        let start = Instant::now();
        read(memory);
        let read_done = Instant::now();
        work();
        let (read_s, work_s) = ((read_done - start).as_secs_f64(), read_done.elapsed().as_secs_f64());
        if round >= WARM_UPS {
            rounds.push((giga(bytes) / work_s, giga(memory.len()) / read_s));
        }
    }
    let speed = sorted(rounds.iter().map(|(work, _)| *work));
    let share = sorted(rounds.iter().map(|(work, read)| 100.0 * work / read));
    let read = sorted(rounds.iter().map(|(_, read)| *read));
    let (middle, last) = (ROUNDS / 2, ROUNDS - 1);
    println!(
        "| {name} | {:.1} | {:.0}% | {:.0}% .. {:.0}% | {:.1} |",
        speed[middle], share[middle], share[0], share[last], read[middle]
    );
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn giga(bytes: usize) -> f64 {
    bytes as f64 / 1e9
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// One row by a matrix, at every level of instructions.
fn one_row() {
    let x = activations(K);
    let halves = to_bf16(&x);
    let mut out = vec![0.0; N];
    let (values, scales) = (noise(2 * N * K), vec![120; N * K / 32]);
    let codes = &values[..N * K / 2];
    for (format, matrix, bytes, memory) in [
        ("bfloat16", Matrix::bf16(N, K, &values), values.len(), &values[..]),
        ("MXFP4", Matrix::mxfp4(N, codes, &scales), codes.len() + scales.len(), codes),
        ("MXFP4 times int8", Matrix::mxfp4_int8(N, codes, &scales), codes.len() + scales.len(), codes),
    ] {
        for level in Level::all() {
            for (dtype, x) in [("bfloat16", Floats::Bf16(&halves)), ("float32", Floats::F32(&x))] {
                measure(&format!("{format}, one row of {dtype}, {level}"), bytes, memory, || {
                    linear(level, &RayonThreads, x, &matrix, None, FloatsMut::F32(&mut out));
                });
            }
        }
    }
}

/// Four experts of 32 for one token, others each time, so that they come from memory: eight calls, which use all.
fn mixture() {
    const EXPERTS: usize = 32;
    let [gate_up, down] = [2, 1].map(|matrices| noise(EXPERTS * matrices * K * K / 2));
    let [gate_up_scales, down_scales] = [2, 1].map(|matrices| vec![118; EXPERTS * matrices * K * K / 32]);
    let biases = vec![0.0; EXPERTS * 2 * K];
    let x = activations(K);
    let halves = to_bf16(&x);
    let (mut out, mut halves_out) = (vec![0.0; K], vec![0; K]);
    let bytes = gate_up.len() + gate_up_scales.len() + down.len() + down_scales.len();
    for (kind, matrix) in
        [("mixture of experts", Matrix::mxfp4 as fn(_, _, _) -> _), ("mixture times int8", Matrix::mxfp4_int8)]
    {
        let experts = Experts {
            count: EXPERTS,
            gate_up: matrix(EXPERTS * 2 * K, &gate_up, &gate_up_scales),
            gate_up_bias: Floats::F32(&biases),
            down: matrix(EXPERTS * K, &down, &down_scales),
            down_bias: Floats::F32(&biases[..EXPERTS * K]),
            limit: 7.0,
            alpha: 1.702,
        };
        let level = Level::best();
        let mix = |first: i32, x: Floats<'_>, out: FloatsMut<'_>| {
            moe(level, &RayonThreads, x, &[0, 1, 2, 3].map(|number| first + number), &[0.25; 4], &experts, out);
        };
        measure(&format!("{kind}, one row of bfloat16, {level}"), bytes, &gate_up, || {
            (0..32).step_by(4).for_each(|first| mix(first, Floats::Bf16(&halves), FloatsMut::Bf16(&mut halves_out)));
        });
        measure(&format!("{kind}, one row of float32, {level}"), bytes, &gate_up, || {
            (0..32).step_by(4).for_each(|first| mix(first, Floats::F32(&x), FloatsMut::F32(&mut out)));
        });
    }
}

/// The attention of gpt-oss for one query over a cache that comes from memory.
fn one_query() {
    const KEYS: usize = 1 << 16;
    const HEADS: usize = 64;
    const KEY_HEADS: usize = 8;
    const HEAD_DIM: usize = 64;
    let values = to_bf16(&activations(KEYS * KEY_HEADS * HEAD_DIM));
    let key = to_bf16(&activations(KEYS * KEY_HEADS * HEAD_DIM));
    let query = to_bf16(&activations(HEADS * HEAD_DIM));
    let key_positions: Vec<i32> = (0..1 << 16).collect();
    let mut out = vec![0; HEADS * HEAD_DIM];
    let memory = noise(2 * 2 * values.len());
    for level in Level::all() {
        let inputs = Attention {
            query: Floats::Bf16(&query),
            key: Floats::Bf16(&key),
            value: Floats::Bf16(&values),
            query_positions: &[(1 << 16) - 1],
            key_positions: &key_positions,
            sinks: None,
            batch: 1,
            heads: HEADS,
            key_heads: KEY_HEADS,
            head_dim: HEAD_DIM,
            scale: 0.125,
            window: None,
        };
        measure(&format!("attention of one query over {KEYS} keys, {level}"), memory.len(), &memory, || {
            attention(level, &RayonThreads, &inputs, FloatsMut::Bf16(&mut out));
        });
    }
}
