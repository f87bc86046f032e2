//! Products in which each row of activations has an expert, and the mixture of experts of gpt-oss.

use std::iter::zip;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{hint, thread};

use super::floats::{Floats, FloatsMut};
use super::grouping::{Group, group_by_expert, waves};
use super::matrix::Matrix;
use super::packed::Packed;
use super::product::{Product, rows_of_task};
use super::swiglu::Swiglu;
use super::threads::{SPINS, ScopedThreads, Threads, for_each};
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
    let results: Vec<_> = groups.iter().map(|group| Results::new(group, stack, n, 1)).collect();
    let all_tasks = tasks(&results);
    threads.run(all_tasks.len(), &|number| {
        let (place, task) = all_tasks[number];
        results[place].compute(level, &x, &groups[place].rows, task, |out, _| out);
    });
    let mut places = vec![None; ids.len()];
    for (group, results) in zip(&groups, &results) {
        zip(&group.rows, 0..).for_each(|(row, place)| places[*row] = Some((results, place)));
    }
    for_each(threads, zip(out.reborrow().chunks(n), places), &|(mut out, place)| match place {
        Some((results, place)) => out.write(results.row(place)),
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
    let mut sums = vec![0.0; tokens * hidden];
    for wave in waves(&groups, ROWS_OF_WAVE) {
        let wave: Vec<_> = wave.iter().map(|group| GroupLayers::new(level, group, experts, k)).collect();
        run_layers(level, threads, &x, weights, &wave);
        let mut places = vec![Vec::new(); tokens];
        for layers in &wave {
            zip(&layers.group.rows, 0..).for_each(|(pair, place)| places[pair / k].push((&layers.second, place)));
        }
        let tokens = zip(sums.chunks_exact_mut(hidden), places).filter(|(_, places)| !places.is_empty());
        for_each(threads, tokens, &|(sums, places)| {
            for (results, place) in places {
                let mut sums = &mut *sums;
                for values in results.row(place) {
                    let (these, others) = sums.split_at_mut(values.len());
                    zip(these, values).for_each(|(sum, value)| *sum += value);
                    sums = others;
                }
            }
        });
    }
    let is_valid =
        |index: &i32| *index == ELSEWHERE || usize::try_from(*index).is_ok_and(|index| index < experts.count);
    for_each(threads, out.reborrow().chunks(hidden).into_iter().enumerate(), &|(token, mut out)| {
        if indices[token * k..(token + 1) * k].iter().all(is_valid) {
            out.write([&sums[token * hidden..(token + 1) * hidden]]);
        } else {
            out.fill_nan();
        }
    });
}

/// Both layers of one group.
struct GroupLayers<'a> {
    experts: &'a Experts<'a>,
    group: &'a Group,
    /// Which row of activations each of the group's rows is.
    tokens: Vec<usize>,
    first: Results<'a>,
    /// Tasks of the first layer that are not done.
    left: AtomicUsize,
    /// The rows between the layers, when `left` is 0; nothing when one of its tasks panicked.
    inner: OnceLock<Option<Packed>>,
    /// Weighted.
    second: Results<'a>,
}

/// Computes both layers of a wave. Tasks of the second wait for the first of their group alone, so that threads have work
/// until the end.
fn run_layers(level: Level, threads: &dyn Threads, x: &Packed, weights: &[f32], wave: &[GroupLayers<'_>]) {
    let first = tasks(wave.iter().map(|layers| &layers.first));
    let second = tasks(wave.iter().map(|layers| &layers.second));
    threads.run(first.len() + second.len(), &|number| {
        if let Some(&(place, task)) = first.get(number) {
            wave[place].run_first(level, x, task);
        } else {
            let (place, task) = second[number - first.len()];
            wave[place].run_second(level, weights, task);
        }
    });
}

impl<'a> GroupLayers<'a> {
    fn new(level: Level, group: &'a Group, experts: &'a Experts<'a>, k: usize) -> Self {
        let (hidden, width) = (experts.gate_up.columns(), experts.down.columns());
        let first = Results::new(group, &experts.gate_up, width, 2);
        let layers = Self {
            experts,
            group,
            tokens: group.rows.iter().map(|pair| pair / k).collect(),
            left: AtomicUsize::new(first.tasks()),
            first,
            inner: OnceLock::new(),
            second: Results::new(group, &experts.down, hidden, 1),
        };
        if width == 0 {
            layers.pack(level);
        }
        layers
    }

    /// A task of the first layer; the last of them packs what all have made.
    fn run_first(&self, level: Level, x: &Packed, task: usize) {
        let Self { experts, first, .. } = self;
        let _guard = AbandonInPanic(&self.inner);
        let swiglu = Swiglu { limit: experts.limit, alpha: experts.alpha };
        first.compute(level, x, &self.tokens, task, |products, rows| {
            let biases: Vec<f32> = rows.map(|row| experts.gate_up_bias.get(row)).collect();
            let mut out = vec![0.0; products.len() / 2];
            let results = biases.len() / 2;
            for (out, products) in zip(out.chunks_exact_mut(results), products.chunks_exact(biases.len())) {
                swiglu.run(level, products.as_chunks().0, biases.as_chunks().0, out);
            }
            out
        });
        // AcqRel: who comes last sees what all others have written.
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.pack(level);
        }
    }

    /// Gives the second layer what the first has made.
    fn pack(&self, level: Level) {
        let rows = self.tokens.len();
        let inner = Packed::written(level, &ScopedThreads(1), rows, &self.experts.down, |row, out| {
            FloatsMut::F32(out).write(self.first.row(row));
        });
        assert!(self.inner.set(Some(inner)).is_ok(), "the first layer ends once");
    }

    fn run_second(&self, level: Level, weights: &[f32], task: usize) {
        let Some(inner) = wait(&self.inner) else { return };
        let columns: Vec<usize> = (0..self.tokens.len()).collect();
        self.second.compute(level, inner, &columns, task, |mut products, rows| {
            let biases: Vec<f32> = rows.map(|row| self.experts.down_bias.get(row)).collect();
            for (products, pair) in zip(products.chunks_exact_mut(biases.len()), &self.group.rows) {
                zip(products, &biases).for_each(|(value, bias)| *value = (*value + bias) * weights[*pair]);
            }
            products
        });
    }
}

