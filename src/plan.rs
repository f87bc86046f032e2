//! The plan of a conversion: which tensors become what, in which files, at which offsets. Pure and deterministic.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::cast::{self, OnOverflow, Target};
use crate::checkpoint::TensorSpec;
use crate::dtype;
use crate::error::{Error, Result};
use crate::header;
use crate::mxfp4::{self, Candidate, Pair};
use crate::names;
use crate::output::npy;
use crate::select::Selection;
use crate::transform::Transform;

/// Options of a conversion that change its bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Output format.
    pub format: Format,
    /// Precision of the float tensors.
    pub precision: Precision,
    /// What becomes of MXFP4 pairs.
    pub mxfp4: Mxfp4Mode,
    /// Largest shard, in GB (10^9 bytes) of tensor data.
    pub shard_size: f64,
    /// Globs of the tensors to take; None takes all.
    pub include: Option<Vec<String>>,
    /// Globs of the tensors to leave out.
    pub exclude: Option<Vec<String>>,
    /// What becomes of values beyond the range of `precision`.
    pub on_overflow: OnOverflow,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::NumpyDirect,
            precision: Precision::Source,
            mxfp4: Mxfp4Mode::Keep,
            shard_size: 1.8,
            include: None,
            exclude: None,
            on_overflow: OnOverflow::Error,
        }
    }
}

impl Options {
    /// The shard limit in bytes.
    pub fn shard_bytes(&self) -> Result<u64> {
        let bytes = (self.shard_size * 1e9).round();
        if !(1.0..=9e18).contains(&bytes) {
            return Err(Error::Argument {
                name: "shard_size",
                found: format!("{} GB", self.shard_size),
                expected: "a size in GB between 1e-9 and 9e9".into(),
            });
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range by the check above")]
        Ok(bytes as u64)
    }
}

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// One npy file per tensor in shard folders.
    #[value(alias = "numpy")]
    NumpyDirect,
}

/// Target precision of the float tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Precision {
    /// As in the source, bit for bit.
    Source,
    /// IEEE binary16.
    Float16,
    /// bfloat16.
    Bfloat16,
    /// IEEE binary32.
    Float32,
}

impl Precision {
    /// The dtype that F64, F32, F16 and BF16 tensors are cast to; None for `source`.
    #[must_use]
    pub fn target(self) -> Option<Target> {
        match self {
            Self::Source => None,
            Self::Float16 => Some(Target::F16),
            Self::Bfloat16 => Some(Target::Bf16),
            Self::Float32 => Some(Target::F32),
        }
    }
}

/// What becomes of MXFP4 pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Mxfp4Mode {
    /// Blocks and scales stay two u8 tensors.
    Keep,
    /// Each pair becomes one float tensor, the contraction axis last.
    Dequantize,
}

/// A whole conversion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Tensors, in the order of the source.
    pub tensors: Vec<PlannedTensor>,
    /// Files that hold tensor data.
    pub files: Vec<PlannedFile>,
    /// Shards: name and the range of `files` in it.
    pub shards: Vec<(String, Range<usize>)>,
    /// Parameters: MXFP4 values count once, their scales do not.
    pub total_parameters: u64,
    /// Parameters and the MXFP4 scales that the output still has.
    pub stored_elements: u64,
    /// What the user should know before the job runs.
    pub warnings: Vec<String>,
}

/// One tensor of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Full dotted name.
    pub name: String,
    /// Logical dtype.
    pub dtype: Dtype,
    /// Dtype in the source, by its name; `mxfp4` for a pair.
    pub source_dtype: &'static str,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Bytes of data.
    pub nbytes: u64,
    /// How the bytes are made.
    pub transform: Transform,
    /// Indices of the source tensors that the transform reads.
    pub sources: Vec<usize>,
    /// Where the bytes go, in order.
    pub pieces: Vec<Piece>,
}

impl PlannedTensor {
    /// Bytes of its data in one of its pieces.
    #[must_use]
    pub fn piece_nbytes(&self, piece: &Piece) -> u64 {
        (piece.units.end - piece.units.start) * self.transform.output_unit_bytes()
    }

    /// The header of the npy file of one of its pieces.
    #[must_use]
    pub fn npy_header(&self, piece: &Piece) -> Vec<u8> {
        let shape = npy::part_shape(self.dtype, &self.shape, self.nbytes, self.piece_nbytes(piece));
        npy::header(self.dtype, &shape.expect("parts are whole rows"))
    }
}

/// A stretch of a tensor in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index into [`Plan::files`].
    pub file: usize,
    /// Where its data begins in the file.
    pub offset: u64,
    /// Units of the tensor's transform.
    pub units: Range<u64>,
}

