"""Shapes of attention: that of gpt-oss, 64 heads of queries and 8 of keys."""

from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from tensorport.kernels.cases import Case, random_floats

__all__ = ["CASES", "case"]


def case(name: str, batch: int, queries: int, keys: int, heads: int, key_heads: int, head_dim: int) -> Case:  # noqa: PLR0917
    """The last queries of rows of so many keys; what counts as weights are keys and values."""
    cached = batch * keys * key_heads * head_dim
    # Each query sees itself and what stands before it.
    seen = batch * queries * (keys - (queries - 1) / 2)
    arguments = partial(_arguments, batch, queries, keys, heads, key_heads, head_dim)
    return Case(name, arguments, 2 * 2 * cached, round(2 * seen * heads * head_dim))


def _arguments(  # noqa: PLR0917 - sizes in the order of `case`
    batch: int, queries: int, keys: int, heads: int, key_heads: int, head_dim: int, key: Array, dtype: DTypeLike
) -> tuple[Array, ...]:
    of_query, of_key, of_value, of_sinks = jax.random.split(key, 4)
    positions = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (batch, keys))
    cached = (batch, keys, key_heads, head_dim)
    return (
        random_floats(of_query, (batch, queries, heads, head_dim), dtype),
        random_floats(of_key, cached, dtype),
        random_floats(of_value, cached, dtype),
        positions[:, keys - queries :],
        positions,
        random_floats(of_sinks, (heads,), dtype),
    )


_SIZES: Final = {
    "1 token, 128 keys": (1, 1, 128),
    "1 token, 4096 keys": (1, 1, 4096),
    "1 token, 131072 keys": (1, 1, 131_072),
    "64 rows of 1 token, 4096 keys": (64, 1, 4096),
    "2048 tokens": (1, 2048, 2048),
    "8192 tokens": (1, 8192, 8192),
}

CASES: Final[tuple[Case, ...]] = tuple(case(name, *sizes, 64, 8, 64) for name, sizes in _SIZES.items())
