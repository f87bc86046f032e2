//! One memory-mapped file; sole owner of the mapping.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A read-only mapping of a whole file, shared by every view into it.
///
/// The file must not be edited or truncated while the mapping lives: an edit shows through, and touching a page past a
/// new end of file ends the process (SIGBUS). Replacing the file by rename is safe.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
}

impl Mapping {
    /// Maps an open file; `path` is its name for messages.
    pub fn new(path: &Path, file: &File) -> Result<Arc<Self>> {
        // SAFETY: the mapping is read-only and private to this type. That nobody truncates or edits the file while it
        // lives is the documented duty of the caller, as with every mapped checkpoint; u8 has no invalid values.
        let map = unsafe { Mmap::map(file) }.map_err(|source| Error::io(path, source))?;
        Ok(Arc::new(Self { map }))
    }

    /// The bytes of `range`, which must lie inside the file.
    ///
    /// # Panics
    /// When it does not: ranges come from validated headers.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> &[u8] {
        &self.map[range]
    }
}
