//! What a checkpoint holds: a table of its tensors, and statistics of their values.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use safetensors::Dtype;
use serde::Serialize;

use crate::cast::{OnOverflow, Target};
use crate::checkpoint::Checkpoint;
use crate::dtype;
use crate::error::{Result, printable};
use crate::float8;
use crate::mxfp4;
use crate::ordered_map::OrderedMap;
use crate::plan::{Piece, PlannedTensor};
use crate::progress::{Observer, Phase, Progress};
use crate::stats::{Moments, Stats, moments_of};
use crate::transform::{self, Producer, Transform};
use crate::work::{self, Chunk, Chunks, Job, Resources, lock};

/// A checkpoint's tensors and totals.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// The checkpoint.
    #[serde(serialize_with = "crate::verify::as_text")]
    pub path: PathBuf,
    /// Its tensors.
    pub tensors: Vec<TensorRow>,
    /// Number of tensors.
    pub total_tensors: u64,
    /// Number of parameters: MXFP4 values count once, scales do not.
    pub total_parameters: u64,
    /// Parameters and scales, as model hubs count them.
    pub stored_elements: u64,
    /// Bytes of tensor data.
    pub total_bytes: u64,
    /// The `__metadata__` of its files.
    pub metadata: OrderedMap<String>,
}

/// One tensor.
#[derive(Debug, Serialize)]
pub struct TensorRow {
    /// Full dotted name.
    pub name: String,
    /// NumPy or `ml_dtypes` name.
    pub dtype: &'static str,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Bytes of data.
    pub nbytes: u64,
    /// Files that hold it.
    pub files: Vec<String>,
    /// `blocks` or `scales` of an MXFP4 pair.
    pub mxfp4: Option<&'static str>,
    /// `weight` or `scales` of a float8 weight with block scales.
    pub float8: Option<&'static str>,
    /// Statistics of the values, if asked for. Those of MXFP4 blocks are of the decoded values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

/// Describes a checkpoint.
#[must_use]
pub fn inspect(checkpoint: &Checkpoint) -> Inspection {
    let pairs = pairs(checkpoint);
    let mut tensors: Vec<_> = checkpoint
        .tensors()
        .iter()
        .map(|tensor| TensorRow {
            name: tensor.name.clone(),
            dtype: dtype::name(tensor.dtype),
            shape: tensor.shape.clone(),
            nbytes: tensor.nbytes,
            files: tensor.parts.iter().map(|part| checkpoint.files()[part.file].name.clone()).collect(),
            mxfp4: None,
            float8: None,
            stats: None,
        })
        .collect();
    for pair in pairs {
        tensors[pair.blocks].mxfp4 = Some("blocks");
        tensors[pair.scales].mxfp4 = Some("scales");
    }
    for (weight, scales) in float8::pairs_of_any_size(&candidates(checkpoint)) {
        tensors[weight].float8 = Some("weight");
        tensors[scales].float8 = Some("scales");
    }
    Inspection {
        path: checkpoint.root().to_path_buf(),
        total_tensors: tensors.len() as u64,
        total_parameters: checkpoint.total_parameters(),
        stored_elements: checkpoint.stored_elements(),
        total_bytes: tensors.iter().map(|tensor| tensor.nbytes).sum(),
        metadata: checkpoint.metadata().clone(),
        tensors,
    }
}

/// Reads every tensor and adds its statistics. Memory is bounded as in a conversion.
pub fn add_stats(
    inspection: &mut Inspection,
    checkpoint: &Checkpoint,
    resources: Resources,
    observer: &mut Observer<'_>,
) -> Result<()> {
    let pool = resources.pool()?;
    let mut planned: Vec<_> = checkpoint
        .tensors()
        .iter()
        .enumerate()
        .map(|(index, tensor)| whole(index, tensor.nbytes, tensor.dtype))
        .collect();
    for pair in pairs(checkpoint) {
        let transform = Transform::Dequantize { to: Target::F32 };
        let units = 0..checkpoint.tensors()[pair.scales].nbytes;
        planned[pair.blocks] = PlannedTensor {
            dtype: Dtype::F32,
            transform,
            sources: vec![pair.blocks, pair.scales],
            pieces: vec![Piece { file: 0, offset: 0, units }],
            ..whole(pair.blocks, 0, Dtype::F32)
        };
    }
    let names = checkpoint.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    let output_bytes = |tensor: &PlannedTensor| tensor.pieces[0].units.end * tensor.transform.output_unit_bytes();
    let progress = Progress::new(Phase::Read, names, planned.iter().map(output_bytes).sum());
    let worker_bytes = pool.worker_bytes;
    let job = StatsJob { checkpoint, tensors: &planned, worker_bytes, progress: &progress, stats: Mutex::default() };
    work::run(&job, 0..planned.len(), pool.workers, &progress, observer)?;
    for (item, stats) in job.stats.into_inner().unwrap_or_else(PoisonError::into_inner) {
        inspection.tensors[item].stats = Some(stats);
    }
    Ok(())
}

fn pairs(checkpoint: &Checkpoint) -> Vec<mxfp4::Pair> {
    mxfp4::pair(&candidates(checkpoint)).pairs
}

fn candidates(checkpoint: &Checkpoint) -> Vec<mxfp4::Candidate<'_>> {
    checkpoint.tensors().iter().map(|tensor| tensor.candidate(checkpoint.root())).collect()
}

