"""Shapes of mxfp4.matmul: one matrix of an expert of gpt-oss, and the head."""

from functools import partial
from typing import Final

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from tensorport.kernels.cases import ALL_TOKENS, HIDDEN, Case, random_floats, random_matrices
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["CASES", "case"]


def case(name: str, m: int, n: int, k: int) -> Case:
    """M rows of K by a matrix [N, K]."""
    return Case(f"{name}, {m} rows", partial(_arguments, m, n, k), n * k // 32 * 17, m * n * k)


def _arguments(m: int, n: int, k: int, key: Array, dtype: DTypeLike) -> tuple[Array, MXFP4Array]:
    of_x, of_w = jax.random.split(key)
    return random_floats(of_x, (m, k), dtype), random_matrices(of_w, n, k)


_MATRICES: Final[dict[str, tuple[int, int]]] = {
    "gate_up": (2 * HIDDEN, HIDDEN),
    "down": (HIDDEN, HIDDEN),
    "head": (201_088, HIDDEN),
}

CASES: Final[tuple[Case, ...]] = tuple(case(name, m, *sizes) for name, sizes in _MATRICES.items() for m in ALL_TOKENS)
