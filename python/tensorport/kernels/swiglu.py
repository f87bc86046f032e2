"""The clamped swiglu of gpt-oss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["clamped_swiglu", "gated"]


def clamped_swiglu(h: Float[Array, "*batch i2"], *, limit: float, alpha: float) -> Float[Array, "*batch i"]:
    """Gate * sigmoid(alpha * gate) * (up + 1), gate and up interleaved along the last axis, both clamped.

    Args:
        h: gate in the even places, up in the odd ones.
        limit: gate is at most this, and up between its negative and it.
        alpha: steepness of the sigmoid.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, swiglu.
    """
    pairs = h.reshape(*h.shape[:-1], h.shape[-1] // 2, 2)
    return gated(pairs[..., 0], pairs[..., 1], limit=limit, alpha=alpha)


def gated(
    gate: Float[Array, "*batch i"], up: Float[Array, "*batch i"], *, limit: float, alpha: float
) -> Float[Array, "*batch i"]:
    """As :func:`clamped_swiglu`, of gate and up in arrays of their own."""
    gate = jnp.minimum(gate, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (jnp.clip(up, -limit, limit) + 1)
