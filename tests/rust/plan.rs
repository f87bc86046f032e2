//! Plans: pure, so every rule of splitting, filling and selecting is checked without a file.

use std::path::Path;

use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::cast::Target;
use tensorport::checkpoint::TensorSpec;
use tensorport::dtype::{self, DTYPES};
use tensorport::float8::BlockSize;
use tensorport::options::{Mxfp4Mode, Options, Precision};
use tensorport::ordered_map::OrderedMap;
use tensorport::output::{Content, Frame};
use tensorport::plan::{Plan, plan};
use tensorport::transform::Transform;
use tensorport::{Error, Result};

use crate::fixtures::spec;

fn planned(tensors: &[TensorSpec], options: &Options) -> Result<Plan> {
    plan(tensors, |_| Path::new("m.safetensors"), &OrderedMap::default(), BlockSize::default(), options)
}

/// Options with a shard size in bytes.
fn sized(shard_bytes: u32) -> Options {
    Options { shard_size: f64::from(shard_bytes) / 1e9, ..Options::default() }
}

fn dequantize(shard_bytes: u32) -> Options {
    Options { mxfp4: Mxfp4Mode::Dequantize, ..sized(shard_bytes) }
}

fn globs(patterns: &[&str]) -> Vec<String> {
    patterns.iter().map(|&pattern| pattern.to_owned()).collect()
}

/// Path and data bytes of every file.
fn files(plan: &Plan) -> Vec<(&str, u64)> {
    plan.files.iter().map(|file| (file.path(), file.data_nbytes)).collect()
}

fn names(plan: &Plan) -> Vec<&str> {
    plan.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
}

/// What every plan has to keep: pieces tile their tensors at whole rows, files hold one piece, shards hold the files.
fn check_invariants(plan: &Plan, limit: u64) {
    let mut owners = vec![0; plan.files.len()];
    for tensor in &plan.tensors {
        let unit_bytes = tensor.transform.output_unit_bytes();
        assert_eq!(tensor.nbytes, dtype::checked_nbytes(tensor.dtype, &tensor.shape).unwrap(), "{}", tensor.name);
        let rows = tensor.shape.first().copied().unwrap_or(1);
        let mut end = 0;
        for piece in &tensor.pieces {
            owners[piece.file] += 1;
            assert_eq!(piece.units.start, end, "{} has a hole or an overlap", tensor.name);
            end = piece.units.end;
            let nbytes = (piece.units.end - piece.units.start) * unit_bytes;
            let file = &plan.files[piece.file];
            assert_eq!(piece.offset + nbytes, file.nbytes);
            let layout = plan.file_layout(piece.file);
            let [Frame { offset: 0, content: Content::Bytes(header) }] = layout.frames.as_slice() else {
                panic!("{:?}", layout.frames)
            };
            assert_eq!(header.len() as u64, piece.offset);
            assert_eq!(piece.offset % 64, 0);
            if tensor.pieces.len() > 1 {
                assert!(nbytes > 0, "{} has an empty part", tensor.name);
                // Rows that fill whole bytes and whole units: at most 8 for packed dtypes, 32 for flat MXFP4.
                let step = (1..=32).find(|step| {
                    let bits = u128::from(tensor.nbytes) * 8 * step / u128::from(rows);
                    bits % (u128::from(unit_bytes) * 8) == 0
                });
                let step_bytes = tensor.nbytes * u64::try_from(step.unwrap()).unwrap() / rows;
                assert!(
                    piece.units.end * unit_bytes % step_bytes == 0 || piece.units.end * unit_bytes == tensor.nbytes
                );
                assert!(nbytes <= limit || nbytes == step_bytes, "{}: {nbytes} over {limit}", tensor.name);
                let start = format!("tensor {:?}: one row", tensor.name);
                let warned = plan.warnings.iter().any(|warning| warning.starts_with(&start));
                assert_eq!(warned, step_bytes > limit, "{:?}", plan.warnings);
            }
        }
        assert_eq!(end * unit_bytes, tensor.nbytes, "{} is not whole", tensor.name);
    }
    assert!(owners.iter().all(|&count| count == 1));
    let mut next = 0;
    for (number, (name, range)) in plan.shards.iter().enumerate() {
        assert_eq!((name, range.start), (&format!("shard_{number:03}"), next));
        assert!(!range.is_empty());
        next = range.end;
        let sizes: Vec<u64> = files(plan)[range.clone()].iter().map(|(_, nbytes)| *nbytes).collect();
        let large = sizes.iter().filter(|&&nbytes| nbytes > 0).count();
        assert!(sizes.iter().sum::<u64>() <= limit || large == 1, "{name} holds {sizes:?}, limit {limit}");
        assert!(plan.files[range.clone()].iter().all(|file| file.path().starts_with(&format!("{name}/"))));
    }
    assert_eq!(next, plan.files.len());
}

