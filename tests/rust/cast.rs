//! Casts against a slow oracle in integer arithmetic that shares nothing with them.

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;
use tensorport::cast::{Counts, OnOverflow, Target, cast, cast_with, is_castable};
use tensorport::simd::Level;

const MODES: [OnOverflow; 3] = [OnOverflow::Error, OnOverflow::Warn, OnOverflow::Saturate];

/// A binary float format: mantissa bits, exponent of the smallest subnormal, bits of infinity, sign bit.
struct Format {
    mantissa_bits: i32,
    quantum: i32,
    infinity: u64,
    sign: u64,
}

fn format(target: Target) -> Format {
    match target {
        Target::F16 => Format { mantissa_bits: 10, quantum: -24, infinity: 0x7c00, sign: 0x8000 },
        Target::Bf16 => Format { mantissa_bits: 7, quantum: -133, infinity: 0x7f80, sign: 0x8000 },
        Target::F32 => Format { mantissa_bits: 23, quantum: -149, infinity: 0x7f80_0000, sign: 0x8000_0000 },
    }
}

/// Bits of `value` in `target`, rounded to nearest even; None for NaN. Integers only: value = m 2^e.
pub fn oracle(target: Target, value: f64) -> Option<u64> {
    let Format { mantissa_bits, quantum, infinity, sign } = format(target);
    let sign = if value.is_sign_negative() { sign } else { 0 };
    let bits = value.to_bits() & (u64::MAX >> 1);
    if value.is_nan() {
        return None;
    }
    if value.is_infinite() || value == 0.0 {
        return Some(sign | if value == 0.0 { 0 } else { infinity });
    }
    let field = i32::try_from(bits >> 52).unwrap();
    let fraction = bits & ((1 << 52) - 1);
    let (m, e) = if field == 0 { (fraction, -1074) } else { (fraction | 1 << 52, field - 1075) };
    let log2 = e + 63 - i32::try_from(m.leading_zeros()).unwrap();
    // The distance between neighbours where the value lies is 2^q.
    let q = (log2 - mantissa_bits).max(quantum);
    let steps = match q - e {
        shift @ ..=0 => m << -shift,
        // Less than half a step above zero.
        shift if shift > 60 => 0,
        shift => {
            let (whole, rest, half) = (m >> shift, m & ((1 << shift) - 1), 1 << (shift - 1));
            whole + u64::from(rest > half || rest == half && whole % 2 == 1)
        }
    };
    // The leading bit of `steps` is the implicit one: it adds itself to the exponent, as does a carry.
    let magnitude = (u64::try_from(q - quantum).unwrap() << mantissa_bits) + steps;
    Some(sign | magnitude.min(infinity))
}

/// Casts elements whose exact values are `values`, and compares bits and counts in all modes, with all vectors.
fn check(from: Dtype, to: Target, src: &[u8], values: &[f64]) {
    let Format { infinity, sign, .. } = format(to);
    let width = to.dtype().bitsize() / 8;
    for (mode, level) in MODES.into_iter().flat_map(|mode| Level::all().into_iter().map(move |level| (mode, level))) {
        let mut out = vec![0xa5; values.len() * width];
        let counts = cast_with(level, from, to, src, &mut out, mode);
        let mut expected_counts = Counts::default();
        for (&value, stored) in values.iter().zip(out.chunks(width)) {
            let mut padded = [0; 8];
            padded[..width].copy_from_slice(stored);
            let actual = u64::from_le_bytes(padded);
            let Some(mut expected) = oracle(to, value) else {
                assert!(actual & !sign > infinity, "{from} NaN became {actual:#x} in {to:?}");
                assert_eq!(actual & sign != 0, value.is_sign_negative(), "sign of a NaN from {from} to {to:?}");
                continue;
            };
            if expected & !sign == infinity && value.is_finite() {
                expected_counts.overflow += 1;
                expected_counts.largest = expected_counts.largest.max(value.abs());
                expected -= u64::from(mode == OnOverflow::Saturate);
            }
            expected_counts.underflow += u64::from(expected & !sign == 0 && value != 0.0);
            assert_eq!(actual, expected, "{from} {value:e} to {to:?}: {actual:#x}, expected {expected:#x}");
        }
        assert_eq!(counts, expected_counts, "{from} to {to:?}");
    }
}

