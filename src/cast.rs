//! Casts between float dtypes: round to nearest even, with counts of overflow and underflow.
//!
//! NaN stays NaN with its sign. An infinity in the source is not an overflow, a zero not an underflow.

use std::marker::PhantomData;

use half::{bf16, f16};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::simd::{Kernel, Level};

/// Float dtypes that can be cast to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32.
    F32,
}

/// What becomes of finite values that the target cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnOverflow {
    /// The job fails and says which tensor, how many values and the largest.
    #[default]
    Error,
    /// Infinities are stored, and reported.
    Warn,
    /// The largest finite value is stored, with the sign.
    Saturate,
}

impl OnOverflow {
    /// What this name means.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "error" => Self::Error,
            "warn" => Self::Warn,
            "saturate" => Self::Saturate,
            _ => {
                let (found, expected) = (format!("{name:?}"), "error, warn or saturate".into());
                return Err(Error::Argument { name: "on_overflow", found, expected });
            }
        })
    }
}

/// What a cast lost.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counts {
    /// Finite values beyond the target's range.
    pub overflow: u64,
    /// Values that became zero and were not.
    pub underflow: u64,
    /// Largest magnitude among the overflows.
    pub largest: f64,
}

impl Counts {
    /// Adds the counts of another stretch of the same tensor.
    pub fn merge(&mut self, other: Self) {
        self.overflow += other.overflow;
        self.underflow += other.underflow;
        self.largest = self.largest.max(other.largest);
    }
}

/// One value after the cast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounded {
    /// Bits in the target dtype.
    pub bits: u32,
    /// Finite before, beyond the target's range.
    pub overflows: bool,
    /// Not zero before, zero after.
    pub underflows: bool,
}

impl Target {
    /// The target with this dtype, if it is one.
    #[must_use]
    pub fn from_dtype(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// The dtype of the target.
    #[must_use]
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
            Self::F32 => Dtype::F32,
        }
    }

    /// Largest finite value.
    #[must_use]
    pub fn max(self) -> f64 {
        match self {
            Self::F16 => f16::MAX.to_f64(),
            Self::Bf16 => bf16::MAX.to_f64(),
            Self::F32 => f64::from(f32::MAX),
        }
    }

    /// Casts one value: what the loops below do to many.
    #[must_use]
    pub fn round(self, value: f64, on_overflow: OnOverflow) -> Rounded {
        let mut out = [0; 4];
        let counts = match self {
            Self::F16 => cast_slice::<F64, F16>(&value.to_le_bytes(), &mut out[..2], on_overflow),
            Self::Bf16 => cast_slice::<F64, Bf16>(&value.to_le_bytes(), &mut out[..2], on_overflow),
            Self::F32 => cast_slice::<F64, F32>(&value.to_le_bytes(), &mut out, on_overflow),
        };
        Rounded { bits: u32::from_le_bytes(out), overflows: counts.overflow > 0, underflows: counts.underflow > 0 }
    }
}

