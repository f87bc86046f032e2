"""Products with MXFP4 matrices in plain JAX, a tile of rows at a time: no dense copy of a whole matrix.

Matrices stand in a stack [E, N, K] and are named by their index, so that a tile is sliced right out of the stack. The
two nibbles of a byte are values of neighbouring columns. Decoding them into their order costs more than all the rest,
so even and odd columns are decoded into a half each, and `x` is divided likewise (on a CPU with AVX-512, XLA takes
2.8 ms for 8.3 million values in halves and 5.6 ms in order; one core, 2026-11).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8

from tensorport.kernels.varying import full_alike
from tensorport.mxfp4.types import MX_BLOCK_BYTES, MXFP4Array

__all__ = ["accumulator_dtype", "decode_halves", "product", "transposed_product"]

Index = Int32[Array, ""] | int

_NAN_SCALE = 255  # OCP MX v1.0

# From so many rows of x on, bfloat16 operands are faster than float32 ones (a CPU with AVX-512, 2026-11: one row takes
# 1.9 ms in float32 and 3.4 ms in bfloat16, 16 rows take the same, 256 rows 43 ms and 24 ms).
_BFLOAT16_ROWS = 16


def accumulator_dtype(x_dtype: DTypeLike) -> jnp.dtype:
    """float32, and float64 where `x` is."""
    return np.dtype(np.float64 if x_dtype == jnp.float64 else np.float32)


def product(x: Float[Array, "m k"], w: MXFP4Array, index: Index, *, block_n: int) -> Float[Array, "m n"]:
    """X . w[index] transposed, accumulated and returned in the accumulator's dtype.

    Args:
        x: any float dtype; never narrowed.
        w: [E, N, K].
        index: which matrix.
        block_n: rows decoded at once.
    """
    m, n = x.shape[0], w.shape[1]
    block_n, dtype, operand = min(block_n, n), accumulator_dtype(x.dtype), _operand_dtype(x)
    halves = [x[:, first::2].astype(operand) for first in (0, 1)]

    def tile_product(start: Index) -> Float[Array, "m block_n"]:
        even, odd = _tile(w, index, start, block_n, operand)
        return _dot(halves[0], even, 1, dtype) + _dot(halves[1], odd, 1, dtype)

    if block_n == n:
        return tile_product(0)

    def step(number: Int32[Array, ""], out: Float[Array, "m n"]) -> Float[Array, "m n"]:
        # The last tile begins early enough to be whole; what it shares with the one before is the same in both.
        start = jnp.minimum(number * block_n, n - block_n)
        return jax.lax.dynamic_update_slice(out, tile_product(start), (jnp.zeros_like(start), start))

    out: Array = jax.lax.fori_loop(
        jnp.int32(0), jnp.int32(-(-n // block_n)), step, full_alike((x, w), (m, n), 0.0, dtype)
    )
    return out


def transposed_product(g: Float[Array, "m n"], w: MXFP4Array, index: Index, *, block_n: int) -> Float[Array, "m k"]:
    """G . w[index], accumulated and returned in the accumulator's dtype: what the gradient of :func:`product` needs."""
    (m, n), k = g.shape, w.shape[2]
    block_n, dtype, operand = min(block_n, n), accumulator_dtype(g.dtype), _operand_dtype(g)
    lhs = g.astype(operand)

    def tile_products(columns: Float[Array, "m block_n"], start: Index) -> list[Float[Array, "m half_k"]]:
        return [_dot(columns, half, 0, dtype) for half in _tile(w, index, start, block_n, operand)]

    def step(number: Int32[Array, ""], sums: list[Float[Array, "m half_k"]]) -> list[Float[Array, "m half_k"]]:
        start = jnp.minimum(number * block_n, n - block_n)
        columns = jax.lax.dynamic_slice(lhs, (jnp.zeros_like(start), start), (m, block_n))
        # Rows that the tile before had count once.
        is_new = start + jnp.arange(block_n, dtype=jnp.int32) >= number * block_n
        columns = jnp.where(is_new[None], columns, jnp.zeros((), operand))
        return [total + part for total, part in zip(sums, tile_products(columns, start), strict=True)]

    if block_n == n:
        sums = tile_products(lhs, 0)
    else:
        sums = [full_alike((g, w), (m, k // 2), 0.0, dtype)] * 2
        sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-n // block_n)), step, sums)
    return jnp.stack(sums, axis=-1).reshape(m, k)


def _operand_dtype(x: Float[Array, "m k"]) -> jnp.dtype:
    """What both operands are multiplied in. bfloat16 holds every MXFP4 value; other narrow floats do not."""
    is_bfloat16 = x.dtype == jnp.bfloat16 and len(x) >= _BFLOAT16_ROWS
    return jnp.dtype(jnp.bfloat16) if is_bfloat16 else accumulator_dtype(x.dtype)


def _tile(
    w: MXFP4Array, index: Index, start: Index, rows: int, dtype: DTypeLike
) -> tuple[Float[Array, "rows half_k"], Float[Array, "rows half_k"]]:
    """Even and odd columns of the rows `start` and following of w[index], decoded."""
    groups = w.shape[2] // 32
    first = [jnp.asarray(place, jnp.int32) for place in (index, start, 0, 0)]
    blocks = jax.lax.dynamic_slice(w.blocks, first, (1, rows, groups, MX_BLOCK_BYTES))
    scales = jax.lax.dynamic_slice(w.scales, first[:3], (1, rows, groups))
    return decode_halves(blocks[0], scales[0], dtype)


def decode_halves(
    blocks: UInt8[Array, "rows groups 16"], scales: UInt8[Array, "rows groups"], dtype: DTypeLike
) -> tuple[Float[Array, "rows half_k"], Float[Array, "rows half_k"]]:
    """Even and odd columns of decoded rows: exact, but that a backend may flush what is subnormal in float32.

    Products flush such operands on those backends anyway. :func:`tensorport.mxfp4.dequantize` never does.
    """
    scale = scales[..., None].astype(jnp.int32)
    if dtype == jnp.float64:
        offset = jnp.int32(126)
        scale_bits = (scale + (1023 - 127)).astype(jnp.uint64) << 52
        factor = jax.lax.bitcast_convert_type(scale_bits, jnp.float64)
    else:
        # Small scales count twice, and their codes half, so that the smallest is not subnormal and the largest finite.
        is_large = scale >= 128
        offset = jnp.where(is_large, 126, 125)
        factor = jax.lax.bitcast_convert_type(jnp.where(is_large, scale, scale + 1) << 23, jnp.float32)
    factor = jnp.where(scale == _NAN_SCALE, jnp.nan, factor)
    nibbles = blocks.astype(jnp.int32)

    def half(codes: Int32[Array, "rows groups 16"]) -> Float[Array, "rows half_k"]:
        magnitude = codes & 7
        # Exponent and mantissa of E2M1 stand in a code as in float32; code 1 is its subnormal and code 0 zero.
        bits = (magnitude << 22) + (offset << 23) - jnp.where(magnitude == 1, 1 << 22, 0)
        bits = jnp.where(magnitude == 0, 0, bits) | (codes >> 3) << 31
        values = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(factor.dtype) * factor
        return values.astype(dtype).reshape(len(blocks), MX_BLOCK_BYTES * scales.shape[1])

    return half(nibbles & 15), half(nibbles >> 4)


def _dot(lhs: Array, rhs: Array, rhs_axis: int, dtype: DTypeLike) -> Array:
    """Contracts the last axis of `lhs` with one of `rhs`."""
    return jax.lax.dot_general(
        lhs,
        rhs,
        (((1,), (rhs_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
