//! What a handler reports to XLA.

use std::any::Any;
use std::ffi::c_int;
use std::fmt::Display;

/// Result alias of handlers.
pub type Result<T, E = FfiError> = std::result::Result<T, E>;

/// Why a call failed. Under JAX it arrives as a `JaxRuntimeError` with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FfiError {
    code: Code,
    message: String,
}

/// Source: `XLA_FFI_Error_Code`, which are those of absl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    InvalidArgument = 3,
    Internal = 13,
    Unavailable = 14,
}

impl FfiError {
    /// What the caller gave is not what the handler takes.
    pub fn invalid_argument(what: impl Display, found: impl Display, expected: impl Display) -> Self {
        Self { code: Code::InvalidArgument, message: format!("{what}: found {found}, expected {expected}") }
    }

    /// Something that should not happen.
    pub fn internal(message: impl Display) -> Self {
        Self { code: Code::Internal, message: message.to_string() }
    }

    /// What was asked for cannot be had now.
    pub fn unavailable(message: impl Display) -> Self {
        Self { code: Code::Unavailable, message: message.to_string() }
    }

    /// A handler or one of its tasks panicked.
    #[must_use]
    pub fn from_panic(panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Self::internal(format!("panic: {}", text.unwrap_or("without a text")))
    }

    /// XLA's code.
    pub(super) fn code(&self) -> c_int {
        self.code as c_int
    }
}
