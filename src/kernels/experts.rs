//! Products in which each row of activations has an expert, and the mixture of experts of gpt-oss.

use std::iter::zip;
use std::ops::Range;

use super::floats::{Floats, FloatsMut};
use super::grouping::{Group, group_by_expert, places, waves};
use super::matrix::Matrix;
use super::packed::Packed;
use super::product::{Product, parts_of, rows_of_task};
use super::swiglu::Swiglu;
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
    let x = Packed::new(level, threads, x, stack);
    let mut sums = vec![0.0; groups.iter().map(|group| group.rows.len()).sum::<usize>() * n];
    for_each(threads, tasks(&groups, n, stack, 1, &mut sums), &|task: Task<'_>| {
        let first = task.group.expert * n;
        let rows = first + task.results.start..first + task.results.end;
        Product { matrix: stack, rows, x: &x, columns: &task.group.rows, out: task.out }.run(level);
    });
    let mut parts = vec![None; ids.len()];
    for (row, group_row) in zip(groups.iter().flat_map(|group| &group.rows), rows_of(&groups, n, stack, 1, &sums)) {
        parts[*row] = Some(group_row);
    }
    for_each(threads, zip(out.reborrow().chunks(n), parts), &|(mut out, parts)| match parts {
        Some(parts) => out.write(parts.parts()),
        None => out.fill_nan(),
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
    let x = Packed::new(level, threads, x, &experts.gate_up);
    // One task's part of all tokens after the other.
    let mut sums = vec![0.0; tokens * hidden];
    let most = groups.iter().map(|group| group.rows.len()).max().unwrap_or(1);
    let of_task = rows_of_task(&experts.down, most, k.min(groups.len()));
    for wave in waves(&groups, ROWS_OF_WAVE) {
        let inner = first_layer(level, threads, &x, k, wave, experts);
        for_each(threads, sums.chunks_mut(of_task * tokens).enumerate(), &|(task, sums)| {
            let (first, count) = (task * of_task, sums.len() / tokens);
            for (group, place) in zip(wave, places(wave)) {
                let start = group.expert * hidden + first;
                let mut products = vec![0.0; count * group.rows.len()];
                let columns: Vec<usize> = place.collect();
                let (matrix, rows) = (&experts.down, start..start + count);
                Product { matrix, rows: rows.clone(), x: &inner, columns: &columns, out: &mut products }.run(level);
                let biases: Vec<f32> = rows.map(|row| experts.down_bias.get(row)).collect();
                for (products, &pair) in zip(products.chunks_exact(count), &group.rows) {
                    let sums = &mut sums[pair / k * count..][..count];
                    for (sum, (product, bias)) in zip(sums, zip(products, &biases)) {
                        *sum += (product + bias) * weights[pair];
                    }
                }
            }
        });
    }
    let is_valid =
        |index: &i32| *index == ELSEWHERE || usize::try_from(*index).is_ok_and(|index| index < experts.count);
    for_each(threads, out.reborrow().chunks(hidden).into_iter().enumerate(), &|(token, mut out)| {
        if indices[token * k..(token + 1) * k].iter().all(is_valid) {
            out.write(parts_of(token, &sums, of_task, tokens));
        } else {
            out.fill_nan();
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
    let swiglu = Swiglu { limit: experts.limit, alpha: experts.alpha };
    let mut inner = vec![0.0; rows * width];
    for_each(threads, tasks(groups, width, matrix, 2, &mut inner), &|task: Task<'_>| {
        let Task { group, results, out } = task;
        let columns: Vec<usize> = group.rows.iter().map(|pair| pair / k).collect();
        let rows = 2 * (group.expert * width + results.start)..2 * (group.expert * width + results.end);
        let mut products = vec![0.0; 2 * out.len()];
        Product { matrix, rows: rows.clone(), x, columns: &columns, out: &mut products }.run(level);
        let biases: Vec<f32> = rows.map(|row| experts.gate_up_bias.get(row)).collect();
        for (out, products) in zip(out.chunks_exact_mut(results.len()), products.chunks_exact(biases.len())) {
            swiglu.run(level, products.as_chunks().0, biases.as_chunks().0, out);
        }
    });
    let inner: Vec<_> = rows_of(groups, width, matrix, 2, &inner).collect();
    Packed::written(level, threads, rows, &experts.down, |row, out| FloatsMut::F32(out).write(inner[row].parts()))
}

/// A part of the results for one group.
struct Task<'a> {
    group: &'a Group,
    /// Which of the expert's results.
    results: Range<usize>,
    /// For each of the group's rows these results.
    out: &'a mut [f32],
}

/// Divides the results of all groups, `width` for each row, each of which takes `rows_of_result` rows of a matrix.
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
        let of_task = rows_of_task(matrix, group.rows.len(), 1).div_ceil(rows_of_result);
        for (number, out) in results.chunks_mut(of_task * group.rows.len()).enumerate() {
            let first = number * of_task;
            tasks.push(Task { group, results: first..first + out.len() / group.rows.len(), out });
        }
    }
    tasks
}

/// The results for one row, as [`tasks`] have written them.
#[derive(Clone, Copy)]
struct ResultRow<'a> {
    results_of_group: &'a [f32],
    row: usize,
    of_task: usize,
    rows: usize,
}

impl<'a> ResultRow<'a> {
    fn parts(self) -> impl Iterator<Item = &'a [f32]> {
        parts_of(self.row, self.results_of_group, self.of_task, self.rows)
    }
}

/// The results of all [`tasks`] row by row, one group after the other.
fn rows_of<'a>(
    groups: &'a [Group],
    width: usize,
    matrix: &Matrix<'_>,
    rows_of_result: usize,
    results: &'a [f32],
) -> impl Iterator<Item = ResultRow<'a>> {
    zip(groups, places(groups)).flat_map(move |(group, place)| {
        let rows = group.rows.len();
        let of_task = rows_of_task(matrix, rows, 1).div_ceil(rows_of_result);
        let results_of_group = &results[place.start * width..place.end * width];
        (0..rows).map(move |row| ResultRow { results_of_group, row, of_task, rows })
    })
}
