//! Products with a few to many rows of activations, in multiplications: `cargo bench --bench products`.
//!
//! One row takes what memory takes: `share_of_read.rs`.

mod common;

use common::{RayonThreads, activations, noise, to_bf16};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tensorport::kernels::{Floats, FloatsMut, Matrix, linear};
use tensorport::simd::Level;

/// Columns of gpt-oss: 22.5 chunks of codes.
const K: usize = 2880;

/// Rows of the matrices: MXFP4 of 6 MB.
const N: usize = 1 << 12;

/// Rows of activations.
const COUNTS: [usize; 5] = [2, 4, 16, 64, 256];

fn products(criterion: &mut Criterion) {
    let x = activations(256 * K);
    let halves = to_bf16(&x);
    let mut out = vec![0.0; 256 * N];
    let (codes, scales, values) = (noise(N * K / 2), vec![120; N * K / 32], noise(2 * N * K));
    for (format, matrix) in [
        ("MXFP4", Matrix::mxfp4(N, &codes, &scales)),
        ("MXFP4 times int8", Matrix::mxfp4_int8(N, &codes, &scales)),
        ("bfloat16", Matrix::bf16(N, K, &values)),
    ] {
        let mut group = criterion.benchmark_group(format);
        group.sample_size(10);
        for m in COUNTS {
            group.throughput(Throughput::Elements((m * N * K) as u64));
            for (dtype, x) in [("bfloat16", Floats::Bf16(&halves[..m * K])), ("float32", Floats::F32(&x[..m * K]))] {
                let level = Level::best();
                group.bench_function(format!("{m} rows of {dtype}, {level}"), |bencher| {
                    bencher.iter(|| linear(level, &RayonThreads, x, &matrix, None, FloatsMut::F32(&mut out[..m * N])));
                });
            }
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
