//! The output folder of a conversion: what may be in it, what is removed, when it becomes a finished tree.
//!
//! Nothing is written to a folder that holds something else, and nothing is deleted that no conversion wrote.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::checkpoint::Checkpoint;
use crate::convert::Mode;
use crate::error::{Error, Result};
use crate::file::{self, FolderLock};
use crate::journal::{Entry, Header, JOURNAL_NAME, Journal};
use crate::manifest::{self, MANIFEST_NAME, Manifest, TensorInfo};
use crate::options::Options;
use crate::plan::Plan;
use crate::side_files::SideFile;

/// A folder that is ours to write to, while this lives.
pub(crate) struct OutputFolder {
    path: PathBuf,
    /// What the conversion has done.
    pub journal: Journal,
    _lock: FolderLock,
}

/// State of the folder after [`OutputFolder::prepare`].
pub(crate) enum Prepared {
    /// There is work to do; these tensors are listed as whole.
    Ready(OutputFolder, HashMap<String, Entry>),
    /// A finished tree with these options, from a source with these headers, is there.
    Finished(Box<Manifest>),
}

/// What the conversion will leave in the folder, and from what.
pub(crate) struct Expected<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a Options,
    header: Header<'a>,
}

impl<'a> Expected<'a> {
    pub fn new(checkpoint: &'a Checkpoint, plan: &'a Plan, side_files: &'a [SideFile], options: &'a Options) -> Self {
        let side_files = side_files.iter().map(|file| file.name.as_str().into());
        let files = plan.files.iter().map(|file| file.path().into()).chain(side_files).collect();
        Self { checkpoint, options, header: Header::new(checkpoint, options, files) }
    }
}

impl OutputFolder {
    /// Makes and locks the folder, and brings it into the state that its journal describes.
    pub fn prepare(path: &Path, expected: Expected<'_>, mode: Mode) -> Result<Prepared> {
        let Expected { checkpoint, options, mut header } = expected;
        create(path)?;
        let lock = file::lock_folder(path)?.ok_or_else(|| {
            let found = "another conversion that is writing here now";
            Error::output(path, found, "one conversion at a time into a folder")
        })?;
        refuse_source(path, checkpoint)?;
        let (journal, listed) = if let Some((begun, entries)) = Journal::read(path)? {
            let difference = begun.difference(&header);
            if mode.resume && difference.is_none() {
                let journal = Journal::resume(path)?;
                remove_leftovers(path, &begun)?;
                (journal, entries)
            } else if mode.overwrite {
                header.replaces = begun.files;
                header.replaces.extend(begun.replaces);
                (replace(path, &header)?, HashMap::new())
            } else {
                let found = difference.unwrap_or_else(|| "an unfinished conversion".into());
                let wanted = "resume with the same source and options, overwrite, or another folder";
                return Err(Error::output(path, found, wanted));
            }
        } else if let Some((finished, is_unedited)) = finished(path)? {
            if mode.resume && may_be(&finished, checkpoint, options) {
                if !is_unedited {
                    let wanted = "the manifest as it was written, or overwrite";
                    return Err(Error::output(path, "a manifest.json that was edited or damaged", wanted));
                }
                return Ok(Prepared::Finished(Box::new(finished)));
            }
            if !mode.overwrite {
                let found = if mode.resume { "a finished tree of another conversion" } else { "a finished tree" };
                return Err(Error::output(path, found, "overwrite, or another folder"));
            }
            let tensor_files = finished.tensors.0.into_iter().flat_map(|(_, info)| info.files);
            let side_files = finished.side_files.0.into_iter().map(|(name, _)| name);
            header.replaces = tensor_files.chain(side_files).map(Cow::Owned).collect();
            (replace(path, &header)?, HashMap::new())
        } else {
            let names = foreign_names(path)?;
            if let Some(foreign) = names.first() {
                let found = format_args!("{foreign:?} and {} more files that no conversion wrote", names.len() - 1);
                return Err(Error::output(path, found, "an empty folder, or a new one"));
            }
            (replace(path, &header)?, HashMap::new())
        };
        Ok(Prepared::Ready(Self { path: path.to_path_buf(), journal, _lock: lock }, listed))
    }

    /// Makes the tree a finished one: the manifest appears, the journal goes.
    pub fn finish<'a>(self, manifest: &Manifest, tensors: impl Iterator<Item = (&'a str, TensorInfo)>) -> Result<()> {
        file::sync_folder(&self.path)?;
        file::write_atomically(&self.path.join(MANIFEST_NAME), |out| manifest.write_with(tensors, out))?;
        file::sync_folder(&self.path)?;
        self.journal.remove()?;
        file::sync_folder(&self.path)
    }
}

