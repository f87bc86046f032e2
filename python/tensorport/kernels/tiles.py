"""Products with MXFP4 matrices in plain JAX, a tile of rows at a time: no dense copy of a whole matrix.

Matrices stand in a stack [E, N, K] and are named by their index, so that a tile is sliced right out of the stack.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from tensorport.mxfp4.codec import decode
from tensorport.mxfp4.types import MX_BLOCK_BYTES, MXFP4Array

__all__ = ["accumulator_dtype", "product", "transposed_product"]

Index = Int32[Array, ""] | int


def accumulator_dtype(x_dtype: DTypeLike) -> jnp.dtype:
    """float32, and float64 where `x` is."""
    return jnp.dtype(jnp.float64 if x_dtype == jnp.float64 else jnp.float32)


def product(
    x: Float[Array, "m k"], w: MXFP4Array, index: Index, *, block_n: int
) -> Float[Array, "m n"]:
    """x . w[index] transposed, accumulated and returned in the accumulator's dtype.

    Args:
        x: any float dtype; never narrowed.
        w: [E, N, K].
        index: which matrix.
        block_n: rows decoded at once.
    """
    (m, _), n = x.shape, w.shape[1]
    block_n = min(block_n, n)
    operand = _operand_dtype(x.dtype)
    lhs = x.astype(operand)
    dtype = accumulator_dtype(x.dtype)

    def tile_product(start: Index) -> Float[Array, "m block_n"]:
        return _dot(lhs, _tile(w, index, start, block_n, operand), 1, dtype)

    if block_n == n:
        return tile_product(0)

    def step(number: Int32[Array, ""], out: Float[Array, "m n"]) -> Float[Array, "m n"]:
        # The last tile begins early enough to be whole; what it shares with the one before is the same in both.
        start = jnp.minimum(number * block_n, n - block_n)
        return jax.lax.dynamic_update_slice(out, tile_product(start), (jnp.zeros_like(start), start))

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-n // block_n)), step, jnp.zeros((m, n), dtype))


def transposed_product(
    g: Float[Array, "m n"], w: MXFP4Array, index: Index, *, block_n: int
) -> Float[Array, "m k"]:
    """g . w[index], accumulated and returned in the accumulator's dtype: what the gradient of :func:`product` needs."""
    (m, n), k = g.shape, w.shape[2]
    block_n = min(block_n, n)
    operand = _operand_dtype(g.dtype)
    lhs = g.astype(operand)
    dtype = accumulator_dtype(g.dtype)
    if block_n == n:
        return _dot(lhs, _tile(w, index, 0, n, operand), 0, dtype)

    def step(number: Int32[Array, ""], out: Float[Array, "m k"]) -> Float[Array, "m k"]:
        start = jnp.minimum(number * block_n, n - block_n)
        columns = jax.lax.dynamic_slice(lhs, (jnp.zeros_like(start), start), (m, block_n))
        # Rows that the tile before had count once.
        is_new = start + jnp.arange(block_n) >= number * block_n
        columns = jnp.where(is_new[None], columns, jnp.zeros((), operand))
        return out + _dot(columns, _tile(w, index, start, block_n, operand), 0, dtype)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-n // block_n)), step, jnp.zeros((m, k), dtype))


def _operand_dtype(x_dtype: DTypeLike) -> jnp.dtype:
    """What both operands are multiplied in. bfloat16 holds every MXFP4 value; other narrow floats do not."""
    return jnp.dtype(jnp.bfloat16) if x_dtype == jnp.bfloat16 else accumulator_dtype(x_dtype)


def _tile(w: MXFP4Array, index: Index, start: Index, rows: int, dtype: DTypeLike) -> Float[Array, "rows k"]:
    """Rows `start` and following of w[index], decoded."""
    groups = w.shape[2] // 32
    first = [jnp.asarray(place, jnp.int32) for place in (index, start, 0, 0)]
    blocks = jax.lax.dynamic_slice(w.blocks, first, (1, rows, groups, MX_BLOCK_BYTES))
    scales = jax.lax.dynamic_slice(w.scales, first[:3], (1, rows, groups))
    return decode(blocks[0], scales[0], dtype)


def _dot(lhs: Array, rhs: Array, rhs_axis: int, dtype: DTypeLike) -> Array:
    """Contracts the last axis of `lhs` with one of `rhs`."""
    return jax.lax.dot_general(
        lhs,
        rhs,
        (((1,), (rhs_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
