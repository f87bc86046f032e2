"""moe in plain JAX: (token, expert) pairs sorted by expert, a chunk of one expert at a time through both its layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from tensorport.kernels.grouping import Chunks, chunk_by_expert
from tensorport.kernels.linear.xla import linear
from tensorport.kernels.mxfp4_expert_matmul.configs import Config
from tensorport.kernels.mxfp4_moe.types import ELSEWHERE, Activation, DenseExperts, Experts, TransposedExperts
from tensorport.kernels.registry import Device
from tensorport.kernels.swiglu import clamped_swiglu
from tensorport.kernels.tiles import accumulator_dtype, product, transposed_product
from tensorport.kernels.varying import full_alike

__all__ = ["moe", "moe_gradients"]


def moe(
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts | DenseExperts | TransposedExperts,
    activation: Activation,
) -> Float[Array, "t h"]:
    """The outputs of each token's experts, weighted and summed."""
    k, dtype = router_indices.shape[1], accumulator_dtype(x.dtype)
    out = full_alike((x, router_indices, router_weights, experts), x.shape, 0.0, dtype)
    if router_indices.size == 0:
        return out.astype(x.dtype)
    config, chunks = _grouped(x, router_indices, experts)
    weights, multiply = router_weights.reshape(-1).astype(dtype), _multiply(experts)

    def step(number: Int32[Array, ""], out: Float[Array, "t h"]) -> Float[Array, "t h"]:
        pair, is_there = chunks.rows(number, config.block_m)
        expert, token = chunks.expert[number], pair // k
        h = multiply(x[token], experts.gate_up, expert, block_n=config.block_n)
        h += experts.gate_up_bias[expert, None].astype(dtype)
        a = clamped_swiglu(h, limit=activation.limit, alpha=activation.alpha)
        y = multiply(a, experts.down, expert, block_n=config.block_n) + experts.down_bias[expert, None].astype(dtype)
        return out.at[token].add(jnp.where(is_there[:, None], y * weights[pair][:, None], 0))

    out = jax.lax.fori_loop(jnp.int32(0), chunks.total, step, out)
    is_valid = jnp.all(chunks.is_valid.reshape(router_indices.shape) | (router_indices == ELSEWHERE), axis=1)
    return jnp.where(is_valid[:, None], out, jnp.nan).astype(x.dtype)


def _multiply(experts: Experts | DenseExperts | TransposedExperts) -> Callable[..., Float[Array, "m n"]]:
    """What multiplies rows by one expert's matrix: `(x, w, expert, *, block_n)`, in the accumulator's dtype."""
    if isinstance(experts, Experts):
        return product
    multiply = linear if isinstance(experts, DenseExperts) else _transposed_linear

    def dense_product(x: Array, w: Array, expert: Int32[Array, ""], *, block_n: int) -> Array:
        del block_n  # a matrix is multiplied as it is
        # Behind a barrier within the loop, or XLA on CPU, which slices no bfloat16, converts the whole stack before it.
        w, expert = jax.lax.optimization_barrier((w, expert))
        matrix = jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
        return multiply(x, matrix, None, accumulator_dtype(x.dtype))

    return dense_product


def _transposed_linear(
    x: Float[Array, "m k"], weight: Float[Array, "k n"], bias: None, out_dtype: DTypeLike
) -> Float[Array, "m n"]:
    """As `linear`, for a matrix [in, out]; one row counts as two, for the reason that stands there."""
    del bias
    operand = x.dtype if x.dtype == weight.dtype else accumulator_dtype(x.dtype)
    rows = jnp.concatenate([x, x]) if len(x) == 1 else x
    out = jax.lax.dot_general(
        rows.astype(operand),
        weight.astype(operand),
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=out_dtype,
    )
    return out[: len(x)]


def moe_gradients(  # noqa: PLR0917 - the arguments of moe in their order
    g: Float[Array, "t h"],
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts,
    activation: Activation,
) -> tuple[Float[Array, "t h"], Float[Array, "t k"], Float[Array, "e i2"], Float[Array, "e h"]]:
    """Gradients with respect to x, router_weights and both biases, in their dtypes, from that of the output.

    The values between the layers are computed again, chunk by chunk, rather than kept.
    """
    k, dtype = router_indices.shape[1], accumulator_dtype(x.dtype)
    weights = router_weights.reshape(-1).astype(dtype)
    shapes = (x.shape, weights.shape, experts.gate_up_bias.shape, experts.down_bias.shape)
    sums = tuple(full_alike((g, x, router_indices, router_weights, experts), shape, 0.0, dtype) for shape in shapes)
    config, chunks = _grouped(x, router_indices, experts)

    def step(number: Int32[Array, ""], sums: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        dx, dweights, dgate_up_bias, ddown_bias = sums
        pair, is_there = chunks.rows(number, config.block_m)
        expert, token = chunks.expert[number], pair // k
        # Of rows that are not there all is zero, so that nothing of theirs reaches any sum: not even a NaN.
        rows = jnp.where(is_there[:, None], x[token], jnp.zeros((), x.dtype))
        h = product(rows, experts.gate_up, expert, block_n=config.block_n)
        h += experts.gate_up_bias[expert, None].astype(dtype)
        a, pull_back = jax.vjp(lambda h: clamped_swiglu(h, limit=activation.limit, alpha=activation.alpha), h)
        dy = jnp.where(is_there[:, None], g[token].astype(dtype), 0)
        da = transposed_product(dy, experts.down, expert, block_n=config.block_n)
        dweight = jnp.sum(da * a, axis=1) + dy @ experts.down_bias[expert].astype(dtype)
        weight = jnp.where(is_there, weights[pair], 0)[:, None]
        (dh,) = pull_back(da * weight)
        return (
            dx.at[token].add(transposed_product(dh, experts.gate_up, expert, block_n=config.block_n)),
            dweights.at[pair].add(jnp.where(is_there, dweight, 0)),
            dgate_up_bias.at[expert].add(jnp.sum(dh, axis=0)),
            ddown_bias.at[expert].add(jnp.sum(dy * weight, axis=0)),
        )

    if router_indices.size != 0:
        sums = jax.lax.fori_loop(jnp.int32(0), chunks.total, step, sums)
    dx, dweights, dgate_up_bias, ddown_bias = sums
    return (
        dx.astype(x.dtype),
        dweights.reshape(router_weights.shape).astype(router_weights.dtype),
        dgate_up_bias.astype(experts.gate_up_bias.dtype),
        ddown_bias.astype(experts.down_bias.dtype),
    )


def _grouped(
    x: Float[Array, "t h"], router_indices: Int32[Array, "t k"], experts: Experts | DenseExperts | TransposedExperts
) -> tuple[Config, Chunks]:
    """Pairs by expert: pair number t * k + i is the i-th choice of token t."""
    config = Config.choose(Device.of(x, experts), router_indices.size, experts.gate_up.shape[0])
    return config, chunk_by_expert(router_indices.reshape(-1), experts.gate_up.shape[0], config.block_m)
