//! Random checkpoints: safetensors files of seeded values, streamed on all cores.
//!
//! Which tensors a model has is not known here: the caller lists them. Every value is a function of the seed, the
//! tensor's name and the value's place, so files do not depend on the number of workers.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::cast::{OnOverflow, Target};
use crate::dtype;
use crate::error::{Error, Result};
use crate::header;
use crate::mxfp4::E2M1;
use crate::ordered_map::OrderedMap;
use crate::output::{Content, Frame};
use crate::progress::{Observer, Phase, Progress};
use crate::sink::Sinks;
use crate::transform;
use crate::work::{self, Chunk, Chunks, Job, Resources};

/// One tensor to be written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomTensor {
    /// `ml_dtypes` name: a float dtype of [`Target`], or uint8 for MXFP4.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<u64>,
    /// What its values are.
    pub fill: Fill,
    /// Name of the random stream that the values come from; the tensor's own name if None.
    pub stream: Option<String>,
    /// Elements of the stream that stand before the tensor's first: tensors can be slices of one another.
    #[serde(default)]
    pub skip_elems: u64,
}

/// What the values of a random tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fill {
    /// Normal values.
    Normal {
        /// Mean.
        mean: f64,
        /// Standard deviation.
        std: f64,
    },
    /// MXFP4 codes of normal values, as a quantizer that scales each block by its largest value leaves them.
    Mxfp4Codes,
    /// MXFP4 scales such that codes of `Mxfp4Codes` decode to values of about this standard deviation.
    Mxfp4Scales {
        /// Standard deviation of the decoded values.
        std: f64,
    },
}

/// Standard deviation of the normal values behind the codes, in units of the scale: the largest of 32 normal values is
/// about 2.07 deviations, and a quantizer puts it between 4 and 8.
const CODE_STD: f64 = 2.6;

/// Bytes of output that one step of the generator makes.
const UNIT_BYTES: u64 = 64;

/// Writes random safetensors files, by name, into `folder`, which must exist. Returns the bytes of tensor data.
pub fn write(
    folder: &Path,
    files: &OrderedMap<OrderedMap<RandomTensor>>,
    seed: u64,
    resources: Resources,
    observer: &mut Observer<'_>,
) -> Result<u64> {
    let pool = resources.pool()?;
    let (mut sizes, mut headers) = (Vec::with_capacity(files.0.len()), Vec::with_capacity(files.0.len()));
    let mut tensors = Vec::new();
    for (index, (name, file)) in files.0.iter().enumerate() {
        let (nbytes, header, placed) = lay_out(folder, index, name, file, seed)?;
        sizes.push((name.as_str(), nbytes));
        headers.push(header);
        tensors.extend(placed);
    }
    let bytes_total = tensors.iter().map(|tensor| tensor.nbytes).sum();
    let names = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let progress = Progress::new(Phase::Synthesize, names, bytes_total);
    let sinks = Sinks::new(folder, sizes.into_iter(), tensors.iter().map(|tensor| tensor.file));
    let job = FillJob {
        tensors: &tensors,
        chunk_units: pool.worker_bytes / UNIT_BYTES,
        headers: &headers,
        sinks,
        progress: &progress,
    };
    work::run(&job, 0..tensors.len(), pool.workers, &progress, observer)?;
    Ok(bytes_total)
}

/// A tensor with its place.
struct PlacedTensor {
    name: String,
    file: usize,
    offset: u64,
    nbytes: u64,
    key: u64,
    skip_elems: u64,
    fill: Fill,
    /// None for uint8.
    target: Option<Target>,
}

/// Header of one file and the places of its tensors; widest dtypes first, as the safetensors crate writes them.
fn lay_out(
    folder: &Path,
    index: usize,
    file_name: &str,
    tensors: &OrderedMap<RandomTensor>,
    seed: u64,
) -> Result<(u64, Vec<u8>, Vec<PlacedTensor>)> {
    #[derive(Serialize)]
    struct Entry<'a> {
        dtype: &'a str,
        shape: &'a [u64],
        data_offsets: (u64, u64),
    }
    let path = folder.join(file_name);
    let mut placed = Vec::with_capacity(tensors.0.len());
    let mut entries = OrderedMap::default();
    let mut end = 0u64;
    let mut order: Vec<_> = tensors.0.iter().collect();
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(dtype::from_name(&tensor.dtype).map_or(0, |d| d.bitsize())));
    for (name, tensor) in order {
        let fault = |expected: &str| Error::tensor(&path, name, format_args!("dtype {:?}", tensor.dtype), expected);
        let known = dtype::from_name(&tensor.dtype).ok_or_else(|| fault("a dtype"))?;
        let target = match (tensor.fill, Target::from_dtype(known)) {
            (Fill::Normal { .. }, Some(target)) => Some(target),
            (Fill::Mxfp4Codes | Fill::Mxfp4Scales { .. }, _) if known == Dtype::U8 => None,
            _ => return Err(fault("float16, bfloat16 or float32 for normal values, uint8 for MXFP4")),
        };
        let nbytes = header::tensor_nbytes(&path, name, known, &tensor.shape)?;
        let start = end;
        end = end.checked_add(nbytes).ok_or_else(|| fault("files below 2^64 bytes"))?;
        let tag = dtype::info(known).map_or("", |row| row.tag);
        entries.0.push((name.clone(), Entry { dtype: tag, shape: &tensor.shape, data_offsets: (start, end) }));
        placed.push(PlacedTensor {
            name: name.clone(),
            file: index,
            offset: start,
            nbytes,
            key: xxh3_64_with_seed(tensor.stream.as_ref().unwrap_or(name).as_bytes(), seed),
            skip_elems: tensor.skip_elems,
            fill: tensor.fill,
            target,
        });
    }
    let mut header = vec![0; 8];
    serde_json::to_writer(&mut header, &entries).expect("writing to a Vec cannot fail");
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = header.len() as u64 - 8;
    header[..8].copy_from_slice(&length.to_le_bytes());
    let data_offset = header.len() as u64;
    for tensor in &mut placed {
        tensor.offset += data_offset;
    }
    let nbytes = data_offset + end;
    Ok((nbytes, header, placed))
}

