//! Makes output bytes from source bytes: positioned reads into reused buffers, then a copy, a cast or a decode.

use std::fs::File;
use std::ops::Range;

use safetensors::Dtype;

use crate::cast::{self, Counts, OnOverflow, Target};
use crate::checkpoint::{Checkpoint, TensorSpec};
use crate::error::{Error, Result};
use crate::file;
use crate::float8::{self, Blocks, Scales, Stretch};
use crate::mxfp4::{self, BLOCK_BYTES, DecodeTable, ErrorSums, MX_BLOCK_SIZE, ScaleRule};

/// How source bytes become output bytes. Work is divided in units: the smallest stretch that can be done alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    /// Byte for byte; a unit is a byte.
    Copy,
    /// A float cast; a unit is an element.
    Cast {
        /// Source dtype.
        from: Dtype,
        /// Target dtype.
        to: Target,
    },
    /// MXFP4 blocks and scales to floats; a unit is a block of 32 values.
    Dequantize {
        /// Target dtype.
        to: Target,
    },
    /// float8 weights and the scales of their blocks to floats; a unit is an element.
    DequantizeFloat8 {
        /// Target dtype.
        to: Target,
        /// Where the scales stand.
        blocks: Blocks,
    },
    /// Floats to MXFP4 blocks; a unit is a block of 32 values.
    QuantizeBlocks {
        /// Source dtype.
        from: Dtype,
        /// Rule of the scales.
        rule: ScaleRule,
    },
    /// Floats to the scales of those blocks; a unit is a block of 32 values.
    QuantizeScales {
        /// Source dtype.
        from: Dtype,
        /// Rule of the scales.
        rule: ScaleRule,
    },
    /// 64-bit integers to 32 bits of the same sign; a unit is an element. Loading alone does this.
    Narrow {
        /// I64 or U64.
        from: Dtype,
    },
    /// float4 codes, two to a byte, to a byte each; a unit is a byte of the source. Loading alone does this.
    Unpack,
}

impl Transform {
    /// Bytes of a unit in each source tensor; the scales of float8 blocks have no units.
    #[must_use]
    pub fn source_unit_bytes(self) -> &'static [u64] {
        match self {
            Self::Copy | Self::Unpack | Self::DequantizeFloat8 { .. } => &[1],
            Self::Cast { from: Dtype::F64, .. } | Self::Narrow { .. } => &[8],
            Self::Cast { from: Dtype::F32, .. } => &[4],
            Self::Cast { .. } => &[2],
            Self::Dequantize { .. } => &[BLOCK_BYTES as u64, 1],
            Self::QuantizeBlocks { from, .. } | Self::QuantizeScales { from, .. } => match from {
                Dtype::F64 => &[8 * MX_BLOCK_SIZE as u64],
                Dtype::F32 => &[4 * MX_BLOCK_SIZE as u64],
                _ => &[2 * MX_BLOCK_SIZE as u64],
            },
        }
    }

    /// Bytes of a unit in the output.
    #[must_use]
    pub fn output_unit_bytes(self) -> u64 {
        let element = |to: Target| to.dtype().bitsize() as u64 / 8;
        match self {
            Self::Copy | Self::QuantizeScales { .. } => 1,
            Self::Cast { to, .. } | Self::DequantizeFloat8 { to, .. } => element(to),
            Self::Dequantize { to } => element(to) * MX_BLOCK_SIZE as u64,
            Self::QuantizeBlocks { .. } => BLOCK_BYTES as u64,
            Self::Narrow { .. } => 4,
            Self::Unpack => 2,
        }
    }

    /// Whether it makes MXFP4 blocks, and so has a [`mxfp4::QuantizationError`].
    #[must_use]
    pub fn encodes_blocks(self) -> bool {
        matches!(self, Self::QuantizeBlocks { .. })
    }

    /// Bytes of a unit that are made along with the output and dropped: the other half of a pair.
    fn dropped_unit_bytes(self) -> u64 {
        match self {
            Self::QuantizeBlocks { .. } => 1,
            Self::QuantizeScales { .. } => BLOCK_BYTES as u64,
            _ => 0,
        }
    }

    /// Bytes of a unit in all buffers but that of the output: none for what is only copied.
    fn input_unit_bytes(self) -> u64 {
        match self {
            Self::Copy => 0,
            _ => self.source_unit_bytes().iter().sum::<u64>() + self.dropped_unit_bytes(),
        }
    }

    /// Bytes of a unit in what a producer keeps beside its buffer.
    fn kept_unit_bytes(self) -> u64 {
        match self {
            Self::DequantizeFloat8 { blocks, .. } => blocks.scale_bytes_per_value(),
            _ => 0,
        }
    }
}

