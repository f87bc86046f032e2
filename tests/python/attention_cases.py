"""Arrays of an attention that its tests share."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from mxfp4_cases import random_array

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
