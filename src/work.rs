//! Chunks of tensors on all cores: done in any order, committed tensor by tensor in the order of their bytes.
//!
//! Each job has its own threads, never a global pool. The calling thread only waits, delivers progress and can stop the
//! job; so callbacks run where the caller expects them and an interrupt takes effect within one chunk.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::progress::{Observer, Progress};

/// Time between two events.
const EVENT_INTERVAL: Duration = Duration::from_millis(50);

/// Smallest buffer a worker can work with.
const MIN_WORKER_BYTES: u64 = 64 << 10;

/// Largest buffer worth having: on a processor with 1 MiB of L2 per core, larger and smaller ones were slower
/// (2 cores of an AMD EPYC, 2026-11; docs/design.md has the figures).
const MAX_WORKER_BYTES: u64 = 1 << 20;

/// Threads and memory of a job.
#[derive(Debug, Clone, Copy)]
pub struct Resources {
    /// Number of worker threads.
    pub workers: usize,
    /// Bytes of anonymous memory for the whole process.
    pub max_memory: u64,
}

/// Most workers of a job.
const MAX_WORKERS: usize = 1024;

/// Memory for a job whose caller does not say.
const DEFAULT_MAX_MEMORY: u64 = 256_000_000;

impl Default for Resources {
    /// All cores, 256 MB.
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
        Self { workers, max_memory: DEFAULT_MAX_MEMORY }
    }
}

/// Threads of a job and the buffer that each may have: [`Resources`] after their check.
#[derive(Debug, Clone, Copy)]
pub struct Pool {
    /// Number of worker threads.
    pub workers: usize,
    /// Buffer bytes of each worker.
    pub worker_bytes: u64,
}

impl Resources {
    /// These resources, with `workers` if somebody asked for a number.
    #[must_use]
    pub fn with_workers(self, workers: Option<usize>) -> Self {
        Self { workers: workers.unwrap_or(self.workers), ..self }
    }

    /// The default memory for this number of workers: the cores are not counted, which takes the system some 25 µs.
    #[must_use]
    pub fn of_workers(workers: usize) -> Self {
        Self { workers, max_memory: DEFAULT_MAX_MEMORY }
    }

    /// Divides the memory among the workers. Half of it is left for tables, stacks and the interpreter.
    pub fn pool(&self) -> Result<Pool> {
        if !(1..=MAX_WORKERS).contains(&self.workers) {
            return Err(Error::Argument {
                name: "workers",
                found: self.workers.to_string(),
                expected: format!("a number between 1 and {MAX_WORKERS}"),
            });
        }
        let bytes = self.max_memory / 2 / self.workers as u64;
        if bytes < MIN_WORKER_BYTES {
            let least = 2 * MIN_WORKER_BYTES * self.workers as u64;
            return Err(Error::Argument {
                name: "max_memory",
                found: format!("{} bytes for {} workers", self.max_memory, self.workers),
                expected: format!("at least {least} bytes, or fewer workers"),
            });
        }
        Ok(Pool { workers: self.workers, worker_bytes: bytes.min(MAX_WORKER_BYTES) })
    }
}

/// A stretch of one item (a tensor) that a worker handles at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Index of the item.
    pub item: usize,
    /// Index of the piece of the item that the chunk lies in.
    pub piece: usize,
    /// Units of the item.
    pub units: Range<u64>,
    /// Number of the chunk within the item, from 0.
    pub sequence: u64,
    /// The last chunk of its piece.
    pub ends_piece: bool,
    /// The last chunk of its item.
    pub ends_item: bool,
}

/// The chunks of one item, in order.
#[derive(Debug, Clone)]
pub struct Chunks {
    item: usize,
    pieces: Vec<Range<u64>>,
    chunk_units: u64,
    /// Piece and unit at which the next chunk begins.
    piece: usize,
    unit: u64,
    /// Chunks made, and all chunks.
    sequence: u64,
    count: u64,
}

impl Chunks {
    /// Divides an item whose pieces are ranges of units; an empty piece is one empty chunk.
    #[must_use]
    pub fn new(item: usize, pieces: impl Iterator<Item = Range<u64>>, chunk_units: u64) -> Self {
        let pieces: Vec<_> = pieces.collect();
        let count = pieces.iter().map(|piece| (piece.end - piece.start).div_ceil(chunk_units).max(1)).sum();
        let unit = pieces.first().map_or(0, |piece| piece.start);
        Self { item, pieces, chunk_units, piece: 0, unit, sequence: 0, count }
    }

