//! float8 with block scales: every code under scales of every kind, pairs, plans, and regions of decoded weights.

use std::path::Path;

use half::bf16;
use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::arena::ArenaPool;
use tensorport::cast::{Counts, OnOverflow, Target};
use tensorport::float8::{self, BlockSize, Blocks, Pairing, ScaleDtype, Scales, decode_with, value};
use tensorport::load::{Conversion, Request, load};
use tensorport::mxfp4::{Candidate, count_parameters};
use tensorport::options::{Float8Mode, Options, Precision};
use tensorport::region::Region;
use tensorport::simd::Level;
use tensorport::work::Resources;
use tensorport::{Checkpoint, Error, progress};

use crate::cast::oracle;
use crate::fixtures::{Tensor, VERIFY, contents, convert_as, read_manifest, tensor_info, tight, verify, write};

const TARGETS: [Target; 3] = [Target::F16, Target::Bf16, Target::F32];

/// A code's value as the OCP document defines it: sign, four exponent bits, three mantissa bits, one NaN.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

fn all_codes() -> Vec<u8> {
    (0..=255).collect()
}

/// Bits of each element.
fn elements(to: Target, bytes: &[u8]) -> Vec<u64> {
    let width = to.dtype().bitsize() / 8;
    let element = |element: &[u8]| element.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte));
    bytes.chunks(width).map(element).collect()
}

fn is_nan(to: Target, bits: u64) -> bool {
    let (magnitude, infinity) = match to {
        Target::F16 => (bits & 0x7fff, 0x7c00),
        Target::Bf16 => (bits & 0x7fff, 0x7f80),
        Target::F32 => (bits & 0x7fff_ffff, 0x7f80_0000),
    };
    magnitude > infinity
}

/// What decoding makes of exact products: bits (None for NaN) and counts, without saturation.
fn expected(to: Target, products: &[f64]) -> (Vec<Option<u64>>, Counts) {
    let infinity = oracle(to, f64::INFINITY).unwrap();
    let mut counts = Counts::default();
    let bits = products.iter().map(|&product| {
        let bits = oracle(to, product)?;
        let magnitude = oracle(to, product.abs()).unwrap();
        if magnitude == infinity && product.is_finite() {
            counts.overflow += 1;
            counts.largest = counts.largest.max(product.abs());
        }
        counts.underflow += u64::from(magnitude == 0 && product != 0.0);
        Some(bits)
    });
    (bits.collect(), counts)
}

/// Decodes codes under one scale with all vectors, and compares with exact products.
fn check(scale: f32, codes: &[u8]) {
    let size = BlockSize { rows: 1, columns: codes.len() as u64 };
    let blocks = Blocks { rows: 1, columns: codes.len() as u64, size, scale_dtype: ScaleDtype::F32 };
    let products: Vec<f64> = codes.iter().map(|&code| e4m3(code) * f64::from(scale)).collect();
    for to in TARGETS {
        let (bits, counts) = expected(to, &products);
        let mut first = None;
        for level in Level::all() {
            let scales = Scales { first: 0, bytes: &scale.to_le_bytes() };
            let mut out = vec![0xa5; codes.len() * to.dtype().bitsize() / 8];
            let found = decode_with(level, blocks, to, 0, codes, scales, &mut out, OnOverflow::Warn);
            assert_eq!(found, counts, "{to:?}, scale {scale:e}, {level}");
            for ((&code, found), &expected) in codes.iter().zip(elements(to, &out)).zip(&bits) {
                let context = format!("{to:?}, code {code:#04x}, scale {scale:e}, {level}: {found:#x}");
                match expected {
                    Some(expected) => assert_eq!(found, expected, "{context}"),
                    None => assert!(is_nan(to, found), "{context}"),
                }
            }
            // The same bytes with all vectors, NaNs included.
            assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "{to:?}, scale {scale:e}, {level}");
        }
    }
}

