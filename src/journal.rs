//! `journal.jsonl`: what an unfinished conversion has done, so that it can go on where it was stopped.
//!
//! The first line says what is being converted and how; each further line names a tensor whose files are whole. Nothing
//! in it is trusted: on resume every listed tensor is re-read against its hash.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Fingerprint};
use crate::checksum::{Checksum, TensorChecksums};
use crate::error::{Error, Result};
use crate::file;
use crate::manifest::Losses;
use crate::mxfp4::QuantizationError;
use crate::options::Options;

/// Name of the journal in an unfinished tree.
pub const JOURNAL_NAME: &str = "journal.jsonl";

/// Largest journal that is read.
const MAX_JOURNAL_BYTES: u64 = 500_000_000;

/// Version of the journal's lines.
const JOURNAL_VERSION: u64 = 1;

/// First line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header<'a> {
    journal_version: u64,
    tensorport_version: String,
    source: Vec<Fingerprint>,
    modified_ns: Vec<u128>,
    options: Options,
    /// Files that the conversion will write.
    pub files: Vec<Cow<'a, str>>,
    /// Files of an earlier tree that the conversion replaces.
    pub replaces: Vec<Cow<'a, str>>,
}

/// A further line: a tensor whose files are whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name.
    pub tensor: String,
    /// Hash of its data.
    pub xxh3_128: Checksum,
    /// Hash of its data in each file.
    pub part_xxh3_128: Vec<Checksum>,
    /// Finite source values beyond the dtype's range.
    pub overflow: u64,
    /// Source values that became zero and were not.
    pub underflow: u64,
    /// What encoding lost, of MXFP4 blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QuantizationError>,
}

impl Entry {
    /// The checksums of the tensor.
    #[must_use]
    pub fn checksums(&self) -> TensorChecksums {
        TensorChecksums { whole: self.xxh3_128, parts: self.part_xxh3_128.clone() }
    }

    /// What was lost.
    #[must_use]
    pub fn losses(&self) -> Losses {
        Losses { overflow: self.overflow, underflow: self.underflow, quantization: self.quantization }
    }
}

/// An open journal. Whoever holds one holds the lock of its folder.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl<'a> Header<'a> {
    /// The first line for a conversion of `checkpoint`.
    #[must_use]
    pub fn new(checkpoint: &Checkpoint, options: &Options, files: Vec<Cow<'a, str>>) -> Self {
        Self {
            journal_version: JOURNAL_VERSION,
            tensorport_version: env!("CARGO_PKG_VERSION").into(),
            source: checkpoint.fingerprints().to_vec(),
            modified_ns: checkpoint.files().iter().map(|file| file.modified_ns).collect(),
            options: options.clone(),
            files,
            replaces: Vec::new(),
        }
    }

    /// What keeps a conversion that began with `self` from being resumed as `wanted`, if anything.
    #[must_use]
    pub fn difference(&self, wanted: &Header<'_>) -> Option<String> {
        if self.source != wanted.source || self.modified_ns != wanted.modified_ns {
            return Some("an unfinished conversion of another or an edited source".into());
        }
        if self.options != wanted.options {
            let text = |options| serde_json::to_string(options).expect("options serialize");
            return Some(format!("an unfinished conversion with options {}", text(&self.options)));
        }
        if (self.journal_version, &self.tensorport_version) != (wanted.journal_version, &wanted.tensorport_version) {
            return Some(format!("an unfinished conversion by tensorport {}", self.tensorport_version));
        }
        None
    }
}

impl Journal {
    /// Begins a journal in `folder`, in place of one that may be there.
    pub fn create(folder: &Path, header: &Header<'_>) -> Result<Self> {
        let path = folder.join(JOURNAL_NAME);
        let temporary = file::temporary_path(&path);
        let file = file::create_temporary(&temporary)?;
        let journal = Self { path: path.clone(), file };
        if let Err(fault) = journal.append(header).and_then(|()| file::publish(&journal.file, &temporary, &path)) {
            // Nothing has begun: what the folder holds stays as it is. Nothing to do about a second failure.
            let _ = std::fs::remove_file(&temporary);
            return Err(fault);
        }
        file::sync_folder(folder)?;
        Ok(journal)
    }

    /// Reads the journal in `folder`, if there is one: its header and the tensors it lists. Changes nothing.
    pub fn read(folder: &Path) -> Result<Option<(Header<'static>, HashMap<String, Entry>)>> {
        let path = folder.join(JOURNAL_NAME);
        match std::fs::symlink_metadata(&path) {
            Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(fault) => return Err(Error::io(&path, fault)),
            Ok(stat) if !stat.is_file() => {
                return Err(Error::output(&path, "no regular file", "the journal of a conversion"));
            }
            Ok(_) => {}
        }
        let (header, entries, _) = parse(&path, &file::read_bounded(&path, MAX_JOURNAL_BYTES)?)?;
        Ok(Some((header, entries)))
    }

    /// Goes on with the journal in `folder`, which [`Journal::read`] has read. A torn last line is cut off.
    pub fn resume(folder: &Path) -> Result<Self> {
        let path = folder.join(JOURNAL_NAME);
        let (_, _, whole) = parse(&path, &file::read_bounded(&path, MAX_JOURNAL_BYTES)?)?;
        // For writing, not for appending: on Windows a handle that can only append can cut nothing off.
        let mut file = File::options().write(true).open(&path).map_err(|fault| Error::io(&path, fault))?;
        let end = whole as u64;
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(|fault| Error::io(&path, fault))?;
        Ok(Self { path, file })
    }

    /// Adds a line. One that a kill tears is no line: reading ends before it.
    pub fn append(&self, line: &impl Serialize) -> Result<()> {
        let mut out = BufWriter::new(&self.file);
        let written = serde_json::to_writer(&mut out, line).map_err(std::io::Error::from);
        let written = written.and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
        written.map_err(|fault| Error::io(&self.path, fault))
    }

    /// Removes the journal: the conversion is finished.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|fault| Error::io(&self.path, fault))
    }
}

/// The header of a journal, the tensors it lists, and the length of its whole lines: a kill can tear the last one.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<(Header<'static>, HashMap<String, Entry>, usize)> {
    let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let first = lines.next().unwrap_or_default();
    let header: Header<'static> = serde_json::from_slice(first).map_err(|fault| {
        Error::output(path, format_args!("no journal of a conversion ({fault})"), "one, or an empty folder")
    })?;
    let mut whole = first.len();
    let mut entries = HashMap::new();
    for line in lines {
        let Ok(entry) = serde_json::from_slice::<Entry>(line) else { break };
        whole += line.len();
        entries.insert(entry.tensor.clone(), entry);
    }
    Ok((header, entries, whole))
}
