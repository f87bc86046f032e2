//! A handler that tells how it was called: for the project's own tests, and to find out what is wrong on a machine.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::call::Call;
use super::entry::Handler;
use super::error::{FfiError, Result};
use crate::kernels::{Threads, for_each};

/// Values that one task adds up.
const CHUNK: usize = 64;

/// How long tasks wait for another thread to take one of them.
const PATIENCE: Duration = Duration::from_secs(20);

/// `tensorport.v1.probe`.
///
/// Arguments: uint8 of any shape, of which nothing is read; float32 `[n]`.
/// Results: int32 `[3]`, the number of threads, tasks done on the caller's thread, and on others; uint32 `[2]`, the
/// address of the first argument, low half first; float32 `[]`, the sum of the second, added up by tasks.
/// Attributes: `mode`, an int32: 0 computes; 1 fails; 2 panics; 3 panics on a thread of the pool; 4 computes, but its
/// tasks end only after one runs on a thread of the pool.
pub struct Probe;

impl Handler for Probe {
    const NAME: &'static str = "tensorport.v1.probe";

    fn run(call: &mut Call<'_>) -> Result<()> {
        let mode: i32 = call.attribute("mode")?;
        let [bytes, values] = call.args()?;
        let [counts, address, sum] = call.results()?;
        let counts: &mut [i32; 3] = sized(counts.slice()?)?;
        let address: &mut [u32; 2] = sized(address.slice()?)?;
        let sum: &mut [f32; 1] = sized(sum.slice()?)?;
        bytes.slice::<u8>()?;
        let values = values.slice::<f32>()?;
        let threads = call.threads();
        match mode {
            0 => {}
            1 => return Err(FfiError::invalid_argument("mode", 1, "one that does not fail")),
            2 => panic!("as mode 2 asks"),
            3 | 4 => wait_for_helper(&threads, mode == 3)?,
            _ => return Err(FfiError::invalid_argument("mode", mode, "0 to 4")),
        }
        let caller = thread::current().id();
        let own = AtomicUsize::new(0);
        let mut sums = vec![0.0; values.len().div_ceil(CHUNK)];
        for_each(&threads, sums.iter_mut().enumerate(), &|(number, sum)| {
            own.fetch_add(usize::from(thread::current().id() == caller), Ordering::Relaxed);
            *sum = values[number * CHUNK..].iter().take(CHUNK).sum();
        });
        *sum = [sums.iter().sum()];
        let own = own.into_inner();
        *counts = [threads.count(), own, sums.len() - own].map(|count| count.try_into().unwrap_or(i32::MAX));
        let place = u64::try_from(bytes.address()).expect("addresses have at most 64 bits");
        *address = [place, place >> 32].map(|half| u32::try_from(half & u64::from(u32::MAX)).expect("32 bits"));
        Ok(())
    }
}

/// Runs tasks on the caller's thread that end only after another thread took one, which then may panic.
fn wait_for_helper(threads: &dyn Threads, panics: bool) -> Result<()> {
    let caller = thread::current().id();
    let has_helped = AtomicBool::new(false);
    let deadline = Instant::now() + PATIENCE;
    threads.run(threads.count().max(2), &|_| {
        if thread::current().id() != caller {
            has_helped.store(true, Ordering::Relaxed);
            assert!(!panics, "as mode 3 asks");
        }
        while !has_helped.load(Ordering::Relaxed) && Instant::now() < deadline {
            thread::sleep(Duration::from_micros(50));
        }
    });
    if has_helped.into_inner() { Ok(()) } else { Err(FfiError::unavailable("no other thread took a task")) }
}

fn sized<T, const N: usize>(slice: &mut [T]) -> Result<&mut [T; N]> {
    let found = slice.len();
    slice.try_into().map_err(|_| FfiError::invalid_argument("elements of a result", found, N))
}

#[cfg(test)]
mod tests {
    use super::super::entry::entry;
    use super::super::testing::{FakeBuffer, FakeCall, FakePool, Start};
    use super::*;

    type Outcome = Result<(), (i32, String)>;

    /// The outcome, the counts, whether the address is the argument's, the sum.
    fn probe(mode: u64, start: Start) -> (Outcome, [i32; 3], bool, f32) {
        let (mut bytes, mut values) = ([0_u8; 5], [1.0_f32; 200]);
        let (mut counts, mut address, mut sum) = ([0_i32; 3], [0_u32; 2], [0.0_f32]);
        let args = vec![FakeBuffer::new(6, &[5], &mut bytes), FakeBuffer::new(11, &[200], &mut values)];
        let results = vec![
            FakeBuffer::new(4, &[3], &mut counts),
            FakeBuffer::new(8, &[2], &mut address),
            FakeBuffer::new(11, &[], &mut sum),
        ];
        let mut call = FakeCall::new(args, results);
        call.attributes.push(("mode", 3, 4, mode));
        call.pool = FakePool::new(2, start);
        let outcome = call.call(entry::<Probe>);
        drop(call);
        let place = u64::from(address[0]) | u64::from(address[1]) << 32;
        (outcome, counts, place == bytes.as_ptr().addr() as u64, sum[0])
    }

    #[test]
    fn it_tells_of_its_call() {
        let (outcome, [threads, own, other], is_own_address, sum) = probe(0, Start::AtOnce);
        assert_eq!((outcome, threads, own + other, is_own_address, sum), (Ok(()), 2, 4, true, 200.0));
        assert_eq!(probe(0, Start::Late).1, [2, 4, 0]);
        assert_eq!(probe(4, Start::AtOnce).0, Ok(()));
    }

    #[test]
    fn it_fails_in_every_way_that_a_handler_can() {
        let fault = |mode| probe(mode, Start::AtOnce).0.unwrap_err();
        let text = |text: &str| format!("tensorport.v1.probe: {text}");
        assert_eq!(fault(1), (3, text("mode: found 1, expected one that does not fail")));
        assert_eq!(fault(2), (13, text("panic: as mode 2 asks")));
        assert_eq!(fault(3), (13, text("panic: as mode 3 asks")));
        assert_eq!(fault(5), (3, text("mode: found 5, expected 0 to 4")));
    }
}
