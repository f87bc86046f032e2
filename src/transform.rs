//! Makes output bytes from source bytes: positioned reads into reused buffers, then a copy, a cast or a decode.

use std::fs::File;
use std::ops::Range;

use crate::cast::{self, Counts, OnOverflow, Target};
use crate::checkpoint::{Checkpoint, TensorSpec};
use crate::error::Result;
use crate::file;
use crate::mxfp4::DecodeTable;
use crate::plan::{PlannedTensor, Transform};

/// Makes the bytes of planned tensors; one per worker.
#[derive(Debug)]
pub struct Producer<'a> {
    checkpoint: &'a Checkpoint,
    on_overflow: OnOverflow,
    decode_table: Option<(Target, DecodeTable)>,
    /// The file read last from each of a transform's sources.
    handles: [Option<(usize, File)>; 2],
    inputs: [Vec<u8>; 2],
}

impl<'a> Producer<'a> {
    /// A producer that reads `checkpoint`.
    #[must_use]
    pub fn new(checkpoint: &'a Checkpoint, on_overflow: OnOverflow) -> Self {
        Self { checkpoint, on_overflow, decode_table: None, handles: [None, None], inputs: [Vec::new(), Vec::new()] }
    }

    /// Fills `out` with the output bytes of some units of a tensor.
    pub fn produce(&mut self, tensor: &PlannedTensor, units: &Range<u64>, out: &mut Vec<u8>) -> Result<Counts> {
        resize(out, (units.end - units.start) * tensor.transform.output_unit_bytes());
        let specs = self.checkpoint.tensors();
        if tensor.transform == Transform::Copy {
            self.read(&specs[tensor.sources[0]], 0, units.start, out)?;
            return Ok(Counts::default());
        }
        for (slot, (&source, unit_bytes)) in tensor.sources.iter().zip(tensor.transform.source_unit_bytes()).enumerate()
        {
            let mut input = std::mem::take(&mut self.inputs[slot]);
            resize(&mut input, (units.end - units.start) * unit_bytes);
            let read = self.read(&specs[source], slot, units.start * unit_bytes, &mut input);
            self.inputs[slot] = input;
            read?;
        }
        Ok(match tensor.transform {
            Transform::Copy => unreachable!("returned above"),
            Transform::Cast { from, to } => cast::cast(from, to, &self.inputs[0], out, self.on_overflow),
            Transform::Dequantize { to } => {
                let table = match self.decode_table.take() {
                    Some((target, table)) if target == to => table,
                    _ => DecodeTable::new(to, self.on_overflow),
                };
                let counts = table.decode(&self.inputs[0], &self.inputs[1], out);
                self.decode_table = Some((to, table));
                counts
            }
        })
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
        debug_assert!(out.is_empty(), "plans stay inside their tensors");
        Ok(())
    }
}

/// Sets the length of a buffer that is about to be overwritten.
fn resize(buffer: &mut Vec<u8>, nbytes: u64) {
    buffer.resize(usize::try_from(nbytes).expect("no more than a worker's buffer"), 0);
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
