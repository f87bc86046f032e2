//! How XLA calls Rust on CPU: its foreign function interface, without a C++ compiler and without linking to jaxlib.
//!
//! | module | what it knows |
//! |---|---|
//! | `abi` | XLA's C structs |
//! | `entry` | from XLA's call to a [`Handler`] and back: metadata, errors, panics |
//! | `call`, `buffer`, `error` | what a handler sees: slices, attributes, errors; all checked |
//! | `pool`, `float_state` | XLA's threads, and how they round |
//! | `handlers` | the [`kernels`](crate::kernels) as XLA calls them |
//! | `probe` | the handler that tests and diagnosis call |
//!
//! A handler is a function of a [`Call`]. It needs no unsafe code, and is registered by being listed in [`TARGETS`].

mod abi;
mod buffer;
mod call;
mod entry;
mod error;
mod float_state;
mod handlers;
mod pool;
mod probe;
#[cfg(test)]
mod testing;

pub use buffer::{Buffer, BufferMut, DType, Element};
pub use call::Call;
pub use entry::{Entry, Handler, entry};
pub use error::{FfiError, Result};
pub use float_state::DefaultFloatState;
pub use pool::XlaThreads;

/// A function that XLA may call, and the name it calls it by.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The handler's name.
    pub name: &'static str,
    /// What is registered under it.
    pub entry: Entry,
}

impl Target {
    const fn of<H: Handler>() -> Self {
        Self { name: H::NAME, entry: entry::<H> }
    }
}

/// All handlers of this package.
pub const TARGETS: &[Target] = &[
    Target::of::<handlers::Linear>(),
    Target::of::<handlers::Mxfp4Matmul<false>>(),
    Target::of::<handlers::Mxfp4Matmul<true>>(),
    Target::of::<handlers::Mxfp4ExpertMatmul<false>>(),
    Target::of::<handlers::Mxfp4ExpertMatmul<true>>(),
    Target::of::<handlers::Mxfp4Moe<false>>(),
    Target::of::<handlers::Mxfp4Moe<true>>(),
    Target::of::<handlers::DenseMoe>(),
    Target::of::<handlers::GroupedAttention>(),
    Target::of::<handlers::WriteSlots>(),
    Target::of::<probe::Probe>(),
];
