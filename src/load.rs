//! Reads regions of tensors into memory: parallel positioned reads, with casts and decodes on the way.
//!
//! Only the bytes under the regions are read, but for gaps too short to be worth leaving out. Bytes that several regions
//! share are read once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::arena::{self, ALIGNMENT, Arena, ArenaPool, ArenaView};
use crate::cast::{self, Counts, OnOverflow, Target};
use crate::checkpoint::{Checkpoint, TensorSpec};
use crate::dtype::{self, Dtype};
use crate::error::{Error, Result};
use crate::float8;
use crate::mxfp4::{self, MX_BLOCK_SIZE};
use crate::progress::{Observer, Phase, Progress};
use crate::region::{self, Region, Runs};
use crate::transform::{self, Producer, Transform};
use crate::work::{self, Chunk, Chunks, Job, Pool, Resources, lock};

/// A gap of no more than a page is read along: the system reads its page anyway.
const PAGE_BYTES: u64 = 4 << 10;

/// A longer gap is read along up to this size (a call from the page cache costs as much as 6 KB of it, and disks read
/// ahead; 2 cores of an AMD EPYC, 2026-11-21), if no more than this many times what is wanted is read for it.
const MAX_GAP_BYTES: u64 = 32 << 10;
const MAX_READ_RATIO: u64 = 4;

/// Bytes read at once straight into their place; enough that a call costs nothing beside them.
const DIRECT_CHUNK_BYTES: u64 = 4 << 20;

/// Tensors of at least this size have an arena of their own; smaller ones share arenas of this size. So one that survives
/// keeps no more than this alive beside itself.
const SHARED_ARENA_BYTES: u64 = 16 << 20;

/// What becomes of a tensor on its way into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conversion {
    /// Its bytes as they are.
    None,
    /// F64, F32, F16 and BF16 to this dtype; MXFP4 pairs, and float8 weights with their scales, are decoded to it.
    Float(Target),
    /// 64-bit integers to 32 bits.
    Narrow,
    /// float4 codes to a byte each.
    Unpack,
}

impl Conversion {
    /// The conversion of this name: that of a float dtype, `none`, `narrow` or `unpack`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "none" => Ok(Self::None),
            "narrow" => Ok(Self::Narrow),
            "unpack" => Ok(Self::Unpack),
            other => {
                dtype::from_name(other).and_then(Target::from_dtype).map(Self::Float).ok_or_else(|| Error::Argument {
                    name: "conversion",
                    found: format!("{other:?}"),
                    expected: "none, float16, bfloat16, float32, narrow or unpack".into(),
                })
            }
        }
    }
}

/// One tensor, or one pair that is decoded, and the regions of it to read.
#[derive(Debug, Clone)]
pub struct Request {
    /// Name for messages.
    name: String,
    /// Logical shape, that of the decoded tensor for a pair.
    shape: Vec<u64>,
    dtype: Dtype,
    transform: Transform,
    sources: Vec<usize>,
    regions: Vec<Region>,
}

impl Request {
    /// A request for `regions` of a tensor; of blocks or a float8 weight and its scales together if there are two names.
    pub fn new(
        checkpoint: &Checkpoint,
        names: &[String],
        conversion: Conversion,
        regions: Vec<Region>,
    ) -> Result<Self> {
        let mut sources = Vec::with_capacity(names.len());
        for name in names {
            sources.push(checkpoint.index_of(name).ok_or_else(|| Error::Argument {
                name: "names",
                found: format!("{name:?}"),
                expected: "names of the checkpoint's tensors".into(),
            })?);
        }
        let specs: Vec<_> = sources.iter().map(|&source| &checkpoint.tensors()[source]).collect();
        let (shape, dtype, transform) = match specs[..] {
            [tensor] => plain(checkpoint, tensor, conversion)?,
            [weight, scales] if scales.name.ends_with(float8::SCALES_SUFFIX) => {
                decoded_float8(checkpoint, weight, scales, conversion)?
            }
            [blocks, scales] => decoded(checkpoint, blocks, scales, conversion)?,
            _ => return Err(refuse(names, "one tensor, or one and its scales")),
        };
        let is_within = |region: &Region| {
            region.len() == shape.len()
                && region.iter().zip(&shape).all(|(range, &dim)| range.start <= range.end && range.end <= dim)
        };
        if let Some(region) = regions.iter().find(|region| !is_within(region)) {
            let found = format!("{region:?}");
            return Err(Error::Argument { name: "regions", found, expected: format!("regions of {shape:?}") });
        }
        Ok(Self { name: names[0].clone(), shape, dtype, transform, sources, regions })
    }