#[test]
fn codes_have_the_values_of_their_definition() {
    for code in all_codes() {
        let (found, expected) = (f64::from(value(code)), e4m3(code));
        assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{code:#04x}");
    }
}

#[test]
fn every_code_under_landmark_scales_is_rounded_once() {
    let tie = f32::from_bits(0x3f80_8000);
    let powers = (-149..128).map(|exponent| {
        f32::from_bits(match exponent {
            ..-126 => 1 << (exponent + 149),
            _ => u32::try_from(exponent + 127).unwrap() << 23,
        })
    });
    let around = powers.flat_map(|power| {
        let bits = power.to_bits();
        [power, f32::from_bits(bits.saturating_sub(1)), f32::from_bits(bits + 1), power * 1.3]
    });
    let special = [0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, tie, -tie];
    for scale in around.chain(special) {
        check(scale, &all_codes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn every_code_under_any_scale_is_rounded_once(bits in any::<u32>(), ordinary in 0.0f32..1.0) {
        check(f32::from_bits(bits), &all_codes());
        check(ordinary, &all_codes());
        // Few bits: many products lie half way between two neighbours.
        check(f32::from_bits(bits & 0xffff_8000), &all_codes());
    }
}

#[test]
fn overflow_saturates_with_the_sign() {
    let blocks = Blocks { rows: 1, columns: 2, size: BlockSize::default(), scale_dtype: ScaleDtype::F32 };
    let scales = Scales { first: 0, bytes: &1e37f32.to_le_bytes() };
    let mut out = [0; 4];
    let counts = float8::decode(blocks, Target::Bf16, 0, &[0x7e, 0xfe], scales, &mut out, OnOverflow::Saturate);
    assert_eq!((counts.overflow, counts.largest), (2, 448.0 * f64::from(1e37f32)));
    assert_eq!(
        [out[..2].try_into().unwrap(), out[2..].try_into().unwrap()].map(bf16::from_le_bytes),
        [bf16::MAX, bf16::MIN]
    );
}

proptest! {
    #[test]
    fn each_value_has_the_scale_of_its_block(
        (stack, rows, columns) in (1..3u64, 1..40u64, 1..70u64),
        (block_rows, block_columns) in (1..20u64, 1..40u64),
        cut in (0.0..1.0f64, 0.0..1.0f64),
        is_bf16 in any::<bool>(),
    ) {
        let scale_dtype = if is_bf16 { ScaleDtype::Bf16 } else { ScaleDtype::F32 };
        let size = BlockSize { rows: block_rows, columns: block_columns };
        let blocks = Blocks { rows, columns, size, scale_dtype };
        let (scale_rows, scale_columns) = (rows.div_ceil(block_rows), columns.div_ceil(block_columns));
        // Scales that bfloat16 holds.
        let scale = |number: u64| f32::from(u8::try_from(number % 120 + 1).unwrap());
        let bytes: Vec<u8> = (0..stack * scale_rows * scale_columns).flat_map(|number| {
            if is_bf16 { bf16::from_f32(scale(number)).to_le_bytes().to_vec() } else { scale(number).to_le_bytes().to_vec() }
        }).collect();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "small")]
        let position = |cut: f64| (cut * (stack * rows * columns) as f64) as u64;
        let (from, to) = (position(cut.0.min(cut.1)), position(cut.0.max(cut.1)));
        let code = |value: u64| u8::try_from(value * 7 % 251).unwrap();
        let codes: Vec<u8> = (from..to).map(code).collect();
        let mut out = vec![0; codes.len() * 4];
        for stretch in blocks.stretches(from..to) {
            let within = |number: u64| usize::try_from(number - from).unwrap();
            let (start, end) = (within(stretch.values.start), within(stretch.values.end));
            let width = scale_dtype.nbytes();
            let scale_bytes = stretch.scales.start * width..stretch.scales.end * width;
            let scale_bytes =
                &bytes[usize::try_from(scale_bytes.start).unwrap()..usize::try_from(scale_bytes.end).unwrap()];
            let scales = Scales { first: stretch.scales.start, bytes: scale_bytes };
            let out = &mut out[4 * start..4 * end];
            float8::decode(blocks, Target::F32, stretch.values.start, &codes[start..end], scales, out, OnOverflow::Error);
        }
        for (value, found) in (from..to).zip(elements(Target::F32, &out)) {
            let (row, column) = (value / columns, value % columns);
            let (matrix, row) = (row / rows, row % rows);
            let number = (matrix * scale_rows + row / block_rows) * scale_columns + column / block_columns;
            let product = e4m3(code(value)) * f64::from(scale(number));
            match oracle(Target::F32, product) {
                Some(bits) => prop_assert_eq!(found, bits),
                None => prop_assert!(is_nan(Target::F32, found)),
            }
        }
    }
}

fn candidates<'a>(tensors: &'a [(&'a str, Dtype, &'a [u64])]) -> Vec<Candidate<'a>> {
    let path = Path::new("m.safetensors");
    tensors.iter().map(|&(name, dtype, shape)| Candidate { name, dtype, shape, path }).collect()
}

const TABLE: [(&str, Dtype, &[u64]); 8] = [
    ("a.weight", Dtype::F8_E4M3, &[200, 330]),
    ("a.weight_scale_inv", Dtype::F32, &[2, 3]),
    ("b", Dtype::F8_E4M3, &[5, 129, 7]),
    ("b_scale_inv", Dtype::BF16, &[5, 2, 1]),
    ("c.weight", Dtype::F8_E4M3, &[3, 4]),
    ("d.weight", Dtype::F32, &[3, 4]),
    ("d.weight_scale_inv", Dtype::F32, &[1, 1]),
    ("e_scale_inv", Dtype::F32, &[6]),
];

