//! msgpack in Flax's convention, byte for byte what `flax.serialization.msgpack_serialize({name: array})` makes.

use safetensors::Dtype;

use super::{FileBuilder, FileLayout, Layout, Member, Placement, Tensor, fill_files, refuse_name, stored_shape};
use crate::dtype;
use crate::error::Result;
use crate::ordered_map::OrderedMap;

/// Flax divides larger arrays into chunks of this size, for msgpack has no larger objects.
pub(crate) const MAX_CHUNK_BYTES: u64 = 1 << 30;

/// The extension type of an array in Flax.
pub(crate) const ARRAY_TYPE: u8 = 1;

/// The key that marks a map as the chunks of an array.
pub(crate) const CHUNKED_KEY: &str = "__msgpack_chunked_array__";

/// msgpack.
#[derive(Debug, Clone, Copy)]
pub struct Msgpack;

impl Layout for Msgpack {
    fn place(&self, tensors: &[Tensor<'_>], _: &dyn Fn(usize) -> u64, shard_bytes: u64) -> Result<Placement> {
        refuse_name(tensors, CHUNKED_KEY, "the chunks of an array")?;
        Ok(fill_files(tensors, shard_bytes, |number| format!("shard_{number:03}.msgpack")))
    }

    fn file(&self, members: &[Member<'_>], _: &OrderedMap<String>) -> Result<FileLayout, String> {
        let mut file = FileBuilder::default();
        let mut text = Vec::new();
        write_map(&mut text, length(members.len())?);
        for (index, Member { tensor, data, .. }) in members.iter().enumerate() {
            if *data != (0..tensor.nbytes) {
                return Err(format!("a part of tensor {:?}, where msgpack has whole ones", tensor.name));
            }
            write_str(&mut text, tensor.name)?;
            let dtype = stored_dtype(tensor.dtype);
            let shape = stored_shape(tensor);
            if tensor.nbytes <= MAX_CHUNK_BYTES {
                write_array_head(&mut text, &shape, dtype, tensor.nbytes)?;
                file.bytes(&std::mem::take(&mut text));
                file.data(index, 0..tensor.nbytes);
                continue;
            }
            write_map(&mut text, 3);
            write_str(&mut text, CHUNKED_KEY)?;
            text.push(0xc3); // true
            write_str(&mut text, "shape")?;
            write_map(&mut text, length(shape.len())?);
            for (axis, &dim) in shape.iter().enumerate() {
                write_str(&mut text, &axis.to_string())?;
                write_uint(&mut text, dim);
            }
            write_str(&mut text, "chunks")?;
            let chunks = tensor.nbytes.div_ceil(MAX_CHUNK_BYTES);
            write_map(&mut text, u32::try_from(chunks).map_err(|_| "too many chunks")?);
            let element = tensor.nbytes / shape.iter().product::<u64>().max(1);
            for chunk in 0..chunks {
                let start = chunk * MAX_CHUNK_BYTES;
                let end = (start + MAX_CHUNK_BYTES).min(tensor.nbytes);
                write_str(&mut text, &chunk.to_string())?;
                write_array_head(&mut text, &[(end - start) / element], dtype, end - start)?;
                file.bytes(&std::mem::take(&mut text));
                file.data(index, start..end);
            }
        }
        file.bytes(&text);
        Ok(file.finish())
    }
}

/// The dtype under which arrays are stored: packed float4 and float6 are bytes.
fn stored_dtype(dtype: Dtype) -> &'static str {
    dtype::name(if dtype::is_sub_byte(dtype) { Dtype::U8 } else { dtype })
}

/// An array up to its data: an extension with the shape, the dtype's name and the head of the bytes.
fn write_array_head(out: &mut Vec<u8>, shape: &[u64], dtype: &str, nbytes: u64) -> Result<(), String> {
    let nbytes = u32::try_from(nbytes).expect("chunks are below 2^30 bytes");
    let mut payload = Vec::new();
    write_array(&mut payload, 3);
    write_array(&mut payload, length(shape.len())?);
    for &dim in shape {
        write_uint(&mut payload, dim);
    }
    write_str(&mut payload, dtype)?;
    write_sized(&mut payload, [0xc4, 0xc5, 0xc6], nbytes);
    let size = u32::try_from(payload.len()).expect("64 dimensions and a name") + nbytes;
    match size {
        1 | 2 | 4 | 8 | 16 => out.push(0xd4 + u8::try_from(size.trailing_zeros()).expect("4 at most")),
        _ => write_sized(out, [0xc7, 0xc8, 0xc9], size),
    }
    out.push(ARRAY_TYPE);
    out.extend_from_slice(&payload);
    Ok(())
}

fn length(count: usize) -> Result<u32, String> {
    u32::try_from(count).map_err(|_| format!("{count} tensors, of which a msgpack map holds 2^32 - 1"))
}

/// The shortest of three markers with a size of 1, 2 or 4 bytes.
fn write_sized(out: &mut Vec<u8>, [short, middle, long]: [u8; 3], size: u32) {
    if let Ok(size) = u8::try_from(size) {
        out.extend_from_slice(&[short, size]);
    } else if let Ok(size) = u16::try_from(size) {
        out.push(middle);
        out.extend_from_slice(&size.to_be_bytes());
    } else {
        out.push(long);
        out.extend_from_slice(&size.to_be_bytes());
    }
}

/// A map or an array: one marker with a size below 16, or one of two with a size of 2 or 4 bytes.
fn write_collection(out: &mut Vec<u8>, fixed: u8, [middle, long]: [u8; 2], size: u32) {
    match (u8::try_from(size), u16::try_from(size)) {
        (Ok(size), _) if size < 16 => out.push(fixed | size),
        (_, Ok(size)) => {
            out.push(middle);
            out.extend_from_slice(&size.to_be_bytes());
        }
        _ => {
            out.push(long);
            out.extend_from_slice(&size.to_be_bytes());
        }
    }
}

fn write_map(out: &mut Vec<u8>, size: u32) {
    write_collection(out, 0x80, [0xde, 0xdf], size);
}

fn write_array(out: &mut Vec<u8>, size: u32) {
    write_collection(out, 0x90, [0xdc, 0xdd], size);
}

fn write_str(out: &mut Vec<u8>, text: &str) -> Result<(), String> {
    let size = u32::try_from(text.len()).map_err(|_| format!("a name of {} bytes", text.len()))?;
    match u8::try_from(size) {
        Ok(size) if size < 32 => out.push(0xa0 | size),
        _ => write_sized(out, [0xd9, 0xda, 0xdb], size),
    }
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

fn write_uint(out: &mut Vec<u8>, value: u64) {
    if let Ok(value) = u8::try_from(value) {
        if value >= 128 {
            out.push(0xcc);
        }
        out.push(value);
    } else if let Ok(value) = u16::try_from(value) {
        out.push(0xcd);
        out.extend_from_slice(&value.to_be_bytes());
    } else if let Ok(value) = u32::try_from(value) {
        out.push(0xce);
        out.extend_from_slice(&value.to_be_bytes());
    } else {
        out.push(0xcf);
        out.extend_from_slice(&value.to_be_bytes());
    }
}