/// One file of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedFile {
    /// Path below the output folder, with `/`.
    pub path: String,
    /// Where its data begins.
    pub data_offset: u64,
    /// Whole size.
    pub nbytes: u64,
}

/// Plans the conversion of a checkpoint's `tensors`; `path_of` names the file of a tensor, for messages.
pub fn plan<'a>(
    tensors: &'a [TensorSpec],
    path_of: impl Fn(&'a TensorSpec) -> &'a Path,
    options: &Options,
) -> Result<Plan> {
    let shard_bytes = options.shard_bytes()?;
    let selection = Selection::new(options.include.as_deref(), options.exclude.as_deref())?;
    let candidates: Vec<_> = tensors.iter().map(|tensor| tensor.candidate(path_of(tensor))).collect();
    let pairing = mxfp4::pair(&candidates);
    let planned = match options.mxfp4 {
        Mxfp4Mode::Keep => plain_tensors(&candidates, options, &selection, &HashSet::new())?,
        Mxfp4Mode::Dequantize => {
            // A misfit has two names, like a pair: leaving out either leaves it out.
            let mut halves: HashSet<usize> = pairing.pairs.iter().flat_map(|pair| [pair.blocks, pair.scales]).collect();
            for misfit in pairing.misfits {
                if selection.takes(&misfit.name) && selection.takes(&tensors[misfit.index].name) {
                    return Err(misfit.fault);
                }
                halves.insert(misfit.index);
            }
            let mut planned = plain_tensors(&candidates, options, &selection, &halves)?;
            for pair in pairing.pairs.iter().filter(|pair| selection.takes(&pair.name)) {
                planned.push((pair.blocks, dequantized(pair, &candidates, options)?));
            }
            planned.sort_by_key(|(position, _)| *position);
            refuse_duplicate_names(&planned, &candidates)?;
            planned
        }
    };
    if planned.is_empty() && !tensors.is_empty() {
        return Err(Error::Mapping {
            found: format!("{} tensors, none of them selected", tensors.len()),
            expected: format!(
                "include {} and exclude {} to leave some",
                patterns(options.include.as_deref()),
                patterns(options.exclude.as_deref())
            ),
        });
    }
    let outputs: Vec<_> = planned
        .iter()
        .map(|(position, tensor)| Candidate {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            path: candidates[*position].path,
        })
        .collect();
    let (total_parameters, stored_elements) = mxfp4::count_parameters(&outputs);
    let mut planned: Vec<_> = planned.into_iter().map(|(_, tensor)| tensor).collect();
    let mut warnings = Vec::new();
    let (files, shards) = match options.format {
        Format::NumpyDirect => place_numpy_direct(&mut planned, shard_bytes, &mut warnings)?,
    };
    Ok(Plan { tensors: planned, files, shards, total_parameters, stored_elements, warnings })
}

fn patterns(globs: Option<&[String]>) -> String {
    globs.map_or_else(|| "(not given)".into(), |globs| format!("{globs:?}"))
}

/// The selected tensors outside `halves`, copied or cast, each with its position in the source.
fn plain_tensors(
    tensors: &[Candidate<'_>],
    options: &Options,
    selection: &Selection,
    halves: &HashSet<usize>,
) -> Result<Vec<(usize, PlannedTensor)>> {
    let mut planned = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        if halves.contains(&index) || !selection.takes(tensor.name) {
            continue;
        }
        let (dtype, transform) = match options.precision.target() {
            Some(to) if cast::is_castable(tensor.dtype) && tensor.dtype != to.dtype() => {
                (to.dtype(), Transform::Cast { from: tensor.dtype, to })
            }
            _ => (tensor.dtype, Transform::Copy),
        };
        planned.push((
            index,
            PlannedTensor {
                name: tensor.name.to_owned(),
                dtype,
                source_dtype: dtype::name(tensor.dtype),
                shape: tensor.shape.to_vec(),
                // Checked anew: a wider dtype can exceed what NumPy holds.
                nbytes: header::tensor_nbytes(tensor.path, tensor.name, dtype, tensor.shape)?,
                transform,
                sources: vec![index],
                pieces: Vec::new(),
            },
        ));
    }
    Ok(planned)
}

