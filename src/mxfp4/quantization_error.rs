//! What encoding loses: squared and largest error against the source, in float64.
//!
//! Only basic arithmetic in a fixed order and exact sums of its results: the figures are the same bit for bit on every
//! machine, and whatever the order in which blocks are taken.

use std::f64::consts::{LN_2, LN_10, SQRT_2};
use std::fmt;

use half::f16;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{BLOCK_BYTES, MX_BLOCK_SIZE};
use crate::exact_sum::ExactSum;
use crate::simd::{Kernel, Level};

/// Error of one quantized tensor. Blocks with a NaN or an infinity are left out of all but the count of those.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationError {
    /// Mean squared error; None where there are no values, or where float64 cannot hold it.
    pub mse: Option<f64>,
    /// Ratio of the sums of squares of values and errors, in dB; None where the error is zero.
    pub sqnr_db: Option<f64>,
    /// Largest magnitude of an error.
    pub max_error: f64,
    /// Number of NaNs and infinities among the values.
    pub nonfinite: u64,
}

impl QuantizationError {
    /// Whether some quantization of so many values may have this error.
    #[must_use]
    pub fn is_possible(&self, values: u64) -> bool {
        let Self { mse, sqnr_db, max_error, nonfinite } = *self;
        let is_lossless = max_error == 0.0;
        // The mean of squares is at most the largest square; rounded a few times.
        let is_mean = |mse: f64| (0.0..=max_error * max_error * (1.0 + 1e-9)).contains(&mse);
        max_error >= 0.0
            && max_error.is_finite()
            && nonfinite <= values
            && mse.is_none_or(is_mean)
            && sqnr_db.is_none_or(f64::is_finite)
            && (!is_lossless || sqnr_db.is_none())
    }
}

impl fmt::Display for QuantizationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.sqnr_db, self.mse) {
            (Some(sqnr_db), _) => write!(f, "SQNR {sqnr_db:.2} dB, largest error {:.3e}", self.max_error)?,
            (None, Some(_)) => f.write_str("no error")?,
            (None, None) => f.write_str("no values to compare")?,
        }
        if self.nonfinite > 0 {
            write!(f, ", {} NaNs and infinities", self.nonfinite)?;
        }
        Ok(())
    }
}

/// The sums behind a [`QuantizationError`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ErrorSums {
    /// Squares of the values.
    signal: ExactSum,
    /// Squares of the errors.
    noise: ExactSum,
    /// Number of values in both.
    values: u64,
    max_error: f64,
    nonfinite: u64,
}

/// Blocks are scaled to magnitudes around one before they are squared; 2^±1000 and 2^∓1000 are normal floats.
const MAX_SCALE_EXPONENT: i32 = 1000;

impl ErrorSums {
    /// Adds blocks of 32 elements of `from` in `src`, which were encoded to these codes and scales.
    ///
    /// # Panics
    /// When `from` is not F64, F32, F16 or BF16, or the lengths of the slices disagree.
    pub fn add(&mut self, from: Dtype, src: &[u8], blocks: &[u8], scales: &[u8]) {
        self.add_with(Level::best(), from, src, blocks, scales);
    }

    /// [`ErrorSums::add`] with chosen vector instructions: all levels give the same sums.
    ///
    /// # Panics
    /// As [`ErrorSums::add`].
    pub fn add_with(&mut self, level: Level, from: Dtype, src: &[u8], blocks: &[u8], scales: &[u8]) {
        level.run(AddBlocks { sums: self, from, src, blocks, scales });
    }

    #[inline(always)]
    fn add_block(&mut self, values: &[f64; MX_BLOCK_SIZE], codes: &[u8; BLOCK_BYTES], scale: u8) {
        let amax = largest_of(values);
        if !amax.is_finite() {
            self.nonfinite += values.iter().filter(|value| !value.is_finite()).count() as u64;
            return;
        }
        let errors = errors_of(values, codes, scale);
        let largest = largest_of(&errors);
        // Squares of float64 can be beyond its range, but not those of magnitudes around one.
        let exponent = exponent_of(amax.max(largest)).clamp(-MAX_SCALE_EXPONENT, MAX_SCALE_EXPONENT);
        self.signal.add(sum_of_squares(values, -exponent), 2 * exponent);
        self.noise.add(sum_of_squares(&errors, -exponent), 2 * exponent);
        self.values += MX_BLOCK_SIZE as u64;
        self.max_error = self.max_error.max(largest);
    }

    /// Adds what other blocks lost.
    pub fn merge(&mut self, other: &Self) {
        self.signal.merge(&other.signal);
        self.noise.merge(&other.noise);
        self.values += other.values;
        self.max_error = self.max_error.max(other.max_error);
        self.nonfinite += other.nonfinite;
    }

    /// The figures that people read.
    #[must_use]
    pub fn error(&self) -> QuantizationError {
        let ((signal, signal_exponent), (noise, noise_exponent)) = (self.signal.total(), self.noise.total());
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
        let mean = noise / self.values as f64;
        QuantizationError {
            mse: Some(scaled(mean, noise_exponent)).filter(|mse| mse.is_finite()),
            sqnr_db: (noise > 0.0).then(|| decibels(signal / noise, signal_exponent - noise_exponent)),
            max_error: self.max_error,
            nonfinite: self.nonfinite,
        }
    }
}

/// [`ErrorSums::add_with`], to be compiled for each level.
struct AddBlocks<'a> {
    sums: &'a mut ErrorSums,
    from: Dtype,
    src: &'a [u8],
    blocks: &'a [u8],
    scales: &'a [u8],
}

