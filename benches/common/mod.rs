//! Memory to read, values to multiply, and threads: what the benches of kernels share.

#![allow(dead_code, reason = "each bench uses some of it")]

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

use tensorport::kernels::{Threads, for_each};

/// Bytes without a pattern.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Rayon's threads, on all cores. They wait for work, as those of XLA do, which run these kernels for users.
pub struct RayonThreads;

impl Threads for RayonThreads {
    fn count(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < tasks) {
                task(number);
            }
        };
        rayon::scope(|scope| {
            (1..self.count().min(tasks)).for_each(|_| scope.spawn(|_| work()));
            work();
        });
    }
}

/// Reads all bytes, on all cores.
pub fn read(bytes: &[u8]) {
    let part = bytes.len().div_ceil(RayonThreads.count());
    for_each(&RayonThreads, bytes.chunks(part), &|part| {
        let sums = part.as_chunks::<512>().0.iter().fold([0u64; 64], |mut sums, chunk| {
            for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                *sum ^= u64::from_le_bytes(*word);
            }
            sums
        });
        black_box(sums);
    });
}

/// Values between -1 and 1.
pub fn activations(count: usize) -> Vec<f32> {
    (0..count).map(|i| (f32::from(u8::try_from(i * 7919 % 251).expect("below 251")) - 125.0) / 125.0).collect()
}

/// Rounded to bfloat16.
pub fn to_bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|value| half::bf16::from_f32(*value).to_bits()).collect()
}