/// A plan that reads a tensor as it is.
fn whole(index: usize, nbytes: u64, dtype: Dtype) -> PlannedTensor {
    PlannedTensor {
        name: String::new(),
        dtype,
        source_dtype: "",
        shape: Vec::new(),
        nbytes,
        transform: Transform::Copy,
        sources: vec![index],
        pieces: vec![Piece { file: 0, offset: 0, units: 0..nbytes }],
    }
}

struct StatsJob<'a> {
    checkpoint: &'a Checkpoint,
    tensors: &'a [PlannedTensor],
    worker_bytes: u64,
    progress: &'a Progress<'a>,
    stats: Mutex<Vec<(usize, Stats)>>,
}

impl<'a> Job for StatsJob<'a> {
    type Scratch = (Producer<'a>, Moments);
    type State = Moments;

    fn chunks(&self, item: usize) -> Chunks {
        let tensor = &self.tensors[item];
        // A multiple of every element's size.
        let chunk_units = transform::chunk_units(tensor.transform, self.worker_bytes).next_multiple_of(8);
        Chunks::new(item, tensor.pieces.iter().map(|piece| piece.units.clone()), chunk_units)
    }

    fn scratch(&self) -> Self::Scratch {
        (Producer::new(self.checkpoint, OnOverflow::Warn), Moments::default())
    }

    fn begin(&self, _: usize) -> Moments {
        Moments::default()
    }

    fn process(&self, chunk: &Chunk, (producer, moments): &mut Self::Scratch) -> Result<()> {
        let tensor = &self.tensors[chunk.item];
        producer.produce(tensor.transform, &tensor.sources, &chunk.units)?;
        *moments = moments_of(tensor.dtype, producer.output());
        self.progress.add_bytes(producer.output().len() as u64);
        Ok(())
    }

    fn commit(&self, _: &Chunk, (_, moments): &mut Self::Scratch, state: &mut Moments) -> Result<()> {
        state.merge(moments);
        Ok(())
    }

    fn finish(&self, item: usize, state: Moments) -> Result<()> {
        lock(&self.stats).push((item, state.stats()));
        Ok(())
    }
}

impl Inspection {
    /// The table for people.
    #[must_use]
    pub fn to_table(&self) -> String {
        let has_stats = self.tensors.iter().any(|tensor| tensor.stats.is_some());
        let mut header = vec!["name", "dtype", "shape", "size", "file", "mxfp4"];
        // Few checkpoints have such weights.
        let has_float8 = self.tensors.iter().any(|tensor| tensor.float8.is_some());
        if has_float8 {
            header.push("float8");
        }
        if has_stats {
            header.extend(["min", "max", "mean", "std", "nan", "inf"]);
        }
        let mut rows = vec![header.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        for tensor in &self.tensors {
            let file = match tensor.files.as_slice() {
                [first, .., last] => format!("{first} .. {last}"),
                files => files.concat(),
            };
            let mut row = vec![
                one_line(&tensor.name),
                tensor.dtype.to_owned(),
                format!("{:?}", tensor.shape),
                human_bytes(tensor.nbytes),
                one_line(&file),
                tensor.mxfp4.unwrap_or("").to_owned(),
            ];
            if has_float8 {
                row.push(tensor.float8.unwrap_or("").to_owned());
            }
            if let Some(stats) = &tensor.stats {
                let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.4e}"));
                row.extend([stats.min, stats.max, stats.mean, stats.std].map(number));
                row.extend([stats.nan, stats.inf].map(|count| count.to_string()));
            }
            rows.push(row);
        }
        let widths: Vec<usize> = (0..rows[0].len())
            .map(|column| {
                rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                write!(line, "{cell:width$}  ").expect("writing to a String cannot fail");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        writeln!(
            text,
            "\n{} tensors, {} in {}\n{} parameters ({} stored elements, scales included)",
            self.total_tensors,
            human_bytes(self.total_bytes),
            self.path.display(),
            grouped(self.total_parameters),
            grouped(self.stored_elements),
        )
        .expect("writing to a String cannot fail");
        text
    }
}

/// A name that stays in its line and moves no cursor.
pub(crate) fn one_line(name: &str) -> String {
    printable(name).replace('\n', "\\u000a")
}

/// Bytes in decimal units, as `shard_size` and `max_memory` count them.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn human_bytes(nbytes: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match units.iter().find(|(size, _)| nbytes as f64 >= *size) {
        Some((size, unit)) => format!("{:.2} {unit}", nbytes as f64 / size),
        None => format!("{nbytes} B"),
    }
}

/// Digits in groups of three.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(grouped(20_914_757_184), "20,914,757,184");
        assert_eq!(grouped(7), "7");
        assert_eq!(human_bytes(13_761_264_768), "13.76 GB");
        assert_eq!(human_bytes(999), "999 B");
    }
}
