//! A checkpoint: a file, a directory of shard files or a converted tree, as one validated table of named tensors.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::arrivals::{Arrival, Arrivals};
use crate::checksum::Checksum;
use crate::dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::float8::{self, BlockSize};
use crate::header;
use crate::index;
use crate::input::{Array, FileFormat, NamedArray};
use crate::journal;
use crate::manifest::{self, MANIFEST_NAME, Manifest};
use crate::mapping::Mapping;
use crate::model_config;
use crate::mxfp4::{self, Candidate, Pairing};
use crate::options::Format;
use crate::ordered_map::OrderedMap;
use crate::output::{self, Content, Stretch, Tensor};
pub use crate::source_file::SourceFile;

/// Extension of the files that a directory without an index is made of.
const SAFETENSORS_SUFFIX: &str = ".safetensors";

/// An opened checkpoint. Opening reads headers only; no tensor data.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    kind: Kind,
    files: Vec<SourceFile>,
    fingerprints: Vec<Fingerprint>,
    tensors: Vec<TensorSpec>,
    /// Indices of the tensors, sorted by name: a table of a million names takes little more than the names.
    by_name: Vec<u32>,
    metadata: OrderedMap<String>,
    total_parameters: u64,
    stored_elements: u64,
    float8_size: OnceLock<BlockSize>,
}

/// What a checkpoint was opened from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One file.
    File,
    /// A directory of safetensors files.
    Directory,
    /// A tree that a conversion wrote.
    Tree,
}

/// What identifies one file of a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Name relative to the checkpoint.
    pub name: String,
    /// Size.
    pub nbytes: u64,
    /// Hash of the header; of the whole manifest where the source is a converted tree.
    pub header_xxh3_128: Checksum,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full dotted name.
    pub name: String,
    /// Logical dtype.
    pub dtype: Dtype,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Bytes of data.
    pub nbytes: u64,
    /// Where its data stands, in order; one part unless a conversion split it.
    pub parts: Vec<Part>,
}

impl TensorSpec {
    /// What MXFP4 pairing looks at; `path` is for messages.
    #[must_use]
    pub fn candidate<'a>(&'a self, path: &'a Path) -> Candidate<'a> {
        Candidate { name: &self.name, dtype: self.dtype, shape: &self.shape, path }
    }

    /// What a format knows of it.
    #[must_use]
    pub fn view(&self) -> Tensor<'_> {
        Tensor { name: &self.name, dtype: self.dtype, shape: &self.shape, nbytes: self.nbytes }
    }
}

/// A stretch of a tensor's data in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Where it begins in the file.
    pub offset: u64,
    /// Its size.
    pub nbytes: u64,
}

/// A stretch of a mapped file, which it keeps alive.
#[derive(Debug, Clone)]
pub struct View {
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

impl View {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.mapping.slice(self.range.clone())
    }
}

