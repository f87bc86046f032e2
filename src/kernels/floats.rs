//! Slices of floats whose dtype is known when a kernel runs.

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

    /// Writes all of them.
    pub(super) fn copy_from(&mut self, values: impl IntoIterator<Item = f32>) {
        match self {
            Self::Bf16(out) => std::iter::zip(out.iter_mut(), values).for_each(|(out, value)| *out = to_bf16(value)),
            Self::F32(out) => std::iter::zip(out.iter_mut(), values).for_each(|(out, value)| *out = value),
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

/// Rounded to nearest even; NaN stays NaN.
#[inline(always)]
pub(super) fn to_bf16(value: f32) -> u16 {
    half::bf16::from_f32(value).to_bits()
}
