//! Output formats: where each tensor's bytes go. One module per format.

pub mod npy;