impl Checkpoint {
    /// Opens `source`: a safetensors file, a directory of them, a converted tree, or a file of arrays in msgpack or pickle,
    /// which its extension tells.
    ///
    /// A directory with an index consists of the index's files; one without of every top-level `*.safetensors`.
    pub fn open(source: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(source).map_err(|fault| Error::io(source, fault))?;
        if !metadata.is_dir() {
            let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(format) = FileFormat::of(source) {
                return Self::from_arrays(source, name, format);
            }
            return Self::from_safetensors(source, Kind::File, vec![(name, source.to_path_buf())]);
        }
        let names = file_names(source)?;
        if names.iter().any(|name| name == MANIFEST_NAME) {
            let path = source.join(MANIFEST_NAME);
            let bytes = file::read_bounded(&path, manifest::MAX_MANIFEST_BYTES)?;
            // Some other tool's manifest.json beside safetensors files says nothing about them.
            if manifest::is_ours(&bytes) || !names.iter().any(|name| name.ends_with(SAFETENSORS_SUFFIX)) {
                return Self::from_tree(source, &bytes);
            }
        }
        let mut files = match index::find(source, &names)? {
            Some(index_path) => {
                let index = index::read(&index_path)?;
                let files = index.files(source);
                index.check_files(&index_path, &files)?;
                let checkpoint = Self::from_safetensors(source, Kind::Directory, files)?;
                index.check(&index_path, &checkpoint)?;
                return Ok(checkpoint);
            }
            None => names.iter().filter(|name| name.ends_with(SAFETENSORS_SUFFIX)).collect::<Vec<_>>(),
        };
        if files.is_empty() {
            let other = names.iter().find(|name| FileFormat::of(Path::new(name)).is_some());
            let found = if names.iter().any(|name| name == journal::JOURNAL_NAME) {
                "an unfinished conversion (convert with resume finishes it)".into()
            } else if let Some(other) = other {
                format!(
                    "a directory without *.safetensors files, but with {other}, which is read if it is named itself"
                )
            } else {
                "a directory without *.safetensors files".into()
            };
            return Err(Error::NoCheckpoint {
                path: source.to_path_buf(),
                found,
                expected: "safetensors files, an index of them, or a converted tree with its manifest.json".into(),
            });
        }
        files.sort();
        let files = files.into_iter().map(|name| (name.clone(), source.join(name))).collect();
        Self::from_safetensors(source, Kind::Directory, files)
    }

    fn from_safetensors(root: &Path, kind: Kind, files: Vec<(String, PathBuf)>) -> Result<Self> {
        let mut builder = Builder::new(root, kind);
        let mut metadata = BTreeMap::new();
        for (name, path) in files {
            let (file, stat) = file::open_regular(&path)?;
            let header = header::read(&path, &file, stat.len())?;
            let nbytes = stat.len();
            builder.fingerprints.push(Fingerprint { name: name.clone(), nbytes, header_xxh3_128: header.checksum });
            let file = builder.add_file(name, &path, &stat)?;
            for (key, value) in header.metadata.0 {
                metadata.entry(key).or_insert(value);
            }
            for entry in header.tensors {
                builder.tensors.push(TensorSpec {
                    parts: vec![Part { file, offset: entry.offset, nbytes: entry.nbytes }],
                    name: entry.name,
                    dtype: entry.dtype,
                    shape: entry.shape,
                    nbytes: entry.nbytes,
                });
            }
        }
        builder.finish(OrderedMap(metadata.into_iter().collect()))
    }

    /// A file of arrays that another library wrote.
    fn from_arrays(path: &Path, name: String, format: FileFormat) -> Result<Self> {
        let mut builder = Builder::new(path, Kind::File);
        let (file, stat) = file::open_regular(path)?;
        let table = format.read(path, &file, stat.len())?;
        let nbytes = stat.len();
        builder.fingerprints.push(Fingerprint { name: name.clone(), nbytes, header_xxh3_128: table.checksum });
        let file = builder.add_file(name, path, &stat)?;
        for NamedArray { name, array: Array { dtype, shape, parts } } in table.arrays {
            let nbytes = parts.iter().map(|part| part.1).sum();
            let parts = parts.into_iter().map(|(offset, nbytes)| Part { file, offset, nbytes }).collect();
            builder.tensors.push(TensorSpec { name, dtype, shape, nbytes, parts });
        }
        builder.finish(OrderedMap::default())
    }