/// Scales of float8 blocks that were read last.
#[derive(Debug, Default)]
struct KeptScales {
    /// The tensor that they are of; None where nothing was read.
    source: Option<usize>,
    scales: Range<u64>,
    bytes: Vec<u8>,
}

/// Makes the output bytes of tensors; one per worker.
///
/// Output and inputs share one buffer, and so does what is made along and dropped: a worker never holds more than the
/// largest chunk needs.
#[derive(Debug)]
pub struct Producer<'a> {
    checkpoint: &'a Checkpoint,
    on_overflow: OnOverflow,
    decode_table: Option<(Target, DecodeTable)>,
    float8_scales: KeptScales,
    /// The file read last from each of a transform's sources.
    handles: [Option<(usize, File)>; 2],
    buffer: Vec<u8>,
    output_bytes: usize,
    bytes_read: u64,
    error_sums: ErrorSums,
}

impl<'a> Producer<'a> {
    /// A producer that reads `checkpoint`.
    #[must_use]
    pub fn new(checkpoint: &'a Checkpoint, on_overflow: OnOverflow) -> Self {
        Self {
            checkpoint,
            on_overflow,
            decode_table: None,
            float8_scales: KeptScales::default(),
            handles: [None, None],
            buffer: Vec::new(),
            output_bytes: 0,
            bytes_read: 0,
            error_sums: ErrorSums::default(),
        }
    }

    /// The bytes that [`Producer::produce`] made last.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.buffer[..self.output_bytes]
    }

    /// Bytes read from files since this was last asked.
    pub fn take_bytes_read(&mut self) -> u64 {
        std::mem::take(&mut self.bytes_read)
    }

    /// What [`Transform::QuantizeBlocks`] lost since this was last asked.
    pub fn take_error_sums(&mut self) -> ErrorSums {
        std::mem::take(&mut self.error_sums)
    }

    /// Makes the output bytes of some units of a tensor that `transform` makes of `sources`, indices of tensors.
    pub fn produce(&mut self, transform: Transform, sources: &[usize], units: &Range<u64>) -> Result<Counts> {
        let output_bytes = buffer_bytes((units.end - units.start) * transform.output_unit_bytes());
        let mut buffer = std::mem::take(&mut self.buffer);
        grow(&mut buffer, output_bytes + input_bytes(transform, units))?;
        let (out, inputs) = buffer.split_at_mut(output_bytes);
        let result = self.fill(transform, sources, units, out, inputs);
        (self.buffer, self.output_bytes) = (buffer, output_bytes);
        result
    }

    /// [`Producer::produce`] into `out`, which has the length of the output: what is only copied is read right there.
    pub fn produce_into(
        &mut self,
        transform: Transform,
        sources: &[usize],
        units: &Range<u64>,
        out: &mut [u8],
    ) -> Result<Counts> {
        let mut buffer = std::mem::take(&mut self.buffer);
        grow(&mut buffer, input_bytes(transform, units))?;
        let result = self.fill(transform, sources, units, out, &mut buffer);
        (self.buffer, self.output_bytes) = (buffer, 0);
        result
    }

    fn fill(
        &mut self,
        transform: Transform,
        sources: &[usize],
        units: &Range<u64>,
        out: &mut [u8],
        inputs: &mut [u8],
    ) -> Result<Counts> {
        let (specs, on_overflow) = (self.checkpoint.tensors(), self.on_overflow);
        let unit_bytes = transform.source_unit_bytes();
        let stretch_bytes = |source: usize| buffer_bytes((units.end - units.start) * unit_bytes[source]);
        let dropped_bytes = buffer_bytes((units.end - units.start) * transform.dropped_unit_bytes());
        if transform == Transform::Copy {
            self.read(&specs[sources[0]], 0, units.start, out)?;
            return Ok(Counts::default());
        }
        let (first, rest) = inputs.split_at_mut(stretch_bytes(0));
        self.read(&specs[sources[0]], 0, units.start * unit_bytes[0], first)?;
        match transform {
            Transform::Copy => unreachable!("done above"),
            Transform::Cast { from, to } => Ok(cast::cast(from, to, first, out, on_overflow)),
            Transform::Narrow { from } => Ok(cast::narrow(from, first, out)),
            Transform::Unpack => {
                mxfp4::unpack(first, out);
                Ok(Counts::default())
            }
            Transform::Dequantize { to } => {
                let scales = &mut rest[..stretch_bytes(1)];
                self.read(&specs[sources[1]], 1, units.start * unit_bytes[1], scales)?;
                let table = match self.decode_table.take() {
                    Some((target, table)) if target == to => table,
                    _ => DecodeTable::new(to, on_overflow),
                };
                let counts = table.decode(first, scales, out);
                self.decode_table = Some((to, table));
                Ok(counts)
            }
            Transform::DequantizeFloat8 { to, blocks } => {
                let element_bytes = transform.output_unit_bytes();
                let (mut codes, mut out, mut counts) = (&*first, out, Counts::default());
                for stretch in blocks.stretches(units.clone()) {
                    let length = stretch.values.end - stretch.values.start;
                    let (codes_now, later_codes) = codes.split_at(buffer_bytes(length));
                    let (out_now, later_out) = out.split_at_mut(buffer_bytes(length * element_bytes));
                    let scales = self.scales(sources[1], blocks.scale_dtype.nbytes(), &stretch)?;
                    let first = stretch.values.start;
                    counts.merge(float8::decode(blocks, to, first, codes_now, scales, out_now, on_overflow));
                    (codes, out) = (later_codes, later_out);
                }
                Ok(counts)
            }
            Transform::QuantizeBlocks { from, rule } => {
                let scales = &mut rest[..dropped_bytes];
                mxfp4::encode(from, rule, first, out, scales);
                self.error_sums.add(from, first, out, scales);
                Ok(Counts::default())
            }
            Transform::QuantizeScales { from, rule } => {
                mxfp4::encode(from, rule, first, &mut rest[..dropped_bytes], out);
                Ok(Counts::default())
            }
        }
    }

    /// The scales of a stretch of float8 values: those read last, where these are among them. The runs of a region come row
    /// by row, and many rows share their scales.
    fn scales(&mut self, source: usize, scale_bytes: u64, stretch: &Stretch) -> Result<Scales<'_>> {
        let wanted = &stretch.scales;
        let mut kept = std::mem::take(&mut self.float8_scales);
        if kept.source != Some(source) || wanted.start < kept.scales.start || wanted.end > kept.scales.end {
            let nbytes = buffer_bytes((wanted.end - wanted.start) * scale_bytes);
            kept.source = None;
            grow(&mut kept.bytes, nbytes)?;
            let specs = self.checkpoint.tensors();
            self.read(&specs[source], 1, wanted.start * scale_bytes, &mut kept.bytes[..nbytes])?;
            (kept.source, kept.scales) = (Some(source), wanted.clone());
        }
        self.float8_scales = kept;
        Ok(Scales { first: self.float8_scales.scales.start, bytes: &self.float8_scales.bytes })
    }

    /// Fills `out` from a tensor's data, across its parts.
    fn read(&mut self, tensor: &TensorSpec, slot: usize, start: u64, mut out: &mut [u8]) -> Result<()> {
        let mut part_start = 0;
        let mut position = start;
        for part in &tensor.parts {
            let part_end = part_start + part.nbytes;
            if position < part_end && !out.is_empty() {
                let wanted = (part_end - position).min(out.len() as u64);
                let (now, later) = out.split_at_mut(usize::try_from(wanted).expect("no more than a buffer"));
                let source = &self.checkpoint.files()[part.file];
                let file = match &mut self.handles[slot] {
                    Some((index, file)) if *index == part.file => file,
                    handle => &mut handle.insert((part.file, source.open()?)).1,
                };
                file::read_exact_at(&source.path, file, now, part.offset + (position - part_start))?;
                self.bytes_read += wanted;
                position += wanted;
                out = later;
            }
            part_start = part_end;
        }
        if out.is_empty() {
            return Ok(());
        }
        let found = format_args!("{} bytes", tensor.nbytes);
        let expected = format_args!("{} more, as planned", out.len());
        Err(Error::tensor(self.checkpoint.path_of(tensor), &tensor.name, found, expected))
    }
}

