//! Whole blocks of floats to codes and scales.

use std::marker::PhantomData;
use std::sync::LazyLock;

use clap::ValueEnum;
use half::{bf16, f16};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{BLOCK_BYTES, E2M1, MX_BLOCK_SIZE};
use crate::error::{Error, Result};
use crate::simd::{Kernel, Level};

/// Which power of two becomes the scale of a block. All rules begin with the exponent floor(log2(amax)) - 2, where amax is
/// the block's largest magnitude, and may add one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum ScaleRule {
    /// OCP MX v1.0: never add one. Magnitudes above 6 times the scale saturate.
    #[default]
    Floor,
    /// The smallest scale under which nothing saturates: scale >= amax / 6.
    Ceil,
    /// The scale under which amax itself comes out with the smallest error: add one from 7 times the scale on.
    Nearest,
}

impl ScaleRule {
    /// The rule of this name.
    pub fn parse(name: &str) -> Result<Self> {
        Self::from_str(name, false).map_err(|_| Error::Argument {
            name: "scale_rule",
            found: format!("{name:?}"),
            expected: "floor, ceil or nearest".into(),
        })
    }
}

/// Largest scale byte of finite values: every code under it is finite in bfloat16 and float32.
const MAX_FINITE_SCALE: i32 = 252;

/// Scale byte of a block with an infinity: under it the largest codes are infinite in bfloat16 and float32.
const INFINITE_SCALE: u8 = 254;

/// Scale byte of a block with a NaN: OCP MX v1.0.
const NAN_SCALE: u8 = 255;

/// Encodes blocks of 32 little-endian elements of `from` in `src`: 16 bytes of codes in `blocks`, a byte in `scales`.
///
/// Elements round to the nearest code, ties to the even one, and saturate at 6 times the scale; the sign of zero stays. A
/// block of zeros has scale byte 0. A NaN makes the whole block NaN: scale byte 255, codes 0. In a block with an infinity
/// the infinities stay (they decode to infinities in bfloat16 and float32), under scale byte 254.
///
/// # Panics
/// When `from` is not F64, F32, F16 or BF16, or the lengths of the slices disagree.
pub fn encode(from: Dtype, rule: ScaleRule, src: &[u8], blocks: &mut [u8], scales: &mut [u8]) {
    encode_with(Level::best(), from, rule, src, blocks, scales);
}

/// [`encode`] with chosen vector instructions: all levels give the same bytes.
///
/// # Panics
/// As [`encode`].
pub fn encode_with(level: Level, from: Dtype, rule: ScaleRule, src: &[u8], blocks: &mut [u8], scales: &mut [u8]) {
    macro_rules! run {
        ($element:ty) => {
            level.run(EncodeBlocks { src, blocks, scales, rule, element: PhantomData::<$element> })
        };
    }
    match from {
        Dtype::F64 => run!(F64),
        Dtype::F32 => run!(F32),
        Dtype::F16 => run!(F16),
        Dtype::BF16 => run!(Bf16),
        other => panic!("{other} is no float dtype that is quantized"),
    }
}

struct EncodeBlocks<'a, E> {
    src: &'a [u8],
    blocks: &'a mut [u8],
    scales: &'a mut [u8],
    rule: ScaleRule,
    element: PhantomData<E>,
}

impl<E: Element> Kernel for EncodeBlocks<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (groups, rest) = E::elements(self.src).as_chunks::<MX_BLOCK_SIZE>();
        assert!(rest.is_empty() && groups.len() == self.scales.len(), "32 elements for each scale");
        let (blocks, rest) = self.blocks.as_chunks_mut::<BLOCK_BYTES>();
        assert!(rest.is_empty() && blocks.len() == self.scales.len(), "16 bytes for each scale");
        let limits = E::limits();
        for ((group, block), scale) in groups.iter().zip(blocks).zip(self.scales) {
            let amax = group.iter().fold(E::Bits::default(), |amax, &element| amax.max(E::magnitude(element)));
            if amax > E::INFINITY {
                (*block, *scale) = ([0; BLOCK_BYTES], NAN_SCALE);
                continue;
            }
            *scale = if amax == E::INFINITY { INFINITE_SCALE } else { finite_scale(E::widen(amax), self.rule) };
            let limits = &limits[usize::from(*scale)];
            let mut codes = [E::Bits::default(); MX_BLOCK_SIZE];
            for (code, &element) in codes.iter_mut().zip(group) {
                *code = E::code(element, limits);
            }
            for (byte, &pair) in block.iter_mut().zip(codes.as_chunks().0) {
                *byte = E::pack(pair);
            }
        }
    }
}

