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
                // On Windows the code is not an errno but OSError's fourth argument, from which Python finds the errno.
                #[cfg(windows)]
                Some(code) => PyOSError::new_err((0, describe(&source), path.into_os_string(), code)),
                #[cfg(not(windows))]
                Some(errno) => PyOSError::new_err((errno, describe(&source), path.into_os_string())),
                None => PyOSError::new_err(message),
            },
            Error::MalformedFile { .. }
            | Error::MalformedTensor { .. }
            | Error::NoCheckpoint { .. }
            | Error::Download(_) => CheckpointError::new_err(message),
            Error::Mapping { .. } => MappingError::new_err(message),
            Error::Overflow { .. } | Error::Output { .. } => ConversionError::new_err(message),
            Error::Verification(_) => VerificationError::new_err(message),
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

#[cfg(test)]
mod tests {
    use super::*;

    use std::io;
    use std::path::Path;

    #[test]
    fn each_kind_of_error_is_its_exception() {
        Python::initialize();
        Python::attach(|py| {
            let path = Path::new("m.safetensors");
            let is_checkpoint_error = |fault: Error| PyErr::from(fault).is_instance_of::<CheckpointError>(py);
            assert!(is_checkpoint_error(Error::file(path, "a", "b")));
            assert!(is_checkpoint_error(Error::tensor(path, "w", "a", "b")));
            assert!(PyErr::from(Error::output(path, "a", "b")).is_instance_of::<ConversionError>(py));
            assert!(PyErr::from(Error::Cancelled).is_instance_of::<PyKeyboardInterrupt>(py));
            let argument = Error::Argument { name: "workers", found: "0".into(), expected: "1".into() };
            assert!(PyErr::from(argument).is_instance_of::<PyValueError>(py));
        });
    }

    #[test]
    fn system_errors_keep_errno_and_filename() {
        Python::initialize();
        Python::attach(|py| {
            let fault = Error::io(Path::new("missing"), io::Error::from_raw_os_error(2));
            let exception = PyErr::from(fault);
            // OSError chooses its subclass when the exception is made.
            assert!(exception.value(py).is_instance_of::<pyo3::exceptions::PyFileNotFoundError>());
            let attribute = |name: &str| exception.value(py).getattr(name).unwrap().to_string();
            assert_eq!((attribute("errno"), attribute("filename")), ("2".into(), "missing".into()));
            let words =
                if cfg!(windows) { "The system cannot find the file specified." } else { "No such file or directory" };
            assert_eq!(attribute("strerror"), words);
        });
    }
}