/// Bytes of the buffers that some units take beside their output.
fn input_bytes(transform: Transform, units: &Range<u64>) -> usize {
    buffer_bytes((units.end - units.start) * transform.input_unit_bytes())
}

/// A size that [`chunk_units`] has bounded.
fn buffer_bytes(nbytes: u64) -> usize {
    usize::try_from(nbytes).expect("no more than a worker's buffer")
}

/// Makes a buffer at least this long, without the reserve that `Vec` would add. Too little memory is an error: buffers
/// are the largest things there are, and a notebook should survive that they do not fit.
pub(crate) fn grow(buffer: &mut Vec<u8>, nbytes: usize) -> Result<()> {
    if buffer.len() < nbytes {
        let fault = |_| Error::Io { path: "a worker's buffer".into(), source: std::io::ErrorKind::OutOfMemory.into() };
        buffer.try_reserve_exact(nbytes - buffer.len()).map_err(fault)?;
        buffer.resize(nbytes, 0);
    }
    Ok(())
}

/// Units per chunk, so that the inputs and the output of a chunk fit in a worker's memory.
#[must_use]
pub fn chunk_units(transform: Transform, worker_bytes: u64) -> u64 {
    let unit_bytes = transform.input_unit_bytes() + transform.kept_unit_bytes() + transform.output_unit_bytes();
    (worker_bytes / unit_bytes).max(1)
}