    fn from_tree(root: &Path, manifest_bytes: &[u8]) -> Result<Self> {
        let manifest_path = root.join(MANIFEST_NAME);
        let manifest = Manifest::from_bytes(&manifest_path, manifest_bytes)?;
        let mut builder = Builder::new(root, Kind::Tree);
        builder.fingerprints.push(Fingerprint {
            name: MANIFEST_NAME.into(),
            nbytes: manifest_bytes.len() as u64,
            header_xxh3_128: Checksum::of(manifest_bytes),
        });
        let mut last = String::new();
        for (name, info) in manifest.tensors.0 {
            let spec = tree_tensor(&manifest_path, &name, &info)?;
            let mut parts = Vec::with_capacity(info.files.len());
            for ((relative, &offset), &nbytes) in info.files.into_iter().zip(&info.offsets).zip(&info.part_nbytes) {
                // Tensors of one file follow each other.
                if builder.files.is_empty() || relative != last {
                    let path = manifest::tree_path(root, &relative).ok_or_else(|| {
                        let expected = "a plain path below the manifest's folder";
                        Error::tensor(&manifest_path, &name, format_args!("file {relative:?}"), expected)
                    })?;
                    let stat = file::open_regular(&path).map_err(|fault| tree_file_fault(&path, &name, fault))?.1;
                    builder.add_file(relative.clone(), &path, &stat)?;
                    last = relative;
                }
                parts.push(Part { file: builder.files.len() - 1, offset, nbytes });
            }
            builder.tensors.push(TensorSpec { parts, ..spec });
        }
        builder.check_files(manifest.options.format, &manifest.metadata)?;
        builder.finish(manifest.metadata)
    }

    /// The same checkpoint, opened from stand-ins for files that `arrivals` tells of: reading tensors waits for them.
    #[must_use]
    pub fn arriving(mut self, arrivals: &Arc<Arrivals>) -> Self {
        for (file, fingerprint) in self.files.iter_mut().zip(&self.fingerprints) {
            file.arrival = Some(Arrival {
                arrivals: Arc::clone(arrivals),
                nbytes: file.nbytes,
                header_xxh3_128: fingerprint.header_xxh3_128,
                found: OnceLock::new(),
            });
        }
        self
    }

    /// Whether files of it are still on their way.
    #[must_use]
    pub fn is_arriving(&self) -> bool {
        self.files.iter().any(|file| file.arrival.is_some())
    }

    /// Lets go of those that wait for files.
    pub fn stop_waiting(&self) {
        for arrival in self.files.iter().filter_map(|file| file.arrival.as_ref()) {
            arrival.arrivals.stop();
        }
    }

    /// The path given to [`Checkpoint::open`].
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What it was opened from.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The files that hold its data.
    #[must_use]
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// What identifies the source.
    #[must_use]
    pub fn fingerprints(&self) -> &[Fingerprint] {
        &self.fingerprints
    }

    /// The tensors: file by file, in the order of their data.
    #[must_use]
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// The tensor of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorSpec> {
        self.index_of(name).map(|index| &self.tensors[index])
    }

    /// Place of the tensor of this name among [`Checkpoint::tensors`].
    #[must_use]
    pub fn index_of(&self, name: &str) -> Option<usize> {
        let found = self.by_name.binary_search_by_key(&name, |&index| &self.tensors[index as usize].name);
        found.ok().map(|place| self.by_name[place] as usize)
    }

    /// The `__metadata__` of its files; where two files disagree, the first one's word.
    #[must_use]
    pub fn metadata(&self) -> &OrderedMap<String> {
        &self.metadata
    }

    /// Number of parameters: MXFP4 values count once, scales do not.
    #[must_use]
    pub fn total_parameters(&self) -> u64 {
        self.total_parameters
    }

    /// Parameters and scales, as model hubs count them.
    #[must_use]
    pub fn stored_elements(&self) -> u64 {
        self.stored_elements
    }

    /// The MXFP4 pairs among its tensors.
    #[must_use]
    pub fn pairing(&self) -> Pairing {
        let candidates: Vec<_> = self.tensors.iter().map(|tensor| tensor.candidate(self.path_of(tensor))).collect();
        mxfp4::pair(&candidates)
    }

    /// The float8 weights with block scales among its tensors.
    pub fn float8_pairing(&self) -> Result<float8::Pairing> {
        let candidates: Vec<_> = self.tensors.iter().map(|tensor| tensor.candidate(self.path_of(tensor))).collect();
        Ok(float8::pair(&candidates, self.float8_size()?))
    }

    /// The size of its float8 blocks, which config.json beside it gives; else that of DeepSeek-V3. The configuration of a
    /// checkpoint without such blocks is not looked at.
    pub fn float8_size(&self) -> Result<BlockSize> {
        if let Some(&size) = self.float8_size.get() {
            return Ok(size);
        }
        let folder = match self.kind {
            Kind::File => self.root.parent().unwrap_or(Path::new("")),
            Kind::Directory | Kind::Tree => &self.root,
        };
        let size = if float8::has_scales(self.tensors.iter().map(|tensor| tensor.name.as_str())) {
            model_config::block_size(folder)?
        } else {
            None
        };
        Ok(*self.float8_size.get_or_init(|| size.unwrap_or_default()))
    }

    /// Path of the file that holds the beginning of a tensor.
    #[must_use]
    pub fn path_of(&self, tensor: &TensorSpec) -> &Path {
        tensor.parts.first().map_or(&self.root, |part| &self.files[part.file].path)
    }

    /// Maps the parts of a tensor. The views share one mapping per file, and keep it alive without the checkpoint.
    pub fn view(&self, tensor: &TensorSpec) -> Result<Vec<View>> {
        tensor
            .parts
            .iter()
            .map(|part| {
                let mapping = self.files[part.file].map()?;
                let start = usize::try_from(part.offset).expect("the file is mapped, so its offsets fit");
                let end = start + usize::try_from(part.nbytes).expect("as above");
                Ok(View { mapping, range: start..end })
            })
            .collect()
    }
}

