//! Threads that share the work of one call, whoever owns them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads that share the work of one call.
pub trait Threads: Sync {
    /// How many work at once; at least one.
    fn count(&self) -> usize;

    /// Calls `task` with each number below `tasks`, once, on any thread and in any order; returns when all are done.
    ///
    /// # Panics
    /// When a task does: then those not begun yet may never be.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// New threads for every call: for tests and benches, which have no pool.
#[derive(Debug, Clone, Copy)]
pub struct ScopedThreads(
    /// How many work at once.
    pub usize,
);

impl Threads for ScopedThreads {
    fn count(&self) -> usize {
        self.0.max(1)
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= tasks {
                    break;
                }
                task(number);
            }
        };
        let helpers = self.count().min(tasks).saturating_sub(1);
        let panic = std::thread::scope(|scope| {
            let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(work)).collect();
            let own = catch_unwind(AssertUnwindSafe(work)).err();
            helpers.into_iter().filter_map(|helper| helper.join().err()).fold(own, |first, panic| first.or(Some(panic)))
        });
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Divides `out` into chunks of `chunk` elements (the last may be shorter) and has each filled by one call of `fill`,
/// which gets the chunk's number.
///
/// # Panics
/// When `chunk` is 0, or `fill` panics.
pub fn for_each_chunk<T: Send>(
    threads: &dyn Threads,
    out: &mut [T],
    chunk: usize,
    fill: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let chunks: Vec<Mutex<Option<&mut [T]>>> = out.chunks_mut(chunk).map(|chunk| Mutex::new(Some(chunk))).collect();
    threads.run(chunks.len(), &|number| {
        let chunk = chunks[number].lock().expect("nothing panics while it is locked").take();
        fill(number, chunk.expect("each number comes once"));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_filled_once_by_its_number() {
        for threads in [1, 2, 5] {
            for (length, chunk) in [(0, 3), (1, 3), (7, 3), (9, 3), (1000, 1)] {
                let mut out = vec![usize::MAX; length];
                for_each_chunk(&ScopedThreads(threads), &mut out, chunk, &|number, chunk| {
                    assert!(chunk.iter().all(|&value| value == usize::MAX));
                    chunk.fill(number);
                });
                assert!(out.iter().enumerate().all(|(index, &number)| number == index / chunk));
            }
        }
    }

    #[test]
    #[should_panic(expected = "task 3")]
    fn a_panic_of_a_task_reaches_the_caller() {
        ScopedThreads(2).run(5, &|number| assert!(number != 3, "task {number}"));
    }
}
