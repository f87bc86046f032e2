//! tensorport brings large checkpoints into JAX: it reads safetensors files of any dtype, converts them to JAX-ready
//! files in bounded memory, and verifies what it wrote.
//!
//! | module | what it knows |
//! |---|---|
//! | [`dtype`], [`cast`], [`mxfp4`], [`float8`] | dtypes, float casts with counts, the MXFP4 codec, float8 with block scales (pure) |
//! | [`header`], [`index`], [`checkpoint`], [`mapping`] | untrusted files in, validated named tensors out |
//! | [`options`], [`plan`], [`names`], [`select`], [`output`] | what a conversion will write, and where (pure) |
//! | [`mod@convert`], [`transform`], [`work`], [`journal`], [`side_files`] | doing it: parallel, bounded, resumable |
//! | [`manifest`], [`mod@verify`], [`checksum`] | what a converted tree says of itself, and whether that holds |
//! | [`arena`], [`mod@load`], [`codec`] | tensors in memory: read from files, decoded and encoded |
//! | [`kernels`], [`ffi`], [`simd`] | products at memory speed on CPUs; how XLA calls them; which vector instructions there are |
//! | [`inspect`], [`synthetic`], [`cli`] | tables and statistics, random checkpoints, the command line |

pub mod arena;
pub mod arrivals;
pub mod cast;
mod check;
pub mod checkpoint;
pub mod checksum;
pub mod cli;
pub mod codec;
pub mod convert;
pub mod dtype;
pub mod error;
mod exact_sum;
pub mod ffi;
pub mod file;
pub mod float8;
pub mod header;
pub mod index;
pub mod input;
pub mod inspect;
pub mod journal;
pub mod kernels;
pub mod load;
pub mod manifest;
pub mod mapping;
pub mod model_config;
pub mod mxfp4;
pub mod names;
pub mod options;
pub mod ordered_map;
pub mod output;
mod output_folder;
pub mod plan;
pub mod progress;
#[cfg(feature = "python")]
mod python;
pub mod region;
pub mod select;
pub mod side_files;
pub mod simd;
mod sink;
mod source_file;
pub mod stats;
pub mod synthetic;
mod system;
pub mod transform;
pub mod verify;
pub mod work;

pub use checkpoint::Checkpoint;
pub use convert::convert;
pub use error::{Error, Result};
pub use verify::verify;
