//! Products in which each row of activations has an expert, and the mixture of experts of gpt-oss.

use std::iter::zip;
use std::ops::Range;

use super::floats::{Floats, FloatsMut};
use super::grouping::{Group, group_by_expert, places, waves};
use super::matrix::Matrix;
use super::packed::Packed;
use super::product::{Product, rows_of_task};
use super::threads::{Threads, for_each};
use crate::simd::Level;

/// An index for an expert that another device has, or for none: the pair adds nothing here.
pub const ELSEWHERE: i32 = -(1 << 30);

/// Rows worked on between two layers: enough that reading an expert is small beside multiplying, and a few MB.
const ROWS_OF_WAVE: usize = 256;

/// X [T, K] times the matrix of each row's expert, of `experts` in a stack [experts · N, K]: [T, N].
///
/// A row with an id that no expert has becomes NaN.
///
/// # Panics
/// When lengths do not fit.
pub fn expert_linear(
    level: Level,
    threads: &dyn Threads,
    x: Floats<'_>,
    stack: &Matrix<'_>,
    experts: usize,
    ids: &[i32],
    mut out: FloatsMut<'_>,
) {
    let (n, k) = (out.len().checked_div(ids.len()).unwrap_or(0), x.len().checked_div(ids.len()).unwrap_or(0));
    assert!(x.len() == ids.len() * k && out.len() == ids.len() * n, "a row for each id");
    if out.is_empty() {
        return;
    }
    assert!(stack.rows() == experts * n && (experts == 0 || stack.columns() == k), "a matrix for each expert");
    let groups = group_by_expert(ids, experts, usize::MAX);
    let x = Packed::new(threads, x, k, stack.format(), level.has_bf16_dot());
    // By expert, then row by row of its matrix, and of these the results for all rows that go to it.
    let mut sums = vec![0.0; groups.iter().map(|group| group.rows.len()).sum::<usize>() * n];
    for_each(threads, tasks(&groups, n, stack, 1, &mut sums), &|task: Task<'_>| {
        let first = task.group.expert * n;
        let rows = first + task.rows.start..first + task.rows.end;
        Product { matrix: stack, rows, x: &x, columns: &task.group.rows, out: task.out }.run(level);
    });
    let mut value_at = vec![None; ids.len()];
    for (group, place) in zip(&groups, places(&groups)) {
        for (number, &row) in group.rows.iter().enumerate() {
            value_at[row] = Some((place.start * n + number, group.rows.len()));
        }
    }
    let rows = out.reborrow().chunks(n);
    for_each(threads, zip(rows, value_at), &|(mut out, place)| match place {
        Some((first, stride)) => out.copy_from((0..n).map(|row| sums[first + row * stride])),
        None => out.copy_from(std::iter::repeat_n(f32::NAN, n)),
    });
}

/// The weights of E experts, of width I between their layers, for a stream of width H.
#[derive(Debug, Clone, Copy)]
pub struct Experts<'a> {
    /// How many: E.
    pub count: usize,
    /// [E · 2 I, H], gate and up interleaved.
    pub gate_up: Matrix<'a>,
    /// [E · 2 I].
    pub gate_up_bias: Floats<'a>,
    /// [E · H, I].
    pub down: Matrix<'a>,
    /// [E · H].
    pub down_bias: Floats<'a>,
    /// Where gate and up are clamped.
    pub limit: f32,
    /// Steepness of the sigmoid.
    pub alpha: f32,
}

impl Experts<'_> {
    /// gate · sigmoid(alpha · gate) · (up + 1), both clamped; NaN stays NaN.
    fn activation(&self, gate: f32, up: f32) -> f32 {
        let gate = if gate > self.limit { self.limit } else { gate };
        let up = up.clamp(-self.limit, self.limit);
        gate / (1.0 + (-self.alpha * gate).exp()) * (up + 1.0)
    }
}

