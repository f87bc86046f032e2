//! Handlers of XLA as JAX takes them.
#![expect(unsafe_code, reason = "PyO3's own capsules hold a pointer to a value, and XLA wants the function's address")]

use std::ptr;

use pyo3::ffi::PyCapsule_New;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::ffi::{Entry, TARGETS};

/// Name and function of every handler, for `jax.ffi.register_ffi_target`.
pub fn targets(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let targets = PyDict::new(py);
    for target in TARGETS {
        targets.set_item(target.name, capsule(py, target.entry)?)?;
    }
    Ok(targets)
}

fn capsule(py: Python<'_>, entry: Entry) -> PyResult<Bound<'_, PyAny>> {
    let address = (entry as *const ()).cast_mut().cast();
    // SAFETY: the address is not null; no name and no destructor is needed. The result is a new reference, or null with
    // an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, PyCapsule_New(address, ptr::null(), None)) }
}
