//! Blocks of a matrix, or of a stack of them, and where their scales stand. Pure.

use std::ops::Range;

use safetensors::Dtype;
use serde_json::Value;

/// Rows and columns that share one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Rows of a block.
    pub rows: u64,
    /// Columns of a block.
    pub columns: u64,
}

impl Default for BlockSize {
    /// 128 x 128, what DeepSeek-V3 has.
    fn default() -> Self {
        Self { rows: 128, columns: 128 }
    }
}

impl BlockSize {
    /// The size that a configuration gives as `[rows, columns]`; None if that makes no sense.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        let [rows, columns] = value.as_array()?.as_slice() else { return None };
        let positive = |value: &Value| value.as_u64().filter(|&size| size > 0);
        Some(Self { rows: positive(rows)?, columns: positive(columns)? })
    }
}

/// Dtypes of scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleDtype {
    /// bfloat16.
    Bf16,
    /// IEEE binary32.
    F32,
}

impl ScaleDtype {
    /// The one of this dtype, if scales can have it.
    #[must_use]
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// Bytes of a scale.
    #[must_use]
    pub fn nbytes(self) -> u64 {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// How a weight is divided into blocks. Its values are counted in row-major order, through the whole stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Rows of a matrix.
    pub rows: u64,
    /// Its columns.
    pub columns: u64,
    /// Size of its blocks; those at the ends are smaller where it does not divide evenly.
    pub size: BlockSize,
    /// Dtype of the scales.
    pub scale_dtype: ScaleDtype,
}

/// Consecutive values, and the consecutive scales that hold theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// Values, from the first of the weight.
    pub values: Range<u64>,
    /// Scales, from the first of the scales.
    pub scales: Range<u64>,
}

impl Blocks {
    /// Rows of the scales of a matrix.
    #[must_use]
    pub fn scale_rows(&self) -> u64 {
        self.rows.div_ceil(self.size.rows)
    }

    /// Columns of the scales.
    #[must_use]
    pub fn scale_columns(&self) -> u64 {
        self.columns.div_ceil(self.size.columns)
    }

    /// Bytes of scales for each value, rounded up: no stretch of whole rows has more.
    pub(crate) fn scale_bytes_per_value(&self) -> u64 {
        self.scale_columns().saturating_mul(self.scale_dtype.nbytes()).div_ceil(self.columns.max(1))
    }

    /// The first scale of a row, which is counted through the whole stack.
    pub(crate) fn first_scale(&self, row: u64) -> u64 {
        (row / self.rows * self.scale_rows() + row % self.rows / self.size.rows) * self.scale_columns()
    }

    /// Divides values in stretches: whole rows, and what is before and behind them. So the scales of a stretch are not many
    /// more than those of its values, however long the rows are.
    pub fn stretches(&self, values: Range<u64>) -> impl Iterator<Item = Stretch> {
        let columns = self.columns.max(1);
        // Ends of the rows around: a stretch goes to the first, to the last, or to the end.
        let first = values.start.next_multiple_of(columns).min(values.end);
        let last = (values.end / columns * columns).max(first);
        [values.start..first, first..last, last..values.end]
            .into_iter()
            .filter(|values| !values.is_empty())
            .map(|values| Stretch { scales: self.scales_of(&values), values })
    }

    /// The scales of whole rows, or of a part of one.
    fn scales_of(&self, values: &Range<u64>) -> Range<u64> {
        let (first, last) = (values.start, values.end - 1);
        let scale = |value: u64| self.first_scale(value / self.columns) + value % self.columns / self.size.columns;
        scale(first)..scale(last) + 1
    }
}

/// Whether scales of this shape could be those of a weight, under some size of blocks.
pub(crate) fn could_be_scales(weight: &[u64], scales: &[u64]) -> bool {
    let (Some((ends, lead)), Some((scale_ends, scale_lead))) =
        (weight.split_last_chunk::<2>().map(swap), scales.split_last_chunk::<2>().map(swap))
    else {
        return false;
    };
    // The smallest block that makes no more scales than there are.
    let fits = |(&size, &count): (&u64, &u64)| match count {
        0 => size == 0,
        _ => size > 0 && size.div_ceil(size.div_ceil(count)) == count,
    };
    lead == scale_lead && ends.iter().zip(scale_ends).all(fits)
}

fn swap<'a>((lead, ends): (&'a [u64], &'a [u64; 2])) -> (&'a [u64; 2], &'a [u64]) {
    (ends, lead)
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn blocks() -> impl Strategy<Value = (u64, Blocks)> {
        (1..4u64, 1..9u64, 1..12u64, 1..5u64, 1..6u64).prop_map(|(stack, rows, columns, block_rows, block_columns)| {
            let size = BlockSize { rows: block_rows, columns: block_columns };
            (stack, Blocks { rows, columns, size, scale_dtype: ScaleDtype::F32 })
        })
    }

    proptest! {
        #[test]
        fn stretches_hold_each_value_and_its_scale_in_order((stack, blocks) in blocks(), ends in (0..300u64, 0..300u64)) {
            let count = stack * blocks.rows * blocks.columns;
            let range = ends.0.min(ends.1).min(count)..ends.0.max(ends.1).min(count);
            let mut next = range.start;
            for Stretch { values, scales } in blocks.stretches(range.clone()) {
                prop_assert_eq!(values.start, next);
                next = values.end;
                let mut used = Vec::new();
                for value in values.clone() {
                    let (row, column) = (value / blocks.columns, value % blocks.columns);
                    let (matrix, row) = (row / blocks.rows, row % blocks.rows);
                    let scale_row = matrix * blocks.scale_rows() + row / blocks.size.rows;
                    used.push(scale_row * blocks.scale_columns() + column / blocks.size.columns);
                }
                prop_assert_eq!(scales.start, *used.iter().min().unwrap());
                prop_assert_eq!(scales.end, *used.iter().max().unwrap() + 1);
                prop_assert!(scales.end - scales.start <= values.end - values.start);
            }
            prop_assert_eq!(next, range.end);
        }

        #[test]
        fn the_scales_of_any_block_size_could_be_scales((stack, blocks) in blocks()) {
            let weight = [stack, blocks.rows, blocks.columns];
            prop_assert!(could_be_scales(&weight, &[stack, blocks.scale_rows(), blocks.scale_columns()]));
            prop_assert!(!could_be_scales(&weight, &[stack + 1, blocks.scale_rows(), blocks.scale_columns()]));
            prop_assert!(!could_be_scales(&weight, &[stack, blocks.rows + 1, blocks.scale_columns()]));
            prop_assert!(!could_be_scales(&weight, &[stack, blocks.scale_rows()]));
        }
    }

    #[test]
    fn some_counts_of_scales_fit_no_block_size() {
        // Ten rows make 1, 2, 3, 4, 5 or 10 scales.
        let fitting: Vec<u64> = (0..=11).filter(|&count| could_be_scales(&[10, 3], &[count, 1])).collect();
        assert_eq!(fitting, [1, 2, 3, 4, 5, 10]);
        assert!(could_be_scales(&[0, 3], &[0, 1]));
        assert!(!could_be_scales(&[0, 3], &[1, 1]) && !could_be_scales(&[3], &[1]));
    }
}
