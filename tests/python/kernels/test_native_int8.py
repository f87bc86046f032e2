"""The implementation `native_int8`: products with activations rounded to int8, exact but for that."""

from typing import Any

import jax
import jax.numpy as jnp
import mxfp4_oracle as oracle
import numpy as np
import pytest
from jax import export
from mxfp4_cases import EPSILON, float64, random_array, random_weights
from numpy.typing import NDArray
from tensorport import kernels, mxfp4
from tensorport.kernels.linear.api import linear
from tensorport.kernels.mxfp4_moe.types import ELSEWHERE
from tensorport.mxfp4 import MXFP4Array

E, H, WIDTH, CHOICES = 6, 96, 160, 3  # experts, stream, width between the layers, experts of a token


def in_int8(x: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Integers [..., K / 32, 32] and scales [..., K / 32], as float32 computes them."""
    blocks = np.asarray(x).astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    ints = np.rint(blocks / np.where(scales == 0, np.float32(1), scales)[..., None])
    return ints.astype(np.int64), scales.astype(np.float64)


def product(x: Any, w: MXFP4Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The product [M, N], its sums of integers exact; and what they are without signs, of eight values each.

    A few rows have so many in a lane of a vector, and the lanes of a block are added as floats.
    """
    ints, scales = in_int8(x)
    blocks = np.asarray(w.blocks)
    codes = 2 * oracle.decode(blocks, np.full(blocks.shape[:-1], 127, np.uint8)).reshape(*blocks.shape[:-1], 32)
    factors = np.ldexp(0.5, np.asarray(w.scales).astype(np.int64) - 127)
    lanes = [array.reshape(*array.shape[:-1], 4, 8) for array in (ints, codes.astype(np.int64))]
    dots = np.einsum("mgli,ngli->mngl", *lanes)
    scale = factors * scales[:, None]
    return (dots.sum(axis=-1) * scale).sum(axis=-1), (np.abs(dots).sum(axis=-1) * scale).sum(axis=-1)


def assert_fits(found: Any, x: Any, w: MXFP4Array) -> None:
    expected, magnitude = product(x, w)
    roundings = 3 + x.shape[-1] // 32
    bound = roundings * EPSILON["float32"] * magnitude + EPSILON[found.dtype.name] * np.abs(expected)
    assert (np.abs(float64(found) - expected) <= bound).all()


def relative_rms(found: Any, expected: Any) -> float:
    return float(np.sqrt(np.mean((float64(found) - float64(expected)) ** 2) / np.mean(float64(expected) ** 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 5, 32), (3, 601, 96), (4, 17, 2880), (5, 16, 2880), (70, 33, 160), (0, 5, 96), (7, 0, 96)]
)
def test_products_are_sums_of_integers_within_blocks(m: int, n: int, k: int, dtype: str) -> None:
    x, w = random_array(m, k, dtype=dtype), random_weights(n, k, scales=(90, 160))
    found = mxfp4.matmul(x, w, implementation="native_int8")
    assert (found.dtype, found.shape) == (x.dtype, (m, n))
    assert_fits(found, x, w)


def test_axes_of_a_batch_are_kept() -> None:
    x, w = random_array(2, 3, 96), random_weights(7, 96)
    found = mxfp4.matmul(x, w, implementation="native_int8")
    assert found.shape == (2, 3, 7)
    assert_fits(found.reshape(6, 7), x.reshape(6, 96), w)


def test_each_token_meets_the_matrix_of_its_expert() -> None:
    x, w = random_array(11, H), random_weights(E, 37, H)
    ids = np.asarray([3, 0, -1, 3, 3, 5, 4, 3, E, 3, 3])  # none of 1 and 2
    found = mxfp4.expert_matmul(x, w, jnp.asarray(ids), implementation="native_int8")
    for expert in (0, 3, 4, 5):
        assert_fits(found[ids == expert], x[ids == expert], w[expert])
    assert np.isnan(found[np.asarray([2, 8])]).all()


def mixture(tokens: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(E)[:CHOICES] for _ in range(tokens)])
    return (
        random_array(tokens, H),
        jnp.asarray(chosen, jnp.int32),
        jnp.asarray(rng.random((tokens, CHOICES)), jnp.float32),
        random_weights(E, 2 * WIDTH, H, seed=1, scales=(117, 124)),
        random_array(E, 2 * WIDTH, seed=2),
        random_weights(E, H, WIDTH, seed=3, scales=(117, 124)),
        random_array(E, H, seed=4),
    )


