"""MXFP4Linear: what it computes, in which dtype, and what it is made of."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn import dtypes
from tensorport import mxfp4
from tensorport.mxfp4 import MXFP4Array
from tensorport.nnx import MXFP4Linear

IN, OUT = 96, 40


def random_input(*shape: int, dtype: Any = np.float32, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dense_linear(in_features: int = IN, out_features: int = OUT, **options: Any) -> nnx.Linear:
    bias_init = nnx.initializers.normal(1.0)
    return nnx.Linear(in_features, out_features, bias_init=bias_init, rngs=nnx.Rngs(3), **options)


def assert_same_codes(found: MXFP4Array, expected: MXFP4Array) -> None:
    np.testing.assert_array_equal(np.asarray(found.blocks), np.asarray(expected.blocks))
    np.testing.assert_array_equal(np.asarray(found.scales), np.asarray(expected.scales))


@pytest.mark.parametrize("shape", [(), (7,), (2, 0), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("out_features", [OUT, 300])
@pytest.mark.parametrize("use_bias", [True, False])
def test_it_multiplies_by_the_decoded_kernel(shape: tuple[int, ...], out_features: int, use_bias: bool) -> None:
    layer = MXFP4Linear.from_linear(dense_linear(out_features=out_features, use_bias=use_bias))
    x = random_input(*shape, IN)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        y = layer(x)
    kernel = layer.kernel[...].dequantize(jnp.float32)
    assert kernel.shape == (out_features, IN)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    if layer.bias is not None:
        expected += np.asarray(layer.bias[...], np.float64)
    assert y.shape == (*shape, out_features)
    magnitudes = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(kernel, np.float64)).T + 4
    # A sum of IN products in float32, in any order, and the bias.
    assert np.all(np.abs(y - expected) <= (IN + 1) * np.finfo(np.float32).eps * magnitudes)


def test_the_same_key_gives_the_quantized_dense_layer() -> None:
    options: Any = {"kernel_init": nnx.initializers.he_normal(), "bias_init": nnx.initializers.normal(1.0)}
    dense = nnx.Linear(IN, OUT, rngs=nnx.Rngs(7), **options)
    layer = MXFP4Linear(IN, OUT, rngs=nnx.Rngs(7), **options)
    assert_same_codes(layer.kernel[...], MXFP4Linear.from_linear(dense).kernel[...])
    assert_same_codes(layer.kernel[...], mxfp4.quantize(dense.kernel[...].T))
    assert layer.bias is not None
    assert dense.bias is not None
    np.testing.assert_array_equal(layer.bias[...], dense.bias[...])
    assert (layer.in_features, layer.out_features, layer.use_bias) == (IN, OUT, True)


@pytest.mark.parametrize("scale_rule", ["floor", "ceil", "nearest"])
def test_the_scale_rule_is_that_of_quantize(scale_rule: Any) -> None:
    dense = dense_linear()
    expected = mxfp4.quantize(dense.kernel[...].T, scale_rule=scale_rule)
    layers = [
        MXFP4Linear.from_linear(dense, scale_rule=scale_rule),
        MXFP4Linear(IN, OUT, kernel_init=lambda *_: dense.kernel[...], scale_rule=scale_rule, rngs=nnx.Rngs(0)),
    ]
    for layer in layers:
        assert_same_codes(layer.kernel[...], expected)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("input_dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32])
def test_dtypes_are_those_of_the_dense_layer(dtype: Any, param_dtype: Any, use_bias: bool, input_dtype: Any) -> None:
    options: Any = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": use_bias}
    x = jnp.ones((3, IN), input_dtype)

    def results() -> tuple[jax.Array, ...]:
        dense = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0), **options)
        layer = MXFP4Linear(IN, OUT, rngs=nnx.Rngs(0), **options)
        assert layer.bias is None or layer.bias.dtype == param_dtype
        return dense(x), layer(x), MXFP4Linear.from_linear(dense)(x)

    dense, *found = jax.eval_shape(results)
    assert [result.dtype for result in found] == 2 * [dense.dtype]


def test_a_cast_dense_layer_keeps_the_dtype_that_it_has_now() -> None:
    dense = dense_linear(param_dtype=jnp.float32)
    nnx.update(dense, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(dense)))
    x = random_input(3, IN, dtype=jnp.bfloat16)
    assert MXFP4Linear.from_linear(dense)(x).dtype == dense(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("in_features", [0, 1, 31, 48, -32])
def test_a_size_that_is_not_whole_blocks_is_refused(in_features: int) -> None:
    with pytest.raises(ValueError, match=f"in_features: found {in_features}, expected a multiple of 32"):
        MXFP4Linear(in_features, OUT, rngs=nnx.Rngs(0))


def test_from_array_takes_codes_as_they_are() -> None:
    w = mxfp4.quantize(np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32))
    bias = np.arange(OUT, dtype=np.float32)
    layer = MXFP4Linear.from_array(w, bias, dtype=jnp.bfloat16)
    assert layer.kernel[...].blocks is w.blocks
    assert layer.kernel[...].scales is w.scales
    assert (layer.in_features, layer.out_features, layer.dtype) == (IN, OUT, jnp.bfloat16)
    x = random_input(3, IN)
    assert layer(x).dtype == jnp.bfloat16
    without = MXFP4Linear.from_array(w)
    assert without.bias is None
    assert without(random_input(3, IN, dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(without(x), mxfp4.matmul(x, w))


def test_from_array_refuses_what_does_not_fit() -> None:
    w = mxfp4.quantize(np.zeros((OUT, IN), np.float32))
    dense: Any = np.zeros((OUT, IN), np.float32)
    with pytest.raises(TypeError, match="kernel: found ndarray, expected an MXFP4Array"):
        MXFP4Linear.from_array(dense)
    with pytest.raises(ValueError, match=r"kernel: found shape \(1, 40, 96\), expected 2 axes"):
        MXFP4Linear.from_array(w[None])
    with pytest.raises(ValueError, match="found 40 in kernel, 96 in bias"):
        MXFP4Linear.from_array(w, np.zeros(IN, np.float32))


def test_the_bias_stays_the_same_variable() -> None:
    dense = dense_linear()
    assert MXFP4Linear.from_linear(dense).bias is dense.bias


def test_a_numpy_kernel_is_quantized_on_the_host() -> None:
    dense = dense_linear()
    expected = MXFP4Linear.from_linear(dense)
    dense.kernel.set_value(np.asarray(dense.kernel[...]))
    layer = MXFP4Linear.from_linear(dense)
    assert isinstance(layer.kernel[...].blocks, np.ndarray)
    assert_same_codes(layer.kernel[...], expected.kernel[...])
    x = random_input(3, IN)
    np.testing.assert_array_equal(layer(x), expected(x))


class Scaled(nnx.Linear):
    """A subclass that computes something else."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return 2 * super().__call__(inputs, out_sharding)


