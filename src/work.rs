//! Chunks of tensors on all cores: done in any order, committed tensor by tensor in the order of their bytes.
//!
//! Each job has its own threads, never a global pool. The calling thread only waits, delivers progress and can stop the
//! job; so callbacks run where the caller expects them and an interrupt takes effect within one chunk.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::progress::{Observer, Progress};

/// Time between two events.
const EVENT_INTERVAL: Duration = Duration::from_millis(50);

/// Smallest buffer a worker can work with.
const MIN_WORKER_BYTES: u64 = 64 << 10;

/// Largest buffer worth having: more only leaves the caches.
const MAX_WORKER_BYTES: u64 = 8 << 20;

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

impl Default for Resources {
    /// All cores, 256 MB.
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
        Self { workers, max_memory: 256_000_000 }
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

/// The chunks of one item, whose pieces are ranges of units; an empty piece is one empty chunk.
pub fn chunks(
    item: usize,
    pieces: impl ExactSizeIterator<Item = Range<u64>>,
    chunk_units: u64,
) -> impl Iterator<Item = Chunk> {
    let count = pieces.len();
    let mut sequence = 0;
    pieces.enumerate().flat_map(move |(piece, range)| {
        let chunks = (range.end - range.start).div_ceil(chunk_units).max(1);
        let first = sequence;
        sequence += chunks;
        (0..chunks).map(move |number| {
            let start = range.start + number * chunk_units;
            let ends_piece = number + 1 == chunks;
            Chunk {
                item,
                piece,
                units: start..range.end.min(start + chunk_units),
                sequence: first + number,
                ends_piece,
                ends_item: ends_piece && piece + 1 == count,
            }
        })
    })
}

/// What to do with chunks.
pub trait Job: Sync {
    /// Buffers of one worker.
    type Scratch;
    /// What is known of an item between its first and its last chunk.
    type State: Send;

    /// Buffers for a new worker.
    fn scratch(&self) -> Self::Scratch;
    /// State of an item before its first chunk is committed.
    fn begin(&self, item: usize) -> Self::State;
    /// Handles a chunk; runs beside any other chunk.
    fn process(&self, chunk: &Chunk, scratch: &mut Self::Scratch) -> Result<()>;
    /// Takes in what `process` left in `scratch`; within an item, runs in the order of the chunks.
    fn commit(&self, chunk: &Chunk, scratch: &mut Self::Scratch, state: &mut Self::State) -> Result<()>;
    /// All chunks of an item are committed.
    fn finish(&self, item: usize, state: Self::State) -> Result<()>;
}

/// Runs a job to its end, its first error, or the observer's `Break`, which is [`Error::Cancelled`].
pub fn run<J: Job>(
    job: &J,
    chunks: impl Iterator<Item = Chunk> + Send,
    items: usize,
    workers: usize,
    progress: &Progress<'_>,
    observer: &mut Observer<'_>,
) -> Result<()> {
    let shared = Shared {
        chunks: Mutex::new(chunks),
        gates: (0..items).map(|_| Gate::default()).collect(),
        stop: AtomicBool::new(false),
        fault: Mutex::new(None),
        running: Mutex::new(workers),
        ended: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for number in 0..workers {
            let worker = || {
                let _ended = WorkerEnd(&shared);
                if let Err(fault) = shared.work(job, progress) {
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

struct Shared<I, S> {
    chunks: Mutex<I>,
    gates: Vec<Gate<S>>,
    stop: AtomicBool,
    fault: Mutex<Option<Error>>,
    running: Mutex<usize>,
    ended: Condvar,
}

/// Lets the chunks of one item commit in order.
struct Gate<S> {
    state: Mutex<(u64, Option<S>)>,
    moved: Condvar,
}

impl<S> Default for Gate<S> {
    fn default() -> Self {
        Self { state: Mutex::new((0, None)), moved: Condvar::new() }
    }
}

/// Tells the calling thread that a worker is gone, even by a panic.
struct WorkerEnd<'a, I, S>(&'a Shared<I, S>);

impl<I, S> Drop for WorkerEnd<'_, I, S> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.release();
        }
        *lock(&self.0.running) -= 1;
        self.0.ended.notify_all();
    }
}

impl<I: Iterator<Item = Chunk>, S> Shared<I, S> {
    fn work<J: Job<State = S>>(&self, job: &J, progress: &Progress<'_>) -> Result<()> {
        let mut scratch = job.scratch();
        while !self.stop.load(Ordering::Relaxed) {
            let Some(chunk) = lock(&self.chunks).next() else { break };
            if chunk.sequence == 0 {
                progress.begin(chunk.item);
            }
            job.process(&chunk, &mut scratch)?;
            let gate = &self.gates[chunk.item];
            let mut state = lock(&gate.state);
            while state.0 != chunk.sequence {
                if self.stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                state = gate.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            job.commit(&chunk, &mut scratch, state.1.get_or_insert_with(|| job.begin(chunk.item)))?;
            state.0 += 1;
            let finished = if chunk.ends_item { state.1.take() } else { None };
            drop(state);
            gate.moved.notify_all();
            if let Some(finished) = finished {
                job.finish(chunk.item, finished)?;
                progress.add_tensor();
            }
        }
        Ok(())
    }
}

impl<I, S> Shared<I, S> {
    /// Records the first fault and stops everybody.
    fn fail(&self, fault: Error) {
        lock(&self.fault).get_or_insert(fault);
        self.release();
    }

    /// Stops everybody, those at a gate included.
    fn release(&self) {
        self.stop.store(true, Ordering::Relaxed);
        for gate in &self.gates {
            // Under the lock, so that no worker is between its look at `stop` and its wait.
            let _state = lock(&gate.state);
            gate.moved.notify_all();
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
        let work = (0..3).flat_map(|item| chunks(item, [0..100, 100..100, 100..205].into_iter(), 7));
        let progress = Progress::new(Phase::Read, vec!["a", "b", "c"], 0);
        let result = run(&job, work, 3, workers, &progress, &mut progress::ignore);
        (result, job.commits.into_inner().unwrap())
    }

    #[test]
    fn chunks_cover_their_pieces() {
        let all: Vec<_> = chunks(5, [0..10, 10..10, 10..13].into_iter(), 4).collect();
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
        let endless = std::iter::repeat_with(|| {
            std::thread::sleep(Duration::from_millis(1));
            Chunk { item: 0, piece: 0, units: 0..1, sequence: 0, ends_piece: false, ends_item: false }
        });
        // Every chunk claims to be the first, so that all but one wait at the gate.
        let result = run(&job, endless, 1, 4, &progress, &mut |_| ControlFlow::Break(()));
        assert!(matches!(result, Err(Error::Cancelled)));
    }

    #[test]
    fn too_little_memory_is_refused() {
        let fault = Resources { workers: 64, max_memory: 1_000_000 }.pool().unwrap_err();
        assert!(fault.to_string().contains("8388608"), "{fault}");
        assert!(Resources { workers: 0, max_memory: 1 << 30 }.pool().is_err());
    }
}
