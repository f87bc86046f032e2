//! Work shared with the threads on which XLA itself computes.
//!
//! ```text
//! run:    ask the pool for helpers; claim and do tasks until none is left; wait until those that helpers claimed are done
//! helper: claim and do tasks until none is left; say how many it did
//! ```
//!
//! The caller waits for tasks that run, never for helpers to begin. So neither a pool of one thread nor a busy one can
//! block it; and a helper that begins late claims nothing, and touches nothing that the caller may have left behind.
#![expect(unsafe_code, reason = "calls XLA's functions, and lends the caller's task to its threads")]

use std::any::Any;
use std::ffi::c_void;
use std::hint;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};

use super::abi;
use super::float_state::DefaultFloatState;
use crate::kernels::{SPINS, Threads};

/// The threads of XLA's CPU client, as one call may use them.
#[derive(Debug, Clone, Copy)]
pub struct XlaThreads<'a> {
    api: &'a abi::Api,
    context: *mut abi::Context,
    count: usize,
}

// SAFETY: XLA reads the context, which does not change during the call, and hands tasks to a pool that takes them from
// any thread, its own among them.
unsafe impl Sync for XlaThreads<'_> {}

impl<'a> XlaThreads<'a> {
    /// Asks XLA how many there are; one, the caller's, if it has no pool.
    ///
    /// # Safety
    /// For `'a`, the functions of `api` may be called with `context`.
    pub(super) unsafe fn new(api: &'a abi::Api, context: *mut abi::Context) -> Self {
        let mut num_threads = 1;
        let mut args = abi::NumThreadsArgs {
            struct_size: size_of::<abi::NumThreadsArgs>(),
            extension_start: ptr::null_mut(),
            context,
            num_threads: &raw mut num_threads,
        };
        if let Some(ask) = api.thread_pool_num_threads {
            // SAFETY: by this function's condition; `args` and what it points to outlive the call.
            let error = unsafe { ask(&raw mut args) };
            destroy(api, error);
        }
        Self { api, context, count: usize::try_from(num_threads).unwrap_or(1).max(1) }
    }