struct FillJob<'a> {
    tensors: &'a [PlacedTensor],
    chunk_units: u64,
    headers: &'a [Vec<u8>],
    sinks: Sinks<'a>,
    progress: &'a Progress<'a>,
}

/// One worker's buffer, and the value table of the tensor it filled last.
#[derive(Default)]
struct FillScratch {
    out: Vec<u8>,
    table: Option<(usize, Arc<Table>)>,
}

/// What random bits stand for.
enum Table {
    /// Value of each 16-bit quantile.
    TwoBytes(Vec<[u8; 2]>),
    /// Value of each 16-bit quantile.
    FourBytes(Vec<[u8; 4]>),
    /// Byte of each 16 random bits.
    OneByte(Vec<[u8; 1]>),
}

impl Job for FillJob<'_> {
    type Scratch = FillScratch;
    type State = ();

    fn chunks(&self, item: usize) -> Chunks {
        let units = self.tensors[item].nbytes.div_ceil(UNIT_BYTES);
        Chunks::new(item, std::iter::once(0..units), self.chunk_units)
    }

    fn scratch(&self) -> FillScratch {
        FillScratch::default()
    }

    fn begin(&self, _: usize) {}

    fn process(&self, chunk: &Chunk, scratch: &mut FillScratch) -> Result<()> {
        let tensor = &self.tensors[chunk.item];
        let table = match &scratch.table {
            Some((item, table)) if *item == chunk.item => Arc::clone(table),
            _ => Arc::clone(&scratch.table.insert((chunk.item, Arc::new(table_for(tensor)))).1),
        };
        let start = chunk.units.start * UNIT_BYTES;
        let end = (chunk.units.end * UNIT_BYTES).min(tensor.nbytes);
        let nbytes = usize::try_from(end - start).expect("no more than a worker's buffer");
        transform::grow(&mut scratch.out, nbytes)?;
        let out = &mut scratch.out[..nbytes];
        fill(&table, tensor.key, tensor.skip_elems, start, out);
        self.sinks.write(tensor.file, out, tensor.offset + start, || {
            vec![Frame { offset: 0, content: Content::Bytes(self.headers[tensor.file].clone()) }]
        })?;
        self.progress.add_bytes(end - start);
        Ok(())
    }

    fn commit(&self, chunk: &Chunk, _: &mut FillScratch, (): &mut ()) -> Result<()> {
        if chunk.ends_piece {
            self.sinks.end_piece(self.tensors[chunk.item].file)?;
        }
        Ok(())
    }

    fn finish(&self, _: usize, (): ()) -> Result<()> {
        Ok(())
    }
}

/// Fills `out`, which begins `start` bytes into a tensor, with table entries chosen by random bits.
fn fill(table: &Table, key: u64, skip_elems: u64, start: u64, out: &mut [u8]) {
    fn entries<const N: usize>(table: &[[u8; N]], key: u64, first: u64, out: &mut [u8]) {
        let out = out.as_chunks_mut::<N>().0;
        // Each 64 random bits choose four entries; the first four may have begun before this stretch.
        let head_len = usize::try_from(first.next_multiple_of(4) - first).expect("at most three");
        let (head, rest) = out.split_at_mut(head_len.min(out.len()));
        let choose = |bits: u64, lane: usize| {
            let bytes = bits.to_le_bytes();
            table[usize::from(u16::from_le_bytes([bytes[2 * lane], bytes[2 * lane + 1]]))]
        };
        for (lane, entry) in head.iter_mut().enumerate() {
            let place = first + lane as u64;
            *entry = choose(random_bits(key, place / 4), 4 - head_len + lane);
        }
        for (counter, group) in (first.div_ceil(4)..).zip(rest.chunks_mut(4)) {
            let bits = random_bits(key, counter);
            for (lane, entry) in group.iter_mut().enumerate() {
                *entry = choose(bits, lane);
            }
        }
    }
    match table {
        Table::OneByte(table) => entries(table, key, skip_elems + start, out),
        Table::TwoBytes(table) => entries(table, key, skip_elems + start / 2, out),
        Table::FourBytes(table) => entries(table, key, skip_elems + start / 4, out),
    }
}

