//! MXFP4 encoding: the definition against a search for the nearest value, the vectors against the definition.

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::arena::{ALIGNMENT, ArenaPool};
use tensorport::cast::{OnOverflow, Target};
use tensorport::mxfp4::{self, DecodeTable, E2M1, ScaleRule, decode_one, encode_block, encode_with};
use tensorport::progress;
use tensorport::simd::Level;
use tensorport::{Error, codec};

const RULES: [ScaleRule; 3] = [ScaleRule::Floor, ScaleRule::Ceil, ScaleRule::Nearest];
const DTYPES: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16];

/// An element's value, read as nothing but the standard library and `half` read it.
fn value(from: Dtype, bytes: &[u8]) -> f64 {
    match from {
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        _ => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
    }
}

/// The nearest element of the dtype.
fn element(from: Dtype, value: f64) -> Vec<u8> {
    match from {
        Dtype::F64 => value.to_le_bytes().to_vec(),
        #[expect(clippy::cast_possible_truncation, reason = "the rounding is the purpose")]
        Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        _ => bf16::from_f64(value).to_le_bytes().to_vec(),
    }
}

/// Encodes whole blocks by every rule with all vectors, and compares with the definition.
fn check(from: Dtype, src: &[u8]) {
    let width = from.bitsize() / 8;
    let groups = src.len() / (32 * width);
    let values: Vec<f64> = src.chunks_exact(width).map(|bytes| value(from, bytes)).collect();
    for rule in RULES {
        let expected: Vec<_> = values.as_chunks().0.iter().map(|values| encode_block(values, rule)).collect();
        for level in Level::all() {
            let (mut blocks, mut scales) = (vec![0xa5; 16 * groups], vec![0xa5; groups]);
            encode_with(level, from, rule, src, &mut blocks, &mut scales);
            for (index, (codes, scale)) in expected.iter().enumerate() {
                assert_eq!(
                    (&blocks[16 * index..][..16], scales[index]),
                    (&codes[..], *scale),
                    "{from} by {rule:?} with {level}: {:?}",
                    &values[32 * index..][..32]
                );
            }
        }
    }
}

/// The code at an index of a block.
fn code(codes: &[u8; 16], index: usize) -> u8 {
    codes[index / 2] >> (index % 2 * 4) & 0xf
}

/// The scale byte of a block whose largest magnitude is `amax`, found by trying all.
fn searched_scale(amax: f64, rule: ScaleRule) -> u8 {
    let power = |scale: u8| 2f64.powi(i32::from(scale) - 127);
    let floor = (0..=252).rev().find(|&scale| amax >= 4.0 * power(scale)).unwrap_or(0);
    let next = (floor + 1).min(252);
    let error = |scale: u8| {
        let nearest = E2M1.iter().map(|&code| (f64::from(code) * power(scale) - amax).abs());
        nearest.fold(f64::INFINITY, f64::min)
    };
    match rule {
        ScaleRule::Ceil => (0..=252).find(|&scale| 6.0 * power(scale) >= amax).unwrap_or(252),
        // At 7 times the scale both are off by the same.
        ScaleRule::Nearest if error(next) < error(floor) || amax == 7.0 * power(floor) => next,
        ScaleRule::Floor | ScaleRule::Nearest => floor,
    }
}

/// Asserts that a code is the nearest to a value under its scale, the even one of two, saturating at 6 times the scale.
fn assert_nearest(value: f64, code: u8, scale: u8) {
    let power = 2f64.powi(i32::from(scale) - 127);
    let error = |code: u8| (f64::from(E2M1[usize::from(code)]) * power - value.abs()).abs();
    let least = (0..8).map(error).fold(f64::INFINITY, f64::min);
    let nearest: Vec<u8> = (0..8).filter(|&code| error(code) == least).collect();
    let even = nearest.iter().find(|&code| code % 2 == 0);
    let expected = if value.abs() >= 6.0 * power { 7 } else { *even.unwrap_or(&nearest[0]) };
    assert_eq!(code, expected | u8::from(value.is_sign_negative()) << 3, "{value:e} under scale {scale}");
}

/// All values of one dtype that are a tie under this scale byte or the neighbour of one, beside the largest code.
fn ties(from: Dtype, scale: u8) -> Vec<u8> {
    let power = 2f64.powi(i32::from(scale) - 127);
    let step = |bytes: &[u8], up: bool| {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        let next = if up { bits + 1 } else { bits.saturating_sub(1) };
        next.to_le_bytes()[..bytes.len()].to_vec()
    };
    let mut src = element(from, 6.0 * power);
    for middle in [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] {
        let tie = element(from, middle * power);
        src.extend([step(&tie, false), step(&tie, true), tie.clone(), element(from, -middle * power)].concat());
    }
    src.extend([element(from, 0.0), element(from, -0.0), element(from, 4.0 * power)].concat());
    src
}

