//! jax-pickle: protocol 5, one dict of NumPy arrays to a file, which plain `pickle.load` reads.
//!
//! Data stands in the pickle at multiples of 64: before it, a padding of bytes is pushed and popped.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::{FileBuilder, FileLayout, Layout, Member, Placement, Tensor, fill_files, stored_shape};
use crate::dtype;
use crate::error::Result;
use crate::ordered_map::OrderedMap;

/// Data begins at multiples of this, so that it can be aliased where a file is mapped.
const ALIGNMENT: u64 = 64;

/// Opcodes of the pickle machine.
pub(crate) mod opcode {
    pub(crate) const MARK: u8 = b'(';
    pub(crate) const STOP: u8 = b'.';
    pub(crate) const POP: u8 = b'0';
    pub(crate) const BININT: u8 = b'J';
    pub(crate) const BININT1: u8 = b'K';
    pub(crate) const BININT2: u8 = b'M';
    pub(crate) const REDUCE: u8 = b'R';
    pub(crate) const BINUNICODE: u8 = b'X';
    pub(crate) const EMPTY_DICT: u8 = b'}';
    pub(crate) const EMPTY_TUPLE: u8 = b')';
    pub(crate) const SHORT_BINBYTES: u8 = b'C';
    pub(crate) const BINGET: u8 = b'h';
    pub(crate) const SETITEM: u8 = b's';
    pub(crate) const TUPLE: u8 = b't';
    pub(crate) const PROTO: u8 = 0x80;
    pub(crate) const TUPLE1: u8 = 0x85;
    pub(crate) const TUPLE3: u8 = 0x87;
    pub(crate) const LONG1: u8 = 0x8a;
    pub(crate) const SHORT_BINUNICODE: u8 = 0x8c;
    pub(crate) const STACK_GLOBAL: u8 = 0x93;
    pub(crate) const MEMOIZE: u8 = 0x94;
    pub(crate) const BYTEARRAY8: u8 = 0x96;
}

/// jax-pickle.
#[derive(Debug, Clone, Copy)]
pub struct Pickle;

impl Layout for Pickle {
    fn place(&self, tensors: &[Tensor<'_>], _: &dyn Fn(usize) -> u64, shard_bytes: u64) -> Result<Placement> {
        Ok(fill_files(tensors, shard_bytes, |number| format!("shard_{number:03}.pkl")))
    }

    fn file(&self, members: &[Member<'_>], _: &OrderedMap<String>) -> Result<FileLayout, String> {
        let mut text = vec![opcode::PROTO, 5];
        let mut memo = Memo::default();
        let array = memo.global(&mut text, "numpy", "ndarray");
        let make_dtype = memo.global(&mut text, "numpy", "dtype");
        let mut dtypes: BTreeMap<&str, u8> = BTreeMap::new();
        for Member { tensor, .. } in members {
            let name = dtype::name(tensor.dtype);
            if !dtypes.contains_key(name) {
                dtypes.insert(name, memo.dtype(&mut text, make_dtype, tensor.dtype));
            }
        }
        text.push(opcode::EMPTY_DICT);
        let mut file = FileBuilder::default();
        for (index, Member { tensor, data, .. }) in members.iter().enumerate() {
            if *data != (0..tensor.nbytes) {
                return Err(format!("a part of tensor {:?}, where pickle has whole ones", tensor.name));
            }
            write_str(&mut text, tensor.name)?;
            text.extend_from_slice(&[opcode::BINGET, array]);
            write_shape(&mut text, &stored_shape(tensor));
            text.extend_from_slice(&[opcode::BINGET, dtypes[dtype::name(tensor.dtype)]]);
            file.bytes(&text);
            file.bytes(&padding(file.nbytes));
            text.clear();
            text.push(opcode::BYTEARRAY8);
            text.extend_from_slice(&tensor.nbytes.to_le_bytes());
            file.bytes(&text);
            file.data(index, 0..tensor.nbytes);
            text.clear();
            text.extend_from_slice(&[opcode::TUPLE3, opcode::REDUCE, opcode::SETITEM]);
        }
        text.push(opcode::STOP);
        file.bytes(&text);
        Ok(file.finish())
    }
}

/// What pickles call again by a number.
#[derive(Default)]
struct Memo(u8);

impl Memo {
    /// Leaves what is on the stack in the memo.
    fn keep(&mut self, out: &mut Vec<u8>) -> u8 {
        out.extend_from_slice(&[opcode::MEMOIZE, opcode::POP]);
        self.0 += 1;
        self.0 - 1
    }

    fn global(&mut self, out: &mut Vec<u8>, module: &str, name: &str) -> u8 {
        write_global(out, module, name);
        self.keep(out)
    }

    /// A dtype: by its descriptor where NumPy has it, by its class in `ml_dtypes` elsewhere; packed ones are bytes.
    fn dtype(&mut self, out: &mut Vec<u8>, make_dtype: u8, dtype: Dtype) -> u8 {
        out.extend_from_slice(&[opcode::BINGET, make_dtype]);
        let row = dtype::info(dtype).expect("tensors have dtypes of the table");
        if dtype::is_of_numpy(dtype) || dtype::is_sub_byte(dtype) {
            write_str(out, row.npy_descr).expect("short");
        } else {
            write_global(out, "ml_dtypes", row.name);
        }
        out.extend_from_slice(&[opcode::TUPLE1, opcode::REDUCE]);
        self.keep(out)
    }
}

fn write_global(out: &mut Vec<u8>, module: &str, name: &str) {
    write_str(out, module).expect("short");
    write_str(out, name).expect("short");
    out.push(opcode::STACK_GLOBAL);
}

fn write_str(out: &mut Vec<u8>, text: &str) -> Result<(), String> {
    if let Ok(size) = u8::try_from(text.len()) {
        out.extend_from_slice(&[opcode::SHORT_BINUNICODE, size]);
    } else {
        let size = u32::try_from(text.len()).map_err(|_| format!("a name of {} bytes", text.len()))?;
        out.push(opcode::BINUNICODE);
        out.extend_from_slice(&size.to_le_bytes());
    }
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

fn write_shape(out: &mut Vec<u8>, shape: &[u64]) {
    if shape.is_empty() {
        out.push(opcode::EMPTY_TUPLE);
        return;
    }
    out.push(opcode::MARK);
    for &dim in shape {
        if let Ok(dim) = u8::try_from(dim) {
            out.extend_from_slice(&[opcode::BININT1, dim]);
        } else if let Ok(dim) = u16::try_from(dim) {
            out.push(opcode::BININT2);
            out.extend_from_slice(&dim.to_le_bytes());
        } else if let Ok(dim) = i32::try_from(dim) {
            out.push(opcode::BININT);
            out.extend_from_slice(&dim.to_le_bytes());
        } else {
            // Nine bytes: the highest bit is a sign.
            out.extend_from_slice(&[opcode::LONG1, 9]);
            out.extend_from_slice(&dim.to_le_bytes());
            out.push(0);
        }
    }
    out.push(opcode::TUPLE);
}

/// Bytes that are pushed and popped, so that data behind the opcode and the size of a bytearray is aligned.
fn padding(position: u64) -> Vec<u8> {
    const OPCODES: u64 = 3;
    let behind = position + OPCODES + 9;
    let count = behind.next_multiple_of(ALIGNMENT) - behind;
    let mut bytes = vec![opcode::SHORT_BINBYTES, u8::try_from(count).expect("below 64")];
    bytes.resize(bytes.len() + usize::from(bytes[1]), 0);
    bytes.push(opcode::POP);
    bytes
}