/// [`scale_byte`] of a finite magnitude, from [`Element::widen`].
#[inline(always)]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a byte")]
fn finite_scale(amax: i64, rule: ScaleRule) -> u8 {
    // Carries into the exponent where the rule adds one to it: from mantissas above 1.5, or from 1.75 on.
    let carry = match rule {
        ScaleRule::Floor => 0,
        ScaleRule::Ceil => (1 << 51) - 1,
        ScaleRule::Nearest => 1 << 50,
    };
    (((amax + carry) >> 52) - 1023 - 2 + 127).clamp(0, MAX_FINITE_SCALE.into()) as u8
}

/// A dtype that is quantized. All is done in signed integers of the dtype's own width, for without its sign a float's bits
/// sort as magnitudes do: nothing is rounded, subnormals are like all others, and a vector holds as many elements as it can.
trait Element {
    /// Bytes of an element.
    type Bytes: Copy;
    /// Bits of an element.
    type Bits: Copy + Default + Ord + 'static;
    /// Magnitude of infinity; those of NaNs are larger.
    const INFINITY: Self::Bits;
    /// Splits a slice into elements.
    fn elements(bytes: &[u8]) -> &[Self::Bytes];
    /// The bits without the sign.
    fn magnitude(bytes: Self::Bytes) -> Self::Bits;
    /// A finite magnitude as that of an f64; what is below the smallest scale may become anything else below it.
    fn widen(magnitude: Self::Bits) -> i64;
    /// For each scale byte and each of the codes 0 to 6, the largest magnitude that does not round to a larger code.
    fn limits() -> &'static [[Self::Bits; 7]];
    /// The code of an element, by the limits of its block's scale.
    fn code(bytes: Self::Bytes, limits: &[Self::Bits; 7]) -> Self::Bits;
    /// Two codes in a byte.
    fn pack(codes: [Self::Bits; 2]) -> u8;
}

macro_rules! element {
    ($name:ident, $bits:ty, $mantissa_bits:literal, $value:expr, $widen:expr) => {
        struct $name;

        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "limits are magnitudes, codes fit in four bits"
        )]
        impl Element for $name {
            type Bytes = [u8; size_of::<$bits>()];
            type Bits = $bits;
            const INFINITY: $bits = <$bits>::MAX >> $mantissa_bits << $mantissa_bits;

            #[inline(always)]
            fn elements(bytes: &[u8]) -> &[Self::Bytes] {
                let (elements, rest) = bytes.as_chunks();
                assert!(rest.is_empty(), "whole elements");
                elements
            }

            #[inline(always)]
            fn magnitude(bytes: Self::Bytes) -> $bits {
                <$bits>::from_le_bytes(bytes) & <$bits>::MAX
            }

            #[inline(always)]
            fn widen(magnitude: $bits) -> i64 {
                $widen(magnitude)
            }

            fn limits() -> &'static [[$bits; 7]] {
                static LIMITS: LazyLock<Vec<[$bits; 7]>> = LazyLock::new(|| {
                    let value = |magnitude: i64| $value((magnitude as $bits).cast_unsigned());
                    let rows = limits($name::INFINITY.into(), value);
                    rows.map(|row| row.map(|limit| limit as $bits)).collect()
                });
                &LIMITS
            }

            #[inline(always)]
            fn code(bytes: Self::Bytes, limits: &[$bits; 7]) -> $bits {
                let (bits, magnitude) = (<$bits>::from_le_bytes(bytes), Self::magnitude(bytes));
                let sign = bits >> (<$bits>::BITS - 1) & 8;
                let code = limits.iter().fold(sign, |code, &limit| code + <$bits>::from(magnitude > limit));
                // No code is larger. Without this, LLVM 22 narrows each comparison to bytes before it adds them up, which
                // takes twice the time (AVX2, 2 cores of an AMD EPYC, 2026-11-27).
                code.min(15)
            }

            #[inline(always)]
            fn pack(codes: [$bits; 2]) -> u8 {
                (codes[0] | codes[1] << 4) as u8
            }
        }
    };
}

