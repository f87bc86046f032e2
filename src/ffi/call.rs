//! A call as its handler sees it: arguments, results, attributes and threads, without unsafe code.
#![expect(unsafe_code, reason = "reads XLA's structs")]

use std::array;

use super::abi;
use super::buffer::{Buffer, BufferMut, DType, Element, Which, list};
use super::error::{FfiError, Result};
use super::pool::XlaThreads;

/// One call of a handler by XLA.
#[derive(Debug)]
pub struct Call<'a> {
    frame: &'a abi::CallFrame,
    /// Whether the first result has the memory of the first argument.
    is_in_place: bool,
    are_results_taken: bool,
}

impl<'a> Call<'a> {
    /// A call to compute results.
    ///
    /// # Safety
    /// The frame is that of a call by XLA that lasts for `'a`: what it points to is valid, and nobody else writes it.
    pub(super) unsafe fn new(frame: &'a abi::CallFrame, is_in_place: bool) -> Self {
        Self { frame, is_in_place, are_results_taken: false }
    }

    /// How many arguments there are.
    #[must_use]
    pub fn arg_count(&self) -> usize {
        usize::try_from(self.frame.args.size).unwrap_or(0)
    }

    /// One argument; of a handler that works in place not the first, which is the first result.
    pub fn arg(&self, index: usize) -> Result<Buffer<'a>> {
        if self.is_in_place && index == 0 {
            return Err(FfiError::internal("the handler asked for the argument that it changes"));
        }
        self.any_arg(index)
    }

    fn any_arg(&self, index: usize) -> Result<Buffer<'a>> {
        // SAFETY: by the condition of `new`, these are the call's arguments.
        unsafe { buffer(&self.frame.args, Which::Argument(index), index) }
    }

    /// All arguments, if there are `N`.
    pub fn args<const N: usize>(&self) -> Result<[Buffer<'a>; N]> {
        expect_count("arguments", self.frame.args.size, N)?;
        try_array(|index| self.arg(index))
    }

    /// All results, if there are `N`. They are handed out once.
    pub fn results<const N: usize>(&mut self) -> Result<[BufferMut<'a>; N]> {
        expect_count("results", self.frame.results.size, N)?;
        if self.are_results_taken {
            return Err(FfiError::internal("the handler asked for its results twice"));
        }
        // SAFETY: by the condition of `new`, these are the call's results.
        let result = |index| unsafe { buffer(&self.frame.results, Which::Result(index), index) };
        let results: [Buffer<'a>; N] = try_array(result)?;
        for (index, own) in results.iter().enumerate() {
            for other in &results[..index] {
                own.expect_apart(other)?;
            }
            for other in 0..self.arg_count() {
                let argument = self.any_arg(other)?;
                if self.is_in_place && index == 0 && other == 0 {
                    own.expect_same(&argument)?;
                } else {
                    own.expect_apart(&argument)?;
                }
            }
        }
        self.are_results_taken = true;
        // SAFETY: XLA has the handler write its results; no other array of the call that `arg` gives reaches their memory,
        // and they are handed out here only, once.
        Ok(results.map(|result| unsafe { BufferMut::new(result) }))
    }

    /// The value of a scalar attribute. From JAX: a NumPy scalar of that dtype.
    pub fn attribute<T: Element>(&self, name: &str) -> Result<T> {
        let what = format!("attribute {name}");
        let attributes = &self.frame.attributes;
        // SAFETY: by the condition of `new`, these lists have `size` elements.
        let (types, names, values) = unsafe {
            (
                list(attributes.types, attributes.size),
                list(attributes.names, attributes.size),
                list(attributes.values, attributes.size),
            )
        };
        let (Some(types), Some(names), Some(values)) = (types, names, values) else {
            return Err(FfiError::internal("the list of attributes has no elements"));
        };
        // SAFETY: by the condition of `new`, a name is null or points to a span of bytes.
        let is_wanted = |span: &*mut abi::ByteSpan| unsafe {
            span.as_ref().and_then(|span| list(span.ptr.cast::<u8>(), span.len.try_into().ok()?))
                == Some(name.as_bytes())
        };
        let Some(index) = names.iter().position(is_wanted) else {
            return Err(FfiError::invalid_argument(what, "none", T::DTYPE));
        };
        if types[index] != abi::ATTRIBUTE_SCALAR || values[index].is_null() {
            return Err(FfiError::invalid_argument(what, "no scalar", T::DTYPE));
        }
        // SAFETY: its type says that this is a scalar.
        let scalar = unsafe { &*values[index].cast::<abi::Scalar>() };
        let dtype = DType::from(scalar.dtype);
        if dtype != T::DTYPE || scalar.value.is_null() {
            return Err(FfiError::invalid_argument(what, dtype, T::DTYPE));
        }
        // SAFETY: its dtype says that the value is a `T`, which any bits are.
        Ok(unsafe { scalar.value.cast::<T>().read_unaligned() })
    }

    /// XLA's threads for computations.
    #[must_use]
    pub fn threads(&self) -> XlaThreads<'a> {
        // SAFETY: by the condition of `new`, XLA's functions may be called with the context for `'a`.
        unsafe { XlaThreads::new(&*self.frame.api, self.frame.context) }
    }
}

