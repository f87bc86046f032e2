//! Calls as a program that nobody checked would make them: each ends in a right result or in an error that says why.

use std::iter::repeat_n;

use super::super::abi;
use super::super::entry::entry;
use super::super::testing::{FakeBuffer, FakeCall};
use super::*;
use crate::kernels::ELSEWHERE;

const S32: i32 = 4;
const S64: i32 = 5;
const U8: i32 = 6;
const F32: i32 = 11;
const BF16: i32 = 16;

/// What results hold before they are written.
const JUNK: f32 = 7.5;

/// An array, and memory for it if that is little: what is larger must be refused unread.
#[derive(Clone)]
struct Array {
    dtype: i32,
    dims: Vec<i64>,
    memory: Vec<u64>,
}

impl Array {
    fn new(dtype: i32, dims: &[i64]) -> Self {
        let elems = dims.iter().try_fold(1, |elems: i64, &dim| elems.checked_mul(dim)).unwrap_or(i64::MAX);
        let elem_bytes: i64 = if dtype == U8 { 1 } else { 4 };
        let nbytes = elems.checked_mul(elem_bytes).filter(|&nbytes| nbytes < 1 << 17).unwrap_or(0);
        Self { dtype, dims: dims.to_vec(), memory: vec![0; usize::try_from(nbytes).unwrap().div_ceil(8)] }
    }

    fn of_f32(dims: &[i64], value: f32) -> Self {
        let mut array = Self::new(F32, dims);
        array.memory.fill(u64::from(value.to_bits()) << 32 | u64::from(value.to_bits()));
        array
    }

    fn of_s32(dims: &[i64], values: &[i32]) -> Self {
        let mut array = Self::new(S32, dims);
        for (number, &value) in values.iter().enumerate() {
            array.memory[number / 2] |= u64::from(value.cast_unsigned()) << (32 * (number % 2));
        }
        array
    }

    fn floats(&self) -> Vec<f32> {
        let count = self.dims.iter().product::<i64>().try_into().unwrap();
        let values = self.memory.iter().flat_map(|word| [*word, *word >> 32]);
        values.map(|bits| f32::from_bits(u32::try_from(bits & u64::from(u32::MAX)).unwrap())).take(count).collect()
    }

    fn buffer(&mut self) -> FakeBuffer {
        FakeBuffer::new(self.dtype, &self.dims, &mut self.memory)
    }
}

/// A call of a handler.
#[derive(Clone)]
struct Case {
    args: Vec<Array>,
    results: Vec<Array>,
    /// Name, dtype, value.
    attributes: Vec<(&'static str, i32, u64)>,
}

impl Case {
    fn new<const N: usize>(args: [Array; N], result: &[i64]) -> Self {
        Self { args: args.into(), results: vec![Array::of_f32(result, JUNK)], attributes: Vec::new() }
    }

    fn arg(mut self, index: usize, dtype: i32, dims: &[i64]) -> Self {
        self.args[index] = Array::new(dtype, dims);
        self
    }

    fn result(mut self, dtype: i32, dims: &[i64]) -> Self {
        self.results[0] = Array::new(dtype, dims);
        self
    }

    fn attribute(mut self, name: &'static str, dtype: i32, value: u64) -> Self {
        self.attributes.retain(|attribute| attribute.0 != name);
        self.attributes.push((name, dtype, value));
        self
    }

    /// The outcome: the code and the text of an error.
    fn call<H: Handler>(&mut self) -> Result<(), (i32, String)> {
        let buffers = |arrays: &mut [Array]| arrays.iter_mut().map(Array::buffer).collect();
        let mut call = FakeCall::new(buffers(&mut self.args), buffers(&mut self.results));
        if let (true, [first, ..], [result, ..]) = (H::IS_IN_PLACE, &*call.args, &mut *call.results) {
            result.data = first.data;
        }
        call.attributes =
            self.attributes.iter().map(|&(name, dtype, value)| (name, abi::ATTRIBUTE_SCALAR, dtype, value)).collect();
        let outcome = call.call(entry::<H>);
        if let (true, [first, ..], [result, ..]) = (H::IS_IN_PLACE, &*self.args, &mut *self.results) {
            result.memory.clone_from(&first.memory);
        }
        outcome
    }