#[test]
fn a_tensor_of_exactly_the_limit_is_not_split_and_one_byte_less_splits_it() {
    let tensors = [spec("a.w", Dtype::F32, &[5, 3])];
    assert_eq!(files(&planned(&tensors, &sized(60)).unwrap()), [("shard_000/a_w.npy", 60)]);
    let split = planned(&tensors, &sized(59)).unwrap();
    assert_eq!(files(&split), [("shard_000/a_w.part000.npy", 48), ("shard_001/a_w.part001.npy", 12)]);
    assert!(split.warnings.is_empty());
    check_invariants(&split, 59);
}

#[test]
fn a_row_above_the_limit_gets_its_own_file_and_a_warning() {
    let plan = planned(&[spec("a", Dtype::F32, &[3, 7]), spec("b", Dtype::U8, &[2])], &sized(27)).unwrap();
    assert_eq!(files(&plan).iter().map(|file| file.1).collect::<Vec<_>>(), [28, 28, 28, 2]);
    assert_eq!(plan.shards.len(), 4);
    assert!(plan.warnings.len() == 1 && plan.warnings[0].contains("\"a\"") && plan.warnings[0].contains("28"));
    check_invariants(&plan, 27);
    assert!(planned(&[spec("a", Dtype::F32, &[3, 7])], &sized(28)).unwrap().warnings.is_empty());
}

#[test]
fn one_row_or_no_axis_is_never_split() {
    for shape in [&[][..], &[1, 9]] {
        let plan = planned(&[spec("a", Dtype::F64, shape)], &sized(3)).unwrap();
        assert_eq!((plan.files.len(), plan.warnings.len()), (1, 1), "{shape:?}");
    }
}

#[test]
fn shards_fill_in_order_up_to_the_limit() {
    let tensors: Vec<_> = [4, 5, 1, 9, 2, 10, 0].iter().map(|&n| spec(&format!("t{n}"), Dtype::U8, &[n])).collect();
    let plan = planned(&tensors, &sized(10)).unwrap();
    let shards: Vec<_> = plan.shards.iter().map(|(_, range)| range.clone()).collect();
    // 4 + 5 + 1, 9, 2, 10 + 0.
    assert_eq!(shards, [0..3, 3..4, 4..5, 5..7]);
    check_invariants(&plan, 10);
}

#[test]
fn empty_tensors_have_files_and_an_empty_checkpoint_has_none() {
    let plan = planned(&[spec("e", Dtype::F32, &[3, 0, 2]), spec("s", Dtype::I16, &[])], &sized(100)).unwrap();
    assert_eq!(files(&plan), [("shard_000/e.npy", 0), ("shard_000/s.npy", 2)]);
    let empty = planned(&[], &Options::default()).unwrap();
    assert!(empty.files.is_empty() && empty.shards.is_empty());
}

#[test]
fn packed_tensors_split_at_whole_bytes() {
    // A row of F4 [.., 3] is 12 bits: two rows make three bytes. A row of F6 [.., 3] is 18 bits: four make nine.
    let plan = planned(&[spec("f4", Dtype::F4, &[10, 3])], &sized(7)).unwrap();
    assert_eq!(files(&plan).iter().map(|file| file.1).collect::<Vec<_>>(), [6, 6, 3]);
    let plan = planned(&[spec("f6", Dtype::F6_E3M2, &[12, 3])], &sized(20)).unwrap();
    assert_eq!(files(&plan).iter().map(|file| file.1).collect::<Vec<_>>(), [18, 9]);
    // Two rows do not fit: the least whole step is taken, with a warning.
    let plan = planned(&[spec("f4", Dtype::F4, &[4, 3])], &sized(2)).unwrap();
    assert_eq!(files(&plan).iter().map(|file| file.1).collect::<Vec<_>>(), [3, 3]);
    assert_eq!(plan.warnings.len(), 1);
}

