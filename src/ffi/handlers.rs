//! The kernels as XLA calls them: shapes checked, dtypes told apart.

use super::buffer::{Buffer, BufferMut, DType};
use super::call::Call;
use super::entry::Handler;
use super::error::{FfiError, Result};
use crate::kernels::{
    Attention, Experts, Floats, FloatsMut, Matrix, attention, expert_linear, linear, moe, write_slots,
};
use crate::mxfp4::{BLOCK_BYTES, MX_BLOCK_SIZE};
use crate::simd::Level;

/// `tensorport.v1.linear`: x [M, K], weight bfloat16 [N, K], and maybe bias [N] -> [M, N].
///
/// Floats without a dtype here, as those of all handlers below, are bfloat16 or float32.
pub struct Linear;

impl Handler for Linear {
    const NAME: &'static str = "tensorport.v1.linear";

    fn run(call: &mut Call<'_>) -> Result<()> {
        let (x, weight, bias) = match call.arg_count() {
            2 => call.args().map(|[x, weight]| (x, weight, None))?,
            3 => call.args().map(|[x, weight, bias]| (x, weight, Some(bias)))?,
            found => return Err(FfiError::invalid_argument("number of arguments", found, "2 or 3")),
        };
        let [out] = call.results()?;
        let ([m, k], [n, _]) = (x.shape()?, weight.shape()?);
        expect_shape("result", out.shape()?, [m, n])?;
        let weight = bf16_matrix("weight", &weight, &[n], k)?;
        let bias = bias.map(|bias| expect_shape("bias", bias.shape()?, [n]).and(floats(&bias))).transpose()?;
        run_linear(call, &x, &weight, bias, out)
    }
}

/// `tensorport.v1.mxfp4_matmul`: x [M, K], blocks [N, K / 32, 16], scales [N, K / 32] -> [M, N].
///
/// With `INT8` it is `tensorport.v1.mxfp4_matmul_int8`, for which activations are rounded to int8, as in the others that
/// have it.
pub struct Mxfp4Matmul<const INT8: bool>;

impl<const INT8: bool> Handler for Mxfp4Matmul<INT8> {
    const NAME: &'static str = if INT8 { "tensorport.v1.mxfp4_matmul_int8" } else { "tensorport.v1.mxfp4_matmul" };

    fn run(call: &mut Call<'_>) -> Result<()> {
        let [x, blocks, scales] = call.args()?;
        let [out] = call.results()?;
        let ([m, k], [n, _]) = (x.shape()?, scales.shape()?);
        expect_shape("result", out.shape()?, [m, n])?;
        let matrix = mxfp4_matrix::<INT8>("w", &blocks, &scales, &[n], k)?;
        run_linear(call, &x, &matrix, None, out)
    }
}

/// `tensorport.v1.mxfp4_expert_matmul`: x [T, K], blocks [E, N, K / 32, 16], scales [E, N, K / 32], ids int32 [T]
/// -> [T, N].
pub struct Mxfp4ExpertMatmul<const INT8: bool>;

impl<const INT8: bool> Handler for Mxfp4ExpertMatmul<INT8> {
    const NAME: &'static str =
        if INT8 { "tensorport.v1.mxfp4_expert_matmul_int8" } else { "tensorport.v1.mxfp4_expert_matmul" };

    fn run(call: &mut Call<'_>) -> Result<()> {
        let [x, blocks, scales, ids] = call.args()?;
        let [out] = call.results()?;
        let ([tokens, k], [experts, n, _]) = (x.shape()?, scales.shape()?);
        expect_shape("ids", ids.shape()?, [tokens])?;
        expect_shape("result", out.shape()?, [tokens, n])?;
        let stack = mxfp4_matrix::<INT8>("w", &blocks, &scales, &[experts, n], k)?;
        expert_linear(Level::best(), &call.threads(), floats(&x)?, &stack, experts, ids.slice()?, floats_mut(out)?);
        Ok(())
    }
}