#[test]
fn every_tie_and_its_neighbours_round_as_defined() {
    for from in DTYPES {
        let src: Vec<u8> = (0..=254).flat_map(|scale| ties(from, scale)).collect();
        check(from, &src);
    }
    // The ties are ties.
    let src = ties(Dtype::F32, 127);
    let values: Vec<f64> = src.chunks(4).map(|bytes| value(Dtype::F32, bytes)).collect();
    let (codes, scale) = encode_block(&values.as_chunks().0[0], ScaleRule::Floor);
    let tied: Vec<u8> = (0..7).map(|middle| code(&codes, 3 + 4 * middle)).collect();
    assert_eq!((scale, &tied[..]), (127, &[0, 2, 2, 4, 4, 6, 6][..]));
    assert_eq!((code(&codes, 29), code(&codes, 30)), (0, 8), "zeros keep their signs");
}

#[test]
fn all_patterns_of_16_bits_encode_as_defined() {
    for from in [Dtype::BF16, Dtype::F16] {
        // In order, blocks have one exponent; after the multiplication by an odd number, all of them.
        for factor in [1, 40_503u16] {
            let src: Vec<u8> = (0..=u16::MAX).flat_map(|bits| bits.wrapping_mul(factor).to_le_bytes()).collect();
            check(from, &src);
        }
        // Alone: each decides the scale of a block of zeros, and some stand beside infinities.
        let block = |bits: u16, other: f64| [bits.to_le_bytes().to_vec(), element(from, other).repeat(31)].concat();
        check(from, &(0..0x8000).flat_map(|bits| block(bits, 0.0)).collect::<Vec<u8>>());
        check(from, &(0..=u16::MAX).step_by(31).flat_map(|bits| block(bits, f64::INFINITY)).collect::<Vec<u8>>());
    }
}

#[test]
fn special_blocks_are_what_the_documentation_says() {
    let with = |values: &[f64]| {
        let mut block = [1.0; 32];
        block[..values.len()].copy_from_slice(values);
        block
    };
    for rule in RULES {
        assert_eq!(encode_block(&[0.0; 32], rule), ([0; 16], 0));
        assert_eq!(encode_block(&[-0.0; 32], rule), ([0x88; 16], 0));
        assert_eq!(encode_block(&with(&[-2.0, f64::NAN]), rule), ([0; 16], 255));
        assert_eq!(encode_block(&with(&[f64::INFINITY, -f64::NAN]), rule), ([0; 16], 255));
        let (codes, scale) = encode_block(&with(&[f64::NEG_INFINITY, f64::INFINITY, -3.0]), rule);
        assert_eq!((scale, codes[0], codes[1]), (254, 0x7f, 0x08));
        // The largest floats saturate: a finite value never becomes an infinity.
        let (codes, scale) = encode_block(&[f64::from(f32::MAX); 32], rule);
        assert_eq!((codes, scale), ([0x77; 16], 252));
        assert!(decode_one(7, scale) < f64::from(f32::MAX));
        assert_eq!(encode_block(&[-f64::MAX; 32], rule), ([0xff; 16], 252));
        assert_eq!(encode_block(&[f64::from_bits(1); 32], rule), ([0; 16], 0));
    }
    for from in DTYPES {
        for values in [
            vec![0.0; 32],
            vec![-0.0; 32],
            with(&[f64::NAN, f64::INFINITY]).to_vec(),
            with(&[-f64::NAN]).to_vec(),
            with(&[f64::NEG_INFINITY, 65504.0, -1e-40, 1e38, 3e38]).to_vec(),
            with(&[f64::MAX, f64::from(f32::MAX), 65504.0]).to_vec(),
            with(&[f64::MIN_POSITIVE, f64::from_bits(1), f64::from(f32::from_bits(1))]).to_vec(),
            vec![f64::from(f32::from_bits(1)); 32],
            vec![2f64.powi(-24); 32],
        ] {
            check(from, &values.iter().flat_map(|&value| element(from, value)).collect::<Vec<u8>>());
        }
    }
}

#[test]
fn whatever_mxfp4_can_hold_comes_back_bit_for_bit() {
    for target in [Target::Bf16, Target::F32] {
        let from = target.dtype();
        for rule in RULES {
            // Codes of any size under each scale; code 7 makes the scale the same again.
            let blocks: Vec<u8> =
                (0..=252u8).flat_map(|scale| (0..16).map(move |i| (i * 17) ^ scale | (u8::from(i == 0) * 7))).collect();
            let scales: Vec<u8> = (0..=252).collect();
            let mut values = vec![0; 253 * 32 * from.bitsize() / 8];
            DecodeTable::new(target, OnOverflow::Error).decode(&blocks, &scales, &mut values);
            let (mut blocks_again, mut scales_again) = (vec![0; blocks.len()], vec![0; scales.len()]);
            mxfp4::encode(from, rule, &values, &mut blocks_again, &mut scales_again);
            assert_eq!((blocks_again, scales_again), (blocks, scales), "{from} by {rule:?}");
        }
    }
}