    /// Bytes of one of its elements once it is read.
    fn element_bytes(&self) -> u64 {
        (self.dtype.bitsize() as u64).div_ceil(8)
    }

    /// Elements of one unit of its transform, and units of the producer in it: a copy's unit is a byte.
    fn unit(&self) -> (u64, u64) {
        match self.transform {
            Transform::Copy => (1, self.element_bytes()),
            Transform::Cast { .. } | Transform::Narrow { .. } | Transform::DequantizeFloat8 { .. } => (1, 1),
            Transform::Dequantize { .. } => (MX_BLOCK_SIZE as u64, 1),
            Transform::Unpack => (2, 1),
            Transform::QuantizeBlocks { .. } | Transform::QuantizeScales { .. } => {
                unreachable!("no conversion of a request encodes")
            }
        }
    }
}

fn refuse(names: &[String], expected: &str) -> Error {
    Error::Argument { name: "names", found: format!("{names:?}"), expected: expected.into() }
}

fn plain(checkpoint: &Checkpoint, tensor: &TensorSpec, conversion: Conversion) -> Result<(Vec<u64>, Dtype, Transform)> {
    let (dtype, transform) = match (conversion, tensor.dtype) {
        (Conversion::None, from) if !dtype::is_sub_byte(from) => (from, Transform::Copy),
        (Conversion::Float(to), from) if to.dtype() == from => (from, Transform::Copy),
        (Conversion::Float(to), from) if cast::is_castable(from) => (to.dtype(), Transform::Cast { from, to }),
        (Conversion::Narrow, from @ Dtype::I64) => (Dtype::I32, Transform::Narrow { from }),
        (Conversion::Narrow, from @ Dtype::U64) => (Dtype::U32, Transform::Narrow { from }),
        (Conversion::Unpack, from @ Dtype::F4) => (from, Transform::Unpack),
        (conversion, from) => {
            let expected = format_args!("a dtype that the conversion {conversion:?} takes");
            return Err(Error::tensor(checkpoint.path_of(tensor), &tensor.name, dtype::name(from), expected));
        }
    };
    Ok((tensor.shape.clone(), dtype, transform))
}

fn decoded(
    checkpoint: &Checkpoint,
    blocks: &TensorSpec,
    scales: &TensorSpec,
    conversion: Conversion,
) -> Result<(Vec<u64>, Dtype, Transform)> {
    let candidates = [blocks, scales].map(|tensor| tensor.candidate(checkpoint.path_of(tensor)));
    let mut pairing = mxfp4::pair(&candidates);
    match (conversion, pairing.pairs.pop()) {
        (Conversion::Float(to), Some(pair)) => Ok((pair.shape, to.dtype(), Transform::Dequantize { to })),
        _ => Err(pairing.misfits.pop().map_or_else(
            || refuse(&[blocks.name.clone(), scales.name.clone()], "blocks and scales of one MXFP4 tensor"),
            |misfit| misfit.fault,
        )),
    }
}

fn decoded_float8(
    checkpoint: &Checkpoint,
    weight: &TensorSpec,
    scales: &TensorSpec,
    conversion: Conversion,
) -> Result<(Vec<u64>, Dtype, Transform)> {
    let candidates = [weight, scales].map(|tensor| tensor.candidate(checkpoint.path_of(tensor)));
    let mut pairing = float8::pair(&candidates, checkpoint.float8_size()?);
    match (conversion, pairing.pairs.pop()) {
        (Conversion::Float(to), Some(float8::Pair { weight: 0, blocks, .. })) => {
            Ok((weight.shape.clone(), to.dtype(), Transform::DequantizeFloat8 { to, blocks }))
        }
        _ => Err(pairing.misfits.pop().map_or_else(
            || refuse(&[weight.name.clone(), scales.name.clone()], "a float8 weight and its scales"),
            |misfit| misfit.fault,
        )),
    }
}

/// What was read.
#[derive(Debug)]
pub struct Loaded {
    /// For each request its regions, each row-major and without gaps; 64-aligned.
    pub regions: Vec<Vec<ArenaView>>,
    /// What the casts of each request lost.
    pub counts: Vec<Counts>,
    /// Bytes read from files.
    pub bytes_read: u64,
}

