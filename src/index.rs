//! `model.safetensors.index.json`: which file holds which tensor. Untrusted, checked as text before any path is made.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::file;
use crate::header::MAX_HEADER_BYTES;
use crate::manifest::is_json_object;
use crate::ordered_map::OrderedMap;

const INDEX_SUFFIX: &str = ".safetensors.index.json";
const USUAL_INDEX: &str = "model.safetensors.index.json";

/// A parsed index.
#[derive(Debug, Deserialize)]
pub struct Index {
    weight_map: OrderedMap<String>,
}

/// The index of a directory with these entries, if it has one.
pub fn find(folder: &Path, names: &[String]) -> Result<Option<PathBuf>> {
    let indexes: Vec<_> = names.iter().filter(|name| name.ends_with(INDEX_SUFFIX)).collect();
    match indexes.as_slice() {
        [] => Ok(None),
        [name] => Ok(Some(folder.join(name))),
        several if several.iter().any(|name| *name == USUAL_INDEX) => Ok(Some(folder.join(USUAL_INDEX))),
        several => {
            Err(Error::file(folder, format_args!("indexes {several:?}"), "one index, or one that is named model"))
        }
    }
}

/// Reads and checks an index.
pub fn read(path: &Path) -> Result<Index> {
    parse(path, &file::read_bounded(path, MAX_HEADER_BYTES)?)
}

/// Parses and checks the text of an index: every entry is the bare name of a file beside it.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Index> {
    let expected = "an index with a weight_map of tensor names to file names, each name once";
    if !is_json_object(bytes) {
        let found = serde_json::from_slice::<serde::de::IgnoredAny>(bytes)
            .map_or_else(|fault| fault.to_string(), |_| "another JSON value, such as a sequence".into());
        return Err(Error::file(path, found, expected));
    }
    let index: Index = serde_json::from_slice(bytes).map_err(|fault| Error::file(path, fault, expected))?;
    for (tensor, file) in &index.weight_map.0 {
        let is_bare = !file.is_empty() && file != "." && file != ".." && !file.contains(['/', '\\', ':', '\0']);
        if !is_bare {
            let found = format_args!("weight_map entry {file:?}");
            return Err(Error::tensor(path, tensor, found, "the bare name of a file beside the index"));
        }
    }
    if index.weight_map.0.is_empty() {
        return Err(Error::file(path, "an empty weight_map", "at least one tensor"));
    }
    Ok(index)
}

impl Index {
    /// The files that the index names, each once, sorted.
    #[must_use]
    pub fn files(&self, folder: &Path) -> Vec<(String, PathBuf)> {
        let names: BTreeSet<&String> = self.weight_map.0.iter().map(|(_, file)| file).collect();
        names.into_iter().map(|name| (name.clone(), folder.join(name))).collect()
    }

    /// Makes sure that the files that the index names exist.
    pub fn check_files(&self, path: &Path, files: &[(String, PathBuf)]) -> Result<()> {
        for (name, file) in files {
            if let Err(fault) = std::fs::metadata(file) {
                let tensor = self.weight_map.0.iter().find(|(_, home)| home == name).map_or("", |(tensor, _)| tensor);
                if fault.kind() != std::io::ErrorKind::NotFound {
                    return Err(Error::io(file, fault));
                }
                let found = format_args!("weight_map entry {name:?}, which does not exist");
                return Err(Error::tensor(path, tensor, found, "the name of a file beside the index"));
            }
        }
        Ok(())
    }

    /// Makes sure that each tensor stands in the file that the index names.
    pub fn check(&self, path: &Path, checkpoint: &Checkpoint) -> Result<()> {
        let homes: HashMap<&str, &str> = checkpoint
            .tensors()
            .iter()
            .map(|tensor| (tensor.name.as_str(), checkpoint.files()[tensor.parts[0].file].name.as_str()))
            .collect();
        for (tensor, file) in &self.weight_map.0 {
            match homes.get(tensor.as_str()) {
                Some(home) if home == file => {}
                Some(home) => {
                    return Err(Error::tensor(
                        path,
                        tensor,
                        format_args!("the tensor in {home:?}"),
                        format_args!("it in {file:?}"),
                    ));
                }
                None => {
                    return Err(Error::tensor(
                        path,
                        tensor,
                        "no such tensor in the index's files",
                        format_args!("it in {file:?}"),
                    ));
                }
            }
        }
        Ok(())
    }
}
