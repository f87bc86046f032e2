//! How far a job is: counters that workers move, events that the calling thread delivers.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What a job is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Re-checking what an interrupted conversion had finished.
    Check,
    /// Writing tensors.
    Convert,
    /// Re-reading what was written.
    Verify,
    /// Reading tensors to describe them.
    Read,
    /// Reading tensors into memory.
    Load,
    /// Writing random tensors.
    Synthesize,
    /// Decoding a tensor in memory.
    Decode,
    /// Encoding a tensor in memory.
    Encode,
}

impl Phase {
    /// The phase as one word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Convert => "convert",
            Self::Verify => "verify",
            Self::Read => "read",
            Self::Load => "load",
            Self::Synthesize => "synthesize",
            Self::Decode => "decode",
            Self::Encode => "encode",
        }
    }
}

/// How far a job is.
#[derive(Debug, Clone)]
pub struct Event<'a> {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of tensor data done in this phase.
    pub bytes_done: u64,
    /// Bytes of tensor data in this phase.
    pub bytes_total: u64,
    /// Tensors done in this phase.
    pub tensors_done: usize,
    /// Tensors in this phase.
    pub tensors_total: usize,
    /// The tensor begun last; empty before the first.
    pub tensor: &'a str,
}

/// Receives events on the calling thread, some twenty a second; `Break` stops the job.
pub type Observer<'a> = dyn FnMut(&Event<'_>) -> ControlFlow<()> + 'a;

/// An observer that only lets the job go on.
pub fn ignore(_: &Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Counters of one phase, moved by the workers.
#[derive(Debug)]
pub struct Progress<'a> {
    phase: Phase,
    names: Vec<&'a str>,
    bytes_total: u64,
    bytes_done: AtomicU64,
    tensors_done: AtomicUsize,
    /// Index of the tensor begun last, plus one.
    current: AtomicUsize,
}

impl<'a> Progress<'a> {
    /// Counters at zero, for tensors of these names.
    #[must_use]
    pub fn new(phase: Phase, names: Vec<&'a str>, bytes_total: u64) -> Self {
        Self {
            phase,
            names,
            bytes_total,
            bytes_done: AtomicU64::new(0),
            tensors_done: AtomicUsize::new(0),
            current: AtomicUsize::new(0),
        }
    }

    /// A worker begins with a tensor.
    pub fn begin(&self, tensor: usize) {
        self.current.fetch_max(tensor + 1, Ordering::Relaxed);
    }

    /// A worker is done with some bytes.
    pub fn add_bytes(&self, nbytes: u64) {
        self.bytes_done.fetch_add(nbytes, Ordering::Relaxed);
    }

    /// A tensor is whole.
    pub fn add_tensor(&self) {
        self.tensors_done.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters now.
    #[must_use]
    pub fn event(&self) -> Event<'_> {
        let current = self.current.load(Ordering::Relaxed);
        Event {
            phase: self.phase,
            bytes_done: self.bytes_done.load(Ordering::Relaxed),
            bytes_total: self.bytes_total,
            tensors_done: self.tensors_done.load(Ordering::Relaxed),
            tensors_total: self.names.len(),
            tensor: current.checked_sub(1).map_or("", |index| self.names[index]),
        }
    }
}
