"""Shapes of mxfp4.expert_matmul: gate_up of gpt-oss's experts, four of them for each token."""

from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from tensorport.kernels.cases import ALL_TOKENS, HIDDEN, Case, random_floats, random_matrices
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["CASES", "case"]


def case(rows: int, experts: int, n: int, k: int) -> Case:
    """So many rows of K, of which each goes to one of the experts [N, K]; neighbours to different ones."""
    read = min(rows, experts) * n * k // 32 * 17
    arguments = partial(_arguments, rows, experts, n, k)
    return Case(f"{rows} rows, {experts} experts", arguments, read, rows * n * k)


def _arguments(  # noqa: PLR0917 - sizes in the order of `case`
    rows: int, experts: int, n: int, k: int, key: Array, dtype: DTypeLike
) -> tuple[Array, MXFP4Array, Array]:
    of_x, of_w = jax.random.split(key)
    ids = jnp.arange(rows, dtype=jnp.int32) % experts
    return random_floats(of_x, (rows, k), dtype), random_matrices(of_w, experts, n, k), ids


CASES: Final[tuple[Case, ...]] = tuple(
    case(4 * tokens, experts, 2 * HIDDEN, HIDDEN) for experts in (32, 128) for tokens in ALL_TOKENS
)
