//! Attention of gpt-oss: prefill by what it multiplies, decode beside a read of the same memory: `cargo bench --bench
//! attention`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tensorport::kernels::{Attention, Floats, FloatsMut, ScopedThreads, Threads, attention, for_each};
use tensorport::simd::Level;

const HEADS: usize = 64;
const KEY_HEADS: usize = 8;
const HEAD_DIM: usize = 64;

/// Values without a pattern, of sizes around 1.
fn noise(length: usize) -> Vec<u16> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut values = Vec::with_capacity(length);
    for _ in 0..length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let [low, high, ..] = state.to_le_bytes();
        values.push(u16::from_le_bytes([low, high]) & 0x80ff | 0x3f00);
    }
    values
}

fn threads() -> ScopedThreads {
    ScopedThreads(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

fn read(values: &[u16]) {
    let part = values.len().div_ceil(threads().count());
    for_each(&threads(), values.chunks(part), &|part| {
        let sums = part.as_chunks::<256>().0.iter().fold([0_u16; 256], |mut sums, chunk| {
            for (sum, value) in sums.iter_mut().zip(chunk) {
                *sum ^= value;
            }
            sums
        });
        black_box(sums);
    });
}

fn bench(criterion: &mut Criterion, group: &str, queries: usize, keys: usize, window: Option<u32>) {
    let query = noise(queries * HEADS * HEAD_DIM);
    // More than a cache holds, as those of all layers are.
    let layers = (1 << 27) / (keys * KEY_HEADS * HEAD_DIM);
    let (key, value) = (noise(layers * keys * KEY_HEADS * HEAD_DIM), noise(layers * keys * KEY_HEADS * HEAD_DIM));
    let positions = |count: usize, first: usize| -> Vec<i32> {
        (first..first + count).map(|position| i32::try_from(position).expect("is small")).collect()
    };
    let (query_positions, key_positions) = (positions(queries, keys - queries), positions(keys, 0));
    let sinks = noise(HEADS);
    let mut out = vec![0; query.len()];
    let mut group = criterion.benchmark_group(group);
    group.sample_size(20);
    let seen = |query: usize| (keys - queries + query + 1).min(window.map_or(keys, |window| window as usize));
    let pairs: usize = (0..queries).map(seen).sum();
    group.throughput(if queries == 1 {
        Throughput::Bytes((4 * pairs * KEY_HEADS * HEAD_DIM) as u64)
    } else {
        Throughput::Elements((2 * pairs * HEADS * HEAD_DIM) as u64)
    });
    let mut layer = 0;
    let mut next = || {
        layer = (layer + 1) % layers;
        let place = layer * keys * KEY_HEADS * HEAD_DIM..(layer + 1) * keys * KEY_HEADS * HEAD_DIM;
        (&key[place.clone()], &value[place])
    };
    if queries == 1 {
        group.bench_function("read", |bencher| {
            bencher.iter(|| {
                let (key, value) = next();
                read(key);
                read(value);
            });
        });
    }
    for level in Level::all() {
        group.bench_function(level.to_string(), |bencher| {
            bencher.iter(|| {
                let (key, value) = next();
                let inputs = Attention {
                    query: Floats::Bf16(&query),
                    key: Floats::Bf16(key),
                    value: Floats::Bf16(value),
                    query_positions: &query_positions,
                    key_positions: &key_positions,
                    sinks: Some(Floats::Bf16(&sinks)),
                    batch: 1,
                    heads: HEADS,
                    key_heads: KEY_HEADS,
                    head_dim: HEAD_DIM,
                    scale: 0.125,
                    window,
                };
                attention(level, &threads(), &inputs, FloatsMut::Bf16(&mut out));
            });
        });
    }
}

fn all(criterion: &mut Criterion) {
    bench(criterion, "512 queries", 512, 512, None);
    bench(criterion, "512 queries, window of 128", 512, 512, Some(128));
    bench(criterion, "1 query, 4096 keys", 1, 4096, None);
    bench(criterion, "1 query, 128 keys", 1, 128, None);
}

criterion_group!(benches, all);
criterion_main!(benches);
