"""Every kernel through Triton on a GPU, against float64, on fresh random inputs at the shapes of gpt-oss.

Tests of the mark `gpu` need one, and have a seed of their own in each run: `TENSORPORT_SEED=number` repeats it. A few
small shapes run on a CPU too, interpreted, so that the tests themselves are tested.
"""

import os
import secrets
from typing import Any

import jax.numpy as jnp
import mxfp4_oracle as oracle
import numpy as np
import pytest
from attention_cases import attention_inputs
from attention_cases import expected as expected_attention
from moe_cases import Sizes
from moe_cases import expected as expected_moe
from moe_cases import inputs as moe_inputs
from mxfp4_cases import (
    assert_close,
    assert_every_code_is_exact,
    every_code_under_every_scale,
    expert_products,
    float64,
    random_array,
    random_weights,
    scales_at_their_ends,
)
from numpy.typing import NDArray
from tensorport.kernels.attention import pallas_triton as attention_triton
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.mxfp4_expert_matmul import pallas_triton as expert_triton
from tensorport.kernels.mxfp4_matmul import pallas_triton as matmul_triton
from tensorport.kernels.mxfp4_moe import pallas_triton as moe_triton
from tensorport.kernels.mxfp4_moe.types import Activation, Experts
from tensorport.mxfp4 import MXFP4Array

# JAX 0.11 announces that its backend for Triton will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

SEED = int(os.environ.get("TENSORPORT_SEED", secrets.randbelow(2**31)))
HIDDEN, WIDE, VOCABULARY = 2880, 5760, 201_088
ROWS_COMPARED = 500  # of the first, the last and the others of a matrix: all in float64 would be gigabytes
# Of the largest value: a rounding to the dtype, or sums of thousands of products in float32.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-9, "float32": 2e-5}


def shapes(
    names: str, small: list[tuple[Any, ...]], large: list[tuple[Any, ...]], dtypes: tuple[str, ...] = tuple(TOLERANCE)
) -> pytest.MarkDecorator:
    """All of them on a GPU by every dtype, and the small ones interpreted by the first.

    A test gets each shape with its dtype, the seed of its random inputs, and whether it is interpreted.
    """
    params = [pytest.param(*shape, dtypes[0], 0, True, id=f"{shape} interpreted") for shape in small]
    for shape in (*small, *large):
        for dtype in dtypes:
            name = f"{shape} {dtype}"
            params.append(pytest.param(*shape, dtype, SEED, False, id=name, marks=pytest.mark.gpu))
    return pytest.mark.parametrize((*names.split(), "dtype", "seed", "interpret"), params)


def say(seed: int) -> None:
    """Pytest shows it where a test fails."""
    print(f"TENSORPORT_SEED={seed}")


def some_rows(n: int, seed: int) -> NDArray[np.int64]:
    ends = np.arange(min(n, ROWS_COMPARED))
    return np.unique([*ends, *(n - 1 - ends), *np.random.default_rng(seed).integers(0, n, ROWS_COMPARED)])


def part_of(w: MXFP4Array, rows: NDArray[np.int64]) -> MXFP4Array:
    return MXFP4Array(w.blocks[..., rows, :, :], w.scales[..., rows, :])


@shapes(
    "m n k",
    [(1, 70, 96), (5, 33, 160), (20, 70, 96)],
    [
        *((m, WIDE, HIDDEN) for m in (1, 2, 4, 5, 16, 64, 65, 300, 2048)),
        *((m, HIDDEN, HIDDEN) for m in (1, 4, 17, 512)),
        *((m, VOCABULARY, HIDDEN) for m in (1, 4, 16, 64)),
        (3, HIDDEN + 7, WIDE),
        (130, 129, 32),
    ],
)
def test_matmul(  # noqa: PLR0917 - what a case is made of
    m: int, n: int, k: int, dtype: str, seed: int, interpret: bool
) -> None:
    say(seed)
    w, x = random_weights(n, k, seed=seed), random_array(m, k, dtype=dtype, seed=seed + 1)
    found = matmul_triton.matmul(x, w, interpret=interpret)
    assert (found.dtype, found.shape) == (x.dtype, (m, n))
    rows = some_rows(n, seed)
    part = part_of(w, rows)
    dense = oracle.decode(np.asarray(part.blocks), np.asarray(part.scales))
    assert_close(found[:, rows], float64(x) @ dense.T, np.abs(float64(x)) @ np.abs(dense.T), k)


@shapes("m", [(7,)], [(1,), (16,)], dtypes=("float32",))
def test_every_code_under_every_scale(m: int, dtype: str, seed: int, interpret: bool) -> None:
    say(seed)
    one_hot, w, expected = every_code_under_every_scale()
    found = [
        matmul_triton.matmul(one_hot[start : start + m].astype(dtype), w, interpret=interpret)
        for start in range(0, len(one_hot), m)
    ]
    assert_every_code_is_exact(np.concatenate([np.asarray(part) for part in found]), expected)


