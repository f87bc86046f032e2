//! Bytes that Rust owns as NumPy arrays.
#![expect(unsafe_code, reason = "lends NumPy memory that Rust owns")]

use numpy::ndarray::ArrayView1;
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;

use crate::arena::ArenaView;
use crate::checkpoint::View;

/// Bytes that stay where they are, unchanged, as long as their owner lives.
pub enum Bytes {
    /// A stretch of a mapped file.
    Mapped(View),
    /// A stretch of memory that a job filled.
    Memory(ArenaView),
}

impl Bytes {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(view) => view.bytes(),
            Self::Memory(view) => view.bytes(),
        }
    }
}

/// Keeps bytes alive for the array that looks into them.
#[pyclass(frozen)]
struct BytesOwner {
    bytes: Bytes,
}

/// A 1-D read-only u8 array over bytes, without a copy; the array's base keeps them alive.
pub fn array(py: Python<'_>, bytes: Bytes) -> PyResult<Bound<'_, PyArray1<u8>>> {
    let owner = Bound::new(py, BytesOwner { bytes })?;
    let bytes = ArrayView1::from(owner.get().bytes.bytes());
    // SAFETY: the bytes live as long as the mapping or the arena, which `owner` keeps alive and never moves or changes;
    // `owner` is the array's base. An arena is written again only when nobody holds it (`ArenaPool::take`). Nobody
    // writes through the array: the flag below is cleared before it is seen, and a file's pages are mapped read-only.
    let array = unsafe { PyArray1::borrow_from_array(&bytes, owner.clone().into_any()) };
    array.readwrite().make_nonwriteable();
    Ok(array)
}
