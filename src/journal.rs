//! `journal.jsonl`: what an unfinished conversion has done, so that it can go on where it was stopped.
//!
//! The first line says what is being converted and how; each further line names a tensor whose files are whole. Nothing
//! in it is trusted: on resume every listed tensor is re-read against its hash.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Fingerprint};
use crate::error::{Error, Result};
use crate::file;
use crate::manifest::hex128;
use crate::plan::Options;

/// Name of the journal in an unfinished tree.
pub const JOURNAL_NAME: &str = "journal.jsonl";

/// Version of the journal's lines.
const JOURNAL_VERSION: u64 = 1;

/// First line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    journal_version: u64,
    tensorport_version: String,
    source: Vec<Fingerprint>,
    modified_ns: Vec<u128>,
    options: Options,
    /// Files beside the tensors that the conversion will write.
    pub side_files: Vec<String>,
    /// Files of an earlier tree that the conversion replaces.
    pub replaces: Vec<String>,
}

/// A further line: a tensor whose files are whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name.
    pub tensor: String,
    /// Hash of its data.
    #[serde(with = "hex128")]
    pub xxh3_128: u128,
    /// Finite source values beyond the dtype's range.
    pub overflow: u64,
    /// Source values that became zero and were not.
    pub underflow: u64,
}

/// A journal that was found: its header, and the tensors it lists as whole.
pub type Begun = (Journal, Header, HashMap<String, Entry>);

/// An open journal, locked against a second conversion into the same folder.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Header {
    /// The first line for a conversion of `checkpoint`.
    #[must_use]
    pub fn new(checkpoint: &Checkpoint, options: &Options, side_files: Vec<String>, replaces: Vec<String>) -> Self {
        Self {
            journal_version: JOURNAL_VERSION,
            tensorport_version: env!("CARGO_PKG_VERSION").into(),
            source: checkpoint.fingerprints().to_vec(),
            modified_ns: checkpoint.files().iter().map(|file| file.modified_ns).collect(),
            options: options.clone(),
            side_files,
            replaces,
        }
    }

    /// What keeps a conversion that began with `self` from being resumed as `wanted`, if anything.
    #[must_use]
    pub fn difference(&self, wanted: &Self) -> Option<String> {
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
    pub fn create(folder: &Path, header: &Header) -> Result<Self> {
        let path = folder.join(JOURNAL_NAME);
        let temporary = file::temporary_path(&path);
        let file = File::create(&temporary).map_err(|fault| Error::io(&temporary, fault))?;
        let journal = Self { path: path.clone(), file };
        journal.lock()?;
        journal.append(header)?;
        file::publish(&journal.file, &temporary, &path)?;
        file::sync_folder(folder)?;
        Ok(journal)
    }

    /// Reads the journal in `folder`, if there is one: its header and the tensors it lists.
    ///
    /// A torn last line, as a kill leaves it, is cut off.
    pub fn open(folder: &Path) -> Result<Option<Begun>> {
        let path = folder.join(JOURNAL_NAME);
        let mut file = match File::options().read(true).append(true).open(&path) {
            Ok(file) => file,
            Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(fault) => return Err(Error::io(&path, fault)),
        };
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(|fault| Error::io(&path, fault))?;
        let journal = Self { path, file };
        journal.lock()?;
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let first = lines.next().unwrap_or_default();
        let header: Header = serde_json::from_slice(first).map_err(|fault| {
            Error::output(
                &journal.path,
                format_args!("no journal of a conversion ({fault})"),
                "one, or an empty folder",
            )
        })?;
        let mut whole = first.len();
        let mut entries = HashMap::new();
        for line in lines {
            let Ok(entry) = serde_json::from_slice::<Entry>(line) else { break };
            whole += line.len();
            entries.insert(entry.tensor.clone(), entry);
        }
        if whole < bytes.len() {
            journal.file.set_len(whole as u64).map_err(|fault| Error::io(&journal.path, fault))?;
        }
        Ok(Some((journal, header, entries)))
    }

    /// Adds a line, in one write.
    pub fn append(&self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line).expect("plain structs with string keys serialize");
        text.push('\n');
        (&self.file).write_all(text.as_bytes()).map_err(|fault| Error::io(&self.path, fault))
    }

    /// Removes the journal: the conversion is finished.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|fault| Error::io(&self.path, fault))
    }

    fn lock(&self) -> Result<()> {
        match self.file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let found = "another conversion that is writing here now";
                Err(Error::output(&self.path, found, "one conversion at a time into a folder"))
            }
            // Some network filesystems have no locks; the check is then the user's.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
        }
    }
}
