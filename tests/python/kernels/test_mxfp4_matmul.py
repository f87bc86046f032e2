"""mxfp4.matmul: the values, the gradients, the transformations, the errors."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mxfp4_oracle as oracle
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mxfp4_cases import assert_close, float64, random_array, random_weights, temporary_bytes
from tensorport import mxfp4
from tensorport.kernels.mxfp4_matmul import reference, scaled_dot
from tensorport.kernels.registry import Device
from tensorport.mxfp4 import MXFP4Array

DTYPES = ["bfloat16", "float16", "float32", "float64"]
K = 96


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "batch", "n"),
    [
        (mxfp4.matmul, (), 5),
        (mxfp4.matmul, (1,), 601),
        (mxfp4.matmul, (7,), 192),
        (mxfp4.matmul, (3, 11), 601),
        (reference.matmul, (3, 11), 7),
    ],
)
def test_values_are_those_of_float64(function: Callable[..., Any], batch: tuple[int, ...], n: int, dtype: str) -> None:
    w = random_weights(n, K)
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))
    with jax.enable_x64(dtype == "float64"):
        x = random_array(*batch, K, dtype=dtype)
        found = function(x, w)
    assert (found.dtype, found.shape) == (x.dtype, (*batch, n))
    assert_close(found, float64(x) @ dense.T, np.abs(float64(x)) @ np.abs(dense.T), K)


def test_every_code_under_extreme_scales_is_exact(auto_means: str) -> None:
    """A one-hot x picks single weights: no sum, no rounding, subnormals and the largest values included."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    block = codes[::2] | codes[1::2] << 4
    scales = np.array([1, 2, 126, 127, 128, 251, 252], np.uint8)[:, None]
    w = MXFP4Array(jnp.asarray(np.broadcast_to(block, (7, 1, 16))), jnp.asarray(scales))
    found = mxfp4.matmul(jnp.eye(32, dtype=jnp.float32)[:16], w)
    expected = oracle.decode(np.asarray(w.blocks), scales)[:, :16].T
    if auto_means == "xla":
        # On CPU it flushes what is subnormal in float32 when it adds.
        expected[np.abs(expected) < 2.0**-126] = 0
    np.testing.assert_array_equal(float64(found), expected)


def test_nan_scales_reach_only_their_rows() -> None:
    w = random_weights(40, K)
    w = MXFP4Array(w.blocks, w.scales.at[3, 1].set(255))
    found = np.asarray(mxfp4.matmul(random_array(2, K), w))
    assert np.isnan(found[:, 3]).all()
    assert np.isfinite(np.delete(found, 3, axis=1)).all()


def test_x_is_not_narrowed() -> None:
    """A float32 that bfloat16 would round comes through."""
    w = mxfp4.quantize(jnp.eye(32, dtype=jnp.float32))
    x = jnp.full((1, 32), 1 + 2**-20, jnp.float32)
    np.testing.assert_array_equal(np.asarray(mxfp4.matmul(x, w)), np.asarray(x))


@pytest.mark.parametrize(("batch", "n"), [((0,), 5), ((3,), 0), ((0, 2), 0)])
def test_empty_arrays(batch: tuple[int, ...], n: int) -> None:
    assert mxfp4.matmul(jnp.zeros((*batch, K)), random_weights(n, K)).shape == (*batch, n)


def test_numpy_arrays_are_taken() -> None:
    w = jax.tree.map(np.asarray, random_weights(5, K))
    x = np.ones((2, K), ml_dtypes.bfloat16)
    np.testing.assert_array_equal(float64(mxfp4.matmul(x, w)), float64(jax.jit(mxfp4.matmul)(x, w)))


@pytest.mark.parametrize("n", [5, 601])
def test_gradient_in_x_is_the_transposed_product(n: int) -> None:
    w, x, g = random_weights(n, K), random_array(4, K, seed=1), random_array(4, n, seed=2)
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))
    out, pull_back = jax.vjp(mxfp4.matmul, x, w)
    dx, dw = pull_back(g)
    assert_close(dx, float64(g) @ dense, np.abs(float64(g)) @ np.abs(dense), n)
    assert {leaf.dtype for leaf in jax.tree.leaves(dw)} == {jax.dtypes.float0}
    assert isinstance(dw, MXFP4Array)
    assert out.shape == (4, n)


