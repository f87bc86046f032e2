//! float8 codes times their scales, rounded once to a float dtype.
//!
//! The product of a float8 value (4 significant bits) and a scale (24) is exact in float64, but 28 bits are more than a
//! float32 has. So narrower targets are rounded from the product in float32 *rounded to odd*, which rounds on as the exact
//! product does (see `cast.rs`); scales under which this would not be exact take the way through float64.

use std::marker::PhantomData;

use safetensors::Dtype;

use super::{Blocks, ScaleDtype};
use crate::cast::{Bf16, Counts, F16, F32, OnOverflow, Stored, Target, cast};
use crate::simd::{Kernel, Level};

/// Scales of a stretch of values.
#[derive(Debug, Clone, Copy)]
pub struct Scales<'a> {
    /// Number of the first among all scales of the weight.
    pub first: u64,
    /// Their bytes.
    pub bytes: &'a [u8],
}

/// The value of a code: the definition. Exact.
#[must_use]
pub fn value(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    if magnitude == NAN_CODE {
        return f32::NAN;
    }
    let value = magnitude_of(magnitude);
    if code & 0x80 == 0 { value } else { -value }
}

/// Decodes the values from number `first` on, whose codes are `codes`. `scales` has those of them all.
///
/// # Panics
/// When `out` does not hold as many elements as there are codes, or a scale is not among `scales`.
pub fn decode(
    blocks: Blocks,
    to: Target,
    first: u64,
    codes: &[u8],
    scales: Scales<'_>,
    out: &mut [u8],
    on_overflow: OnOverflow,
) -> Counts {
    decode_with(Level::best(), blocks, to, first, codes, scales, out, on_overflow)
}

/// [`decode`] with chosen vector instructions: all levels give the same bytes and counts.
///
/// # Panics
/// As [`decode`].
#[expect(clippy::too_many_arguments, reason = "those of `decode`")]
pub fn decode_with(
    level: Level,
    blocks: Blocks,
    to: Target,
    first: u64,
    codes: &[u8],
    scales: Scales<'_>,
    out: &mut [u8],
    on_overflow: OnOverflow,
) -> Counts {
    macro_rules! run {
        ($target:ty) => {
            level.run(Decode { blocks, first, codes, scales, out, on_overflow, to, target: PhantomData::<$target> })
        };
    }
    match to {
        Target::F16 => run!(F16),
        Target::Bf16 => run!(Bf16),
        Target::F32 => run!(F32),
    }
}

/// The one code that is no number, without its sign.
const NAN_CODE: u32 = 0x7f;

struct Decode<'a, T> {
    blocks: Blocks,
    first: u64,
    codes: &'a [u8],
    scales: Scales<'a>,
    out: &'a mut [u8],
    on_overflow: OnOverflow,
    to: Target,
    target: PhantomData<T>,
}

impl<T: Stored> Kernel for Decode<'_, T> {
    type Output = Counts;

    #[inline(always)]
    fn run(self) -> Counts {
        let Self { blocks, first, mut codes, scales, out, on_overflow, to, .. } = self;
        let mut out = T::elements(out);
        assert_eq!(codes.len(), out.len(), "an element for each code");
        let mut counts = Counts::default();
        let safe = safe_scales(to);
        let mut next = first;
        while !codes.is_empty() {
            let (row, column) = (next / blocks.columns, next % blocks.columns);
            let in_row = to_usize(blocks.columns - column).min(codes.len());
            let (mut row_codes, later_codes) = codes.split_at(in_row);
            let (mut row_out, later_out) = out.split_at_mut(in_row);
            let mut scale_number = blocks.first_scale(row) + column / blocks.size.columns - scales.first;
            let mut in_block = to_usize(blocks.size.columns - column % blocks.size.columns);
            while !row_codes.is_empty() {
                let length = in_block.min(row_codes.len());
                let (block_codes, rest_codes) = row_codes.split_at(length);
                let (block_out, rest_out) = row_out.split_at_mut(length);
                let scale = scale(scales.bytes, blocks.scale_dtype, to_usize(scale_number));
                if safe.contains(&scale.abs()) {
                    decode_safe::<T>(block_codes, scale, block_out);
                } else {
                    counts.merge(decode_any(block_codes, scale, to, T::bytes(block_out), on_overflow));
                }
                (row_codes, row_out) = (rest_codes, rest_out);
                scale_number += 1;
                in_block = to_usize(blocks.size.columns);
            }
            next += in_row as u64;
            (codes, out) = (later_codes, later_out);
        }
        counts
    }
}

