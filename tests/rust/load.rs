//! Regions read into memory: every region of every tensor is what slicing the whole tensor gives.

use std::ops::{ControlFlow, Range};

use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::arena::ArenaPool;
use tensorport::cast::{self, OnOverflow, Target};
use tensorport::load::{Conversion, Loaded, Request, load};
use tensorport::mxfp4;
use tensorport::progress;
use tensorport::region::{self, Region};
use tensorport::work::Resources;
use tensorport::{Checkpoint, Error};

use crate::fixtures::{Place, Tensor, convert, small_shards, write};

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn workers(workers: usize) -> Resources {
    Resources { workers, ..Resources::default() }
}

/// Bytes of a region of a row-major tensor, element by element.
fn slice(shape: &[u64], element_bytes: usize, data: &[u8], region: &[Range<u64>]) -> Vec<u8> {
    let mut offsets = vec![0u64];
    for (dim, range) in shape.iter().zip(region) {
        offsets = offsets.iter().flat_map(|offset| range.clone().map(move |index| offset * dim + index)).collect();
    }
    let element = |offset: u64| &data[usize::try_from(offset).unwrap() * element_bytes..][..element_bytes];
    offsets.into_iter().flat_map(element).copied().collect()
}

fn read(checkpoint: &Checkpoint, requests: &[Request], resources: Resources) -> Loaded {
    let pool = ArenaPool::default();
    load(checkpoint, requests, OnOverflow::Saturate, resources, &pool, &mut progress::ignore).unwrap()
}

fn region_of(shape: &'static [u64]) -> impl Strategy<Value = Region> {
    let axis = |&dim: &u64| (0..=dim, 0..=dim).prop_map(|(a, b)| a.min(b)..a.max(b));
    shape.iter().map(axis).collect::<Vec<_>>()
}

/// Rows far wider than the gap that is read along, so that covers differ between regions of one tensor.
const WIDE: &[u64] = &[3, 5, 40_000];
const BLOCKS: &[u64] = &[3, 7, 2, 16];
const ODD: &[u64] = &[2, 3, 5];

fn filled(name: &str, dtype: Dtype, shape: &[usize], data: Vec<u8>) -> Tensor {
    Tensor { data, ..Tensor::new(name, dtype, shape) }
}

fn checkpoint(place: &Place) -> Checkpoint {
    let tensor = |name: &str, dtype: Dtype, shape: &[u64]| {
        Tensor::new(name, dtype, &shape.iter().map(|&dim| usize::try_from(dim).unwrap()).collect::<Vec<_>>())
    };
    let path = place.at("tensors.safetensors");
    let tensors = [
        tensor("wide", Dtype::BF16, WIDE),
        tensor("narrow", Dtype::U8, &[7, 8192]),
        tensor("x_blocks", Dtype::U8, BLOCKS),
        tensor("x_scales", Dtype::U8, &BLOCKS[..3]),
        tensor("odd", Dtype::F4, ODD),
        tensor("even", Dtype::F4, &[3, 4, 6]),
        tensor("long", Dtype::I64, &[4, 9]),
        tensor("scalar", Dtype::F32, &[]),
        tensor("empty", Dtype::F32, &[0, 5]),
    ];
    write(&path, &tensors);
    Checkpoint::open(&path).unwrap()
}

/// Sources, conversion, shape, bytes of an element, all of its bytes, the regions.
type Case<'a> = (&'a [&'a str], Conversion, &'a [u64], usize, Vec<u8>, Vec<Region>);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn regions_are_slices_of_the_whole(
        wide in prop::collection::vec(region_of(WIDE), 1..4),
        decoded in prop::collection::vec(region_of(&[3, 7, 64]), 1..4),
        odd in prop::collection::vec(region_of(ODD), 1..3),
        even in region_of(&[3, 4, 6]),
        long in region_of(&[4, 9]),
        count in 1usize..5,
    ) {
        let place = Place::new();
        let checkpoint = checkpoint(&place);
        let whole = |name: &str| checkpoint.view(checkpoint.get(name).unwrap()).unwrap()[0].bytes().to_vec();
        let to = Target::F32;
        let mut cast = vec![0; whole("wide").len() * 2];
        cast::cast(Dtype::BF16, to, &whole("wide"), &mut cast, OnOverflow::Saturate);
        let mut dense = vec![0; whole("x_blocks").len() * 8];
        mxfp4::DecodeTable::new(to, OnOverflow::Saturate).decode(&whole("x_blocks"), &whole("x_scales"), &mut dense);
        let nibbles = |name: &str| -> Vec<u8> { whole(name).iter().flat_map(|byte| [byte & 15, byte >> 4]).collect() };
        let narrow: Vec<u8> = whole("long").as_chunks::<8>().0.iter().flat_map(|&element| {
            let value = i64::from_le_bytes(element).clamp(i32::MIN.into(), i32::MAX.into());
            i32::try_from(value).unwrap().to_le_bytes()
        }).collect();
        let pair: &[&str] = &["x_blocks", "x_scales"];
        let cases: [Case; 7] = [
            (&["wide"], Conversion::None, WIDE, 2, whole("wide"), wide.clone()),
            (&["wide"], Conversion::Float(to), WIDE, 4, cast, wide),
            (pair, Conversion::Float(to), &[3, 7, 64], 4, dense, decoded),
            (&["odd"], Conversion::Unpack, ODD, 1, nibbles("odd"), odd),
            (&["even"], Conversion::Unpack, &[3, 4, 6], 1, nibbles("even"), vec![even]),
            (&["long"], Conversion::Narrow, &[4, 9], 4, narrow, vec![long]),
            (&["scalar"], Conversion::None, &[], 4, whole("scalar"), vec![vec![], vec![]]),
        ];
        let requests: Vec<_> = cases.iter().map(|(sources, conversion, .., regions)| {
            Request::new(&checkpoint, &names(sources), *conversion, regions.clone()).unwrap()
        }).collect();
        let loaded = read(&checkpoint, &requests, workers(count));
        for ((sources, _, shape, element_bytes, data, regions), found) in cases.iter().zip(&loaded.regions) {
            for (region, found) in regions.iter().zip(found) {
                prop_assert_eq!(found.bytes(), slice(shape, *element_bytes, data, region), "{:?} {:?}", sources, region);
                prop_assert_eq!(found.bytes().as_ptr() as usize % 64, 0);
            }
        }
    }
}