def with_attribute() -> Any:
    linear: Any = dense_linear()
    linear.temperature = 2.0
    return linear


def with_kernel(kernel: Any, **metadata: Any) -> nnx.Linear:
    linear = dense_linear()
    linear.kernel = nnx.Param(kernel, **metadata)
    return linear


REFUSED: dict[str, Any] = {
    "found a Scaled, expected nnx.Linear itself": lambda: Scaled(IN, OUT, rngs=nnx.Rngs(0)),
    "found a LoRALinear, expected nnx.Linear itself": lambda: nnx.LoRALinear(IN, OUT, lora_rank=2, rngs=nnx.Rngs(0)),
    "found a dot_general of its own": lambda: dense_linear(dot_general=partial(jax.lax.dot_general)),
    "found a promote_dtype of its own": lambda: dense_linear(promote_dtype=partial(dtypes.promote_dtype)),
    "found preferred_element_type=": lambda: dense_linear(preferred_element_type=jnp.float32),
    "found precision='BF16_BF16_F32'": lambda: dense_linear(precision="BF16_BF16_F32"),
    r"found an nnx.Linear with more attributes \(temperature\)": with_attribute,
    r"found kernel \[80, 40\], expected a multiple of 32 in place of 80": lambda: dense_linear(80),
    "found kernel of float8_e4m3fn": lambda: with_kernel(jnp.zeros((IN, OUT), jnp.float8_e4m3fn)),
    r"found kernel of float32\[96\], expected a matrix": lambda: with_kernel(jnp.zeros(IN)),
    "found kernel of ShapeDtypeStruct": lambda: nnx.eval_shape(dense_linear),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_layer_whose_meaning_would_change_is_refused(message: str) -> None:
    linear = REFUSED[message]()
    with pytest.raises(ValueError, match=f"linear: {message}"):
        MXFP4Linear.from_linear(linear)


def test_what_is_no_dense_layer_is_refused() -> None:
    convolution: Any = nnx.Conv(32, 32, (3,), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"linear: found Conv, expected an nnx\.Linear"):
        MXFP4Linear.from_linear(convolution)


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_hooks_on_dense_values_are_refused() -> None:
    linear = with_kernel(jnp.zeros((IN, OUT)), on_get_value=lambda _, value: 2 * value)
    with pytest.raises(ValueError, match="linear: found hooks on its weights"):
        MXFP4Linear.from_linear(linear)
    init = nnx.with_metadata(nnx.initializers.zeros, on_get_value=lambda _, value: 2 * value)
    with pytest.raises(ValueError, match="found hooks on its weights"):
        MXFP4Linear(IN, OUT, kernel_init=init, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("precision", ["highest", "float32", jax.lax.Precision.DEFAULT])
def test_any_precision_that_is_a_lower_bound_is_met(precision: Any) -> None:
    dense = dense_linear(precision=precision)
    np.testing.assert_array_equal(
        MXFP4Linear.from_linear(dense)(random_input(3, IN)),
        MXFP4Linear.from_linear(dense_linear())(random_input(3, IN)),
    )


def test_the_implementation_is_the_one_that_is_named() -> None:
    layer = MXFP4Linear(IN, OUT, implementation="pallas_mosaic", rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="pallas_mosaic"):
        layer(random_input(3, IN))
    assert MXFP4Linear.from_linear(dense_linear(), implementation="xla").implementation == "xla"


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="K, the last axis"):
        MXFP4Linear(IN, OUT, rngs=nnx.Rngs(0))(random_input(3, OUT))


def test_jit_compiles_once_for_layers_of_one_shape() -> None:
    traces = []

    @nnx.jit
    def apply(layer: MXFP4Linear, x: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return layer(x)

    x = random_input(3, IN)
    for seed in range(2):
        layer = MXFP4Linear(IN, OUT, rngs=nnx.Rngs(seed))
        np.testing.assert_allclose(apply(layer, x), layer(x), rtol=1e-5, atol=1e-5)
    assert traces == [(3, IN)]


def test_metadata_speaks_of_the_dense_kernel() -> None:
    layer = MXFP4Linear(
        IN,
        OUT,
        kernel_metadata={"out_sharding": ("in",), "eager_sharding": False, "role": "up"},
        bias_metadata={"out_sharding": ("out",), "eager_sharding": False},
        rngs=nnx.Rngs(0),
    )
    assert layer.kernel.get_metadata("out_sharding") == (None, "in")
    assert layer.kernel.role == "up"
    assert layer.bias is not None
    assert layer.bias.get_metadata("out_sharding") == ("out",)


def test_bfloat16_is_rounded_once() -> None:
    layer = MXFP4Linear.from_linear(dense_linear(use_bias=False))
    x = random_input(5, IN, dtype=jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.float32  # as the kernel was float32
    layer.dtype = jnp.bfloat16
    kernel = np.asarray(layer.kernel[...].dequantize(jnp.float32))
    expected = np.asarray(x, np.float64) @ kernel.T.astype(np.float64)
    magnitudes = np.abs(np.asarray(x, np.float64)) @ np.abs(kernel.T.astype(np.float64))
    bound = IN * np.finfo(np.float32).eps * magnitudes + 2.0**-8 * np.abs(expected)
    assert np.all(np.abs(np.asarray(layer(x), np.float64) - expected) <= bound * 1.01)
