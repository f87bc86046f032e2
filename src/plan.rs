//! The plan of a conversion: which tensors become what, in which files, at which offsets. Pure and deterministic.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;

use crate::cast::{self, Target};
use crate::checkpoint::{Checkpoint, TensorSpec};
use crate::dtype;
use crate::error::{Error, Result};
use crate::float8::{self, BlockSize};
use crate::header;
use crate::mxfp4::{self, BLOCK_BYTES, BLOCKS_SUFFIX, Candidate, MX_BLOCK_SIZE, Pair, SCALES_SUFFIX};
use crate::options::{Float8Mode, Format, Mxfp4Mode, Options, Quantization};
use crate::ordered_map::OrderedMap;
use crate::output::{Extent, FileLayout, PlacedFile, Placement, Tensor};
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
    /// Parameters: MXFP4 values count once, scales do not.
    pub total_parameters: u64,
    /// Parameters and the scales that the output still has.
    pub stored_elements: u64,
    /// What the user should know before the job runs.
    pub warnings: Vec<String>,
    format: Format,
    metadata: OrderedMap<String>,
}

impl Plan {
    /// All bytes of a file but the tensors' own.
    #[must_use]
    pub fn file_layout(&self, file: usize) -> FileLayout {
        let part_bytes = |index: usize| {
            self.tensors[index].pieces.first().map_or(0, |piece| self.tensors[index].piece_nbytes(piece))
        };
        let members = self.files[file].placed.members(|index| self.tensors[index].view(), part_bytes);
        let layout = self.format.layout().file(&members, &self.metadata);
        layout.expect("planned by the same call")
    }

    /// Files that the format has beside the tensors.
    pub(crate) fn side_files(&self) -> Vec<(String, Vec<u8>)> {
        let tensors: Vec<_> = self.tensors.iter().map(PlannedTensor::view).collect();
        let files = self.files.iter().map(|file| file.placed.clone());
        self.format.layout().side_files(&tensors, &files.collect::<Vec<_>>())
    }

    /// Folders that the files are in.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &str> {
        self.shards
            .iter()
            .filter_map(|(_, files)| self.files.get(files.start)?.path().split_once('/'))
            .map(|(folder, _)| folder)
    }
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

    /// What a format knows of it.
    #[must_use]
    pub fn view(&self) -> Tensor<'_> {
        Tensor { name: &self.name, dtype: self.dtype, shape: &self.shape, nbytes: self.nbytes }
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
    /// What it holds.
    pub placed: PlacedFile,
    /// Whole size.
    pub nbytes: u64,
    /// Bytes of tensor data in it.
    pub data_nbytes: u64,
}

impl PlannedFile {
    /// Path below the output folder, with `/`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.placed.path
    }
}

/// Plans the conversion of a checkpoint.
pub fn of_checkpoint(checkpoint: &Checkpoint, options: &Options) -> Result<Plan> {
    of_sorted(checkpoint, options, |_| {})
}

/// As [`of_checkpoint`], with the tensors of `names` in their order, whatever that of the source: for a tree that was made
/// from another serialization.
pub fn in_order<'a>(
    checkpoint: &Checkpoint,
    options: &Options,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<Plan> {
    let places: HashMap<&str, usize> = names.into_iter().zip(0..).collect();
    let by_names = |tensors: &mut Vec<PlannedTensor>| {
        tensors.sort_by_key(|tensor| places.get(tensor.name.as_str()).copied().unwrap_or(usize::MAX));
    };
    of_sorted(checkpoint, options, by_names)
}

fn of_sorted(checkpoint: &Checkpoint, options: &Options, sort: impl FnOnce(&mut Vec<PlannedTensor>)) -> Result<Plan> {
    let float8_size = match options.float8 {
        Float8Mode::Keep => BlockSize::default(),
        Float8Mode::Dequantize => checkpoint.float8_size()?,
    };
    let path_of = |tensor| checkpoint.path_of(tensor);
    sorted_plan(checkpoint.tensors(), path_of, checkpoint.metadata(), float8_size, options, sort)
}

/// Plans the conversion of a checkpoint's `tensors`; `path_of` names the file of a tensor, for messages, and `metadata` is
/// the checkpoint's. `float8_size` is that of the checkpoint's float8 blocks.
pub fn plan<'a>(
    tensors: &'a [TensorSpec],
    path_of: impl Fn(&'a TensorSpec) -> &'a Path,
    metadata: &OrderedMap<String>,
    float8_size: BlockSize,
    options: &Options,
) -> Result<Plan> {
    sorted_plan(tensors, path_of, metadata, float8_size, options, |_| {})
}