fn check_f64(values: &[f64]) {
    let src: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    for to in [Target::F16, Target::Bf16, Target::F32] {
        check(Dtype::F64, to, &src, values);
    }
}

fn check_f32(values: &[f32]) {
    let src: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    // Widening may lose the sign of a NaN on no platform, but may quiet it.
    let values: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
    for to in [Target::F16, Target::Bf16] {
        check(Dtype::F32, to, &src, &values);
    }
}

fn decode(target: Target, bits: u16) -> f64 {
    if target == Target::F16 { f16::from_bits(bits).to_f64() } else { bf16::from_bits(bits).to_f64() }
}

#[test]
fn the_oracle_agrees_with_the_half_crate_and_with_the_language() {
    for i in 0..200_000u64 {
        let value = f64::from_bits(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if value.is_nan() {
            continue;
        }
        #[expect(clippy::cast_possible_truncation, reason = "the rounding is what is compared")]
        let narrow = value as f32;
        assert_eq!(oracle(Target::F32, value), Some(u64::from(narrow.to_bits())), "{value:e}");
        assert_eq!(oracle(Target::F16, narrow.into()), Some(f16::from_f32(narrow).to_bits().into()), "{narrow:e}");
        assert_eq!(oracle(Target::Bf16, narrow.into()), Some(bf16::from_f32(narrow).to_bits().into()), "{narrow:e}");
    }
}

#[test]
fn all_f16_and_bf16_values_are_cast_exactly_or_to_nearest_even() {
    let src: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (from, source, to) in [
        (Dtype::F16, Target::F16, Target::Bf16),
        (Dtype::F16, Target::F16, Target::F32),
        (Dtype::BF16, Target::Bf16, Target::F16),
        (Dtype::BF16, Target::Bf16, Target::F32),
    ] {
        let values: Vec<f64> = (0..=u16::MAX).map(|bits| decode(source, bits)).collect();
        check(from, to, &src, &values);
    }
}

#[test]
fn every_tie_of_f16_and_bf16_goes_to_even_and_its_neighbours_do_not() {
    for target in [Target::F16, Target::Bf16] {
        let mut doubles = Vec::new();
        let mut floats = Vec::new();
        // Every other positive value, its successor's side included, and from the largest on the way to infinity.
        for bits in (0..u16::try_from(format(target).infinity).unwrap()).step_by(2).chain([0x7bff, 0x7f7f]) {
            let (low, high) = (decode(target, bits), decode(target, bits + 1));
            if !low.is_finite() {
                continue;
            }
            // Beyond the largest value the next step is as long as the last one.
            let high = if high.is_finite() { high } else { 2.0 * low - decode(target, bits - 1) };
            let tie = f64::midpoint(low, high);
            for value in [low, tie, tie.next_up(), tie.next_down(), high.next_down()] {
                doubles.extend([value, -value]);
            }
            #[expect(clippy::cast_possible_truncation, reason = "a tie of 16-bit floats is a float")]
            let tie = tie as f32;
            floats.extend([tie, -tie, tie.next_up(), tie.next_down()]);
        }
        check_f64(&doubles);
        check_f32(&floats);
    }
}

#[test]
fn double_rounding_does_not_happen() {
    // Each lies a hair beside a tie of the target, a distance that a detour through f32 would round away.
    let hair = 2f64.powi(-40);
    let value = |tie: f64, up: f64| tie * (1.0 + up * hair);
    for (target, tie, below, above) in [
        (Target::Bf16, 1.0 + 2f64.powi(-8), 0x3f80, 0x3f81),
        (Target::F16, 1.0 + 2f64.powi(-11), 0x3c00, 0x3c01),
        (Target::Bf16, 2f64.powi(-134), 0, 1),
        (Target::F16, 2f64.powi(-25), 0, 1),
        (Target::Bf16, 2f64.powi(128) - 2f64.powi(119), 0x7f7f, 0x7f80),
        (Target::F16, 65520.0, 0x7bff, 0x7c00),
    ] {
        assert_eq!(target.round(value(tie, -1.0), OnOverflow::Warn).bits, below, "{target:?} {tie:e}");
        assert_eq!(target.round(value(tie, 1.0), OnOverflow::Warn).bits, above, "{target:?} {tie:e}");
    }
}

#[test]
fn edge_values_are_cast_and_counted() {
    let mut doubles = vec![0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN, f64::MIN_POSITIVE];
    doubles.extend([f64::from_bits(1), -f64::from_bits(1), f64::NAN, -f64::NAN, f64::from_bits(0x7ff0_0000_0000_0001)]);
    doubles.push(f64::from_bits(0xfff0_0000_0000_0001));
    for edge in [65504.0, 65520.0, f64::from(f32::MAX), 2f64.powi(128), 2f64.powi(-149), 2f64.powi(-150)] {
        doubles.extend([edge, -edge, edge.next_up(), edge.next_down()]);
    }
    check_f64(&doubles);
    let bits = [0, 1, 2, 0x7f_ffff, 0x80_0000, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0x7fbf_ffff, 0x7fc0_0000];
    let floats: Vec<f32> = bits.iter().flat_map(|&bits| [bits, bits | 1 << 31]).map(f32::from_bits).collect();
    check_f32(&floats);
}

/// A sequence of all kinds of bits, by `SplitMix64`.
fn random_bytes(nbytes: usize) -> Vec<u8> {
    let words = (1..=nbytes.div_ceil(8) as u64).map(|i| {
        let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    });
    words.flat_map(u64::to_le_bytes).take(nbytes).collect()
}

#[test]
fn all_levels_make_the_same_bytes_of_nans_too() {
    assert_eq!(Level::all().first(), Some(&Level::PLAIN));
    assert_eq!(Level::all().last(), Some(&Level::best()));
    for from in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        assert!(is_castable(from));
        // A prime number of elements: every length of tail is met on the way down.
        let src = random_bytes(10_007 * from.bitsize() / 8);
        for to in [Target::F16, Target::Bf16, Target::F32].into_iter().filter(|to| to.dtype() != from) {
            for elems in (9_900..10_007).chain(0..130) {
                let src = &src[..elems * from.bitsize() / 8];
                let made = Level::all().into_iter().map(|level| {
                    let mut out = vec![0xa5; elems * to.dtype().bitsize() / 8];
                    let counts = cast_with(level, from, to, src, &mut out, OnOverflow::Saturate);
                    (out, counts)
                });
                let made: Vec<_> = made.collect();
                assert!(made.windows(2).all(|pair| pair[0] == pair[1]), "{from} to {to:?}, {elems} elements");
            }
        }
    }
}

