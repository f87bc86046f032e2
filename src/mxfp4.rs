//! MXFP4: which tensors form a pair, and how its codes decode.
//!
//! Value formula from OCP Microscaling Formats (MX) v1.0; nibble order, which that document leaves open, and the names
//! of the pairs from the gpt-oss checkpoints.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use safetensors::Dtype;

use crate::cast::{Counts, OnOverflow, Target};
use crate::dtype;
use crate::error::{Error, Result};

/// Values that share one scale.
pub const MX_BLOCK_SIZE: usize = 32;

/// Bytes of the codes of one block: two codes per byte, the low nibble first.
pub const BLOCK_BYTES: usize = 16;

/// [`BLOCK_BYTES`] as the last dimension of blocks.
const BLOCK_BYTES_DIM: u64 = BLOCK_BYTES as u64;

/// The sixteen E2M1 values.
pub const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Suffixes of a pair's two names: Hugging Face, then the publisher's `original/` layout.
const SUFFIXES: [(&str, &str); 2] = [("_blocks", "_scales"), (".blocks", ".scales")];

/// Two tensors that together hold one MXFP4 matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Name of the decoded tensor.
    pub name: String,
    /// Index of the codes, u8 [..., G, 16].
    pub blocks: usize,
    /// Index of the biased exponents, u8 [..., G].
    pub scales: usize,
    /// Shape of the decoded tensor, [..., 32 G].
    pub shape: Vec<u64>,
}

/// What pairing looks at in a tensor.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Full dotted name.
    pub name: &'a str,
    /// Stored dtype.
    pub dtype: Dtype,
    /// Stored shape.
    pub shape: &'a [u64],
    /// File that holds it, for messages.
    pub path: &'a Path,
}

/// The pairs, and what looks like half a pair but does not fit.
#[derive(Debug, Default)]
pub struct Pairing {
    /// Complete pairs, in the order of their blocks.
    pub pairs: Vec<Pair>,
    /// What does not fit.
    pub misfits: Vec<Misfit>,
}

/// A tensor that looks like half a pair but is none.
#[derive(Debug)]
pub struct Misfit {
    /// Its index.
    pub index: usize,
    /// The name that the decoded tensor would have.
    pub name: String,
    /// What is wrong.
    pub fault: Error,
}

