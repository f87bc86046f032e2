//! Files by position: reads and writes that share one handle between threads, and durable renames.

use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::system;
pub use crate::system::FolderLock;

/// Opens a regular file for reading.
///
/// The type is checked before the file is opened: opening a named pipe would wait for a writer.
pub fn open_regular(path: &Path) -> Result<(File, Metadata)> {
    let before = std::fs::metadata(path).map_err(|source| Error::io(path, source))?;
    if !before.is_file() {
        return Err(Error::file(path, file_kind(&before), "a regular file"));
    }
    let file = File::open(path).map_err(|source| Error::io(path, source))?;
    let metadata = file.metadata().map_err(|source| Error::io(path, source))?;
    Ok((file, metadata))
}

/// Fills `buffer` from `offset` on; a file that ends before is a malformed file.
pub fn read_exact_at(path: &Path, file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
    system::read_exact_at(file, buffer, offset).map_err(|source| {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            let end = offset.saturating_add(buffer.len() as u64);
            Error::file(path, "an end of file", format_args!("at least {end} bytes"))
        } else {
            Error::io(path, source)
        }
    })
}

/// Writes all of `bytes` at `offset`.
pub fn write_all_at(path: &Path, file: &File, bytes: &[u8], offset: u64) -> Result<()> {
    system::write_all_at(file, bytes, offset).map_err(|source| Error::io(path, source))
}

/// Makes the renames inside `folder` durable, where the system can.
pub fn sync_folder(folder: &Path) -> Result<()> {
    system::sync_folder(folder).map_err(|source| Error::io(folder, source))
}

/// Suffix of a file that is still being written.
pub const TEMPORARY_SUFFIX: &str = ".tmp";

/// The temporary name beside `path` under which it is written before it is renamed.
#[must_use]
pub fn temporary_path(path: &Path) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(TEMPORARY_SUFFIX);
    name.into()
}

/// Creates a file under its temporary name. What may bear that name is removed, never written to: it could be a link.
pub fn create_temporary(temporary: &Path) -> Result<File> {
    match std::fs::remove_file(temporary) {
        Err(fault) if fault.kind() != io::ErrorKind::NotFound => return Err(Error::io(temporary, fault)),
        _ => {}
    }
    File::options().write(true).create_new(true).open(temporary).map_err(|fault| Error::io(temporary, fault))
}

/// Has `write` write a whole file: temporary name, fsync, rename.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> Result<()> {
    let temporary = temporary_path(path);
    let file = create_temporary(&temporary)?;
    let mut out = BufWriter::with_capacity(WRITE_BUFFER_BYTES, &file);
    write(&mut out).and_then(|()| out.flush()).map_err(|fault| Error::io(&temporary, fault))?;
    drop(out);
    publish(&file, &temporary, path)
}

/// Bytes of a buffer for writing text through.
const WRITE_BUFFER_BYTES: usize = 64 << 10;

/// Makes a finished temporary file appear under its own name.
pub fn publish(file: &File, temporary: &Path, path: &Path) -> Result<()> {
    system::sync_data(file).map_err(|source| Error::io(temporary, source))?;
    system::rename(temporary, path).map_err(|source| Error::io(path, source))
}

/// Locks a folder; None when somebody else has it.
pub fn lock_folder(folder: &Path) -> Result<Option<FolderLock>> {
    system::lock_folder(folder, LOCK_NAME).map_err(|source| Error::io(folder, source))
}

/// Name of the file that stands for a folder's lock where folders cannot be locked.
pub const LOCK_NAME: &str = "journal.jsonl.lock";

/// Reads a whole file whose size may not exceed `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, metadata) = open_regular(path)?;
    let nbytes = metadata.len();
    if nbytes > limit {
        let found = format_args!("{nbytes} bytes");
        return Err(Error::file(path, found, format_args!("at most {limit} bytes")));
    }
    let nbytes = usize::try_from(nbytes).expect("limits are far below the address space");
    let mut bytes = buffer(path, nbytes)?;
    read_exact_at(path, &file, &mut bytes, 0)?;
    Ok(bytes)
}

/// Zeroed memory to read a file into; too little memory is an error of the file.
pub fn buffer(path: &Path, nbytes: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(nbytes).map_err(|_| Error::io(path, io::ErrorKind::OutOfMemory.into()))?;
    bytes.resize(nbytes, 0);
    Ok(bytes)
}

/// Bytes of a buffer for reading a file through.
const COPY_BUFFER_BYTES: usize = 1 << 20;

/// Reads a file from beginning to end in bounded memory and gives each stretch to `take` with its offset; returns the
/// file's size.
pub fn read_through(path: &Path, mut take: impl FnMut(&[u8], u64) -> Result<()>) -> Result<u64> {
    let (file, metadata) = open_regular(path)?;
    let nbytes = metadata.len();
    let mut buffer = buffer(path, COPY_BUFFER_BYTES)?;
    let mut offset = 0;
    while offset < nbytes {
        let stretch = usize::try_from(nbytes - offset).unwrap_or(usize::MAX).min(COPY_BUFFER_BYTES);
        read_exact_at(path, &file, &mut buffer[..stretch], offset)?;
        take(&buffer[..stretch], offset)?;
        offset += stretch as u64;
    }
    Ok(nbytes)
}

/// Words for a file that is not a regular one.
#[must_use]
pub fn file_kind(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() {
        "a directory"
    } else if metadata.is_file() {
        "a regular file"
    } else {
        "a special file (pipe, socket or device)"
    }
}
