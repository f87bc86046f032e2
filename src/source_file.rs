//! A file of a checkpoint, which must stay the one that was validated.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::UNIX_EPOCH;

use crate::arrivals::Arrival;
use crate::error::{Error, Result};
use crate::file;
use crate::mapping::Mapping;
use crate::system;
use crate::work::lock;

/// One file with tensor data.
#[derive(Debug)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its path relative to the checkpoint, with `/`.
    pub name: String,
    /// Its size when it was opened.
    pub nbytes: u64,
    /// Its modification time when it was opened, in nanoseconds since 1970.
    pub modified_ns: u128,
    /// What tells of it while it is on its way.
    pub(crate) arrival: Option<Arrival>,
    mapping: Mutex<Weak<Mapping>>,
    is_remote: OnceLock<bool>,
}

impl SourceFile {
    /// The file of this name at `path`, as it is now.
    pub(crate) fn new(name: String, path: &Path, stat: &Metadata) -> Result<Self> {
        // Absolute, so that a later change of the working directory changes nothing.
        let path = std::path::absolute(path).map_err(|fault| Error::io(path, fault))?;
        Ok(Self {
            path,
            name,
            nbytes: stat.len(),
            modified_ns: modified_ns(stat),
            arrival: None,
            mapping: Mutex::default(),
            is_remote: OnceLock::new(),
        })
    }

    /// Maps it; those who map it at the same time share one mapping.
    pub(crate) fn map(&self) -> Result<Arc<Mapping>> {
        let mut slot = lock(&self.mapping);
        if let Some(mapping) = slot.upgrade() {
            return Ok(mapping);
        }
        let mapping = Mapping::new(&self.path, &self.open()?)?;
        *slot = Arc::downgrade(&mapping);
        Ok(mapping)
    }

    /// Whether the file lies on a filesystem behind a network or a user's process, where page faults are slow.
    ///
    /// The system is asked once: behind a network every answer is a round trip.
    pub fn is_remote(&self) -> Result<bool> {
        if let Some(&is_remote) = self.is_remote.get() {
            return Ok(is_remote);
        }
        let is_remote = system::is_remote(&self.path).map_err(|fault| Error::io(&self.path, fault))?;
        Ok(*self.is_remote.get_or_init(|| is_remote))
    }

    /// Opens the file for positioned reads, and makes sure that it is still the one that was validated. Waits for one that
    /// is on its way.
    pub fn open(&self) -> Result<std::fs::File> {
        if let Some(arrival) = &self.arrival {
            return arrival.open(&self.name);
        }
        let (file, stat) = file::open_regular(&self.path)?;
        self.check_unchanged(&stat)?;
        Ok(file)
    }

    /// Makes sure that the file is there and still the one that was validated.
    pub fn check(&self) -> Result<()> {
        if let Some(arrival) = &self.arrival {
            return arrival.check();
        }
        self.check_unchanged(&std::fs::metadata(&self.path).map_err(|fault| Error::io(&self.path, fault))?)
    }

    /// Makes sure that nobody replaced or edited the file since the checkpoint was opened.
    pub fn check_unchanged(&self, stat: &Metadata) -> Result<()> {
        if (stat.len(), modified_ns(stat)) == (self.nbytes, self.modified_ns) {
            return Ok(());
        }
        let found = format_args!("another size or modification time ({} bytes)", stat.len());
        Err(Error::file(&self.path, found, format_args!("the file as it was opened ({} bytes)", self.nbytes)))
    }
}

/// Modification time in nanoseconds since 1970; 0 where the filesystem has none.
pub(crate) fn modified_ns(stat: &Metadata) -> u128 {
    stat.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |age| age.as_nanos())
}
