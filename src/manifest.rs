//! `manifest.json`: what a converted tree holds. docs/format.md describes the schema.

use std::borrow::Borrow;
use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::checkpoint::Fingerprint;
use crate::checksum::Checksum;
use crate::error::{Error, Result};
use crate::mxfp4::QuantizationError;
use crate::options::Options;
use crate::ordered_map::OrderedMap;
use crate::output::orbax;

/// Name of the manifest in a converted tree.
pub const MANIFEST_NAME: &str = "manifest.json";

/// Version of the schema that this crate writes and reads.
pub const FORMAT_VERSION: u64 = 1;

/// Largest manifest that is read.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 500_000_000;

/// Key of the manifest's own hash, which stands last and covers every byte before its line.
const SELF_HASH_KEY: &str = "manifest_xxh3_128";

/// A converted tree, as its manifest tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Output format.
    pub format: String,
    /// Version of this schema.
    pub format_version: u64,
    /// Version of the tool that wrote the tree.
    pub tensorport_version: String,
    /// The checkpoint that was converted.
    pub source: SourceInfo,
    /// Options that change bytes.
    pub options: Options,
    /// Number of tensors.
    pub total_tensors: u64,
    /// Number of parameters; MXFP4 values count once, scales do not.
    pub total_parameters: u64,
    /// Number of parameters and scales: what model hubs show.
    pub stored_elements: u64,
    /// Bytes of tensor data.
    pub total_bytes: u64,
    /// The `__metadata__` of the source.
    pub metadata: OrderedMap<String>,
    /// Shard folders or files.
    pub shards: OrderedMap<ShardInfo>,
    /// Files beside the tensors: generated, copied, edited.
    pub side_files: OrderedMap<SideFileInfo>,
    /// The tensors, in the order of the source.
    pub tensors: OrderedMap<TensorInfo>,
    /// Hash of the text before it, as 32 hexadecimal digits; computed by [`Manifest::write`].
    pub manifest_xxh3_128: String,
}

/// Fingerprint of the source: no times, no paths, so that the manifest is the same wherever it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceInfo {
    /// Its files.
    pub files: Vec<Fingerprint>,
}

/// One shard folder or file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardInfo {
    /// Number of files in it.
    pub files: u64,
    /// Bytes of tensor data in it.
    pub nbytes: u64,
}

/// Where a file beside the tensors comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SideFileOrigin {
    /// Written by this tool.
    Generated,
    /// Copied as it was.
    Copied,
    /// Copied and corrected to fit the converted tensors.
    Edited,
}

/// One file beside the tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SideFileInfo {
    /// Its size.
    pub nbytes: u64,
    /// Its hash.
    pub xxh3_128: Checksum,
    /// Where it comes from.
    pub origin: SideFileOrigin,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorInfo {
    /// Files that hold it, relative to the manifest; more than one when it is split along axis 0.
    pub files: Vec<String>,
    /// Where its data begins in each file.
    pub offsets: Vec<u64>,
    /// Bytes of its data in each file.
    pub part_nbytes: Vec<u64>,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Logical dtype, by its NumPy or `ml_dtypes` name.
    pub dtype: String,
    /// Dtype in the source; `mxfp4` for a decoded pair.
    pub source_dtype: String,
    /// Bytes of its data.
    pub nbytes: u64,
    /// Hash of its data, all parts in order.
    pub xxh3_128: Checksum,
    /// Hash of its data in each file.
    pub part_xxh3_128: Vec<Checksum>,
    /// Finite source values beyond the dtype's range.
    pub overflow: u64,
    /// Source values that became zero and were not.
    pub underflow: u64,
    /// What encoding lost, of the MXFP4 blocks that a conversion made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QuantizationError>,
}

/// What a conversion lost of one tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// Finite source values beyond the dtype's range.
    pub overflow: u64,
    /// Source values that became zero and were not.
    pub underflow: u64,
    /// What encoding lost, of MXFP4 blocks.
    pub quantization: Option<QuantizationError>,
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "overflow {}, underflow {}", self.overflow, self.underflow)?;
        match &self.quantization {
            // As the manifest has it, to the last digit.
            Some(error) => {
                write!(f, ", quantization {}", serde_json::to_string(error).expect("plain numbers serialize"))
            }
            None => Ok(()),
        }
    }
}

impl TensorInfo {
    /// What it says was lost.
    #[must_use]
    pub fn losses(&self) -> Losses {
        Losses { overflow: self.overflow, underflow: self.underflow, quantization: self.quantization }
    }
}

