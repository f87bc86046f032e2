"""matmul on NVIDIA GPUs, by Pallas through Triton: codes are decoded in registers, and a tile of them is read once.

Few rows of x are multiplied lane by lane in float32, for the matrix takes the time; many by the tensor cores, bfloat16
as it is and other dtypes as exact float32.
"""

import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, UInt8

from tensorport.kernels.mxfp4_matmul.configs import FEW_ROWS, TritonConfig
from tensorport.kernels.triton_tiles import (
    Halves,
    Matrix,
    matrix_products,
    one,
    span,
    split_pairs,
    store,
    vector_products,
)
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["matmul"]


def matmul(x: Float[Array, "*batch k"], w: MXFP4Array, *, interpret: bool = False) -> Float[Array, "*batch n"]:
    """X [..., K] . w [N, K] -> [..., N]. `interpret` runs it on any device, slowly: for tests."""
    *batch, k = x.shape
    n = w.shape[0]
    m = math.prod(batch)
    even, odd = split_pairs(x.reshape(m, k))
    config = TritonConfig.choose(m, n, k, x.dtype)
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
    rows = span(pl.program_id(1) * config.block_n, config.block_n, codes.shape[0])
    x_rows = range(even.shape[0])
    sums = vector_products(config, Halves(even, odd), x_rows, Matrix(codes, scales), rows)
    for row, sum_of_row in zip(x_rows, sums, strict=True):
        store(out, one(row), rows, sum_of_row[None])


def _many_rows(  # noqa: PLR0917 - the refs of a kernel in their order
    config: TritonConfig,
    even: Float[Any, "m k/2"],
    odd: Float[Any, "m k/2"],
    codes: UInt8[Any, "n k/2"],
    scales: UInt8[Any, "n k/32"],
    out: Float[Any, "m n"],
) -> None:
    """`block_m` rows of x by `block_n` rows of w."""
    x_rows = span(pl.program_id(0) * config.block_m, config.block_m, even.shape[0])
    rows = span(pl.program_id(1) * config.block_n, config.block_n, codes.shape[0])
    sums = matrix_products(config, [Halves(even, odd)], x_rows, Matrix(codes, scales), rows)
    store(out, x_rows, rows, sums)