/// Blocks of `from` whose exponents lie close together, or anywhere.
fn blocks_of(from: Dtype) -> impl Strategy<Value = Vec<u8>> {
    let width = from.bitsize() / 8;
    let anything = proptest::collection::vec(any::<u8>(), 32 * width * 3);
    let alike =
        (any::<u64>(), proptest::collection::vec((any::<u64>(), 0u32..12), 32 * 3)).prop_map(move |(base, parts)| {
            let bits = u32::try_from(from.bitsize()).unwrap();
            let exponent_bits = match from {
                Dtype::F64 => 11,
                Dtype::F16 => 5,
                _ => 8,
            };
            let exponent = base >> (64 - exponent_bits);
            let element = |(random, below): (u64, u32)| {
                let mantissa_bits = bits - 1 - exponent_bits;
                let sign_and_mantissa = random >> (64 - bits) & !(((1 << exponent_bits) - 1) << mantissa_bits);
                sign_and_mantissa | exponent.saturating_sub(below.into()) << mantissa_bits
            };
            parts.into_iter().flat_map(|part| element(part).to_le_bytes()[..width].to_vec()).collect()
        });
    prop_oneof![anything, alike]
}

fn any_blocks() -> impl Strategy<Value = (Dtype, Vec<u8>)> {
    prop::sample::select(DTYPES.to_vec()).prop_flat_map(|from| blocks_of(from).prop_map(move |src| (from, src)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bits_encode_as_defined((from, src) in any_blocks()) {
        check(from, &src);
    }

    #[test]
    fn the_definition_finds_the_nearest_code_under_the_scale_of_its_rule((from, src) in any_blocks()) {
        let width = from.bitsize() / 8;
        let values: Vec<f64> = src.chunks_exact(width).map(|bytes| value(from, bytes)).collect();
        for values in values.as_chunks::<32>().0 {
            let amax = values.iter().fold(0.0, |amax: f64, value| amax.max(value.abs()));
            for rule in RULES {
                let (codes, scale) = encode_block(values, rule);
                if values.iter().any(|value| value.is_nan()) {
                    prop_assert_eq!((codes, scale), ([0; 16], 255));
                    continue;
                }
                prop_assert_eq!(scale, if amax.is_infinite() { 254 } else { searched_scale(amax, rule) });
                for (index, &value) in values.iter().enumerate() {
                    assert_nearest(value, code(&codes, index), scale);
                }
            }
        }
    }
}

#[test]
fn jobs_of_any_number_of_workers_give_the_same_aligned_bytes() {
    let memory = ArenaPool::default();
    // None, one that the calling thread encodes alone, and several chunks of which the last is shorter.
    for groups in [0, 1, 45_678] {
        let src: Vec<u8> =
            (0..groups * 32u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 3).to_le_bytes()).collect();
        let count = groups as usize;
        let (mut blocks, mut scales, mut values) = (vec![0; count * 16], vec![0; count], vec![0; count * 128]);
        mxfp4::encode(Dtype::F32, ScaleRule::Nearest, &src, &mut blocks, &mut scales);
        DecodeTable::new(Target::F32, OnOverflow::Warn).decode(&blocks, &scales, &mut values);
        for workers in [Some(1), Some(2), Some(7), None] {
            let encoded =
                codec::encode(Dtype::F32, ScaleRule::Nearest, &src, workers, &memory, &mut progress::ignore).unwrap();
            assert!(encoded.blocks.bytes() == blocks && encoded.scales.bytes() == scales);
            let decoded =
                codec::decode(&blocks, &scales, Target::F32, workers, &memory, &mut progress::ignore).unwrap();
            assert!(decoded.bytes() == values);
            for view in [&encoded.blocks, &encoded.scales, &decoded] {
                assert_eq!(view.bytes().as_ptr() as u64 % ALIGNMENT, 0);
            }
        }
    }
}

#[test]
fn the_observer_stops_a_job() {
    let src = vec![0; 100 << 20];
    let mut stop = |_: &progress::Event<'_>| std::ops::ControlFlow::Break(());
    let result = codec::encode(Dtype::F64, ScaleRule::Floor, &src, Some(2), &ArenaPool::default(), &mut stop);
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn lengths_that_do_not_fit_are_named() {
    let memory = ArenaPool::default();
    let fault = codec::decode(&[0; 33], &[0; 2], Target::F32, Some(1), &memory, &mut progress::ignore).unwrap_err();
    assert_eq!(fault.to_string(), "blocks: found 33 bytes, expected 16 for each of 2 scales");
    let rule = ScaleRule::Floor;
    let fault = codec::encode(Dtype::F16, rule, &[0; 63], Some(1), &memory, &mut progress::ignore).unwrap_err();
    assert_eq!(fault.to_string(), "data: found 63 bytes, expected a multiple of 64, 32 elements");
    assert!(codec::encode(Dtype::F16, rule, &[0; 64], Some(0), &memory, &mut progress::ignore).is_err());
    let fault = ScaleRule::parse("up").unwrap_err();
    assert_eq!(fault.to_string(), "scale_rule: found \"up\", expected floor, ceil or nearest");
}