/// True for the dtypes that a `precision` casts: F64, F32, F16 and BF16.
#[must_use]
pub fn is_castable(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Casts little-endian elements of `from` in `src` to `to` in `dst`.
///
/// # Panics
/// When `from` is not a float dtype of [`is_castable`], or the two slices hold different numbers of elements.
pub fn cast(from: Dtype, to: Target, src: &[u8], dst: &mut [u8], on_overflow: OnOverflow) -> Counts {
    cast_with(Level::best(), from, to, src, dst, on_overflow)
}

/// [`cast`] with chosen vector instructions: all levels give the same bytes and counts.
///
/// # Panics
/// As [`cast`].
pub fn cast_with(level: Level, from: Dtype, to: Target, src: &[u8], dst: &mut [u8], on_overflow: OnOverflow) -> Counts {
    macro_rules! run {
        ($source:ty, $target:ty) => {
            level.run(CastSlice { src, dst, on_overflow, dtypes: PhantomData::<($source, $target)> })
        };
    }
    match (from, to) {
        (Dtype::F64, Target::F16) => run!(F64, F16),
        (Dtype::F64, Target::Bf16) => run!(F64, Bf16),
        (Dtype::F64, Target::F32) => run!(F64, F32),
        (Dtype::F32, Target::F16) => run!(F32, F16),
        (Dtype::F32, Target::Bf16) => run!(F32, Bf16),
        (Dtype::F16, Target::Bf16) => run!(F16, Bf16),
        (Dtype::F16, Target::F32) => run!(F16, F32),
        (Dtype::BF16, Target::F16) => run!(Bf16, F16),
        (Dtype::BF16, Target::F32) => run!(Bf16, F32),
        (from, to) => panic!("no cast from {from} to {to:?}: plans copy equal dtypes"),
    }
}

/// Narrows little-endian 64-bit integers of `from` in `src` to 32 bits in `dst`. Values beyond the range become the
/// nearest that is in it, and are counted.
///
/// # Panics
/// When `from` is neither I64 nor U64, or the two slices hold different numbers of elements.
pub fn narrow(from: Dtype, src: &[u8], dst: &mut [u8]) -> Counts {
    let (src, dst) = (whole::<8>(src), whole_mut::<4>(dst));
    assert_eq!(src.len(), dst.len(), "source and target hold the same number of elements");
    let mut counts = Counts::default();
    for (&element, out) in src.iter().zip(dst) {
        let value = match from {
            Dtype::I64 => i128::from(i64::from_le_bytes(element)),
            Dtype::U64 => i128::from(u64::from_le_bytes(element)),
            other => panic!("{other} is no 64-bit integer"),
        };
        let kept = match from {
            Dtype::I64 => value.clamp(i32::MIN.into(), i32::MAX.into()),
            _ => value.min(u32::MAX.into()),
        };
        if kept != value {
            counts.overflow += 1;
            #[expect(clippy::cast_precision_loss, reason = "a magnitude for messages")]
            let magnitude = value.unsigned_abs() as f64;
            counts.largest = counts.largest.max(magnitude);
        }
        // The low half of a 64-bit integer within the range is the 32-bit one.
        out.copy_from_slice(&kept.to_le_bytes()[..4]);
    }
    counts
}

/// A source dtype. Elements are read as an f32 from which every target rounds as from the value itself.
trait Source {
    /// Bytes of an element.
    type Bytes: Copy;
    /// Splits a slice into elements.
    fn elements(bytes: &[u8]) -> &[Self::Bytes];
    /// The element itself, for reports.
    fn value(bytes: Self::Bytes) -> f64;
    /// The element as f32, exact for the narrow dtypes, rounded to odd for F64 if the target is narrower than f32.
    fn read<T: Stored>(bytes: Self::Bytes) -> f32;
    /// Whether the element is finite.
    fn is_finite(bytes: Self::Bytes) -> bool;
    /// Whether the element is not zero.
    fn is_nonzero(bytes: Self::Bytes) -> bool;
}

/// A target dtype.
pub(crate) trait Stored {
    /// Bytes of an element.
    type Bytes: Copy;
    /// True for f32, into which an F64 is rounded once and directly.
    const IS_F32: bool;
    /// Splits a slice into elements.
    fn elements(bytes: &mut [u8]) -> &mut [Self::Bytes];
    /// The bytes of elements.
    fn bytes(elements: &mut [Self::Bytes]) -> &mut [u8];
    /// Rounds to nearest even.
    fn round(value: f32) -> Self::Bytes;
    /// Whether the stored element is an infinity.
    fn is_infinite(bytes: Self::Bytes) -> bool;
    /// Whether the stored element is a zero.
    fn is_zero(bytes: Self::Bytes) -> bool;
    /// The largest finite element with the sign of `bytes`.
    fn saturated(bytes: Self::Bytes) -> Self::Bytes;
}

struct F64;
pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

/// Elements between two looks at the counts: small enough for L1, long enough for vectors.
const BLOCK_ELEMS: usize = 1024;

struct CastSlice<'a, S, T> {
    src: &'a [u8],
    dst: &'a mut [u8],
    on_overflow: OnOverflow,
    dtypes: PhantomData<(S, T)>,
}

impl<S: Source, T: Stored> Kernel for CastSlice<'_, S, T> {
    type Output = Counts;

    #[inline(always)]
    fn run(self) -> Counts {
        cast_slice::<S, T>(self.src, self.dst, self.on_overflow)
    }
}

#[inline(always)]
fn cast_slice<S: Source, T: Stored>(src: &[u8], dst: &mut [u8], on_overflow: OnOverflow) -> Counts {
    let (src, dst) = (S::elements(src), T::elements(dst));
    assert_eq!(src.len(), dst.len(), "source and target hold the same number of elements");
    let mut counts = Counts::default();
    for (src, dst) in src.chunks(BLOCK_ELEMS).zip(dst.chunks_mut(BLOCK_ELEMS)) {
        let (mut overflow, mut underflow) = (0u32, 0u32);
        for (&element, out) in src.iter().zip(dst.iter_mut()) {
            *out = T::round(S::read::<T>(element));
            overflow += u32::from(T::is_infinite(*out) & S::is_finite(element));
            underflow += u32::from(T::is_zero(*out) & S::is_nonzero(element));
        }
        counts.underflow += u64::from(underflow);
        if overflow > 0 {
            counts.overflow += u64::from(overflow);
            for (&element, out) in src.iter().zip(dst.iter_mut()) {
                if T::is_infinite(*out) && S::is_finite(element) {
                    counts.largest = counts.largest.max(S::value(element).abs());
                    if on_overflow == OnOverflow::Saturate {
                        *out = T::saturated(*out);
                    }
                }
            }
        }
    }
    counts
}