    /// Has a thread of the pool help with a job. Whether it will does not matter.
    fn schedule(&self, job: &Arc<Job<'_>>) {
        let Some(schedule) = self.api.thread_pool_schedule else { return };
        let data = Arc::into_raw(Arc::clone(job)).cast_mut().cast::<c_void>();
        let mut args = abi::ScheduleArgs {
            struct_size: size_of::<abi::ScheduleArgs>(),
            extension_start: ptr::null_mut(),
            context: self.context,
            task: help,
            data,
        };
        // SAFETY: by the condition of `new`; `help` may be called with `data` on any thread, at any time, once.
        let error = unsafe { schedule(&raw mut args) };
        if !error.is_null() {
            // SAFETY: XLA has no pool and let go of the task: nobody else has this count of the Arc.
            drop(unsafe { Arc::from_raw(data.cast::<Job<'_>>()) });
            destroy(self.api, error);
        }
    }
}

impl Threads for XlaThreads<'_> {
    fn count(&self) -> usize {
        self.count
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let helpers = self.count.min(tasks).saturating_sub(1);
        if helpers == 0 {
            let _state = DefaultFloatState::enter();
            (0..tasks).for_each(task);
            return;
        }
        let job = Arc::new(Job::new(tasks, task));
        for _ in 0..helpers {
            self.schedule(&job);
        }
        job.work();
        job.wait();
        let panic = job.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Frees an error of XLA, if it is one.
fn destroy(api: &abi::Api, error: *mut abi::Error) {
    if error.is_null() {
        return;
    }
    let mut args = abi::ErrorDestroyArgs {
        struct_size: size_of::<abi::ErrorDestroyArgs>(),
        extension_start: ptr::null_mut(),
        error,
    };
    if let Some(destroy) = api.error_destroy {
        // SAFETY: XLA gave the error to this module, which frees it here, once.
        unsafe { destroy(&raw mut args) };
    }
}

/// What a thread of the pool calls.
///
/// # Safety
/// `data` is a count of an `Arc<Job>`, which this takes.
unsafe extern "C" fn help(data: *mut c_void) {
    // SAFETY: by this function's condition. The lifetime of the job's task is unknown here: `work` minds it.
    let job = unsafe { Arc::from_raw(data.cast::<Job<'_>>()) };
    job.work();
}

/// The tasks of one `run`. Helpers keep it alive, but not what `task` points to.
struct Job<'a> {
    task: *const (dyn Fn(usize) + Sync + 'a),
    tasks: usize,
    /// The first task that nobody claimed; from `tasks` on there is none left.
    next: AtomicUsize,
    /// How many tasks are done, or will never be because one panicked. At `tasks`, `task` is used no more.
    done: AtomicUsize,
    /// Of the first task that panicked.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

// SAFETY: `task` points to a closure that many threads may call at once; `work` says when it is there. All else is.
unsafe impl Send for Job<'_> {}
// SAFETY: as above.
unsafe impl Sync for Job<'_> {}

impl<'a> Job<'a> {
    fn new(tasks: usize, task: &(dyn Fn(usize) + Sync + 'a)) -> Self {
        Self {
            task: ptr::from_ref(task),
            tasks,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            panic: Mutex::new(None),
            caller: thread::current(),
        }
    }

    /// Does tasks until none is left.
    fn work(&self) {
        let _state = DefaultFloatState::enter();
        let mut done = 0;
        while let Some(number) = self.claim() {
            // SAFETY: this thread claimed a task and has not yet counted it as done. Until then `wait` does not return,
            // nor does `run`, which borrows the closure.
            let task = unsafe { &*self.task };
            done += 1;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(number))) {
                let panic = self.keep_first(panic);
                // To drop it may panic in turn, and nobody may leave `run` before `wait`.
                if let Err(another) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
                    mem::forget(another);
                }
                // Nobody claims what is left from here on; so it is counted here.
                done += self.tasks.saturating_sub(self.next.swap(self.tasks, Ordering::Relaxed));
            }
        }
        // Release: who sees the count sees what the tasks wrote. The job itself lives on until this returns.
        if done > 0 && self.done.fetch_add(done, Ordering::AcqRel) + done == self.tasks {
            self.caller.unpark();
        }
    }

    /// Keeps a panic for the caller, or gives it back if there is one.
    fn keep_first(&self, panic: Box<dyn Any + Send>) -> Option<Box<dyn Any + Send>> {
        let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_some() {
            return Some(panic);
        }
        *first = Some(panic);
        None
    }

    fn claim(&self) -> Option<usize> {
        // Each number comes once, and after all below it, for which tasks may wait. Relaxed: what tasks read was there
        // before they were scheduled.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number < self.tasks).then_some(number)
    }

    /// Returns when every task is done, which is when `task` is used no more.
    fn wait(&self) {
        let is_done = || self.done.load(Ordering::Acquire) == self.tasks;
        for _ in 0..SPINS {
            if is_done() {
                return;
            }
            hint::spin_loop();
        }
        while !is_done() {
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::time::Duration;

    use super::super::testing::{FakePool, Start};
    use super::*;
    use crate::kernels::for_each;

    const STARTS: [Start; 4] = [Start::AtOnce, Start::Inline, Start::Late, Start::Never];

    /// Rounds of tests that look for races; Miri is slow.
    const ROUNDS: usize = if cfg!(miri) { 5 } else { 500 };

    #[test]
    fn every_task_runs_once_whenever_helpers_begin() {
        for start in STARTS {
            for count in [1, 2, 7] {
                for tasks in [0, 1, 2, 30] {
                    let pool = FakePool::new(count, start);
                    // Freed before late helpers begin.
                    let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.with(|threads| {
                        threads.run(tasks, &|number| {
                            runs[number].fetch_add(1, Ordering::Relaxed);
                        });
                    });
                    assert!(runs.into_iter().all(|runs| runs.into_inner() == 1), "{start:?}, {count}, {tasks}");
                }
            }
        }
    }

    #[test]
    fn what_helpers_wrote_is_seen_after() {
        for round in 0..ROUNDS {
            let pool = FakePool::new(4, Start::AtOnce);
            let mut out = vec![0; 37];
            pool.with(|threads| {
                for_each(threads, out.chunks_mut(5).enumerate(), &|(number, chunk)| chunk.fill(number + round));
            });
            assert!(out.iter().enumerate().all(|(index, &value)| value == index / 5 + round));
        }
    }

    #[test]
    fn count_is_that_of_the_pool_and_one_without() {
        for (count, start, expected) in
            [(7, Start::AtOnce, 7), (7, Start::Never, 1), (0, Start::Late, 1), (-3, Start::Late, 1)]
        {
            assert_eq!(FakePool::new(count, start).with(|threads| threads.count()), expected);
        }
    }

    #[test]
    fn a_panic_on_a_helper_reaches_the_caller_after_all_claimed_tasks() {
        let pool = FakePool::new(2, Start::AtOnce);
        let caller = thread::current().id();
        let both = Barrier::new(2);
        let is_caller_done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.with(|threads| {
                threads.run(2, &|_| {
                    both.wait();
                    assert!(thread::current().id() == caller, "on a helper");
                    thread::sleep(Duration::from_millis(20));
                    is_caller_done.store(1, Ordering::Relaxed);
                });
            });
        }));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"on a helper"));
        assert_eq!(is_caller_done.into_inner(), 1);
    }

    #[test]
    fn a_panic_on_the_caller_waits_for_helpers() {
        let pool = FakePool::new(2, Start::AtOnce);
        let caller = thread::current().id();
        let both = Barrier::new(2);
        let is_helper_done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.with(|threads| {
                threads.run(2, &|_| {
                    both.wait();
                    assert!(thread::current().id() != caller, "on the caller");
                    thread::sleep(Duration::from_millis(20));
                    is_helper_done.store(1, Ordering::Relaxed);
                });
            });
        }));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"on the caller"));
        assert_eq!(is_helper_done.into_inner(), 1);
    }

    #[test]
    fn after_a_panic_no_task_begins_on_the_caller() {
        for start in [Start::Late, Start::Inline] {
            let pool = FakePool::new(3, start);
            let runs = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.with(|threads| {
                    threads.run(9, &|number| {
                        runs.fetch_add(1, Ordering::Relaxed);
                        assert!(number != 4, "task {number}");
                    });
                });
            }));
            assert_eq!(result.unwrap_err().downcast_ref::<String>().unwrap(), "task 4");
            assert_eq!(runs.into_inner(), 5);
        }
    }

    #[test]
    fn panics_of_all_tasks_at_once_reach_the_caller_as_one() {
        for _ in 0..ROUNDS.min(50) {
            let pool = FakePool::new(4, Start::AtOnce);
            let result =
                catch_unwind(AssertUnwindSafe(|| pool.with(|threads| threads.run(8, &|_| resume_unwind(Box::new(1))))));
            assert_eq!(result.unwrap_err().downcast_ref::<i32>(), Some(&1));
        }
    }

    #[test]
    fn panics_that_panic_when_dropped_leave_nobody_behind() {
        struct PanicsWhenDropped;
        impl Drop for PanicsWhenDropped {
            fn drop(&mut self) {
                // Of no bytes, for what this leaves is never freed.
                std::panic::panic_any(());
            }
        }

        let pool = FakePool::new(3, Start::AtOnce);
        let (all, is_last_done) = (Barrier::new(3), AtomicUsize::new(0));
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.with(|threads| {
                threads.run(3, &|number| {
                    all.wait();
                    if number < 2 {
                        std::panic::panic_any(PanicsWhenDropped);
                    }
                    thread::sleep(Duration::from_millis(20));
                    is_last_done.store(1, Ordering::Relaxed);
                });
            });
        }));
        mem::forget(result.unwrap_err());
        assert_eq!(is_last_done.into_inner(), 1);
    }

    #[test]
    fn a_task_may_wait_for_those_below_it() {
        for start in [Start::AtOnce, Start::Inline, Start::Late, Start::Never] {
            for count in [1, 2, 3] {
                let pool = FakePool::new(count, start);
                let begun = AtomicUsize::new(0);
                pool.with(|threads| {
                    threads.run(40, &|number| {
                        while begun.load(Ordering::Relaxed) < number {
                            thread::yield_now();
                        }
                        begun.fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert_eq!(begun.into_inner(), 40);
            }
        }
    }

    #[test]
    fn tasks_may_share_work_themselves() {
        for start in STARTS {
            let pool = FakePool::new(3, start);
            let runs = AtomicUsize::new(0);
            pool.with(|threads| {
                threads.run(4, &|_| {
                    threads.run(5, &|_| {
                        runs.fetch_add(1, Ordering::Relaxed);
                    });
                });
            });
            assert_eq!(runs.into_inner(), 20);
        }
    }

    #[test]
    fn many_threads_may_call_at_once() {
        let pool = FakePool::new(3, Start::AtOnce);
        thread::scope(|scope| {
            for caller in 0..4 {
                let pool = &pool;
                scope.spawn(move || {
                    for _ in 0..ROUNDS.min(50) {
                        let mut out = [0; 11];
                        pool.with(|threads| for_each(threads, out.chunks_mut(2), &|chunk| chunk.fill(caller)));
                        assert!(out.iter().all(|&value| value == caller));
                    }
                });
            }
        });
    }

    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[test]
    fn tasks_keep_subnormals_on_every_thread() {
        use super::super::float_state::tests::{half_of_smallest, in_state_of_xla};

        for start in STARTS {
            let pool = FakePool::new(3, start);
            let ((), is_restored) = in_state_of_xla(|| {
                // Threads of Linux begin in the state of the one that makes them.
                pool.with(|threads| threads.run(6, &|_| assert_eq!(half_of_smallest().to_bits(), 0x0040_0000)));
            });
            assert!(is_restored, "the state of {start:?} did not come back");
        }
    }
}
