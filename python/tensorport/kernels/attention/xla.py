"""attention in plain JAX: all keys at once, and as many queries as their scores fit in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from tensorport.kernels.attention.configs import Config
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.registry import Device
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
    """The weighted mean of values, for each query."""
    (batch, queries, heads, head_dim), (keys, key_heads) = query.shape, key.shape[1:3]
    dtype = accumulator_dtype(query.dtype)
    # Nothing times NaN is NaN, forwards and backwards: what is not there must be zero before it is multiplied.
    query, key, value = (
        jnp.where((positions >= 0)[:, :, None, None], x, jnp.zeros((), x.dtype))
        for x, positions in ((query, query_positions), (key, key_positions), (value, key_positions))
    )
    # CPUs convert narrow operands one product at a time, accelerators multiply them as they are.
    is_cpu = Device.of(query, key).platform == "cpu"
    scored = dtype if is_cpu or query.dtype != key.dtype else key.dtype
    mixed = dtype if is_cpu or value.dtype == jnp.float64 else value.dtype
    grouped = query.reshape(batch, queries, key_heads, heads // key_heads, head_dim)
    key, value = key.astype(scored), value.astype(mixed)
    columns = None if sinks is None else sinks.astype(dtype).reshape(1, key_heads, -1, 1, 1)

    def block(query: Float[Array, "b t g m d"], positions: Int32[Array, "b t"]) -> Float[Array, "b t g m d"]:
        scores = _dot("btgmd,bsgd->bgmts", query.astype(scored), key, dtype) * jnp.asarray(settings.scale, dtype)
        visible = _visible(positions, key_positions, settings.sliding_window)[:, None, None]
        scores = jnp.where(visible, scores, -jnp.inf)
        largest = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
        if columns is not None:
            largest = jnp.maximum(largest, columns)
        # Where nothing is visible there is nothing to subtract.
        largest = jax.lax.stop_gradient(jnp.where(jnp.isneginf(largest), jnp.zeros((), dtype), largest))
        shares = jnp.exp(scores - largest)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        if columns is not None:
            total += jnp.exp(columns - largest)
        shares /= jnp.where(total == 0, jnp.ones((), dtype), total)
        return _dot("bgmts,bsgd->btgmd", shares.astype(mixed), value, dtype).astype(query.dtype)

    block_t = Config.choose(batch, queries, heads, keys).block_t
    if block_t >= queries:
        out = block(grouped, query_positions)
    else:
        out = _in_blocks(block, block_t, grouped, query_positions)
    return out.reshape(query.shape)


def _in_blocks(
    block: Callable[[Array, Array], Array],
    block_t: int,
    query: Float[Array, "b t g m d"],
    positions: Int32[Array, "b t"],
) -> Float[Array, "b t g m d"]:
    """`block` applied to so many queries at a time."""
    batch, queries = positions.shape
    missing = -queries % block_t

    def blocks(x: Array, fill: int) -> Array:
        padding = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(padded.reshape(batch, -1, block_t, *x.shape[2:]), 1, 0)

    out: Array = jax.lax.map(lambda pair: block(*pair), (blocks(query, 0), blocks(positions, -1)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, queries + missing, *query.shape[2:])[:, :queries]


def _visible(
    query_positions: Int32[Array, "b t"], key_positions: Int32[Array, "b s"], sliding_window: int | None
) -> Bool[Array, "b t s"]:
    query_positions, key_positions = query_positions[:, :, None], key_positions[:, None, :]
    visible = (key_positions >= 0) & (key_positions <= query_positions)
    return visible if sliding_window is None else visible & (query_positions - key_positions < sliding_window)


def _dot(equation: str, lhs: Array, rhs: Array, dtype: jnp.dtype) -> Array:
    return jnp.einsum(equation, lhs, rhs, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
