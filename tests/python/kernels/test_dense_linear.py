"""linear: dense matrices as checkpoints store them, [out, in]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mxfp4_cases import EPSILON, assert_close, float64, random_array, temporary_bytes
from tensorport import kernels
from tensorport.kernels.linear import reference, xla
from tensorport.kernels.linear.api import linear

DTYPES = ["bfloat16", "float16", "float32", "float64"]
K, N = 96, 40


def linear_reference(x: Any, weight: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    return reference.linear(x, weight, bias, x.dtype if out_dtype is None else out_dtype)


FUNCTIONS = [linear, linear_reference]


def inputs(*batch: int, dtype: Any = jnp.float32, weight_dtype: Any = None) -> tuple[Any, Any, Any]:
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    return (
        random_array(*batch, K, dtype=dtype, seed=1),
        random_array(N, K, dtype=weight_dtype, seed=2),
        random_array(N, dtype=weight_dtype, seed=3),
    )


def assert_fits(found: Any, x: Any, weight: Any, bias: Any) -> None:
    wanted, magnitude = float64(x) @ float64(weight).T, np.abs(float64(x)) @ np.abs(float64(weight)).T
    if bias is not None:
        wanted, magnitude = wanted + float64(bias), magnitude + np.abs(float64(bias))
    assert_close(found, wanted, magnitude, K + 1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (2,), (3, 17), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_those_of_float64(
    function: Callable[..., Any], batch: tuple[int, ...], dtype: str, has_bias: bool
) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, weight, bias = inputs(*batch, dtype=dtype)
        found = function(x, weight, bias if has_bias else None)
    assert (found.dtype, found.shape) == (x.dtype, (*batch, N))
    assert_fits(found, x, weight, bias if has_bias else None)


@pytest.mark.parametrize("has_bfloat16_dot", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (4,)], ids=str)
def test_every_processor_gets_the_same_values(
    monkeypatch: pytest.MonkeyPatch, batch: tuple[int, ...], has_bfloat16_dot: bool
) -> None:
    monkeypatch.setattr(xla, "_has_bfloat16_dot", lambda: has_bfloat16_dot)
    args = inputs(*batch, dtype=jnp.bfloat16)
    assert_fits(linear(*args), *args)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (5,)], ids=str)
def test_sums_are_float32_unless_x_is_float64(batch: tuple[int, ...], dtype: str, weight_dtype: str) -> None:
    with jax.enable_x64(True):
        x, weight, bias = inputs(*batch, dtype=dtype, weight_dtype=weight_dtype)
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        found = linear(x, weight, bias, out_dtype=wide)
    assert found.dtype == wide
    # A weight wider than the sums is rounded to them.
    narrowed = weight if weight_dtype != "float64" or dtype == "float64" else np.asarray(weight, np.float32)
    bias = bias if narrowed is weight else np.asarray(bias, np.float32)
    assert_fits(found, x, narrowed, bias)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_result_is_rounded_once_behind_the_bias(function: Callable[..., Any]) -> None:
    """1 + 2^-9 rounds to 1 in bfloat16; and 2^-9 comes through if the bias of -1 is added before."""
    x, weight = jnp.ones((3, K), jnp.bfloat16), jnp.zeros((N, K), jnp.bfloat16).at[:, 0].set(1).at[:, 1].set(2**-9)
    np.testing.assert_array_equal(function(x, weight, jnp.full(N, -1, jnp.bfloat16)), np.full((3, N), 2.0**-9))
    exact = function(x, weight, None, out_dtype=jnp.float32)
    assert exact.dtype == jnp.float32
    np.testing.assert_array_equal(exact, np.full((3, N), 1 + 2.0**-9))


def test_nan_stays_in_its_row_and_its_column() -> None:
    x, weight, bias = inputs(4)
    found = np.asarray(linear(x.at[1, 2].set(jnp.nan), weight.at[7, 3].set(jnp.inf), bias))
    assert np.isnan(found[1]).all()
    assert np.isinf(np.delete(found, 1, axis=0)[:, 7]).all()
    assert np.isfinite(np.delete(np.delete(found, 1, axis=0), 7, axis=1)).all()


@pytest.mark.parametrize("batch", [(), (6,)], ids=str)
def test_gradients_are_those_of_finite_differences(batch: tuple[int, ...]) -> None:
    with jax.enable_x64(True):
        args = inputs(*batch, dtype=jnp.float64)
        direction = random_array(*batch, N, dtype=jnp.float64, seed=9)

        def loss(*args: Any) -> Any:
            return jnp.sum(linear(*args) ** 2 * direction)

        step = 1e-6
        for number, gradient in enumerate(jax.grad(loss, (0, 1, 2))(*args)):
            along = random_array(*gradient.shape, dtype=jnp.float64, seed=10 + number)
            ends = [
                loss(*(value + sign * step * along if i == number else value for i, value in enumerate(args)))
                for sign in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(float(jnp.sum(gradient * along)), slope, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [(1,), (6,)], ids=str)
def test_gradients_are_those_of_the_reference(batch: tuple[int, ...], dtype: str) -> None:
    args = inputs(*batch, dtype=dtype)

    def gradients(function: Callable[..., Any]) -> Any:
        return jax.jit(jax.grad(lambda *args: jnp.sum(function(*args, out_dtype=jnp.float32) ** 2), (0, 1, 2)))(*args)

    for found, wanted in zip(gradients(linear), gradients(linear_reference), strict=True):
        assert found.dtype == wanted.dtype == args[0].dtype
        # Rows that were repeated add up halves that were rounded; and sums of K products of sums of K products.
        error = np.abs(float64(found) - float64(wanted)).max() / np.abs(float64(wanted)).max()
        assert error <= 4 * EPSILON[dtype] + 2 * K * EPSILON["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_jit_and_vmap_change_nothing(dtype: str) -> None:
    xs, weight, bias = inputs(3, 5, dtype=dtype)
    function = partial(linear, implementation="xla")
    assert_fits(jax.jit(function)(xs, weight, bias), xs, weight, bias)
    assert_fits(jax.vmap(function, (0, None, None))(xs, weight, bias), xs, weight, bias)
    # One row each.
    assert_fits(jax.vmap(jax.vmap(function, (0, None, None)), (0, None, None))(xs, weight, bias), xs, weight, bias)


def test_numpy_arrays_are_taken() -> None:
    args = inputs(5)
    np.testing.assert_array_equal(linear(*map(np.asarray, args)), linear(*args))


def test_one_row_takes_no_copy_of_the_matrix() -> None:
    shape: Any = jax.ShapeDtypeStruct
    args = shape((1, 2880), jnp.bfloat16), shape((4096, 2880), jnp.bfloat16), shape((4096,), jnp.bfloat16)
    # x and the result in float32, some times.
    assert temporary_bytes(jax.jit(linear), *args) <= 8 * 4 * (2880 + 4096)


def test_which_implementation_runs_is_told() -> None:
    x, weight, bias = inputs(5)
    explained = kernels.explain(linear, x, weight, bias)
    assert (explained.op, explained.implementation) == ("linear", "xla")
    assert explained.reasons["native"] == "found weight in float32, expected bfloat16"
    with pytest.raises(NotImplementedError, match="linear on cpu: native: found weight in float32"):
        linear(x, weight, bias, implementation="native")
    explained = kernels.explain(linear, x, weight.astype(jnp.bfloat16), bias)
    assert explained.implementation == "native"


def wrong(number: int, value: Any, **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        args: list[Any] = list(inputs(5))
        args[number] = value
        return linear(*args, **options)

    return call


WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "scalar": (wrong(0, jnp.float32(1)), ValueError, r"x: found shape \(\), expected at least one axis"),
    "integers": (wrong(0, jnp.zeros((5, K), jnp.int32)), TypeError, "x: found an array of int32, expected one of"),
    "list": (wrong(0, [1.0] * K), TypeError, "x: found list, expected an array"),
    "transposed": (wrong(1, jnp.zeros((K, N))), ValueError, "K, the contracted axis: found 96 in x, 40 in weight"),
    "stack": (wrong(1, jnp.zeros((2, N, K))), ValueError, r"weight: found shape \(2, 40, 96\), expected 2 axes"),
    "bias": (wrong(2, jnp.zeros(K)), ValueError, "N, the width of the result: found 40 in weight, 96 in bias"),
    "axes of bias": (wrong(2, jnp.zeros((1, N))), ValueError, r"bias: found shape \(1, 40\), expected 1 axis"),
    "out_dtype": (wrong(2, None, out_dtype=jnp.int8), TypeError, "out_dtype: found int8, expected one of bfloat16"),
    "implementation": (wrong(2, None, implementation="cuda"), ValueError, "implementation: found 'cuda', expected"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call()