/// Splits bytes into whole elements.
fn whole<const N: usize>(bytes: &[u8]) -> &[[u8; N]] {
    let (elements, rest) = bytes.as_chunks();
    assert!(rest.is_empty(), "whole elements");
    elements
}

/// Splits bytes into whole elements to be written.
fn whole_mut<const N: usize>(bytes: &mut [u8]) -> &mut [[u8; N]] {
    let (elements, rest) = bytes.as_chunks_mut();
    assert!(rest.is_empty(), "whole elements");
    elements
}

impl Source for F64 {
    type Bytes = [u8; 8];
    fn elements(bytes: &[u8]) -> &[[u8; 8]] {
        whole(bytes)
    }
    fn value(bytes: [u8; 8]) -> f64 {
        f64::from_le_bytes(bytes)
    }
    #[inline]
    fn read<T: Stored>(bytes: [u8; 8]) -> f32 {
        let value = f64::from_le_bytes(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "the rounding is the purpose")]
        let nearest = value as f32;
        if T::IS_F32 { nearest } else { to_odd(value, nearest) }
    }
    #[inline]
    fn is_finite(bytes: [u8; 8]) -> bool {
        f64::from_le_bytes(bytes).is_finite()
    }
    #[inline]
    fn is_nonzero(bytes: [u8; 8]) -> bool {
        f64::from_le_bytes(bytes) != 0.0
    }
}

/// Rounds to odd: of the two floats around `value`, the one whose last bit is set.
///
/// A second rounding to a dtype with at least two bits fewer then gives what one rounding would have given
/// (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008); f16 and bf16 have 13 and 16 fewer.
#[inline]
fn to_odd(value: f64, nearest: f32) -> f32 {
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    if back == value || value.is_nan() || bits & 1 == 1 {
        return nearest;
    }
    // The neighbour on the other side of the value. An overflow to infinity steps back to the largest finite float,
    // which is odd; an underflow to zero steps up to the smallest subnormal with the sign that zero carries.
    if back.abs() > value.abs() { f32::from_bits(bits - 1) } else { f32::from_bits(bits + 1) }
}

impl Source for F32 {
    type Bytes = [u8; 4];
    fn elements(bytes: &[u8]) -> &[[u8; 4]] {
        whole(bytes)
    }
    fn value(bytes: [u8; 4]) -> f64 {
        f64::from(f32::from_le_bytes(bytes))
    }
    #[inline]
    fn read<T: Stored>(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }
    #[inline]
    fn is_finite(bytes: [u8; 4]) -> bool {
        u32::from_le_bytes(bytes) & 0x7fff_ffff < 0x7f80_0000
    }
    #[inline]
    fn is_nonzero(bytes: [u8; 4]) -> bool {
        u32::from_le_bytes(bytes) & 0x7fff_ffff != 0
    }
}

impl Source for F16 {
    type Bytes = [u8; 2];
    fn elements(bytes: &[u8]) -> &[[u8; 2]] {
        whole(bytes)
    }
    fn value(bytes: [u8; 2]) -> f64 {
        f16::from_le_bytes(bytes).to_f64()
    }
    #[inline]
    fn read<T: Stored>(bytes: [u8; 2]) -> f32 {
        // 2^112 moves the exponent bias from 15 to 127, subnormals included; infinities and NaNs get theirs by hand.
        const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
        let half = u32::from(u16::from_le_bytes(bytes));
        let (sign, magnitude) = ((half & 0x8000) << 16, half & 0x7fff);
        let finite = (f32::from_bits(magnitude << 13) * REBIAS).to_bits();
        let special = magnitude << 13 | 0x7f80_0000;
        f32::from_bits(sign | if magnitude < 0x7c00 { finite } else { special })
    }
    #[inline]
    fn is_finite(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) & 0x7fff < 0x7c00
    }
    #[inline]
    fn is_nonzero(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) & 0x7fff != 0
    }
}

