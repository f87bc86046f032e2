//! Threads that share the work of one call, whoever owns them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How often a thread looks before it sleeps for what others are about to have done: some 10 to 20 us, where waking takes 5.
pub(crate) const SPINS: usize = 400;

/// Threads that share the work of one call.
pub trait Threads: Sync {
    /// How many work at once; at least one.
    fn count(&self) -> usize;

    /// Calls `task` with each number below `tasks`, once, on any thread; returns when all are done. Each task begins after
    /// those with lower numbers have begun, so it may wait for what these do.
    ///
    /// # Panics
    /// When a task does: then those not begun yet may never be.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// New threads for every call, or none but the caller's: for tests and benches, which have no pool, and for parts of a task.
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

/// Has each item consumed by one call of `work`, on any thread and in any order.
///
/// # Panics
/// When `work` does.
pub fn for_each<T: Send>(threads: &dyn Threads, items: impl IntoIterator<Item = T>, work: &(dyn Fn(T) + Sync)) {
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    threads.run(items.len(), &|number| {
        let item = items[number].lock().expect("nothing panics while it is locked").take();
        work(item.expect("each number comes once"));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_consumed_once() {
        for threads in [1, 2, 5] {
            for length in [0, 1, 7, if cfg!(miri) { 50 } else { 1000 }] {
                let mut out = vec![0; length];
                for_each(&ScopedThreads(threads), out.iter_mut().enumerate(), &|(number, out)| *out += number + 1);
                assert!(out.iter().enumerate().all(|(index, &value)| value == index + 1));
            }
        }
    }

    #[test]
    #[should_panic(expected = "task 3")]
    fn a_panic_of_a_task_reaches_the_caller() {
        ScopedThreads(2).run(5, &|number| assert!(number != 3, "task {number}"));
    }
}
