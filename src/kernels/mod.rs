//! Kernels for CPUs: products with MXFP4 and bfloat16 matrices, and attention, at the speed of the memory.
//!
//! They know slices and [`Threads`], and nothing of JAX or Python; [`ffi`](crate::ffi) is how XLA calls them.

mod attention;
mod expand;
mod experts;
mod few;
mod floats;
mod grouping;
mod int8;
mod linear;
mod many;
mod matrix;
mod packed;
mod product;
mod slots;
mod swiglu;
mod threads;

pub use attention::{Attention, attention};
pub use experts::{ELSEWHERE, Experts, expert_linear, moe};
pub use floats::{Floats, FloatsMut};
pub use linear::linear;
pub use matrix::{Format, Matrix};
pub use slots::write_slots;
pub(crate) use threads::SPINS;
pub use threads::{ScopedThreads, Threads, for_each};