#[test]
fn only_what_regions_cover_is_read() {
    let place = Place::new();
    let checkpoint = checkpoint(&place);
    let bytes_read_of = |name: &str, regions: &[Region]| {
        let request = Request::new(&checkpoint, &names(&[name]), Conversion::None, regions.to_vec()).unwrap();
        read(&checkpoint, &[request], workers(2)).bytes_read
    };
    let bytes_read = |regions: &[Region]| bytes_read_of("wide", regions);
    // A gap of a page is read along whatever the run, a longer one only if it is at most three times the run.
    assert_eq!(bytes_read_of("narrow", &[vec![0..7, 0..4096]]), 7 * 8192);
    assert_eq!(bytes_read_of("narrow", &[vec![0..7, 0..2048]]), 7 * 8192);
    assert_eq!(bytes_read_of("narrow", &[vec![0..7, 0..2047]]), 7 * 2047);
    // A leading axis: just the bytes. A last axis whose gaps are long: just the bytes.
    assert_eq!(bytes_read(&[vec![1..2, 0..5, 0..40_000]]), 5 * 40_000 * 2);
    assert_eq!(bytes_read(&[vec![0..3, 0..5, 0..20_000]]), 3 * 5 * 20_000 * 2);
    // Gaps of 30,000 bytes are read along, but not the gap before the next outer row.
    assert_eq!(bytes_read(&[vec![0..3, 0..5, 0..25_000]]), 3 * 5 * 40_000 * 2);
    // What several regions share is read once; a region twice is read once.
    assert_eq!(bytes_read(&[vec![0..3, 0..5, 0..25_000], vec![0..3, 0..5, 10_000..40_000]]), 3 * 5 * 40_000 * 2);
    assert_eq!(bytes_read(&[vec![2..3, 0..5, 0..40_000], vec![2..3, 0..5, 0..40_000]]), 5 * 40_000 * 2);
    assert_eq!(bytes_read(&[vec![1..1, 0..5, 0..40_000]]), 0);
}

#[test]
fn split_tensors_are_joined() {
    let place = Place::new();
    convert(&place.model(), &place.out(), &small_shards()).unwrap();
    let (model, tree) = (Checkpoint::open(&place.model()).unwrap(), Checkpoint::open(&place.out()).unwrap());
    let split = tree.tensors().iter().filter(|tensor| tensor.parts.len() > 1).count();
    assert!(split > 0);
    for tensor in tree.tensors().iter().filter(|tensor| tensor.dtype.bitsize() >= 8) {
        let region = tensor.shape.iter().map(|&dim| 0..dim).collect();
        let request = Request::new(&tree, &names(&[&tensor.name]), Conversion::None, vec![region]).unwrap();
        let loaded = read(&tree, &[request], workers(3));
        assert_eq!(loaded.regions[0][0].bytes(), model.view(model.get(&tensor.name).unwrap()).unwrap()[0].bytes());
    }
}

