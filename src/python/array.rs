//! Mapped bytes as NumPy arrays.
#![allow(unsafe_code)]

use numpy::ndarray::ArrayView1;
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;

use crate::checkpoint::View;

/// Keeps a mapping alive for the array that looks into it.
#[pyclass(frozen)]
struct MappedBytes {
    view: View,
}

/// A 1-D read-only u8 array over a view of a mapped file, without a copy; the array's base keeps the mapping alive.
pub fn mapped_array(py: Python<'_>, view: View) -> PyResult<Bound<'_, PyArray1<u8>>> {
    let owner = Bound::new(py, MappedBytes { view })?;
    let bytes = ArrayView1::from(owner.get().view.bytes());
    // SAFETY: the bytes live as long as the mapping, which `owner` keeps alive and never moves or changes; `owner` is
    // the array's base. The pages are mapped read-only, and the flag below is cleared before anybody can write.
    let array = unsafe { PyArray1::borrow_from_array(&bytes, owner.clone().into_any()) };
    array.readwrite().make_nonwriteable();
    Ok(array)
}
