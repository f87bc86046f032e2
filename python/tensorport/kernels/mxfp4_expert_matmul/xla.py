"""expert_matmul in plain JAX: tokens sorted by expert, a chunk of one expert at a time, its matrix tile by tile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tensorport.kernels.grouping import chunk_by_expert
from tensorport.kernels.mxfp4_expert_matmul.configs import Config
from tensorport.kernels.registry import Device
from tensorport.kernels.tiles import accumulator_dtype, product, transposed_product
from tensorport.kernels.varying import full_alike
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["expert_matmul", "expert_matmul_transposed"]


def expert_matmul(x: Float[Array, "t k"], w: MXFP4Array, expert_ids: Int32[Array, " t"]) -> Float[Array, "t n"]:
    """X [T, K] . w[expert_ids] [T, N, K] -> [T, N]."""
    return _by_expert(product, x, w, expert_ids, w.shape[1])


def expert_matmul_transposed(
    g: Float[Array, "t n"], w: MXFP4Array, expert_ids: Int32[Array, " t"]
) -> Float[Array, "t k"]:
    """G [T, N] . w[expert_ids] [T, N, K] -> [T, K]: the gradient of expert_matmul with respect to x."""
    return _by_expert(transposed_product, g, w, expert_ids, w.shape[2])


def _by_expert(
    multiply: Callable[..., Array], x: Array, w: MXFP4Array, expert_ids: Array, columns: int
) -> Float[Array, "t columns"]:
    tokens = x.shape[0]
    # Tokens without an expert are in no chunk.
    out = full_alike((x, w, expert_ids), (tokens, columns), jnp.nan, accumulator_dtype(x.dtype))
    if tokens == 0 or w.shape[0] == 0:
        return out.astype(x.dtype)
    config = Config.choose(Device.of(x, w), tokens, w.shape[0])
    chunks = chunk_by_expert(expert_ids, w.shape[0], config.block_m)

    def step(number: Int32[Array, ""], out: Float[Array, "t columns"]) -> Float[Array, "t columns"]:
        token, is_there = chunks.rows(number, config.block_m)
        rows = multiply(x[token], w, chunks.expert[number], block_n=config.block_n)
        return out.at[jnp.where(is_there, token, tokens)].set(rows, mode="drop")

    rounded: Array = jax.lax.fori_loop(jnp.int32(0), chunks.total, step, out).astype(x.dtype)
    return rounded
