//! Formats: whatever the tensors are, files are tiled without a hole or an overlap, and every byte is held once.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::checkpoint::TensorSpec;
use tensorport::dtype::{self, DTYPES};
use tensorport::float8::BlockSize;
use tensorport::options::{Format, Mxfp4Mode, Options, Precision};
use tensorport::ordered_map::OrderedMap;
use tensorport::output::{Content, FileLayout, Member, Tensor};
use tensorport::plan::{Plan, plan};
use tensorport::{Error, Result};

use crate::fixtures::spec;

const FORMATS: [Format; 5] =
    [Format::NumpyDirect, Format::Msgpack, Format::JaxPickle, Format::Safetensors, Format::Orbax];

/// Far beyond any disk: nothing here has data.
const LARGEST_BYTES: u64 = 1 << 46;

fn metadata() -> OrderedMap<String> {
    OrderedMap(vec![("format".into(), "pt".into())])
}

fn planned(tensors: &[TensorSpec], options: &Options) -> Result<Plan> {
    plan(tensors, |_| Path::new("m.safetensors"), &metadata(), BlockSize::default(), options)
}

#[expect(clippy::cast_precision_loss, reason = "shards of any size will do")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Up to ten tensors of any dtype, from scalars to petabytes, and perhaps a flat MXFP4 pair.
fn any_tensors() -> impl Strategy<Value = Vec<TensorSpec>> {
    let tensor = (0..DTYPES.len(), proptest::collection::vec(0..40u64, 0..4), 0..40u32, 1..60usize);
    let any = (proptest::collection::vec(tensor, 1..10), 0..3000u64);
    any.prop_map(|(tensors, blocks)| {
        let mut specs = Vec::new();
        for (number, (row, mut shape, doublings, length)) in tensors.into_iter().enumerate() {
            let dtype = DTYPES[row].dtype;
            if let Some(rows) = shape.first_mut() {
                *rows <<= doublings;
            }
            if dtype::checked_nbytes(dtype, &shape).is_some_and(|nbytes| nbytes < LARGEST_BYTES) {
                specs.push(spec(&format!("{}.{number}", "x".repeat(length)), dtype, &shape));
            }
        }
        if blocks > 0 {
            specs.push(spec("flat_blocks", Dtype::U8, &[blocks, 16]));
            specs.push(spec("flat_scales", Dtype::U8, &[blocks]));
        }
        specs
    })
}

fn any_options() -> impl Strategy<Value = Options> {
    let modes = prop_oneof![Just(Mxfp4Mode::Keep), Just(Mxfp4Mode::Dequantize)];
    let precisions = prop_oneof![Just(Precision::Source), Just(Precision::Float32), Just(Precision::Float16)];
    (modes, precisions, 0..42u32, 1..1000u64).prop_map(|(mxfp4, precision, power, more)| Options {
        mxfp4,
        precision,
        shard_size: gigabytes((1 << power) + more),
        ..Options::default()
    })
}

/// Extents and frames in the order of the file.
fn spans(layout: &FileLayout) -> Vec<Range<u64>> {
    let extents =
        layout.extents.iter().map(|extent| extent.offset..extent.offset + extent.data.end - extent.data.start);
    let frames = layout.frames.iter().map(|frame| match &frame.content {
        Content::Bytes(bytes) => frame.offset..frame.offset + bytes.len() as u64,
        Content::Zeros(count) => frame.offset..frame.offset + count,
    });
    let mut spans: Vec<_> = extents.chain(frames).filter(|span| !span.is_empty()).collect();
    spans.sort_by_key(|span| span.start);
    spans
}

fn check_tiles(layout: &FileLayout) {
    let mut end = 0;
    for span in spans(layout) {
        assert_eq!(span.start, end, "a hole or an overlap");
        end = span.end;
    }
    assert_eq!(end, layout.nbytes);
}

/// Where a format promises that data begins.
fn check_alignment(format: Format, tensor: &Tensor<'_>, offset: u64) {
    match format {
        Format::NumpyDirect | Format::JaxPickle => assert_eq!(offset % 64, 0),
        Format::Safetensors if tensor.nbytes.is_multiple_of(64) => assert_eq!(offset % 64, 0),
        Format::Safetensors => assert_eq!(offset % (tensor.dtype.bitsize() as u64).div_ceil(8), 0),
        Format::Orbax => assert_eq!(offset, 0),
        Format::Msgpack => {}
    }
}