impl Manifest {
    /// Writes the text of the manifest: one line per entry, its own hash last.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.write_with(self.tensors.0.iter().map(|(name, info)| (name.as_str(), info)), out)
    }

    /// Writes the manifest with other tensors than its own, which need not all be in memory.
    pub fn write_with<'a>(
        &self,
        tensors: impl Iterator<Item = (&'a str, impl Borrow<TensorInfo>)>,
        out: &mut impl Write,
    ) -> io::Result<()> {
        let mut text = Hashing { out, hasher: Xxh3::new() };
        text.write_all(b"{\n")?;
        text.field("format", &self.format)?;
        text.field("format_version", &self.format_version)?;
        text.field("tensorport_version", &self.tensorport_version)?;
        text.field("source", &self.source)?;
        text.field("options", &self.options)?;
        text.field("total_tensors", &self.total_tensors)?;
        text.field("total_parameters", &self.total_parameters)?;
        text.field("stored_elements", &self.stored_elements)?;
        text.field("total_bytes", &self.total_bytes)?;
        text.field("metadata", &self.metadata)?;
        text.entries::<ShardInfo, _>("shards", self.shards.0.iter().map(|(name, info)| (name.as_str(), info)))?;
        text.entries::<SideFileInfo, _>(
            "side_files",
            self.side_files.0.iter().map(|(name, info)| (name.as_str(), info)),
        )?;
        text.entries::<TensorInfo, _>("tensors", tensors)?;
        let hash = Checksum(text.hasher.digest128());
        writeln!(out, "{}\n}}", self_hash_line(hash))
    }

    /// Parses and checks a manifest.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        /// What every version of the schema has.
        #[derive(Deserialize)]
        struct Version {
            format: String,
            format_version: u64,
        }
        let expected = "the manifest of a tree that tensorport wrote";
        let fault = |fault: serde_json::Error| Error::file(path, fault, expected);
        if !is_json_object(bytes) {
            return Err(Error::file(path, "no JSON object", expected));
        }
        let Version { format, format_version } = serde_json::from_slice(bytes).map_err(fault)?;
        if format_version != FORMAT_VERSION {
            let found = format_args!("format {format:?}, format_version {format_version}");
            return Err(Error::file(path, found, format_args!("format_version {FORMAT_VERSION}")));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(fault)?;
        if manifest.format != manifest.options.format.name() {
            let found =
                format_args!("format {:?} with options of {:?}", manifest.format, manifest.options.format.name());
            return Err(Error::file(path, found, "one format"));
        }
        Ok(manifest)
    }

    /// Whether the hash at the end of `bytes` is that of the bytes before it.
    #[must_use]
    pub fn self_hash_holds(bytes: &[u8]) -> bool {
        let key = format!("  \"{SELF_HASH_KEY}\"");
        let Some(start) = bytes.windows(key.len()).rposition(|window| window == key.as_bytes()) else {
            return false;
        };
        let (covered, line) = bytes.split_at(start);
        line == format!("{}\n}}\n", self_hash_line(Checksum::of(covered))).as_bytes()
    }
}

/// Whether the bytes of some `manifest.json` are meant to be one of ours.
#[must_use]
pub fn is_ours(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Marks {
        #[expect(dead_code, reason = "its presence is the mark")]
        tensorport_version: serde::de::IgnoredAny,
        #[expect(dead_code, reason = "its presence is the mark")]
        format_version: serde::de::IgnoredAny,
    }
    is_json_object(bytes) && serde_json::from_slice::<Marks>(bytes).is_ok()
}

/// Whether JSON text begins as an object: serde's derived structs would also take an array of their fields.
pub(crate) fn is_json_object(bytes: &[u8]) -> bool {
    bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{')
}

/// The file of a tree that `relative` names: a bare name, a bare name in a shard folder, or a file of an array in a folder
/// of its own. Anything else leads out of what a conversion writes, and is None.
#[must_use]
pub fn tree_path(root: &Path, relative: &str) -> Option<PathBuf> {
    let is_bare =
        |name: &str| !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0']);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_shard =
        |name: &str| name.strip_prefix("shard_").is_some_and(|number| number.len() >= 3 && is_number(number));
    let is_plain = match relative.split_once('/') {
        None => is_bare(relative),
        Some((folder, name)) if orbax::is_file_of_array(name) => is_bare(folder) && !folder.starts_with('.'),
        Some((folder, name)) => is_shard(folder) && is_bare(name),
    };
    is_plain.then(|| root.join(relative))
}

fn self_hash_line(hash: Checksum) -> String {
    format!("  \"{SELF_HASH_KEY}\": \"{hash}\"")
}

/// Hashes what it passes on.
struct Hashing<'a, W> {
    out: &'a mut W,
    hasher: Xxh3,
}

impl<W: Write> Hashing<'_, W> {
    /// A field on a line of its own.
    fn field(&mut self, key: &str, value: &impl Serialize) -> io::Result<()> {
        write!(self, "  \"{key}\": ")?;
        serde_json::to_writer(&mut *self, value)?;
        self.write_all(b",\n")
    }

    /// A field that is an object with an entry a line.
    fn entries<'a, V: Serialize, B: Borrow<V>>(
        &mut self,
        key: &str,
        entries: impl Iterator<Item = (&'a str, B)>,
    ) -> io::Result<()> {
        write!(self, "  \"{key}\": {{")?;
        for (number, (name, value)) in entries.enumerate() {
            self.write_all(if number == 0 { b"\n    " } else { b",\n    " })?;
            serde_json::to_writer(&mut *self, name)?;
            self.write_all(b": ")?;
            serde_json::to_writer(&mut *self, value.borrow())?;
        }
        self.write_all(b"\n  },\n")
    }
}

impl<W: Write> Write for Hashing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
