//! Quantizing: which tensors become pairs, what their bytes are, and what is said of their error.

use std::path::Path;

use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::checkpoint::TensorSpec;
use tensorport::convert::Mode;
use tensorport::float8::BlockSize;
use tensorport::mxfp4::{self, ErrorSums, MX_BLOCK_SIZE, QuantizationError, ScaleRule};
use tensorport::options::{Mxfp4Mode, Options, Precision};
use tensorport::ordered_map::OrderedMap;
use tensorport::plan::{Plan, plan};
use tensorport::simd::Level;
use tensorport::transform::Transform;
use tensorport::work::Resources;
use tensorport::{Error, Result, progress};

use crate::fixtures::{
    Place, Tensor, VERIFY, assert_same_tree, contents, convert, convert_as, read_manifest, read_tree, spec,
    tensor_info, verify, write,
};

fn quantize(globs: &[&str]) -> Options {
    let globs = globs.iter().map(|&glob| glob.to_owned()).collect();
    Options { mxfp4: Mxfp4Mode::Quantize, quantize: Some(globs), ..Options::default() }
}

fn planned(tensors: &[TensorSpec], options: &Options) -> Result<Plan> {
    plan(tensors, |_| Path::new("m.safetensors"), &OrderedMap::default(), BlockSize::default(), options)
}

fn names(plan: &Plan) -> Vec<&str> {
    plan.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
}

#[test]
fn a_matrix_becomes_blocks_and_scales_in_its_place() {
    let tensors = [
        spec("a.norm", Dtype::F32, &[96]),
        spec("b.weight", Dtype::BF16, &[5, 96]),
        spec("c.experts", Dtype::F64, &[3, 7, 32]),
    ];
    let plan = planned(&tensors, &quantize(&["*"])).unwrap();
    assert_eq!(names(&plan), ["a.norm", "b.weight_blocks", "b.weight_scales", "c.experts_blocks", "c.experts_scales"]);
    let described: Vec<_> = plan
        .tensors
        .iter()
        .map(|tensor| (tensor.dtype, tensor.source_dtype, &tensor.shape[..], tensor.nbytes, tensor.encoded_name()))
        .collect();
    assert_eq!(
        described,
        [
            (Dtype::F32, "float32", &[96][..], 384, None),
            (Dtype::U8, "bfloat16", &[5, 3, 16], 240, Some("b.weight")),
            (Dtype::U8, "bfloat16", &[5, 3], 15, None),
            (Dtype::U8, "float64", &[3, 7, 1, 16], 336, Some("c.experts")),
            (Dtype::U8, "float64", &[3, 7, 1], 21, None),
        ]
    );
    assert_eq!(plan.tensors[3].transform, Transform::QuantizeBlocks { from: Dtype::F64, rule: ScaleRule::Floor });
    assert_eq!(plan.tensors[3].sources, [2]);
    // Values count once, scales in what is stored.
    assert_eq!((plan.total_parameters, plan.stored_elements), (96 + 480 + 672, 96 + 480 + 672 + 15 + 21));
    assert!(plan.warnings.is_empty());
}

#[test]
fn what_is_not_chosen_or_no_float_matrix_stays() {
    let tensors = [
        spec("other", Dtype::F32, &[4, 64]),
        spec("x.matrix", Dtype::F16, &[4, 64]),
        spec("x.vector", Dtype::F32, &[64]),
        spec("x.four", Dtype::F32, &[2, 3, 4, 64]),
        spec("x.integers", Dtype::I32, &[4, 64]),
        spec("x.float8", Dtype::F8_E4M3, &[4, 64]),
        spec("x.pair_blocks", Dtype::U8, &[4, 2, 16]),
        spec("x.pair_scales", Dtype::U8, &[4, 2]),
    ];
    let options = Options { precision: Precision::Bfloat16, ..quantize(&["x.*"]) };
    let plan = planned(&tensors, &options).unwrap();
    let dtypes: Vec<_> = plan.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype)).collect();
    // The precision is for what is not quantized.
    assert_eq!(
        dtypes,
        [
            ("other", Dtype::BF16),
            ("x.matrix_blocks", Dtype::U8),
            ("x.matrix_scales", Dtype::U8),
            ("x.vector", Dtype::BF16),
            ("x.four", Dtype::BF16),
            ("x.integers", Dtype::I32),
            ("x.float8", Dtype::F8_E4M3),
            ("x.pair_blocks", Dtype::U8),
            ("x.pair_scales", Dtype::U8),
        ]
    );
    assert!(plan.warnings.is_empty());
}

