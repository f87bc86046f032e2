//! Products with a whole matrix.

use std::iter::zip;

use super::floats::{Floats, FloatsMut};
use super::matrix::Matrix;
use super::packed::Packed;
use super::product::{Product, parts_of, rows_of_task};
use super::threads::{Threads, for_each};
use crate::simd::Level;

/// `x` \[M, K\] times a matrix \[N, K\] transposed, plus `bias` \[N\], is \[M, N\]. Sums are float32, rounded once.
///
/// # Panics
/// When lengths do not fit: `x` has rows of K values, `out` N for each of them, `bias` N.
pub fn linear(
    level: Level,
    threads: &dyn Threads,
    x: Floats<'_>,
    matrix: &Matrix<'_>,
    bias: Option<Floats<'_>>,
    out: FloatsMut<'_>,
) {
    let (n, k) = (matrix.rows(), matrix.columns());
    let m = out.len().checked_div(n).unwrap_or(0);
    assert!(out.len() == m * n && x.len() == m * k, "rows of x and of the result");
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias for each row of the matrix");
    if m == 0 {
        return;
    }
    let x = Packed::new(level, threads, x, matrix);
    let columns: Vec<usize> = (0..m).collect();
    let rows_of_task = rows_of_task(matrix, m);

    // For each row of x the results of a task's rows of the matrix.
    let compute = |first: usize, sums: &mut [f32]| {
        let rows = first..first + sums.len() / m;
        Product { matrix, rows: rows.clone(), x: &x, columns: &columns, out: sums }.run(level);
        if let Some(bias) = bias {
            for sums in sums.chunks_exact_mut(rows.len()) {
                zip(sums, rows.clone()).for_each(|(sum, row)| *sum += bias.get(row));
            }
        }
    };
    match out {
        FloatsMut::F32(out) if m == 1 => {
            for_each(threads, out.chunks_mut(rows_of_task).enumerate(), &|(task, sums)| {
                compute(task * rows_of_task, sums);
            });
        }
        out if m == 1 => {
            for_each(threads, out.chunks(rows_of_task).into_iter().enumerate(), &|(task, mut out)| {
                let mut sums = vec![0.0; out.len()];
                compute(task * rows_of_task, &mut sums);
                out.write([&*sums]);
            });
        }
        out => {
            let mut sums = vec![0.0; m * n];
            for_each(threads, sums.chunks_mut(rows_of_task * m).enumerate(), &|(task, sums)| {
                compute(task * rows_of_task, sums);
            });
            for_each(threads, out.chunks(n).into_iter().enumerate(), &|(column, mut out)| {
                out.write(parts_of(column, &sums, rows_of_task, m));
            });
        }
    }
}
