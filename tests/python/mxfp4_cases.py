"""Weights and inputs that the tests of the ops share: every dimension of another size."""

from typing import Any

import jax.numpy as jnp
import mxfp4_oracle as oracle
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


def expert_products(x: Any, w: MXFP4Array, ids: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each row of x by the matrix of its expert in float64, and the same over magnitudes."""
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))
    rows, ids = float64(x), np.asarray(ids)
    out = np.empty((2, len(rows), dense.shape[1]))
    for expert in np.unique(ids):
        here = ids == expert
        out[0, here] = rows[here] @ dense[expert].T
        out[1, here] = np.abs(rows[here]) @ np.abs(dense[expert]).T
    return out[0], out[1]


def every_code_under_every_scale() -> tuple[Any, MXFP4Array, NDArray[np.float32]]:
    """A one-hot x that picks single weights, w, and what each row of x gives under each scale."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    block = codes[::2] | codes[1::2] << 4
    scales = np.arange(256, dtype=np.uint8)[:, None]
    w = MXFP4Array(jnp.asarray(np.broadcast_to(block, (256, 1, 16))), jnp.asarray(scales))
    exact = oracle.decode(np.asarray(w.blocks), scales)[:, :16].T
    with np.errstate(over="ignore"):
        return jnp.asarray(np.eye(32, dtype=np.float32)[:16]), w, exact.astype(np.float32)


def assert_every_code_is_exact(found: Any, expected: NDArray[np.float32]) -> None:
    """Rows of `every_code_under_every_scale`; what is subnormal in float32, as scale 0 is, may be flushed to zero."""
    # Zeros of the one-hot rows times the infinities under the last scales are NaN.
    finite, wanted = np.abs(np.asarray(found))[:, :253], np.abs(expected)[:, :253]
    may_be_zero = (wanted < 2.0**-126) | (np.arange(253) == 0)
    np.testing.assert_array_equal(finite, np.where(may_be_zero & (finite == 0), 0, wanted))
    assert np.isnan(np.asarray(found)[:, 255]).all()


def scales_at_their_ends(tokens: int) -> tuple[Any, MXFP4Array]:
    """Ones and two experts, of whose scales some are 1, 254 and 255; only the last row of the second expert is NaN."""
    w = random_weights(2, 5, 128)
    # Codes of 0.5, for larger ones are infinite under the largest scale.
    w = MXFP4Array(
        w.blocks.at[:, 0, 2].set(0x11),
        w.scales.at[:, 0].set(jnp.asarray([1, 127, 254, 127], jnp.uint8)).at[1, 4].set(255),
    )
    return jnp.ones((tokens, 128), jnp.float32).at[:, 64:96].set(0), w