#[test]
fn rows_of_broken_blocks_stay_with_a_warning() {
    let tensors = [
        spec("a", Dtype::F32, &[4, 64]),
        spec("b", Dtype::F32, &[64, 33]),
        spec("c", Dtype::F32, &[3, 64, 31]),
        spec("d", Dtype::F32, &[64, 0]),
        spec("e", Dtype::F32, &[0, 64]),
    ];
    let plan = planned(&tensors, &quantize(&["*"])).unwrap();
    assert_eq!(names(&plan), ["a_blocks", "a_scales", "b", "c", "d", "e_blocks", "e_scales"]);
    assert_eq!(plan.warnings.len(), 3);
    for (warning, words) in plan.warnings.iter().zip([["\"b\"", "33"], ["\"c\"", "31"], ["\"d\"", "0"]]) {
        assert!(words.iter().all(|word| warning.contains(word)), "{warning}");
    }
}

#[test]
fn globs_that_leave_nothing_to_quantize_are_a_mapping_error() {
    let tensors = [spec("a.bias", Dtype::F32, &[64]), spec("a.weight", Dtype::F32, &[4, 60])];
    for globs in [&["b*"][..], &["*.bias"], &["*"]] {
        let fault = planned(&tensors, &quantize(globs)).unwrap_err();
        assert!(matches!(fault, Error::Mapping { .. }), "{fault}");
        assert!(fault.to_string().contains(globs[0]), "{fault}");
    }
    let none_included = Options { include: Some(vec!["c".into()]), ..quantize(&["*"]) };
    let message = planned(&tensors, &none_included).unwrap_err().to_string();
    assert!(message.contains("include"), "{message}");
    let left_out = Options { exclude: Some(vec!["a.w*".into()]), ..quantize(&["*.weight"]) };
    assert!(matches!(planned(&tensors, &left_out), Err(Error::Mapping { .. })));
}

#[test]
fn include_and_exclude_see_the_names_of_the_source() {
    let tensors = [spec("a", Dtype::F32, &[4, 32]), spec("b", Dtype::F32, &[4, 32])];
    let options = Options { include: Some(vec!["a".into()]), ..quantize(&["*"]) };
    assert_eq!(names(&planned(&tensors, &options).unwrap()), ["a_blocks", "a_scales"]);
    let options = Options { exclude: Some(vec!["*_blocks".into(), "b".into()]), ..quantize(&["*"]) };
    assert_eq!(names(&planned(&tensors, &options).unwrap()), ["a_blocks", "a_scales"]);
}

#[test]
fn names_that_meet_are_refused() {
    let matrix = spec("x", Dtype::F32, &[4, 64]);
    for (others, culprit) in [
        (vec![spec("x_blocks", Dtype::I8, &[3])], "x_blocks"),
        (vec![spec("x_scales", Dtype::F32, &[3])], "x_scales"),
        (vec![spec("x.blocks", Dtype::U8, &[4, 2, 16]), spec("x.scales", Dtype::U8, &[4, 2])], "x"),
    ] {
        let tensors = [&others[..], std::slice::from_ref(&matrix)].concat();
        let fault = planned(&tensors, &quantize(&["x"])).unwrap_err();
        assert!(matches!(&fault, Error::MalformedTensor { tensor, .. } if tensor == culprit), "{fault}");
        let left_out = Options { exclude: Some(vec!["x[._]*".into()]), ..quantize(&["x"]) };
        assert_eq!(names(&planned(&tensors, &left_out).unwrap()), ["x_blocks", "x_scales"]);
    }
}

#[test]
fn options_that_contradict_each_other_are_bad_arguments() {
    let (globs, rule) = (quantize(&["*"]).quantize, Some(ScaleRule::Floor));
    for (options, argument) in [
        (Options { quantize: globs.clone(), ..Options::default() }, "quantize"),
        (Options { quantize: Some(Vec::new()), ..Options::default() }, "quantize"),
        (Options { quantize: globs, mxfp4: Mxfp4Mode::Dequantize, ..Options::default() }, "quantize"),
        (Options { scale_rule: rule, ..Options::default() }, "scale_rule"),
        (quantize(&[]), "quantize"),
        (Options { quantize: None, ..quantize(&[]) }, "quantize"),
        (quantize(&["a["]), "quantize"),
    ] {
        let faults = [planned(&[], &options).err(), options.settled().err()];
        for fault in faults {
            assert!(matches!(fault, Some(Error::Argument { name, .. }) if name == argument), "{options:?}");
        }
    }
}

