"""attention in Rust, on CPU: each block of keys and values comes from memory once, as it is."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from tensorport.kernels import native
from tensorport.kernels.attention import xla
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.registry import Device

__all__ = ["attention", "refuses"]


def refuses(device: Device, query: Array, key: Array, value: Array, *others: Array | None) -> str | None:
    """Why it cannot run on these arguments."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype.name not in native.FLOATS:
            return f"found {name} in {array.dtype}, expected one of {', '.join(native.FLOATS)}"
    return native.refuses(device, query, key, value, *others)


def attention(  # noqa: PLR0917 - the arguments of the op in their order
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g d"],
    query_positions: Int32[Array, "b t"],
    key_positions: Int32[Array, "b s"],
    sinks: Float[Array, " n"] | None,
    settings: Settings,
) -> Float[Array, "b t n d"]:
    """The weighted mean of values, for each query; derivatives by the implementation `xla`."""
    out: Array = _attention(settings, query_positions, key_positions, query, key, value, sinks)
    return out


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(  # noqa: PLR0917 - as above
    settings: Settings,
    query_positions: Array,
    key_positions: Array,
    query: Array,
    key: Array,
    value: Array,
    sinks: Array | None,
) -> Array:
    result = jax.ShapeDtypeStruct(query.shape, query.dtype)
    args = [query, key, value, query_positions, key_positions] + ([] if sinks is None else [native.as_float(sinks)])
    scale, window = np.float32(settings.scale), np.int64(settings.sliding_window or 0)
    out: Array = native.call("tensorport.v1.attention", result, *args, scale=scale, sliding_window=window)
    return out


@_attention.defjvp
def _attention_jvp(settings: Settings, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    query_positions, key_positions, *floats = primals

    def mixed(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
        return xla.attention(query, key, value, query_positions, key_positions, sinks, settings)

    _, tangent = jax.jvp(mixed, tuple(floats), tuple(tangents[2:]))
    return _attention(settings, *primals), tangent