    fn left(&self) -> u64 {
        self.count - self.sequence
    }
}

impl Iterator for Chunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let piece = self.pieces.get(self.piece)?;
        let units = self.unit..piece.end.min(self.unit.saturating_add(self.chunk_units));
        let ends_piece = units.end == piece.end;
        let chunk = Chunk {
            item: self.item,
            piece: self.piece,
            sequence: self.sequence,
            ends_piece,
            ends_item: self.left() == 1,
            units,
        };
        self.sequence += 1;
        self.unit = chunk.units.end;
        if ends_piece {
            self.piece += 1;
            self.unit = self.pieces.get(self.piece).map_or(0, |piece| piece.start);
        }
        Some(chunk)
    }
}

/// What to do with chunks.
pub trait Job: Sync {
    /// Buffers of one worker.
    type Scratch;
    /// What is known of an item between its first and its last chunk.
    type State: Send;
    /// Chunks of an item are committed in their order. False where that does not matter: nobody waits for a turn.
    const IN_ORDER: bool = true;

    /// The chunks of an item.
    fn chunks(&self, item: usize) -> Chunks;
    /// Buffers for a new worker.
    fn scratch(&self) -> Self::Scratch;
    /// State of an item before its first chunk is committed.
    fn begin(&self, item: usize) -> Self::State;
    /// Handles a chunk; runs beside any other chunk.
    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()>;
    /// Takes in what `process` left in `scratch`; within an item, one at a time and if so wanted in order.
    fn commit(&self, chunk: &Chunk, scratch: &mut Self::Scratch, state: &mut Self::State) -> Result<()>;
    /// All chunks of an item are committed.
    fn finish(&self, item: usize, state: Self::State) -> Result<()>;
    /// The job was stopped: lets go of workers that wait in `process`.
    fn release(&self) {}
}

/// Runs a job on some items to its end, its first error, or the observer's `Break`, which is [`Error::Cancelled`].
///
/// Each worker stays with one item, so that two workers seldom write one file, which the kernel would let only one of
/// them do at a time; those that find no item left help with the largest rest.
pub fn run<J: Job>(
    job: &J,
    items: impl Iterator<Item = usize> + Send,
    workers: usize,
    progress: &Progress<'_>,
    observer: &mut Observer<'_>,
) -> Result<()> {
    let shared = Shared {
        job,
        queue: Mutex::new(Queue { waiting: items, begun: Vec::new() }),
        stop: AtomicBool::new(false),
        fault: Mutex::new(None),
        running: Mutex::new(workers),
        ended: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for number in 0..workers {
            let worker = || {
                let _ended = WorkerEnd(&shared);
                if let Err(fault) = shared.work(progress) {
                    shared.fail(fault);
                }
            };
            let builder = std::thread::Builder::new().name(format!("tensorport-{number}"));
            if let Err(source) = builder.spawn_scoped(scope, worker) {
                *lock(&shared.running) -= workers - number;
                shared.fail(Error::Io { path: "a worker thread".into(), source });
                break;
            }
        }
        let mut running = lock(&shared.running);
        while *running > 0 {
            running = shared.ended.wait_timeout(running, EVENT_INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
            drop(running);
            if observer(&progress.event()) == ControlFlow::Break(()) {
                shared.fail(Error::Cancelled);
            }
            running = lock(&shared.running);
        }
        drop(running);
        // The end is an event too, also of a job that was over before the first interval.
        if lock(&shared.fault).is_none() && observer(&progress.event()) == ControlFlow::Break(()) {
            shared.fail(Error::Cancelled);
        }
    });
    match shared.fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(fault) => Err(fault),
        None => Ok(()),
    }
}

struct Shared<'a, J: Job, I> {
    job: &'a J,
    queue: Mutex<Queue<I, J::State>>,
    stop: AtomicBool,
    fault: Mutex<Option<Error>>,
    running: Mutex<usize>,
    ended: Condvar,
}

/// Items that nobody has begun, and those that are begun but not finished.
struct Queue<I, S> {
    waiting: I,
    begun: Vec<Arc<Begun<S>>>,
}

/// An item in work. Its gate lets its chunks commit in order.
struct Begun<S> {
    /// Number of its chunks.
    count: u64,
    chunks: Mutex<Chunks>,
    gate: Mutex<Gate<S>>,
    moved: Condvar,
}

