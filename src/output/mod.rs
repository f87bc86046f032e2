//! Output formats: which files hold which tensors, and what stands between their data. One module per format.
//!
//! Every format is tensors' bytes at known offsets in files, and fixed bytes around them, its frames. A format says where
//! the data goes and what the frames are; writing, resuming, checking and reading are the same for all.

mod files;
pub mod msgpack;
pub mod npy;
pub mod orbax;
pub mod pickle;
pub mod safetensors;

use std::ops::Range;

use ::safetensors::Dtype;

pub(crate) use files::{Stretch, check_frames, for_each_file, layout_of};

use crate::error::{Error, Result};
use crate::options::Format;
use crate::ordered_map::OrderedMap;

/// What a format knows of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor<'a> {
    /// Full dotted name.
    pub name: &'a str,
    /// Logical dtype.
    pub dtype: Dtype,
    /// Logical shape.
    pub shape: &'a [u64],
    /// Bytes of its data.
    pub nbytes: u64,
}

/// A stretch of a tensor that one file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member<'a> {
    /// The tensor.
    pub tensor: Tensor<'a>,
    /// Which of its bytes.
    pub data: Range<u64>,
    /// Bytes of the tensor's first part, where it has several: all but the last are as large.
    pub part_bytes: u64,
}

/// Where a format puts tensors.
#[derive(Debug, Default)]
pub struct Placement {
    /// Files with tensor data.
    pub files: Vec<PlacedFile>,
    /// Shard folders or files: name, and the range of `files` in it.
    pub shards: Vec<(String, Range<usize>)>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// One file: whole tensors, or a stretch of a single one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedFile {
    /// Path below the output folder, with `/`.
    pub path: String,
    /// Its tensors.
    pub tensors: Range<usize>,
    /// Which bytes of its tensor it holds, if there is one.
    pub data: Range<u64>,
}

impl PlacedFile {
    /// What the file holds; `part_bytes` tells of a tensor that is split how large its first part is.
    pub fn members<'a>(
        &self,
        tensor: impl Fn(usize) -> Tensor<'a>,
        part_bytes: impl Fn(usize) -> u64,
    ) -> Vec<Member<'a>> {
        if self.tensors.len() == 1 {
            let (index, data) = (self.tensors.start, self.data.clone());
            return vec![Member { tensor: tensor(index), data, part_bytes: part_bytes(index) }];
        }
        let whole = |tensor: Tensor<'a>| Member { tensor, data: 0..tensor.nbytes, part_bytes: tensor.nbytes };
        self.tensors.clone().map(|index| whole(tensor(index))).collect()
    }
}

/// All bytes of a file but the tensors' own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLayout {
    /// Its size.
    pub nbytes: u64,
    /// Where data stands: those of the first member first, and of each the bytes in their order.
    pub extents: Vec<Extent>,
    /// What stands elsewhere.
    pub frames: Vec<Frame>,
}

/// Consecutive bytes of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Which of the members.
    pub member: usize,
    /// Where they begin in the file.
    pub offset: u64,
    /// Which bytes of the tensor.
    pub data: Range<u64>,
}

/// Fixed bytes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Where they begin.
    pub offset: u64,
    /// What they are.
    pub content: Content,
}

/// What a frame is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// So many zeros.
    Zeros(u64),
}