/// Reads what `requests` ask for into arenas from `pool`.
pub fn load(
    checkpoint: &Checkpoint,
    requests: &[Request],
    on_overflow: OnOverflow,
    resources: Resources,
    pool: &ArenaPool,
    observer: &mut Observer<'_>,
) -> Result<Loaded> {
    let workers = resources.pool()?;
    let layout = Layout::new(requests);
    let mut arenas = layout.arenas.iter().map(|&nbytes| pool.take(nbytes)).collect::<Result<Vec<_>>>()?;
    arena::touch(&mut arenas, workers.workers);
    let memory = layout.split(&mut arenas);
    let (counts, bytes_read) = read(checkpoint, requests, memory, on_overflow, workers, observer)?;
    for (request, counts) in requests.iter().zip(&counts) {
        request.check(*counts, on_overflow)?;
    }
    // A file that was edited meanwhile is half old and half new.
    let sources = requests.iter().flat_map(|request| &request.sources);
    let parts = sources.flat_map(|&source| &checkpoint.tensors()[source].parts);
    for file in parts.map(|part| part.file).collect::<BTreeSet<_>>() {
        checkpoint.files()[file].check()?;
    }
    let arenas: Vec<_> = arenas.into_iter().map(Arc::new).collect();
    for arena in &arenas {
        pool.give(Arc::clone(arena));
    }
    let view = |slot: &Slot| ArenaView::new(Arc::clone(&arenas[slot.arena]), slot.offset..slot.offset + slot.nbytes);
    let regions = layout.slots.iter().map(|slots| slots.iter().map(view).collect()).collect();
    Ok(Loaded { regions, counts, bytes_read })
}

/// Fills each region's memory; returns what each request's casts lost, and the bytes read.
fn read(
    checkpoint: &Checkpoint,
    requests: &[Request],
    memory: Vec<Vec<&mut [u8]>>,
    on_overflow: OnOverflow,
    pool: Pool,
    observer: &mut Observer<'_>,
) -> Result<(Vec<Counts>, u64)> {
    let groups = groups(requests, memory, pool.worker_bytes);
    let bytes_total = groups.iter().map(Group::output_bytes).sum();
    let names = groups.iter().map(|group| group.request.name.as_str()).collect();
    let progress = Progress::new(Phase::Load, names, bytes_total);
    let job = LoadJob {
        checkpoint,
        groups: &groups,
        on_overflow,
        bytes_read: AtomicU64::new(0),
        counts: Mutex::new(vec![Counts::default(); requests.len()]),
        progress: &progress,
    };
    work::run(&job, 0..groups.len(), pool.workers, &progress, observer)?;
    Ok((job.counts.into_inner().unwrap_or_else(PoisonError::into_inner), job.bytes_read.into_inner()))
}

impl Request {
    fn check(&self, counts: Counts, on_overflow: OnOverflow) -> Result<()> {
        if counts.overflow == 0 || on_overflow != OnOverflow::Error {
            return Ok(());
        }
        let limit = match self.dtype {
            Dtype::I32 => f64::from(i32::MAX),
            Dtype::U32 => f64::from(u32::MAX),
            float => Target::from_dtype(float).expect("only casts overflow").max(),
        };
        Err(Error::Overflow {
            tensor: self.name.clone(),
            count: counts.overflow,
            largest: counts.largest,
            precision: dtype::name(self.dtype),
            limit,
        })
    }
}

/// Where each region goes: arenas by their size, slots in the order of the requests.
struct Layout {
    arenas: Vec<usize>,
    slots: Vec<Vec<Slot>>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    arena: usize,
    offset: usize,
    nbytes: usize,
}

impl Layout {
    fn new(requests: &[Request]) -> Self {
        let mut arenas: Vec<usize> = Vec::new();
        let mut shared: Option<usize> = None;
        let limit = to_usize(SHARED_ARENA_BYTES);
        let mut place = |nbytes: usize| {
            let padded = nbytes.checked_next_multiple_of(to_usize(ALIGNMENT)).unwrap_or(usize::MAX);
            if padded >= limit {
                arenas.push(padded);
                return Slot { arena: arenas.len() - 1, offset: 0, nbytes };
            }
            let arena = match shared {
                Some(arena) if arenas[arena] + padded <= limit => arena,
                _ => {
                    arenas.push(0);
                    *shared.insert(arenas.len() - 1)
                }
            };
            let offset = arenas[arena];
            arenas[arena] += padded;
            Slot { arena, offset, nbytes }
        };
        let slots = requests
            .iter()
            .map(|request| {
                // Decoded, a sparse file can be larger than the address space: its memory is then refused.
                let nbytes =
                    |region: &Region| to_usize(region::elements(region).saturating_mul(request.element_bytes()));
                request.regions.iter().map(|region| place(nbytes(region))).collect()
            })
            .collect();
        Self { arenas, slots }
    }

