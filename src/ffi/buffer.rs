//! Arguments and results of a call as slices, checked.
#![expect(unsafe_code, reason = "makes slices of what XLA's structs say of its memory")]

use std::ffi::c_int;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::slice;

use super::abi;
use super::error::{FfiError, Result};

/// A dtype as XLA numbers it: `XLA_FFI_DataType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DType(c_int);

impl DType {
    /// int32.
    pub const S32: Self = Self(4);
    /// int64.
    pub const S64: Self = Self(5);
    /// uint8.
    pub const U8: Self = Self(6);
    /// uint32.
    pub const U32: Self = Self(8);
    /// float32.
    pub const F32: Self = Self(11);
    /// bfloat16.
    pub const BF16: Self = Self(16);

    /// JAX's name and the bytes of an element, of those dtypes whose elements XLA stores in whole bytes.
    fn known(self) -> Option<(&'static str, usize)> {
        Some(match self.0 {
            1 => ("bool", 1),
            2 => ("int8", 1),
            3 => ("int16", 2),
            4 => ("int32", 4),
            5 => ("int64", 8),
            6 => ("uint8", 1),
            7 => ("uint16", 2),
            8 => ("uint32", 4),
            9 => ("uint64", 8),
            10 => ("float16", 2),
            11 => ("float32", 4),
            12 => ("float64", 8),
            15 => ("complex64", 8),
            16 => ("bfloat16", 2),
            18 => ("complex128", 16),
            19 => ("float8_e5m2", 1),
            20 => ("float8_e4m3fn", 1),
            33 => ("float8_e8m0fnu", 1),
            _ => return None,
        })
    }
}

impl From<c_int> for DType {
    fn from(number: c_int) -> Self {
        Self(number)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "dtype {} of XLA", self.0),
        }
    }
}

/// A Rust type that an array's elements are read and written as.
///
/// # Safety
/// Any bits are a value of it, and it is as large as XLA's elements of the dtype.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The dtype whose elements these are.
    const DTYPE: DType;
}

// SAFETY: integers and floats take any bits, and are as large as their names say.
unsafe impl Element for i32 {
    const DTYPE: DType = DType::S32;
}
// SAFETY: as above.
unsafe impl Element for i64 {
    const DTYPE: DType = DType::S64;
}
// SAFETY: as above.
unsafe impl Element for u8 {
    const DTYPE: DType = DType::U8;
}
// SAFETY: as above.
unsafe impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
// SAFETY: as above.
unsafe impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
/// The bits of a bfloat16.
// SAFETY: as above; a bfloat16 has two bytes.
unsafe impl Element for u16 {
    const DTYPE: DType = DType::BF16;
}

/// Which array of a call, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Argument(usize),
    Result(usize),
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument(index) => write!(f, "argument {index}"),
            Self::Result(index) => write!(f, "result {index}"),
        }
    }
}

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
pub struct Buffer<'a> {
    which: Which,
    dtype: DType,
    data: *mut u8,
    dims: &'a [i64],
    len: usize,
}

impl<'a> Buffer<'a> {
    /// Checks what a struct of XLA says of an array.
    ///
    /// # Safety
    /// `buffer` is null or points to a struct which is, with its `dims`, valid and unchanged for `'a`. `data` points to
    /// elements that make up the array if that is not null: memory that nobody writes for `'a`, but through the one
    /// [`BufferMut`] made of this struct.
    pub(super) unsafe fn new(which: Which, buffer: *const abi::Buffer) -> Result<Self> {
        // SAFETY: by this function's condition.
        let Some(buffer) = (unsafe { buffer.as_ref() }) else {
            return Err(FfiError::internal(format!("{which}: found no buffer")));
        };
        // SAFETY: `dims` has `rank` elements, by this function's condition.
        let dims = unsafe { list(buffer.dims, buffer.rank) }
            .ok_or_else(|| FfiError::internal(format!("{which}: found rank {} without dims", buffer.rank)))?;
        let fault = |expected| FfiError::invalid_argument(which, format!("dims {dims:?}"), expected);
        if dims.iter().any(|&dim| usize::try_from(dim).is_err()) {
            return Err(fault("none below 0"));
        }
        let len =
            if dims.contains(&0) { Some(0) } else { dims.iter().try_fold(1, |len: i64, &dim| len.checked_mul(dim)) };
        let len = len.and_then(|len| usize::try_from(len).ok()).ok_or_else(|| fault("a product that fits an int64"))?;
        if buffer.data.is_null() && len > 0 {
            return Err(FfiError::invalid_argument(which, "no memory", format!("{len} elements")));
        }
        Ok(Self { which, dtype: DType(buffer.dtype), data: buffer.data.cast(), dims, len })
    }

