//! Output files: opened at their first chunk under a temporary name, renamed after their last piece.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::file;
use crate::plan::PlannedFile;
use crate::work::lock;

/// The output files of a job.
pub(crate) struct Sinks<'a> {
    root: &'a Path,
    files: &'a [PlannedFile],
    slots: Vec<Sink>,
}

#[derive(Default)]
struct Sink {
    open: Mutex<Option<Arc<File>>>,
    pieces_left: AtomicUsize,
}

impl<'a> Sinks<'a> {
    /// Sinks for `files` below `root`; `pieces` names the file of each piece that will be written.
    pub fn new(root: &'a Path, files: &'a [PlannedFile], pieces: impl Iterator<Item = usize>) -> Self {
        let slots: Vec<Sink> = files.iter().map(|_| Sink::default()).collect();
        for file in pieces {
            slots[file].pieces_left.fetch_add(1, Ordering::Relaxed);
        }
        Self { root, files, slots }
    }

    fn path(&self, file: usize) -> PathBuf {
        self.root.join(&self.files[file].path)
    }

    /// Writes at an offset; makes the file under its temporary name, with its `header`, if this is its first write.
    pub fn write<H: AsRef<[u8]>>(
        &self,
        file: usize,
        bytes: &[u8],
        offset: u64,
        header: impl FnOnce() -> H,
    ) -> Result<()> {
        let temporary = file::temporary_path(&self.path(file));
        let handle = {
            let mut open = lock(&self.slots[file].open);
            if let Some(handle) = &*open {
                Arc::clone(handle)
            } else {
                Arc::clone(open.insert(Arc::new(self.create(file, &temporary, header().as_ref())?)))
            }
        };
        file::write_all_at(&temporary, &handle, bytes, offset)
    }

    fn create(&self, file: usize, temporary: &Path, header: &[u8]) -> Result<File> {
        let handle = file::create_temporary(temporary)?;
        handle.set_len(self.files[file].nbytes).map_err(|fault| Error::io(temporary, fault))?;
        file::write_all_at(temporary, &handle, header, 0)?;
        Ok(handle)
    }

    /// A piece is whole; the last piece of a file makes it appear.
    pub fn end_piece(&self, file: usize) -> Result<()> {
        let slot = &self.slots[file];
        if slot.pieces_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(());
        }
        let handle = lock(&slot.open).take();
        let handle = handle.expect("a file is opened by its first chunk and closed by its last");
        let path = self.path(file);
        file::publish(&handle, &file::temporary_path(&path), &path)
    }
}