/// Lets nobody wait for what a panic keeps from being made.
struct AbandonInPanic<'a>(&'a OnceLock<Option<Packed>>);

impl Drop for AbandonInPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            // Another may have panicked before.
            let _ = self.0.set(None);
        }
    }
}

/// What another thread is about to set.
fn wait<T>(value: &OnceLock<Option<T>>) -> Option<&T> {
    for _ in 0..SPINS {
        if let Some(value) = value.get() {
            return value.as_ref();
        }
        hint::spin_loop();
    }
    value.wait().as_ref()
}

/// What the rows of a group are multiplied into, in the parts that tasks make.
struct Results<'a> {
    /// The matrices of all experts.
    stack: &'a Matrix<'a>,
    /// The first row of this expert's.
    first: usize,
    /// How many results each of the group's rows has.
    width: usize,
    rows_of_result: usize,
    /// Results of each row that one task makes.
    of_task: usize,
    rows: usize,
    /// For each task [rows, its results].
    parts: Vec<OnceLock<Vec<f32>>>,
}

impl<'a> Results<'a> {
    /// `width` for each row of a group, each from `rows_of_result` rows of a matrix.
    fn new(group: &Group, stack: &'a Matrix<'a>, width: usize, rows_of_result: usize) -> Self {
        let rows = group.rows.len();
        let of_task = rows_of_task(stack, rows).div_ceil(rows_of_result);
        let parts = (0..width.div_ceil(of_task)).map(|_| OnceLock::new()).collect();
        Self { stack, first: group.expert * width * rows_of_result, width, rows_of_result, of_task, rows, parts }
    }

    fn tasks(&self) -> usize {
        self.parts.len()
    }

    /// One task: `finish` makes its results of products, which come with the rows of the matrix that made them.
    fn compute(
        &self,
        level: Level,
        x: &Packed,
        columns: &[usize],
        task: usize,
        finish: impl FnOnce(Vec<f32>, Range<usize>) -> Vec<f32>,
    ) {
        let (start, end) = (task * self.of_task, ((task + 1) * self.of_task).min(self.width));
        let rows = self.first + start * self.rows_of_result..self.first + end * self.rows_of_result;
        let mut products = vec![0.0; rows.len() * columns.len()];
        Product { matrix: self.stack, rows: rows.clone(), x, columns, out: &mut products }.run(level);
        self.parts[task].set(finish(products, rows)).expect("each task comes once");
    }

    /// The results of one row; all tasks are done.
    fn row(&self, row: usize) -> impl Iterator<Item = &[f32]> {
        self.parts.iter().map(move |part| {
            let part = part.get().expect("tasks are done");
            let results = part.len() / self.rows;
            &part[row * results..(row + 1) * results]
        })
    }
}

/// The tasks of all results: which results, and which of their tasks.
fn tasks<'a>(results: impl IntoIterator<Item = &'a Results<'a>>) -> Vec<(usize, usize)> {
    results
        .into_iter()
        .enumerate()
        .flat_map(|(place, results)| (0..results.tasks()).map(move |task| (place, task)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_what_a_panic_left_undone() {
        let inner = OnceLock::new();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| wait(&inner).is_none());
            let unwound = scope.spawn(|| {
                let _guard = AbandonInPanic(&inner);
                panic!("before it was made");
            });
            assert!(unwound.join().is_err() && waiter.join().expect("it returns"));
        });
    }
}
