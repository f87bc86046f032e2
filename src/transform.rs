//! Makes output bytes from source bytes: positioned reads into reused buffers, then a copy, a cast or a decode.

use std::fs::File;
use std::ops::Range;

use crate::cast::{self, Counts, OnOverflow, Target};
use crate::checkpoint::{Checkpoint, TensorSpec};
use crate::error::{Error, Result};
use crate::file;
use crate::mxfp4::DecodeTable;
use crate::plan::{PlannedTensor, Transform};

/// Makes the bytes of planned tensors; one per worker.
///
/// Output and inputs share one buffer, so that a worker never holds more than the largest chunk needs.
#[derive(Debug)]
pub struct Producer<'a> {
    checkpoint: &'a Checkpoint,
    on_overflow: OnOverflow,
    decode_table: Option<(Target, DecodeTable)>,
    /// The file read last from each of a transform's sources.
    handles: [Option<(usize, File)>; 2],
    buffer: Vec<u8>,
    output_bytes: usize,
}

impl<'a> Producer<'a> {
    /// A producer that reads `checkpoint`.
    #[must_use]
    pub fn new(checkpoint: &'a Checkpoint, on_overflow: OnOverflow) -> Self {
        Self { checkpoint, on_overflow, decode_table: None, handles: [None, None], buffer: Vec::new(), output_bytes: 0 }
    }

    /// The bytes made last.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.buffer[..self.output_bytes]
    }

    /// Makes the output bytes of some units of a tensor.
    pub fn produce(&mut self, tensor: &PlannedTensor, units: &Range<u64>) -> Result<Counts> {
        let count = units.end - units.start;
        let transform = tensor.transform;
        let output_bytes = buffer_bytes(count * transform.output_unit_bytes());
        let input_unit_bytes = if transform == Transform::Copy { &[] } else { transform.source_unit_bytes() };
        let input_bytes = input_unit_bytes.iter().map(|unit_bytes| buffer_bytes(count * unit_bytes));
        let mut buffer = std::mem::take(&mut self.buffer);
        grow(&mut buffer, output_bytes + input_bytes.sum::<usize>())?;
        let result = self.fill(tensor, units, &mut buffer, output_bytes);
        (self.buffer, self.output_bytes) = (buffer, output_bytes);
        result
    }

    fn fill(
        &mut self,
        tensor: &PlannedTensor,
        units: &Range<u64>,
        buffer: &mut [u8],
        output_bytes: usize,
    ) -> Result<Counts> {
        let specs = self.checkpoint.tensors();
        let (out, inputs) = buffer.split_at_mut(output_bytes);
        let unit_bytes = tensor.transform.source_unit_bytes();
        let first_bytes = buffer_bytes((units.end - units.start) * unit_bytes[0]);
        match tensor.transform {
            Transform::Copy => {
                self.read(&specs[tensor.sources[0]], 0, units.start, out)?;
                Ok(Counts::default())
            }
            Transform::Cast { from, to } => {
                let input = &mut inputs[..first_bytes];
                self.read(&specs[tensor.sources[0]], 0, units.start * unit_bytes[0], input)?;
                Ok(cast::cast(from, to, input, out, self.on_overflow))
            }
            Transform::Dequantize { to } => {
                let (blocks, rest) = inputs.split_at_mut(first_bytes);
                let scales = &mut rest[..buffer_bytes((units.end - units.start) * unit_bytes[1])];
                self.read(&specs[tensor.sources[0]], 0, units.start * unit_bytes[0], blocks)?;
                self.read(&specs[tensor.sources[1]], 1, units.start * unit_bytes[1], scales)?;
                let table = match self.decode_table.take() {
                    Some((target, table)) if target == to => table,
                    _ => DecodeTable::new(to, self.on_overflow),
                };
                let counts = table.decode(blocks, scales, out);
                self.decode_table = Some((to, table));
                Ok(counts)
            }
        }
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
    let inputs: u64 = match transform {
        Transform::Copy => 0,
        _ => transform.source_unit_bytes().iter().sum(),
    };
    (worker_bytes / (inputs + transform.output_unit_bytes())).max(1)
}
