//! One memory-mapped file; sole owner of the mapping.
#![allow(unsafe_code)]

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::file;

/// A read-only mapping of a whole file, shared by every view into it.
///
/// The file must not be edited or truncated while the mapping lives: an edit shows through, and touching a page past a
/// new end of file ends the process (SIGBUS). Replacing the file by rename is safe.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
}

impl Mapping {
    /// Maps `path`, which must still have the `nbytes` it had when it was validated.
    pub fn open(path: &Path, nbytes: u64) -> Result<Arc<Self>> {
        let (file, metadata) = file::open_regular(path)?;
        if metadata.len() != nbytes {
            let found = format_args!("{} bytes", metadata.len());
            return Err(Error::file(path, found, format_args!("{nbytes} bytes, as when it was opened")));
        }
        // SAFETY: the mapping is read-only and private to this type. That nobody truncates or edits the file while it
        // lives is the documented duty of the caller, as with every mapped checkpoint; u8 has no invalid values.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
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
