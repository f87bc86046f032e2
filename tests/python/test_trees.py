"""Targets: trees of other libraries whose names, shapes and dtypes the checkpoint must fit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorport
from arrays import random_array
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tensorport import _core
from tensorport.mxfp4 import MXFP4Array


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(4)
    return {
        "layers.0.weight": random_array((4, 3), np.float32, 1),
        "layers.0.bias": random_array((4,), np.float32, 2),
        "layers.1.weight": random_array((2, 4), ml_dtypes.bfloat16, 3),
        "w_blocks": rng.integers(0, 256, (5, 2, 16), np.uint8),
        "w_scales": rng.integers(100, 140, (5, 2), np.uint8),
    }


@pytest.fixture
def source(tmp_path: Path, write_safetensors: Callable[..., Path]) -> Path:
    return write_safetensors(tmp_path / "m.safetensors", tensors())


def struct(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


class Layer(NamedTuple):
    """A node whose children have names of attributes."""

    weight: Any
    bias: Any = None


def target() -> dict[str, Any]:
    return {
        "layers": [Layer(struct((4, 3), jnp.float32), struct((4,), jnp.float32)), Layer(struct((2, 4), jnp.bfloat16))],
        "w": MXFP4Array(struct((5, 2, 16), jnp.uint8), struct((5, 2), jnp.uint8)),
        "activation": jax.nn.relu,
        "rate": 0.5,
    }


def test_a_target_gets_its_own_structure_back(source: Path) -> None:
    filled = tensorport.load_params(source, target=target())
    assert isinstance(filled["layers"][0], Layer)
    assert (filled["activation"], filled["rate"]) == (jax.nn.relu, 0.5)
    for index, layer in enumerate(filled["layers"]):
        assert np.array_equal(layer.weight, tensors()[f"layers.{index}.weight"])
    assert np.array_equal(filled["layers"][0].bias, tensors()["layers.0.bias"])
    assert filled["layers"][1].bias is None
    assert isinstance(filled["w"], MXFP4Array)
    assert np.array_equal(filled["w"].blocks, tensors()["w_blocks"])
    shapes = tensorport.load_params_shapes(source, target=target())
    assert shapes["layers"][1].weight.dtype == jnp.bfloat16


def test_all_mismatches_are_told_at_once_and_nothing_is_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = target()
    wrong["layers"][0] = Layer(struct((3, 4), jnp.float32), struct((4,), jnp.float16))
    wrong["w"] = struct((5, 64), jnp.bfloat16)
    wrong["head"] = struct((7,), jnp.float32)
    wrong["layers"][1] = Layer(None)

    def refuse(*_: object) -> None:
        raise AssertionError("something was read")

    class Unread:
        """A checkpoint that opens and cannot be read."""

        read = view = refuse

        def __init__(self, core: Any) -> None:
            self._core = core

        def __getattr__(self, name: str) -> Any:
            return getattr(self._core, name)

    core = _core.Checkpoint
    monkeypatch.setattr(_core, "Checkpoint", lambda path: Unread(core(path)))
    with pytest.raises(tensorport.MappingError) as caught:
        tensorport.load_params(source, target=wrong)
    assert str(caught.value).splitlines() == [
        "5 mismatches with the target:",
        "  head: found no such tensor, expected float32 [7]",
        "  layers.0.weight: found float32 [4, 3], expected float32 [3, 4]",
        "  layers.0.bias: found float32 [4], expected float16 [4]",
        "  w: found MXFP4 [5, 64], expected bfloat16 [5, 64]",
        "  layers.1.weight: found bfloat16 [2, 4], expected no such tensor (exclude leaves it out, rename gives it "
        "another name)",
    ]


def test_casts_and_decodes_come_before_the_comparison(source: Path) -> None:
    wanted = {
        "layers": {"0": {"weight": struct((4, 3), jnp.float16), "bias": struct((4,), jnp.float16)}},
        "w": struct((5, 64), jnp.float16),
    }
    filled = tensorport.load_params(
        source, target=wanted, dtype="float16", mxfp4="dequantize", exclude="layers.1.*", on_overflow="saturate"
    )
    assert filled["w"].dtype == filled["layers"]["0"]["bias"].dtype == jnp.float16


def test_names_of_a_target_meet_only_once(source: Path) -> None:
    twice = {"a": {"b": struct((4, 3), jnp.float32)}, "a.b": struct((4, 3), jnp.float32)}
    with pytest.raises(tensorport.MappingError, match=re.escape("several leaves named a.b")):
        tensorport.load_params(source, target=twice, include="layers.0.weight", rename={"layers.0.weight": "a.b"})


def test_shardings_of_the_target_are_kept_unless_others_are_asked_for(source: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding, third = NamedSharding(mesh, PartitionSpec("x")), SingleDeviceSharding(jax.devices()[3])
    wanted = {
        "layers": {
            "0": {"weight": struct((4, 3), jnp.float32, sharding), "bias": jnp.zeros(4, jnp.float32)},
            "1": {"weight": jax.device_put(jnp.zeros((2, 4), jnp.bfloat16), third)},
        }
    }
    filled = tensorport.load_params(source, target=wanted, exclude="w")
    assert filled["layers"]["0"]["weight"].sharding == sharding
    assert not filled["layers"]["0"]["bias"].committed
    assert filled["layers"]["1"]["weight"].devices() == {jax.devices()[3]}
    filled = tensorport.load_params(source, target=wanted, exclude="w", sharding=jax.devices()[5])
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(filled)} == {jax.devices()[5]}


def test_an_equinox_module_is_filled(source: Path) -> None:
    model = eqx.nn.MLP(3, 2, 4, 1, use_final_bias=False, dtype=jnp.float32, key=jax.random.key(0))
    filled = tensorport.load_params(source, target=model, exclude="w", dtype="float32", on_overflow="saturate")
    assert isinstance(filled, eqx.nn.MLP)
    x = jnp.array([1.0, -2.0, 3.0], jnp.float32)
    weights = tensors()
    hidden = np.maximum(weights["layers.0.weight"] @ np.asarray(x) + weights["layers.0.bias"], 0)
    np.testing.assert_allclose(filled(x), weights["layers.1.weight"].astype(np.float32) @ hidden, rtol=1e-6)
    abstract = eqx.filter_eval_shape(eqx.nn.MLP, 3, 2, 4, 1, use_final_bias=False, key=jax.random.key(0))
    again = tensorport.load_params(source, target=abstract, exclude="w", dtype="float32")
    np.testing.assert_array_equal(again(x), filled(x))


class Network(nnx.Module):
    """Kernels of NNX are [in, out], as in a checkpoint that was written for it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Two linear layers."""
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(5, 2, use_bias=False, rngs=rngs)])


def test_an_nnx_state_is_filled(tmp_path: Path, write_safetensors: Callable[..., Path]) -> None:
    weights = {
        "model.first.kernel": random_array((3, 5), np.float32, 1),
        "model.first.bias": random_array((5,), np.float32, 2),
        "model.blocks.0.kernel": random_array((5, 2), np.float32, 3),
    }
    path = write_safetensors(tmp_path / "m.safetensors", weights)
    model = Network(nnx.Rngs(0))
    rename = [(r"^model\.", "")]
    for state in (nnx.state(model, nnx.Param), nnx.state(nnx.eval_shape(lambda: Network(nnx.Rngs(0))), nnx.Param)):
        filled = tensorport.load_params(path, target=state, rename=rename)
        assert isinstance(filled, nnx.State)
        nnx.update(model, filled)
        np.testing.assert_array_equal(model.first.kernel[...], weights["model.first.kernel"])
        np.testing.assert_array_equal(model.blocks[0].kernel[...], weights["model.blocks.0.kernel"])
    with pytest.raises(tensorport.MappingError, match=re.escape("first.kernel: found no such tensor")):
        tensorport.load_params(path, target=nnx.state(model, nnx.Param))


def test_free_leaves_of_an_mxfp4_target_stay_free(source: Path) -> None:
    filled = tensorport.load_params(
        source, target=target() | {"w": MXFP4Array(jnp.zeros((5, 2, 16), jnp.uint8), jnp.zeros((5, 2), jnp.uint8))}
    )
    assert not filled["w"].blocks.committed
    device = jax.devices()[3]
    placed = jax.device_put(MXFP4Array(jnp.zeros((5, 2, 16), jnp.uint8), jnp.zeros((5, 2), jnp.uint8)), device)
    filled = tensorport.load_params(source, target=target() | {"w": placed})
    assert filled["w"].scales.committed
    assert filled["w"].scales.devices() == {device}
