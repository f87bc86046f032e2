"""moe on NVIDIA GPUs, by Pallas through Triton.

For few pairs of a token and an expert two kernels read each pair's matrices once: gate_up with its bias and the
activation, then down with its bias, the router's weights and the sum over a token's experts. Many pairs are sorted by
expert and go through the tensor cores, a chunk of one expert at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from tensorport.kernels.grouping import chunk_by_expert
from tensorport.kernels.mxfp4_expert_matmul.configs import FEW_TOKENS, choose_triton
from tensorport.kernels.mxfp4_expert_matmul.pallas_triton import expert_of, grouped, ids_of_experts
from tensorport.kernels.mxfp4_matmul.configs import TritonConfig
from tensorport.kernels.mxfp4_moe.types import ELSEWHERE, Activation, Experts
from tensorport.kernels.swiglu import clamped_swiglu, gated
from tensorport.kernels.triton_tiles import Halves, Matrix, Span, one, span, split_pairs, store, unzip, vector_products

__all__ = ["moe"]


def moe(
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts,
    activation: Activation,
    *,
    interpret: bool = False,
) -> Float[Array, "t h"]:
    """The outputs of each token's experts, weighted and summed. `interpret` runs it on any device: for tests."""
    count, width2, hidden = experts.gate_up.shape
    config = choose_triton("mxfp4.moe", router_indices.size, count, width2, hidden, x.dtype)
    compute = _few_pairs if router_indices.size <= FEW_TOKENS else _many_pairs
    out = compute(config, x, router_indices, router_weights, experts, activation, interpret)
    ids = ids_of_experts(router_indices, experts.gate_up.shape[0])
    is_valid = jnp.all((ids >= 0) | (router_indices == ELSEWHERE), axis=1)
    return jnp.where(is_valid[:, None], out, jnp.nan).astype(x.dtype)