element!(F64, i64, 52, f64::from_bits, |magnitude: i64| magnitude);
element!(F32, i32, 23, |bits| f64::from(f32::from_bits(bits)), |magnitude: i32| {
    (i64::from(magnitude) << (52 - 23)) + ((1023 - 127) << 52)
});
element!(Bf16, i16, 7, |bits| bf16::from_bits(bits).to_f64(), |magnitude: i16| {
    (i64::from(magnitude) << (52 - 7)) + ((1023 - 127) << 52)
});
element!(F16, i16, 10, |bits| f16::from_bits(bits).to_f64(), |magnitude: i16| {
    // Subnormals count 2^-24; they are not below the smallest scale.
    if magnitude < 1 << 10 {
        f64::from(magnitude).to_bits().cast_signed() - (24 << 52)
    } else {
        (i64::from(magnitude) << (52 - 10)) + ((1023 - 15) << 52)
    }
});

/// Finds the limits of [`Element::limits`] by bisection of the magnitudes below infinity, as [`encode_one`] rounds them.
fn limits(infinity: i64, value: impl Fn(i64) -> f64) -> impl Iterator<Item = [i64; 7]> {
    (0..=INFINITE_SCALE).map(move |scale| {
        let scale = 2f64.powi(i32::from(scale) - 127);
        std::array::from_fn(|code| {
            // Zero has code 0 and infinity code 7.
            let (mut limit, mut above) = (0, infinity);
            while above - limit > 1 {
                let middle = i64::midpoint(limit, above);
                let is_above = usize::from(encode_one(value(middle) / scale)) > code;
                *(if is_above { &mut above } else { &mut limit }) = middle;
            }
            limit
        })
    })
}

/// One block: the definition.
#[must_use]
pub fn encode_block(values: &[f64; MX_BLOCK_SIZE], rule: ScaleRule) -> ([u8; BLOCK_BYTES], u8) {
    if values.iter().any(|value| value.is_nan()) {
        return ([0; BLOCK_BYTES], NAN_SCALE);
    }
    let amax = values.iter().fold(0.0, |amax: f64, value| amax.max(value.abs()));
    let scale = scale_byte(amax, rule);
    let mut codes = [0; BLOCK_BYTES];
    for (pair, byte) in values.as_chunks::<2>().0.iter().zip(&mut codes) {
        let [even, odd] = pair.map(|value| encode_one(value / 2f64.powi(i32::from(scale) - 127)));
        *byte = even | odd << 4;
    }
    (codes, scale)
}

fn scale_byte(amax: f64, rule: ScaleRule) -> u8 {
    if amax.is_infinite() {
        return INFINITE_SCALE;
    }
    // The exponent field is floor(log2(amax)) + 1023; of zeros and subnormals it is 0, far below any scale.
    let exponent = (amax.to_bits() >> 52) as i32 - 1023;
    let mantissa = f64::from_bits(amax.to_bits() & ((1 << 52) - 1) | 1023 << 52); // in [1, 2)
    let up = match rule {
        ScaleRule::Floor => false,
        ScaleRule::Ceil => mantissa > 1.5,
        ScaleRule::Nearest => mantissa >= 1.75,
    };
    let byte = (exponent - 2 + i32::from(up) + 127).clamp(0, MAX_FINITE_SCALE);
    u8::try_from(byte).expect("clamped to a byte")
}

/// The code nearest to a value that was divided by its scale, ties to the even code; saturates at 6.
fn encode_one(scaled: f64) -> u8 {
    let magnitude = scaled.abs();
    // Halfway between neighbours; a tie goes up where the upper code is the even one.
    let mut code = 0u8;
    for (index, pair) in E2M1[..8].windows(2).enumerate() {
        let middle = f64::midpoint(f64::from(pair[0]), f64::from(pair[1]));
        let is_upper_even = index % 2 == 1;
        code += u8::from(magnitude > middle || is_upper_even && magnitude == middle);
    }
    code | u8::from(scaled.is_sign_negative()) << 3
}