@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_a_mixture_is_that_of_float32_up_to_the_rounding_of_both_layers(tokens: int) -> None:
    args = mixture(tokens)
    found = mxfp4.moe(*args, implementation="native_int8")
    error = relative_rms(found, mxfp4.moe(*args, implementation="xla"))
    # Not more than rounding makes, and not so little that nothing was rounded.
    assert 1e-4 < error < 0.02
    elsewhere = mxfp4.moe(args[0], jnp.full_like(args[1], ELSEWHERE), *args[2:], implementation="native_int8")
    np.testing.assert_array_equal(elsewhere, 0)


def test_of_normal_values_half_a_percent_is_lost() -> None:
    """The figures of docs/mxfp4.md."""
    w, x = mxfp4.quantize(random_array(512, 2880)), random_array(64, 2880, seed=1)
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))
    error = relative_rms(mxfp4.matmul(x, w, implementation="native_int8"), float64(x) @ dense.T)
    assert 0.0050 < error < 0.0058
    assert relative_rms(mxfp4.matmul(x, w, implementation="native"), float64(x) @ dense.T) < 1e-5


@pytest.mark.parametrize("rows", [2, 6])
def test_nan_and_infinity_make_their_rows_nan(rows: int) -> None:
    x = random_array(rows, 96).at[0, 40].set(jnp.nan).at[1, 3].set(-jnp.inf)
    w = random_weights(7, 96)
    found = np.asarray(mxfp4.matmul(x, w, implementation="native_int8"))
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2:]).all()
    nan_scale = MXFP4Array(w.blocks, w.scales.at[3, 1].set(255))
    found = np.asarray(mxfp4.matmul(jnp.ones((rows, 96)), nan_scale, implementation="native_int8"))
    np.testing.assert_array_equal(np.isnan(found).all(axis=0), np.arange(7) == 3)


def test_blocks_of_zeros_give_zeros() -> None:
    found = mxfp4.matmul(jnp.zeros((6, 96)), random_weights(7, 96), implementation="native_int8")
    np.testing.assert_array_equal(found, 0)


def test_gradients_are_those_without_rounding() -> None:
    x, w = random_array(3, 96), random_weights(7, 96)

    def gradient(implementation: Any) -> Any:
        return jax.vjp(lambda x: mxfp4.matmul(x, w, implementation=implementation), x)[1](jnp.ones((3, 7)))[0]

    np.testing.assert_array_equal(gradient("native_int8"), gradient("native"))


def test_it_is_never_chosen_and_runs_where_it_is_named() -> None:
    x, w = random_array(3, 96), random_weights(7, 96)
    explained = kernels.explain(mxfp4.matmul, x, w)
    assert explained.implementation == "native"
    assert explained.reasons["native_int8"] == "rounds x to int8, and runs where it is named alone"
    named = kernels.explain(mxfp4.matmul, x, w, implementation="native_int8")
    assert named.implementation == "native_int8"
    assert named.reasons["native_int8"] is None
    half = x.astype(jnp.float16)
    # What `auto` takes where `native` cannot run is not this one either.
    assert kernels.explain(mxfp4.matmul, half, w).implementation == "xla"
    with pytest.raises(NotImplementedError, match=r"mxfp4\.matmul on cpu: native_int8: found x in float16"):
        mxfp4.matmul(half, w, implementation="native_int8")


def test_named_in_a_program_for_another_platform_it_is_refused() -> None:
    w = random_weights(7, 96)
    program = jax.jit(lambda x: mxfp4.matmul(x, w, implementation="native_int8"))
    with pytest.raises(NotImplementedError, match="platform"):
        export.export(program, platforms=["cuda"])(random_array(3, 96))


def test_ops_without_it_take_it_for_native() -> None:
    x, matrix = random_array(3, 96), random_array(7, 96, dtype=jnp.bfloat16, seed=1)
    explained = kernels.explain(linear, x, matrix, implementation="native_int8")
    assert explained.implementation == "native"
    assert explained.reasons["native_int8"] == "is native here"
    found = linear(x, matrix, implementation="native_int8")
    np.testing.assert_array_equal(found, linear(x, matrix, implementation="native"))
    with pytest.raises(NotImplementedError, match="linear on cpu: native: found weight in float32"):
        linear(x, matrix.astype(jnp.float32), implementation="native_int8")
