//! The MXFP4 codec on tensors in memory, on all cores.

use std::sync::{Arc, Mutex, OnceLock};

use safetensors::Dtype;

use crate::arena::{self, Arena, ArenaPool, ArenaView};
use crate::cast::{self, OnOverflow, Target};
use crate::dtype;
use crate::error::{Error, Result};
use crate::mxfp4::{self, BLOCK_BYTES, DecodeTable, MX_BLOCK_SIZE, ScaleRule};
use crate::progress::{Observer, Phase, Progress};
use crate::work::{self, Chunk, Chunks, Job, Pool, Resources, lock};

/// Bytes of floats up to which the calling thread does the work itself, without signals and progress. So many take 0.03
/// or 0.4 ms to decode (into memory that is there, or is not) and 0.13 or 0.25 ms to encode from bfloat16; to start two
/// threads and wait for them takes 0.05 ms (2 cores of an AMD EPYC, 2026-11-27).
const SMALL_BYTES: usize = 1 << 20;

/// An encoded tensor; both halves begin at a page.
#[derive(Debug)]
pub struct Encoded {
    /// 16 bytes of codes for each block.
    pub blocks: ArenaView,
    /// A scale byte for each block.
    pub scales: ArenaView,
}

/// Decodes whole blocks into an arena of `memory`. Values beyond the range of `target` become infinities.
pub fn decode(
    blocks: &[u8],
    scales: &[u8],
    target: Target,
    workers: Option<usize>,
    memory: &ArenaPool,
    observer: &mut Observer<'_>,
) -> Result<ArenaView> {
    if scales.len().checked_mul(BLOCK_BYTES) != Some(blocks.len()) {
        return Err(Error::Argument {
            name: "blocks",
            found: format!("{} bytes", blocks.len()),
            expected: format!("{BLOCK_BYTES} for each of {} scales", scales.len()),
        });
    }
    let group_bytes = MX_BLOCK_SIZE * target.dtype().bitsize() / 8;
    let nbytes = scales.len().saturating_mul(group_bytes);
    let pool = pool(workers, nbytes)?;
    let mut arenas = [memory.take(nbytes)?];
    touch(&mut arenas, nbytes, pool);
    let [mut arena] = arenas;
    let groups = groups_at_once(group_bytes, pool);
    let out = arena.bytes_mut()[..nbytes].chunks_mut(groups * group_bytes);
    let pieces = blocks.chunks(groups * BLOCK_BYTES).zip(scales.chunks(groups)).zip(out);
    let table = decode_table(target);
    let decode_piece = |((blocks, scales), out): ((&[u8], &[u8]), &mut [u8])| {
        table.decode(blocks, scales, out);
        out.len()
    };
    run(Phase::Decode, pieces, decode_piece, nbytes, pool, observer)?;
    Ok(share(arena, nbytes, memory))
}

/// Encodes little-endian elements of `from` into arenas of `memory`; [`mxfp4::encode`] says how.
///
/// # Panics
/// When `from` is not F64, F32, F16 or BF16.
pub fn encode(
    from: Dtype,
    rule: ScaleRule,
    src: &[u8],
    workers: Option<usize>,
    memory: &ArenaPool,
    observer: &mut Observer<'_>,
) -> Result<Encoded> {
    let group_bytes = MX_BLOCK_SIZE * from.bitsize() / 8;
    if !src.len().is_multiple_of(group_bytes) {
        return Err(Error::Argument {
            name: "data",
            found: format!("{} bytes", src.len()),
            expected: format!("a multiple of {group_bytes}, {MX_BLOCK_SIZE} elements"),
        });
    }
    let count = src.len() / group_bytes;
    let pool = pool(workers, src.len())?;
    let mut arenas = [memory.take(count * BLOCK_BYTES)?, memory.take(count)?];
    touch(&mut arenas, src.len(), pool);
    let [mut blocks, mut scales] = arenas;
    let groups = groups_at_once(group_bytes, pool);
    let codes = blocks.bytes_mut()[..count * BLOCK_BYTES].chunks_mut(groups * BLOCK_BYTES);
    let pieces = src.chunks(groups * group_bytes).zip(codes).zip(scales.bytes_mut()[..count].chunks_mut(groups));
    let encode_piece = |((src, blocks), scales): ((&[u8], &mut [u8]), &mut [u8])| {
        mxfp4::encode(from, rule, src, blocks, scales);
        src.len()
    };
    run(Phase::Encode, pieces, encode_piece, src.len(), pool, observer)?;
    Ok(Encoded { blocks: share(blocks, count * BLOCK_BYTES, memory), scales: share(scales, count, memory) })
}