def test_gradients_of_gradients() -> None:
    w, x = random_weights(40, K), random_array(K)
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))

    def loss(x: Any) -> Any:
        return jnp.sum(mxfp4.matmul(x, w) ** 2) / 2

    hessian = jax.vmap(jax.grad(lambda x, v: jax.grad(loss)(x) @ v), (None, 0))(x, jnp.eye(K))
    np.testing.assert_allclose(float64(hessian), dense.T @ dense, rtol=1e-4, atol=1e-3)


def test_vmap_over_either_or_both() -> None:
    w, x = random_weights(3, 40, K), random_array(3, 2, K)
    both = jax.vmap(mxfp4.matmul)(x, w)
    for index in range(3):
        expected = np.asarray(mxfp4.matmul(x[index], w[index]))
        np.testing.assert_allclose(np.asarray(both[index]), expected, rtol=1e-5, atol=1e-5)
    one = jax.vmap(mxfp4.matmul, (0, None))(x, w[1])
    np.testing.assert_allclose(np.asarray(one), np.asarray(mxfp4.matmul(x, w[1])), rtol=1e-5, atol=1e-5)


def test_scan_over_stacked_layers() -> None:
    w, x = random_weights(5, K, K, scales=(115, 120)), random_array(2, K)

    def loss(x: Any) -> Any:
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(mxfp4.matmul(x, w)), None), x, w)[0])

    expected = x
    for layer in w:
        expected = jnp.tanh(reference.matmul(expected, layer))
    np.testing.assert_allclose(float(loss(x)), float(jnp.sum(expected)), rtol=1e-5)
    assert np.isfinite(np.asarray(jax.grad(loss)(x))).all()


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P()])
def test_sharded_weights_give_the_same_values(spec: P) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    w, x = random_weights(400, 256), random_array(3, 256)
    placed = jax.device_put(w, NamedSharding(mesh, spec))
    found = jax.jit(mxfp4.matmul)(x, placed)
    np.testing.assert_allclose(np.asarray(found), np.asarray(mxfp4.matmul(x, w)), rtol=1e-5, atol=1e-4)


