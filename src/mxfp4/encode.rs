//! Whole blocks of floats to codes and scales.

use std::marker::PhantomData;

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
        for ((group, block), scale) in groups.iter().zip(blocks).zip(self.scales) {
            let amax = group.iter().fold(E::Bits::default(), |amax, &element| amax.max(E::magnitude(element)));
            if amax > E::INFINITY {
                (*block, *scale) = ([0; BLOCK_BYTES], NAN_SCALE);
                continue;
            }
            *scale = scale_byte(E::value(amax), self.rule);
            let limits = E::limits(*scale);
            let mut codes = [0; MX_BLOCK_SIZE];
            for (code, &element) in codes.iter_mut().zip(group) {
                *code = E::code(element, limits);
            }
            for (byte, pair) in block.iter_mut().zip(codes.as_chunks::<2>().0) {
                *byte = pair[0] | pair[1] << 4;
            }
        }
    }
}

/// A dtype that is quantized. Everything is done on the bits of its elements, as signed integers of the dtype's own width:
/// without the sign they sort as the magnitudes do. So subnormals take no other way than all others, nothing is rounded,
/// and vectors hold as many elements as they can.
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
    /// What a magnitude stands for.
    fn value(magnitude: Self::Bits) -> f64;
    /// For each of the codes 0 to 6 the largest magnitude that rounds to no larger code, under a scale byte.
    fn limits(scale: u8) -> &'static [Self::Bits; 7];
    /// The code of an element: it counts the limits that its magnitude exceeds.
    fn code(bytes: Self::Bytes, limits: &[Self::Bits; 7]) -> u8;
}

macro_rules! element {
    ($name:ident, $bits:ty, $mantissa_bits:literal, $value:expr) => {
        struct $name;

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
            fn value(magnitude: $bits) -> f64 {
                $value(magnitude)
            }

            #[inline(always)]
            fn limits(scale: u8) -> &'static [$bits; 7] {
                static LIMITS: [[$bits; 7]; 256] = {
                    let mut limits = [[0; 7]; 256];
                    let mut scale = 0;
                    while scale < 256 {
                        let mut code = 0;
                        while code < 7 {
                            limits[scale][code] = limit($mantissa_bits, <$name>::INFINITY as i64, scale, code) as $bits;
                            code += 1;
                        }
                        scale += 1;
                    }
                    limits
                };
                &LIMITS[usize::from(scale)]
            }

            #[inline(always)]
            fn code(bytes: Self::Bytes, limits: &[$bits; 7]) -> u8 {
                let (bits, magnitude) = (<$bits>::from_le_bytes(bytes), Self::magnitude(bytes));
                let sign = bits >> (<$bits>::BITS - 1) & 8;
                limits.iter().fold(sign, |code, &limit| code + <$bits>::from(magnitude > limit)) as u8
            }
        }
    };
}

element!(F64, i64, 52, |magnitude: i64| f64::from_bits(magnitude.cast_unsigned()));
element!(F32, i32, 23, |magnitude: i32| f64::from(f32::from_bits(magnitude.cast_unsigned())));
element!(F16, i16, 10, |magnitude: i16| f16::from_bits(magnitude.cast_unsigned()).to_f64());
element!(Bf16, i16, 7, |magnitude: i16| bf16::from_bits(magnitude.cast_unsigned()).to_f64());

/// Largest magnitude that rounds to `code` or less under a scale byte, as bits of a float with so many bits of mantissa.
const fn limit(mantissa_bits: i32, infinity: i64, scale: usize, code: usize) -> i64 {
    /// Halfway between the codes' magnitudes, in quarters.
    const MIDDLES: [i64; 7] = [1, 3, 5, 7, 10, 14, 20];
    let middle = MIDDLES[code];
    // The middle is `middle` 2^exponent; `log2` is the exponent of its leading bit.
    let exponent = scale as i32 - 127 - 2;
    let log2 = exponent + middle.ilog2() as i32;
    let max_exponent = (infinity >> mantissa_bits) as i32 / 2;
    let min_exponent = 1 - max_exponent;
    // The largest magnitude up to the middle, and whether it is the middle itself.
    let (below, is_exact) = if log2 > max_exponent {
        (infinity - 1, false)
    } else if log2 >= min_exponent {
        let mantissa = middle << (mantissa_bits - middle.ilog2() as i32);
        // The leading bit of the mantissa adds one to the exponent field.
        ((((log2 - min_exponent) as i64) << mantissa_bits) + mantissa, true)
    } else {
        // Subnormals are multiples of 2^(min_exponent - mantissa_bits).
        let shift = min_exponent - mantissa_bits - exponent;
        if shift <= 0 {
            (middle << -shift, true)
        } else if shift < 64 {
            (middle >> shift, middle >> shift << shift == middle)
        } else {
            (0, false)
        }
    };
    // A tie goes up where the upper code is the even one.
    if is_exact && code % 2 == 1 { below - 1 } else { below }
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
    #[expect(clippy::cast_possible_truncation, reason = "eleven bits")]
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
