//! Output files: opened at their first chunk under a temporary name, renamed after their last piece.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::file;
use crate::output::{Content, Frame};
use crate::work::lock;

/// The output files of a job.
pub(crate) struct Sinks<'a> {
    root: &'a Path,
    slots: Vec<Sink<'a>>,
}

struct Sink<'a> {
    path: &'a str,
    nbytes: u64,
    open: Mutex<Option<Arc<File>>>,
    pieces_left: AtomicUsize,
}

impl<'a> Sinks<'a> {
    /// Sinks for files below `root`, told by path and size; `pieces` names the file of each piece that will be written.
    pub fn new(
        root: &'a Path,
        files: impl Iterator<Item = (&'a str, u64)>,
        pieces: impl Iterator<Item = usize>,
    ) -> Self {
        let sink = |(path, nbytes)| Sink { path, nbytes, open: Mutex::default(), pieces_left: AtomicUsize::default() };
        let slots: Vec<_> = files.map(sink).collect();
        for file in pieces {
            slots[file].pieces_left.fetch_add(1, Ordering::Relaxed);
        }
        Self { root, slots }
    }

    fn path(&self, file: usize) -> PathBuf {
        self.root.join(self.slots[file].path)
    }

    /// Writes at an offset; makes the file under its temporary name, with its `frames`, if this is its first write.
    pub fn write(&self, file: usize, bytes: &[u8], offset: u64, frames: impl FnOnce() -> Vec<Frame>) -> Result<()> {
        let temporary = file::temporary_path(&self.path(file));
        let handle = {
            let mut open = lock(&self.slots[file].open);
            if let Some(handle) = &*open {
                Arc::clone(handle)
            } else {
                Arc::clone(open.insert(Arc::new(self.create(file, &temporary, &frames())?)))
            }
        };
        file::write_all_at(&temporary, &handle, bytes, offset)
    }

    fn create(&self, file: usize, temporary: &Path, frames: &[Frame]) -> Result<File> {
        let handle = file::create_temporary(temporary)?;
        handle.set_len(self.slots[file].nbytes).map_err(|fault| Error::io(temporary, fault))?;
        for frame in frames {
            // Where nothing is written are zeros.
            if let Content::Bytes(bytes) = &frame.content {
                file::write_all_at(temporary, &handle, bytes, frame.offset)?;
            }
        }
        Ok(handle)
    }

    /// A piece is whole; the last piece of a file makes it appear. True when it did.
    pub fn end_piece(&self, file: usize) -> Result<bool> {
        let slot = &self.slots[file];
        if slot.pieces_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(false);
        }
        let handle = lock(&slot.open).take();
        let handle = handle.expect("a file is opened by its first chunk and closed by its last");
        let path = self.path(file);
        file::publish(&handle, &file::temporary_path(&path), &path)?;
        Ok(true)
    }
}