/// Collects files and tensors, and refuses a name that comes twice.
struct Builder {
    root: PathBuf,
    kind: Kind,
    files: Vec<SourceFile>,
    fingerprints: Vec<Fingerprint>,
    tensors: Vec<TensorSpec>,
}

impl Builder {
    fn new(root: &Path, kind: Kind) -> Self {
        Self { root: root.to_path_buf(), kind, files: Vec::new(), fingerprints: Vec::new(), tensors: Vec::new() }
    }

    fn add_file(&mut self, name: String, path: &Path, stat: &Metadata) -> Result<usize> {
        self.files.push(SourceFile::new(name, path, stat)?);
        Ok(self.files.len() - 1)
    }

    /// Checks that the files of a tree are those that its format makes: their sizes and everything but the data.
    fn check_files(&self, format: Format, metadata: &OrderedMap<String>) -> Result<()> {
        let stretches = self.tensors.iter().enumerate().flat_map(|(item, spec)| {
            let mut start = 0;
            spec.parts.iter().enumerate().map(move |(number, part)| {
                let data = start..start + part.nbytes;
                start = data.end;
                Stretch {
                    tensor: (item, number),
                    view: spec.view(),
                    file: part.file,
                    offset: part.offset,
                    data,
                    part_bytes: spec.parts[0].nbytes,
                }
            })
        });
        output::for_each_file(stretches, |stretches| {
            let SourceFile { path, nbytes, .. } = &self.files[stretches[0].file];
            let name = stretches[0].view.name;
            let mut layout = output::layout_of(format.layout(), stretches, metadata, *nbytes)
                .map_err(|found| Error::tensor(path, name, found, "parts where the format has them"))?;
            // Nobody reads padding, and there can be as much of it as of data.
            layout.frames.retain(|frame| matches!(frame.content, Content::Bytes(_)));
            let (handle, _) = file::open_regular(path)?;
            output::check_frames(path, &handle, *nbytes, &layout).map_err(|fault| tree_file_fault(path, name, fault))
        })
    }

    fn finish(self, metadata: OrderedMap<String>) -> Result<Checkpoint> {
        let by_name = self.sort_names()?;
        let candidates: Vec<_> = self.tensors.iter().map(|tensor| tensor.candidate(&self.root)).collect();
        let (total_parameters, stored_elements) = mxfp4::count_parameters(&candidates);
        Ok(Checkpoint {
            root: self.root,
            kind: self.kind,
            files: self.files,
            fingerprints: self.fingerprints,
            tensors: self.tensors,
            by_name,
            metadata,
            total_parameters,
            stored_elements,
            float8_size: OnceLock::new(),
        })
    }