/// The dtype of this name to decode to.
pub fn parse_target(name: &str) -> Result<Target> {
    let target = dtype::from_name(name).and_then(Target::from_dtype);
    target.ok_or_else(|| unfit_dtype(name, "float16, bfloat16 or float32"))
}

/// The dtype of this name to encode from.
pub fn parse_source(name: &str) -> Result<Dtype> {
    let source = dtype::from_name(name).filter(|&dtype| cast::is_castable(dtype));
    source.ok_or_else(|| unfit_dtype(name, "float16, bfloat16, float32 or float64"))
}

fn unfit_dtype(name: &str, expected: &str) -> Error {
    Error::Argument { name: "dtype", found: format!("{name:?}"), expected: expected.into() }
}

/// What scales and codes stand for in `target`: made once, for that takes longer than to decode a small tensor.
fn decode_table(target: Target) -> &'static DecodeTable {
    static TABLES: [OnceLock<DecodeTable>; 3] = [const { OnceLock::new() }; 3];
    TABLES[target as usize].get_or_init(|| DecodeTable::new(target, OnOverflow::Warn))
}

/// The threads of a job on so many bytes of floats; all cores by default.
fn pool(workers: Option<usize>, nbytes: usize) -> Result<Pool> {
    let default = || if nbytes <= SMALL_BYTES { 1 } else { Resources::default().workers };
    Resources::of_workers(workers.unwrap_or_else(default)).pool()
}

/// Blocks that a worker does at once: their floats and codes fit its memory.
fn groups_at_once(group_bytes: usize, pool: Pool) -> usize {
    let nbytes = group_bytes + BLOCK_BYTES + 1;
    usize::try_from(pool.worker_bytes).map_or(usize::MAX, |worker_bytes| worker_bytes / nbytes)
}

/// Brings the memory of a tensor that threads are started for.
fn touch(arenas: &mut [Arena], nbytes: usize, pool: Pool) {
    if nbytes > SMALL_BYTES {
        arena::touch(arenas, pool.workers);
    }
}

fn share(arena: Arena, nbytes: usize, memory: &ArenaPool) -> ArenaView {
    let arena = Arc::new(arena);
    memory.give(Arc::clone(&arena));
    ArenaView::new(arena, 0..nbytes)
}

/// Does `work` on all pieces, in any order, and on small tensors right here; it returns the bytes of floats that it did.
fn run<P: Send>(
    phase: Phase,
    pieces: impl ExactSizeIterator<Item = P> + Send,
    work: impl Fn(P) -> usize + Sync,
    nbytes: usize,
    pool: Pool,
    observer: &mut Observer<'_>,
) -> Result<()> {
    if nbytes <= SMALL_BYTES {
        pieces.for_each(|piece| {
            work(piece);
        });
        return Ok(());
    }
    let progress = Progress::new(phase, vec![""], nbytes as u64);
    let workers = pool.workers.min(pieces.len());
    let job = PieceJob { count: pieces.len() as u64, pieces: Mutex::new(pieces), work, progress: &progress };
    work::run(&job, std::iter::once(0), workers, &progress, observer)
}

/// Pieces of one tensor that nothing connects: each chunk is the next of them.
struct PieceJob<'a, I, F> {
    count: u64,
    pieces: Mutex<I>,
    work: F,
    progress: &'a Progress<'a>,
}

impl<P, I: Iterator<Item = P> + Send, F: Fn(P) -> usize + Sync> Job for PieceJob<'_, I, F> {
    type Scratch = ();
    type State = ();
    const IN_ORDER: bool = false;

    fn chunks(&self, item: usize) -> Chunks {
        Chunks::new(item, std::iter::once(0..self.count), 1)
    }

    fn scratch(&self) {}

    fn begin(&self, _: usize) {}

    fn process(&self, _: &Chunk, (): &mut ()) -> Result<()> {
        let piece = lock(&self.pieces).next();
        if let Some(piece) = piece {
            let nbytes = (self.work)(piece);
            self.progress.add_bytes(nbytes as u64);
        }
        Ok(())
    }

    fn commit(&self, _: &Chunk, (): &mut (), (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn finish(&self, _: usize, (): ()) -> Result<()> {
        Ok(())
    }
}