impl Kernel for AddBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.from {
            Dtype::F64 => self.add(f64::from_le_bytes),
            Dtype::F32 => self.add(|bytes| f64::from(f32::from_le_bytes(bytes))),
            Dtype::F16 => self.add(|bytes| f16::from_le_bytes(bytes).to_f64()),
            Dtype::BF16 => self.add(|bytes| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))),
            other => panic!("{other} is no float dtype that is quantized"),
        }
    }
}

impl AddBlocks<'_> {
    #[inline(always)]
    fn add<const N: usize>(self, read: impl Fn([u8; N]) -> f64) {
        let (elements, blocks) = (self.src.as_chunks::<N>().0, self.blocks.as_chunks::<BLOCK_BYTES>().0);
        assert!(self.src.len() == self.scales.len() * MX_BLOCK_SIZE * N, "32 elements for each scale");
        assert!(self.blocks.len() == self.scales.len() * BLOCK_BYTES, "16 bytes for each scale");
        for ((elements, codes), &scale) in elements.as_chunks::<MX_BLOCK_SIZE>().0.iter().zip(blocks).zip(self.scales) {
            let mut values = [0.0; MX_BLOCK_SIZE];
            for (value, &element) in values.iter_mut().zip(elements) {
                *value = read(element);
            }
            self.sums.add_block(&values, codes, scale);
        }
    }
}

/// What is left of values when those that their codes mean are taken away.
#[inline(always)]
fn errors_of(values: &[f64; MX_BLOCK_SIZE], codes: &[u8; BLOCK_BYTES], scale: u8) -> [f64; MX_BLOCK_SIZE] {
    // Twice the magnitudes of E2M1, 0 to 12, in the order of their codes: a shift looks one up, in vectors too.
    const DOUBLES: u32 = 0xc864_3210;
    let half_scale = power_of_two(i32::from(scale) - 128);
    let mut unpacked = [0; MX_BLOCK_SIZE];
    super::unpack(codes, &mut unpacked);
    let mut errors = *values;
    for (error, code) in errors.iter_mut().zip(unpacked) {
        let code = u32::from(code);
        let magnitude = (DOUBLES >> (4 * (code & 7)) & 0xf).cast_signed();
        let doubled = if code & 8 == 0 { magnitude } else { -magnitude };
        *error -= f64::from(doubled) * half_scale;
    }
    errors
}

/// The largest magnitude; infinite or NaN where one value is.
#[inline(always)]
fn largest_of(values: &[f64; MX_BLOCK_SIZE]) -> f64 {
    // Floats that are not negative are in the order of their bits, with infinities and NaNs behind all numbers.
    let bits = by_halves(values, |value| value.abs().to_bits().cast_signed(), i64::max);
    f64::from_bits(bits.cast_unsigned())
}

/// Sum of the squares of `values * 2^exponent`.
#[inline(always)]
fn sum_of_squares(values: &[f64; MX_BLOCK_SIZE], exponent: i32) -> f64 {
    let factor = power_of_two(exponent);
    by_halves(values, |value| (value * factor) * (value * factor), |a, b| a + b)
}

/// What `join` makes of `of` every value: half by half, in vectors, and always in this order.
#[inline(always)]
fn by_halves<T: Copy + Default>(values: &[f64; MX_BLOCK_SIZE], of: impl Fn(f64) -> T, join: impl Fn(T, T) -> T) -> T {
    let mut joined = [T::default(); MX_BLOCK_SIZE];
    for (joined, &value) in joined.iter_mut().zip(values) {
        *joined = of(value);
    }
    for half in [16, 8, 4, 2, 1] {
        let (front, back) = joined.split_at_mut(half);
        for (front, &back) in front.iter_mut().zip(back.iter()) {
            *front = join(*front, back);
        }
    }
    joined[0]
}

/// 2^exponent for the exponents of normal floats.
fn power_of_two(exponent: i32) -> f64 {
    let field = u64::try_from(exponent + 1023).expect("at least that of the smallest normal float");
    f64::from_bits(field << 52)
}

/// floor(log2) of a positive normal float; of zeros and subnormals -1023.
fn exponent_of(value: f64) -> i32 {
    i32::try_from(value.to_bits() >> 52 & 0x7ff).expect("eleven bits") - 1023
}

/// `value * 2^exponent` for any exponent: infinite or zero beyond the range.
fn scaled(mut value: f64, mut exponent: i32) -> f64 {
    while exponent.abs() > MAX_SCALE_EXPONENT {
        let step = MAX_SCALE_EXPONENT * exponent.signum();
        value *= power_of_two(step);
        exponent -= step;
    }
    value * power_of_two(exponent)
}

/// 10 log10(ratio 2^exponent), without the logarithm of the system, whose last bits differ from one to the next.
///
/// ln m = 2 artanh t with t = (m - 1) / (m + 1); for m within sqrt(2) of one, t^2 < 0.03 and these terms are enough.
fn decibels(ratio: f64, exponent: i32) -> f64 {
    const TERMS: [f64; 13] = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0, 19.0, 21.0, 23.0, 25.0];
    let mut power = exponent_of(ratio);
    let mut mantissa = ratio * power_of_two(-power);
    if mantissa > SQRT_2 {
        (mantissa, power) = (mantissa / 2.0, power + 1);
    }
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let series = TERMS.iter().rev().fold(0.0, |sum, odd| sum * (t * t) + 1.0 / odd);
    10.0 / LN_10 * (2.0 * t * series + f64::from(power + exponent) * LN_2)
}
