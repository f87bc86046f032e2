//! Statistics of tensor values of every dtype.

use half::{bf16, f16};
use safetensors::Dtype;
use serde::Serialize;

use crate::mxfp4::{self, E2M1};

/// Statistics of the finite values of a tensor; None where there are none, or where the dtype has no order.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stats {
    /// Smallest.
    pub min: Option<f64>,
    /// Largest.
    pub max: Option<f64>,
    /// Mean.
    pub mean: Option<f64>,
    /// Population standard deviation.
    pub std: Option<f64>,
    /// Number of NaNs.
    pub nan: u64,
    /// Number of infinities.
    pub inf: u64,
}

/// Count, mean and sum of squared deviations of finite values, merged as Chan, Golub and `LeVeque` (1983) do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moments {
    count: u64,
    mean: f64,
    squares: f64,
    min: f64,
    max: f64,
    nan: u64,
    inf: u64,
}

impl Default for Moments {
    fn default() -> Self {
        Self { count: 0, mean: 0.0, squares: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY, nan: 0, inf: 0 }
    }
}

impl Moments {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        const BLOCK: usize = 4096;
        let mut moments = Self::default();
        let mut block = Vec::with_capacity(BLOCK);
        for value in values {
            if value.is_finite() {
                block.push(value);
                if block.len() == BLOCK {
                    moments.merge(&Self::of_block(&block));
                    block.clear();
                }
            } else if value.is_nan() {
                moments.nan += 1;
            } else {
                moments.inf += 1;
            }
        }
        moments.merge(&Self::of_block(&block));
        moments
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    fn of_block(block: &[f64]) -> Self {
        let mut moments = Self { count: block.len() as u64, ..Self::default() };
        if block.is_empty() {
            return moments;
        }
        // Scaled before summing, so that the sum of large doubles stays finite.
        moments.mean = block.iter().map(|value| value / block.len() as f64).sum();
        moments.squares = block.iter().map(|value| (value - moments.mean).powi(2)).sum();
        for &value in block {
            moments.min = moments.min.min(value);
            moments.max = moments.max.max(value);
        }
        moments
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    /// Adds the moments of other values.
    pub fn merge(&mut self, other: &Self) {
        self.nan += other.nan;
        self.inf += other.inf;
        if other.count == 0 {
            return;
        }
        let total = self.count + other.count;
        let (of_self, of_other) = (self.count as f64, other.count as f64);
        let delta = other.mean - self.mean;
        // Weighted rather than moved by delta, which can overflow for large doubles.
        self.mean = self.mean * (of_self / total as f64) + other.mean * (of_other / total as f64);
        self.squares += other.squares + delta * delta * (of_self * of_other / total as f64);
        self.count = total;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    /// The statistics that people read.
    pub fn stats(self) -> Stats {
        let known = |value: f64| (self.count > 0).then_some(value);
        Stats {
            min: known(self.min),
            max: known(self.max),
            mean: known(self.mean),
            std: known((self.squares / self.count as f64).sqrt()),
            nan: self.nan,
            inf: self.inf,
        }
    }
}

/// Moments of whole elements. Complex values have no order, and the order of float6 codes in a byte is not defined.
pub(crate) fn moments_of(dtype: Dtype, bytes: &[u8]) -> Moments {
    macro_rules! numbers {
        ($type:ty, $width:literal) => {{
            #[allow(clippy::cast_precision_loss, clippy::cast_lossless, reason = "statistics are approximate")]
            let moments =
                Moments::of(bytes.as_chunks::<$width>().0.iter().map(|&chunk| <$type>::from_le_bytes(chunk) as f64));
            moments
        }};
    }
    let by_table = |decode: &dyn Fn(u8) -> f64| {
        let table: Vec<f64> = (0..=255).map(decode).collect();
        Moments::of(bytes.iter().map(|&byte| table[usize::from(byte)]))
    };
    match dtype {
        Dtype::BOOL => Moments::of(bytes.iter().map(|&byte| f64::from(u8::from(byte != 0)))),
        Dtype::U8 => numbers!(u8, 1),
        Dtype::I8 => numbers!(i8, 1),
        Dtype::I16 => numbers!(i16, 2),
        Dtype::U16 => numbers!(u16, 2),
        Dtype::I32 => numbers!(i32, 4),
        Dtype::U32 => numbers!(u32, 4),
        Dtype::I64 => numbers!(i64, 8),
        Dtype::U64 => numbers!(u64, 8),
        Dtype::F32 => numbers!(f32, 4),
        Dtype::F64 => numbers!(f64, 8),
        Dtype::F16 => Moments::of(bytes.as_chunks().0.iter().map(|&chunk| f16::from_le_bytes(chunk).to_f64())),
        Dtype::BF16 => Moments::of(bytes.as_chunks().0.iter().map(|&chunk| bf16::from_le_bytes(chunk).to_f64())),
        Dtype::F4 => {
            let nibbles = bytes.iter().flat_map(|byte| [byte & 0xf, byte >> 4]);
            Moments::of(nibbles.map(|code| f64::from(E2M1[usize::from(code)])))
        }
        Dtype::F8_E8M0 => by_table(&|byte| mxfp4::decode_one(2, byte)),
        Dtype::F8_E5M2 => by_table(&|byte| float8(byte, 2, 15, Specials::Ieee)),
        Dtype::F8_E4M3 => by_table(&|byte| float8(byte, 3, 7, Specials::NanOnly)),
        Dtype::F8_E4M3FNUZ => by_table(&|byte| float8(byte, 3, 8, Specials::NegativeZeroIsNan)),
        Dtype::F8_E5M2FNUZ => by_table(&|byte| float8(byte, 2, 16, Specials::NegativeZeroIsNan)),
        _ => Moments::default(),
    }
}

/// Which codes of an 8-bit float are not numbers.
#[derive(Clone, Copy, PartialEq)]
enum Specials {
    /// The largest exponent holds infinities and NaNs.
    Ieee,
    /// All bits set is NaN.
    NanOnly,
    /// The code of negative zero is NaN.
    NegativeZeroIsNan,
}

/// Value of an 8-bit float.
fn float8(byte: u8, mantissa_bits: u32, bias: i32, specials: Specials) -> f64 {
    let magnitude = byte & 0x7f;
    let exponent = i32::from(magnitude >> mantissa_bits);
    let mantissa = magnitude & ((1 << mantissa_bits) - 1);
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let is_last_exponent = magnitude >> mantissa_bits == 0x7f >> mantissa_bits;
    match specials {
        Specials::Ieee if is_last_exponent && mantissa == 0 => return sign * f64::INFINITY,
        Specials::Ieee if is_last_exponent => return f64::NAN,
        Specials::NanOnly if magnitude == 0x7f => return f64::NAN,
        Specials::NegativeZeroIsNan if byte == 0x80 => return f64::NAN,
        _ => {}
    }
    let fraction = f64::from(mantissa) / f64::from(1u32 << mantissa_bits);
    let (significand, exponent) = if exponent == 0 { (fraction, 1) } else { (1.0 + fraction, exponent) };
    sign * significand * 2f64.powi(exponent - bias)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_merge_as_if_read_at_once() {
        let values: Vec<f64> = (0..10_000).map(|i| f64::from(i * i % 977) - 300.0).collect();
        let whole = Moments::of(values.iter().copied()).stats();
        let mut merged = Moments::default();
        for part in values.chunks(313) {
            merged.merge(&Moments::of(part.iter().copied()));
        }
        let merged = merged.stats();
        assert_eq!((whole.min, whole.max), (merged.min, merged.max));
        assert!((whole.std.unwrap() - merged.std.unwrap()).abs() < 1e-9);
        let mean = values.iter().sum::<f64>() / 1e4;
        assert!((whole.mean.unwrap() - mean).abs() < 1e-9);
    }

    #[test]
    fn non_finite_values_are_counted_apart() {
        let stats = Moments::of([f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 2.0].into_iter()).stats();
        assert_eq!((stats.nan, stats.inf, stats.min, stats.max), (1, 2, Some(2.0), Some(2.0)));
        assert_eq!(Moments::default().stats().mean, None);
    }

    #[test]
    fn eight_bit_floats_have_their_landmarks() {
        assert_eq!(float8(0x7e, 3, 7, Specials::NanOnly), 448.0);
        assert!(float8(0x7f, 3, 7, Specials::NanOnly).is_nan());
        assert_eq!(float8(0x7b, 2, 15, Specials::Ieee), 57344.0);
        assert_eq!(float8(0xfc, 2, 15, Specials::Ieee), f64::NEG_INFINITY);
        assert_eq!(float8(0x7f, 3, 8, Specials::NegativeZeroIsNan), 240.0);
        assert!(float8(0x80, 2, 16, Specials::NegativeZeroIsNan).is_nan());
        assert_eq!(float8(0x01, 3, 7, Specials::NanOnly), 2f64.powi(-9));
    }
}
