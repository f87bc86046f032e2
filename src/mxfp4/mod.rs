//! MXFP4: which tensors form a pair, what its codes mean, and how many of them decode at once.
//!
//! Value formula from OCP Microscaling Formats (MX) v1.0; nibble order, which that document leaves open, and the names
//! of the pairs from the gpt-oss checkpoints.

mod decode;
mod encode;
mod quantization_error;

use std::collections::{HashMap, HashSet};
use std::path::Path;

use safetensors::Dtype;

use crate::dtype;
use crate::error::{Error, Result};
use crate::float8;

pub use decode::DecodeTable;
pub use encode::{ScaleRule, encode, encode_block, encode_with};
pub use quantization_error::{ErrorSums, QuantizationError};

/// Values that share one scale.
pub const MX_BLOCK_SIZE: usize = 32;

/// Bytes of the codes of one block: two codes per byte, the low nibble first.
pub const BLOCK_BYTES: usize = 16;

/// [`BLOCK_BYTES`] as the last dimension of blocks.
const BLOCK_BYTES_DIM: u64 = BLOCK_BYTES as u64;

/// The sixteen E2M1 values.
pub const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Suffixes of a pair's two names: Hugging Face, then the publisher's `original/` layout.
const SUFFIXES: [(&str, &str); 2] = [(BLOCKS_SUFFIX, SCALES_SUFFIX), (".blocks", ".scales")];

/// What Hugging Face puts behind a tensor's name for its codes; also the names of pairs that a conversion makes.
pub const BLOCKS_SUFFIX: &str = "_blocks";

/// As [`BLOCKS_SUFFIX`], for the scales.
pub const SCALES_SUFFIX: &str = "_scales";

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

/// Parameters, and stored elements as model hubs show them: MXFP4 values count once in both, scales (those of float8 blocks
/// too) in the second.
#[must_use]
pub fn count_parameters(tensors: &[Candidate<'_>]) -> (u64, u64) {
    let pairs = pair(tensors).pairs;
    let blocks: HashSet<usize> = pairs.iter().map(|pair| pair.blocks).collect();
    let mut scales: HashSet<usize> = pairs.iter().map(|pair| pair.scales).collect();
    scales.extend(float8::pairs_of_any_size(tensors).into_iter().map(|(_, scales)| scales));
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

/// Spreads E2M1 codes, two to a byte in `src`, the low nibble first, over a byte each in `dst`.
///
/// # Panics
/// When `dst` is not twice as long as `src`.
pub fn unpack(src: &[u8], dst: &mut [u8]) {
    let (pairs, rest) = dst.as_chunks_mut::<2>();
    assert!(rest.is_empty() && pairs.len() == src.len(), "two bytes for each");
    for (&byte, pair) in src.iter().zip(pairs) {
        *pair = [byte & 0xf, byte >> 4];
    }
}

/// One code under one scale byte: the definition. Exact, since float64 holds 2^-128 to 6·2^127 and two bits of mantissa.
#[must_use]
pub fn decode_one(code: u8, scale: u8) -> f64 {
    if scale == u8::MAX {
        return f64::NAN;
    }
    f64::from(E2M1[usize::from(code & 0xf)]) * 2f64.powi(i32::from(scale) - 127)
}
