//! The one error type of the crate.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::verify::VerificationReport;

/// Result alias used throughout the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with what a person needs to find the place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or folder concerned.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The bytes of a whole file are wrong: its header, its index, its manifest.
    #[error("{}: found {found}, expected {expected}", path.display())]
    MalformedFile {
        /// The file.
        path: PathBuf,
        /// What stands there.
        found: String,
        /// What should stand there.
        expected: String,
    },

    /// What a file says about one tensor is wrong.
    #[error("{}: tensor {}: found {found}, expected {expected}", path.display(), Quoted(tensor))]
    MalformedTensor {
        /// The file.
        path: PathBuf,
        /// Full dotted name of the tensor.
        tensor: String,
        /// What stands there.
        found: String,
        /// What should stand there.
        expected: String,
    },

    /// A path that should hold a checkpoint does not.
    #[error("{}: found {found}, expected {expected}", path.display())]
    NoCheckpoint {
        /// The path given.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What would be a checkpoint.
        expected: String,
    },

    /// Names or shapes do not fit what was asked for.
    #[error("found {found}, expected {expected}")]
    Mapping {
        /// What there is.
        found: String,
        /// What was asked for.
        expected: String,
    },

    /// Finite values do not fit the target precision.
    #[error(
        "tensor {}: found {count} finite values beyond {precision}, the largest {largest:e}, expected all within \
         ±{limit:e} (on_overflow=\"saturate\" clamps them{})",
        Quoted(tensor),
        // Integers have no infinities.
        if precision.contains("int") { "" } else { ", \"warn\" stores infinities" }
    )]
    Overflow {
        /// Full dotted name of the tensor.
        tensor: String,
        /// How many values overflow.
        count: u64,
        /// The largest magnitude among them.
        largest: f64,
        /// Name of the target dtype.
        precision: &'static str,
        /// Largest finite value of the target dtype.
        limit: f64,
    },

    /// The output folder cannot be written as asked.
    #[error("{}: found {found}, expected {expected}", path.display())]
    Output {
        /// The folder or file.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What the job needs.
        expected: String,
    },

    /// What was written does not read back as it should.
    #[error("{0}")]
    Verification(Box<VerificationReport>),

    /// An argument is out of its range.
    #[error("{name}: found {found}, expected {expected}")]
    Argument {
        /// The argument.
        name: &'static str,
        /// Its value.
        found: String,
        /// The values it can take.
        expected: String,
    },

    /// Files of the source that were still on their way will not come.
    #[error("{0}")]
    Download(String),

    /// The caller stopped the job.
    #[error("stopped before the job was done")]
    Cancelled,
}

impl Error {
    /// Wraps what the system said of `path`.
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    /// A file whose bytes are wrong.
    pub(crate) fn file(path: &Path, found: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::MalformedFile {
            path: path.to_path_buf(),
            found: printable(&shorten(&found.to_string())).into_owned(),
            expected: expected.to_string(),
        }
    }

    /// A file that says something wrong about one tensor.
    pub(crate) fn tensor(path: &Path, tensor: &str, found: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::MalformedTensor {
            path: path.to_path_buf(),
            tensor: tensor.to_owned(),
            found: printable(&shorten(&found.to_string())).into_owned(),
            expected: expected.to_string(),
        }
    }

    /// An output folder that cannot be used.
    pub(crate) fn output(path: &Path, found: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::Output { path: path.to_path_buf(), found: found.to_string(), expected: expected.to_string() }
    }
}

/// Longest text from a file that goes into a message, in characters.
const MAX_QUOTED_CHARS: usize = 200;

/// A name from a file, quoted, its control characters escaped and its length bounded.
pub(crate) struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", shorten(self.0))
    }
}

/// Cuts a text that a file supplied to a length that a message can hold.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
    }
}

/// Text whose control characters other than line feeds are escaped as JSON does: none of them reaches a terminal.
#[must_use]
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    // Control characters, and those that reverse the direction of what follows.
    let is_hostile = |c: char| {
        c.is_control() && c != '\n'
            || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(is_hostile) {
        return Cow::Borrowed(text);
    }
    let escape = |c: char| if is_hostile(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    Cow::Owned(text.chars().map(escape).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_escaped_and_shortened() {
        let name = format!("\u{1b}[31m{}", "x".repeat(1_000_000));
        let message = Error::tensor(Path::new("m.safetensors"), &name, "a", "b").to_string();
        assert!(message.len() < 400, "{}", message.len());
        assert!(!message.contains('\u{1b}'));
    }
}