/// How many chunks are committed (in order, the next one's number), and the item's state; None before the first commit.
struct Gate<S> {
    next: u64,
    state: Option<S>,
}

impl<S> Begun<S> {
    fn new(chunks: Chunks) -> Self {
        Self {
            count: chunks.count,
            chunks: Mutex::new(chunks),
            gate: Mutex::new(Gate { next: 0, state: None }),
            moved: Condvar::new(),
        }
    }

    fn next_chunk(&self) -> Option<Chunk> {
        lock(&self.chunks).next()
    }
}

/// Tells the calling thread that a worker is gone, even by a panic.
struct WorkerEnd<'a, 'b, J: Job, I>(&'a Shared<'b, J, I>);

impl<J: Job, I> Drop for WorkerEnd<'_, '_, J, I> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.release();
        }
        *lock(&self.0.running) -= 1;
        self.0.ended.notify_all();
    }
}

impl<J: Job, I: Iterator<Item = usize>> Shared<'_, J, I> {
    fn work(&self, progress: &Progress<'_>) -> Result<()> {
        let mut scratch = self.job.scratch();
        let mut current = None;
        while !self.stop.load(Ordering::Relaxed) {
            let Some((item, chunk)) = self.next(current.take()) else { break };
            if chunk.sequence == 0 {
                progress.begin(chunk.item);
            }
            self.job.process(&chunk, &mut scratch)?;
            if !self.commit(&item, &chunk, &mut scratch, progress)? {
                break;
            }
            current = Some(item);
        }
        Ok(())
    }

    /// The next chunk of the worker's `current` item; else of an item that nobody has begun; else of the begun item
    /// that has most left.
    fn next(&self, current: Option<Arc<Begun<J::State>>>) -> Option<(Arc<Begun<J::State>>, Chunk)> {
        if let Some(item) = current
            && let Some(chunk) = item.next_chunk()
        {
            return Some((item, chunk));
        }
        let mut queue = lock(&self.queue);
        let item = match queue.waiting.next() {
            Some(index) => {
                let item = Arc::new(Begun::new(self.job.chunks(index)));
                queue.begun.push(Arc::clone(&item));
                item
            }
            None => Arc::clone(queue.begun.iter().max_by_key(|item| lock(&item.chunks).left())?),
        };
        // Without chunks left there are none anywhere: the largest rest is none.
        let chunk = item.next_chunk()?;
        Some((item, chunk))
    }

    /// Commits a chunk when its turn has come; false when the job was stopped before.
    fn commit(
        &self,
        item: &Arc<Begun<J::State>>,
        chunk: &Chunk,
        scratch: &mut J::Scratch,
        progress: &Progress<'_>,
    ) -> Result<bool> {
        let mut gate = lock(&item.gate);
        while J::IN_ORDER && gate.next != chunk.sequence {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            gate = item.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        self.job.commit(chunk, scratch, gate.state.get_or_insert_with(|| self.job.begin(chunk.item)))?;
        gate.next += 1;
        let finished = if gate.next == item.count { gate.state.take() } else { None };
        drop(gate);
        item.moved.notify_all();
        if let Some(finished) = finished {
            lock(&self.queue).begun.retain(|begun| !Arc::ptr_eq(begun, item));
            self.job.finish(chunk.item, finished)?;
            progress.add_tensor();
        }
        Ok(true)
    }
}

impl<J: Job, I> Shared<'_, J, I> {
    /// Records the first fault and stops everybody.
    fn fail(&self, fault: Error) {
        lock(&self.fault).get_or_insert(fault);
        self.release();
    }

    /// Stops everybody, those at a gate included.
    fn release(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.job.release();
        for item in &lock(&self.queue).begun {
            // Under the lock, so that no worker is between its look at `stop` and its wait.
            let _gate = lock(&item.gate);
            item.moved.notify_all();
        }
    }
}

