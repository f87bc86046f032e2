//! Products beside a read of the same memory, all in bytes of weights on all cores: `cargo bench --bench products`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tensorport::kernels::{Floats, FloatsMut, Matrix, ScopedThreads, Threads, for_each, linear};
use tensorport::simd::Level;

/// Columns of gpt-oss: 22.5 chunks of codes.
const K: usize = 2880;

/// Rows of all matrices: more than any cache holds.
const N: usize = 1 << 17;

/// Bytes without a pattern.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn threads() -> ScopedThreads {
    ScopedThreads(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

fn read(bytes: &[u8]) {
    let part = bytes.len().div_ceil(threads().count());
    for_each(&threads(), bytes.chunks(part), &|part| {
        let sums = part.as_chunks::<512>().0.iter().fold([0u64; 64], |mut sums, chunk| {
            for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                *sum ^= u64::from_le_bytes(*word);
            }
            sums
        });
        black_box(sums);
    });
}

fn products(criterion: &mut Criterion) {
    let x: Vec<f32> =
        (0..256 * K).map(|i| f32::from(u8::try_from(i * 7919 % 251).expect("below 251")) - 125.0).collect();
    let halves: Vec<u16> = x.iter().map(|value| half::bf16::from_f32(*value).to_bits()).collect();
    let mut out = vec![0.0; 256 * N];
    let (blocks, groups) = (N * K / 2, N * K / 32);
    for (format, bytes, scales) in
        [("MXFP4", blocks, groups), ("MXFP4 times int8", blocks, groups), ("bfloat16", 2 * N * K, 0)]
    {
        let (bytes, scales) = (noise(bytes), vec![120; scales]);
        let mut group = criterion.benchmark_group(format);
        group.sample_size(10);
        group.throughput(Throughput::Bytes((bytes.len() + scales.len()) as u64));
        group.bench_function("read", |bencher| bencher.iter(|| read(&bytes)));
        let matrix = |rows: usize| {
            let (bytes, scales) = (&bytes[..bytes.len() / N * rows], &scales[..scales.len() / N * rows]);
            match format {
                "MXFP4" => Matrix::mxfp4(rows, bytes, scales),
                "MXFP4 times int8" => Matrix::mxfp4_int8(rows, bytes, scales),
                _ => Matrix::bf16(rows, K, bytes),
            }
        };
        for level in Level::all() {
            for (dtype, x) in [("bfloat16", Floats::Bf16(&halves[..K])), ("float32", Floats::F32(&x[..K]))] {
                group.bench_function(format!("1 row of {dtype}, {level}"), |bencher| {
                    bencher.iter(|| linear(level, &threads(), x, &matrix(N), None, FloatsMut::F32(&mut out[..N])));
                });
            }
        }
        // Multiplications rather than bytes are what many rows cost.
        let rows = N / 32;
        for m in [2, 4, 16, 64, 256] {
            group.throughput(Throughput::Elements((m * rows * K) as u64));
            for (dtype, x) in [("bfloat16", Floats::Bf16(&halves[..m * K])), ("float32", Floats::F32(&x[..m * K]))] {
                let level = Level::best();
                group.bench_function(format!("{m} rows of {dtype}, {level}"), |bencher| {
                    let out = FloatsMut::F32(&mut out[..m * rows]);
                    let mut out = Some(out);
                    bencher.iter(|| {
                        let FloatsMut::F32(values) = out.as_mut().expect("is there") else { unreachable!() };
                        linear(level, &threads(), x, &matrix(rows), None, FloatsMut::F32(values));
                    });
                });
            }
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
