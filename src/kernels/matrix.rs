//! Matrices as checkpoints store them: rows of MXFP4 or bfloat16, the contracted axis last.

use crate::mxfp4::{BLOCK_BYTES, MX_BLOCK_SIZE};
use crate::simd::Vectors;

/// What rows are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Blocks of 32 codes in 16 bytes, the low nibble first, and a scale byte for each.
    Mxfp4,
    /// bfloat16, little endian.
    Bf16,
}

/// A matrix [rows, columns], or a stack of such: then experts are ranges of rows.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    columns: usize,
    bytes: &'a [u8],
    scales: &'a [u8],
    takes_int8: bool,
}

impl<'a> Matrix<'a> {
    /// Codes [rows, columns / 32, 16] and scales [rows, columns / 32].
    ///
    /// # Panics
    /// When lengths do not fit: `scales` has one byte for 16 of `blocks`, and `rows` times as many as a row.
    #[must_use]
    pub fn mxfp4(rows: usize, blocks: &'a [u8], scales: &'a [u8]) -> Self {
        assert!(blocks.len() == BLOCK_BYTES * scales.len(), "one scale for each block");
        let groups = scales.len().checked_div(rows).unwrap_or(0);
        assert!(groups * rows == scales.len(), "rows of one length");
        Self { format: Format::Mxfp4, rows, columns: groups * MX_BLOCK_SIZE, bytes: blocks, scales, takes_int8: false }
    }

    /// As [`mxfp4`](Self::mxfp4), to be multiplied by activations that are rounded to int8 for it.
    ///
    /// Each 32 of a row's activations get a scale, their largest magnitude over 127. A NaN or an infinity makes all that
    /// its block is multiplied into NaN.
    ///
    /// # Panics
    /// As `mxfp4`.
    #[must_use]
    pub fn mxfp4_int8(rows: usize, blocks: &'a [u8], scales: &'a [u8]) -> Self {
        Self { takes_int8: true, ..Self::mxfp4(rows, blocks, scales) }
    }

    /// bfloat16 [rows, columns] as bytes, wherever they stand in memory.
    ///
    /// # Panics
    /// When there are not 2 · `rows` · `columns` bytes.
    #[must_use]
    pub fn bf16(rows: usize, columns: usize, bytes: &'a [u8]) -> Self {
        assert!(
            Some(bytes.len()) == rows.checked_mul(columns).and_then(|elems| elems.checked_mul(2)),
            "two bytes each"
        );
        Self { format: Format::Bf16, rows, columns, bytes, scales: &[], takes_int8: false }
    }

    /// What its rows are made of.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether activations are rounded to int8 for it.
    pub(super) fn takes_int8(&self) -> bool {
        self.takes_int8
    }

    /// How many rows it has.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many values a row has.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of a row, its scales included.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        match self.format {
            Format::Mxfp4 => self.columns / MX_BLOCK_SIZE * (BLOCK_BYTES + 1),
            Format::Bf16 => 2 * self.columns,
        }
    }

    /// One row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> Row<'a> {
        match self.format {
            Format::Mxfp4 => {
                let groups = self.columns / MX_BLOCK_SIZE;
                let start = row * groups;
                Row {
                    bytes: &self.bytes[BLOCK_BYTES * start..BLOCK_BYTES * (start + groups)],
                    scales: &self.scales[start..start + groups],
                }
            }
            Format::Bf16 => {
                Row { bytes: &self.bytes[2 * row * self.columns..2 * (row + 1) * self.columns], scales: &[] }
            }
        }
    }
}

/// One row: codes and a scale for each 16 bytes of them, or bfloat16 and no scales.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) scales: &'a [u8],
}

/// Bytes of a row that are expanded at once, a chunk.
pub(super) const CHUNK_BYTES: usize = 64;

impl<'a> Row<'a> {
    /// How many chunks it has, the last maybe in part.
    pub(super) fn chunk_count(self) -> usize {
        self.bytes.len().div_ceil(CHUNK_BYTES)
    }

    /// A chunk, and zeros behind the row's end.
    #[inline(always)]
    pub(super) fn load<V: Vectors>(self, vectors: V, chunk: usize) -> V::Words {
        let (whole, rest) = self.bytes.as_chunks();
        match whole.get(chunk) {
            Some(bytes) => vectors.load(bytes),
            None => vectors.load_part(rest),
        }
    }

    /// The scale bytes of a chunk's blocks, the first lowest, and those of 1 behind the row's end.
    #[inline(always)]
    pub(super) fn scales(self, chunk: usize) -> u32 {
        const ONE: u8 = 127;
        let (whole, rest) = self.scales.as_chunks();
        u32::from_le_bytes(match (whole.get(chunk), rest) {
            (Some(scales), _) => return u32::from_le_bytes(*scales),
            (None, &[a]) => [a, ONE, ONE, ONE],
            (None, &[a, b]) => [a, b, ONE, ONE],
            (None, &[a, b, c]) => [a, b, c, ONE],
            (None, _) => [ONE; 4],
        })
    }

    /// Those of each whole chunk.
    #[inline(always)]
    pub(super) fn whole_scales(self) -> &'a [[u8; CHUNK_BYTES / BLOCK_BYTES]] {
        self.scales.as_chunks().0
    }

    /// Whether all scales are normal numbers of float32: bytes 1 .. 254.
    #[inline(always)]
    pub(super) fn has_normal_scales(self) -> bool {
        let (words, rest) = self.scales.as_chunks();
        // All of them without a branch, rather than up to the first that is not.
        let found = words.iter().fold(0, |found, word| {
            let word = u64::from_ne_bytes(*word);
            found | zero_bytes(word) | zero_bytes(!word)
        });
        found == 0 && !rest.iter().any(|&scale| matches!(scale, 0 | u8::MAX))
    }
}

/// Zero if no byte of a word is.
fn zero_bytes(word: u64) -> u64 {
    const LOWEST: u64 = u64::MAX / 0xff;
    word.wrapping_sub(LOWEST) & !word & LOWEST << 7
}
