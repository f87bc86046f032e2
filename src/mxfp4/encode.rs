//! Whole blocks of floats to codes and scales.

use half::{bf16, f16};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{BLOCK_BYTES, E2M1, MX_BLOCK_SIZE};

/// Which power of two becomes the scale of a block. All rules begin with the exponent floor(log2(amax)) - 2, where amax is
/// the block's largest magnitude, and may add one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
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
    let itemsize = from.bitsize() / 8;
    assert!(src.len() == scales.len() * MX_BLOCK_SIZE * itemsize, "32 elements for each scale");
    let (blocks, rest) = blocks.as_chunks_mut::<BLOCK_BYTES>();
    assert!(rest.is_empty() && blocks.len() == scales.len(), "16 bytes for each scale");
    for ((elements, codes), scale) in src.chunks_exact(MX_BLOCK_SIZE * itemsize).zip(blocks).zip(scales) {
        let mut values = [0.0; MX_BLOCK_SIZE];
        for (value, element) in values.iter_mut().zip(elements.chunks_exact(itemsize)) {
            *value = read(from, element);
        }
        (*codes, *scale) = encode_block(&values, rule);
    }
}

fn read(from: Dtype, element: &[u8]) -> f64 {
    let whole = "as long as an element of its dtype";
    match from {
        Dtype::F64 => f64::from_le_bytes(element.try_into().expect(whole)),
        Dtype::F32 => f32::from_le_bytes(element.try_into().expect(whole)).into(),
        Dtype::F16 => f16::from_le_bytes(element.try_into().expect(whole)).into(),
        Dtype::BF16 => bf16::from_le_bytes(element.try_into().expect(whole)).into(),
        other => panic!("{other} is no float dtype that is quantized"),
    }
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