/// Random bits number `counter` of stream `key`: `SplitMix64` (Steele, Lea and Flood, 2014), which any place can be
/// computed from directly.
fn random_bits(key: u64, counter: u64) -> u64 {
    let mut z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn table_for(tensor: &PlacedTensor) -> Table {
    match (tensor.fill, tensor.target) {
        (Fill::Normal { mean, std }, Some(target)) => {
            let bits =
                quantiles().iter().map(|z| target.round(mean + std * z, OnOverflow::Saturate).bits.to_le_bytes());
            match target {
                Target::F32 => Table::FourBytes(bits.collect()),
                Target::F16 | Target::Bf16 => Table::TwoBytes(bits.map(|[a, b, _, _]| [a, b]).collect()),
            }
        }
        (Fill::Mxfp4Scales { std }, _) => {
            // Three of four blocks have the scale whose codes come closest, the fourth half of it.
            let exponent = (std / CODE_STD).log2().round() + 127.0;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a byte")]
            let scale = exponent.clamp(1.0, 254.0) as u8;
            Table::OneByte((0..=u16::MAX).map(|bits| [if bits % 4 == 0 { scale - 1 } else { scale }]).collect())
        }
        (Fill::Mxfp4Codes | Fill::Normal { .. }, _) => {
            // Eight bits choose a code: one of 256 quantiles, each the middle of 256 finer ones.
            let codes: Vec<u8> =
                (0..256).map(|quantile| nearest_code(CODE_STD * quantiles()[256 * quantile + 128])).collect();
            Table::OneByte(
                (0..=u16::MAX)
                    .map(|bits| [codes[usize::from(bits & 0xff)] | codes[usize::from(bits >> 8)] << 4])
                    .collect(),
            )
        }
    }
}

/// The code nearest to a value; what rounds to zero keeps its sign, as in a quantizer.
fn nearest_code(value: f64) -> u8 {
    let distance = |code: u8| (f64::from(E2M1[usize::from(code)]) - value).abs();
    let codes = if value < 0.0 { 8..16 } else { 0..8 };
    codes.min_by(|&a, &b| distance(a).total_cmp(&distance(b))).expect("eight codes")
}

/// The 65536 quantiles of the standard normal distribution at (i + 1/2) / 65536.
fn quantiles() -> &'static [f64] {
    static QUANTILES: OnceLock<Vec<f64>> = OnceLock::new();
    QUANTILES.get_or_init(|| {
        // Newton's method from one quantile to the next; the upper half mirrors the lower.
        let mut z = -4.2;
        let mut lower = Vec::with_capacity(32768);
        for i in 0..32768u32 {
            let probability = (f64::from(i) + 0.5) / 65536.0;
            for _ in 0..5 {
                z -= (normal_distribution(z) - probability) / normal_density(z);
            }
            lower.push(z);
        }
        let upper: Vec<f64> = lower.iter().rev().map(|z| -z).collect();
        [lower, upper].concat()
    })
}

fn normal_density(x: f64) -> f64 {
    (-0.5 * x * x - 0.918_938_533_204_672_7).exp()
}

/// Standard normal distribution function by Marsaglia's series ("Evaluating the Normal Distribution", 2004).
fn normal_distribution(x: f64) -> f64 {
    let (mut sum, mut term, mut previous, mut i) = (x, x, 0.0, 1.0);
    while sum != previous {
        previous = sum;
        i += 2.0;
        term *= x * x / i;
        sum += term;
    }
    0.5 + sum * normal_density(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_a_normal_distribution() {
        let quantiles = quantiles();
        assert!(quantiles.is_sorted());
        for (index, &z) in quantiles.iter().enumerate().step_by(997) {
            let probability = (f64::from(u32::try_from(index).unwrap()) + 0.5) / 65536.0;
            assert!((normal_distribution(z) - probability).abs() < 1e-14, "{index}");
        }
        assert!((normal_distribution(1.959_963_984_540_054) - 0.975).abs() < 1e-15);
        let mean = quantiles.iter().sum::<f64>() / 65536.0;
        let variance = quantiles.iter().map(|z| z * z).sum::<f64>() / 65536.0;
        assert!(mean.abs() < 1e-10 && (variance - 1.0).abs() < 1e-3, "{mean} {variance}");
    }

    #[test]
    fn a_stream_can_be_entered_anywhere() {
        let table = Table::OneByte((0..=u16::MAX).map(|bits| [bits.to_le_bytes()[0]]).collect());
        let mut whole = vec![0; 1000];
        fill(&table, 7, 0, 0, &mut whole);
        for (skip, start) in [(0, 128), (3, 0), (5, 64), (1, 997)] {
            let from = usize::try_from(skip + start).unwrap();
            let mut tail = vec![0; 1000 - from];
            fill(&table, 7, skip, start, &mut tail);
            assert_eq!(whole[from..], tail);
        }
    }
}