/// One decoded MXFP4 pair. `source` precision means bfloat16, which holds every finite MXFP4 value up to scale 252.
fn dequantized(pair: &Pair, candidates: &[Candidate<'_>], options: &Options) -> Result<PlannedTensor> {
    let to = options.precision.target().unwrap_or(Target::Bf16);
    let transform = Transform::Dequantize { to };
    let path = candidates[pair.blocks].path;
    let nbytes = header::tensor_nbytes(path, &pair.name, to.dtype(), &pair.shape)?;
    Ok(PlannedTensor {
        name: pair.name.clone(),
        dtype: to.dtype(),
        source_dtype: "mxfp4",
        shape: pair.shape.clone(),
        nbytes,
        transform,
        sources: vec![pair.blocks, pair.scales],
        pieces: Vec::new(),
    })
}

fn refuse_duplicate_names(planned: &[(usize, PlannedTensor)], candidates: &[Candidate<'_>]) -> Result<()> {
    let mut names = HashSet::new();
    for (position, tensor) in planned {
        if !names.insert(tensor.name.as_str()) {
            let path = candidates[*position].path;
            let expected = "one tensor of this name after its MXFP4 blocks are decoded";
            return Err(Error::tensor(path, &tensor.name, "two", expected));
        }
    }
    Ok(())
}

/// Most files that a tensor may be split into: far beyond any use, and within memory.
const MAX_PARTS: u64 = 100_000;

type Placement = (Vec<PlannedFile>, Vec<(String, Range<usize>)>);

/// Files and shard folders of the numpy-direct format; fills in each tensor's pieces.
fn place_numpy_direct(
    tensors: &mut [PlannedTensor],
    shard_bytes: u64,
    warnings: &mut Vec<String>,
) -> Result<Placement> {
    let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let stems = names::file_stems(&names);
    let (mut files, mut shards): (Vec<PlannedFile>, Vec<(String, Range<usize>)>) = (Vec::new(), Vec::new());
    let mut shard_fill = 0;
    for (tensor, stem) in tensors.iter_mut().zip(stems) {
        let unit_bytes = tensor.transform.output_unit_bytes();
        let parts = split_bytes(tensor, shard_bytes)?;
        let is_split = parts.len() > 1;
        if let Some(large) = parts.iter().find(|&&bytes| bytes > shard_bytes) {
            warnings.push(format!(
                "tensor {:?}: one row holds {large} bytes, more than the shard size of {shard_bytes} bytes; it gets a \
                 file of its own",
                tensor.name
            ));
        }
        let mut unit = 0;
        for (number, part_bytes) in parts.into_iter().enumerate() {
            if shards.is_empty() || shard_fill + part_bytes > shard_bytes && shard_fill > 0 {
                shards.push((format!("shard_{:03}", shards.len()), files.len()..files.len()));
                shard_fill = 0;
            }
            shard_fill += part_bytes;
            let (shard, range) = shards.last_mut().expect("pushed above");
            range.end += 1;
            let shape =
                npy::part_shape(tensor.dtype, &tensor.shape, tensor.nbytes, part_bytes).expect("parts are whole rows");
            let data_offset = npy::header(tensor.dtype, &shape).len() as u64;
            let name = if is_split { format!("{stem}.part{number:03}.npy") } else { format!("{stem}.npy") };
            let units = unit..unit + part_bytes / unit_bytes;
            unit = units.end;
            tensor.pieces.push(Piece { file: files.len(), offset: data_offset, units });
            let nbytes = data_offset + part_bytes;
            files.push(PlannedFile { path: format!("{shard}/{name}"), data_offset, nbytes });
        }
    }
    Ok((files, shards))
}

/// Bytes of the parts of a tensor: whole rows of axis 0 and whole units, each within `limit` where one row is.
fn split_bytes(tensor: &PlannedTensor, limit: u64) -> Result<Vec<u64>> {
    let rows = tensor.shape.first().copied().unwrap_or(1);
    if tensor.nbytes <= limit || rows <= 1 {
        return Ok(vec![tensor.nbytes]);
    }
    // The fewest rows whose bits fill whole bytes and whole units: 1, but for packed dtypes and for flat MXFP4.
    let row_bits = u128::from(tensor.nbytes) * 8 / u128::from(rows);
    let unit_bits = u128::from(tensor.transform.output_unit_bytes()) * 8;
    let mut step_rows = 1;
    while row_bits * step_rows % unit_bits != 0 {
        step_rows *= 2;
    }
    let step_bytes = u64::try_from(row_bits * step_rows / 8).expect("steps are below the tensor's bytes or one unit");
    let part_bytes = (limit / step_bytes).max(1) * step_bytes;
    let (whole_parts, rest) = (tensor.nbytes / part_bytes, tensor.nbytes % part_bytes);
    if whole_parts >= MAX_PARTS {
        return Err(Error::Argument {
            name: "shard_size",
            found: format!("{limit} bytes, which splits tensor {:?} into {whole_parts} files", tensor.name),
            expected: format!("a size that splits no tensor into more than {MAX_PARTS}"),
        });
    }
    let whole_parts = usize::try_from(whole_parts).expect("bounded above");
    let mut parts = vec![part_bytes; whole_parts];
    if rest > 0 {
        parts.push(rest);
    }
    Ok(parts)
}
