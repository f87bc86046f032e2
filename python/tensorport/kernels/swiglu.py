"""The clamped swiglu of gpt-oss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["clamped_swiglu"]


def clamped_swiglu(h: Float[Array, "*batch i2"], *, limit: float, alpha: float) -> Float[Array, "*batch i"]:
    """Gate * sigmoid(alpha * gate) * (up + 1), gate and up interleaved along the last axis, both clamped.

    Args:
        h: gate in the even places, up in the odd ones.
        limit: gate is at most this, and up between its negative and it.
        alpha: steepness of the sigmoid.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, swiglu.
    """
    pairs = h.reshape(*h.shape[:-1], h.shape[-1] // 2, 2)
    gate = jnp.minimum(pairs[..., 0], limit)
    up = jnp.clip(pairs[..., 1], -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