/// `tensorport.v1.mxfp4_moe`: x [T, H], indices int32 [T, k], weights float32 [T, k], blocks and scales of gate and up
/// [E, 2 I, H], their bias [E, 2 I], blocks and scales of down [E, H, I], its bias [E, H] -> [T, H].
///
/// Attributes: `limit` and `alpha`, float32. With `INT8` what the second layer multiplies is rounded, too.
pub struct Mxfp4Moe<const INT8: bool>;

impl<const INT8: bool> Handler for Mxfp4Moe<INT8> {
    const NAME: &'static str = if INT8 { "tensorport.v1.mxfp4_moe_int8" } else { "tensorport.v1.mxfp4_moe" };

    fn run(call: &mut Call<'_>) -> Result<()> {
        let [x, indices, weights, gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias] = call.args()?;
        let sizes = MoeSizes::of(&x, &indices, &gate_up_bias)?;
        let (rows, k) = sizes.gate_up();
        let gate_up = mxfp4_matrix::<INT8>("gate_up", &gate_up, &gate_up_scales, &rows, k)?;
        let (rows, k) = sizes.down();
        let down = mxfp4_matrix::<INT8>("down", &down, &down_scales, &rows, k)?;
        run_moe(call, &sizes, &[x, indices, weights, gate_up_bias, down_bias], gate_up, down)
    }
}

/// `tensorport.v1.dense_moe`: as `mxfp4_moe`, with one bfloat16 array instead of blocks and scales each.
pub struct DenseMoe;

impl Handler for DenseMoe {
    const NAME: &'static str = "tensorport.v1.dense_moe";

    fn run(call: &mut Call<'_>) -> Result<()> {
        let [x, indices, weights, gate_up, gate_up_bias, down, down_bias] = call.args()?;
        let sizes = MoeSizes::of(&x, &indices, &gate_up_bias)?;
        let (rows, k) = sizes.gate_up();
        let gate_up = bf16_matrix("gate_up", &gate_up, &rows, k)?;
        let (rows, k) = sizes.down();
        let down = bf16_matrix("down", &down, &rows, k)?;
        run_moe(call, &sizes, &[x, indices, weights, gate_up_bias, down_bias], gate_up, down)
    }
}

/// `tensorport.v1.attention`: query [B, T, N, D], key and value [B, S, G, D], int32 positions [B, T] and [B, S], and maybe
/// sinks [N] -> [B, T, N, D].
///
/// Attributes: `scale`, float32, and `sliding_window`, int64, below 1 for none.
pub struct GroupedAttention;

impl Handler for GroupedAttention {
    const NAME: &'static str = "tensorport.v1.attention";

    fn run(call: &mut Call<'_>) -> Result<()> {
        let (scale, window): (f32, i64) = (call.attribute("scale")?, call.attribute("sliding_window")?);
        let ([query, key, value, query_positions, key_positions], sinks) = match call.arg_count() {
            5 => (call.args()?, None),
            6 => call.args().map(|[query, key, value, of_query, of_key, sinks]| {
                ([query, key, value, of_query, of_key], Some(sinks))
            })?,
            found => return Err(FfiError::invalid_argument("number of arguments", found, "5 or 6")),
        };
        let [out] = call.results()?;
        let shape @ [batch, queries, heads, head_dim] = query.shape()?;
        let [_, keys, key_heads, _] = key.shape()?;
        expect_shape("key", key.shape()?, [batch, keys, key_heads, head_dim])?;
        expect_shape("value", value.shape()?, [batch, keys, key_heads, head_dim])?;
        expect_shape("query positions", query_positions.shape()?, [batch, queries])?;
        expect_shape("key positions", key_positions.shape()?, [batch, keys])?;
        expect_shape("result", out.shape()?, shape)?;
        if head_dim == 0 {
            return Err(FfiError::invalid_argument("size of a head", 0, "at least 1"));
        }
        if key_heads == 0 {
            return Err(FfiError::invalid_argument("heads of keys", 0, "at least 1"));
        }
        if !heads.is_multiple_of(key_heads) {
            return Err(FfiError::invalid_argument("heads of queries", heads, format!("a multiple of {key_heads}")));
        }
        let sinks =
            sinks.map(|sinks| expect_shape("sinks", sinks.shape()?, [heads]).and(floats(&sinks))).transpose()?;
        let inputs = Attention {
            query: floats(&query)?,
            key: floats(&key)?,
            value: floats(&value)?,
            query_positions: query_positions.slice()?,
            key_positions: key_positions.slice()?,
            sinks,
            batch,
            heads,
            key_heads,
            head_dim,
            scale,
            // A query's position and all before it are no more than a uint32 holds.
            window: (window > 0).then(|| u32::try_from(window).unwrap_or(u32::MAX)),
        };
        attention(Level::best(), &call.threads(), &inputs, floats_mut(out)?);
        Ok(())
    }
}

