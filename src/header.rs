//! The header of one safetensors file: untrusted bytes in, a validated tensor table out.
//!
//! Stricter than the safetensors crate where that one is silent: duplicate keys, unknown fields, a header that does not
//! begin with `{`, and shapes that NumPy cannot hold are refused, and every message names the tensor.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::checksum::Checksum;
use crate::dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::ordered_map::OrderedMap;

/// Largest header accepted, as in the safetensors crate.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Largest rank accepted: `NPY_MAXDIMS` of NumPy 2.
pub const MAX_RANK: usize = 64;

/// Bytes of the length field before the header.
const LENGTH_BYTES: usize = 8;

/// Key of the free-form string map of a header.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// One validated header.
#[derive(Debug)]
pub struct Header {
    /// The `__metadata__` map.
    pub metadata: OrderedMap<String>,
    /// Tensors in the order of their data.
    pub tensors: Vec<TensorEntry>,
    /// Hash of the length field and the header.
    pub checksum: Checksum,
}

/// One tensor of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Full dotted name.
    pub name: String,
    /// Dtype of the stored elements.
    pub dtype: Dtype,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Where its data begins, from the beginning of the file.
    pub offset: u64,
    /// Bytes of its data.
    pub nbytes: u64,
}

/// Reads and validates the header of an open file of `file_bytes` bytes.
pub fn read(path: &Path, file: &File, file_bytes: u64) -> Result<Header> {
    let Some(available) = file_bytes.checked_sub(LENGTH_BYTES as u64) else {
        let found = format_args!("{file_bytes} bytes");
        return Err(Error::file(path, found, "at least 8 bytes, the length of a safetensors header"));
    };
    let mut length = [0; LENGTH_BYTES];
    file::read_exact_at(path, file, &mut length, 0)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES {
        let found = format_args!("a header of {header_bytes} bytes");
        return Err(Error::file(path, found, format_args!("at most {MAX_HEADER_BYTES} bytes")));
    }
    if header_bytes > available {
        let found = format_args!("a header of {header_bytes} bytes");
        return Err(Error::file(path, found, format_args!("at most the {available} bytes that follow")));
    }
    let mut bytes = file::buffer(path, LENGTH_BYTES + usize::try_from(header_bytes).expect("at most 100 MB"))?;
    file::read_exact_at(path, file, &mut bytes, 0)?;
    let (metadata, mut tensors) = parse(path, &bytes[LENGTH_BYTES..], available - header_bytes)?;
    for tensor in &mut tensors {
        tensor.offset += bytes.len() as u64;
    }
    Ok(Header { metadata, tensors, checksum: Checksum::of(&bytes) })
}

/// Parses and validates header text for `data_bytes` bytes of data; offsets count from the beginning of the data.
pub fn parse(path: &Path, json: &[u8], data_bytes: u64) -> Result<(OrderedMap<String>, Vec<TensorEntry>)> {
    if json.first() != Some(&b'{') {
        let found = match json.first() {
            None => "an empty header".to_owned(),
            Some(byte) => format!("a header that begins with byte {byte:#04x}"),
        };
        return Err(Error::file(path, found, "a safetensors header, which begins with '{'"));
    }
    let mut table = RawTable::default();
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let parsed = TableSeed { table: &mut table }.deserialize(&mut deserializer).and_then(|()| deserializer.end());
    if let Err(fault) = parsed {
        return Err(match table.current {
            Some(name) if name == METADATA_KEY => {
                Error::file(path, fault, "a __metadata__ that maps strings to strings, each key once")
            }
            Some(name) => Error::tensor(path, &name, fault, "dtype, shape and data_offsets, each once"),
            None => Error::file(path, fault, "a safetensors header in JSON"),
        });
    }
    let tensors = validate(path, table.tensors, data_bytes)?;
    Ok((table.metadata, tensors))
}

