"""The definition of :func:`tensorport.mxfp4.moe`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tensorport.kernels.mxfp4_moe.types import ELSEWHERE, Activation, Experts
from tensorport.kernels.swiglu import clamped_swiglu
from tensorport.kernels.tiles import accumulator_dtype
from tensorport.mxfp4.codec import decode

__all__ = ["moe"]


def moe(
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts,
    activation: Activation,
) -> Float[Array, "t h"]:
    """Every expert decoded and applied to every token; the router picks and weighs afterwards.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, MLPBlock.
    """
    dtype = accumulator_dtype(x.dtype)
    num_experts = experts.gate_up.shape[0]
    highest = jax.lax.Precision.HIGHEST
    gate_up = decode(experts.gate_up.blocks, experts.gate_up.scales, dtype)
    down = decode(experts.down.blocks, experts.down.scales, dtype)
    h = jnp.einsum("th,eih->tei", x.astype(dtype), gate_up, precision=highest)
    a = clamped_swiglu(h + experts.gate_up_bias[None].astype(dtype), limit=activation.limit, alpha=activation.alpha)
    y = jnp.einsum("tei,ehi->teh", a, down, precision=highest) + experts.down_bias[None].astype(dtype)
    is_valid = (router_indices >= 0) & (router_indices < num_experts)
    picked = jnp.take_along_axis(y, jnp.where(is_valid, router_indices, 0)[:, :, None], axis=1)
    picked = jnp.where(is_valid[:, :, None], picked, jnp.where(router_indices == ELSEWHERE, 0.0, jnp.nan)[:, :, None])
    return jnp.einsum("tkh,tk->th", picked, router_weights.astype(dtype), precision=highest).astype(x.dtype)
