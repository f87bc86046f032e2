//! Slices of floats whose dtype is known when a kernel runs.

use std::iter::zip;

/// bfloat16, as bits, or float32.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// bfloat16.
    Bf16(&'a [u16]),
    /// float32.
    F32(&'a [f32]),
}

impl<'a> Floats<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those from one on.
    #[inline(always)]
    pub(super) fn from(&self, first: usize) -> Floats<'a> {
        match self {
            Self::Bf16(values) => Floats::Bf16(&values[first..]),
            Self::F32(values) => Floats::F32(&values[first..]),
        }
    }

    /// One of them, exactly.
    ///
    /// # Panics
    /// When there are not so many.
    #[must_use]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::Bf16(values) => from_bf16(values[index]),
            Self::F32(values) => values[index],
        }
    }
}

/// bfloat16, as bits, or float32, to be written.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// bfloat16; values are rounded to nearest even.
    Bf16(&'a mut [u16]),
    /// float32.
    F32(&'a mut [f32]),
}

impl<'a> FloatsMut<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same, borrowed.
    pub(super) fn reborrow(&mut self) -> FloatsMut<'_> {
        match self {
            Self::Bf16(values) => FloatsMut::Bf16(values),
            Self::F32(values) => FloatsMut::F32(values),
        }
    }

    /// Writes all of them, from slices that stand behind each other.
    pub(super) fn write<'b>(&mut self, parts: impl IntoIterator<Item = &'b [f32]>) {
        let mut first = 0;
        for values in parts {
            match self {
                Self::Bf16(out) => zip(&mut out[first..], values).for_each(|(out, value)| *out = to_bf16(*value)),
                Self::F32(out) => out[first..first + values.len()].copy_from_slice(values),
            }
            first += values.len();
        }
        assert!(first == self.len(), "a value for each");
    }

    /// Makes all of them NaN.
    pub(super) fn fill_nan(&mut self) {
        match self {
            Self::Bf16(out) => out.fill(to_bf16(f32::NAN)),
            Self::F32(out) => out.fill(f32::NAN),
        }
    }

    /// In chunks of so many; the last may be shorter.
    pub(super) fn chunks(self, size: usize) -> Vec<FloatsMut<'a>> {
        match self {
            Self::Bf16(values) => values.chunks_mut(size).map(FloatsMut::Bf16).collect(),
            Self::F32(values) => values.chunks_mut(size).map(FloatsMut::F32).collect(),
        }
    }
}

/// The value of bits.
#[inline(always)]
pub(super) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounded to nearest even; NaN stays NaN. Without a branch, so that compilers vectorise it.
#[inline(always)]
pub(super) fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    ((if value.is_nan() { bits | 1 << 22 } else { rounded }) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        let patterns = (0..=u16::MAX).flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| (high, low)));
        for (high, low) in patterns {
            let value = f32::from_bits(u32::from(high) << 16 | low);
            assert_eq!(to_bf16(value), half::bf16::from_f32(value).to_bits(), "{:x}", value.to_bits());
        }
    }
}