/// Magnitudes of the scales under which [`decode_safe`] is right: no value overflows, none but zero becomes zero, and all
/// steps are exact.
///
/// Magnitudes of float8 are zero and 2^-9 to 448. In float32 the last bit of a product with 2^-100 is 2^-132, which is
/// above the smallest subnormal. float16 holds 448 · 128, and rounds 2^-9 · 2^-15 to its smallest subnormal, 2^-24.
fn safe_scales(to: Target) -> std::ops::RangeInclusive<f32> {
    match to {
        Target::F16 => power_of_two(-15)..=power_of_two(7),
        Target::Bf16 | Target::F32 => power_of_two(-100)..=power_of_two(100),
    }
}

/// A normal power of two.
const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits((exponent + 127).cast_unsigned() << 23)
}

/// Decodes codes under one of the [`safe_scales`].
#[inline(always)]
fn decode_safe<T: Stored>(codes: &[u8], scale: f32, out: &mut [T::Bytes]) {
    // Twenty significant bits and four: their products with four bits are exact in float32.
    let high = f32::from_bits(scale.to_bits() & !0xf);
    let low = scale - high;
    for (&code, out) in codes.iter().zip(out) {
        let code = u32::from(code);
        let (sign, magnitude) = ((code & 0x80) << 24, code & 0x7f);
        let value = magnitude_of(magnitude);
        let product = value * scale;
        let bits = if T::IS_F32 {
            product.to_bits()
        } else {
            // Exact: what rounding took from the product. The difference is one of neighbours on a common grid.
            let error = (value * high - product) + value * low;
            let is_inexact = u32::from(error != 0.0);
            let is_too_large = (error.to_bits() ^ product.to_bits()) >> 31 & is_inexact;
            // Rounded to odd: cut off, and the last bit set for what was cut off.
            (product.to_bits() - is_too_large) | is_inexact
        };
        let quiet_nan = 0x7fc0_0000 | scale.to_bits() & 0x8000_0000;
        let bits = if magnitude == NAN_CODE { quiet_nan } else { bits };
        *out = T::round(f32::from_bits(bits ^ sign));
    }
}

/// Decodes codes under any scale: exact products in float64, cast once.
#[cold]
#[inline(never)]
fn decode_any(codes: &[u8], scale: f32, to: Target, out: &mut [u8], on_overflow: OnOverflow) -> Counts {
    const ELEMS: usize = 256;
    let width = to.dtype().bitsize() / 8;
    let mut products = [0; 8 * ELEMS];
    let mut counts = Counts::default();
    for (codes, out) in codes.chunks(ELEMS).zip(out.chunks_mut(width * ELEMS)) {
        let products = &mut products[..8 * codes.len()];
        for (&code, product) in codes.iter().zip(products.as_chunks_mut::<8>().0) {
            let exact = f64::from(value(code)) * f64::from(scale);
            // Processors differ in the sign of a NaN that they make.
            let is_negative = (code & 0x80 != 0) != scale.is_sign_negative();
            let nan = f64::from_bits(0x7ff8_0000_0000_0000 | u64::from(is_negative) << 63);
            *product = if exact.is_nan() { nan } else { exact }.to_le_bytes();
        }
        counts.merge(cast(Dtype::F64, to, products, out, on_overflow));
    }
    counts
}

/// Value of a code without its sign bit; of [`NAN_CODE`] some number.
#[inline(always)]
fn magnitude_of(magnitude: u32) -> f32 {
    // The exponent bias goes from 7 to 127. Subnormals get an implicit bit for a moment, which is the smallest normal.
    let bits = magnitude << 20;
    let normal = f32::from_bits(bits + (120 << 23));
    let subnormal = f32::from_bits(bits + (121 << 23)) - power_of_two(-6);
    if magnitude < 8 { subnormal } else { normal }
}

/// A scale, which is exact in float32.
#[inline(always)]
fn scale(bytes: &[u8], dtype: ScaleDtype, number: usize) -> f32 {
    match dtype {
        ScaleDtype::F32 => f32::from_le_bytes(bytes.as_chunks().0[number]),
        ScaleDtype::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes(bytes.as_chunks().0[number])) << 16),
    }
}

/// A number of elements; one that does not fit the address space is more than there are.
#[inline(always)]
fn to_usize(elems: u64) -> usize {
    usize::try_from(elems).unwrap_or(usize::MAX)
}