    /// What the one result is.
    fn values<H: Handler>(mut self) -> Vec<f32> {
        assert_eq!(self.call::<H>(), Ok(()));
        self.results[0].floats()
    }

    /// What the error says behind the handler's name.
    fn fault<H: Handler>(mut self) -> String {
        let (code, text) = self.call::<H>().unwrap_err();
        assert_eq!(code, 3, "{text}");
        text.strip_prefix(H::NAME).and_then(|text| text.strip_prefix(": ")).unwrap().to_owned()
    }
}

/// x [m, k], a matrix [n, k] and its bias.
fn linear_case(m: i64, n: i64, k: i64) -> Case {
    let args = [Array::of_f32(&[m, k], 1.0), Array::new(BF16, &[n, k]), Array::of_f32(&[n], 0.5)];
    Case::new(args, &[m, n])
}

/// x [m, k] and a matrix [n, k].
fn matmul_case(m: i64, n: i64, k: i64) -> Case {
    let (blocks, scales) = (Array::new(U8, &[n, k / 32, 16]), Array::new(U8, &[n, k / 32]));
    Case::new([Array::of_f32(&[m, k], 1.0), blocks, scales], &[m, n])
}

/// x [t, k] and a stack [e, n, k]; all rows go to expert 0.
fn expert_case(t: i64, e: i64, n: i64, k: i64) -> Case {
    let (blocks, scales) = (Array::new(U8, &[e, n, k / 32, 16]), Array::new(U8, &[e, n, k / 32]));
    Case::new([Array::of_f32(&[t, k], 1.0), blocks, scales, Array::new(S32, &[t])], &[t, n])
}

/// x [t, h], k experts of e, of `width` gates and ups; biases of 0.5 and weights of 1.
fn mixture_case<const N: usize>([gate_up, down]: [[Array; N]; 2], [t, k, e, width, h]: [i64; 5]) -> Case {
    let indices = Array::new(S32, &[t, k]);
    let mut case = Case::new([Array::of_f32(&[t, h], 1.0), indices, Array::of_f32(&[t, k], 1.0)], &[t, h]);
    case.args.extend(gate_up);
    case.args.push(Array::of_f32(&[e, width], 0.5));
    case.args.extend(down);
    case.args.push(Array::of_f32(&[e, h], 0.5));
    case.attribute("limit", F32, 7.0_f32.to_bits().into()).attribute("alpha", F32, 1.702_f32.to_bits().into())
}

fn mxfp4_moe_case(sizes @ [_, _, e, width, h]: [i64; 5]) -> Case {
    let codes = |rows, k| [Array::new(U8, &[e, rows, k / 32, 16]), Array::new(U8, &[e, rows, k / 32])];
    mixture_case([codes(width, h), codes(h, width / 2)], sizes)
}

fn dense_moe_case(sizes @ [_, _, e, width, h]: [i64; 5]) -> Case {
    mixture_case([[Array::new(BF16, &[e, width, h])], [Array::new(BF16, &[e, h, width / 2])]], sizes)
}

/// Sizes [B, T, S, N, G, D]; all queries see all keys, whose scores are 0 as the sinks are, and the values are 3.
fn attention_case([batch, queries, keys, heads, key_heads, head_dim]: [i64; 6]) -> Case {
    let query = Array::of_f32(&[batch, queries, heads, head_dim], 1.0);
    let [key, value] = [2.0, 3.0].map(|value| Array::of_f32(&[batch, keys, key_heads, head_dim], value));
    let [of_query, of_key] = [queries, keys].map(|size| Array::new(S32, &[batch, size]));
    let sinks = Array::new(F32, &[heads]);
    let case = Case::new([query, key, value, of_query, of_key, sinks], &[batch, queries, heads, head_dim]);
    case.attribute("scale", F32, 0.0_f32.to_bits().into()).attribute("sliding_window", S64, 0)
}

/// Sizes [B, S, T, G, D]: T rows of 2 go to slot 0 of a cache of ones.
fn slots_case([batch, slots, tokens, heads, head_dim]: [i64; 5]) -> Case {
    let cache = Array::of_f32(&[batch, slots, heads, head_dim], 1.0);
    let rows = Array::of_f32(&[batch, tokens, heads, head_dim], 2.0);
    Case::new([cache, rows, Array::new(S32, &[batch, tokens])], &[batch, slots, heads, head_dim])
}

/// Calls that are right but for one array each: one axis larger or gone, one axis too many, another dtype, none.
fn with_one_fault(case: &Case) -> Vec<(String, Case)> {
    let mut cases = Vec::new();
    let arrays = (0..case.args.len()).map(|index| (false, index)).chain([(true, 0)]);
    for (is_result, index) in arrays {
        let list = |case: &Case| if is_result { case.results.clone() } else { case.args.clone() };
        let array = list(case).swap_remove(index);
        let mut push = |what: &str, replacement: &[Array]| {
            let (mut faulty, mut arrays) = (case.clone(), list(case));
            arrays.splice(index..=index, replacement.iter().cloned());
            *(if is_result { &mut faulty.results } else { &mut faulty.args }) = arrays;
            cases.push((format!("{what} of {}{index}", if is_result { "result " } else { "argument " }), faulty));
        };
        for axis in 0..array.dims.len() {
            for size in [array.dims[axis] + 1, array.dims[axis] * 2, 0, 1 << 61] {
                let mut dims = array.dims.clone();
                dims[axis] = size;
                push(&format!("size {size} of axis {axis}"), &[Array::new(array.dtype, &dims)]);
            }
        }
        push("an axis more", &[Array::new(array.dtype, &[&array.dims[..], &[1]].concat())]);
        push("an axis less", &[Array::new(array.dtype, &array.dims[1..])]);
        push("another dtype", &[Array::new(S64, &array.dims)]);
        push("lack", &[]);
        push("two", &[array.clone(), array.clone()]);
    }
    cases
}

/// Every dimension has another size.
fn assert_faults_are_refused<H: Handler>(mut case: Case) {
    assert_eq!(case.call::<H>(), Ok(()));
    assert!(case.results[0].floats().iter().all(|&value| value != JUNK), "not written");
    // Miri is slow.
    for (what, mut faulty) in with_one_fault(&case).into_iter().step_by(if cfg!(miri) { 11 } else { 1 }) {
        let may_lack = [(Linear::NAME, "lack of argument 2"), (GroupedAttention::NAME, "lack of argument 5")];
        if may_lack.contains(&(H::NAME, &what)) {
            assert_eq!(faulty.call::<H>(), Ok(()), "{what}");
            continue;
        }
        let (code, text) = faulty.call::<H>().expect_err(&what);
        assert_eq!(code, 3, "{what}: {text}");
        assert!(text.starts_with(H::NAME) && text.contains(": found ") && text.contains(", expected "), "{text}");
    }
    for (name, dtype, _) in case.attributes.clone() {
        let expected = DType::from(dtype);
        let other = case.clone().attribute(name, S32, 0).fault::<H>();
        assert_eq!(other, format!("attribute {name}: found int32, expected {expected}"));
        let mut without = case.clone();
        without.attributes.retain(|attribute| attribute.0 != name);
        assert_eq!(without.fault::<H>(), format!("attribute {name}: found none, expected {expected}"));
    }
}

#[test]
fn whatever_is_wrong_with_one_array_is_refused() {
    assert_faults_are_refused::<Linear>(linear_case(2, 3, 5));
    assert_faults_are_refused::<Mxfp4Matmul<false>>(matmul_case(2, 5, 96));
    assert_faults_are_refused::<Mxfp4Matmul<true>>(matmul_case(2, 5, 96));
    assert_faults_are_refused::<Mxfp4ExpertMatmul<false>>(expert_case(2, 4, 5, 96));
    assert_faults_are_refused::<DenseMoe>(dense_moe_case([2, 3, 4, 10, 7]));
    assert_faults_are_refused::<Mxfp4Moe<false>>(mxfp4_moe_case([2, if cfg!(miri) { 1 } else { 3 }, 4, 64, 96]));
    assert_faults_are_refused::<GroupedAttention>(attention_case([2, 3, 5, 8, 4, 7]));
    assert_faults_are_refused::<WriteSlots>(slots_case([2, 5, 3, 4, 7]));
}

#[test]
fn faults_of_linear_are_told() {
    let case = || linear_case(2, 3, 5);
    assert_eq!(case().arg(1, BF16, &[3, 6]).fault::<Linear>(), "weight: found [3, 6], expected [3, 5]");
    assert_eq!(case().arg(1, F32, &[3, 5]).fault::<Linear>(), "weight: found float32, expected bfloat16");
    assert_eq!(case().arg(2, F32, &[2]).fault::<Linear>(), "bias: found [2], expected [3]");
    assert_eq!(case().arg(2, S32, &[3]).fault::<Linear>(), "argument 2: found int32, expected bfloat16 or float32");
    assert_eq!(case().arg(0, F32, &[2, 5, 1]).fault::<Linear>(), "argument 0: found dims [2, 5, 1], expected 2 axes");
    assert_eq!(case().result(F32, &[3, 2]).fault::<Linear>(), "result: found [3, 2], expected [2, 3]");
    assert_eq!(case().result(U8, &[2, 3]).fault::<Linear>(), "result 0: found uint8, expected bfloat16 or float32");
    let count = |args: usize| {
        let mut case = case();
        case.args = repeat_n(Array::new(BF16, &[3, 5]), args).collect();
        case.fault::<Linear>()
    };
    assert_eq!(count(0), "number of arguments: found 0, expected 2 or 3");
    assert_eq!(count(4), "number of arguments: found 4, expected 2 or 3");
}

#[test]
fn faults_of_products_with_codes_are_told() {
    let case = || matmul_case(2, 5, 96);
    let fault = Case::fault::<Mxfp4Matmul<false>>;
    assert_eq!(fault(case().arg(0, F32, &[2, 128])), "scales of w: found [5, 3], expected [5, 4]");
    assert_eq!(fault(case().arg(0, F32, &[2, 97])), "K of w: found 97, expected a multiple of 32");
    assert_eq!(fault(case().arg(1, U8, &[5, 3, 8])), "blocks of w: found [5, 3, 8], expected [5, 3, 16]");
    assert_eq!(fault(case().arg(1, U8, &[3, 5, 16])), "blocks of w: found [3, 5, 16], expected [5, 3, 16]");
    assert_eq!(fault(case().arg(1, 2, &[5, 3, 16])), "argument 1: found int8, expected uint8");
    let case = || expert_case(2, 4, 5, 96);
    let fault = Case::fault::<Mxfp4ExpertMatmul<false>>;
    assert_eq!(fault(case().arg(2, U8, &[5, 4, 3])), "result: found [2, 5], expected [2, 4]");
    assert_eq!(fault(case().arg(1, U8, &[5, 4, 3, 16])), "blocks of w: found [5, 4, 3, 16], expected [4, 5, 3, 16]");
    assert_eq!(fault(case().arg(3, S32, &[3])), "ids: found [3], expected [2]");
    assert_eq!(fault(case().arg(3, S64, &[2])), "argument 3: found int64, expected int32");
}

#[test]
fn faults_of_mixtures_are_told() {
    let case = || mxfp4_moe_case([2, 3, 4, 64, 96]);
    let fault = Case::fault::<Mxfp4Moe<false>>;
    assert_eq!(fault(case().arg(1, S32, &[2, 5])), "weights: found [2, 3], expected [2, 5]");
    assert_eq!(fault(case().arg(1, S32, &[3, 3])), "indices: found [3, 3], expected [2, 3]");
    assert_eq!(fault(case().arg(2, BF16, &[2, 3])), "argument 2: found bfloat16, expected float32");
    assert_eq!(fault(case().arg(4, U8, &[4, 64, 2])), "scales of gate_up: found [4, 64, 2], expected [4, 64, 3]");
    assert_eq!(fault(case().arg(5, F32, &[4, 63])), "width of gate_up: found 63, expected an even number above 0");
    assert_eq!(fault(case().arg(5, F32, &[4, 66])), "scales of gate_up: found [4, 64, 3], expected [4, 66, 3]");
    assert_eq!(fault(case().arg(7, U8, &[4, 96, 2])), "scales of down: found [4, 96, 2], expected [4, 96, 1]");
    assert_eq!(fault(case().arg(8, F32, &[4, 95])), "bias of down: found [4, 95], expected [4, 96]");
    assert_eq!(fault(case().result(F32, &[2, 64])), "result: found [2, 64], expected [2, 96]");
    let fault = Case::fault::<DenseMoe>;
    let case = || dense_moe_case([2, 3, 4, 10, 7]);
    assert_eq!(fault(case().arg(3, BF16, &[10, 4, 7])), "gate_up: found [10, 4, 7], expected [4, 10, 7]");
    assert_eq!(fault(case().arg(5, F32, &[4, 7, 5])), "down: found float32, expected bfloat16");
    for limit in [f32::NAN, -1.0] {
        let text = format!("limit: found {limit}, expected at least 0");
        assert_eq!(fault(case().attribute("limit", F32, limit.to_bits().into())), text);
    }
}

#[test]
fn faults_of_attention_and_its_cache_are_told() {
    let case = || attention_case([2, 3, 5, 8, 4, 7]);
    let fault = Case::fault::<GroupedAttention>;
    assert_eq!(fault(case().arg(2, F32, &[2, 5, 4, 6])), "value: found [2, 5, 4, 6], expected [2, 5, 4, 7]");
    assert_eq!(fault(case().arg(3, S32, &[2, 5])), "query positions: found [2, 5], expected [2, 3]");
    assert_eq!(fault(case().arg(4, S32, &[3, 5])), "key positions: found [3, 5], expected [2, 5]");
    assert_eq!(fault(case().arg(5, F32, &[4])), "sinks: found [4], expected [8]");
    assert_eq!(fault(case().arg(5, F32, &[8, 1])), "argument 5: found dims [8, 1], expected 1 axis");
    assert_eq!(fault(attention_case([2, 3, 5, 9, 4, 7])), "heads of queries: found 9, expected a multiple of 4");
    assert_eq!(fault(attention_case([2, 3, 5, 8, 0, 7])), "heads of keys: found 0, expected at least 1");
    assert_eq!(fault(attention_case([2, 3, 5, 8, 4, 0])), "size of a head: found 0, expected at least 1");
    let count = |args: usize| {
        let mut case = case();
        case.args.resize(args, Array::new(F32, &[8]));
        fault(case)
    };
    assert_eq!(count(4), "number of arguments: found 4, expected 5 or 6");
    assert_eq!(count(7), "number of arguments: found 7, expected 5 or 6");
    let case = || slots_case([2, 5, 3, 4, 7]);
    let fault = Case::fault::<WriteSlots>;
    assert_eq!(fault(case().arg(1, BF16, &[2, 3, 4, 7])), "rows: found bfloat16, expected float32");
    assert_eq!(fault(case().arg(1, F32, &[2, 3, 4, 8])), "rows: found [2, 3, 4, 8], expected [2, 3, 4, 7]");
    assert_eq!(fault(case().arg(2, S32, &[3, 2])), "slots: found [3, 2], expected [2, 3]");
    let elsewhere = "result 0: found memory of its own, expected that of argument 0";
    assert_eq!(fault(case().result(F32, &[2, 5, 7, 4])), elsewhere);
}

#[test]
fn attention_and_its_cache_may_have_any_sizes() {
    const SIZES: [i64; 3] = [0, 1, 3];
    // Miri is slow.
    for number in (0..3_usize.pow(6)).step_by(if cfg!(miri) { 101 } else { 1 }) {
        let sizes = [1, 3, 9, 27, 81, 243].map(|place| SIZES[number / place % 3]);
        let [batch, queries, keys, heads, key_heads, head_dim] = sizes;
        let mut case = attention_case(sizes);
        match case.call::<GroupedAttention>() {
            Ok(()) => {
                // The sink takes as much as a key.
                let expected = match keys {
                    0 => 0.0,
                    1 => 3.0 / 2.0,
                    _ => 9.0 / 4.0,
                };
                assert!(case.results[0].floats().into_iter().all(|value| value == expected), "{sizes:?}");
            }
            Err((code, text)) => {
                assert!(head_dim == 0 || key_heads == 0 || heads % key_heads != 0, "{sizes:?}: {text}");
                assert_eq!(code, 3, "{sizes:?}: {text}");
            }
        }
        let cache = slots_case([batch, keys, queries, heads, head_dim]).values::<WriteSlots>();
        let (row, slot) =
            (usize::try_from(keys * heads * head_dim).unwrap(), usize::try_from(heads * head_dim).unwrap());
        for (place, value) in cache.into_iter().enumerate() {
            let is_written = queries > 0 && place % row < slot;
            assert_eq!(value, if is_written { 2.0 } else { 1.0 }, "{sizes:?}, {place}");
        }
    }
    for window in [1, 2, i64::from(i32::MAX), i64::MAX, -1, i64::MIN] {
        let case = attention_case([1, 1, 3, 2, 1, 4]).attribute("sliding_window", S64, window.cast_unsigned());
        assert_eq!(case.values::<GroupedAttention>(), [2.25; 2 * 4]);
    }
}

#[test]
fn sizes_beyond_memory_are_refused_unread() {
    let huge = 1 << 31;
    let text = |found| format!("argument {found}, expected a product that fits an int64");
    assert_eq!(
        linear_case(2, 3, 5).arg(1, BF16, &[1 << 62, 2]).fault::<Linear>(),
        text("1: found dims [4611686018427387904, 2]")
    );
    assert_eq!(
        mxfp4_moe_case([2, 3, 4, 64, 96]).arg(5, F32, &[huge, 2 * huge]).fault::<Mxfp4Moe<false>>(),
        text("5: found dims [2147483648, 4294967296]")
    );
    // 2^62 rows fit, and are not those of the matrices.
    let fault = mxfp4_moe_case([2, 3, 4, 64, 96]).arg(5, F32, &[huge, huge]).fault::<Mxfp4Moe<false>>();
    assert_eq!(fault, "scales of gate_up: found [4, 64, 3], expected [2147483648, 2147483648, 3]");
    // Of no values, but more rows than a number can tell.
    let fault = expert_case(0, 2 * huge, 2 * huge, 0).fault::<Mxfp4ExpertMatmul<false>>();
    assert_eq!(fault, "rows: found [4294967296, 4294967296], expected fewer than addresses");
    let fault = dense_moe_case([2, 3, 2 * huge, 2 * huge, 0]).arg(4, F32, &[2 * huge, 2 * huge]);
    assert_eq!(fault.fault::<DenseMoe>(), text("4: found dims [4294967296, 4294967296]"));
}

#[test]
fn without_rows_or_columns_there_are_no_values_to_write() {
    for (m, n) in [(0, 3), (2, 0), (0, 0)] {
        assert!(linear_case(m, n, 5).values::<Linear>().is_empty());
        assert!(matmul_case(m, n, 96).values::<Mxfp4Matmul<false>>().is_empty());
        assert!(expert_case(m, 4, n, 96).values::<Mxfp4ExpertMatmul<false>>().is_empty());
        assert_eq!(mxfp4_moe_case([m, 3, 4, 64, 32 * n]).result(F32, &[m, 32 * n]).call::<Mxfp4Moe<false>>(), Ok(()));
        assert!(dense_moe_case([m, 3, 4, 10, n]).values::<DenseMoe>().is_empty());
    }
    assert!(expert_case(0, 0, 5, 96).values::<Mxfp4ExpertMatmul<false>>().is_empty());
}

#[test]
fn sums_of_nothing_are_zero() {
    assert_eq!(linear_case(2, 3, 0).values::<Linear>(), [0.5; 6]);
    assert_eq!(matmul_case(2, 5, 0).values::<Mxfp4Matmul<false>>(), [0.0; 10]);
    assert_eq!(expert_case(2, 4, 5, 0).values::<Mxfp4ExpertMatmul<false>>(), [0.0; 10]);
    assert_eq!(mxfp4_moe_case([2, 0, 4, 64, 96]).values::<Mxfp4Moe<false>>(), [0.0; 192]);
    assert_eq!(dense_moe_case([2, 0, 4, 10, 7]).values::<DenseMoe>(), [0.0; 14]);
}

#[test]
fn rows_of_no_expert_become_nan() {
    assert!(expert_case(2, 0, 5, 96).values::<Mxfp4ExpertMatmul<false>>().iter().all(|value| value.is_nan()));
    let mut case = mxfp4_moe_case([2, 3, 4, 64, 96]);
    case.args[1] = Array::of_s32(&[2, 3], &[ELSEWHERE, 4, ELSEWHERE, ELSEWHERE, ELSEWHERE, 3]);
    let values = case.values::<Mxfp4Moe<false>>();
    assert!(values[..96].iter().all(|value| value.is_nan()));
    // Codes are zero: what is left is the bias of one expert.
    assert_eq!(values[96..], [0.5; 96]);
}

#[test]
fn mixtures_without_experts_or_width_are_refused() {
    let (no_experts, no_width) = ("experts: found 0, expected at least 1", "width of gate_up: found 0");
    assert_eq!(mxfp4_moe_case([2, 3, 0, 64, 96]).fault::<Mxfp4Moe<false>>(), no_experts);
    assert_eq!(dense_moe_case([2, 3, 0, 10, 7]).fault::<DenseMoe>(), no_experts);
    assert!(mxfp4_moe_case([2, 3, 4, 0, 96]).fault::<Mxfp4Moe<false>>().starts_with(no_width));
    assert!(dense_moe_case([2, 3, 4, 0, 7]).fault::<DenseMoe>().starts_with(no_width));
}

#[test]
fn with_int8_the_same_is_computed_under_a_name_of_its_own() {
    fn assert_same<A: Handler, B: Handler>(case: &Case) {
        assert_eq!(B::NAME, format!("{}_int8", A::NAME));
        assert_eq!(case.clone().values::<B>(), case.clone().values::<A>());
    }
    // Codes of 6 and of -0.5 under a scale of 1, and x of 1, which is 127 times its block's scale.
    let with_codes = |mut case: Case, pairs: &[usize]| {
        for &index in pairs {
            case.args[index].memory.fill(0x9797_9797_9797_9797);
            case.args[index + 1].memory.fill(0x7f7f_7f7f_7f7f_7f7f);
        }
        case
    };
    let case = with_codes(matmul_case(2, 5, 96), &[1]);
    assert_same::<Mxfp4Matmul<false>, Mxfp4Matmul<true>>(&case);
    assert_eq!(case.values::<Mxfp4Matmul<true>>(), [264.0; 10]);
    assert_same::<Mxfp4ExpertMatmul<false>, Mxfp4ExpertMatmul<true>>(&with_codes(expert_case(2, 4, 5, 96), &[1]));
    // Both gates are clamped, and so alike in all places.
    assert_same::<Mxfp4Moe<false>, Mxfp4Moe<true>>(&with_codes(mxfp4_moe_case([2, 3, 4, 64, 96]), &[3, 6]));
}