/// `tensorport.v1.write_slots`: array [B, S, G, D], rows [B, T, G, D] in its dtype, int32 slots [B, T] -> the array, in
/// place.
pub struct WriteSlots;

impl Handler for WriteSlots {
    const NAME: &'static str = "tensorport.v1.write_slots";
    const IS_IN_PLACE: bool = true;

    fn run(call: &mut Call<'_>) -> Result<()> {
        if call.arg_count() != 3 {
            return Err(FfiError::invalid_argument("number of arguments", call.arg_count(), 3));
        }
        let (rows, slots) = (call.arg(1)?, call.arg(2)?);
        let [out] = call.results()?;
        let ([batch, _, heads, head_dim], [_, tokens, ..]) = (out.shape()?, rows.shape::<4>()?);
        expect_shape("rows", rows.shape()?, [batch, tokens, heads, head_dim])?;
        expect_shape("slots", slots.shape()?, [batch, tokens])?;
        if rows.dtype() != out.dtype() {
            return Err(FfiError::invalid_argument("rows", rows.dtype(), out.dtype()));
        }
        write_slots(floats_mut(out)?, floats(&rows)?, slots.slice()?, batch);
        Ok(())
    }
}

/// Sizes of a mixture of experts; `width` is that of gate and up together.
struct MoeSizes {
    tokens: usize,
    k: usize,
    hidden: usize,
    experts: usize,
    width: usize,
}

impl MoeSizes {
    fn of(x: &Buffer<'_>, indices: &Buffer<'_>, gate_up_bias: &Buffer<'_>) -> Result<Self> {
        let ([tokens, hidden], [_, k], [experts, width]) = (x.shape()?, indices.shape()?, gate_up_bias.shape()?);
        // Matrices without rows do not tell their K: from none the kernel cannot see how wide the stream is.
        if experts == 0 {
            return Err(FfiError::invalid_argument("experts", 0, "at least 1"));
        }
        if width == 0 || !width.is_multiple_of(2) {
            return Err(FfiError::invalid_argument("width of gate_up", width, "an even number above 0"));
        }
        Ok(Self { tokens, k, hidden, experts, width })
    }

    /// Rows of the first layer's matrices, and their K.
    fn gate_up(&self) -> ([usize; 2], usize) {
        ([self.experts, self.width], self.hidden)
    }

    /// Rows of the second layer's matrices, and their K.
    fn down(&self) -> ([usize; 2], usize) {
        ([self.experts, self.hidden], self.width / 2)
    }
}

