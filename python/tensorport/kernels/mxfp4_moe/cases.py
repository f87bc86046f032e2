"""Shapes of mxfp4.moe: the experts of gpt-oss-20b and 120b."""

from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from tensorport.kernels.cases import ALL_TOKENS, HIDDEN, Case, random_floats, random_matrices

__all__ = ["CASES", "case"]


def case(tokens: int, experts: int, choices: int, width: int, hidden: int) -> Case:
    """So many tokens of H, each through some of the experts, of I between their layers; neighbours through others."""
    matrices = 3 * width * hidden
    pairs = tokens * choices
    arguments = partial(_arguments, tokens, experts, choices, width, hidden)
    read = min(pairs, experts) * matrices // 32 * 17
    return Case(f"{tokens} tokens, {choices} of {experts} experts", arguments, read, pairs * matrices)


def _arguments(  # noqa: PLR0917 - sizes in the order of `case`
    tokens: int, experts: int, choices: int, width: int, hidden: int, key: Array, dtype: DTypeLike
) -> tuple[Any, ...]:
    of_x, of_gate_up, of_down, of_biases = jax.random.split(key, 4)
    pairs = jnp.arange(tokens * choices, dtype=jnp.int32).reshape(tokens, choices)
    return (
        random_floats(of_x, (tokens, hidden), dtype),
        pairs % experts,
        jnp.full((tokens, choices), 1 / choices, jnp.float32),
        random_matrices(of_gate_up, experts, 2 * width, hidden),
        random_floats(of_biases, (experts, 2 * width), dtype),
        random_matrices(of_down, experts, hidden, width),
        random_floats(of_biases, (experts, hidden), dtype),
    )


CASES: Final[tuple[Case, ...]] = tuple(
    case(tokens, experts, 4, HIDDEN, HIDDEN) for experts in (32, 128) for tokens in ALL_TOKENS
)
