"""Weights and inputs that the tests of the ops share: every dimension of another size."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from tensorport.mxfp4 import MXFP4Array

EPSILON = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24, "float64": 2**-53}
"""Largest relative error of one rounding."""


def random_weights(*shape: int, seed: int = 0, scales: tuple[int, int] = (118, 128)) -> MXFP4Array:
    """Codes of every kind under scales that are small enough for sums and differ between neighbours."""
    rng = np.random.default_rng(seed)
    *leading, k = shape
    return MXFP4Array(
        jnp.asarray(rng.integers(0, 256, (*leading, k // 32, 16), dtype=np.uint8)),
        jnp.asarray(rng.integers(*scales, (*leading, k // 32)).astype(np.uint8)),
    )


def random_array(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def temporary_bytes(jitted: Any, *shapes: Any) -> int:
    """What a jitted function takes beside its arguments and results."""
    return int(jitted.lower(*shapes).compile().memory_analysis().temp_size_in_bytes)


def float64(array: Any) -> NDArray[np.float64]:
    return np.asarray(array).astype(np.float64)


def assert_close(found: Any, expected: NDArray[np.float64], magnitude: NDArray[np.float64], k: int) -> None:
    """Within what sums of k products in float32 and one rounding to the dtype of `found` can lose.

    `magnitude` is the same sum over magnitudes: the bound is relative to it.
    """
    accumulated = min(EPSILON["float32"], EPSILON[found.dtype.name])
    bound = magnitude * k * accumulated + np.abs(expected) * EPSILON[found.dtype.name]
    error = np.abs(float64(found) - expected)
    worst = np.max(error / np.maximum(bound, np.finfo(np.float64).tiny), initial=0)
    assert worst <= 1, f"{worst} times the bound"