    /// The memory of each slot, in the slots' order.
    fn split<'a>(&self, arenas: &'a mut [Arena]) -> Vec<Vec<&'a mut [u8]>> {
        let mut rests: Vec<_> = arenas.iter_mut().map(|arena| (0, arena.bytes_mut())).collect();
        let mut take = |slot: &Slot| {
            let (position, rest) = std::mem::take(&mut rests[slot.arena]);
            let (memory, rest) = rest[slot.offset - position..].split_at_mut(slot.nbytes);
            rests[slot.arena] = (slot.offset + slot.nbytes, rest);
            memory
        };
        self.slots.iter().map(|slots| slots.iter().map(&mut take).collect()).collect()
    }
}

/// Regions of one request that are read together: what is read is the same for all of them.
struct Group<'a> {
    index: usize,
    request: &'a Request,
    /// What is read, as runs of the whole tensor.
    source: Runs,
    /// The regions, as runs of what is read.
    members: Vec<Runs>,
    /// The one region is just what is read: it is made in its place.
    is_direct: bool,
    /// Units to read.
    units: u64,
    chunk_units: u64,
    /// For each chunk the memory of each member that it fills, until a worker takes it.
    pieces: Mutex<Vec<Vec<&'a mut [u8]>>>,
}

/// Groups the regions of each request; `memory` has a slot for each of them.
fn groups<'a>(requests: &'a [Request], memory: Vec<Vec<&'a mut [u8]>>, worker_bytes: u64) -> Vec<Group<'a>> {
    let mut groups = Vec::with_capacity(requests.len());
    for (index, (request, memory)) in requests.iter().zip(memory).enumerate() {
        let (unit_elems, producer_units) = request.unit();
        let unit_bytes = request.transform.source_unit_bytes()[0] * producer_units;
        let mut by_cover: BTreeMap<Vec<(u64, u64)>, (Region, Vec<_>)> = BTreeMap::new();
        for (region, memory) in request.regions.iter().zip(memory) {
            if memory.is_empty() {
                continue;
            }
            let is_short = |run: u64, gap: u64| {
                let gap_bytes = gap / unit_elems * unit_bytes;
                gap_bytes <= PAGE_BYTES || gap_bytes <= MAX_GAP_BYTES && gap <= run * (MAX_READ_RATIO - 1)
            };
            let cover = region::cover(&request.shape, region, unit_elems, is_short);
            let key = cover.iter().map(|range| (range.start, range.end)).collect();
            by_cover.entry(key).or_insert_with(|| (cover, Vec::new())).1.push((region, memory));
        }
        for (cover, members) in by_cover.into_values() {
            let is_direct = members.len() == 1 && *members[0].0 == cover;
            let units = region::elements(&cover) / unit_elems;
            let chunk_units = if is_direct && request.transform == Transform::Copy {
                (DIRECT_CHUNK_BYTES / unit_bytes).max(1)
            } else {
                (transform::chunk_units(request.transform, worker_bytes) / producer_units).max(1)
            };
            let (members, mut rests): (Vec<_>, Vec<_>) =
                members.into_iter().map(|(region, memory)| (Runs::new(&cover, region), memory)).unzip();
            let mut pieces = Vec::new();
            let mut start = 0;
            while start < units {
                let end = units.min(start + chunk_units);
                let piece = members.iter().zip(&mut rests).map(|(member, rest)| {
                    let elems = member.before(end * unit_elems) - member.before(start * unit_elems);
                    let (piece, later) = std::mem::take(rest).split_at_mut(to_usize(elems * request.element_bytes()));
                    *rest = later;
                    piece
                });
                pieces.push(piece.collect());
                start = end;
            }
            groups.push(Group {
                index,
                request,
                source: Runs::new(&region::whole(&request.shape), &cover),
                members,
                is_direct,
                units,
                chunk_units,
                pieces: Mutex::new(pieces),
            });
        }
    }
    groups
}