def test_shard_map_over_rows_needs_nothing_from_other_devices() -> None:
    """Also where a device has several tiles of rows; the gradient is summed over the devices."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    w, x = random_weights(3200, K), random_array(3, K)
    placed = jax.device_put(w, NamedSharding(mesh, P("x")))
    sharded = jax.jit(jax.shard_map(mxfp4.matmul, mesh=mesh, in_specs=(P(), P("x")), out_specs=P(None, "x")))
    np.testing.assert_allclose(np.asarray(sharded(x, placed)), np.asarray(mxfp4.matmul(x, w)), rtol=1e-5, atol=1e-5)
    compiled = sharded.lower(x, placed).compile().as_text()
    assert not re.search("all-gather|all-reduce|collective-permute", str(compiled))
    gradient = jax.grad(lambda x: jnp.sum(sharded(x, placed) ** 2))(x)
    expected = jax.grad(lambda x: jnp.sum(mxfp4.matmul(x, w) ** 2))(x)
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(expected), rtol=1e-4, atol=1e-2)


def test_no_dense_copy_of_the_matrix_is_made() -> None:
    """The head of gpt-oss-20b: 1.2 GB in bfloat16."""
    w = MXFP4Array(jax.ShapeDtypeStruct((201088, 90, 16), np.uint8), jax.ShapeDtypeStruct((201088, 90), np.uint8))
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.ShapeDtypeStruct((4, 2880), dtype)
        assert temporary_bytes(jax.jit(mxfp4.matmul), x, w) < 32_000_000
        gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(mxfp4.matmul(x, w).astype(jnp.float32) ** 2)))
        assert temporary_bytes(gradient, x, w) < 64_000_000


class TestScaledDot:
    """The implementation for Blackwell, as far as a CPU can run it: there XLA takes the product apart."""

    BLACKWELL, HOPPER = Device("gpu", "NVIDIA B200", (10, 0)), Device("gpu", "NVIDIA H200", (9, 0))

    def test_it_has_the_values_of_the_reference(self) -> None:
        w, x = random_weights(160, 256), random_array(2, 3, 256, dtype=jnp.bfloat16)
        dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))
        found = jax.jit(scaled_dot.matmul)(x, w)
        assert found.dtype == jnp.bfloat16
        assert_close(found, float64(x) @ dense.T, np.abs(float64(x)) @ np.abs(dense.T), 256)

    def test_only_blackwell_runs_it_and_only_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scaled_dot, "_checked", lambda _: None)
        w, x = random_weights(5, K), random_array(2, K, dtype=jnp.bfloat16)
        assert scaled_dot.refuses(self.BLACKWELL, x, w) is None
        assert "compute capability" in str(scaled_dot.refuses(self.HOPPER, x, w))
        assert "found float32" in str(scaled_dot.refuses(self.BLACKWELL, x.astype(jnp.float32), w))
        assert "not empty" in str(scaled_dot.refuses(self.BLACKWELL, x[:0], w))
        with pytest.raises(NotImplementedError, match=r"mxfp4\.matmul on cpu: scaled_dot: needs an NVIDIA GPU"):
            mxfp4.matmul(x, w, implementation="scaled_dot")

    def test_it_lowers_for_cuda(self) -> None:
        w, x = random_weights(160, 256), random_array(8, 256, dtype=jnp.bfloat16)
        text = jax.jit(scaled_dot.matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
        assert "scaled_dot" in text

    def test_the_self_check_passes_where_the_product_is_right_also_while_tracing(self) -> None:
        assert scaled_dot.self_check() is None
        told: list[Any] = []

        @jax.jit
        def traced(x: Any) -> Any:
            told.append(scaled_dot.self_check())
            return x

        traced(jnp.zeros(3))
        assert told == [None]

    @pytest.mark.parametrize("fault", ["dropped scales", "wrong nibbles", "nan"])
    def test_the_self_check_finds_wrong_products(self, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
        right = scaled_dot.matmul

        def wrong(x: Any, w: MXFP4Array) -> Any:
            if fault == "dropped scales":
                return right(x, MXFP4Array(w.blocks, jnp.full_like(w.scales, 127)))
            if fault == "wrong nibbles":
                return right(x, MXFP4Array(w.blocks << 4 | w.blocks >> 4, w.scales))
            return right(x, w) * jnp.nan

        monkeypatch.setattr(scaled_dot, "matmul", wrong)
        assert "self-check failed (found a relative error of" in str(scaled_dot.self_check())

    def test_a_failed_self_check_refuses_once_and_for_all_and_warns_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = Device("gpu", "NVIDIA B300", (10, 3))
        monkeypatch.setattr(scaled_dot, "self_check", lambda: "its self-check failed (made up)")
        w, x = random_weights(5, K), random_array(2, K, dtype=jnp.bfloat16)
        with pytest.warns(RuntimeWarning, match=r"scaled_dot is not used on gpu \(NVIDIA B300\).*made up"):
            assert "made up" in str(scaled_dot.refuses(device, x, w))
        assert "made up" in str(scaled_dot.refuses(device, x, w))


WRONG_CALLS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "dense w": (jnp.zeros((2, K)), jnp.zeros((5, K)), TypeError, "w: found .*, expected an MXFP4Array"),
    "stack": (jnp.zeros((2, K)), random_weights(3, 5, K), ValueError, r"w: found shape \(3, 5, 96\), expected 2 axes"),
    "other K": (jnp.zeros((2, 64)), random_weights(5, K), ValueError, "K, the last axis: found 64 in x, 96 in w"),
    "integers": (jnp.zeros((2, K), jnp.int32), random_weights(5, K), TypeError, "x: found an array of int32"),
    "scalar": (jnp.float32(1), random_weights(5, K), ValueError, r"x: found shape \(\), expected at least one axis"),
    "list": ([1.0] * K, random_weights(5, K), TypeError, "x: found list, expected an array"),
    "swapped": (random_weights(5, K), jnp.zeros((2, K)), TypeError, "x: found MXFP4Array, expected an array"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    x, w, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        mxfp4.matmul(x, w)
    if error is ValueError:
        with pytest.raises(error, match=message):
            jax.jit(mxfp4.matmul)(x, w)