#[test]
fn counts_do_not_depend_on_where_a_slice_is_cut() {
    let values: Vec<f32> = (0..5000u16).map(|i| 60000.0 + 3.0 * f32::from(i)).collect();
    let src: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut out = vec![0; values.len() * 2];
    let whole = cast(Dtype::F32, Target::F16, &src, &mut out, OnOverflow::Warn);
    let mut merged = Counts::default();
    let mut pieces = vec![0; out.len()];
    for (src, dst) in src.chunks(4 * 701).zip(pieces.chunks_mut(2 * 701)) {
        merged.merge(cast(Dtype::F32, Target::F16, src, dst, OnOverflow::Warn));
    }
    assert!(whole.overflow > 3000 && whole.overflow < 5000);
    assert_eq!(whole, merged);
    assert_eq!(out, pieces);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_f64_is_cast_as_the_oracle_says(bits in prop::collection::vec(any::<u64>(), 1..40)) {
        check_f64(&bits.into_iter().map(f64::from_bits).collect::<Vec<_>>());
    }

    #[test]
    fn any_f64_in_the_range_of_the_targets_is_cast_as_the_oracle_says(
        parts in prop::collection::vec((-160i32..130, -2.0f64..2.0), 1..40),
    ) {
        check_f64(&parts.into_iter().map(|(exponent, mantissa)| mantissa * 2f64.powi(exponent)).collect::<Vec<_>>());
    }

    #[test]
    fn any_f32_is_cast_as_the_oracle_says(bits in prop::collection::vec(any::<u32>(), 1..40)) {
        check_f32(&bits.into_iter().map(f32::from_bits).collect::<Vec<_>>());
    }
}
