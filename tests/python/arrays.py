"""Arrays for tests of loading: random ones, and what it means that a tree holds them."""

import math
from typing import Any

import jax
import numpy as np


def random_array(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bytes as an array, without the NaNs that would compare unequal."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    array: np.ndarray[Any, Any] = np.random.default_rng(seed).integers(0, 60, nbytes, np.uint8).view(dtype)
    return array.reshape(shape)


def assert_same(loaded: dict[str, Any], expected: Any) -> None:
    assert set(loaded) == set(expected)
    for name, array in loaded.items():
        assert isinstance(array, jax.Array), name
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
        assert np.asarray(array).tobytes() == expected[name].tobytes(), name
