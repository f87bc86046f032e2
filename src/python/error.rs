//! Errors of the crate as Python exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;

create_exception!(tensorport, TensorportError, PyException, "Base of the errors that only tensorport raises.");
create_exception!(
    tensorport,
    CheckpointError,
    TensorportError,
    "The bytes of a checkpoint are wrong. Names the file, the tensor, what was found and what was expected."
);
create_exception!(
    tensorport,
    MappingError,
    TensorportError,
    "Names or shapes of tensors do not fit what was asked for."
);
create_exception!(
    tensorport,
    ConversionError,
    TensorportError,
    "A conversion cannot go on: the output folder is in use, or values do not fit the precision."
);
create_exception!(
    tensorport,
    VerificationError,
    TensorportError,
    "What was written does not read back. The attribute `report` is the VerificationReport."
);

impl From<Error> for PyErr {
    fn from(fault: Error) -> Self {
        let message = fault.to_string();
        match fault {
            // Three arguments make OSError choose its subclass: FileNotFoundError, PermissionError, ...
            Error::Io { path, source } => match source.raw_os_error() {
                Some(errno) => PyOSError::new_err((errno, describe(&source), path.display().to_string())),
                None => PyOSError::new_err(message),
            },
            Error::MalformedFile { .. } | Error::MalformedTensor { .. } | Error::NoCheckpoint { .. } => {
                CheckpointError::new_err(message)
            }
            Error::Mapping { .. } => MappingError::new_err(message),
            Error::Overflow { .. } | Error::Output { .. } => ConversionError::new_err(message),
            Error::Verification(report) => {
                // The second argument becomes `report` in convert.py, which takes it out again.
                let json = serde_json::to_string(&*report).expect("plain structs with string keys serialize");
                VerificationError::new_err((message, json))
            }
            Error::Argument { .. } => PyValueError::new_err(message),
            Error::Cancelled => PyKeyboardInterrupt::new_err(()),
        }
    }
}

/// The system's words without Rust's "(os error 2)".
fn describe(source: &std::io::Error) -> String {
    let text = source.to_string();
    text.split_once(" (os error").map_or_else(|| text.clone(), |(words, _)| words.to_owned())
}