def ids_of(kind: str, rows: int, experts: int, seed: int) -> NDArray[np.int64]:
    """The expert of each row."""
    rng = np.random.default_rng(seed)
    ids = {
        "random": rng.integers(0, experts, rows),
        "one expert": np.full(rows, experts - 1),
        # Most experts have no row, and the others have very different numbers.
        "ragged": rng.choice([0, experts // 2, experts - 1], rows, p=[0.02, 0.08, 0.9]),
        "each in turn": np.arange(rows) % experts,
    }
    return ids[kind]


@shapes(
    "kind rows experts n k",
    [("ragged", 5, 6, 70, 96), ("random", 29, 6, 70, 96)],
    [
        *(("random", rows, 8, WIDE, HIDDEN) for rows in (1, 4, 16, 17, 64, 257, 2048)),
        *(("ragged", rows, 8, WIDE, HIDDEN) for rows in (16, 64, 2048)),
        *(("one expert", rows, 8, WIDE, HIDDEN) for rows in (4, 300)),
        *(("each in turn", rows, 128, 130, HIDDEN) for rows in (16, 17, 300)),
        ("random", 33, 5, HIDDEN, WIDE),
    ],
)
def test_expert_matmul(  # noqa: PLR0917 - what a case is made of
    kind: str, rows: int, experts: int, n: int, k: int, dtype: str, seed: int, interpret: bool
) -> None:
    say(seed)
    w, x = random_weights(experts, n, k, seed=seed), random_array(rows, k, dtype=dtype, seed=seed + 1)
    ids = ids_of(kind, rows, experts, seed + 2)
    found = expert_triton.expert_matmul(x, w, jnp.asarray(ids, jnp.int32), interpret=interpret)
    assert (found.dtype, found.shape) == (x.dtype, (rows, n))
    of_w = some_rows(n, seed)
    assert_close(found[:, of_w], *expert_products(x, part_of(w, of_w), ids), k)


@shapes("tokens", [(1,), (29,)], [(16,), (300,)], dtypes=("float32",))
def test_scales_at_their_ends(tokens: int, dtype: str, seed: int, interpret: bool) -> None:
    say(seed)
    x, w = scales_at_their_ends(tokens)
    found = expert_triton.expert_matmul(x.astype(dtype), w, jnp.ones(tokens, jnp.int32), interpret=interpret)
    assert np.isnan(found[:, 4]).all()
    wanted, magnitude = expert_products(x, w, [1] * tokens)
    assert_close(found[:, :4], wanted[:, :4], magnitude[:, :4], 128)


# By name, which is short in the name of a test.
MIXTURES = {
    "small": Sizes(),
    "gpt-oss": Sizes(8, HIDDEN, HIDDEN, 4, (114, 121), (112, 119)),
    "narrow": Sizes(8, HIDDEN, 1440, 3, (114, 121), (112, 119)),
}


@shapes(
    "tokens mixture",
    [(1, "small"), (9, "small")],
    [*((tokens, "gpt-oss") for tokens in (1, 2, 4, 5, 16, 64, 300)), (12, "narrow")],
)
def test_moe(tokens: int, mixture: str, dtype: str, seed: int, interpret: bool) -> None:
    say(seed)
    args = moe_inputs(tokens, dtype, seed, MIXTURES[mixture])
    x, chosen, weights, *experts = args
    found = moe_triton.moe(x, chosen, weights, Experts(*experts), Activation(7.0, 1.702), interpret=interpret)
    assert (found.dtype, found.shape) == (args[0].dtype, args[0].shape)
    wanted = expected_moe(args)
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@shapes(
    "queries keys heads key_heads head_dim sliding_window",
    [(1, 300, 12, 3, 16, None), (9, 150, 12, 3, 16, 70)],
    [
        (queries, keys, 64, 8, 64, window)
        for queries, keys in ((1, 128), (1, 4096), (1, 20_001), (3, 500), (65, 300), (90, 90))
        for window in (None, 128)
    ],
)
def test_attention(  # noqa: PLR0917 - what a case is made of
    queries: int,
    keys: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    sliding_window: int | None,
    dtype: str,
    seed: int,
    interpret: bool,
) -> None:
    say(seed)
    args = attention_inputs(queries, keys, heads, key_heads, head_dim, dtype, seed)
    query, key, value, at, of, sinks = args
    settings = Settings(head_dim**-0.5, sliding_window)
    found = attention_triton.attention(query, key, value, at, of, sinks, settings, interpret=interpret)
    assert (found.dtype, found.shape) == (args[0].dtype, args[0].shape)
    wanted = expected_attention(args, sliding_window)
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())