fn run_moe(
    call: &mut Call<'_>,
    sizes: &MoeSizes,
    [x, indices, weights, gate_up_bias, down_bias]: &[Buffer<'_>; 5],
    gate_up: Matrix<'_>,
    down: Matrix<'_>,
) -> Result<()> {
    let (limit, alpha): (f32, f32) = (call.attribute("limit")?, call.attribute("alpha")?);
    if limit.is_nan() || limit < 0.0 {
        return Err(FfiError::invalid_argument("limit", limit, "at least 0"));
    }
    let [out] = call.results()?;
    expect_shape("indices", indices.shape()?, [sizes.tokens, sizes.k])?;
    expect_shape("weights", weights.shape()?, [sizes.tokens, sizes.k])?;
    expect_shape("bias of down", down_bias.shape()?, [sizes.experts, sizes.hidden])?;
    expect_shape("result", out.shape()?, [sizes.tokens, sizes.hidden])?;
    let (gate_up_bias, down_bias) = (floats(gate_up_bias)?, floats(down_bias)?);
    let experts = Experts { count: sizes.experts, gate_up, gate_up_bias, down, down_bias, limit, alpha };
    let (threads, indices, weights) = (call.threads(), indices.slice()?, weights.slice()?);
    moe(Level::best(), &threads, floats(x)?, indices, weights, &experts, floats_mut(out)?);
    Ok(())
}

fn run_linear(
    call: &Call<'_>,
    x: &Buffer<'_>,
    matrix: &Matrix<'_>,
    bias: Option<Floats<'_>>,
    out: BufferMut<'_>,
) -> Result<()> {
    let (x, out) = (floats(x)?, floats_mut(out)?);
    // The kernel counts the rows of x by what each gives: of nothing it cannot.
    if !out.is_empty() {
        linear(Level::best(), &call.threads(), x, matrix, bias, out);
    }
    Ok(())
}

/// Blocks [..., K / 32, 16] and scales [..., K / 32] as rows of K; `rows` are the axes before it.
fn mxfp4_matrix<'a, const INT8: bool>(
    what: &str,
    blocks: &Buffer<'a>,
    scales: &Buffer<'a>,
    rows: &[usize],
    k: usize,
) -> Result<Matrix<'a>> {
    if !k.is_multiple_of(MX_BLOCK_SIZE) {
        return Err(FfiError::invalid_argument(format!("K of {what}"), k, format!("a multiple of {MX_BLOCK_SIZE}")));
    }
    let groups = k / MX_BLOCK_SIZE;
    expect_dims(&format!("scales of {what}"), scales, &[rows, &[groups]].concat())?;
    expect_dims(&format!("blocks of {what}"), blocks, &[rows, &[groups, BLOCK_BYTES]].concat())?;
    let matrix = if INT8 { Matrix::mxfp4_int8 } else { Matrix::mxfp4 };
    Ok(matrix(product(rows)?, blocks.slice()?, scales.slice()?))
}

/// bfloat16 [..., K] as rows of K; `rows` are the axes before it.
fn bf16_matrix<'a>(what: &str, weight: &Buffer<'a>, rows: &[usize], k: usize) -> Result<Matrix<'a>> {
    if weight.dtype() != DType::BF16 {
        return Err(FfiError::invalid_argument(what, weight.dtype(), DType::BF16));
    }
    expect_dims(what, weight, &[rows, &[k]].concat())?;
    Ok(Matrix::bf16(product(rows)?, k, weight.bytes()?))
}

fn floats<'a>(buffer: &Buffer<'a>) -> Result<Floats<'a>> {
    match buffer.dtype() {
        DType::BF16 => Ok(Floats::Bf16(buffer.slice()?)),
        DType::F32 => Ok(Floats::F32(buffer.slice()?)),
        _ => Err(buffer.unexpected_dtype("bfloat16 or float32")),
    }
}

fn floats_mut(buffer: BufferMut<'_>) -> Result<FloatsMut<'_>> {
    match buffer.dtype() {
        DType::BF16 => Ok(FloatsMut::Bf16(buffer.slice()?)),
        DType::F32 => Ok(FloatsMut::F32(buffer.slice()?)),
        _ => Err(buffer.unexpected_dtype("bfloat16 or float32")),
    }
}

fn expect_shape<const N: usize>(what: &str, found: [usize; N], expected: [usize; N]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(FfiError::invalid_argument(what, format!("{found:?}"), format!("{expected:?}")))
}

/// As [`expect_shape`], for numbers of axes that are known when it runs.
fn expect_dims(what: &str, buffer: &Buffer<'_>, expected: &[usize]) -> Result<()> {
    let found = buffer.dims().iter().map(|&dim| usize::try_from(dim).ok());
    if found.eq(expected.iter().copied().map(Some)) {
        return Ok(());
    }
    Err(FfiError::invalid_argument(what, format!("{:?}", buffer.dims()), format!("{expected:?}")))
}

fn product(sizes: &[usize]) -> Result<usize> {
    let product = sizes.iter().try_fold(1, |product: usize, &size| product.checked_mul(size));
    product.ok_or_else(|| FfiError::invalid_argument("rows", format!("{sizes:?}"), "fewer than addresses"))
}

#[cfg(test)]
mod tests;
