//! Files of arrays that other libraries wrote: what they hold, and where its bytes stand. Nothing in them is executed.

mod msgpack;
mod pickle;
mod scanner;

use std::fs::File;
use std::path::Path;

use safetensors::Dtype;

use crate::checksum::Checksum;
use crate::dtype;
use crate::error::{Error, Result};
use crate::header;
use scanner::{Scanner, Source};

/// A format that files of this crate's readers can have besides safetensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    /// msgpack in Flax's convention.
    Msgpack,
    /// A pickle of NumPy or JAX arrays.
    Pickle,
}

impl FileFormat {
    /// The format that the extension of a file names.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?;
        match extension.to_ascii_lowercase().as_str() {
            "msgpack" => Some(Self::Msgpack),
            "pkl" | "pickle" => Some(Self::Pickle),
            _ => None,
        }
    }

    /// The arrays of a file of `nbytes` bytes. Reads no array's data.
    pub fn read(self, path: &Path, file: &File, nbytes: u64) -> Result<Table> {
        self.scan(path, Source::File(file, nbytes))
    }

    /// The arrays of a file with these bytes.
    pub fn parse(self, path: &Path, bytes: &[u8]) -> Result<Table> {
        self.scan(path, Source::Bytes(bytes))
    }

    fn scan(self, path: &Path, source: Source<'_>) -> Result<Table> {
        let mut scanner = Scanner::new(path, source);
        let tree = match self {
            Self::Msgpack => msgpack::parse(&mut scanner)?,
            Self::Pickle => pickle::parse(&mut scanner)?,
        };
        let mut arrays = Vec::new();
        if let Node::Array(_) = tree {
            return Err(Error::file(path, "one array without a name", "a map of arrays"));
        }
        flatten(path, String::new(), tree, &mut arrays, &mut Budget::of(source.nbytes()))?;
        Ok(Table { arrays, checksum: scanner.checksum() })
    }
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its arrays, in the order of its maps.
    pub arrays: Vec<NamedArray>,
    /// Hash of all that stands between the arrays' data.
    pub checksum: Checksum,
}

/// One array of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedArray {
    /// Its keys, with dots between them.
    pub name: String,
    /// The array.
    pub array: Array,
}

/// Where an array stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Offset and size of each stretch of its bytes, in order.
    pub parts: Vec<(u64, u64)>,
}

/// A value of a file, as far as checkpoints have them.
#[derive(Debug)]
enum Node {
    Array(Array),
    Map(Vec<(String, Node)>),
    /// Something else, in words.
    Other(String),
}

/// Most maps within maps.
const MAX_DEPTH: usize = 64;

/// Most arrays of a file.
const MAX_ARRAYS: usize = 1 << 24;

/// What the names of a file's arrays may take in memory: a small file can make long ones of many, for each array has the
/// keys of all maps around it, and of a pickle two may share a map.
struct Budget {
    left: u64,
}

impl Budget {
    const EXPECTED: &'static str = "fewer or shorter: each array has the keys of all maps around it";

    /// Of a file of so many bytes.
    fn of(nbytes: u64) -> Self {
        Self { left: (1u64 << 25).saturating_add(nbytes.saturating_mul(4)) }
    }

    /// Takes what an array or a map needs that has a name of so many bytes; says what was found where that is too much.
    fn spend(&mut self, name_bytes: usize) -> Result<(), &'static str> {
        const NODE_BYTES: u64 = 100;
        self.left = self.left.checked_sub(NODE_BYTES + name_bytes as u64).ok_or("names beyond all measure")?;
        Ok(())
    }
}

fn flatten(path: &Path, name: String, node: Node, arrays: &mut Vec<NamedArray>, budget: &mut Budget) -> Result<()> {
    budget.spend(name.len()).map_err(|found| Error::file(path, found, Budget::EXPECTED))?;
    match node {
        Node::Array(array) => {
            if arrays.len() == MAX_ARRAYS {
                return Err(Error::file(path, format_args!("more than {MAX_ARRAYS} arrays"), "fewer"));
            }
            let nbytes = header::tensor_nbytes(path, &name, array.dtype, &array.shape)?;
            let found = array.parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.1));
            if found != nbytes {
                let (dtype, shape) = (dtype::name(array.dtype), &array.shape);
                let expected = format_args!("{nbytes} for {dtype} {shape:?}");
                return Err(Error::tensor(path, &name, format_args!("{found} bytes"), expected));
            }
            arrays.push(NamedArray { name, array });
            Ok(())
        }
        Node::Map(entries) => entries.into_iter().try_for_each(|(key, node)| {
            let name = if name.is_empty() { key } else { format!("{name}.{key}") };
            flatten(path, name, node, arrays, budget)
        }),
        Node::Other(found) if name.is_empty() => Err(Error::file(path, found, "a map of arrays")),
        Node::Other(found) => Err(Error::tensor(path, &name, found, "an array, or a map of arrays")),
    }
}

/// The dtype of an array that NumPy or `ml_dtypes` has by this name. Their float4 and float6 have an element to a byte.
fn dtype_of(name: &str) -> Option<Dtype> {
    dtype::from_name(name).filter(|&dtype| !dtype::is_sub_byte(dtype))
}
