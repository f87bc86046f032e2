"""dense_moe: the mixture of experts of gpt-oss with matrices that are not MXFP4."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import CHOICES, WIDTH, E, H, expected, inputs
from mxfp4_cases import float64, random_weights, temporary_bytes
from tensorport import kernels, mxfp4
from tensorport.kernels.dense_moe.api import dense_moe
from tensorport.kernels.mxfp4_moe.types import ELSEWHERE

TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5, "float64": 1e-12}
"""Of the largest value: a rounding to the dtype, or sums of 96 and 160 products in float32."""


def decoded(args: tuple[Any, ...], dtype: Any = jnp.float32) -> list[Any]:
    """The same arguments with matrices that are dense; every MXFP4 value of these is exact in every dtype."""
    return [mxfp4.dequantize(arg, dtype) if isinstance(arg, mxfp4.MXFP4Array) else arg for arg in args]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("tokens", [1, 5, 131])
def test_values_are_those_of_the_formula(tokens: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        args = inputs(tokens, dtype)
        found = dense_moe(*decoded(args, dtype))
    assert (found.dtype, found.shape) == (args[0].dtype, (tokens, H))
    wanted = expected(args)
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_transposed_matrices_are_multiplied_as_they_are(tokens: int, dtype: str) -> None:
    args = decoded(inputs(tokens, dtype), dtype)
    transposed = [jnp.swapaxes(arg, 1, 2) if arg.ndim == 3 else arg for arg in args]
    found, wanted = float64(dense_moe(*transposed, transposed=True)), float64(dense_moe(*args))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2 * TOLERANCE[dtype] * np.abs(wanted).max())
    with pytest.raises(ValueError, match="H, the width of the stream: found 96 in x, 320 in gate_up"):
        dense_moe(*transposed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_it_equals_mxfp4_moe_on_the_decoded_matrices(tokens: int, dtype: str) -> None:
    args = inputs(tokens, dtype, seed=11)
    found, wanted = (float64(result) for result in (dense_moe(*decoded(args, dtype)), mxfp4.moe(*args)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2 * TOLERANCE[dtype] * np.abs(wanted).max())


@pytest.mark.parametrize(("limit", "alpha"), [(0.5, 1.0), (np.inf, 3.0)])
def test_limit_and_alpha(limit: float, alpha: float) -> None:
    args = inputs(9)
    wanted = expected(args, limit, alpha)
    found = dense_moe(*decoded(args), limit=limit, alpha=alpha)
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_pairs_elsewhere_add_nothing() -> None:
    args = decoded(inputs(5))
    args[1] = args[1].at[1, 0].set(ELSEWHERE).at[3].set(ELSEWHERE)
    without = [*args]
    without[1] = jnp.where(args[1] == ELSEWHERE, 0, args[1])
    without[2] = jnp.where(args[1] == ELSEWHERE, 0, args[2])
    found, wanted = dense_moe(*args), dense_moe(*without)
    np.testing.assert_allclose(float64(found), float64(wanted), rtol=0, atol=1e-5 * np.abs(float64(wanted)).max())
    np.testing.assert_array_equal(found[3], np.zeros(H))


def test_a_token_with_an_index_that_no_expert_has_becomes_nan_and_no_other() -> None:
    args = decoded(inputs(5))
    clean = np.asarray(dense_moe(*args))
    args[1] = args[1].at[1, 0].set(-1).at[3, 2].set(E)
    found = np.asarray(dense_moe(*args))
    assert np.isnan(found[[1, 3]]).all()
    np.testing.assert_allclose(found[[0, 2, 4]], clean[[0, 2, 4]], rtol=0, atol=1e-5 * np.abs(clean).max())


def test_experts_without_tokens_are_not_touched() -> None:
    args = decoded(inputs(4))
    args[1] = jnp.asarray([[1, 2, 4]] * 4)
    clean = dense_moe(*args)
    unused = jnp.asarray([0, 3, 5])
    for number in (3, 4, 5, 6):
        args[number] = args[number].at[unused].set(jnp.nan)
    np.testing.assert_array_equal(dense_moe(*args), clean)


def test_empty_arrays() -> None:
    args = decoded(inputs(5))
    assert dense_moe(args[0][:0], args[1][:0], args[2][:0], *args[3:]).shape == (0, H)
    none = dense_moe(args[0], args[1][:, :0], args[2][:, :0], *args[3:])
    np.testing.assert_array_equal(none, np.zeros((5, H)))
    # Without values between the layers, the biases of the chosen experts are left.
    empty = args[3][:, :0], args[4][:, :0], args[5][..., :0]
    narrow = dense_moe(*(*args[:3], *empty, args[6]))
    np.testing.assert_allclose(narrow, np.einsum("tk,tkh->th", args[2], args[6][args[1]]), rtol=1e-6, atol=1e-6)


def test_jit_and_vmap_change_nothing() -> None:
    first, second = (decoded(inputs(5, seed=seed)) for seed in (0, 20))
    batch = [jnp.stack([a, b]) for a, b in zip(first[:3], second[:3], strict=True)]
    found = jax.vmap(dense_moe, (0, 0, 0, None, None, None, None))(*batch, *first[3:])
    jitted = jax.jit(partial(dense_moe, implementation="xla"))
    for index, args in enumerate((first, second)):
        wanted = float64(dense_moe(*args[:3], *first[3:]))
        for one in (found[index], jitted(*args[:3], *first[3:])):
            np.testing.assert_allclose(float64(one), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_reverse_mode_is_refused() -> None:
    x, *rest = decoded(inputs(3))
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda x: jnp.sum(dense_moe(x, *rest)))(x)


def test_memory_does_not_grow_with_the_number_of_experts() -> None:
    shape: Any = jax.ShapeDtypeStruct

    def bytes_of(num_experts: int, hidden: int = 2880, width: int = 2880) -> int:
        return temporary_bytes(
            jax.jit(dense_moe),
            shape((1, hidden), jnp.bfloat16),
            shape((1, 4), jnp.int32),
            shape((1, 4), jnp.bfloat16),
            shape((num_experts, 2 * width, hidden), jnp.bfloat16),
            shape((num_experts, 2 * width), jnp.bfloat16),
            shape((num_experts, hidden, width), jnp.bfloat16),
            shape((num_experts, hidden), jnp.bfloat16),
        )

    few, many = bytes_of(8), bytes_of(32)
    # Biases in float32; and of matrices no more than those of one expert, in float32.
    assert many <= few + 24 * 3 * 2880 * 4 + 100_000
    assert few <= 3 * 2880 * 2880 * 4 + 1_000_000


def test_which_implementation_runs_is_told() -> None:
    args = decoded(inputs(5), jnp.bfloat16)
    explained = kernels.explain(dense_moe, *args)
    assert (explained.op, explained.implementation) == ("dense_moe", "native")
    args[3] = args[3].astype(jnp.float32)
    assert kernels.explain(dense_moe, *args).implementation == "xla"
    with pytest.raises(NotImplementedError, match="dense_moe on cpu: native: found gate_up in float32"):
        dense_moe(*args, implementation="native")


def wrong(number: int, value: Any) -> Callable[[], Any]:
    def call() -> Any:
        args = decoded(inputs(5))
        args[number] = value
        return dense_moe(*args)

    return call


def zeros(*shape: int) -> Any:
    return jnp.zeros(shape)


WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x": (wrong(0, zeros(5, 64)), ValueError, r"H, .*: found 64 in x, 96 in gate_up \(last axis\)"),
    "tokens": (wrong(1, jnp.zeros((4, CHOICES), jnp.int32)), ValueError, "T, .*: found 5 in x, 4 in router_indices"),
    "choices": (wrong(2, zeros(5, 2)), ValueError, "k, .*: found 3 in router_indices, 2 in router_weights"),
    "experts": (wrong(5, zeros(5, H, WIDTH)), ValueError, "E, .*: found 6 in gate_up, 6 in gate_up_bias, 5 in down"),
    "no experts": (wrong(3, zeros(0, 2 * WIDTH, H)), ValueError, "gate_up: found no experts, expected at least one"),
    "width": (wrong(5, zeros(E, H, 128)), ValueError, r"2 I, .*: found 320 in gate_up .*256 in down \(last axis"),
    "bias": (wrong(4, zeros(E, 319)), ValueError, "319 in gate_up_bias"),
    "last bias": (wrong(6, zeros(E, 95)), ValueError, "H, .*95 in down_bias"),
    "float indices": (wrong(1, zeros(5, CHOICES)), TypeError, "router_indices: found an array of float32"),
    "codes": (wrong(3, random_weights(E, 2 * WIDTH, H)), TypeError, "gate_up: found MXFP4Array, expected an array"),
    "axes": (wrong(5, zeros(H, WIDTH)), ValueError, r"down: found shape \(96, 160\), expected 3 axes"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call()
