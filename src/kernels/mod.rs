//! Kernels for CPUs: products with MXFP4 and bfloat16 matrices at the speed of the memory.
//!
//! They know slices and [`Threads`], and nothing of JAX or Python; [`ffi`](crate::ffi) is how XLA calls them.

mod expand;
mod experts;
mod few;
mod floats;
mod grouping;
mod linear;
mod many;
mod matrix;
mod packed;
mod product;
mod swiglu;
mod threads;

pub use experts::{ELSEWHERE, Experts, expert_linear, moe};
pub use floats::{Floats, FloatsMut};
pub use linear::linear;
pub use matrix::{Format, Matrix};
pub use threads::{ScopedThreads, Threads, for_each};
