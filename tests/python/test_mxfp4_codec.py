"""quantize and dequantize: equal bit for bit to ml_dtypes and to the definition, on every path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mxfp4_oracle as oracle
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray
from tensorport import mxfp4
from tensorport.mxfp4 import MXFP4Array

Array = NDArray[Any]

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]
RULES = ["floor", "ceil", "nearest"]
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

TO_LEAVES: dict[str, Callable[[Any], Any]] = {"numpy": np.asarray, "jax": jnp.asarray}


@pytest.fixture(params=TO_LEAVES)
def to_leaves(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """NumPy arrays go through the core, jax.Arrays through XLA."""
    return TO_LEAVES[request.param]


def bits(array: Any) -> Array:
    array = np.asarray(array)
    as_integers: Array = array.view(f"u{array.dtype.itemsize}")
    return as_integers


def every_code_under_every_scale() -> tuple[Array, Array]:
    """[256, 1, 16] and [256, 1]: all 16 codes, in both nibbles, under all scale bytes."""
    codes = np.arange(16, dtype=np.uint8)
    block = np.concatenate([codes[::2] | codes[1::2] << 4, codes[1::2] | codes[::2] << 4])
    return np.broadcast_to(block, (256, 1, 16)).copy(), np.arange(256, dtype=np.uint8)[:, None]


def assert_same_values(found: Any, expected: Array) -> None:
    """The same bits, but for the payload of NaNs."""
    found = np.asarray(found)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    is_nan = np.isnan(expected.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float64)), is_nan)
    np.testing.assert_array_equal(bits(found)[~is_nan], bits(expected)[~is_nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_every_scale_byte_decodes_as_specified(to_leaves: Callable[[Any], Any], dtype: Any) -> None:
    blocks, scales = every_code_under_every_scale()
    with np.errstate(over="ignore"):  # the largest codes under scales 253 and 254, and most of float16
        expected = oracle.decode(blocks, scales).astype(dtype)
    with jax.enable_x64(np.dtype(dtype) == np.float64):
        w = MXFP4Array(to_leaves(blocks), to_leaves(scales))
        found = mxfp4.dequantize(w, dtype)
        assert isinstance(found, type(w.blocks) if isinstance(w.blocks, np.ndarray) else jax.Array)
        assert_same_values(found, expected)
        assert_same_values(w.dequantize(dtype), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_scales_up_to_252_are_finite_and_exact(dtype: Any) -> None:
    blocks, scales = every_code_under_every_scale()
    expected = oracle.decode(blocks, scales)[:253]
    found = np.asarray(mxfp4.dequantize(MXFP4Array(jnp.asarray(blocks), jnp.asarray(scales)), dtype))[:253]
    np.testing.assert_array_equal(found.astype(np.float64), expected)


@pytest.mark.parametrize("leading", [(), (5,), (0,), (3, 7, 2)])
@pytest.mark.parametrize("groups", [1, 9, 0])
def test_any_shape_decodes_and_encodes(to_leaves: Callable[[Any], Any], leading: tuple[int, ...], groups: int) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (*leading, groups, 16), dtype=np.uint8)
    scales = rng.integers(100, 150, (*leading, groups), dtype=np.uint8)
    dense = mxfp4.dequantize(MXFP4Array(to_leaves(blocks), to_leaves(scales)))
    assert_same_values(dense, oracle.decode(blocks, scales).astype(ml_dtypes.bfloat16))
    again = mxfp4.quantize(dense)
    assert again.shape == (*leading, 32 * groups)
    assert_same_values(again.dequantize(), np.asarray(dense))


def test_numpy_arrays_of_any_memory_order() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((64, 3, 5)).astype(np.float32).T  # [5, 3, 64], the first axis fastest
    blocks, scales = oracle.encode(x)
    w = mxfp4.quantize(x)
    np.testing.assert_array_equal(w.blocks, blocks)
    np.testing.assert_array_equal(w.scales, scales)
    strided = MXFP4Array(np.asfortranarray(blocks), np.asfortranarray(scales))
    np.testing.assert_array_equal(strided.dequantize(), w.dequantize())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_is_that_of_the_oracle(to_leaves: Callable[[Any], Any], dtype: Any, rule: Any) -> None:
    x = oracle.hard_values(dtype)
    blocks, scales = oracle.encode(x, rule)
    with jax.enable_x64(np.dtype(dtype) == np.float64):
        w = mxfp4.quantize(to_leaves(x), scale_rule=rule)
        assert isinstance(w.blocks, np.ndarray) == isinstance(to_leaves(x), np.ndarray)
        np.testing.assert_array_equal(np.asarray(w.scales), scales)
        np.testing.assert_array_equal(np.asarray(w.blocks), blocks)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_16_bit_pattern_encodes_as_specified(to_leaves: Callable[[Any], Any], dtype: Any, rule: Any) -> None:
    # Sorted, so that a block has values of one size; NaNs have their own.
    x = np.arange(65536, dtype=np.uint16).view(dtype).reshape(128, 512)
    blocks, scales = oracle.encode(x, rule)
    w = mxfp4.quantize(to_leaves(x), scale_rule=rule)
    np.testing.assert_array_equal(np.asarray(w.scales), scales.reshape(w.scales.shape))
    np.testing.assert_array_equal(np.asarray(w.blocks), blocks.reshape(w.blocks.shape))


def test_both_paths_give_the_same_bits_and_jit_changes_nothing() -> None:
    x = oracle.hard_values(np.float32, seed=3)
    host = mxfp4.quantize(x)
    for w in (mxfp4.quantize(jnp.asarray(x)), jax.jit(mxfp4.quantize)(x)):
        np.testing.assert_array_equal(host.blocks, np.asarray(w.blocks))
        np.testing.assert_array_equal(host.scales, np.asarray(w.scales))
    device = jax.tree.map(jnp.asarray, host)
    np.testing.assert_array_equal(bits(mxfp4.dequantize(host)), bits(jax.jit(mxfp4.dequantize)(device)))


def test_quantizing_what_is_mxfp4_already_loses_nothing(to_leaves: Callable[[Any], Any]) -> None:
    rng = np.random.default_rng(4)
    w = MXFP4Array(rng.integers(0, 256, (37, 3, 16), dtype=np.uint8), rng.integers(0, 253, (37, 3)).astype(np.uint8))
    for rule in RULES:
        dense = to_leaves(w.dequantize())
        again: Any = mxfp4.quantize(dense, scale_rule=rule)  # type: ignore[arg-type]
        np.testing.assert_array_equal(bits(again.dequantize()), bits(dense))


def test_ceil_never_saturates_and_nearest_brings_the_largest_out_best() -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((500, 32)) * np.exp(rng.uniform(-20, 20, (500, 1)))).astype(np.float32)
    amax, place = np.abs(x).max(axis=1), np.abs(x).argmax(axis=1)

    def error_of_largest(rule: Any) -> Array:
        dense = np.asarray(mxfp4.quantize(x, scale_rule=rule).dequantize(np.float64))
        error: Array = np.abs(np.abs(dense[np.arange(500), place]) - amax)
        return error

    by_rule = {rule: error_of_largest(rule) for rule in RULES}
    assert np.all(by_rule["nearest"] <= np.minimum(by_rule["floor"], by_rule["ceil"]))
    assert np.any(by_rule["nearest"] < by_rule["floor"])
    for rule, limit in (("floor", 8), ("ceil", 6), ("nearest", 7)):
        w = mxfp4.quantize(x, scale_rule=rule)  # type: ignore[arg-type]
        scaled = amax / np.ldexp(1.0, w.scales[:, 0].astype(int) - 127)
        assert np.all(scaled >= limit / 2)
        assert np.all(scaled <= limit)


def test_nan_spoils_its_block_and_infinities_stay(to_leaves: Callable[[Any], Any]) -> None:
    x = np.ones((3, 64), np.float32)
    x[0, 40], x[1, 3], x[1, 4], x[2, 5] = np.nan, np.inf, -np.inf, -0.0
    w = mxfp4.quantize(to_leaves(x))
    dense = np.asarray(w.dequantize(np.float32))
    assert np.isnan(dense[0, 32:]).all()
    assert (dense[0, :32] == 1).all()
    assert dense[1, 3] == np.inf
    assert dense[1, 4] == -np.inf
    assert (np.delete(dense[1, :32], [3, 4]) == 0).all()
    assert np.signbit(dense[2, 5])
    assert (np.asarray(w.scales) == [[125, 255], [254, 125], [125, 125]]).all()


def test_zeros_are_scale_byte_0(to_leaves: Callable[[Any], Any]) -> None:
    w = mxfp4.quantize(to_leaves(np.array([[0.0] * 32, [-0.0] * 32], np.float32)))
    assert np.asarray(w.scales).tolist() == [[0], [0]]
    assert np.asarray(w.blocks).tolist() == [[[0] * 16], [[0x88] * 16]]


class TestStochastic:
    def quantized(self, value: float, largest: float, rule: Any = "ceil", rows: int = 4000) -> Array:
        x = jnp.full((rows, 32), value, jnp.float32).at[:, 0].set(largest)
        w = mxfp4.quantize(x, scale_rule=rule, rounding="stochastic", key=jax.random.key(7))
        return np.asarray(w.dequantize(jnp.float32))[:, 1:]

    @pytest.mark.parametrize("value", [0.1, 0.5, 0.9, 1.3, 1.75, 2.25, 3.9, 4.5, 5.9, -2.7, -0.3])
    def test_values_become_one_of_their_neighbours_with_the_right_expectation(self, value: float) -> None:
        found = self.quantized(value, 6.0)
        below = MAGNITUDES[abs(value) >= MAGNITUDES].max()
        above = MAGNITUDES[abs(value) <= MAGNITUDES].min()
        assert set(np.unique(np.abs(found))) <= {below, above}
        assert np.all(np.sign(found) * np.sign(value) >= 0)
        # Six standard deviations of the mean of so many coins.
        deviation = np.sqrt((above - abs(value)) * (abs(value) - below) / found.size)
        assert abs(found.mean() - value) <= 6 * deviation

    def test_it_saturates_under_floor(self) -> None:
        assert np.unique(self.quantized(7.0, 7.5, "floor")).tolist() == [6.0]

    def test_the_same_key_gives_the_same_codes_and_another_other_ones(self) -> None:
        x = np.random.default_rng(8).standard_normal((9, 96)).astype(np.float32)
        first, second, other = (
            mxfp4.quantize(array, rounding="stochastic", key=jax.random.key(key))
            for array, key in ((x, 1), (jnp.asarray(x), 1), (x, 2))
        )
        assert isinstance(first.blocks, np.ndarray)
        assert isinstance(second.blocks, jax.Array)
        np.testing.assert_array_equal(first.blocks, second.blocks)
        np.testing.assert_array_equal(first.scales, other.scales)
        assert np.any(first.blocks != other.blocks)

    def test_nan_infinity_and_float64(self) -> None:
        with jax.enable_x64(True):
            x = np.ones((2, 32))
            x[0, 1], x[1, 1] = np.nan, np.inf
            w = mxfp4.quantize(x, rounding="stochastic", key=jax.random.key(0))
            assert w.scales.tolist() == [[255], [254]]
            assert w.dequantize(np.float32)[1, 1] == np.inf


def test_fake_quantize_has_the_values_of_mxfp4_and_the_gradient_of_the_identity() -> None:
    x = jnp.asarray(np.random.default_rng(9).standard_normal((5, 64)), jnp.float32)
    fake = mxfp4.fake_quantize(x)
    np.testing.assert_array_equal(np.asarray(fake), np.asarray(mxfp4.quantize(x).dequantize(jnp.float32)))
    gradient = jax.grad(lambda x: jnp.sum(mxfp4.fake_quantize(x) * jnp.arange(64.0)[None]))(x)
    np.testing.assert_array_equal(np.asarray(gradient), np.broadcast_to(np.arange(64.0), (5, 64)))
    tangent = jax.jvp(jax.jit(mxfp4.fake_quantize), (x,), (2 * x,))[1]
    np.testing.assert_array_equal(np.asarray(tangent), np.asarray(2 * x))
    half = mxfp4.fake_quantize(x.astype(jnp.bfloat16), rounding="stochastic", key=jax.random.key(1))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("rule", RULES)
def test_fake_quantize_keeps_finite_values_finite(rule: Any) -> None:
    x = np.full((2, 32), 65504, np.float16)
    x[1, 3] = np.inf
    found = np.asarray(mxfp4.fake_quantize(x, scale_rule=rule))
    assert np.isfinite(found[0]).all()
    assert found[1, 3] == np.inf


def test_vmap_and_scan_over_leading_axes() -> None:
    x = jnp.asarray(np.random.default_rng(10).standard_normal((4, 3, 64)), jnp.float32)
    whole = mxfp4.quantize(x)
    mapped = jax.vmap(mxfp4.quantize)(x)
    np.testing.assert_array_equal(np.asarray(mapped.blocks), np.asarray(whole.blocks))
    _, dense = jax.lax.scan(lambda carry, w: (carry, w.dequantize()), 0, whole)
    np.testing.assert_array_equal(bits(dense), bits(whole.dequantize()))


def test_shapes_are_known_without_computing() -> None:
    w = jax.eval_shape(mxfp4.quantize, jax.ShapeDtypeStruct((6, 10, 96), jnp.bfloat16))
    assert w.shape == (6, 10, 96)
    assert jax.eval_shape(mxfp4.dequantize, w).dtype == jnp.bfloat16


def test_experts_of_the_golden_checkpoint_decode_as_transformers_decodes_them(golden_hf: Path) -> None:
    golden = np.load(golden_hf / "golden.npz")["gate_up_0"]
    params = tensorport.load_params(golden_hf, include="*layers.0.mlp.experts.gate_up_proj", nested=False)
    (w,) = params.values()
    found = np.asarray(w[:2].dequantize(jnp.float32))
    np.testing.assert_array_equal(found.swapaxes(1, 2), golden)


def test_decoding_is_that_of_transformers_on_torch() -> None:
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    module = pytest.importorskip("transformers.integrations.mxfp4", reason="needs torch and transformers")
    rng = np.random.default_rng(11)
    blocks = rng.integers(0, 256, (3, 10, 4, 16), dtype=np.uint8)
    scales = rng.integers(1, 250, (3, 10, 4), dtype=np.uint8)
    expected = module.convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16
    )
    found = mxfp4.dequantize(MXFP4Array(jnp.asarray(blocks), jnp.asarray(scales)))
    np.testing.assert_array_equal(
        np.asarray(found).swapaxes(1, 2).astype(np.float32), expected.to(torch.float32).numpy()
    )


WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "list": (lambda: mxfp4.quantize([1.0] * 32), TypeError, "x: found list, expected an array"),
    "integers": (lambda: mxfp4.quantize(np.zeros(32, int)), TypeError, "x: found an array of int64, expected one of"),
    "float8": (lambda: mxfp4.quantize(jnp.zeros(32, jnp.float8_e4m3fn)), TypeError, "float8_e4m3fn"),
    "odd K": (lambda: mxfp4.quantize(np.zeros((2, 33))), ValueError, r"x: found shape \(2, 33\), expected .*32"),
    "scalar": (lambda: mxfp4.quantize(np.float32(1)), ValueError, r"x: found shape \(\)"),
    "rule": (lambda: mxfp4.quantize(np.zeros(32), scale_rule="up"), ValueError, "scale_rule: found 'up'"),  # type: ignore[arg-type]
    "rounding": (lambda: mxfp4.quantize(np.zeros(32), rounding="up"), ValueError, "rounding: found 'up'"),  # type: ignore[arg-type]
    "no key": (lambda: mxfp4.quantize(np.zeros(32), rounding="stochastic"), ValueError, "key: found no key"),
    "a key": (lambda: mxfp4.quantize(np.zeros(32), key=jax.random.key(0)), ValueError, "key: found a key"),
    "narrowed": (
        lambda: mxfp4.quantize(np.zeros(32), rounding="stochastic", key=jax.random.key(0)),
        TypeError,
        "float64, which JAX narrows",
    ),
    "dense": (lambda: mxfp4.dequantize(np.zeros(32)), TypeError, "w: found ndarray, expected an MXFP4Array"),  # type: ignore[arg-type]
    "to float8": (
        lambda: mxfp4.quantize(np.zeros(32)).dequantize(jnp.float8_e4m3fn),
        ValueError,
        "dtype: found float8_e4m3fn",
    ),
    "to None": (lambda: mxfp4.quantize(np.zeros(32)).dequantize(None), TypeError, "dtype: found None"),  # type: ignore[arg-type]
    "to float64": (
        lambda: mxfp4.quantize(jnp.zeros(32)).dequantize(np.float64),
        ValueError,
        "float64 while jax_enable_x64 is off",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call()
