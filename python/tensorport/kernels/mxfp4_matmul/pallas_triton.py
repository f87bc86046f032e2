"""matmul on NVIDIA GPUs, by Pallas through Triton: codes are decoded in registers, and a tile of them is read once.

Few rows of x are multiplied lane by lane in float32, for the matrix takes the time; many by the tensor cores, bfloat16
as it is and other dtypes as exact float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, UInt8

from tensorport.kernels import triton
from tensorport.kernels.mxfp4_matmul.configs import FEW_ROWS, TritonConfig
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["matmul"]


def matmul(x: Float[Array, "*batch k"], w: MXFP4Array, *, interpret: bool = False) -> Float[Array, "*batch n"]:
    """X [..., K] . w [N, K] -> [..., N]. `interpret` runs it on any device, slowly: for tests."""
    *batch, k = x.shape
    n = w.shape[0]
    m = math.prod(batch)
    even, odd = triton.split_pairs(x.reshape(m, k))
    config = TritonConfig.choose(m)
    body = _few_rows if m <= FEW_ROWS else _many_rows
    out = pl.pallas_call(
        functools.partial(body, config),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(pl.cdiv(m, config.block_m), pl.cdiv(n, config.block_n)),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="mxfp4_matmul",
    )(even, odd, w.blocks.reshape(n, k // 2), w.scales)
    rows: Array = out
    return rows.reshape(*batch, n)


def _few_rows(  # noqa: PLR0917 - the refs of a kernel in their order
    config: TritonConfig,
    even: Float[Any, "m k/2"],
    odd: Float[Any, "m k/2"],
    codes: UInt8[Any, "n k/2"],
    scales: UInt8[Any, "n k/32"],
    out: Float[Any, "m n"],
) -> None:
    """All rows of x by `block_n` rows of w."""
    m, nbytes = even.shape
    rows, is_row = _slice(pl.program_id(1) * config.block_n, config.block_n, codes.shape[0])

    def add_tile(tile: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns, is_column = _slice(tile * config.block_k, config.block_k, nbytes)
        packed = _load(codes, rows, is_row, columns, is_column).astype(jnp.uint16)
        low, high = triton.decode(packed & 15), triton.decode(packed >> 4)
        blocks = config.block_k // triton.BYTES_OF_BLOCK
        block, is_block = _slice(tile * blocks, blocks, scales.shape[1])
        factors = triton.scale_of(_load(scales, rows, is_row, block, is_block))

        def add_row(row: int, sum_of_row: Array) -> Array:
            this, is_this = pl.ds(row, 1), jnp.ones(1, bool)
            x_even = _load(even, this, is_this, columns, is_column).astype(jnp.float32)
            x_odd = _load(odd, this, is_this, columns, is_column).astype(jnp.float32)
            products = low * x_even + high * x_odd
            # Scaled once for a block, not for each element.
            of_blocks = products.reshape(config.block_n, blocks, triton.BYTES_OF_BLOCK).sum(axis=-1)
            return sum_of_row + (of_blocks * factors).sum(axis=-1)

        return tuple(add_row(row, sum_of_row) for row, sum_of_row in enumerate(sums))

    zeros = (jnp.zeros(config.block_n, jnp.float32),) * m
    sums = jax.lax.fori_loop(0, pl.cdiv(nbytes, config.block_k), add_tile, zeros)
    for row, sum_of_row in enumerate(sums):
        pltriton.store(out.at[pl.ds(row, 1), rows], sum_of_row[None].astype(out.dtype), mask=is_row[None])


def _many_rows(  # noqa: PLR0917 - the refs of a kernel in their order
    config: TritonConfig,
    even: Float[Any, "m k/2"],
    odd: Float[Any, "m k/2"],
    codes: UInt8[Any, "n k/2"],
    scales: UInt8[Any, "n k/32"],
    out: Float[Any, "m n"],
) -> None:
    """`block_m` rows of x by `block_n` rows of w."""
    m, nbytes = even.shape
    x_rows, is_x_row = _slice(pl.program_id(0) * config.block_m, config.block_m, m)
    rows, is_row = _slice(pl.program_id(1) * config.block_n, config.block_n, codes.shape[0])
    # A weight has three bits and a power of two: exact in bfloat16, unless float16's x need another dtype.
    operand = jnp.bfloat16 if even.dtype == jnp.bfloat16 else jnp.float32

    def add_tile(tile: Array, sums: Float[Array, "m n"]) -> Float[Array, "m n"]:
        columns, is_column = _slice(tile * config.block_k, config.block_k, nbytes)
        packed = _load(codes, rows, is_row, columns, is_column).astype(jnp.uint16)
        blocks = config.block_k // triton.BYTES_OF_BLOCK
        block, is_block = _slice(tile * blocks, blocks, scales.shape[1])
        factors = triton.spread(triton.scale_of(_load(scales, rows, is_row, block, is_block)))
        for x, values in ((even, packed & 15), (odd, packed >> 4)):
            weights = (triton.decode(values) * factors).astype(operand)
            x_tile = _load(x, x_rows, is_x_row, columns, is_column).astype(operand)
            sums += pltriton.dot(x_tile, weights.T, allow_tf32=False)
        return sums

    zeros = jnp.zeros((config.block_m, config.block_n), jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(nbytes, config.block_k), add_tile, zeros)
    pltriton.store(out.at[x_rows, rows], sums.astype(out.dtype), mask=is_x_row[:, None] & is_row[None])


def _slice(start: Any, count: int, end: int) -> tuple[Any, Array]:
    """`count` indices from `start` on, and which of them are below `end`."""
    return pl.ds(start, count), start + jnp.arange(count) < end


def _load(ref: Any, rows: Any, is_row: Array, columns: Any, is_column: Array) -> Array:
    """A tile, with zeros beyond the array."""
    tile: Array = pltriton.load(ref.at[rows, columns], mask=is_row[:, None] & is_column[None], other=0)
    return tile