/// The outputs of each token's experts, weighted and summed: x [T, H] -> [T, H].
///
/// `indices` and `weights` are [T, k]. An index of [`ELSEWHERE`] adds nothing; with another that no expert has, a token
/// becomes NaN. All between the layers is float32.
///
/// # Panics
/// When lengths do not fit, or `limit` is negative or NaN.
///
/// Source: openai/gpt-oss, `gpt_oss/torch/model.py`, `MLPBlock` and `swiglu`.
pub fn moe(
    level: Level,
    threads: &dyn Threads,
    x: Floats<'_>,
    indices: &[i32],
    weights: &[f32],
    experts: &Experts<'_>,
    mut out: FloatsMut<'_>,
) {
    let hidden = experts.gate_up.columns();
    let tokens = x.len().checked_div(hidden).unwrap_or(0);
    if tokens == 0 {
        return;
    }
    let (k, width) = (indices.len() / tokens, experts.down.columns());
    assert!(x.len() == tokens * hidden && out.len() == x.len(), "rows of x and of the result");
    assert!(indices.len() == tokens * k && weights.len() == indices.len(), "k experts and weights for each token");
    assert!(experts.gate_up.rows() == experts.count * 2 * width, "gate and up of each expert");
    assert!(experts.down.rows() == experts.count * hidden, "down of each expert");
    assert!(experts.gate_up_bias.len() == experts.gate_up.rows(), "a bias for each row of gate_up");
    assert!(experts.down_bias.len() == experts.down.rows(), "a bias for each row of down");

    let groups = group_by_expert(indices, experts.count, ROWS_OF_WAVE);
    let x = Packed::new(threads, x, hidden, experts.gate_up.format(), level.has_bf16_dot());
    // Row by row of `down`, and of these the sums for all tokens.
    let mut sums = vec![0.0; hidden * tokens];
    for wave in waves(&groups, ROWS_OF_WAVE) {
        let inner = first_layer(level, threads, &x, k, wave, experts);
        let rows_of_all = rows_of_task(&experts.down, wave.iter().map(|group| group.rows.len()).max().unwrap_or(1));
        let rows_of_task = rows_of_all.div_ceil(wave.len());
        for_each(threads, sums.chunks_mut(rows_of_task * tokens).enumerate(), &|(task, sums)| {
            let first = task * rows_of_task;
            for (group, place) in zip(wave, places(wave)) {
                let rows = sums.len() / tokens;
                let start = group.expert * hidden + first;
                let mut products = vec![0.0; rows * group.rows.len()];
                let columns: Vec<usize> = place.collect();
                let rows = start..start + rows;
                let matrix = &experts.down;
                Product { matrix, rows: rows.clone(), x: &inner, columns: &columns, out: &mut products }.run(level);
                for ((row, sums), products) in
                    zip(rows, sums.chunks_exact_mut(tokens)).zip(products.chunks_exact(columns.len()))
                {
                    let bias = experts.down_bias.get(row);
                    for (product, &pair) in zip(products, &group.rows) {
                        sums[pair / k] += (product + bias) * weights[pair];
                    }
                }
            }
        });
    }
    let is_valid =
        |index: &i32| *index == ELSEWHERE || usize::try_from(*index).is_ok_and(|index| index < experts.count);
    for_each(threads, out.reborrow().chunks(hidden).into_iter().enumerate(), &|(token, mut out)| {
        if indices[token * k..(token + 1) * k].iter().all(is_valid) {
            out.copy_from((0..hidden).map(|row| sums[row * tokens + token]));
        } else {
            out.copy_from(std::iter::repeat_n(f32::NAN, hidden));
        }
    });
}

/// What the groups' rows are between the layers: packed rows [rows of all groups, I].
fn first_layer(
    level: Level,
    threads: &dyn Threads,
    x: &Packed,
    k: usize,
    groups: &[Group],
    experts: &Experts<'_>,
) -> Packed {
    let (matrix, width) = (&experts.gate_up, experts.down.columns());
    let rows = groups.iter().map(|group| group.rows.len()).sum::<usize>();
    // By group, then value by value, and of these one for each row of the group.
    let mut inner = vec![0.0; rows * width];
    for_each(threads, tasks(groups, width, matrix, 2, &mut inner), &|task: Task<'_>| {
        let Task { group, rows, out } = task;
        let columns: Vec<usize> = group.rows.iter().map(|pair| pair / k).collect();
        let first = 2 * (group.expert * width + rows.start);
        let mut products = vec![0.0; 2 * out.len()];
        let both = first..first + 2 * rows.len();
        Product { matrix, rows: both, x, columns: &columns, out: &mut products }.run(level);
        let pairs = products.chunks_exact(2 * columns.len());
        for ((row, out), products) in (first..).step_by(2).zip(out.chunks_exact_mut(columns.len())).zip(pairs) {
            let (gates, ups) = products.split_at(columns.len());
            let (gate_bias, up_bias) = (experts.gate_up_bias.get(row), experts.gate_up_bias.get(row + 1));
            for (out, (gate, up)) in zip(out, zip(gates, ups)) {
                *out = experts.activation(gate + gate_bias, up + up_bias);
            }
        }
    });
    let mut place_of = Vec::with_capacity(rows);
    for (group, place) in zip(groups, places(groups)) {
        place_of.extend((0..group.rows.len()).map(|number| (place.start * width + number, group.rows.len())));
    }
    Packed::f32(threads, rows, width, experts.down.format(), |row, column| {
        let (first, stride) = place_of[row];
        inner[first + column * stride]
    })
}

/// A part of the results for one group.
struct Task<'a> {
    group: &'a Group,
    /// Which of the expert's results.
    rows: Range<usize>,
    /// For each of them those of the group's rows.
    out: &'a mut [f32],
}

/// Divides the results of all groups, `width` for each row, of which each takes `rows_of_result` rows of a matrix.
fn tasks<'a>(
    groups: &'a [Group],
    width: usize,
    matrix: &Matrix<'_>,
    rows_of_result: usize,
    mut out: &'a mut [f32],
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    for group in groups {
        let (results, rest) = out.split_at_mut(width * group.rows.len());
        out = rest;
        let step = rows_of_task(matrix, group.rows.len()).div_ceil(rows_of_result);
        for (number, out) in results.chunks_mut((step * group.rows.len()).max(1)).enumerate() {
            let first = number * step;
            tasks.push(Task { group, rows: first..first + out.len() / group.rows.len(), out });
        }
    }
    tasks
}
