//! float8 with block scales: which tensors form a pair, where each value's scale stands, and how values are decoded.
//!
//! The layout is that of DeepSeek-V3: `X` [..., N, K] of `F8_E4M3` and `X_scale_inv` [..., N / rows, K / columns], divisions
//! rounded up; a value is the float8 value times the scale of its block. Codes are those of OCP 8-bit Floating Point
//! Specification v1.0: no infinities, and NaN where all bits but the sign are set.

mod blocks;
mod decode;

use std::collections::{HashMap, HashSet};

use safetensors::Dtype;

use crate::error::Error;
use crate::mxfp4::{Candidate, Misfit};

pub use blocks::{BlockSize, Blocks, ScaleDtype, Stretch};
pub use decode::{Scales, decode, decode_with, value};

/// What stands behind a weight's name in the name of its scales.
pub const SCALES_SUFFIX: &str = "_scale_inv";

/// Two tensors that together hold one weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Index of the float8 codes [..., N, K], whose name and shape the decoded tensor has.
    pub weight: usize,
    /// Index of the scales.
    pub scales: usize,
    /// Where each value's scale stands.
    pub blocks: Blocks,
}

/// The pairs, and the scales that fit no weight.
#[derive(Debug, Default)]
pub struct Pairing {
    /// Complete pairs, in the order of their scales.
    pub pairs: Vec<Pair>,
    /// What does not fit.
    pub misfits: Vec<Misfit>,
}

/// Whether any of these names is that of scales.
pub fn has_scales<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|name| name.ends_with(SCALES_SUFFIX))
}

/// Finds the pairs with blocks of `size` among `tensors`, in whatever order and files the two stand.
#[must_use]
pub fn pair(tensors: &[Candidate<'_>], size: BlockSize) -> Pairing {
    let mut pairing = Pairing::default();
    for Named { weight, scales, name } in named_pairs(tensors) {
        let misfit = |fault| Misfit { index: scales, name: name.to_owned(), fault };
        match weight {
            Some(weight) if is_float8(tensors[weight].dtype) => {
                match blocks_of(&tensors[weight], &tensors[scales], size) {
                    Ok(blocks) => pairing.pairs.push(Pair { weight, scales, blocks }),
                    Err(fault) => pairing.misfits.push(misfit(fault)),
                }
            }
            // Names alone make no pair.
            Some(_) => {}
            None => {
                let alone = &tensors[scales];
                if ScaleDtype::of(alone.dtype).is_some() && alone.shape.len() > 1 {
                    let expected = format_args!("{name:?} beside them");
                    let fault = Error::tensor(alone.path, alone.name, "scales of float8 blocks alone", expected);
                    pairing.misfits.push(misfit(fault));
                }
            }
        }
    }
    pairing
}

/// Indices of weights and of their scales, whatever the size of their blocks: for what looks at no configuration.
pub(crate) fn pairs_of_any_size(tensors: &[Candidate<'_>]) -> Vec<(usize, usize)> {
    let is_pair = |weight: &Candidate<'_>, scales: &Candidate<'_>| {
        weight.dtype == Dtype::F8_E4M3
            && ScaleDtype::of(scales.dtype).is_some()
            && blocks::could_be_scales(weight.shape, scales.shape)
    };
    named_pairs(tensors)
        .filter_map(|named| Some((named.weight?, named.scales)))
        .filter(|&(weight, scales)| is_pair(&tensors[weight], &tensors[scales]))
        .collect()
}

/// A tensor with the name of scales, and the one that these would be of.
struct Named<'a> {
    weight: Option<usize>,
    scales: usize,
    name: &'a str,
}

fn named_pairs<'a>(tensors: &'a [Candidate<'a>]) -> impl Iterator<Item = Named<'a>> {
    let suffixed = tensors
        .iter()
        .enumerate()
        .filter_map(|(index, tensor)| Some((index, tensor.name.strip_suffix(SCALES_SUFFIX)?)));
    let suffixed: Vec<_> = suffixed.collect();
    let wanted: HashSet<&str> = suffixed.iter().map(|(_, name)| *name).collect();
    // Only names that are asked for: most checkpoints have none.
    let by_name: HashMap<&str, usize> = if wanted.is_empty() {
        HashMap::new()
    } else {
        let named = tensors.iter().enumerate().filter(|(_, tensor)| wanted.contains(tensor.name));
        named.map(|(index, tensor)| (tensor.name, index)).collect()
    };
    suffixed.into_iter().map(move |(scales, name)| Named { weight: by_name.get(name).copied(), scales, name })
}

fn is_float8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ)
}

/// Where the scales of a weight's values stand, if the two fit.
fn blocks_of(weight: &Candidate<'_>, scales: &Candidate<'_>, size: BlockSize) -> Result<Blocks, Error> {
    let found = |tensor: &Candidate<'_>| format!("{} {:?}", tensor.dtype, tensor.shape);
    let of_weight = |expected: &str| {
        let expected = format_args!("{expected}, for it has the scales {:?}", scales.name);
        Err(Error::tensor(weight.path, weight.name, found(weight), expected))
    };
    if weight.dtype != Dtype::F8_E4M3 {
        return of_weight("F8_E4M3");
    }
    let &[ref lead @ .., rows, columns] = weight.shape else {
        return of_weight("two dimensions or more");
    };
    let Some(scale_dtype) = ScaleDtype::of(scales.dtype) else {
        let expected = format_args!("F32 or BF16 scales of {:?}", weight.name);
        return Err(Error::tensor(scales.path, scales.name, found(scales), expected));
    };
    let blocks = Blocks { rows, columns, size, scale_dtype };
    let expected = [lead, &[blocks.scale_rows(), blocks.scale_columns()]].concat();
    if scales.shape != expected {
        let expected = format_args!(
            "{expected:?}, a scale for each block of {} x {} of {:?} {:?}",
            size.rows, size.columns, weight.name, weight.shape
        );
        return Err(Error::tensor(scales.path, scales.name, found(scales), expected));
    }
    Ok(blocks)
}