/// Makes the folder, durably: its parent remembers it.
fn create(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(path).map_err(|fault| Error::io(path, fault))?;
    let absolute = std::path::absolute(path).map_err(|fault| Error::io(path, fault))?;
    absolute.parent().map_or(Ok(()), file::sync_folder)
}

/// A tree cannot be converted into itself, not even through links to its files.
fn refuse_source(path: &Path, source: &Checkpoint) -> Result<()> {
    let canonical = |path: &Path| std::fs::canonicalize(path).map_err(|fault| Error::io(path, fault));
    let output = canonical(path)?;
    let files = source.files().iter().map(|file| file.path.as_path());
    for of_source in std::iter::once(source.root()).chain(files) {
        if canonical(of_source)?.starts_with(&output) {
            let found = format_args!("the source {} in it", of_source.display());
            return Err(Error::output(path, found, "an output folder that does not hold the source"));
        }
    }
    Ok(())
}

/// Whether a finished tree may be what a conversion would write: its bytes have yet to be compared.
fn may_be(manifest: &Manifest, checkpoint: &Checkpoint, options: &Options) -> bool {
    manifest.options == *options
        && manifest.source.files == checkpoint.fingerprints()
        && manifest.tensorport_version == env!("CARGO_PKG_VERSION")
}

/// The manifest of a finished tree, and whether it is as it was written.
fn finished(path: &Path) -> Result<Option<(Manifest, bool)>> {
    let manifest_path = path.join(MANIFEST_NAME);
    if !manifest_path.exists() {
        return Ok(None);
    }
    let bytes = file::read_bounded(&manifest_path, manifest::MAX_MANIFEST_BYTES)?;
    let manifest = Manifest::from_bytes(&manifest_path, &bytes).map_err(|fault| {
        let found = format_args!("a manifest.json that cannot be read ({fault})");
        Error::output(path, found, "an empty folder; what it holds has to be deleted by hand")
    })?;
    Ok(Some((manifest, Manifest::self_hash_holds(&bytes))))
}

/// Names in a folder, except the lock and the temporary file of a journal that never came to be.
fn foreign_names(folder: &Path) -> Result<Vec<String>> {
    let own = [format!("{JOURNAL_NAME}{}", file::TEMPORARY_SUFFIX), file::LOCK_NAME.to_owned()];
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|fault| Error::io(folder, fault))? {
        let entry = entry.map_err(|fault| Error::io(folder, fault))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| !own.contains(name));
    names.sort();
    Ok(names)
}

/// Begins a journal, and only then removes what it replaces.
fn replace(path: &Path, header: &Header<'_>) -> Result<Journal> {
    let journal = Journal::create(path, header)?;
    remove_leftovers(path, header)?;
    Ok(journal)
}

/// A shard folder that is a link leads out of the tree: nothing is written or deleted there.
pub(crate) fn refuse_link(folder: &Path) -> Result<()> {
    match std::fs::symlink_metadata(folder) {
        Ok(stat) if stat.is_symlink() => Err(Error::output(folder, "a symbolic link", "a folder of the tree")),
        _ => Ok(()),
    }
}

/// Removes temporary files of an interrupted run, and the files of a tree that is being replaced: those that its
/// manifest or journal names, and no others.
fn remove_leftovers(output: &Path, header: &Header<'_>) -> Result<()> {
    let path_of = |relative: &str| {
        let Some(path) = manifest::tree_path(output, relative) else { return Ok(None) };
        if let Some((shard, _)) = relative.split_once('/') {
            refuse_link(&output.join(shard))?;
        }
        Ok(Some(path))
    };
    let remove_file = |path: &Path| match std::fs::remove_file(path) {
        Err(fault) if fault.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, fault)),
        _ => Ok(()),
    };
    let remove_temporary =
        |relative: &str| path_of(relative)?.map_or(Ok(()), |path| remove_file(&file::temporary_path(&path)));
    let remove = |relative: &str| {
        // A manifest from elsewhere may list anything, even the journal that has just begun.
        if relative.eq_ignore_ascii_case(JOURNAL_NAME) {
            return Ok(());
        }
        path_of(relative)?.map_or(Ok(()), |path| remove_file(&path))
    };
    // The manifest first, and durably: without it, what is left is no finished tree.
    remove(MANIFEST_NAME)?;
    file::sync_folder(output)?;
    let planned: HashSet<&str> = header.files.iter().map(AsRef::as_ref).collect();
    for relative in &header.replaces {
        remove_temporary(relative)?;
        if !planned.contains(relative.as_ref()) {
            remove(relative)?;
        }
        if let Some((shard, _)) = relative.split_once('/') {
            // Fails while the folder holds anything, as it should.
            let _ = std::fs::remove_dir(output.join(shard));
        }
    }
    for relative in header.files.iter().map(AsRef::as_ref).chain([MANIFEST_NAME, JOURNAL_NAME]) {
        remove_temporary(relative)?;
    }
    Ok(())
}
