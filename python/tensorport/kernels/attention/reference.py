"""The definition of :func:`tensorport.kernels.attention.api.attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tensorport.kernels.attention.types import Settings
from tensorport.kernels.tiles import accumulator_dtype

__all__ = ["attention"]


def attention(  # noqa: PLR0917 - the arguments of the op in their order
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g d"],
    query_positions: Int32[Array, "b t"],
    key_positions: Int32[Array, "b s"],
    sinks: Float[Array, " n"] | None,
    settings: Settings,
) -> Float[Array, "b t n d"]:
    """A softmax over all keys and the sink, written out.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, sdpa.
    """
    out_dtype, dtype, highest = query.dtype, accumulator_dtype(query.dtype), jax.lax.Precision.HIGHEST
    heads, key_heads = query.shape[2], key.shape[2]
    query, key, value = (
        jnp.where((positions >= 0)[:, :, None, None], x.astype(dtype), jnp.zeros((), dtype))
        for x, positions in ((query, query_positions), (key, key_positions), (value, key_positions))
    )
    key, value = (jnp.repeat(x, heads // key_heads, axis=2) for x in (key, value))
    scores = jnp.einsum("btnd,bsnd->bnts", query, key, precision=highest) * settings.scale
    at, of = query_positions[:, None, :, None], key_positions[:, None, None, :]
    is_visible = (of >= 0) & (of <= at)
    if settings.sliding_window is not None:
        is_visible &= at - of < settings.sliding_window
    scores = jnp.where(is_visible, scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(dtype)[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    # Where nothing is seen, the softmax has nothing to divide by.
    sees_nothing = jnp.all(jnp.isneginf(scores), axis=-1, keepdims=True)
    shares = jax.nn.softmax(jnp.where(sees_nothing, jnp.zeros((), dtype), scores), axis=-1)
    shares = jnp.where(sees_nothing, jnp.zeros((), dtype), shares)[..., : key.shape[1]]
    mixed = jnp.einsum("bnts,bsnd->btnd", shares, value, precision=highest)
    return mixed.astype(out_dtype)