def _few_pairs(  # noqa: PLR0917 - the arguments of moe in their order
    config: TritonConfig,
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts,
    activation: Activation,
    interpret: bool,
) -> Float[Array, "t h"]:
    (tokens, k), (count, width2, hidden) = router_indices.shape, experts.gate_up.shape
    ids = ids_of_experts(router_indices, count).reshape(-1)
    half = jax.ShapeDtypeStruct((tokens * k, width2 // 4), jnp.float32)
    params = pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages)
    even, odd = pl.pallas_call(
        functools.partial(_gate_up, config, activation, k),
        out_shape=(half, half),
        grid=(tokens * k, pl.cdiv(width2, 4 * config.block_n)),
        compiler_params=params,
        interpret=interpret,
        name="mxfp4_moe_gate_up",
    )(ids, *split_pairs(x), *_bytes(experts.gate_up), experts.gate_up_bias)
    out: Array = pl.pallas_call(
        functools.partial(_down, config, k),
        out_shape=jax.ShapeDtypeStruct((tokens, hidden), jnp.float32),
        grid=(tokens, pl.cdiv(hidden, config.block_n)),
        compiler_params=params,
        interpret=interpret,
        name="mxfp4_moe_down",
    )(ids, router_weights.reshape(-1), even, odd, *_bytes(experts.down), experts.down_bias)
    return out


def _bytes(w: Any) -> tuple[Array, Array]:
    """Codes [E, N, K / 2] and scales of a stack of matrices."""
    return w.blocks.reshape(*w.shape[:2], -1), w.scales


def _gate_up(  # noqa: PLR0917 - the refs of a kernel in their order
    config: TritonConfig,
    activation: Activation,
    k: int,
    ids: Any,
    even: Any,
    odd: Any,
    codes: Any,
    scales: Any,
    bias: Any,
    out_even: Any,
    out_odd: Any,
) -> None:
    """2 `block_n` values between the layers of one pair: so many gates and as many ups."""
    pair = pl.program_id(0)
    expert, is_valid = expert_of(ids, pair)
    rows = span(pl.program_id(1) * 4 * config.block_n, 4 * config.block_n, codes.shape[1])
    h = _row(config, Halves(even, odd), pair // k, Matrix(codes, scales, (expert,)), bias, rows, is_valid)
    gate, up = unzip(h)
    values = gated(gate, up, limit=activation.limit, alpha=activation.alpha)
    results = span(pl.program_id(1) * config.block_n, config.block_n, out_even.shape[1])
    for out, half in zip((out_even, out_odd), unzip(values), strict=True):
        store(out, one(pair), results, half[None])


def _down(  # noqa: PLR0917 - the refs of a kernel in their order
    config: TritonConfig,
    k: int,
    ids: Any,
    weights: Any,
    even: Any,
    odd: Any,
    codes: Any,
    scales: Any,
    bias: Any,
    out: Any,
) -> None:
    """`block_n` results of one token: the sum over its experts."""
    token = pl.program_id(0)
    rows = span(pl.program_id(1) * config.block_n, config.block_n, codes.shape[1])
    total = jnp.zeros(config.block_n, jnp.float32)
    for choice in range(k):
        pair = token * k + choice
        expert, is_valid = expert_of(ids, pair)
        sums = _row(config, Halves(even, odd), pair, Matrix(codes, scales, (expert,)), bias, rows, is_valid)
        weight = pltriton.load(weights.at[pair]).astype(jnp.float32)
        total += jnp.where(is_valid, sums * weight, 0)
    store(out, one(token), rows, total[None])


def _row(  # noqa: PLR0917 - what a linear layer is made of
    config: TritonConfig, x: Halves, x_row: Any, w: Matrix, bias: Any, rows: Span, is_needed: Array
) -> Float[Array, " n"]:
    """One row of x by some rows of an expert's matrix, plus their bias [E, N]."""
    read = rows._replace(is_there=rows.is_there & is_needed)
    (sums,) = vector_products(config, x, [x_row], w, read)
    values = pltriton.load(bias.at[(*w.of_stack, rows.indices)], mask=read.is_there, other=0)
    return sums + values.astype(jnp.float32)


def _many_pairs(  # noqa: PLR0917 - the arguments of moe in their order
    config: TritonConfig,
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts,
    activation: Activation,
    interpret: bool,
) -> Float[Array, "t h"]:
    (tokens, k), count = router_indices.shape, experts.gate_up.shape[0]
    ids = ids_of_experts(router_indices, count).reshape(-1)
    chunks = chunk_by_expert(ids, count, config.block_m)
    multiply = functools.partial(grouped, config, chunks=chunks, dtype=jnp.float32, interpret=interpret)
    h = multiply([x], experts.gate_up, choices=k) + _of_expert(experts.gate_up_bias, ids)
    a = clamped_swiglu(h, limit=activation.limit, alpha=activation.alpha)
    # The tensor cores multiply bfloat16: two of them are 16 bits of what x, of 8 bits, has made.
    parts = _in_two(a) if x.dtype == jnp.bfloat16 else [a]
    y = multiply(parts, experts.down, choices=1) + _of_expert(experts.down_bias, ids)
    weighted = jnp.where(ids[:, None] >= 0, y * router_weights.reshape(-1, 1).astype(jnp.float32), 0)
    return weighted.reshape(tokens, k, -1).sum(axis=1)


def _of_expert(bias: Float[Array, "e n"], ids: Int32[Array, " rows"]) -> Float[Array, "rows n"]:
    return bias[jnp.maximum(ids, 0)].astype(jnp.float32)


def _in_two(values: Float[Array, "*batch"]) -> list[Array]:
    """Two bfloat16 whose sum is a float32, but for 2 ** -16 of it."""
    high = jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    low = jnp.where(jnp.isfinite(high), values - high, 0)
    return [high.astype(jnp.bfloat16), low.astype(jnp.bfloat16)]