#[test]
fn a_flat_mxfp4_tensor_splits_at_blocks() {
    let tensors = [spec("x_blocks", Dtype::U8, &[5, 16]), spec("x_scales", Dtype::U8, &[5])];
    // 160 bfloat16 values, 64 bytes a block; 150 bytes hold two blocks.
    let plan = planned(&tensors, &dequantize(150)).unwrap();
    assert_eq!((names(&plan), &plan.tensors[0].shape[..]), (vec!["x"], &[160][..]));
    assert_eq!(files(&plan).iter().map(|file| file.1).collect::<Vec<_>>(), [128, 128, 64]);
    assert_eq!(plan.tensors[0].pieces.iter().map(|piece| piece.units.clone()).collect::<Vec<_>>(), [0..2, 2..4, 4..5]);
    check_invariants(&plan, 150);
}

#[test]
fn precision_casts_the_four_float_dtypes_and_nothing_else() {
    for row in &DTYPES {
        let tensors = [spec("a", row.dtype, &[4, 3])];
        for (precision, target) in
            [(Precision::Float16, Target::F16), (Precision::Bfloat16, Target::Bf16), (Precision::Float32, Target::F32)]
        {
            let plan = planned(&tensors, &Options { precision, ..Options::default() }).unwrap();
            let is_cast =
                [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16].contains(&row.dtype) && row.dtype != target.dtype();
            let expected = if is_cast { Transform::Cast { from: row.dtype, to: target } } else { Transform::Copy };
            assert_eq!(plan.tensors[0].transform, expected, "{}", row.name);
            assert_eq!(plan.tensors[0].dtype, if is_cast { target.dtype() } else { row.dtype });
            assert_eq!(plan.tensors[0].source_dtype, row.name);
            check_invariants(&plan, 1_800_000_000);
        }
    }
}

#[test]
fn an_empty_tensor_whose_cast_numpy_cannot_hold_is_refused() {
    // 0 x 2^61 float16 is legal in NumPy; as float32 its other dimensions exceed 2^63 bytes, and no reader opens it.
    let tensors = [spec("a", Dtype::F16, &[0, 1 << 61])];
    let options = Options { precision: Precision::Float32, ..Options::default() };
    assert!(matches!(planned(&tensors, &options), Err(Error::MalformedTensor { .. } | Error::Mapping { .. })));
}

fn mixed() -> Vec<TensorSpec> {
    vec![
        spec("model.a_blocks", Dtype::U8, &[3, 5, 2, 16]),
        spec("model.a_scales", Dtype::U8, &[3, 5, 2]),
        spec("model.norm", Dtype::BF16, &[7]),
        spec("lm_head", Dtype::F32, &[11, 13]),
    ]
}

#[test]
fn globs_see_decoded_names_after_dequantize_and_stored_names_under_keep() {
    let with = |mxfp4, include: &[&str], exclude: &[&str]| {
        let options =
            Options { mxfp4, include: Some(globs(include)), exclude: Some(globs(exclude)), ..Options::default() };
        planned(&mixed(), &options).map(|plan| names(&plan).into_iter().map(str::to_owned).collect::<Vec<_>>())
    };
    assert_eq!(with(Mxfp4Mode::Dequantize, &["model.a"], &[]).unwrap(), ["model.a"]);
    assert_eq!(with(Mxfp4Mode::Dequantize, &["model.*"], &["*norm"]).unwrap(), ["model.a"]);
    assert_eq!(with(Mxfp4Mode::Dequantize, &["*"], &["model.a"]).unwrap(), ["model.norm", "lm_head"]);
    assert_eq!(with(Mxfp4Mode::Keep, &["model.a*"], &[]).unwrap(), ["model.a_blocks", "model.a_scales"]);
    assert_eq!(with(Mxfp4Mode::Keep, &["*_blocks"], &[]).unwrap(), ["model.a_blocks"]);
    for (mode, pattern) in [(Mxfp4Mode::Keep, "model.a"), (Mxfp4Mode::Dequantize, "model.a_blocks")] {
        assert!(matches!(with(mode, &[pattern], &[]), Err(Error::Mapping { .. })), "{pattern}");
    }
}