/// Finds the MXFP4 pairs among `tensors`, in whatever order and files the two halves stand.
#[must_use]
pub fn pair(tensors: &[Candidate<'_>]) -> Pairing {
    let by_name: HashMap<&str, usize> =
        tensors.iter().enumerate().map(|(index, tensor)| (tensor.name, index)).collect();
    let mut pairing = Pairing::default();
    for (index, tensor) in tensors.iter().enumerate() {
        for (blocks_suffix, scales_suffix) in SUFFIXES {
            if let Some(base) = tensor.name.strip_suffix(blocks_suffix) {
                let scales_name = format!("{base}{scales_suffix}");
                match by_name.get(scales_name.as_str()) {
                    Some(&scales) => match pair_shape(tensor, &tensors[scales]) {
                        Ok(Some(shape)) => {
                            pairing.pairs.push(Pair { name: base.to_owned(), blocks: index, scales, shape });
                        }
                        Ok(None) => {}
                        Err(fault) => pairing.misfits.push(Misfit { index, name: base.to_owned(), fault }),
                    },
                    None if tensor.dtype == Dtype::U8 => {
                        let fault = lone_half(tensor, "blocks", &scales_name);
                        pairing.misfits.push(Misfit { index, name: base.to_owned(), fault });
                    }
                    None => {}
                }
            } else if let Some(base) = tensor.name.strip_suffix(scales_suffix) {
                let blocks_name = format!("{base}{blocks_suffix}");
                if tensor.dtype == Dtype::U8 && !by_name.contains_key(blocks_name.as_str()) {
                    let fault = lone_half(tensor, "scales", &blocks_name);
                    pairing.misfits.push(Misfit { index, name: base.to_owned(), fault });
                }
            }
        }
    }
    pairing
}

/// Parameters, and stored elements as model hubs show them: MXFP4 values count once in both, their scales in the second.
#[must_use]
pub fn count_parameters(tensors: &[Candidate<'_>]) -> (u64, u64) {
    let pairs = pair(tensors).pairs;
    let blocks: HashSet<usize> = pairs.iter().map(|pair| pair.blocks).collect();
    let scales: HashSet<usize> = pairs.iter().map(|pair| pair.scales).collect();
    let (mut parameters, mut stored) = (0u64, 0u64);
    for (index, tensor) in tensors.iter().enumerate() {
        let elements = dtype::checked_elements(tensor.shape).unwrap_or(0);
        let codes = if blocks.contains(&index) { elements.saturating_mul(2) } else { elements };
        stored = stored.saturating_add(codes);
        if !scales.contains(&index) {
            parameters = parameters.saturating_add(codes);
        }
    }
    (parameters, stored)
}

fn lone_half(tensor: &Candidate<'_>, half: &str, partner: &str) -> Error {
    let found = format_args!("MXFP4 {half} alone");
    Error::tensor(tensor.path, tensor.name, found, format_args!("{partner:?} beside it"))
}

/// Shape of the decoded tensor; None when neither half is u8, so that only the names are alike.
fn pair_shape(blocks: &Candidate<'_>, scales: &Candidate<'_>) -> Result<Option<Vec<u64>>> {
    if blocks.dtype != Dtype::U8 && scales.dtype != Dtype::U8 {
        return Ok(None);
    }
    let fault = |tensor: &Candidate<'_>, expected: String| {
        let found = format!("{} {:?}", tensor.dtype, tensor.shape);
        Error::tensor(tensor.path, tensor.name, found, expected)
    };
    if blocks.dtype != Dtype::U8 {
        return Err(fault(blocks, "U8 MXFP4 blocks".into()));
    }
    if scales.dtype != Dtype::U8 {
        return Err(fault(scales, "U8 MXFP4 scales".into()));
    }
    let Some((&BLOCK_BYTES_DIM, groups_shape @ [.., groups])) = blocks.shape.split_last() else {
        return Err(fault(blocks, format!("MXFP4 blocks of shape [..., groups, {BLOCK_BYTES}]")));
    };
    if scales.shape != groups_shape {
        return Err(fault(scales, format!("{groups_shape:?}, one scale for each of the blocks {:?}", blocks.shape)));
    }
    let mut shape = groups_shape.to_vec();
    // 32 G overflows only where 16 G bytes of an empty tensor were declared.
    let Some(k) = groups.checked_mul(MX_BLOCK_SIZE as u64) else {
        return Err(fault(blocks, "fewer than 2^59 groups".into()));
    };
    *shape.last_mut().expect("groups_shape has at least one dimension") = k;
    Ok(Some(shape))
}

/// Decoded values of every scale byte and code, as bits of one target dtype.
#[derive(Debug)]
pub struct DecodeTable {
    target: Target,
    /// Bits of code `c` under scale byte `s`, at `16 s + c`.
    bits: Vec<u32>,
    /// Codes under this scale byte that overflow the target, as a bit set.
    overflow: [u16; 256],
    /// Codes under this scale byte that are not zero but decode to zero.
    underflow: [u16; 256],
}

impl DecodeTable {
    /// The table for `target`; finite values beyond its range follow `on_overflow`.
    #[must_use]
    pub fn new(target: Target, on_overflow: OnOverflow) -> Self {
        let mut table = Self { target, bits: Vec::with_capacity(256 * 16), overflow: [0; 256], underflow: [0; 256] };
        for scale in 0..=255u8 {
            for code in 0..16u8 {
                let cast = target.round(decode_one(code, scale), on_overflow);
                table.bits.push(cast.bits);
                table.overflow[usize::from(scale)] |= u16::from(cast.overflows) << code;
                table.underflow[usize::from(scale)] |= u16::from(cast.underflows) << code;
            }
        }
        table
    }

    /// Decodes whole blocks: 16 code bytes and one scale byte make 32 values.
    ///
    /// # Panics
    /// When the lengths of the three slices disagree.
    pub fn decode(&self, blocks: &[u8], scales: &[u8], out: &mut [u8]) -> Counts {
        match self.target {
            Target::F32 => self.decode_as::<4>(blocks, scales, out, u32::to_le_bytes),
            #[expect(clippy::cast_possible_truncation, reason = "16-bit targets have 16-bit table entries")]
            Target::F16 | Target::Bf16 => self.decode_as::<2>(blocks, scales, out, |bits| (bits as u16).to_le_bytes()),
        }
    }

    fn decode_as<const N: usize>(
        &self,
        blocks: &[u8],
        scales: &[u8],
        out: &mut [u8],
        store: impl Fn(u32) -> [u8; N],
    ) -> Counts {
        let (blocks, rest) = blocks.as_chunks::<BLOCK_BYTES>();
        let (out, out_rest) = out.as_chunks_mut::<N>();
        let groups = out.chunks_exact_mut(MX_BLOCK_SIZE);
        assert!(rest.is_empty() && out_rest.is_empty(), "whole blocks");
        assert!(blocks.len() == scales.len() && groups.len() == scales.len(), "one scale per block");
        let mut counts = Counts::default();
        for ((codes, &scale), values) in blocks.iter().zip(scales).zip(groups) {
            let row: &[u32; 16] = self.bits[usize::from(scale) * 16..].first_chunk().expect("256 rows of 16 entries");
            for (&byte, pair) in codes.iter().zip(values.as_chunks_mut::<2>().0) {
                pair[0] = store(row[usize::from(byte & 0xf)]);
                pair[1] = store(row[usize::from(byte >> 4)]);
            }
            let (overflow, underflow) = (self.overflow[usize::from(scale)], self.underflow[usize::from(scale)]);
            if overflow | underflow != 0 {
                counts.merge(count_codes(codes, scale, overflow, underflow));
            }
        }
        counts
    }
}

/// Counts the codes of one block that are in the sets.
fn count_codes(codes: &[u8], scale: u8, overflow: u16, underflow: u16) -> Counts {
    let mut counts = Counts::default();
    for code in codes.iter().flat_map(|byte| [byte & 0xf, byte >> 4]) {
        counts.underflow += u64::from(underflow >> code & 1);
        if overflow >> code & 1 == 1 {
            counts.overflow += 1;
            counts.largest = counts.largest.max(decode_one(code, scale).abs());
        }
    }
    counts
}

/// One code under one scale byte: the definition. Exact, since float64 holds 2^-128 to 6·2^127 and two bits of mantissa.
#[must_use]
pub fn decode_one(code: u8, scale: u8) -> f64 {
    if scale == u8::MAX {
        return f64::NAN;
    }
    f64::from(E2M1[usize::from(code & 0xf)]) * 2f64.powi(i32::from(scale) - 127)
}