impl Source for Bf16 {
    type Bytes = [u8; 2];
    fn elements(bytes: &[u8]) -> &[[u8; 2]] {
        whole(bytes)
    }
    fn value(bytes: [u8; 2]) -> f64 {
        bf16::from_le_bytes(bytes).to_f64()
    }
    #[inline]
    fn read<T: Stored>(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }
    #[inline]
    fn is_finite(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) & 0x7fff < 0x7f80
    }
    #[inline]
    fn is_nonzero(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) & 0x7fff != 0
    }
}

impl Stored for F32 {
    type Bytes = [u8; 4];
    const IS_F32: bool = true;
    fn elements(bytes: &mut [u8]) -> &mut [[u8; 4]] {
        whole_mut(bytes)
    }
    fn bytes(elements: &mut [[u8; 4]]) -> &mut [u8] {
        elements.as_flattened_mut()
    }
    #[inline]
    fn round(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }
    #[inline]
    fn is_infinite(bytes: [u8; 4]) -> bool {
        u32::from_le_bytes(bytes) & 0x7fff_ffff == 0x7f80_0000
    }
    #[inline]
    fn is_zero(bytes: [u8; 4]) -> bool {
        u32::from_le_bytes(bytes) << 1 == 0
    }
    fn saturated(bytes: [u8; 4]) -> [u8; 4] {
        (u32::from_le_bytes(bytes) & 0x8000_0000 | f32::MAX.to_bits()).to_le_bytes()
    }
}

impl Stored for F16 {
    type Bytes = [u8; 2];
    const IS_F32: bool = false;
    fn elements(bytes: &mut [u8]) -> &mut [[u8; 2]] {
        whole_mut(bytes)
    }
    fn bytes(elements: &mut [[u8; 2]]) -> &mut [u8] {
        elements.as_flattened_mut()
    }
    #[inline]
    fn round(value: f32) -> [u8; 2] {
        // Bits of 2^-14, the smallest normal f16, and of 2^16, from which on everything is infinite.
        const MIN_NORMAL: u32 = 113 << 23;
        const INFINITE: u32 = 143 << 23;
        // Adding 0.5 leaves the mantissa of a subnormal f16 in the last bits, rounded by the addition itself.
        const HALF: f32 = 0.5;
        let bits = value.to_bits();
        let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
        let subnormal = (f32::from_bits(magnitude) + HALF).to_bits().wrapping_sub(HALF.to_bits());
        // Exponent bias from 127 to 15, then half a unit less one, plus the bit that breaks ties to even.
        let rebiased = magnitude.wrapping_sub(112 << 23);
        let normal = rebiased.wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13;
        let nan = 0x7e00 | magnitude >> 13 & 0x3ff;
        let finite = if magnitude < MIN_NORMAL { subnormal } else { normal };
        let large = if magnitude > 0x7f80_0000 { nan } else { 0x7c00 };
        let magnitude = if magnitude < INFINITE { finite } else { large };
        #[expect(clippy::cast_possible_truncation, reason = "sixteen bits are left")]
        let half = (sign | magnitude) as u16;
        half.to_le_bytes()
    }
    #[inline]
    fn is_infinite(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) & 0x7fff == 0x7c00
    }
    #[inline]
    fn is_zero(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) << 1 == 0
    }
    fn saturated(bytes: [u8; 2]) -> [u8; 2] {
        (u16::from_le_bytes(bytes) & 0x8000 | f16::MAX.to_bits()).to_le_bytes()
    }
}

impl Stored for Bf16 {
    type Bytes = [u8; 2];
    const IS_F32: bool = false;
    fn elements(bytes: &mut [u8]) -> &mut [[u8; 2]] {
        whole_mut(bytes)
    }
    fn bytes(elements: &mut [[u8; 2]]) -> &mut [u8] {
        elements.as_flattened_mut()
    }
    #[inline]
    fn round(value: f32) -> [u8; 2] {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let nan = bits >> 16 | 0x40;
        let result = if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded };
        #[expect(clippy::cast_possible_truncation, reason = "sixteen bits are left")]
        let half = result as u16;
        half.to_le_bytes()
    }
    #[inline]
    fn is_infinite(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) & 0x7fff == 0x7f80
    }
    #[inline]
    fn is_zero(bytes: [u8; 2]) -> bool {
        u16::from_le_bytes(bytes) << 1 == 0
    }
    fn saturated(bytes: [u8; 2]) -> [u8; 2] {
        (u16::from_le_bytes(bytes) & 0x8000 | bf16::MAX.to_bits()).to_le_bytes()
    }
}
