"""expert_matmul on NVIDIA GPUs, by Pallas through Triton.

Few tokens read the matrix of their expert once for each; many are sorted by expert, and a chunk of one expert goes
through the tensor cores.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from tensorport.kernels.grouping import Chunks, chunk_by_expert
from tensorport.kernels.mxfp4_expert_matmul.configs import FEW_TOKENS, choose_triton
from tensorport.kernels.mxfp4_matmul.configs import TritonConfig
from tensorport.kernels.triton_tiles import (
    Halves,
    Matrix,
    Span,
    matrix_products,
    one,
    span,
    split_pairs,
    store,
    vector_products,
)
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["expert_matmul", "expert_of", "grouped", "ids_of_experts"]


def expert_matmul(
    x: Float[Array, "t k"], w: MXFP4Array, expert_ids: Int32[Array, " t"], *, interpret: bool = False
) -> Float[Array, "t n"]:
    """X [T, K] . w[expert_ids] [T, N, K] -> [T, N]. `interpret` runs it on any device, slowly: for tests."""
    (tokens, k), (experts, n, _) = x.shape, w.shape
    config = choose_triton("mxfp4.expert_matmul", tokens, experts, n, k, x.dtype)
    if tokens > FEW_TOKENS:
        chunks = chunk_by_expert(expert_ids, experts, config.block_m)
        return grouped(config, [x], w, chunks, choices=1, dtype=x.dtype, interpret=interpret)
    out: Array = pl.pallas_call(
        functools.partial(_few_tokens, config),
        out_shape=jax.ShapeDtypeStruct((tokens, n), x.dtype),
        grid=(tokens, pl.cdiv(n, config.block_n)),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="mxfp4_expert_matmul",
    )(ids_of_experts(expert_ids, experts), *split_pairs(x), w.blocks.reshape(experts, n, k // 2), w.scales)
    return out


def ids_of_experts(expert_ids: Int32[Array, "*batch"], experts: int) -> Int32[Array, "*batch"]:
    """Ids, -1 for those that no expert has."""
    return jnp.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, -1)


def expert_of(ids: Any, number: Any) -> tuple[Array, Array]:
    """Within a kernel: an expert that can be read, and whether id `number` is its."""
    expert = pltriton.load(ids.at[number])
    return jnp.maximum(expert, 0), expert >= 0


def _few_tokens(  # noqa: PLR0917 - the refs of a kernel in their order
    config: TritonConfig, ids: Any, even: Any, odd: Any, codes: Any, scales: Any, out: Any
) -> None:
    """One token by `block_n` rows of its expert's matrix."""
    token = pl.program_id(0)
    expert, is_valid = expert_of(ids, token)
    rows = span(pl.program_id(1) * config.block_n, config.block_n, codes.shape[1])
    w = Matrix(codes, scales, (expert,))
    (sums,) = vector_products(config, Halves(even, odd), [token], w, rows._replace(is_there=rows.is_there & is_valid))
    store(out, one(token), rows, jnp.where(is_valid, sums, jnp.nan)[None])


def grouped(
    config: TritonConfig,
    parts: Sequence[Float[Array, "t k"]],
    w: MXFP4Array,
    chunks: Chunks,
    *,
    choices: int,
    dtype: Any,
    interpret: bool,
) -> Float[Array, "rows n"]:
    """The rows that `chunks` has grouped, `choices` for each token, by the matrix of their expert: [T * choices, N].

    x [T, K] is the sum of its parts. A row with an id that no expert has is NaN.
    """
    (experts, n, k), (rows,) = w.shape, chunks.order.shape
    refs = [half for part in parts for half in split_pairs(part)]
    out: Array = pl.pallas_call(
        functools.partial(_chunk, config, choices),
        out_shape=jax.ShapeDtypeStruct((rows, n), dtype),
        # Programs that run beside each other share the tile of a matrix, or the chunk of x.
        grid=(chunks.expert.shape[0], pl.cdiv(n, config.block_n)),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="mxfp4_expert_matmul_grouped",
    )(
        chunks.expert,
        chunks.start,
        # Behind the last chunk there is none.
        jnp.where(jnp.arange(chunks.expert.shape[0]) < chunks.total, chunks.stop, chunks.start),
        chunks.order,
        *refs,
        w.blocks.reshape(experts, n, k // 2),
        w.scales,
    )
    return jnp.where(chunks.is_valid[:, None], out, jnp.nan)


def _chunk(config: TritonConfig, choices: int, *refs: Any) -> None:
    """A chunk of one expert's rows by `block_n` rows of its matrix."""
    experts, starts, stops, order, *halves, codes, scales, out = refs
    chunk = pl.program_id(0)
    start, stop = pltriton.load(starts.at[chunk]), pltriton.load(stops.at[chunk])
    place = start + jnp.arange(config.block_m)
    # Rows that are not there lie beyond the array, where the interpreter, too, writes nothing.
    row = pltriton.load(order.at[place], mask=place < stop, other=out.shape[0])
    rows, x_rows = Span(row, place < stop), Span(row // choices, place < stop)
    columns = span(pl.program_id(1) * config.block_n, config.block_n, codes.shape[1])
    w = Matrix(codes, scales, (pltriton.load(experts.at[chunk]),))
    parts = [Halves(even, odd) for even, odd in zip(halves[::2], halves[1::2], strict=True)]
    store(out, rows, columns, matrix_products(config, parts, x_rows, w, columns, is_needed=start < stop))