/// Locks, also after a panic elsewhere: the scope passes that panic on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::{self, Phase};

    /// Records the order of commits; optionally fails at one chunk.
    struct Recorder {
        commits: Mutex<Vec<(usize, u64)>>,
        fail_at: Option<(usize, u64)>,
    }

    impl Job for Recorder {
        type Scratch = ();
        type State = Vec<u64>;
        fn chunks(&self, item: usize) -> Chunks {
            Chunks::new(item, [0..100, 100..100, 100..205].into_iter(), 7)
        }
        fn scratch(&self) {}
        fn begin(&self, _: usize) -> Vec<u64> {
            Vec::new()
        }
        fn process(&self, chunk: &Chunk, (): &mut ()) -> Result<()> {
            if self.fail_at == Some((chunk.item, chunk.sequence)) {
                return Err(Error::Argument { name: "x", found: "y".into(), expected: "z".into() });
            }
            if chunk.sequence.is_multiple_of(3) {
                std::thread::yield_now();
            }
            Ok(())
        }
        fn commit(&self, chunk: &Chunk, (): &mut (), state: &mut Vec<u64>) -> Result<()> {
            state.push(chunk.sequence);
            Ok(())
        }
        fn finish(&self, item: usize, state: Vec<u64>) -> Result<()> {
            lock(&self.commits).extend(state.into_iter().map(|sequence| (item, sequence)));
            Ok(())
        }
    }

    fn run_recorder(fail_at: Option<(usize, u64)>, workers: usize) -> (Result<()>, Vec<(usize, u64)>) {
        let job = Recorder { commits: Mutex::default(), fail_at };
        let progress = Progress::new(Phase::Read, vec!["a", "b", "c"], 0);
        let result = run(&job, 0..3, workers, &progress, &mut progress::ignore);
        (result, job.commits.into_inner().unwrap())
    }

    #[test]
    fn chunks_cover_their_pieces() {
        let all: Vec<_> = Chunks::new(5, [0..10, 10..10, 10..13].into_iter(), 4).collect();
        let ranges: Vec<_> = all.iter().map(|chunk| (chunk.piece, chunk.units.clone())).collect();
        assert_eq!(ranges, [(0, 0..4), (0, 4..8), (0, 8..10), (1, 10..10), (2, 10..13)]);
        assert_eq!(all.iter().filter(|chunk| chunk.ends_piece).count(), 3);
        assert_eq!(all.iter().map(|chunk| chunk.sequence).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert!(all[4].ends_item && !all[3].ends_item);
    }

    #[test]
    fn commits_are_in_order_within_an_item() {
        for workers in [1, 2, 8, 64] {
            let (result, commits) = run_recorder(None, workers);
            result.unwrap();
            assert_eq!(commits.len(), 3 * (15 + 1 + 15));
            for item in 0..3 {
                let sequence: Vec<_> = commits.iter().filter(|c| c.0 == item).map(|c| c.1).collect();
                assert_eq!(sequence, (0..31).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_first_error_stops_the_job() {
        for workers in [1, 2, 8, 64] {
            let (result, commits) = run_recorder(Some((1, 4)), workers);
            assert!(matches!(result, Err(Error::Argument { .. })));
            assert!(!commits.iter().any(|commit| commit.0 == 1));
        }
    }

    #[test]
    fn the_observer_can_stop_the_job() {
        let job = Recorder { commits: Mutex::default(), fail_at: None };
        let progress = Progress::new(Phase::Read, vec!["a"], 0);
        let endless = std::iter::repeat_n(0, usize::MAX);
        let result = run(&job, endless, 4, &progress, &mut |_| ControlFlow::Break(()));
        assert!(matches!(result, Err(Error::Cancelled)));
    }

    /// The first chunk is held back until the observer stops the job, so that the other workers wait at the gate.
    struct HeldBack<'a>(&'a AtomicBool);

    impl Job for HeldBack<'_> {
        type Scratch = ();
        type State = ();
        fn chunks(&self, item: usize) -> Chunks {
            Chunks::new(item, std::iter::once(0..100), 1)
        }
        fn scratch(&self) {}
        fn begin(&self, _: usize) {}
        fn process(&self, chunk: &Chunk, (): &mut ()) -> Result<()> {
            while chunk.sequence == 0 && !self.0.load(Ordering::Relaxed) {
                std::thread::yield_now();
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

    #[test]
    fn workers_at_a_gate_are_released() {
        let stopped = AtomicBool::new(false);
        let progress = Progress::new(Phase::Read, vec!["a"], 0);
        let result = run(&HeldBack(&stopped), 0..1, 8, &progress, &mut |_| {
            stopped.store(true, Ordering::Relaxed);
            ControlFlow::Break(())
        });
        assert!(matches!(result, Err(Error::Cancelled)));
    }

    #[test]
    fn too_little_memory_is_refused() {
        let fault = Resources { workers: 64, max_memory: 1_000_000 }.pool().unwrap_err();
        assert!(fault.to_string().contains("8388608"), "{fault}");
        assert!(Resources { workers: 0, max_memory: 1 << 30 }.pool().is_err());
    }
}