    /// The dtype.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The size of each axis; none is below 0.
    #[must_use]
    pub fn dims(&self) -> &'a [i64] {
        self.dims
    }

    /// The size of each axis, if there are `N`.
    pub fn shape<const N: usize>(&self) -> Result<[usize; N]> {
        let dims = <[i64; N]>::try_from(self.dims).map_err(|_| {
            let expected = if N == 1 { "1 axis".into() } else { format!("{N} axes") };
            FfiError::invalid_argument(self.which, format!("dims {:?}", self.dims), expected)
        })?;
        Ok(dims.map(|dim| usize::try_from(dim).expect("checked by `new`")))
    }

    /// The elements.
    pub fn slice<T: Element>(&self) -> Result<&'a [T]> {
        let data = self.pointer::<T>()?;
        // SAFETY: `data` is aligned, and points to `len` elements in memory that nobody writes (`new`), whose bytes do
        // not exceed isize (`pointer`); any bits are a `T`.
        Ok(unsafe { slice::from_raw_parts(data.as_ptr(), self.len) })
    }

    /// The error for a dtype that is none of those expected.
    pub(super) fn unexpected_dtype(&self, expected: &str) -> FfiError {
        FfiError::invalid_argument(self.which, self.dtype, expected)
    }

    /// The elements' bytes, wherever they begin.
    pub fn bytes(&self) -> Result<&'a [u8]> {
        let nbytes = self.nbytes()?;
        let data = NonNull::new(self.data).unwrap_or(NonNull::dangling());
        // SAFETY: as in `slice`; bytes are always aligned.
        Ok(unsafe { slice::from_raw_parts(data.as_ptr(), nbytes) })
    }

    /// The address of the first element, for diagnosis.
    #[must_use]
    pub fn address(&self) -> usize {
        self.data.addr()
    }

    /// Fails if some byte belongs to both.
    pub(super) fn expect_apart(&self, other: &Self) -> Result<()> {
        let (own, others) = (self.range(), other.range());
        if own.start.max(others.start) >= own.end.min(others.end) {
            return Ok(());
        }
        Err(FfiError::invalid_argument(self.which, format!("memory of {}", other.which), "memory of its own"))
    }

    /// Fails unless both are the same array in the same memory.
    pub(super) fn expect_same(&self, other: &Self) -> Result<()> {
        if self.data == other.data && self.dtype == other.dtype && self.dims == other.dims {
            return Ok(());
        }
        Err(FfiError::invalid_argument(self.which, "memory of its own", format!("that of {}", other.which)))
    }

    /// Where the bytes lie. Of dtypes without a known size nothing can be read.
    fn range(&self) -> Range<usize> {
        self.data.addr()..self.data.addr().saturating_add(self.nbytes().unwrap_or(0))
    }

    fn nbytes(&self) -> Result<usize> {
        let Some((_, size)) = self.dtype.known() else {
            return Err(FfiError::invalid_argument(self.which, self.dtype, "a dtype of whole bytes"));
        };
        let nbytes = self.len.checked_mul(size).filter(|&nbytes| isize::try_from(nbytes).is_ok());
        nbytes.ok_or_else(|| {
            FfiError::invalid_argument(self.which, format!("{} elements", self.len), "fewer bytes than addresses")
        })
    }

    /// The elements' place, if it may be read as `len` of `T`.
    fn pointer<T: Element>(&self) -> Result<NonNull<T>> {
        if self.dtype != T::DTYPE {
            return Err(FfiError::invalid_argument(self.which, self.dtype, T::DTYPE));
        }
        self.nbytes()?;
        let Some(data) = NonNull::new(self.data.cast::<T>()) else {
            return Ok(NonNull::dangling()); // of no elements
        };
        if data.is_aligned() {
            Ok(data)
        } else {
            let found = format!("{} elements at {data:p}", self.dtype);
            Err(FfiError::invalid_argument(self.which, found, format!("a multiple of {}", align_of::<T>())))
        }
    }
}

/// A result of a call, to be written. Its bytes are those of nothing else in the call.
#[derive(Debug)]
pub struct BufferMut<'a> {
    buffer: Buffer<'a>,
    _writes: PhantomData<&'a mut [u8]>,
}

impl<'a> BufferMut<'a> {
    /// A result that may be written.
    ///
    /// # Safety
    /// For `'a` its memory may be written and is reached through this alone.
    pub(super) unsafe fn new(buffer: Buffer<'a>) -> Self {
        Self { buffer, _writes: PhantomData }
    }

    /// The dtype.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }

    /// The size of each axis; none is below 0.
    #[must_use]
    pub fn dims(&self) -> &'a [i64] {
        self.buffer.dims()
    }

    /// The size of each axis, if there are `N`.
    pub fn shape<const N: usize>(&self) -> Result<[usize; N]> {
        self.buffer.shape()
    }

    /// The error for a dtype that is none of those expected.
    pub(super) fn unexpected_dtype(&self, expected: &str) -> FfiError {
        self.buffer.unexpected_dtype(expected)
    }

    /// The elements, whose values are any until they are written.
    pub fn slice<T: Element>(self) -> Result<&'a mut [T]> {
        let data = self.buffer.pointer::<T>()?;
        // SAFETY: as in `Buffer::slice`; and this, which is consumed, was the only way to the memory (`new`). XLA's
        // memory comes from outside of Rust, so that bytes nobody wrote have some value; any is a `T`.
        Ok(unsafe { slice::from_raw_parts_mut(data.as_ptr(), self.buffer.len) })
    }
}

/// A list of XLA, or None if a size or a pointer cannot be that of one.
///
/// # Safety
/// If `size` is above 0 and `first` is not null, that many elements stand there, valid and unchanged for `'a`.
pub(super) unsafe fn list<'a, T>(first: *const T, size: i64) -> Option<&'a [T]> {
    let size = usize::try_from(size).ok()?;
    if size == 0 {
        return Some(&[]);
    }
    let nbytes = size.checked_mul(size_of::<T>())?;
    if first.is_null() || !first.is_aligned() || isize::try_from(nbytes).is_err() {
        return None;
    }
    // SAFETY: the elements are there by this function's condition; the rest was checked.
    Some(unsafe { slice::from_raw_parts(first, size) })
}