impl Group<'_> {
    fn output_bytes(&self) -> u64 {
        self.members.iter().map(|member| member.run_elems * member.count * self.request.element_bytes()).sum()
    }

    /// Makes a chunk's output bytes in `out`, run by run.
    fn produce(&self, chunk: &Chunk, producer: &mut Producer<'_>, mut out: &mut [u8]) -> Result<Counts> {
        let (unit_elems, producer_units) = self.request.unit();
        let elems = chunk.units.start * unit_elems..chunk.units.end * unit_elems;
        let mut counts = Counts::default();
        for (start, length) in self.source.pieces(elems) {
            let units = start / unit_elems * producer_units..(start + length) / unit_elems * producer_units;
            let (now, later) = out.split_at_mut(to_usize(length * self.request.element_bytes()));
            counts.merge(producer.produce_into(self.request.transform, &self.request.sources, &units, now)?);
            out = later;
        }
        Ok(counts)
    }

    /// Copies to each member what a chunk has for it.
    fn scatter(&self, chunk: &Chunk, made: &[u8], pieces: Vec<&mut [u8]>) {
        let (unit_elems, _) = self.request.unit();
        let element_bytes = self.request.element_bytes();
        let begin = chunk.units.start * unit_elems;
        for (member, mut piece) in self.members.iter().zip(pieces) {
            let first = member.before(begin);
            let last = first + piece.len() as u64 / element_bytes;
            for (start, length) in member.pieces(first..last) {
                let from = to_usize((start - begin) * element_bytes);
                let (now, later) = piece.split_at_mut(to_usize(length * element_bytes));
                now.copy_from_slice(&made[from..from + now.len()]);
                piece = later;
            }
        }
    }
}

struct LoadJob<'a> {
    checkpoint: &'a Checkpoint,
    groups: &'a [Group<'a>],
    on_overflow: OnOverflow,
    bytes_read: AtomicU64,
    counts: Mutex<Vec<Counts>>,
    progress: &'a Progress<'a>,
}

struct LoadScratch<'a> {
    producer: Producer<'a>,
    /// What was read, where it has to be scattered.
    made: Vec<u8>,
    counts: Counts,
}

impl<'a> Job for LoadJob<'a> {
    type Scratch = LoadScratch<'a>;
    type State = Counts;
    const IN_ORDER: bool = false;

    fn chunks(&self, item: usize) -> Chunks {
        let group = &self.groups[item];
        Chunks::new(item, std::iter::once(0..group.units), group.chunk_units)
    }

    fn scratch(&self) -> Self::Scratch {
        let producer = Producer::new(self.checkpoint, self.on_overflow);
        LoadScratch { producer, made: Vec::new(), counts: Counts::default() }
    }

    fn begin(&self, _: usize) -> Counts {
        Counts::default()
    }

    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()> {
        let group = &self.groups[chunk.item];
        let number = usize::try_from(chunk.sequence).expect("chunks were counted in memory");
        let mut pieces = std::mem::take(&mut lock(&group.pieces)[number]);
        let nbytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        scratch.counts = if group.is_direct {
            group.produce(chunk, &mut scratch.producer, pieces[0])?
        } else {
            let (unit_elems, _) = group.request.unit();
            let elems = (chunk.units.end - chunk.units.start) * unit_elems;
            let made_bytes = to_usize(elems * group.request.element_bytes());
            transform::grow(&mut scratch.made, made_bytes)?;
            let made = &mut scratch.made[..made_bytes];
            let counts = group.produce(chunk, &mut scratch.producer, made)?;
            group.scatter(chunk, made, pieces);
            counts
        };
        self.bytes_read.fetch_add(scratch.producer.take_bytes_read(), Ordering::Relaxed);
        self.progress.add_bytes(nbytes as u64);
        Ok(())
    }

    fn commit(&self, _: &Chunk, scratch: &mut Self::Scratch, state: &mut Counts) -> Result<()> {
        state.merge(scratch.counts);
        Ok(())
    }

    fn finish(&self, item: usize, state: Counts) -> Result<()> {
        lock(&self.counts)[self.groups[item].index].merge(state);
        Ok(())
    }
}

/// A size of memory; what does not fit the address space was refused when its memory was asked for.
fn to_usize(nbytes: u64) -> usize {
    usize::try_from(nbytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_address_space_is_asked_for_and_not_wrapped_around() {
        let transform = Transform::Dequantize { to: Target::F32 };
        // 2^61 bytes of blocks, which a sparse file can declare: 2^64 bytes of float32.
        let shape = vec![1 << 62];
        let regions = vec![region::whole(&shape)];
        let request = Request { name: "w".into(), shape, dtype: Dtype::F32, transform, sources: vec![0, 1], regions };
        let layout = Layout::new(&[request]);
        assert_eq!(layout.arenas, [usize::MAX]);
        assert!(Arena::new(layout.arenas[0]).is_err());
    }
}
