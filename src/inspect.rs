//! What a checkpoint holds: a table of its tensors, and statistics of their values.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use safetensors::Dtype;
use serde::Serialize;

use crate::cast::{OnOverflow, Target};
use crate::checkpoint::Checkpoint;
use crate::dtype;
use crate::error::{Result, printable};
use crate::mxfp4::{self, Candidate, E2M1};
use crate::ordered_map::OrderedMap;
use crate::plan::{Piece, PlannedTensor, Transform};
use crate::progress::{Observer, Phase, Progress};
use crate::transform::{self, Producer};
use crate::work::{self, Chunk, Job, Resources};

/// A checkpoint's tensors and totals.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// The checkpoint.
    pub path: PathBuf,
    /// Its tensors.
    pub tensors: Vec<TensorRow>,
    /// Number of tensors.
    pub total_tensors: u64,
    /// Number of parameters: MXFP4 values count once, their scales do not.
    pub total_parameters: u64,
    /// Parameters and MXFP4 scales, as model hubs count them.
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
    /// Statistics of the values, if asked for. Those of MXFP4 blocks are of the decoded values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

/// Statistics of the finite values of a tensor; None where there are none, or where the dtype has no order.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stats {
    /// Smallest.
    pub min: Option<f64>,
    /// Largest.
    pub max: Option<f64>,
    /// Mean.
    pub mean: Option<f64>,
    /// Population standard deviation.
    pub std: Option<f64>,
    /// Number of NaNs.
    pub nan: u64,
    /// Number of infinities.
    pub inf: u64,
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
            stats: None,
        })
        .collect();
    for pair in pairs {
        tensors[pair.blocks].mxfp4 = Some("blocks");
        tensors[pair.scales].mxfp4 = Some("scales");
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
    let worker_bytes = resources.worker_bytes()?;
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
    let chunks = planned.iter().enumerate().flat_map(|(item, tensor)| {
        // A multiple of every element's size.
        let units = transform::chunk_units(tensor.transform, worker_bytes).next_multiple_of(8);
        work::chunks(item, tensor.pieces.iter().map(|piece| piece.units.clone()), units)
    });
    let job = StatsJob { checkpoint, tensors: &planned, progress: &progress, stats: Mutex::default() };
    work::run(&job, chunks, planned.len(), resources.workers, &progress, observer)?;
    for (item, stats) in job.stats.into_inner().unwrap_or_else(PoisonError::into_inner) {
        inspection.tensors[item].stats = Some(stats);
    }
    Ok(())
}

fn pairs(checkpoint: &Checkpoint) -> Vec<mxfp4::Pair> {
    let tensors = checkpoint.tensors().iter().map(|tensor| Candidate {
        name: &tensor.name,
        dtype: tensor.dtype,
        shape: &tensor.shape,
        path: checkpoint.root(),
    });
    mxfp4::pair(&tensors.collect::<Vec<_>>()).pairs
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
    progress: &'a Progress<'a>,
    stats: Mutex<Vec<(usize, Stats)>>,
}

impl<'a> Job for StatsJob<'a> {
    type Scratch = (Producer<'a>, Moments);
    type State = Moments;

    fn scratch(&self) -> Self::Scratch {
        (Producer::new(self.checkpoint, OnOverflow::Warn), Moments::default())
    }

    fn begin(&self, _: usize) -> Moments {
        Moments::default()
    }

    fn process(&self, chunk: &Chunk, (producer, moments): &mut Self::Scratch) -> Result<()> {
        let tensor = &self.tensors[chunk.item];
        producer.produce(tensor, &chunk.units)?;
        *moments = moments_of(tensor.dtype, producer.output());
        self.progress.add_bytes(producer.output().len() as u64);
        Ok(())
    }

    fn commit(&self, _: &Chunk, (_, moments): &mut Self::Scratch, state: &mut Moments) -> Result<()> {
        state.merge(moments);
        Ok(())
    }

    fn finish(&self, item: usize, state: Moments) -> Result<()> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).push((item, state.stats()));
        Ok(())
    }
}

/// Count, mean and sum of squared deviations of finite values, merged as Chan, Golub and `LeVeque` (1983) do.
#[derive(Debug, Clone, Copy)]
struct Moments {
    count: u64,
    mean: f64,
    squares: f64,
    min: f64,
    max: f64,
    nan: u64,
    inf: u64,
}

