//! Kernels for CPUs: products with MXFP4 and bfloat16 matrices at the speed of the memory.
//!
//! They know slices and [`Threads`], and nothing of JAX or Python; `ffi` is how XLA calls them.

mod threads;

pub use threads::{ScopedThreads, Threads, for_each_chunk};
