"""attention through Triton, interpreted on CPU against float64, and where it runs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import B, attention_inputs, expected
from mxfp4_cases import float64
from tensorport.kernels.attention import pallas_triton, xla
from tensorport.kernels.attention.configs import TritonConfig
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.registry import OPS, Device

# JAX 0.11 announces that its backend for Triton will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

N, G, D = 12, 3, 16  # heads of queries and of keys, width of a head
attention: Any = partial(pallas_triton.attention, interpret=True)

# Of the largest value: sums in float32, and where the shares are rounded to the dtype of the values, that.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-9, "float32": 1e-5}


def inputs(queries: int, keys: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    return attention_inputs(queries, keys, N, G, D, dtype)


def settings(sliding_window: int | None = None) -> Settings:
    return Settings(D**-0.5, sliding_window)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sliding_window", [None, 3, 70])
@pytest.mark.parametrize(("queries", "keys"), [(1, 11), (1, 300), (3, 150), (90, 90)])
def test_values_are_those_of_float64(queries: int, keys: int, sliding_window: int | None, dtype: str) -> None:
    args = inputs(queries, keys, dtype)
    found = attention(*args, settings(sliding_window))
    assert (found.dtype, found.shape) == (args[0].dtype, args[0].shape)
    wanted = expected(args, sliding_window)
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


def test_the_cases_divide_keys_among_programs_and_do_not() -> None:
    assert TritonConfig.rule(B * G, N // G, 300).splits > 1
    assert TritonConfig.rule(64, 64 * 64, 300).splits == 1


def test_keys_that_are_not_divided_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(3, 300)
    divided = attention(*args, settings())
    config = TritonConfig(16, 32, 1, 4, 2)
    monkeypatch.setattr(TritonConfig, "choose", lambda *_: config)
    np.testing.assert_allclose(attention(*args, settings()), divided, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_without_sinks(sliding_window: int | None) -> None:
    args = (*inputs(5, 150)[:5], None)
    wanted = expected(args, sliding_window)
    found = attention(*args, settings(sliding_window))
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_query_that_sees_nothing_is_zero() -> None:
    query, key, value, at, of, sinks = inputs(3, 70)
    for logits in (sinks, None):
        found = attention(query, key, value, at.at[0, 1].set(-1), of, logits, settings())
        assert not np.asarray(found[0, 1]).any()
        assert np.asarray(found[0, 2]).all()
        none = attention(query, key, value, at, jnp.full_like(of, -1), logits, settings())
        np.testing.assert_array_equal(none, np.zeros(query.shape))


def test_what_is_not_there_is_not_read() -> None:
    query, key, value, at, of, sinks = inputs(3, 70)
    wanted = attention(query, key, value, at, of, sinks, settings())
    is_there = (of >= 0)[:, :, None, None]
    key, value = (jnp.where(is_there, array, jnp.nan) for array in (key, value))
    query = jnp.where((at >= 0)[:, :, None, None], query, jnp.nan)
    np.testing.assert_array_equal(attention(query, key, value, at, of, sinks, settings()), wanted)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float16")], ids=str)
def test_dtypes_may_differ(dtypes: tuple[str, str, str]) -> None:
    wide = inputs(3, 70)
    query, key, value = (array.astype(dtype) for array, dtype in zip(wide[:3], dtypes, strict=True))
    args = (query, key, value, *wide[3:])
    found, wanted = attention(*args, settings(9)), expected(args, 9)
    assert found.dtype == dtypes[0]
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=2**-7 * np.abs(wanted).max())


def test_gradients_are_those_of_xla() -> None:
    args = inputs(3, 20)

    def loss(function: Any, *floats: Any) -> Any:
        query, key, value, sinks = floats
        return jnp.sum(function(query, key, value, *args[3:5], sinks, settings(5)) ** 2)

    floats = (*args[:3], args[5])
    of_triton, of_xla = (
        jax.grad(partial(loss, function), (0, 1, 2, 3))(*floats) for function in (attention, xla.attention)
    )
    for found, wanted in zip(of_triton, of_xla, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "words"),
    [
        (64, "bfloat16", None),
        (80, "bfloat16", "found heads of 80"),
        (8, "float32", "found heads of 8"),
        (64, "float64", "float64"),
    ],
)
def test_heads_are_powers_of_two(head_dim: int, dtype: str, words: str | None) -> None:
    array: Any = jax.ShapeDtypeStruct
    with jax.enable_x64(dtype == "float64"):
        cached, positions = array((2, 7, 3, head_dim), dtype), (array((2, 5), "int32"), array((2, 7), "int32"))
        args = array((2, 5, 12, head_dim), "float32"), cached, cached, *positions
        explanation = OPS["attention"].explain("pallas_triton", Device("gpu", "NVIDIA H200", (9, 0)), *args, None)
    reason = explanation.reasons["pallas_triton"]
    assert reason is None if words is None else words in str(reason)
    assert (explanation.implementation is not None) == (words is None)