fn sorted_plan<'a>(
    tensors: &'a [TensorSpec],
    path_of: impl Fn(&'a TensorSpec) -> &'a Path,
    metadata: &OrderedMap<String>,
    float8_size: BlockSize,
    options: &Options,
    sort: impl FnOnce(&mut Vec<PlannedTensor>),
) -> Result<Plan> {
    let shard_bytes = options.shard_bytes()?;
    let selection = Selection::new(options.include.as_deref(), options.exclude.as_deref())?;
    let quantization = options.quantization()?;
    let candidates: Vec<_> = tensors.iter().map(|tensor| tensor.candidate(path_of(tensor))).collect();
    let Decoded { mut planned, halves } = decoded(&candidates, float8_size, options, &selection)?;
    let decodes = !planned.is_empty();
    planned.extend(plain_tensors(&candidates, options, &selection, &halves)?);
    planned.sort_by_key(|(position, _)| *position);
    if decodes {
        refuse_duplicate_names(&planned, &candidates, "one tensor of this name after pairs are decoded")?;
    }
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
    sort(&mut planned);
    let Placement { files, shards, warnings: of_placement } = place(&planned, shard_bytes, options.format)?;
    warnings.extend(of_placement);
    let files = lay_out(&mut planned, files, metadata, options.format)?;
    let (format, metadata) = (options.format, metadata.clone());
    Ok(Plan { tensors: planned, files, shards, total_parameters, stored_elements, warnings, format, metadata })
}

fn place(tensors: &[PlannedTensor], shard_bytes: u64, format: Format) -> Result<Placement> {
    let views: Vec<_> = tensors.iter().map(PlannedTensor::view).collect();
    format.layout().place(&views, &|index| tensors[index].transform.output_unit_bytes(), shard_bytes)
}

/// The files with their sizes; fills in each tensor's pieces.
fn lay_out(
    tensors: &mut [PlannedTensor],
    files: Vec<PlacedFile>,
    metadata: &OrderedMap<String>,
    format: Format,
) -> Result<Vec<PlannedFile>> {
    let mut planned = Vec::with_capacity(files.len());
    for (number, placed) in files.into_iter().enumerate() {
        let own_bytes = placed.data.end - placed.data.start;
        let part_bytes =
            |index: usize| tensors[index].pieces.first().map_or(own_bytes, |piece| tensors[index].piece_nbytes(piece));
        let members = placed.members(|index| tensors[index].view(), part_bytes);
        let file = format.layout().file(&members, metadata).map_err(|found| Error::Mapping {
            found: format!("{}: {found}", placed.path),
            expected: "tensors that the format can hold; a smaller shard_size makes more files".into(),
        })?;
        drop(members);
        let mut data_nbytes = 0;
        for Extent { member, offset, data } in file.extents {
            let tensor = &mut tensors[placed.tensors.start + member];
            let unit_bytes = tensor.transform.output_unit_bytes();
            data_nbytes += data.end - data.start;
            tensor.pieces.push(Piece { file: number, offset, units: data.start / unit_bytes..data.end / unit_bytes });
        }
        planned.push(PlannedFile { placed, nbytes: file.nbytes, data_nbytes });
    }
    Ok(planned)
}

fn patterns(globs: Option<&[String]>) -> String {
    globs.map_or_else(|| "(not given)".into(), |globs| format!("{globs:?}"))
}

/// What becomes of pairs that are decoded.
struct Decoded {
    /// The selected decoded tensors, each with its position in the source.
    planned: Vec<(usize, PlannedTensor)>,
    /// The source tensors that are no tensors of their own any more.
    halves: HashSet<usize>,
}

/// The pairs that `options` decode.
fn decoded(
    candidates: &[Candidate<'_>],
    float8_size: BlockSize,
    options: &Options,
    selection: &Selection,
) -> Result<Decoded> {
    let (mut planned, mut halves) = (Vec::new(), HashSet::new());
    // A misfit has two names, like a pair: leaving out either leaves it out.
    let refuse = |name: &str, index: usize, fault: Error| {
        if selection.takes(name) && selection.takes(candidates[index].name) { Err(fault) } else { Ok(index) }
    };
    if options.mxfp4 == Mxfp4Mode::Dequantize {
        let pairing = mxfp4::pair(candidates);
        for misfit in pairing.misfits {
            halves.insert(refuse(&misfit.name, misfit.index, misfit.fault)?);
        }
        for pair in pairing.pairs {
            halves.extend([pair.blocks, pair.scales]);
            if selection.takes(&pair.name) {
                planned.push((pair.blocks, dequantized(&pair, candidates, options)?));
            }
        }
    }
    if options.float8 == Float8Mode::Dequantize {
        let pairing = float8::pair(candidates, float8_size);
        for misfit in pairing.misfits {
            halves.insert(refuse(&misfit.name, misfit.index, misfit.fault)?);
        }
        for pair in pairing.pairs {
            halves.extend([pair.weight, pair.scales]);
            if selection.takes(candidates[pair.weight].name) {
                planned.push((pair.weight, dequantized_float8(&pair, candidates, options)?));
            }
        }
    }
    Ok(Decoded { planned, halves })
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

/// One decoded float8 weight. `source` precision means bfloat16, which models with such weights are trained in.
fn dequantized_float8(pair: &float8::Pair, candidates: &[Candidate<'_>], options: &Options) -> Result<PlannedTensor> {
    let to = options.precision.target().unwrap_or(Target::Bf16);
    let weight = &candidates[pair.weight];
    Ok(PlannedTensor {
        name: weight.name.to_owned(),
        dtype: to.dtype(),
        source_dtype: dtype::name(weight.dtype),
        shape: weight.shape.to_vec(),
        nbytes: header::tensor_nbytes(weight.path, weight.name, to.dtype(), weight.shape)?,
        transform: Transform::DequantizeFloat8 { to, blocks: pair.blocks },
        sources: vec![pair.weight, pair.scales],
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