/// One of the arguments or results.
///
/// # Safety
/// As [`Buffer::new`], for all of them.
unsafe fn buffer<'a>(values: &abi::Values, which: Which, index: usize) -> Result<Buffer<'a>> {
    // SAFETY: by this function's condition the lists have `size` elements.
    let (types, values) = unsafe { (list(values.types, values.size), list(values.items, values.size)) };
    let (Some(types), Some(values)) = (types, values) else {
        return Err(FfiError::internal(format!("{which}: the list has no elements")));
    };
    let Some((&kind, &value)) = types.get(index).zip(values.get(index)) else {
        return Err(FfiError::invalid_argument(which, "none", format!("one of {}", values.len())));
    };
    if kind != abi::VALUE_BUFFER {
        return Err(FfiError::invalid_argument(which, format!("type {kind} of XLA"), "a buffer"));
    }
    // SAFETY: its type says that this is a buffer; the rest by this function's condition.
    unsafe { Buffer::new(which, value.cast()) }
}

fn expect_count(what: &str, found: i64, expected: usize) -> Result<()> {
    if usize::try_from(found) == Ok(expected) {
        return Ok(());
    }
    Err(FfiError::invalid_argument(format!("number of {what}"), found, expected))
}

/// An array of what `make` gives for each index, or the first fault.
fn try_array<T, const N: usize>(mut make: impl FnMut(usize) -> Result<T>) -> Result<[T; N]> {
    let mut fault = None;
    let items = array::from_fn(|index| make(index).map_err(|error| fault.get_or_insert(error).clone()).ok());
    match fault {
        Some(fault) => Err(fault),
        None => Ok(items.map(|item| item.expect("there was no fault"))),
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::super::testing::{FakeBuffer, FakeCall, FakePool, Start};
    use super::*;
    use crate::kernels::Threads;

    const F32: i32 = 11;
    const U8: i32 = 6;
    const BF16: i32 = 16;

    /// The message with which `body` fails on these arguments.
    fn fault<T>(args: Vec<FakeBuffer>, body: impl FnOnce(&mut Call<'_>) -> Result<T>) -> String {
        FakeCall::new(args, Vec::new()).with(|call| body(call).err().expect("a fault").to_string())
    }

    #[test]
    fn arguments_are_read_with_shapes_and_dtypes() {
        let (mut floats, mut bytes, mut halves) =
            ([1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], [7_u8, 8, 9], [0x3f80_u16, 0x4000]);
        let mut args = FakeCall::new(
            vec![
                FakeBuffer::new(F32, &[2, 3], &mut floats),
                FakeBuffer::new(U8, &[3], &mut bytes),
                FakeBuffer::new(BF16, &[1, 2], &mut halves),
                FakeBuffer::new(F32, &[], &mut [7.5_f32]),
            ],
            Vec::new(),
        );
        args.with(|call| {
            let [matrix, bytes, halves, scalar] = call.args().unwrap();
            assert_eq!((matrix.dims(), matrix.dtype()), (&[2, 3][..], DType::F32));
            assert_eq!(matrix.shape(), Ok([2, 3]));
            assert_eq!(matrix.slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
            assert_eq!(bytes.slice::<u8>().unwrap(), [7, 8, 9]);
            assert_eq!(halves.slice::<u16>().unwrap(), [0x3f80, 0x4000]);
            assert_eq!(halves.bytes().unwrap(), [0x80, 0x3f, 0x00, 0x40]);
            assert_eq!(scalar.dims(), [0; 0]);
        });
    }

    #[test]
    fn faults_name_the_argument_and_say_what_was_expected() {
        let one = |dtype, dims: &[i64]| vec![FakeBuffer::new(dtype, dims, &mut [0_u64; 4])];
        let slice = |call: &mut Call<'_>| call.arg(0)?.slice::<f32>().map(<[f32]>::len);
        assert_eq!(fault(one(BF16, &[2]), slice), "argument 0: found bfloat16, expected float32");
        assert_eq!(fault(one(99, &[2]), slice), "argument 0: found dtype 99 of XLA, expected float32");
        assert_eq!(fault(one(F32, &[2, -1]), slice), "argument 0: found dims [2, -1], expected none below 0");
        let expected = "argument 0: found dims [4611686018427387904, 4], expected a product that fits an int64";
        assert_eq!(fault(one(F32, &[1 << 62, 4]), slice), expected);
        let expected = "argument 0: found 4611686018427387904 elements, expected fewer bytes than addresses";
        assert_eq!(fault(one(F32, &[1 << 62]), slice), expected);
        let shape = |call: &mut Call<'_>| call.arg(0)?.shape::<3>();
        assert_eq!(fault(one(F32, &[2, 1]), shape), "argument 0: found dims [2, 1], expected 3 axes");
        let bytes = |call: &mut Call<'_>| call.arg(0)?.bytes().map(<[u8]>::len);
        assert_eq!(fault(one(32, &[2]), bytes), "argument 0: found dtype 32 of XLA, expected a dtype of whole bytes");
        let count = |call: &mut Call<'_>| call.args::<2>().map(|_| ());
        assert_eq!(fault(one(F32, &[2]), count), "number of arguments: found 1, expected 2");
        assert_eq!(fault(one(F32, &[2]), |call| call.arg(1).map(|_| ())), "argument 1: found none, expected one of 1");
    }

    #[test]
    fn misaligned_elements_are_refused_and_readable_as_bytes() {
        let mut memory = [0x0403_0201_u32, 5];
        let mut call = FakeCall::new(vec![FakeBuffer::new(F32, &[1], &mut memory).shifted(1)], Vec::new());
        call.with(|call| {
            let message = call.arg(0).unwrap().slice::<f32>().unwrap_err().to_string();
            assert!(message.starts_with("argument 0: found float32 elements at 0x"), "{message}");
            assert!(message.ends_with(", expected a multiple of 4"), "{message}");
            assert_eq!(call.arg(0).unwrap().bytes().unwrap(), [2, 3, 4, 5]);
        });
    }

    #[test]
    fn memory_may_be_missing_only_for_no_elements() {
        let missing = |dims: &[i64]| {
            let mut buffer = FakeBuffer::new::<u8>(F32, dims, &mut []);
            buffer.data = ptr::null_mut();
            buffer
        };
        let slice = |call: &mut Call<'_>| call.arg(0)?.slice::<f32>().map(<[f32]>::len);
        assert_eq!(fault(vec![missing(&[3])], slice), "argument 0: found no memory, expected 3 elements");
        FakeCall::new(vec![missing(&[3, 0])], vec![missing(&[0])]).with(|call| {
            assert_eq!((call.arg(0).unwrap().slice::<f32>(), call.arg(0).unwrap().bytes()), (Ok(&[][..]), Ok(&[][..])));
            let [result] = call.results().unwrap();
            assert_eq!(result.slice::<f32>(), Ok(&mut [][..]));
        });
    }

    #[test]
    fn dims_that_cannot_be_a_list_are_refused() {
        for rank in [-1, 2] {
            let mut buffer = FakeBuffer::new(F32, &[], &mut [0.0_f32]);
            buffer.rank = rank;
            let expected = format!("argument 0: found rank {rank} without dims");
            assert_eq!(fault(vec![buffer], |call| call.arg(0).map(|_| ())), expected);
        }
    }

    #[test]
    fn results_are_written_and_handed_out_once() {
        let (mut halves, mut bytes) = ([0_u16; 2], [0_u8; 3]);
        let results = vec![FakeBuffer::new(BF16, &[2], &mut halves), FakeBuffer::new(U8, &[1, 3], &mut bytes)];
        FakeCall::new(Vec::new(), results).with(|call| {
            assert_eq!(call.results::<1>().unwrap_err().to_string(), "number of results: found 2, expected 1");
            let [halves, bytes] = call.results().unwrap();
            assert_eq!((bytes.shape(), bytes.dtype()), (Ok([1, 3]), DType::U8));
            halves.slice::<u16>().unwrap().fill(7);
            bytes.slice::<u8>().unwrap().fill(9);
            assert_eq!(call.results::<2>().unwrap_err().to_string(), "the handler asked for its results twice");
        });
        assert_eq!((halves, bytes), ([7; 2], [9; 3]));
    }

    #[test]
    fn a_result_of_another_dtype_is_refused() {
        FakeCall::new(Vec::new(), vec![FakeBuffer::new(BF16, &[2], &mut [0_u16; 2])]).with(|call| {
            let [result] = call.results().unwrap();
            assert_eq!(result.slice::<f32>().unwrap_err().to_string(), "result 0: found bfloat16, expected float32");
        });
    }

    #[test]
    fn a_result_in_memory_of_another_array_is_refused() {
        let mut memory = [0.0_f32; 6];
        let mut part = |start: usize| FakeBuffer::new(F32, &[2], &mut memory[start..start + 2]);
        let message = |args, results| {
            FakeCall::new(args, results).with(|call| call.results::<2>().err().map(|error| error.to_string()))
        };
        let expected = "result 1: found memory of argument 0, expected memory of its own";
        assert_eq!(message(vec![part(3)], vec![part(0), part(4)]), Some(expected.to_owned()));
        let expected = "result 1: found memory of result 0, expected memory of its own";
        assert_eq!(message(vec![part(4)], vec![part(0), part(1)]), Some(expected.to_owned()));
        assert_eq!(message(vec![part(4)], vec![part(0), part(2)]), None);
        // What has no elements is nobody's memory.
        let mut nothing = part(1);
        nothing.dims = vec![0];
        assert_eq!(message(vec![nothing], vec![part(0), part(2)]), None);
    }

    #[test]
    fn in_place_the_first_result_is_the_first_argument_which_cannot_be_read() {
        let (mut memory, mut values) = ([1.0_f32, 2.0, 3.0], [4.0_f32, 5.0]);
        let at = |memory: &mut [f32]| FakeBuffer::new(F32, &[2], memory);
        let args = vec![at(&mut memory[..2]), at(&mut values)];
        let mut call = FakeCall::new(args, vec![at(&mut memory[..2])]);
        call.is_in_place = true;
        call.with(|call| {
            let message = call.arg(0).unwrap_err().to_string();
            assert_eq!(message, "the handler asked for the argument that it changes");
            let values = call.arg(1).unwrap().slice::<f32>().unwrap();
            let [result] = call.results().unwrap();
            let result = result.slice::<f32>().unwrap();
            assert_eq!(result, [1.0, 2.0]);
            result[1] = values[1];
        });
        for (args, expected) in [
            (
                vec![at(&mut memory[1..]), at(&mut values)],
                "result 0: found memory of its own, expected that of argument 0",
            ),
            (
                vec![at(&mut memory[..2]), at(&mut memory[1..])],
                "result 0: found memory of argument 1, expected memory of its own",
            ),
        ] {
            let mut call = FakeCall::new(args, vec![at(&mut memory[..2])]);
            call.is_in_place = true;
            assert_eq!(call.with(|call| call.results::<1>().unwrap_err().to_string()), expected);
        }
        assert_eq!(memory, [1.0, 5.0, 3.0]);
    }

    #[test]
    fn attributes_are_found_by_name_with_their_dtype() {
        let mut call = FakeCall::new(Vec::new(), Vec::new());
        let scalar = abi::ATTRIBUTE_SCALAR;
        call.attributes = vec![
            ("alpha", scalar, F32, u64::from(1.5_f32.to_bits())),
            ("count", scalar, 5, u64::MAX),
            ("limit", scalar, 4, u64::from((-3_i32).cast_unsigned())),
            ("names", 4, 0, 0),
        ];
        call.with(|call| {
            assert_eq!(call.attribute::<f32>("alpha"), Ok(1.5));
            assert_eq!(call.attribute::<i64>("count"), Ok(-1));
            assert_eq!(call.attribute::<i32>("limit"), Ok(-3));
            let fault = |name| call.attribute::<i32>(name).unwrap_err().to_string();
            assert_eq!(fault("alpha"), "attribute alpha: found float32, expected int32");
            assert_eq!(fault("names"), "attribute names: found no scalar, expected int32");
            assert_eq!(fault("alph"), "attribute alph: found none, expected int32");
        });
    }

    #[test]
    fn threads_are_those_of_xla() {
        let mut call = FakeCall::new(Vec::new(), Vec::new());
        call.pool = FakePool::new(5, Start::AtOnce);
        assert_eq!(call.with(|call| call.threads().count()), 5);
    }
}
