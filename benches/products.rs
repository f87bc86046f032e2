//! Products beside a read of the same memory, all in bytes of weights on all cores: `cargo bench --bench products`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tensorport::kernels::{
    Attention, Experts, Floats, FloatsMut, Matrix, ScopedThreads, Threads, attention, for_each, linear, moe,
};
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
    let x = activations(256 * K);
    let halves = to_bf16(&x);
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

/// Four experts of 32 for one token, others each time, so that they come from memory.
fn mixture(criterion: &mut Criterion) {
    const EXPERTS: usize = 32;
    const CHOSEN: usize = 4;
    let [gate_up, down] = [2, 1].map(|matrices| noise(EXPERTS * matrices * K * K / 2));
    let [gate_up_scales, down_scales] = [2, 1].map(|matrices| vec![118; EXPERTS * matrices * K * K / 32]);
    let biases = vec![0.0; EXPERTS * 2 * K];
    let x = activations(K);
    let halves = to_bf16(&x);
    let (mut out, mut halves_out) = (vec![0.0; K], vec![0; K]);

    let mut group = criterion.benchmark_group("mixture of experts");
    group.throughput(Throughput::Bytes((CHOSEN * 3 * K * K / 32 * 17) as u64));
    for int8 in [false, true] {
        let matrix = if int8 { Matrix::mxfp4_int8 } else { Matrix::mxfp4 };
        let experts = Experts {
            count: EXPERTS,
            gate_up: matrix(EXPERTS * 2 * K, &gate_up, &gate_up_scales),
            gate_up_bias: Floats::F32(&biases),
            down: matrix(EXPERTS * K, &down, &down_scales),
            down_bias: Floats::F32(&biases[..EXPERTS * K]),
            limit: 7.0,
            alpha: 1.702,
        };
        let mut first = 0;
        let mut mix = |x, out: FloatsMut<'_>| {
            let chosen = [0, 1, 2, 3].map(|number| first + number);
            first = (first + 4) % 32;
            moe(Level::best(), &threads(), x, &chosen, &[0.25; CHOSEN], &experts, out);
        };
        let name = |dtype| format!("1 row of {dtype}{}, {}", if int8 { " times int8" } else { "" }, Level::best());
        group.bench_function(name("bfloat16"), |bencher| {
            bencher.iter(|| mix(Floats::Bf16(&halves), FloatsMut::Bf16(&mut halves_out)));
        });
        group.bench_function(name("float32"), |bencher| {
            bencher.iter(|| mix(Floats::F32(&x), FloatsMut::F32(&mut out)));
        });
    }
    // All of it, for a part would stay in a cache.
    group.throughput(Throughput::Bytes(gate_up.len() as u64));
    group.bench_function("read", |bencher| bencher.iter(|| read(&gate_up)));
}

/// The attention of gpt-oss for one query over a cache that comes from memory.
fn one_query(criterion: &mut Criterion) {
    const KEYS: usize = 1 << 16;
    const HEADS: usize = 64;
    const KEY_HEADS: usize = 8;
    const HEAD_DIM: usize = 64;
    let values = to_bf16(&activations(KEYS * KEY_HEADS * HEAD_DIM));
    let key = to_bf16(&activations(KEYS * KEY_HEADS * HEAD_DIM));
    let query = to_bf16(&activations(HEADS * HEAD_DIM));
    let key_positions: Vec<i32> = (0..1 << 16).collect();
    let mut out = vec![0; HEADS * HEAD_DIM];

    let mut group = criterion.benchmark_group("attention of one query");
    group.throughput(Throughput::Bytes((2 * 2 * values.len()) as u64));
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
        group.bench_function(format!("65536 keys, {level}"), |bencher| {
            bencher.iter(|| attention(level, &threads(), &inputs, FloatsMut::Bf16(&mut out)));
        });
    }
    let bytes = noise(2 * 2 * values.len());
    group.bench_function("read", |bencher| bencher.iter(|| read(&bytes)));
}

/// Values between -1 and 1.
fn activations(count: usize) -> Vec<f32> {
    (0..count).map(|i| (f32::from(u8::try_from(i * 7919 % 251).expect("below 251")) - 125.0) / 125.0).collect()
}

fn to_bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|value| half::bf16::from_f32(*value).to_bits()).collect()
}

criterion_group!(benches, products, mixture, one_query);
criterion_main!(benches);