#[test]
fn settled_options_name_the_rule_where_one_is_used() {
    assert_eq!(quantize(&["*"]).settled().unwrap().scale_rule, Some(ScaleRule::Floor));
    let ceil = Options { scale_rule: Some(ScaleRule::Ceil), ..quantize(&["*"]) };
    assert_eq!(ceil.settled().unwrap(), ceil);
    assert_eq!(Options::default().settled().unwrap(), Options::default());
    let text = serde_json::to_string(&Options::default()).unwrap();
    assert!(!text.contains("quantize") && !text.contains("scale_rule"), "{text}");
}

const RULES: [ScaleRule; 3] = [ScaleRule::Floor, ScaleRule::Ceil, ScaleRule::Nearest];

/// Values over many exponents, with zeros of both signs.
fn values(count: u16) -> impl Iterator<Item = f32> {
    (0..count).map(|i| {
        let value = f32::from(u16::try_from(u32::from(i) * 37 % 501).unwrap()) - 250.0;
        value * 2f32.powi(i32::from(i / 64 % 40) - 20)
    })
}

/// Matrices of all four dtypes, the first of them split by [`small`] shards.
fn matrices() -> Vec<Tensor> {
    let of = |name: &str, dtype: Dtype, shape: &[usize], bytes: fn(f32) -> Vec<u8>| {
        let count = u16::try_from(shape.iter().product::<usize>()).unwrap();
        Tensor { name: name.into(), dtype, shape: shape.to_vec(), data: values(count).flat_map(bytes).collect() }
    };
    vec![
        of("a.weight", Dtype::F32, &[130, 64], |value| value.to_le_bytes().to_vec()),
        of("b.weight", Dtype::F64, &[3, 7, 96], |value| (f64::from(value) * 1.1).to_le_bytes().to_vec()),
        of("c.weight", Dtype::F16, &[9, 32], |value| half::f16::from_f32(value).to_le_bytes().to_vec()),
        of("d.weight", Dtype::BF16, &[5, 128], |value| half::bf16::from_f32(value).to_le_bytes().to_vec()),
        Tensor::new("empty.weight", Dtype::F32, &[0, 64]),
        Tensor::new("e.bias", Dtype::I16, &[11]),
    ]
}

/// Shards of 1 kB.
fn small(options: Options) -> Options {
    Options { shard_size: 1e-6, ..options }
}

#[test]
fn the_bytes_are_those_of_the_codec() {
    let place = Place::new();
    let (source, tensors) = (place.at("m.safetensors"), matrices());
    write(&source, &tensors);
    for rule in RULES {
        let output = place.at(&format!("{rule:?}"));
        let options = Options { scale_rule: Some(rule), ..small(quantize(&["*"])) };
        let report = convert_as(&source, &output, &options, VERIFY).unwrap();
        let found = contents(&output);
        assert_eq!(found.len(), 11);
        for tensor in tensors.iter().filter(|tensor| tensor.name.ends_with("weight")) {
            let groups = tensor.shape.iter().product::<usize>() / MX_BLOCK_SIZE;
            let (mut blocks, mut scales) = (vec![0; 16 * groups], vec![0; groups]);
            mxfp4::encode(tensor.dtype, rule, &tensor.data, &mut blocks, &mut scales);
            assert_eq!(found[&format!("{}_blocks", tensor.name)].2, blocks, "{} {rule:?}", tensor.name);
            assert_eq!(found[&format!("{}_scales", tensor.name)].2, scales, "{} {rule:?}", tensor.name);
            let mut sums = ErrorSums::default();
            sums.add(tensor.dtype, &tensor.data, &blocks, &scales);
            let told = tensor_info(&read_manifest(&output), &format!("{}_blocks", tensor.name)).quantization;
            assert_eq!(told, Some(sums.error()));
            let (_, reported) = report.quantization.0.iter().find(|(name, _)| *name == tensor.name).unwrap();
            assert_eq!(Some(reported.error), told);
            #[expect(clippy::cast_precision_loss, reason = "small integers")]
            let compression = tensor.dtype.bitsize() as f64 * 32.0 / 8.0 / 17.0;
            assert_eq!(reported.compression, compression);
        }
        assert_eq!(report.quantization.0.len(), 5);
        assert!(verify(&output, Some(&source)).unwrap().ok);
        let manifest = read_manifest(&output);
        assert!(tensor_info(&manifest, "a.weight_blocks").files.len() > 1, "split");
        assert_eq!(tensor_info(&manifest, "e.bias").quantization, None);
        assert_eq!(manifest.options.scale_rule, Some(rule));
    }
}

