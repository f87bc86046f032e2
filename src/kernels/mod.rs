//! Kernels for CPUs: products with MXFP4 and bfloat16 matrices at the speed of the memory.
//!
//! They know slices and [`Threads`], and nothing of JAX or Python; `ffi` is how XLA calls them.

mod floats;
mod linear;
mod matrix;
mod packed;
mod product;
mod threads;

pub use floats::{Floats, FloatsMut};
pub use linear::linear;
pub use matrix::{Format, Matrix};
pub use threads::{ScopedThreads, Threads, for_each};
