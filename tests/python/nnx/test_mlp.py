"""MXFP4MLP: the gated layer of Llama."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from flax import nnx
from tensorport import mxfp4
from tensorport.nnx import MXFP4MLP, MXFP4Linear

HIDDEN, INTERMEDIATE = 64, 160


def random_weight(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear(in_features: int, out_features: int, seed: int, *, use_bias: bool = True) -> nnx.Linear:
    bias_init = nnx.initializers.normal(1.0)
    return nnx.Linear(in_features, out_features, use_bias=use_bias, bias_init=bias_init, rngs=nnx.Rngs(seed))


def values(layer: MXFP4Linear) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    bias = np.zeros(layer.out_features) if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    return np.asarray(layer.kernel[...].dequantize(jnp.float32), np.float64), bias


ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], Callable[[Any], Any]]] = {
    "silu": (nnx.silu, lambda x: x / (1 + np.exp(-x))),
    "relu": (nnx.relu, lambda x: np.maximum(x, 0)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_it_is_down_of_activated_gate_times_up(activation: str, use_bias: bool, shape: tuple[int, ...]) -> None:
    traced, plain = ACTIVATIONS[activation]
    layer = MXFP4MLP(
        HIDDEN,
        INTERMEDIATE,
        activation=traced,
        use_bias=use_bias,
        bias_init=nnx.initializers.normal(1.0),
        rngs=nnx.Rngs(0),
    )
    x = random_weight(*shape, HIDDEN, seed=5)
    (gate, gate_bias), (up, up_bias), (down, down_bias) = map(values, (layer.gate, layer.up, layer.down))
    expected = (plain(x @ gate.T + gate_bias) * (x @ up.T + up_bias)) @ down.T + down_bias
    found = layer(x)
    assert found.shape == (*shape, HIDDEN)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_layers_have_keys_of_their_own() -> None:
    layer = MXFP4MLP(HIDDEN, INTERMEDIATE, rngs=nnx.Rngs(0))
    assert np.any(np.asarray(layer.gate.kernel[...].blocks) != np.asarray(layer.up.kernel[...].blocks))
    assert layer.gate.bias is layer.up.bias is layer.down.bias is None


def test_from_linears_quantizes_dense_layers() -> None:
    dense = linear(HIDDEN, INTERMEDIATE, 1), linear(HIDDEN, INTERMEDIATE, 2), linear(INTERMEDIATE, HIDDEN, 3)
    layer = MXFP4MLP.from_linears(*dense, activation=nnx.gelu, scale_rule="ceil", implementation="xla")
    assert layer.activation is nnx.gelu
    for found, source in zip((layer.gate, layer.up, layer.down), dense, strict=True):
        expected = mxfp4.quantize(source.kernel[...].T, scale_rule="ceil")
        np.testing.assert_array_equal(found.kernel[...].blocks, expected.blocks)
        assert found.bias is source.bias
        assert found.implementation == "xla"


def test_from_linears_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="down: found a layer from 160 to 96, expected 160 to 64"):
        MXFP4MLP.from_linears(
            linear(HIDDEN, INTERMEDIATE, 1), linear(HIDDEN, INTERMEDIATE, 2), linear(INTERMEDIATE, 96, 3)
        )
    with pytest.raises(ValueError, match="up: found a layer from 64 to 96, expected 64 to 160"):
        MXFP4MLP.from_linears(linear(HIDDEN, INTERMEDIATE, 1), linear(HIDDEN, 96, 2), linear(INTERMEDIATE, HIDDEN, 3))


def params(*, use_bias: bool = False) -> dict[str, Any]:
    shapes = {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    tree: dict[str, Any] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        tree[name] = {"weight": mxfp4.quantize(random_weight(*shape, seed=seed))}
        if use_bias:
            tree[name]["bias"] = random_weight(shape[0], seed=seed + 10)
    return tree


@pytest.mark.parametrize("use_bias", [True, False])
def test_from_params_takes_a_layer_of_a_checkpoint(use_bias: bool) -> None:
    tree = params(use_bias=use_bias)
    layer = MXFP4MLP.from_params(tree, dtype=jnp.bfloat16)
    assert layer.gate.kernel[...].blocks is tree["gate_proj"]["weight"].blocks
    assert layer.down.kernel[...].blocks is tree["down_proj"]["weight"].blocks
    assert (layer.up.bias is not None) == use_bias
    x = random_weight(3, HIDDEN, seed=9)
    assert layer(x).dtype == jnp.bfloat16
    dense = {name: {**tensors, "weight": jnp.asarray(tensors["weight"].dequantize())} for name, tensors in tree.items()}
    again = MXFP4MLP.from_params(dense, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(again(x), layer(x))


def test_from_params_names_all_that_does_not_fit() -> None:
    tree = params()
    tree["gate_proj"] = {"kernel": tree["gate_proj"]["weight"]}
    tree["down_proj"]["weight"] = tree["down_proj"]["weight"][:32]
    with pytest.raises(tensorport.MappingError) as caught:
        MXFP4MLP.from_params(tree)
    for part in (
        "3 tensors do not fit the layer (with I = 160, H = 64)",
        "gate_proj.weight: found no such tensor, expected [I, H]",
        "gate_proj.kernel: found, expected no such tensor",
        "down_proj.weight: found shape [32, 160], expected [H, I]",
    ):
        assert part in str(caught.value)