#[test]
fn small_tensors_share_memory_and_large_ones_have_their_own() {
    let place = Place::new();
    let path = place.at("many.safetensors");
    let tensors: Vec<_> =
        (0..40).map(|i| filled(&format!("t{i:02}"), Dtype::U8, &[1 << 20], vec![7; 1 << 20])).collect();
    write(&path, &[&tensors[..], &[filled("large", Dtype::U8, &[17 << 20], vec![9; 17 << 20])]].concat());
    let checkpoint = Checkpoint::open(&path).unwrap();
    let request = |tensor: &tensorport::checkpoint::TensorSpec| {
        Request::new(&checkpoint, &names(&[&tensor.name]), Conversion::None, vec![vec![0..tensor.nbytes]]).unwrap()
    };
    let pool = ArenaPool::default();
    let requests: Vec<_> = checkpoint.tensors().iter().map(request).collect();
    let read = || load(&checkpoint, &requests, OnOverflow::Error, workers(2), &pool, &mut progress::ignore).unwrap();
    let mut first = read();
    let place_of = |loaded: &Loaded, index: usize| loaded.regions[index][0].bytes().as_ptr();
    let places: Vec<_> = (0..41).map(|index| place_of(&first, index)).collect();
    // One survivor keeps its arena, of at most 16 MiB, from being used again, and no other.
    let survivor = first.regions[20].remove(0);
    drop(first);
    let second = read();
    assert_eq!(survivor.bytes(), vec![7; 1 << 20]);
    let again = (0..41).filter(|&index| places.contains(&place_of(&second, index))).count();
    assert!((41 - 16..41).contains(&again), "{again}");
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let place = Place::new();
    let checkpoint = checkpoint(&place);
    let refuse = |sources: &[&str], conversion, region: Region| {
        Request::new(&checkpoint, &names(sources), conversion, vec![region]).unwrap_err().to_string()
    };
    assert!(refuse(&["nobody"], Conversion::None, vec![]).contains("nobody"));
    assert!(refuse(&["long"], Conversion::None, vec![0..4, 0..10]).contains("0..10"));
    assert!(refuse(&["long"], Conversion::None, region::whole(&[4])).contains("regions of [4, 9]"));
    assert!(refuse(&["long"], Conversion::Float(Target::F16), vec![0..4, 0..9]).contains("long"));
    assert!(refuse(&["odd"], Conversion::None, vec![0..2, 0..3, 0..5]).contains("float4_e2m1fn"));
    assert!(refuse(&["wide", "odd"], Conversion::Float(Target::F32), vec![]).contains("blocks and scales"));
    assert!(refuse(&[], Conversion::None, vec![]).contains("one tensor"));
    assert!(Conversion::parse("float8").unwrap_err().to_string().contains("float8"));
}

#[test]
fn overflow_is_an_error_unless_it_is_asked_for() {
    let place = Place::new();
    let path = place.at("big.safetensors");
    write(
        &path,
        &[
            filled("ids", Dtype::I64, &[2], [5i64, -(1 << 40)].into_iter().flat_map(i64::to_le_bytes).collect()),
            Tensor::f32("w", &[3], [1.0, 1e6, f32::INFINITY]),
        ],
    );
    let checkpoint = Checkpoint::open(&path).unwrap();
    let pool = ArenaPool::default();
    for (name, conversion, shape, largest) in
        [("ids", Conversion::Narrow, 2, "1.09"), ("w", Conversion::Float(Target::F16), 3, "1e6")]
    {
        let requests = [Request::new(&checkpoint, &names(&[name]), conversion, vec![vec![0..shape]]).unwrap()];
        let run = |on_overflow| load(&checkpoint, &requests, on_overflow, workers(1), &pool, &mut progress::ignore);
        let fault = run(OnOverflow::Error).unwrap_err();
        assert!(matches!(&fault, Error::Overflow { tensor, count: 1, .. } if tensor == name), "{fault}");
        assert!(fault.to_string().contains(largest), "{fault}");
        assert_eq!(run(OnOverflow::Saturate).unwrap().counts[0].overflow, 1);
    }
}

#[test]
fn an_edited_file_is_noticed_and_the_observer_stops_the_job() {
    let place = Place::new();
    let checkpoint = checkpoint(&place);
    let request =
        [Request::new(&checkpoint, &names(&["wide"]), Conversion::None, vec![vec![0..3, 0..5, 0..40_000]]).unwrap()];
    let pool = ArenaPool::default();
    let stopped = load(&checkpoint, &request, OnOverflow::Error, workers(1), &pool, &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped.unwrap_err(), Error::Cancelled));
    let path = place.at("tensors.safetensors");
    let mut content = std::fs::read(&path).unwrap();
    content.push(0);
    std::fs::write(&path, content).unwrap();
    let fault = load(&checkpoint, &request, OnOverflow::Error, workers(1), &pool, &mut progress::ignore).unwrap_err();
    assert!(fault.to_string().contains("as it was opened"), "{fault}");
}

#[test]
fn the_system_is_asked_once_where_a_file_lies() {
    let place = Place::new();
    let checkpoint = checkpoint(&place);
    let file = &checkpoint.files()[0];
    let is_remote = file.is_remote().unwrap();
    std::fs::remove_file(&file.path).unwrap();
    assert_eq!(file.is_remote().unwrap(), is_remote);
}