proptest! {
    #[test]
    fn pairs_are_found_in_any_order(order in Just((0..TABLE.len()).collect::<Vec<_>>()).prop_shuffle()) {
        let shuffled: Vec<_> = order.iter().map(|&index| TABLE[index]).collect();
        let tensors = candidates(&shuffled);
        let Pairing { pairs, misfits } = float8::pair(&tensors, BlockSize::default());
        prop_assert!(misfits.is_empty());
        let mut found: Vec<_> = pairs.iter().map(|pair| (shuffled[pair.weight].0, shuffled[pair.scales].0)).collect();
        found.sort_unstable();
        prop_assert_eq!(found, [("a.weight", "a.weight_scale_inv"), ("b", "b_scale_inv")]);
        let weights = 200 * 330 + 5 * 129 * 7 + 12 + 12 + 1 + 6;
        prop_assert_eq!(count_parameters(&tensors), (weights, weights + 6 + 10));
    }
}

#[test]
fn misfits_name_both_tensors() {
    let weight = ("w", Dtype::F8_E4M3, [200, 330].as_slice());
    let cases: [(_, (&str, Dtype, &[u64]), _); 7] = [
        (weight, ("w_scale_inv", Dtype::F32, &[3, 2]), "[2, 3]"),
        (weight, ("w_scale_inv", Dtype::F32, &[2, 3, 1]), "[2, 3]"),
        (weight, ("w_scale_inv", Dtype::F32, &[]), "[2, 3]"),
        (weight, ("w_scale_inv", Dtype::F16, &[2, 3]), "F32 or BF16"),
        (("w", Dtype::F8_E5M2, &[200, 330]), ("w_scale_inv", Dtype::F32, &[2, 3]), "F8_E4M3"),
        (("w", Dtype::F8_E4M3, &[200]), ("w_scale_inv", Dtype::F32, &[2]), "two dimensions"),
        (("x", Dtype::F8_E4M3, &[200, 330]), ("w_scale_inv", Dtype::F32, &[2, 3]), "beside them"),
    ];
    for (weight, scales, told) in cases {
        let tensors = [weight, scales];
        let pairing = float8::pair(&candidates(&tensors), BlockSize::default());
        assert!(pairing.pairs.is_empty());
        let [misfit] = &pairing.misfits[..] else { panic!("{:?}", pairing.misfits) };
        let text = misfit.fault.to_string();
        assert_eq!((misfit.index, misfit.name.as_str()), (1, "w"), "{text}");
        assert!(text.contains("\"w\"") && text.contains("\"w_scale_inv\"") && text.contains(told), "{text}");
    }
    let sized = [weight, ("w_scale_inv", Dtype::F32, &[4, 5])];
    assert_eq!(float8::pair(&candidates(&sized), BlockSize { rows: 50, columns: 80 }).pairs.len(), 1);
}

/// A folder with weights and scales in two files.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let scales = |count: u16| (0..count).map(|number| f32::from(number % 11 + 1) * 0.017);
    let norm: Vec<u8> = scales(330).flat_map(f32::to_le_bytes).collect();
    write(
        &folder.path().join("1.safetensors"),
        &[
            Tensor::f32("late.weight_scale_inv", &[2, 2, 5], scales(20)),
            codes("early.weight", &[300, 1000]),
            Tensor { name: "norm".into(), dtype: Dtype::F32, shape: vec![330], data: norm },
        ],
    );
    write(
        &folder.path().join("2.safetensors"),
        &[Tensor::f32("early.weight_scale_inv", &[3, 8], scales(24)), codes("late.weight", &[2, 200, 600])],
    );
    folder
}

/// A tensor of all codes but the NaNs.
fn codes(name: &str, shape: &[usize]) -> Tensor {
    let mut tensor = Tensor::new(name, Dtype::F8_E4M3, shape);
    for code in &mut tensor.data {
        *code &= 0xfe;
    }
    tensor
}

fn dequantize(precision: Precision) -> Options {
    Options { float8: Float8Mode::Dequantize, precision, shard_size: 200e3 / 1e9, ..Options::default() }
}