    /// Indices of the tensors, sorted by name; refuses a name that comes twice.
    fn sort_names(&self) -> Result<Vec<u32>> {
        let count = u32::try_from(self.tensors.len()).map_err(|_| {
            let found = format_args!("{} tensors", self.tensors.len());
            Error::file(&self.root, found, "at most 2^32 - 1")
        })?;
        let name = |&index: &u32| self.tensors[index as usize].name.as_str();
        let mut by_name: Vec<u32> = (0..count).collect();
        // By place among equals: the message speaks of the second place first.
        by_name.sort_unstable_by(|a, b| name(a).cmp(name(b)).then(a.cmp(b)));
        let twice = by_name.windows(2).filter(|pair| name(&pair[0]) == name(&pair[1])).min_by_key(|pair| pair[1]);
        if let Some(&[first, second]) = twice {
            let path_of = |index: u32| {
                let part = self.tensors[index as usize].parts.first();
                part.map_or(self.root.as_path(), |part| &self.files[part.file].path)
            };
            let (before, path) = (path_of(first), path_of(second));
            if before == path {
                return Err(Error::tensor(path, name(&second), "the name twice", "each tensor once"));
            }
            let found = format_args!("the name also in {}", before.display());
            return Err(Error::tensor(path, name(&second), found, "each tensor in one file"));
        }
        Ok(by_name)
    }
}

/// Names of the entries of a directory, those that are text, sorted.
fn file_names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|fault| Error::io(folder, fault))? {
        let entry = entry.map_err(|fault| Error::io(folder, fault))?;
        // Names that are not UTF-8 are no file of a checkpoint: an index could not name them.
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// What a manifest says of one tensor, checked against itself.
pub(crate) fn tree_tensor(manifest: &Path, name: &str, info: &manifest::TensorInfo) -> Result<TensorSpec> {
    let fault = |found: String, expected: &str| Error::tensor(manifest, name, found, expected);
    let dtype = dtype::from_name(&info.dtype)
        .ok_or_else(|| fault(format!("dtype {:?}", info.dtype), "the name of a dtype, such as \"bfloat16\""))?;
    let nbytes = header::tensor_nbytes(manifest, name, dtype, &info.shape)?;
    if nbytes != info.nbytes {
        return Err(fault(format!("nbytes {}", info.nbytes), &format!("{nbytes} for {} {:?}", info.dtype, info.shape)));
    }
    let parts = info.files.len();
    let lengths = [info.offsets.len(), info.part_nbytes.len(), info.part_xxh3_128.len()];
    if parts == 0 || lengths != [parts; 3] {
        let [offsets, sizes, sums] = lengths;
        let found = format!("{parts} files, {offsets} offsets, {sizes} part_nbytes, {sums} part_xxh3_128");
        return Err(fault(found, "the same number of each, at least one"));
    }
    let sum = info.part_nbytes.iter().try_fold(0u64, |sum, &bytes| sum.checked_add(bytes));
    if sum != Some(nbytes) {
        return Err(fault(format!("part_nbytes {:?}", info.part_nbytes), &format!("parts of {nbytes} bytes in all")));
    }
    Ok(TensorSpec { name: name.to_owned(), dtype, shape: info.shape.clone(), nbytes, parts: Vec::new() })
}

/// A fault of a tree's file, as one of the tensor that is looked for in it.
fn tree_file_fault(path: &Path, tensor: &str, fault: Error) -> Error {
    match fault {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::tensor(path, tensor, "no such file", "the file that the manifest names")
        }
        Error::MalformedFile { found, expected, .. } => Error::tensor(path, tensor, found, expected),
        other => other,
    }
}
