//! The plan of a conversion: which tensors become what, in which files, at which offsets. Pure and deterministic.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;

use crate::cast::{self, Target};
use crate::checkpoint::TensorSpec;
use crate::dtype;
use crate::error::{Error, Result};
use crate::header;
use crate::mxfp4::{self, BLOCK_BYTES, BLOCKS_SUFFIX, Candidate, MX_BLOCK_SIZE, Pair, SCALES_SUFFIX};
use crate::names;
use crate::options::{Format, Mxfp4Mode, Options, Quantization};
use crate::output::npy;
use crate::select::Selection;
use crate::transform::Transform;

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
    /// What MXFP4 pairing looks at in the output; `path` is for messages.
    #[must_use]
    pub fn candidate<'a>(&'a self, path: &'a Path) -> Candidate<'a> {
        Candidate { name: &self.name, dtype: self.dtype, shape: &self.shape, path }
    }

    /// Bytes of its data in one of its pieces.
    #[must_use]
    pub fn piece_nbytes(&self, piece: &Piece) -> u64 {
        (piece.units.end - piece.units.start) * self.transform.output_unit_bytes()
    }

    /// The name of the matrix, where these are its blocks that a conversion makes.
    #[must_use]
    pub fn encoded_name(&self) -> Option<&str> {
        self.name.strip_suffix(BLOCKS_SUFFIX).filter(|_| self.transform.encodes_blocks())
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
    let quantization = options.quantization()?;
    let candidates: Vec<_> = tensors.iter().map(|tensor| tensor.candidate(path_of(tensor))).collect();
    let mut planned = match options.mxfp4 {
        Mxfp4Mode::Keep | Mxfp4Mode::Quantize => plain_tensors(&candidates, options, &selection, &HashSet::new())?,
        Mxfp4Mode::Dequantize => {
            let pairing = mxfp4::pair(&candidates);
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
            refuse_duplicate_names(&planned, &candidates, "one tensor of this name after MXFP4 blocks are decoded")?;
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
    let mut warnings = Vec::new();
    if let Some(quantization) = &quantization {
        planned = quantized_tensors(planned, &candidates, quantization, &mut warnings)?;
        refuse_duplicate_names(&planned, &candidates, "one tensor of this name after matrices are encoded")?;
    }
    let outputs: Vec<_> =
        planned.iter().map(|(position, tensor)| tensor.candidate(candidates[*position].path)).collect();
    let (total_parameters, stored_elements) = mxfp4::count_parameters(&outputs);
    let mut planned: Vec<_> = planned.into_iter().map(|(_, tensor)| tensor).collect();
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

/// The tensors of a plan with the matrices that are to be encoded as blocks and scales; the others as they are.
fn quantized_tensors(
    planned: Vec<(usize, PlannedTensor)>,
    candidates: &[Candidate<'_>],
    quantization: &Quantization<'_>,
    warnings: &mut Vec<String>,
) -> Result<Vec<(usize, PlannedTensor)>> {
    let (total, mut matching, mut encoded) = (planned.len(), 0, 0);
    let mut is_used = vec![false; quantization.patterns.len()];
    let mut tensors = Vec::with_capacity(total);
    for (index, tensor) in planned {
        let source = &candidates[index];
        let globs = quantization.globs.matches(source.name);
        for &glob in &globs {
            is_used[glob] = true;
        }
        let is_chosen = !globs.is_empty();
        matching += usize::from(is_chosen);
        if !is_chosen || !is_float_matrix(source.dtype, source.shape) {
            tensors.push((index, tensor));
            continue;
        }
        let &[ref rows_shape @ .., k] = source.shape else { unreachable!("a matrix has rows") };
        if k == 0 || k % MX_BLOCK_SIZE as u64 != 0 {
            warnings.push(format!(
                "tensor {:?} is not quantized: its rows hold {k} values, no whole blocks of {MX_BLOCK_SIZE}",
                tensor.name
            ));
            tensors.push((index, tensor));
            continue;
        }
        encoded += 1;
        let scales_shape = [rows_shape, &[k / MX_BLOCK_SIZE as u64]].concat();
        let blocks_shape = [scales_shape.as_slice(), &[BLOCK_BYTES as u64]].concat();
        let (from, rule) = (source.dtype, quantization.rule);
        for (suffix, shape, transform) in [
            (BLOCKS_SUFFIX, blocks_shape, Transform::QuantizeBlocks { from, rule }),
            (SCALES_SUFFIX, scales_shape, Transform::QuantizeScales { from, rule }),
        ] {
            let name = format!("{}{suffix}", tensor.name);
            let nbytes = header::tensor_nbytes(source.path, &name, Dtype::U8, &shape)?;
            let (dtype, pieces) = (Dtype::U8, Vec::new());
            let half = PlannedTensor { name, dtype, shape, nbytes, transform, pieces, ..tensor.clone() };
            tensors.push((index, half));
        }
    }
    if encoded == 0 {
        return Err(Error::Mapping {
            found: format!("{total} tensors, {matching} of them matching quantize {:?}", quantization.patterns),
            expected: format!(
                "a float matrix of 2 or 3 dimensions with rows of whole blocks of {MX_BLOCK_SIZE} among these"
            ),
        });
    }
    for (pattern, is_used) in quantization.patterns.iter().zip(is_used) {
        if !is_used {
            warnings.push(format!("quantize: no tensor matches {pattern:?}"));
        }
    }
    Ok(tensors)
}

/// Whether a tensor is a matrix, or a stack of them, of the floats that can be encoded.
pub(crate) fn is_float_matrix(dtype: Dtype, shape: &[u64]) -> bool {
    cast::is_castable(dtype) && matches!(shape.len(), 2 | 3)
}

fn refuse_duplicate_names(
    planned: &[(usize, PlannedTensor)],
    candidates: &[Candidate<'_>],
    expected: &str,
) -> Result<()> {
    let mut names = HashSet::new();
    for (position, tensor) in planned {
        if !names.insert(tensor.name.as_str()) {
            return Err(Error::tensor(candidates[*position].path, &tensor.name, "two", expected));
        }
    }
    // Halves of a pair have two spellings: X_blocks beside X.blocks makes two tensors X.
    for (position, tensor) in planned {
        if let Some(base) = tensor.encoded_name()
            && [".blocks", ".scales"].iter().all(|suffix| names.contains(format!("{base}{suffix}").as_str()))
        {
            return Err(Error::tensor(candidates[*position].path, base, "an MXFP4 pair and a matrix", expected));
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