#[test]
fn totals_count_what_the_output_holds() {
    let keep = planned(&mixed(), &Options::default()).unwrap();
    assert_eq!((keep.total_parameters, keep.stored_elements), (960 + 7 + 143, 960 + 7 + 143 + 30));
    let decoded = planned(&mixed(), &dequantize(1_000_000)).unwrap();
    assert_eq!((decoded.total_parameters, decoded.stored_elements), (960 + 7 + 143, 960 + 7 + 143));
    assert_eq!(decoded.tensors[0].dtype, Dtype::BF16);
    assert_eq!(decoded.tensors[0].source_dtype, "mxfp4");
}

#[test]
fn dequantize_refuses_misfits_unless_they_are_left_out() {
    let tensors = [spec("x_blocks", Dtype::U8, &[3, 2, 16]), spec("y", Dtype::U8, &[5])];
    let message = planned(&tensors, &dequantize(1000)).unwrap_err().to_string();
    assert!(message.contains("\"x_blocks\"") && message.contains("\"x_scales\""), "{message}");
    assert_eq!(names(&planned(&tensors, &sized(1000)).unwrap()), ["x_blocks", "y"]);
    let excluding = Options { exclude: Some(globs(&["x_*"])), ..dequantize(1000) };
    assert_eq!(names(&planned(&tensors, &excluding).unwrap()), ["y"]);
}

#[test]
fn a_decoded_name_that_exists_already_is_refused() {
    let mut tensors = mixed();
    tensors.push(spec("model.a", Dtype::F32, &[2]));
    let fault = planned(&tensors, &dequantize(1_000_000)).unwrap_err();
    assert!(matches!(&fault, Error::MalformedTensor { tensor, .. } if tensor == "model.a"), "{fault}");
    let twice = [
        spec("x_blocks", Dtype::U8, &[3, 16]),
        spec("x_scales", Dtype::U8, &[3]),
        spec("x.blocks", Dtype::U8, &[2, 16]),
        spec("x.scales", Dtype::U8, &[2]),
    ];
    assert!(matches!(planned(&twice, &dequantize(1000)), Err(Error::MalformedTensor { tensor, .. }) if tensor == "x"));
}

#[test]
fn shard_sizes_outside_their_range_are_bad_arguments() {
    for shard_size in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-10, 1e10] {
        let options = Options { shard_size, ..Options::default() };
        assert!(matches!(planned(&mixed(), &options), Err(Error::Argument { name: "shard_size", .. })), "{shard_size}");
    }
    let flood = planned(&[spec("a", Dtype::U8, &[1 << 40])], &sized(1));
    assert!(matches!(flood, Err(Error::Argument { name: "shard_size", .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_tile_their_tensors_and_stay_within_the_limit(
        rows in prop::collection::vec((0..DTYPES.len(), prop::collection::vec(prop_oneof![9 => 0u64..14, 1 => Just(64)], 0..4)), 1..9),
        pair in prop::option::of((1u64..7, 1u64..5, any::<bool>())),
        shard_bytes in 1u32..900,
        precision in prop::sample::select(vec![Precision::Source, Precision::Float16, Precision::Float32]),
        mxfp4 in prop::sample::select(vec![Mxfp4Mode::Keep, Mxfp4Mode::Dequantize, Mxfp4Mode::Quantize]),
    ) {
        let mut tensors: Vec<_> = rows
            .into_iter()
            .enumerate()
            .filter_map(|(number, (row, shape))| {
                dtype::checked_nbytes(DTYPES[row].dtype, &shape)?;
                Some(spec(&format!("t.{number}"), DTYPES[row].dtype, &shape))
            })
            .collect();
        if let Some((outer, groups, is_flat)) = pair {
            let shape = if is_flat { vec![groups] } else { vec![outer, groups] };
            tensors.insert(0, spec("p_scales", Dtype::U8, &shape));
            tensors.push(spec("p_blocks", Dtype::U8, &[&shape[..], &[16]].concat()));
        }
        let mut options = Options { precision, mxfp4, ..sized(shard_bytes) };
        if mxfp4 == Mxfp4Mode::Quantize {
            options.quantize = Some(globs(&["*"]));
            tensors.push(spec("q", Dtype::F32, &[3, 64]));
        }
        let plan = planned(&tensors, &options).unwrap();
        check_invariants(&plan, u64::from(shard_bytes));
        prop_assert_eq!(&plan, &planned(&tensors, &options).unwrap());
    }
}