impl Default for Moments {
    fn default() -> Self {
        Self { count: 0, mean: 0.0, squares: 0.0, min: f64::INFINITY, max: f64::NEG_INFINITY, nan: 0, inf: 0 }
    }
}

impl Moments {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        const BLOCK: usize = 4096;
        let mut moments = Self::default();
        let mut block = Vec::with_capacity(BLOCK);
        for value in values {
            if value.is_finite() {
                block.push(value);
                if block.len() == BLOCK {
                    moments.merge(&Self::of_block(&block));
                    block.clear();
                }
            } else if value.is_nan() {
                moments.nan += 1;
            } else {
                moments.inf += 1;
            }
        }
        moments.merge(&Self::of_block(&block));
        moments
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    fn of_block(block: &[f64]) -> Self {
        let mut moments = Self { count: block.len() as u64, ..Self::default() };
        if block.is_empty() {
            return moments;
        }
        // Scaled before summing, so that the sum of large doubles stays finite.
        moments.mean = block.iter().map(|value| value / block.len() as f64).sum();
        moments.squares = block.iter().map(|value| (value - moments.mean).powi(2)).sum();
        for &value in block {
            moments.min = moments.min.min(value);
            moments.max = moments.max.max(value);
        }
        moments
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    fn merge(&mut self, other: &Self) {
        self.nan += other.nan;
        self.inf += other.inf;
        if other.count == 0 {
            return;
        }
        let total = self.count + other.count;
        let (of_self, of_other) = (self.count as f64, other.count as f64);
        let delta = other.mean - self.mean;
        // Weighted rather than moved by delta, which can overflow for large doubles.
        self.mean = self.mean * (of_self / total as f64) + other.mean * (of_other / total as f64);
        self.squares += other.squares + delta * delta * (of_self * of_other / total as f64);
        self.count = total;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
    fn stats(self) -> Stats {
        let known = |value: f64| (self.count > 0).then_some(value);
        Stats {
            min: known(self.min),
            max: known(self.max),
            mean: known(self.mean),
            std: known((self.squares / self.count as f64).sqrt()),
            nan: self.nan,
            inf: self.inf,
        }
    }
}

/// Moments of whole elements. Complex values have no order, and the order of float6 codes in a byte is not defined.
fn moments_of(dtype: Dtype, bytes: &[u8]) -> Moments {
    macro_rules! numbers {
        ($type:ty, $width:literal) => {{
            #[allow(clippy::cast_precision_loss, clippy::cast_lossless, reason = "statistics are approximate")]
            let moments =
                Moments::of(bytes.as_chunks::<$width>().0.iter().map(|&chunk| <$type>::from_le_bytes(chunk) as f64));
            moments
        }};
    }
    let by_table = |decode: &dyn Fn(u8) -> f64| {
        let table: Vec<f64> = (0..=255).map(decode).collect();
        Moments::of(bytes.iter().map(|&byte| table[usize::from(byte)]))
    };
    match dtype {
        Dtype::BOOL => Moments::of(bytes.iter().map(|&byte| f64::from(u8::from(byte != 0)))),
        Dtype::U8 => numbers!(u8, 1),
        Dtype::I8 => numbers!(i8, 1),
        Dtype::I16 => numbers!(i16, 2),
        Dtype::U16 => numbers!(u16, 2),
        Dtype::I32 => numbers!(i32, 4),
        Dtype::U32 => numbers!(u32, 4),
        Dtype::I64 => numbers!(i64, 8),
        Dtype::U64 => numbers!(u64, 8),
        Dtype::F32 => numbers!(f32, 4),
        Dtype::F64 => numbers!(f64, 8),
        Dtype::F16 => Moments::of(bytes.as_chunks().0.iter().map(|&chunk| f16::from_le_bytes(chunk).to_f64())),
        Dtype::BF16 => Moments::of(bytes.as_chunks().0.iter().map(|&chunk| bf16::from_le_bytes(chunk).to_f64())),
        Dtype::F4 => {
            let nibbles = bytes.iter().flat_map(|byte| [byte & 0xf, byte >> 4]);
            Moments::of(nibbles.map(|code| f64::from(E2M1[usize::from(code)])))
        }
        Dtype::F8_E8M0 => by_table(&|byte| mxfp4::decode_one(2, byte)),
        Dtype::F8_E5M2 => by_table(&|byte| float8(byte, 2, 15, Specials::Ieee)),
        Dtype::F8_E4M3 => by_table(&|byte| float8(byte, 3, 7, Specials::NanOnly)),
        Dtype::F8_E4M3FNUZ => by_table(&|byte| float8(byte, 3, 8, Specials::NegativeZeroIsNan)),
        Dtype::F8_E5M2FNUZ => by_table(&|byte| float8(byte, 2, 16, Specials::NegativeZeroIsNan)),
        _ => Moments::default(),
    }
}

/// Which codes of an 8-bit float are not numbers.
#[derive(Clone, Copy, PartialEq)]
enum Specials {
    /// The largest exponent holds infinities and NaNs.
    Ieee,
    /// All bits set is NaN.
    NanOnly,
    /// The code of negative zero is NaN.
    NegativeZeroIsNan,
}

/// Value of an 8-bit float.
fn float8(byte: u8, mantissa_bits: u32, bias: i32, specials: Specials) -> f64 {
    let magnitude = byte & 0x7f;
    let exponent = i32::from(magnitude >> mantissa_bits);
    let mantissa = magnitude & ((1 << mantissa_bits) - 1);
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let is_last_exponent = magnitude >> mantissa_bits == 0x7f >> mantissa_bits;
    match specials {
        Specials::Ieee if is_last_exponent && mantissa == 0 => return sign * f64::INFINITY,
        Specials::Ieee if is_last_exponent => return f64::NAN,
        Specials::NanOnly if magnitude == 0x7f => return f64::NAN,
        Specials::NegativeZeroIsNan if byte == 0x80 => return f64::NAN,
        _ => {}
    }
    let fraction = f64::from(mantissa) / f64::from(1u32 << mantissa_bits);
    let (significand, exponent) = if exponent == 0 { (fraction, 1) } else { (1.0 + fraction, exponent) };
    sign * significand * 2f64.powi(exponent - bias)
}

impl Inspection {
    /// The table for people.
    #[must_use]
    pub fn to_table(&self) -> String {
        let has_stats = self.tensors.iter().any(|tensor| tensor.stats.is_some());
        let mut header = vec!["name", "dtype", "shape", "size", "file", "mxfp4"];
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
            "\n{} tensors, {} in {}\n{} parameters ({} stored elements, MXFP4 scales included)",
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
    fn moments_merge_as_if_read_at_once() {
        let values: Vec<f64> = (0..10_000).map(|i| f64::from(i * i % 977) - 300.0).collect();
        let whole = Moments::of(values.iter().copied()).stats();
        let mut merged = Moments::default();
        for part in values.chunks(313) {
            merged.merge(&Moments::of(part.iter().copied()));
        }
        let merged = merged.stats();
        assert_eq!((whole.min, whole.max), (merged.min, merged.max));
        assert!((whole.std.unwrap() - merged.std.unwrap()).abs() < 1e-9);
        let mean = values.iter().sum::<f64>() / 1e4;
        assert!((whole.mean.unwrap() - mean).abs() < 1e-9);
    }

    #[test]
    fn non_finite_values_are_counted_apart() {
        let stats = Moments::of([f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 2.0].into_iter()).stats();
        assert_eq!((stats.nan, stats.inf, stats.min, stats.max), (1, 2, Some(2.0), Some(2.0)));
        assert_eq!(Moments::default().stats().mean, None);
    }

    #[test]
    fn eight_bit_floats_have_their_landmarks() {
        assert_eq!(float8(0x7e, 3, 7, Specials::NanOnly), 448.0);
        assert!(float8(0x7f, 3, 7, Specials::NanOnly).is_nan());
        assert_eq!(float8(0x7b, 2, 15, Specials::Ieee), 57344.0);
        assert_eq!(float8(0xfc, 2, 15, Specials::Ieee), f64::NEG_INFINITY);
        assert_eq!(float8(0x7f, 3, 8, Specials::NegativeZeroIsNan), 240.0);
        assert!(float8(0x80, 2, 16, Specials::NegativeZeroIsNan).is_nan());
        assert_eq!(float8(0x01, 3, 7, Specials::NanOnly), 2f64.powi(-9));
    }

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(grouped(20_914_757_184), "20,914,757,184");
        assert_eq!(grouped(7), "7");
        assert_eq!(human_bytes(13_761_264_768), "13.76 GB");
        assert_eq!(human_bytes(999), "999 B");
    }
}