#[test]
fn neither_workers_nor_buffers_nor_a_resume_change_a_byte() {
    let place = Place::new();
    let source = place.at("m.safetensors");
    let mut tensors = matrices();
    // More than one chunk of the least memory.
    tensors.push(Tensor::f32("large.weight", &[1000, 64], values(64000)));
    write(&source, &tensors);
    let options = quantize(&["*"]);
    convert(&source, &place.out(), &options).unwrap();
    let expected = read_tree(&place.out());
    for (workers, max_memory) in [(1, 128 << 10), (1, 256_000_000), (2, 1_000_000), (8, 1 << 20), (8, 256_000_000)] {
        let output = place.at(&format!("{workers}-{max_memory}"));
        let resources = Resources { workers, max_memory };
        tensorport::convert(&source, &output, &options, Mode::default(), resources, &mut progress::ignore).unwrap();
        assert_same_tree(&read_tree(&output), &expected);
    }
    // A finished tree is compared with the source, and its report has the same errors.
    let resume = Mode { resume: true, ..Mode::default() };
    let report = convert_as(&source, &place.out(), &options, resume).unwrap();
    assert_eq!(report.quantization.0.len(), 6);
    let explicit = Options { scale_rule: Some(ScaleRule::Floor), ..options };
    assert_eq!(convert_as(&source, &place.out(), &explicit, resume).unwrap().quantization, report.quantization);
    assert_same_tree(&read_tree(&place.out()), &expected);
}

/// Error of values against what the codes mean, with plain sums.
fn plain_error(values: &[f64], blocks: &[u8], scales: &[u8]) -> QuantizationError {
    let codes = blocks.iter().flat_map(|byte| [byte & 0xf, byte >> 4]);
    let decoded =
        codes.zip(scales.iter().flat_map(|&scale| [scale; 32])).map(|(code, scale)| mxfp4::decode_one(code, scale));
    let pairs: Vec<_> = values.iter().copied().zip(decoded).collect();
    let finite: Vec<_> =
        pairs.chunks(32).filter(|block| block.iter().all(|(value, _)| value.is_finite())).flatten().collect();
    let signal: f64 = finite.iter().map(|(value, _)| value * value).sum();
    let noise: f64 = finite.iter().map(|(value, decoded)| (value - decoded).powi(2)).sum();
    #[expect(clippy::cast_precision_loss, reason = "small integers")]
    let count = finite.len() as f64;
    QuantizationError {
        mse: Some(noise / count).filter(|mse| mse.is_finite()),
        sqnr_db: (noise > 0.0).then(|| 10.0 * (signal / noise).log10()),
        max_error: finite.iter().map(|(value, decoded)| (value - decoded).abs()).fold(0.0, f64::max),
        nonfinite: values.iter().filter(|value| !value.is_finite()).count() as u64,
    }
}

fn error_of(values: &[f64]) -> (QuantizationError, QuantizationError) {
    let src: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let groups = values.len() / 32;
    let (mut blocks, mut scales) = (vec![0; 16 * groups], vec![0; groups]);
    mxfp4::encode(Dtype::F64, ScaleRule::Floor, &src, &mut blocks, &mut scales);
    let mut sums = ErrorSums::default();
    sums.add(Dtype::F64, &src, &blocks, &scales);
    (sums.error(), plain_error(values, &blocks, &scales))
}

fn assert_close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{found} {expected}");
}

proptest! {
    #[test]
    fn errors_are_those_of_plain_sums(
        values in (1usize..6).prop_flat_map(|groups| prop::collection::vec(
            prop_oneof![20 => -1e3..1e3f64, 3 => -1e-3..1e-3f64, 1 => Just(0.0), 1 => Just(-0.0), 1 => -1e30..1e30f64],
            32 * groups,
        )),
        special in prop::option::of((any::<prop::sample::Index>(), prop::sample::select(vec![f64::NAN, f64::INFINITY]))),
    ) {
        let mut values = values;
        if let Some((index, value)) = special {
            let place = index.index(values.len());
            values[place] = value;
        }
        let (found, expected) = error_of(&values);
        prop_assert_eq!((found.max_error, found.nonfinite), (expected.max_error, expected.nonfinite));
        prop_assert_eq!((found.mse.is_some(), found.sqnr_db.is_some()), (expected.mse.is_some(), expected.sqnr_db.is_some()));
        if let (Some(found), Some(expected)) = (found.mse, expected.mse) {
            prop_assert!((found - expected).abs() <= 1e-12 * expected, "{} {}", found, expected);
        }
        if let (Some(found), Some(expected)) = (found.sqnr_db, expected.sqnr_db) {
            assert_close(found, expected);
        }
        prop_assert!(found.is_possible(values.len() as u64));
    }
}