/// A format of converted trees.
pub trait Layout: Sync {
    /// Divides tensors among files. `unit_bytes` are those of the smallest stretch of a tensor that is made alone.
    fn place(&self, tensors: &[Tensor<'_>], unit_bytes: &dyn Fn(usize) -> u64, shard_bytes: u64) -> Result<Placement>;

    /// The file that holds `members`; what is wrong with them where none does. `metadata` is the checkpoint's.
    fn file(&self, members: &[Member<'_>], metadata: &OrderedMap<String>) -> Result<FileLayout, String>;

    /// Files that the format has beside the tensors: names and contents.
    fn side_files(&self, _tensors: &[Tensor<'_>], _files: &[PlacedFile]) -> Vec<(String, Vec<u8>)> {
        Vec::new()
    }
}

impl Format {
    /// How the format lays out its files.
    #[must_use]
    pub fn layout(self) -> &'static dyn Layout {
        match self {
            Self::NumpyDirect => &npy::Npy,
            Self::Msgpack => &msgpack::Msgpack,
            Self::JaxPickle => &pickle::Pickle,
            Self::Safetensors => &safetensors::Safetensors,
            Self::Orbax => &orbax::Orbax,
        }
    }
}

/// Builds the layout of a file from its beginning to its end.
#[derive(Debug, Default)]
struct FileBuilder {
    nbytes: u64,
    extents: Vec<Extent>,
    frames: Vec<Frame>,
}

impl FileBuilder {
    /// The bytes that come next; those that follow others belong to their frame.
    fn bytes(&mut self, bytes: &[u8]) {
        match self.frames.last_mut() {
            Some(Frame { offset, content: Content::Bytes(last) }) if *offset + last.len() as u64 == self.nbytes => {
                last.extend_from_slice(bytes);
            }
            _ => self.frames.push(Frame { offset: self.nbytes, content: Content::Bytes(bytes.to_vec()) }),
        }
        self.nbytes += bytes.len() as u64;
    }

    /// Zeros that come next.
    fn zeros(&mut self, count: u64) {
        if count > 0 {
            self.frames.push(Frame { offset: self.nbytes, content: Content::Zeros(count) });
            self.nbytes += count;
        }
    }

    /// A tensor's bytes that come next.
    fn data(&mut self, member: usize, data: Range<u64>) {
        self.extents.push(Extent { member, offset: self.nbytes, data: data.clone() });
        self.nbytes += data.end - data.start;
    }

    fn finish(self) -> FileLayout {
        FileLayout { nbytes: self.nbytes, extents: self.extents, frames: self.frames }
    }
}

/// The shape that formats of arrays store: the logical one, except that packed float4 and float6 are flat bytes.
fn stored_shape(tensor: &Tensor<'_>) -> Vec<u64> {
    if crate::dtype::is_sub_byte(tensor.dtype) { vec![tensor.nbytes] } else { tensor.shape.to_vec() }
}

/// Fills files with whole tensors, in their order, up to a limit; a tensor beyond it gets a file of its own.
fn fill_files(tensors: &[Tensor<'_>], limit: u64, path: impl Fn(usize) -> String) -> Placement {
    let mut placement = Placement::default();
    let mut filled = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        if tensor.nbytes > limit {
            placement.warnings.push(format!(
                "tensor {:?} has {} bytes, more than the shard size of {limit} bytes; it gets a file of its own",
                tensor.name, tensor.nbytes
            ));
        }
        match placement.files.last_mut() {
            Some(file) if tensor.nbytes <= limit.saturating_sub(filled) => {
                file.tensors.end = index + 1;
            }
            _ => {
                let path = path(placement.files.len());
                placement.files.push(PlacedFile { path, tensors: index..index + 1, data: 0..tensor.nbytes });
                filled = 0;
            }
        }
        filled += tensor.nbytes;
    }
    let name = |(index, file): (usize, &PlacedFile)| (file.path.clone(), index..index + 1);
    placement.shards = placement.files.iter().enumerate().map(name).collect();
    placement
}

/// The fewest rows of axis 0 whose bits fill whole bytes and whole units, of which there is a power of two to a byte: 1,
/// but for packed dtypes and for flat MXFP4.
fn step_rows(nbytes: u64, rows: u64, unit_bytes: u64) -> u64 {
    let row_bits = u128::from(nbytes) * 8 / u128::from(rows);
    let unit_bits = u128::from(unit_bytes) * 8;
    let mut step_rows = 1;
    while row_bits * u128::from(step_rows) % unit_bits != 0 {
        step_rows *= 2;
    }
    step_rows
}

/// Warns of a tensor whose files cannot be as small as is asked for.
fn warn_of_large_row(tensor: &Tensor<'_>, bytes: u64, limit: u64) -> String {
    format!(
        "tensor {:?}: one row holds {bytes} bytes, more than the shard size of {limit} bytes; it gets a file of its own",
        tensor.name
    )
}

fn unfit(tensor: &Tensor<'_>, found: &str, expected: &str) -> Error {
    Error::Mapping { found: format!("tensor {:?}: {found}", tensor.name), expected: expected.into() }
}

/// Refuses a tensor with a name that means something else to readers of the format.
fn refuse_name(tensors: &[Tensor<'_>], name: &str, meaning: &str) -> Result<()> {
    match tensors.iter().find(|tensor| tensor.name == name) {
        Some(tensor) => Err(unfit(tensor, "its name", &format!("another one, for this one marks {meaning}"))),
        None => Ok(()),
    }
}

/// Most files that a tensor may be split into: far beyond any use, and within memory.
const MAX_PARTS: u64 = 100_000;

/// Refuses to split a tensor into too many files.
fn check_parts(tensor: &Tensor<'_>, limit: u64, parts: u64) -> Result<()> {
    if parts <= MAX_PARTS {
        return Ok(());
    }
    Err(Error::Argument {
        name: "shard_size",
        found: format!("{limit} bytes, which splits tensor {:?} into {parts} files", tensor.name),
        expected: format!("a size that splits no tensor into more than {MAX_PARTS}"),
    })
}
