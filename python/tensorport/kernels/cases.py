"""Named shapes at which ops are tested, lowered and measured; each op's own are in its folder."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from tensorport.mxfp4.types import MXFP4Array

__all__ = ["ALL_TOKENS", "HIDDEN", "Case", "random_floats", "random_matrices"]

HIDDEN: Final = 2880
"""The width of gpt-oss, of the stream and between the layers of an expert."""

ALL_TOKENS: Final = (1, 4, 16, 64, 512, 2048)
"""Tokens of one step: batches that decode, and prompts."""


class Case(NamedTuple):
    """One shape of an op.

    Attributes:
        name: says what it is like.
        arguments: makes the op's arrays, random, from a key and the dtype of what is not MXFP4.
        weight_bytes: of the weights that are read at least once.
        multiplications: of weights with activations, each with an addition.
    """

    name: str
    arguments: Callable[[Array, DTypeLike], tuple[Any, ...]]
    weight_bytes: int
    multiplications: int


def random_floats(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Normal values."""
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def random_matrices(key: Array, *shape: int) -> MXFP4Array:
    """Codes of every kind under scales that keep sums of thousands of products small."""
    of_codes, of_scales = jax.random.split(key)
    *leading, k = shape
    codes = jax.random.bits(of_codes, (*leading, k // 32, 16), jnp.uint8)
    return MXFP4Array(codes, jax.random.randint(of_scales, (*leading, k // 32), 116, 122).astype(jnp.uint8))
