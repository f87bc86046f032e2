//! Pickles of NumPy and JAX arrays in dicts, protocols 3 to 5: a machine that knows how these are put together, calls
//! nothing and refuses everything else.

use std::collections::HashMap;

use safetensors::Dtype;

use super::scanner::Scanner;
use super::{Array, Budget, MAX_DEPTH, Node, dtype_of};
use crate::dtype;
use crate::error::{Error, Result};
use crate::output::pickle::opcode as op;

/// Most objects of a pickle.
const MAX_OBJECTS: usize = 1 << 24;

/// Number of an object: pickles change objects that they mention elsewhere.
type Id = usize;

/// What a pickle can make.
#[derive(Debug, Clone)]
enum Object {
    None,
    Bool(bool),
    Int(i128),
    Text(String),
    /// Offset and size.
    Bytes(u64, u64),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or a function: module and name.
    Global(String, String),
    /// A dtype, or the name of one that checkpoints have not.
    Dtype(Result<Dtype, String>),
    /// An array before its state is set.
    Blank,
    Array(Array),
    /// A float, a set: what no checkpoint has, in words.
    Other(&'static str),
}

struct Machine<'s, 'a> {
    scanner: &'s mut Scanner<'a>,
    objects: Vec<Object>,
    stack: Vec<Id>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

/// Opcodes that only reading needs.
mod more {
    pub(super) const POP_MARK: u8 = b'1';
    pub(super) const NONE: u8 = b'N';
    pub(super) const BINBYTES: u8 = b'B';
    pub(super) const BINFLOAT: u8 = b'G';
    pub(super) const APPEND: u8 = b'a';
    pub(super) const BUILD: u8 = b'b';
    pub(super) const GLOBAL: u8 = b'c';
    pub(super) const APPENDS: u8 = b'e';
    pub(super) const LONG_BINGET: u8 = b'j';
    pub(super) const EMPTY_LIST: u8 = b']';
    pub(super) const BINPUT: u8 = b'q';
    pub(super) const LONG_BINPUT: u8 = b'r';
    pub(super) const SETITEMS: u8 = b'u';
    pub(super) const TUPLE2: u8 = 0x86;
    pub(super) const NEWTRUE: u8 = 0x88;
    pub(super) const NEWFALSE: u8 = 0x89;
    pub(super) const BINUNICODE8: u8 = 0x8d;
    pub(super) const BINBYTES8: u8 = 0x8e;
    pub(super) const FRAME: u8 = 0x95;
}

pub(super) fn parse(scanner: &mut Scanner<'_>) -> Result<Node> {
    let mut machine =
        Machine { scanner, objects: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    while machine.step()? {}
    let root = machine.pop()?;
    if machine.scanner.left() > 0 {
        let left = machine.scanner.left();
        return Err(machine.fault(format_args!("{left} bytes after the end"), "one pickle"));
    }
    let mut budget = Budget::of(machine.scanner.nbytes());
    machine.node(root, 0, 0, &mut budget)
}

impl Machine<'_, '_> {
    fn fault(&self, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        self.scanner.fault(found, expected)
    }

    fn push(&mut self, object: Object) -> Result<()> {
        if self.objects.len() == MAX_OBJECTS {
            return Err(self.fault(format_args!("more than {MAX_OBJECTS} objects"), "fewer"));
        }
        self.stack.push(self.objects.len());
        self.objects.push(object);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.fault("a value that is not there", "a whole pickle"));
        }
        Ok(self.stack.pop().expect("higher than its floor"))
    }

    /// What lies above the last mark, which goes.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let Some(mark) = self.marks.pop() else {
            return Err(self.fault("a mark that is not there", "a whole pickle"));
        };
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<Id> {
        let id = self.pop()?;
        self.stack.push(id);
        Ok(id)
    }

