//! Integration tests: one module per area.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, in its fixtures too")]

mod arrivals;
mod attention;
mod cast;
mod convert;
mod encode;
mod fixtures;
mod float8;
mod fuzz;
mod header;
mod kernels;
mod load;
mod malformed;
mod mxfp4;
mod names;
mod output;
mod output_folder;
mod plan;
mod quantize;
mod targets;
mod verify;