fn check_plan(plan: &Plan, format: Format, shard_bytes: u64) {
    let mut ends = vec![0; plan.tensors.len()];
    let mut places = vec![0; plan.tensors.len()];
    let mut paths = HashSet::new();
    for (number, file) in plan.files.iter().enumerate() {
        assert!(paths.insert(file.path().to_ascii_lowercase()), "{} twice", file.path());
        let layout = plan.file_layout(number);
        check_tiles(&layout);
        assert_eq!(layout.nbytes, file.nbytes);
        let data_nbytes: u64 = layout.extents.iter().map(|extent| extent.data.end - extent.data.start).sum();
        assert_eq!(data_nbytes, file.data_nbytes);
        let filled = layout.extents.iter().filter(|extent| !extent.data.is_empty()).map(|extent| extent.member);
        assert!(data_nbytes <= shard_bytes || filled.collect::<HashSet<_>>().len() == 1);
        let mut last = 0;
        for extent in &layout.extents {
            assert!(last <= extent.member, "members out of order");
            last = extent.member;
            let index = file.placed.tensors.start + extent.member;
            let tensor = &plan.tensors[index];
            assert_eq!(extent.data.start, ends[index], "a hole or an overlap in {}", tensor.name);
            ends[index] = extent.data.end;
            let piece = &tensor.pieces[places[index]];
            places[index] += 1;
            let unit_bytes = tensor.transform.output_unit_bytes();
            let data = piece.units.start * unit_bytes..piece.units.end * unit_bytes;
            assert_eq!((piece.file, piece.offset, data), (number, extent.offset, extent.data.clone()));
            check_alignment(format, &tensor.view(), extent.offset);
        }
    }
    for ((tensor, end), pieces) in plan.tensors.iter().zip(ends).zip(places) {
        assert_eq!((end, pieces), (tensor.nbytes, tensor.pieces.len()), "{}", tensor.name);
        assert!(pieces > 0);
    }
    let in_shards: Vec<usize> = plan.shards.iter().flat_map(|(_, files)| files.clone()).collect();
    assert!(in_shards.into_iter().eq(0..plan.files.len()), "each file in one shard");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn files_are_tiled_and_hold_every_byte_once(tensors in any_tensors(), options in any_options()) {
        for format in FORMATS {
            let options = Options { format, ..options.clone() };
            let tensors: Vec<_> =
                tensors.iter().filter(|tensor| format != Format::Orbax || tensor.nbytes > 0).cloned().collect();
            match planned(&tensors, &options) {
                Ok(plan) => check_plan(&plan, format, options.shard_bytes().unwrap()),
                // Too many parts, in the formats that have some.
                Err(Error::Argument { name: "shard_size", .. })
                    if matches!(format, Format::NumpyDirect | Format::Orbax) => {}
                Err(fault) => panic!("{fault}"),
            }
        }
    }
}

#[test]
fn no_format_takes_what_it_does_not_make() {
    let shape = [6, 5];
    let tensor = |name| Tensor { name, dtype: Dtype::F32, shape: &shape, nbytes: 120 };
    let member = |name, data: Range<u64>, part_bytes| Member { tensor: tensor(name), data, part_bytes };
    let file = |format: Format, members: &[Member<'_>]| format.layout().file(members, &metadata());
    for format in FORMATS {
        file(format, &[member("a", 0..120, 120)]).unwrap();
        let several = file(format, &[member("a", 0..120, 120), member("b", 0..120, 120)]);
        assert_eq!(several.is_ok(), !matches!(format, Format::NumpyDirect | Format::Orbax), "{format:?}");
        for data in [0..30, 30..120] {
            let fault = file(format, &[member("a", data, 30)]).unwrap_err();
            assert!(fault.contains("rows") || fault.contains("whole ones"), "{fault}");
        }
    }
    // Rows of 20 bytes: the last chunk is padded where the others are larger, and no other is.
    for (data, part_bytes, fits) in [
        (0..40, 40, true),
        (80..120, 40, true),
        (0..80, 80, true),
        (80..120, 80, true),
        (0..40, 80, false),
        (40..120, 80, false),
        (20..60, 40, false),
        (120..120, 40, false),
        (0..0, 0, false),
        (0..120, 160, true),
    ] {
        let found = file(Format::Orbax, &[member("a", data.clone(), part_bytes)]);
        assert_eq!(found.is_ok(), fits, "{data:?} {part_bytes}");
        if let Ok(layout) = found {
            assert_eq!(layout.nbytes, part_bytes);
        }
    }
}

/// flax cuts arrays at 2^30 bytes, whatever their shape.
#[test]
fn msgpack_has_chunks_of_a_gigabyte() {
    let chunk = 1u64 << 30;
    for nbytes in [chunk - 2, chunk, chunk + 2, 2 * chunk, 5 * chunk - 6] {
        let shape = [nbytes / 2];
        let tensor = Tensor { name: "a", dtype: Dtype::BF16, shape: &shape, nbytes };
        let members = [Member { tensor, data: 0..nbytes, part_bytes: nbytes }];
        let layout = Format::Msgpack.layout().file(&members, &metadata()).unwrap();
        check_tiles(&layout);
        let ends: Vec<u64> = layout.extents.iter().map(|extent| extent.data.end).collect();
        let expected: Vec<u64> = (1..=nbytes.div_ceil(chunk)).map(|number| (number * chunk).min(nbytes)).collect();
        assert_eq!(ends, expected);
    }
}

#[test]
fn orbax_has_chunks_of_a_quarter_of_a_gigabyte_that_differ_by_a_row_of_each_at_most() {
    for (rows, row_elements) in
        [(1_000_003, 1024), (7, 50_000_000), (3, 200_000_000), (2_000_000_011, 1), (128, 3 << 20)]
    {
        let shape = [rows, row_elements];
        let options = Options { format: Format::Orbax, shard_size: 100.0, ..Options::default() };
        let plan = planned(&[spec("a", Dtype::BF16, &shape)], &options).unwrap();
        let row_bytes = 2 * row_elements;
        for (number, file) in plan.files.iter().enumerate() {
            let layout = plan.file_layout(number);
            check_tiles(&layout);
            assert!(file.nbytes <= (1 << 28).max(row_bytes));
            assert_eq!(file.nbytes, plan.files[0].nbytes);
            let padding = file.nbytes - file.data_nbytes;
            assert!(padding < plan.files.len() as u64 * row_bytes && (padding == 0 || number + 1 == plan.files.len()));
        }
    }
}