    fn tuple(&mut self, count: usize) -> Result<()> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Object::Tuple(items))
    }

    /// Does what the next opcode says; false at the end.
    fn step(&mut self) -> Result<bool> {
        let opcode = self.scanner.byte()?;
        if [self.stack.len(), self.marks.len(), self.memo.len()].into_iter().any(|count| count > MAX_OBJECTS) {
            return Err(self.fault(format_args!("more than {MAX_OBJECTS} values"), "fewer"));
        }
        match opcode {
            op::STOP => return Ok(false),
            op::PROTO => {
                let protocol = self.scanner.byte()?;
                if !(3..=5).contains(&protocol) {
                    return Err(self.fault(format_args!("protocol {protocol}"), "protocol 3, 4 or 5"));
                }
            }
            more::FRAME => {
                self.scanner.little_endian::<8>()?;
            }
            op::MARK => self.marks.push(self.stack.len()),
            op::POP => {
                // Python pops a mark where there is nothing above it.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            more::POP_MARK => {
                self.pop_mark()?;
            }
            op::TUPLE => {
                let items = self.pop_mark()?;
                self.push(Object::Tuple(items))?;
            }
            op::EMPTY_TUPLE => self.push(Object::Tuple(Vec::new()))?,
            op::TUPLE1 => self.tuple(1)?,
            more::TUPLE2 => self.tuple(2)?,
            op::TUPLE3 => self.tuple(3)?,
            op::EMPTY_DICT => self.push(Object::Dict(Vec::new()))?,
            more::EMPTY_LIST => self.push(Object::List(Vec::new()))?,
            op::SETITEM => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            more::SETITEMS => {
                let items = self.pop_mark()?;
                self.set_items(&items)?;
            }
            more::APPEND => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            more::APPENDS => {
                let items = self.pop_mark()?;
                self.append(&items)?;
            }
            op::MEMOIZE => {
                let id = self.top()?;
                self.memo.insert(self.memo.len() as u64, id);
            }
            more::BINPUT | more::LONG_BINPUT => {
                let number = self.number(opcode == more::BINPUT)?;
                let id = self.top()?;
                self.memo.insert(number, id);
            }
            op::BINGET | more::LONG_BINGET => {
                let number = self.number(opcode == op::BINGET)?;
                let Some(&id) = self.memo.get(&number) else {
                    return Err(self.fault(format_args!("memo {number}, which is not set"), "a whole pickle"));
                };
                self.stack.push(id);
            }
            more::GLOBAL => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(module, name))?;
            }
            op::STACK_GLOBAL => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Object::Text(module), Object::Text(name)) = (&self.objects[module], &self.objects[name]) else {
                    return Err(self.fault("a class without a name", "a whole pickle"));
                };
                let global = Object::Global(module.clone(), name.clone());
                self.push(global)?;
            }
            op::REDUCE => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let made = self.call(function, arguments)?;
                self.push(made)?;
            }
            more::BUILD => {
                let (state, id) = (self.pop()?, self.top()?);
                self.build(id, state)?;
            }
            _ => self.push_value(opcode)?,
        }
        Ok(true)
    }

    /// Pushes what an opcode stands for by itself.
    fn push_value(&mut self, opcode: u8) -> Result<()> {
        let object = match opcode {
            more::NONE => Object::None,
            more::NEWTRUE => Object::Bool(true),
            more::NEWFALSE => Object::Bool(false),
            op::BININT => {
                let value = self.scanner.little_endian::<4>()?;
                // The bits of a signed number.
                Object::Int(i128::from(u32::try_from(value).expect("four bytes").cast_signed()))
            }
            op::BININT1 => Object::Int(self.scanner.little_endian::<1>()?.into()),
            op::BININT2 => Object::Int(self.scanner.little_endian::<2>()?.into()),
            op::LONG1 => self.long()?,
            more::BINFLOAT => {
                self.scanner.skip(8)?;
                Object::Other("a float")
            }
            op::SHORT_BINUNICODE | op::BINUNICODE | more::BINUNICODE8 => {
                let size = self.size(opcode, [op::SHORT_BINUNICODE, op::BINUNICODE])?;
                Object::Text(self.scanner.text(size)?)
            }
            op::SHORT_BINBYTES | more::BINBYTES | more::BINBYTES8 | op::BYTEARRAY8 => {
                let size = self.size(opcode, [op::SHORT_BINBYTES, more::BINBYTES])?;
                let (offset, nbytes) = self.scanner.skip(size)?;
                Object::Bytes(offset, nbytes)
            }
            _ => {
                return Err(
                    self.fault(format_args!("opcode {opcode:#04x}"), "a pickle of arrays of NumPy or JAX in dicts")
                );
            }
        };
        self.push(object)
    }

    /// The size that follows one of three opcodes, in 1, 4 or 8 bytes.
    fn size(&mut self, opcode: u8, [short, middle]: [u8; 2]) -> Result<u64> {
        if opcode == short {
            self.scanner.little_endian::<1>()
        } else if opcode == middle {
            self.scanner.little_endian::<4>()
        } else {
            self.scanner.little_endian::<8>()
        }
    }

    fn number(&mut self, is_short: bool) -> Result<u64> {
        if is_short { self.scanner.little_endian::<1>() } else { self.scanner.little_endian::<4>() }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        loop {
            match self.scanner.byte()? {
                b'\n' => break,
                byte if line.len() < 256 => line.push(byte),
                _ => return Err(self.fault("a name of more than 256 bytes", "the name of a class")),
            }
        }
        String::from_utf8(line).map_err(|_| self.fault("a text that is not UTF-8", "UTF-8"))
    }

    /// A number of up to 15 bytes, the highest bit of which is its sign.
    fn long(&mut self) -> Result<Object> {
        let count = self.scanner.byte()?;
        if count > 15 {
            return Err(self.fault(format_args!("a number of {count} bytes"), "at most 15"));
        }
        let bytes = self.scanner.bytes(count.into())?;
        let magnitude = bytes.iter().rev().fold(0i128, |value, &byte| value << 8 | i128::from(byte));
        let is_negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
        Ok(Object::Int(if is_negative { magnitude - (1i128 << (8 * u32::from(count))) } else { magnitude }))
    }

    fn set_items(&mut self, items: &[Id]) -> Result<()> {
        let dict = self.top()?;
        let Object::Dict(entries) = &mut self.objects[dict] else {
            return Err(self.fault("items of what is no dict", "dicts of arrays"));
        };
        let (pairs, rest) = items.as_chunks::<2>();
        entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        if rest.is_empty() { Ok(()) } else { Err(self.fault("a key without a value", "a whole pickle")) }
    }

    fn append(&mut self, items: &[Id]) -> Result<()> {
        let list = self.top()?;
        let Object::List(held) = &mut self.objects[list] else {
            return Err(self.fault("items of what is no list", "dicts of arrays"));
        };
        held.extend_from_slice(items);
        Ok(())
    }

    /// What calling a function would make, for the few that arrays are made with.
    fn call(&self, function: Id, arguments: Id) -> Result<Object> {
        let Object::Global(module, name) = &self.objects[function] else {
            return Err(self.fault("a call of what is no function", "arrays in dicts"));
        };
        let Object::Tuple(arguments) = &self.objects[arguments] else {
            return Err(self.fault("a call without arguments", "arrays in dicts"));
        };
        let of_numpy = |names: [&str; 2]| names.contains(&module.as_str());
        let made = match (name.as_str(), arguments.as_slice()) {
            ("OrderedDict", []) if module == "collections" => Some(Object::Dict(Vec::new())),
            ("dtype", [kind, ..]) if module == "numpy" => self.dtype_named(*kind).map(Object::Dtype),
            ("ndarray", &[shape, dtype, data]) if module == "numpy" => self.array(shape, dtype, data)?,
            ("_frombuffer", &[data, dtype, shape, order, ..])
                if of_numpy(["numpy._core.numeric", "numpy.core.numeric"]) =>
            {
                self.check_order(matches!(&self.objects[order], Object::Text(order) if order == "C"))?;
                self.array(shape, dtype, data)?
            }
            ("_reconstruct", _) if of_numpy(["numpy._core.multiarray", "numpy.core.multiarray"]) => Some(Object::Blank),
            ("scalar", &[dtype, data]) if of_numpy(["numpy._core.multiarray", "numpy.core.multiarray"]) => {
                self.array_of(Vec::new(), dtype, data)?
            }
            ("_reconstruct_array", &[function, arguments, state, _]) if module == "jax._src.array" => {
                Some(self.built(self.call(function, arguments)?, state)?)
            }
            _ => None,
        };
        made.ok_or_else(|| {
            self.fault(format_args!("a call of {module}.{name}, which is not made"), "arrays of NumPy or JAX in dicts")
        })
    }

    fn build(&mut self, id: Id, state: Id) -> Result<()> {
        self.objects[id] = self.built(self.objects[id].clone(), state)?;
        Ok(())
    }

    /// An object with its state set.
    fn built(&self, object: Object, state: Id) -> Result<Object> {
        let expected = "arrays of NumPy or JAX in dicts";
        let Object::Tuple(state) = &self.objects[state] else {
            return Err(self.fault("another state of an object", expected));
        };
        match (object, state.as_slice()) {
            (Object::Dtype(dtype), &[_, order, ..]) => match &self.objects[order] {
                Object::Text(order) if ["<", "|", "="].contains(&order.as_str()) => Ok(Object::Dtype(dtype)),
                _ => Err(self.fault("values whose highest byte comes first", "the lowest byte first")),
            },
            (Object::Blank, &[_, shape, dtype, is_fortran, data]) => {
                self.check_order(matches!(self.objects[is_fortran], Object::Bool(false)))?;
                self.array(shape, dtype, data)?.ok_or_else(|| self.fault("another state of an array", expected))
            }
            _ => Err(self.fault("another state of an object", expected)),
        }
    }

    fn check_order(&self, is_row_major: bool) -> Result<()> {
        if is_row_major {
            return Ok(());
        }
        Err(self.fault("an array whose rows do not follow each other (Fortran order)", "arrays in C order"))
    }

    /// The dtype of a descriptor such as `<f4`, or of a class of `ml_dtypes`; the name of what is not known.
    fn dtype_named(&self, kind: Id) -> Option<Result<Dtype, String>> {
        let name = match &self.objects[kind] {
            Object::Text(text) => {
                let code = text.trim_start_matches(['<', '|', '=']);
                let row = dtype::DTYPES.iter().find(|row| row.npy_descr[1..] == *code && dtype::is_of_numpy(row.dtype));
                return Some(row.map(|row| row.dtype).ok_or_else(|| text.clone()));
            }
            Object::Global(module, name) if ["ml_dtypes", "jax.numpy", "numpy"].contains(&module.as_str()) => name,
            _ => return None,
        };
        Some(dtype_of(name).ok_or_else(|| name.clone()))
    }

    fn array(&self, shape: Id, dtype: Id, data: Id) -> Result<Option<Object>> {
        let Object::Tuple(dims) = &self.objects[shape] else { return Ok(None) };
        let dim = |&id: &Id| if let Object::Int(dim) = self.objects[id] { u64::try_from(dim).ok() } else { None };
        let Some(shape) = dims.iter().map(dim).collect() else { return Ok(None) };
        self.array_of(shape, dtype, data)
    }

    fn array_of(&self, shape: Vec<u64>, dtype: Id, data: Id) -> Result<Option<Object>> {
        match (&self.objects[dtype], &self.objects[data]) {
            (Object::Dtype(Ok(dtype)), &Object::Bytes(offset, nbytes)) => {
                Ok(Some(Object::Array(Array { dtype: *dtype, shape, parts: vec![(offset, nbytes)] })))
            }
            (Object::Dtype(Err(name)), _) => {
                Err(self.fault(format_args!("dtype {name:?}"), "one that safetensors has"))
            }
            _ => Ok(None),
        }
    }

    /// The tree under an object, whose name has so many bytes. A pickle can mention one dict many times.
    fn node(&self, id: Id, depth: usize, name_bytes: usize, budget: &mut Budget) -> Result<Node> {
        if depth > MAX_DEPTH {
            return Err(self.fault(format_args!("more than {MAX_DEPTH} dicts within each other"), "fewer"));
        }
        budget.spend(name_bytes).map_err(|found| self.fault(found, Budget::EXPECTED))?;
        Ok(match &self.objects[id] {
            Object::Array(array) => Node::Array(array.clone()),
            Object::Dict(entries) => {
                let entries = entries.iter().map(|&(key, value)| {
                    let key = match &self.objects[key] {
                        Object::Text(key) => key.clone(),
                        Object::Int(key) => key.to_string(),
                        _ => return Err(self.fault("a key that is no text", "dicts with texts for keys")),
                    };
                    let name_bytes = name_bytes + key.len() + 1;
                    Ok((key, self.node(value, depth + 1, name_bytes, budget)?))
                });
                Node::Map(entries.collect::<Result<_>>()?)
            }
            Object::None => Node::Other("None".into()),
            Object::Bool(_) => Node::Other("a truth value".into()),
            Object::Int(_) => Node::Other("a number".into()),
            Object::Text(_) | Object::Bytes(..) => Node::Other("a text or bytes".into()),
            Object::Tuple(_) | Object::List(_) => Node::Other("a list or a tuple".into()),
            Object::Global(module, name) => Node::Other(format!("{module}.{name}")),
            Object::Dtype(_) | Object::Blank => Node::Other("a part of an array".into()),
            Object::Other(what) => Node::Other((*what).into()),
        })
    }
}