#[test]
fn the_least_memory_converts_verifies_and_restates_what_it_did() {
    let folder = folder();
    let output = folder.path().join("out");
    let report = convert_as(folder.path(), &output, &dequantize(Precision::Float32), VERIFY).unwrap();
    assert!(report.verified);
    assert_eq!(report.total_parameters, 300_000 + 240_000 + 330);
    let manifest = read_manifest(&output);
    assert_eq!(manifest.stored_elements, manifest.total_parameters);
    assert_eq!(tensor_info(&manifest, "late.weight").source_dtype, "float8_e4m3fn");
    assert!(verify(&output, Some(folder.path())).unwrap().ok);
    let (source, decoded) = (contents(folder.path()), contents(&output));
    assert_eq!(decoded.keys().collect::<Vec<_>>(), ["early.weight", "late.weight", "norm"]);
    let f32_at = |bytes: &[u8], at: usize| f64::from(f32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap()));
    for (matrix, row, column) in [(0, 0, 0), (0, 127, 599), (0, 128, 128), (1, 199, 512), (1, 5, 127)] {
        let at = (matrix * 200 + row) * 600 + column;
        let scale = f32_at(&source["late.weight_scale_inv"].2, (matrix * 2 + row / 128) * 5 + column / 128);
        let exact = e4m3(source["late.weight"].2[at]) * scale;
        #[expect(clippy::cast_possible_truncation, reason = "the rounding is the purpose")]
        let rounded = f64::from(exact as f32);
        assert_eq!(f32_at(&decoded["late.weight"].2, at).to_bits(), rounded.to_bits());
    }
}

#[test]
fn options_that_keep_are_not_stated() {
    let folder = folder();
    let output = folder.path().join("out");
    let manifest = |options: &Options| {
        let mode = tensorport::convert::Mode { overwrite: true, ..VERIFY };
        convert_as(folder.path(), &output, options, mode).unwrap();
        std::fs::read_to_string(output.join("manifest.json")).unwrap()
    };
    assert!(!manifest(&Options::default()).contains("\"float8\""));
    assert!(manifest(&dequantize(Precision::Source)).contains("\"float8\":\"dequantize\""));
}

fn region_of(shape: &'static [u64]) -> impl Strategy<Value = Region> {
    let axis = |&dim: &u64| (0..=dim, 0..=dim).prop_map(|(a, b)| a.min(b)..a.max(b));
    shape.iter().map(axis).collect::<Vec<_>>()
}

const LATE: &[u64] = &[2, 200, 600];

#[test]
fn every_region_is_that_of_the_whole() {
    let folder = folder();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names = ["late.weight", "late.weight_scale_inv"].map(str::to_owned);
    let read = |regions: Vec<Region>| {
        let request = Request::new(&checkpoint, &names, Conversion::Float(Target::Bf16), regions).unwrap();
        let pool = ArenaPool::default();
        load(&checkpoint, &[request], OnOverflow::Error, tight(2), &pool, &mut progress::ignore).unwrap()
    };
    let whole = read(vec![LATE.iter().map(|&dim| 0..dim).collect()]).regions[0][0].bytes().to_vec();
    proptest!(ProptestConfig::with_cases(60), |(regions in prop::collection::vec(region_of(LATE), 1..4))| {
        let loaded = read(regions.clone());
        for (region, found) in regions.iter().zip(&loaded.regions[0]) {
            let mut expected = Vec::new();
            for matrix in region[0].clone() {
                for row in region[1].clone() {
                    let at = |column: u64| usize::try_from(2 * ((matrix * 200 + row) * 600 + column)).unwrap();
                    expected.extend_from_slice(&whole[at(region[2].start)..at(region[2].end)]);
                }
            }
            prop_assert!(found.bytes() == expected, "{region:?}");
        }
    });
}

#[test]
fn a_region_reads_its_scales_and_no_others() {
    let folder = folder();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let read = |region: Region| {
        let names = ["early.weight", "early.weight_scale_inv"].map(str::to_owned);
        let request = Request::new(&checkpoint, &names, Conversion::Float(Target::Bf16), vec![region]).unwrap();
        let (pool, resources) = (ArenaPool::default(), Resources { workers: 1, ..Resources::default() });
        load(&checkpoint, &[request], OnOverflow::Error, resources, &pool, &mut progress::ignore).unwrap().bytes_read
    };
    assert_eq!(read(vec![0..300, 0..1000]), 300_000 + 3 * 8 * 4);
    assert_eq!(read(vec![128..256, 0..1000]), 128_000 + 8 * 4);
    assert_eq!(read(vec![200..201, 130..250]), 120 + 4);
    assert_eq!(read(vec![7..7, 0..1000]), 0);
}

#[test]
fn two_names_that_are_no_pair_are_refused() {
    let folder = folder();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let request = |names: [&str; 2], conversion| {
        Request::new(&checkpoint, &names.map(str::to_owned), conversion, Vec::new()).unwrap_err()
    };
    let to = Conversion::Float(Target::F32);
    for (names, conversion) in [
        (["late.weight", "late.weight_scale_inv"], Conversion::None),
        (["late.weight_scale_inv", "late.weight"], to),
        (["norm", "late.weight_scale_inv"], to),
    ] {
        let fault = request(names, conversion);
        assert!(matches!(fault, Error::Argument { .. } | Error::MalformedTensor { .. }), "{fault}");
    }
}
