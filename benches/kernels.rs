//! Throughput of the kernels on one core, in bytes of floats for MXFP4, else in bytes of output: `cargo bench`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use safetensors::Dtype;
use tensorport::cast::{self, OnOverflow, Target};
use tensorport::checksum::TensorHasher;
use tensorport::float8::{BlockSize, Blocks, ScaleDtype, Scales, decode_with};
use tensorport::mxfp4::{self, BLOCK_BYTES, DecodeTable, ErrorSums, MX_BLOCK_SIZE, ScaleRule};
use tensorport::simd::Level;

/// Elements of one call: a worker's chunk, small enough to stay in the second-level cache.
const ELEMS: usize = 1 << 18;

/// Ordinary weights: small normal numbers, made without a generator.
fn weights(dtype: Dtype) -> Vec<u8> {
    let values = (0..ELEMS).map(|i| {
        #[expect(clippy::cast_precision_loss, reason = "any value does")]
        let value = ((i * 2_654_435_761) % 65_521) as f32 / 65_521.0 - 0.5;
        value
    });
    match dtype {
        Dtype::F64 => values.flat_map(|v| f64::from(v).to_le_bytes()).collect(),
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
    }
}

fn casts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cast");
    for from in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        let src = weights(from);
        for to in [Target::F32, Target::F16, Target::Bf16] {
            if to.dtype() == from {
                continue;
            }
            let mut out = vec![0; ELEMS * to.dtype().bitsize() / 8];
            group.throughput(Throughput::Bytes(out.len() as u64));
            for level in Level::all() {
                group.bench_function(format!("{from} to {}, {level}", to.dtype()), |bencher| {
                    bencher.iter(|| cast::cast_with(level, from, to, black_box(&src), &mut out, OnOverflow::Error));
                });
            }
        }
    }
}

fn dequantize(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dequantize");
    let groups = ELEMS / MX_BLOCK_SIZE;
    #[expect(clippy::cast_possible_truncation, reason = "any byte does")]
    let blocks: Vec<u8> = (0..groups * BLOCK_BYTES).map(|i| (i * 167 % 256) as u8).collect();
    let scales: Vec<u8> = (0..groups).map(|i| if i % 4 == 0 { 120 } else { 121 }).collect();
    for to in [Target::Bf16, Target::F16, Target::F32] {
        let table = DecodeTable::new(to, OnOverflow::Error);
        let mut out = vec![0; ELEMS * to.dtype().bitsize() / 8];
        group.throughput(Throughput::Bytes(out.len() as u64));
        for level in Level::all() {
            group.bench_function(format!("{}, {level}", to.dtype()), |bencher| {
                bencher.iter(|| table.decode_with(level, black_box(&blocks), &scales, &mut out));
            });
        }
    }
}

fn dequantize_float8(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dequantize float8");
    // A chunk of 36 rows: they share the 56 scales of the first blocks.
    let blocks = Blocks { rows: 128, columns: 7168, size: BlockSize::default(), scale_dtype: ScaleDtype::F32 };
    #[expect(clippy::cast_possible_truncation, reason = "any byte does")]
    let codes: Vec<u8> = (0..ELEMS).map(|i| (i * 167 % 251) as u8).collect();
    let scales: Vec<u8> = (0..56u8).flat_map(|i| (1e-4 + 1e-6 * f32::from(i)).to_le_bytes()).collect();
    for to in [Target::Bf16, Target::F16, Target::F32] {
        let mut out = vec![0; ELEMS * to.dtype().bitsize() / 8];
        group.throughput(Throughput::Bytes(out.len() as u64));
        for level in Level::all() {
            let scales = Scales { first: 0, bytes: &scales };
            group.bench_function(format!("{}, {level}", to.dtype()), |bencher| {
                bencher
                    .iter(|| decode_with(level, blocks, to, 0, black_box(&codes), scales, &mut out, OnOverflow::Error));
            });
        }
    }
}

fn quantize(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quantize");
    let groups = ELEMS / MX_BLOCK_SIZE;
    let (mut blocks, mut scales) = (vec![0; groups * BLOCK_BYTES], vec![0; groups]);
    for from in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64] {
        let src = weights(from);
        group.throughput(Throughput::Bytes(src.len() as u64));
        for level in Level::all() {
            group.bench_function(format!("{from}, {level}"), |bencher| {
                bencher.iter(|| {
                    mxfp4::encode_with(level, from, ScaleRule::Nearest, black_box(&src), &mut blocks, &mut scales);
                });
            });
        }
    }
}

fn quantization_error(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quantization error");
    let groups = ELEMS / MX_BLOCK_SIZE;
    for from in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        let src = weights(from);
        let (mut blocks, mut scales) = (vec![0; groups * BLOCK_BYTES], vec![0; groups]);
        mxfp4::encode(from, ScaleRule::Floor, &src, &mut blocks, &mut scales);
        group.throughput(Throughput::Bytes(src.len() as u64));
        for level in Level::all() {
            let mut sums = ErrorSums::default();
            group.bench_function(format!("{from}, {level}"), |bencher| {
                bencher.iter(|| sums.add_with(level, from, black_box(&src), &blocks, &scales));
            });
        }
    }
}

fn checksum(criterion: &mut Criterion) {
    let bytes = weights(Dtype::BF16);
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("xxh3-128", |bencher| {
        bencher.iter(|| {
            let mut hasher = TensorHasher::new(1);
            hasher.update(black_box(&bytes), true);
            hasher.finish()
        });
    });
}

criterion_group!(kernels, casts, dequantize, dequantize_float8, quantize, quantization_error, checksum);
criterion_main!(kernels);
