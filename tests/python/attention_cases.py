"""Arrays of an attention, and its formula: what its tests share."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from mxfp4_cases import float64, random_array
from numpy.typing import NDArray

B = 2
"""Rows of the batch."""


def attention_inputs(  # noqa: PLR0917 - sizes in the order of the axes
    queries: int, keys: int, heads: int, key_heads: int, head_dim: int, dtype: Any = jnp.float32, seed: int = 0
) -> tuple[Any, ...]:
    """All arguments. The first row is full; the second has two empty slots, and its last query is padding."""
    rng = np.random.default_rng(seed)
    key_positions = np.stack([rng.permutation(keys) for _ in range(B)])
    key_positions[1] = np.where(key_positions[1] >= keys - 2, -1, key_positions[1])
    query_positions = np.stack([np.arange(queries) + max(keys - queries, 0), np.arange(queries)])
    query_positions[1, queries - 1 :] = -1
    return (
        random_array(B, queries, heads, head_dim, dtype=dtype, seed=seed),
        random_array(B, keys, key_heads, head_dim, dtype=dtype, seed=seed + 1),
        random_array(B, keys, key_heads, head_dim, dtype=dtype, seed=seed + 2),
        jnp.asarray(query_positions, jnp.int32),
        jnp.asarray(key_positions, jnp.int32),
        random_array(heads, dtype=dtype, seed=seed + 3),
    )


def expected(args: tuple[Any, ...], sliding_window: int | None = None) -> NDArray[np.float64]:
    """The formula in float64, query by query."""
    *floats, at, of, sinks = args
    query, key, value = map(float64, floats)
    at, of = np.asarray(at), np.asarray(of)
    heads_of_group = query.shape[2] // key.shape[2]
    out = np.zeros(query.shape)
    for row, number, head in np.ndindex(query.shape[:3]):
        position, group = int(at[row, number]), head // heads_of_group
        first = 0 if sliding_window is None else max(position - sliding_window + 1, 0)
        (seen,) = np.nonzero((of[row] >= first) & (of[row] <= position))
        if not seen.size:
            continue
        scores = key[row, seen, group] @ query[row, number, head] * query.shape[3] ** -0.5
        sink = -np.inf if sinks is None else float64(sinks)[head]
        largest = max(scores.max(), sink)
        shares = np.exp(scores - largest)
        out[row, number, head] = shares @ value[row, seen, group] / (shares.sum() + np.exp(sink - largest))
    return out