#[test]
fn every_level_of_vectors_finds_the_same_errors() {
    for tensor in matrices().iter().filter(|tensor| tensor.name.ends_with("weight")) {
        let groups = tensor.shape.iter().product::<usize>() / MX_BLOCK_SIZE;
        let (mut blocks, mut scales) = (vec![0; 16 * groups], vec![0; groups]);
        mxfp4::encode(tensor.dtype, ScaleRule::Floor, &tensor.data, &mut blocks, &mut scales);
        let sums = Level::all().into_iter().map(|level| {
            let mut sums = ErrorSums::default();
            sums.add_with(level, tensor.dtype, &tensor.data, &blocks, &scales);
            sums
        });
        let sums: Vec<_> = sums.collect();
        assert!(sums.iter().all(|other| *other == sums[0]), "{}", tensor.name);
    }
}

#[test]
fn errors_beyond_the_squares_of_floats_are_still_ratios() {
    // Decoded, each is 6 times 2^125, next to nothing of it: the error is the value.
    let (found, _) = error_of(&[1e300; 32]);
    assert_eq!((found.mse, found.max_error), (None, 1e300));
    assert_close(found.sqnr_db.unwrap(), 0.0);
    // All become zero.
    let (found, _) = error_of(&[1e-200; 32]);
    assert_eq!((found.mse, found.max_error), (Some(0.0), 1e-200));
    assert_eq!(found.sqnr_db, Some(0.0));
    let (found, expected) = error_of(&[f64::MIN_POSITIVE / 4.0; 32]);
    assert_eq!(found.max_error, expected.max_error);
    assert_eq!(found.sqnr_db, Some(0.0));
}

#[test]
fn an_error_of_nothing_is_told_apart_from_no_error() {
    let lossless: Vec<f64> = (0..32).map(|i| mxfp4::decode_one(i % 16, 130)).collect();
    let (found, _) = error_of(&lossless);
    assert_eq!(found, QuantizationError { mse: Some(0.0), sqnr_db: None, max_error: 0.0, nonfinite: 0 });
    let (found, _) = error_of(&[f64::NAN; 64]);
    assert_eq!(found, QuantizationError { mse: None, sqnr_db: None, max_error: 0.0, nonfinite: 64 });
    let (found, _) = error_of(&[]);
    assert_eq!(found, QuantizationError { mse: None, sqnr_db: None, max_error: 0.0, nonfinite: 0 });
    let (found, _) = error_of(&[0.0; 32]);
    assert_eq!((found.mse, found.sqnr_db), (Some(0.0), None));
}

#[test]
fn impossible_errors_are_found_without_the_source() {
    let possible = QuantizationError { mse: Some(0.25), sqnr_db: Some(18.0), max_error: 1.0, nonfinite: 3 };
    assert!(possible.is_possible(64));
    for impossible in [
        QuantizationError { mse: Some(1.1), ..possible },
        QuantizationError { mse: Some(-0.25), ..possible },
        QuantizationError { max_error: -1.0, ..possible },
        QuantizationError { max_error: 0.0, ..possible },
        QuantizationError { nonfinite: 65, ..possible },
        QuantizationError { mse: Some(0.0), max_error: 0.0, ..possible },
    ] {
        assert!(!impossible.is_possible(64), "{impossible:?}");
    }
}

#[test]
fn a_quantized_tree_and_its_source_vouch_for_each_other() {
    let place = Place::new();
    let source = place.at("m.safetensors");
    let mut tensors = matrices();
    write(&source, &tensors);
    convert(&source, &place.out(), &small(quantize(&["*"]))).unwrap();
    assert!(verify(&place.out(), Some(&source)).unwrap().ok);
    // The largest value of its block: both its code and its error change.
    let place_of_value = tensors[0].data.len() - 4;
    tensors[0].data[place_of_value..].copy_from_slice(&1e9f32.to_le_bytes());
    write(&source, &tensors);
    let report = verify(&place.out(), Some(&source)).unwrap();
    let named: Vec<_> = report.failures.iter().filter_map(|failure| failure.tensor.as_deref()).collect();
    assert!(named.contains(&"a.weight_blocks") && named.contains(&"a.weight_scales"), "{report}");
    assert!(report.to_string().contains("\"mse\""), "{report}");
}