/// Checks names, sizes and offsets, and sorts the tensors by their place in the file.
fn validate(path: &Path, raw: Vec<(String, RawEntry)>, data_bytes: u64) -> Result<Vec<TensorEntry>> {
    let mut names = HashSet::with_capacity(raw.len());
    for (name, _) in &raw {
        if !names.insert(name.as_str()) {
            return Err(Error::tensor(path, name, "the name twice", "each name once"));
        }
    }
    let mut tensors = Vec::with_capacity(raw.len());
    for (name, entry) in raw {
        let RawEntry { dtype, shape: RawShape(shape), data_offsets: (start, end) } = entry;
        let nbytes = tensor_nbytes(path, &name, dtype, &shape)?;
        let fault = |found: String, expected: String| Error::tensor(path, &name, found, expected);
        if start > end {
            return Err(fault(format!("data_offsets [{start}, {end}]"), "begin <= end".into()));
        }
        if end > data_bytes {
            let expected = format!("at most {data_bytes}, the bytes of data in the file");
            return Err(fault(format!("data_offsets [{start}, {end}]"), expected));
        }
        if end - start != nbytes {
            let expected = format!("{nbytes} bytes for {} {shape:?}", dtype::name(dtype));
            return Err(fault(format!("data_offsets [{start}, {end}]: {} bytes", end - start), expected));
        }
        tensors.push(TensorEntry { name, dtype, shape, offset: start, nbytes });
    }
    // Stable, so that empty tensors at one offset keep the header's order.
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.nbytes));
    let mut end = 0;
    for tensor in &tensors {
        if tensor.offset != end {
            let what = if tensor.offset < end { "an overlap" } else { "a hole" };
            let found = format_args!("data that begins at {}: {what}", tensor.offset);
            return Err(Error::tensor(path, &tensor.name, found, format_args!("data that begins at {end}")));
        }
        end += tensor.nbytes;
    }
    if end != data_bytes {
        let found = format_args!("{data_bytes} bytes of data");
        return Err(Error::file(path, found, format_args!("{end} bytes, the end of the last tensor")));
    }
    Ok(tensors)
}

/// Bytes of one tensor, after checking that NumPy can hold its shape.
pub(crate) fn tensor_nbytes(path: &Path, name: &str, dtype: Dtype, shape: &[u64]) -> Result<u64> {
    let fault =
        |expected: &str| Error::tensor(path, name, format_args!("shape {shape:?} of {}", dtype::name(dtype)), expected);
    if shape.len() > MAX_RANK {
        return Err(fault("at most 64 dimensions"));
    }
    // NumPy measures an empty array by its other dimensions.
    let itemsize = (dtype.bitsize() as u64).div_ceil(8);
    let measured = shape.iter().filter(|&&dim| dim > 0).try_fold(itemsize, |bytes, &dim| bytes.checked_mul(dim));
    if measured.is_none_or(|bytes| bytes > i64::MAX as u64) {
        return Err(fault("a size below 2^63 bytes"));
    }
    dtype::checked_nbytes(dtype, shape).ok_or_else(|| fault("a whole number of bytes"))
}

/// The header as it stands, before validation. `current` is the key being read, for error messages.
#[derive(Default)]
struct RawTable {
    metadata: OrderedMap<String>,
    tensors: Vec<(String, RawEntry)>,
    current: Option<String>,
}

struct RawEntry {
    dtype: Dtype,
    shape: RawShape,
    data_offsets: (u64, u64),
}

struct TableSeed<'a> {
    table: &'a mut RawTable,
}

impl<'de> DeserializeSeed<'de> for TableSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TableSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            self.table.current = Some(name.clone());
            if name == METADATA_KEY {
                if has_metadata {
                    return Err(A::Error::custom("__metadata__ twice"));
                }
                has_metadata = true;
                self.table.metadata = map.next_value::<Option<OrderedMap<String>>>()?.unwrap_or_default();
            } else {
                let entry = map.next_value::<RawEntry>()?;
                self.table.tensors.push((name, entry));
            }
            self.table.current = None;
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for RawEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntryVisitor)
    }
}

/// Written by hand because a derived one would also read arrays in place of objects.
struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = RawEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawEntry, A::Error> {
        let (mut dtype, mut shape, mut data_offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "dtype" => dtype.replace(parse_dtype(&map.next_value::<String>()?)?).is_some(),
                "shape" => shape.replace(map.next_value::<RawShape>()?).is_some(),
                "data_offsets" => data_offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                _ => return Err(A::Error::unknown_field(&key, &["dtype", "shape", "data_offsets"])),
            };
            if twice {
                return Err(A::Error::custom(format_args!("{key} twice")));
            }
        }
        Ok(RawEntry {
            dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
            data_offsets: data_offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?,
        })
    }
}

fn parse_dtype<E: serde::de::Error>(tag: &str) -> Result<Dtype, E> {
    dtype::from_tag(tag).ok_or_else(|| {
        let known: Vec<_> = dtype::DTYPES.iter().map(|row| row.tag).collect();
        E::custom(format_args!("dtype {tag:?}, not one of {}", known.join(", ")))
    })
}

/// A shape, bounded while it is read: a hostile header could otherwise hold fifty million dimensions.
struct RawShape(Vec<u64>);

impl<'de> Deserialize<'de> for RawShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor).map(RawShape)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        while let Some(dim) = seq.next_element()? {
            if shape.len() == MAX_RANK {
                return Err(A::Error::custom(format_args!("a shape of more than {MAX_RANK} dimensions")));
            }
            shape.push(dim);
        }
        Ok(shape)
    }
}
