//! msgpack in Flax's convention: maps of maps of arrays, an array being an extension of type 1 with shape, dtype and
//! bytes; large ones are maps of chunks.

use super::scanner::Scanner;
use super::{Array, MAX_DEPTH, Node, dtype_of};
use crate::error::Result;
use crate::output::msgpack::{ARRAY_TYPE, CHUNKED_KEY};

/// The extension type of a NumPy scalar in Flax.
const SCALAR_TYPE: u8 = 3;

/// A value, before maps of chunks are told from maps of arrays.
enum Value {
    Array(Array),
    Map(Vec<(String, Value)>),
    Uint(u64),
    Other(&'static str),
}

pub(super) fn parse(scanner: &mut Scanner<'_>) -> Result<Node> {
    let value = read(scanner, 0)?;
    if scanner.left() > 0 {
        return Err(scanner.fault(format_args!("{} bytes after the map", scanner.left()), "an end"));
    }
    node(scanner, value)
}

fn read(scanner: &mut Scanner<'_>, depth: usize) -> Result<Value> {
    let marker = scanner.byte()?;
    Ok(match marker {
        0x00..=0x7f => Value::Uint(u64::from(marker)),
        0xcc => Value::Uint(scanner.big_endian::<1>()?),
        0xcd => Value::Uint(scanner.big_endian::<2>()?),
        0xce => Value::Uint(scanner.big_endian::<4>()?),
        0xcf => Value::Uint(scanner.big_endian::<8>()?),
        0x80..=0x8f => map(scanner, u64::from(marker & 0xf), depth)?,
        0xde => {
            let count = scanner.big_endian::<2>()?;
            map(scanner, count, depth)?
        }
        0xdf => {
            let count = scanner.big_endian::<4>()?;
            map(scanner, count, depth)?
        }
        0xd4..=0xd8 => extension(scanner, 1 << (marker - 0xd4))?,
        0xc7 => {
            let size = scanner.big_endian::<1>()?;
            extension(scanner, size)?
        }
        0xc8 => {
            let size = scanner.big_endian::<2>()?;
            extension(scanner, size)?
        }
        0xc9 => {
            let size = scanner.big_endian::<4>()?;
            extension(scanner, size)?
        }
        _ => other(scanner, marker)?,
    })
}

/// What is no array: skipped where chunks have it, and else a fault as soon as it has a name.
fn other(scanner: &mut Scanner<'_>, marker: u8) -> Result<Value> {
    let (size, what) = match marker {
        0xc0 => (0, "nil"),
        0xc2 | 0xc3 => (0, "a truth value"),
        0xca => (4, "a number"),
        0xcb => (8, "a number"),
        0xe0..=0xff => (0, "a number"),
        0xd0..=0xd3 => (1 << (marker - 0xd0), "a number"),
        0xa0..=0xbf => (u64::from(marker & 0x1f), "a text"),
        0xd9 | 0xc4 => (scanner.big_endian::<1>()?, "a text or bytes"),
        0xda | 0xc5 => (scanner.big_endian::<2>()?, "a text or bytes"),
        0xdb | 0xc6 => (scanner.big_endian::<4>()?, "a text or bytes"),
        0x90..=0x9f | 0xdc | 0xdd => return Err(scanner.fault("a list", "maps of arrays")),
        _ => return Err(scanner.fault(format_args!("byte {marker:#04x}"), "msgpack")),
    };
    scanner.skip(size)?;
    Ok(Value::Other(what))
}

fn map(scanner: &mut Scanner<'_>, count: u64, depth: usize) -> Result<Value> {
    if depth == MAX_DEPTH {
        return Err(scanner.fault(format_args!("more than {MAX_DEPTH} maps within each other"), "fewer"));
    }
    // An entry has two bytes at least: a count that lies costs no memory.
    if count > scanner.left() / 2 {
        return Err(scanner.fault(format_args!("a map of {count} entries"), "no more than fit into the file"));
    }
    let mut entries = Vec::new();
    for _ in 0..count {
        let key = text(scanner)?;
        entries.push((key, read(scanner, depth + 1)?));
    }
    Ok(Value::Map(entries))
}

fn text(scanner: &mut Scanner<'_>) -> Result<String> {
    let size = match scanner.byte()? {
        marker @ 0xa0..=0xbf => u64::from(marker & 0x1f),
        0xd9 => scanner.big_endian::<1>()?,
        0xda => scanner.big_endian::<2>()?,
        0xdb => scanner.big_endian::<4>()?,
        marker => return Err(scanner.fault(format_args!("byte {marker:#04x}"), "a text")),
    };
    scanner.text(size)
}

fn extension(scanner: &mut Scanner<'_>, size: u64) -> Result<Value> {
    let kind = scanner.byte()?;
    if ![ARRAY_TYPE, SCALAR_TYPE].contains(&kind) {
        scanner.skip(size)?;
        return Ok(Value::Other("an extension that is no array"));
    }
    let begin = scanner.position();
    let expected = "an array: shape, dtype and bytes";
    if array_length(scanner)? != 3 {
        return Err(scanner.fault("another list", expected));
    }
    let rank = array_length(scanner)?;
    let mut shape = Vec::new();
    for _ in 0..rank {
        match read(scanner, MAX_DEPTH)? {
            Value::Uint(dim) => shape.push(dim),
            _ => return Err(scanner.fault("a dimension that is no number", expected)),
        }
    }
    let name = text(scanner)?;
    let dtype = dtype_of(&name).ok_or_else(|| scanner.fault(format_args!("dtype {name:?}"), "the name of a dtype"))?;
    let nbytes = match scanner.byte()? {
        0xc4 => scanner.big_endian::<1>()?,
        0xc5 => scanner.big_endian::<2>()?,
        0xc6 => scanner.big_endian::<4>()?,
        marker => return Err(scanner.fault(format_args!("byte {marker:#04x}"), "bytes")),
    };
    let data = scanner.skip(nbytes)?;
    if scanner.position() - begin != size {
        return Err(scanner.fault("an array that does not fill its extension", expected));
    }
    Ok(Value::Array(Array { dtype, shape, parts: vec![data] }))
}

fn array_length(scanner: &mut Scanner<'_>) -> Result<u64> {
    match scanner.byte()? {
        marker @ 0x90..=0x9f => Ok(u64::from(marker & 0xf)),
        0xdc => scanner.big_endian::<2>(),
        marker => Err(scanner.fault(format_args!("byte {marker:#04x}"), "a list")),
    }
}

/// The value with its chunks joined.
fn node(scanner: &Scanner<'_>, value: Value) -> Result<Node> {
    Ok(match value {
        Value::Array(array) => Node::Array(array),
        Value::Uint(_) => Node::Other("a number".into()),
        Value::Other(what) => Node::Other(what.into()),
        Value::Map(entries) if entries.iter().any(|(key, _)| key == CHUNKED_KEY) => {
            Node::Array(joined(entries).ok_or_else(|| scanner.fault("a map of chunks", "the chunks of one array"))?)
        }
        Value::Map(entries) => {
            let nodes = entries.into_iter().map(|(key, value)| Ok((key, node(scanner, value)?)));
            Node::Map(nodes.collect::<Result<_>>()?)
        }
    })
}

/// One array of the chunks of a map; None where they are not those of one.
fn joined(entries: Vec<(String, Value)>) -> Option<Array> {
    let (mut shape, mut chunks) = (None, None);
    for (key, value) in entries {
        match (key.as_str(), value) {
            ("shape", value) => shape = Some(numbered(value)?),
            ("chunks", value) => chunks = Some(numbered(value)?),
            (CHUNKED_KEY, _) => {}
            _ => return None,
        }
    }
    let is_dim = |value| if let Value::Uint(dim) = value { Some(dim) } else { None };
    let shape = shape?.into_iter().map(is_dim).collect::<Option<Vec<_>>>()?;
    let mut whole: Option<Array> = None;
    for chunk in chunks? {
        let Value::Array(chunk) = chunk else { return None };
        match &mut whole {
            None => whole = Some(Array { shape: shape.clone(), ..chunk }),
            Some(whole) if whole.dtype == chunk.dtype => whole.parts.extend(chunk.parts),
            Some(_) => return None,
        }
    }
    whole
}

/// The values of a map whose keys are 0, 1 and so on.
fn numbered(value: Value) -> Option<Vec<Value>> {
    let Value::Map(entries) = value else { return None };
    let mut values: Vec<_> =
        entries.into_iter().map(|(key, value)| Some((key.parse::<usize>().ok()?, value))).collect::<Option<_>>()?;
    values.sort_by_key(|(number, _)| *number);
    let is_complete = values.iter().enumerate().all(|(index, (number, _))| index == *number);
    is_complete.then(|| values.into_iter().map(|(_, value)| value).collect())
}
