"""Training around frozen codes: gradients, optimizers and adapters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tensorport.nnx import MXFP4MLP, MXFP4Embed, MXFP4Linear, MXFP4MoE, MXFP4Param, quantize_model

WIDTH, WIDE = 64, 96


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def codes(model: nnx.Module) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model, MXFP4Param))]


def loss(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    error: jax.Array = model(x) - y
    return jnp.mean(jnp.square(error))


def train(model: nnx.Module, wrt: Any, x: jax.Array, y: jax.Array, steps: int = 60) -> list[float]:
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer[nnx.Module]) -> jax.Array:
        value: jax.Array
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model, x, y)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_gradients_are_those_of_the_decoded_layer() -> None:
    layer = MXFP4Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))
    dense = nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))
    dense.kernel.set_value(layer.kernel[...].dequantize(jnp.float32).T)
    x, y = random(7, WIDTH), random(7, WIDE, seed=1)
    found, expected = nnx.grad(loss)(layer, x, y), nnx.grad(loss)(dense, x, y)
    assert set(found) == {"bias"}
    np.testing.assert_allclose(found["bias"][...], expected["bias"][...], rtol=1e-4, atol=1e-6)
    by_layer, by_dense = (nnx.grad(loss, argnums=1)(model, x, y) for model in (layer, dense))
    np.testing.assert_allclose(by_layer, by_dense, rtol=1e-4, atol=1e-6)


def test_gradients_of_experts_reach_input_router_and_biases() -> None:
    layer = MXFP4MoE(WIDTH, WIDE, 5, 3, rngs=nnx.Rngs(0))
    x, y = random(7, WIDTH), random(7, WIDTH, seed=1)
    gradients = nnx.grad(loss)(layer, x, y)
    assert isinstance(gradients, nnx.State)
    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
    assert set(flat) == {"router.kernel", "router.bias", "gate_up_bias", "down_bias"}
    for name, gradient in flat.items():
        assert jnp.isfinite(gradient).all()
        assert jnp.any(gradient != 0), name
    assert jnp.all(jnp.any(nnx.grad(loss, argnums=1)(layer, x, y) != 0, axis=-1))


@pytest.mark.parametrize("name", ["router.kernel", "router.bias", "gate_up_bias", "down_bias", "x"])
def test_gradients_of_experts_are_slopes(name: str) -> None:
    layer = MXFP4MoE(WIDTH, WIDE, 5, 3, rngs=nnx.Rngs(0))
    x, y = random(7, WIDTH), random(7, WIDTH, seed=1)
    values = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    *branches, last = name.split(".")

    def value(t: float, direction: jax.Array) -> float:
        if name == "x":
            return float(loss(layer, x + t * direction, y))
        changed = jax.tree.map(lambda leaf: leaf, values)
        branch = changed
        for key in branches:
            branch = branch[key]
        branch[last] = branch[last] + t * direction
        other = nnx.clone(layer)
        nnx.update(other, changed)
        return float(loss(other, x, y))

    if name == "x":
        gradient = nnx.grad(loss, argnums=1)(layer, x, y)
    else:
        gradient = nnx.to_pure_dict(nnx.grad(loss)(layer, x, y))
        for key in (*branches, last):
            gradient = gradient[key]
    direction = gradient / jnp.linalg.norm(gradient)
    step = 1e-2
    slope = (value(step, direction) - value(-step, direction)) / (2 * step)
    # Central differences in float32: an error of the order of step ** 2 and of eps / step.
    np.testing.assert_allclose(slope, float(jnp.linalg.norm(gradient)), rtol=2e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MXFP4Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)),
        lambda: MXFP4MLP(WIDTH, WIDE, use_bias=True, rngs=nnx.Rngs(0)),
        lambda: MXFP4MoE(WIDTH, WIDE, 5, 3, rngs=nnx.Rngs(0)),
    ],
    ids=["linear", "mlp", "moe"],
)
def test_an_optimizer_trains_params_and_leaves_codes(make: Any) -> None:
    model = make()
    before, biases = codes(model), jax.tree.leaves(nnx.state(model, nnx.Param))
    x = random(16, WIDTH)
    losses = train(model, nnx.Param, x, model(x) + random(WIDTH, seed=2)[None])
    assert losses[-1] < 0.5 * losses[0]
    assert codes(model) == before
    after = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(bool(jnp.any(new != old)) for new, old in zip(after, biases, strict=True))


def test_an_adapter_over_a_frozen_layer_is_trained_alone() -> None:
    base = MXFP4Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))
    model = nnx.LoRA(WIDTH, 4, WIDE, base_module=base, rngs=nnx.Rngs(1))
    x = random(32, WIDTH)
    np.testing.assert_array_equal(model(x), base(x))
    before, bias = codes(model), np.asarray(base.bias[...]) if base.bias is not None else None
    shift = 0.1 * random(WIDTH, 4, seed=2) @ random(4, WIDE, seed=3)
    losses = train(model, nnx.LoRAParam, x, base(x) + x @ shift, steps=150)
    assert losses[-1] < 0.1 * losses[0]
    assert codes(model) == before
    assert base.bias is not None
    np.testing.assert_array_equal(base.bias[...], bias)


def test_a_quantized_model_is_trained_by_adapters() -> None:
    class Network(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])

        def __call__(self, ids: jax.Array) -> jax.Array:
            x = self.embed(ids)
            for layer in self.layers:
                x = nnx.tanh(layer(x))
            return self.embed.attend(x)

    model: Any = Network(rngs=nnx.Rngs(0))
    quantize_model(model, "")
    rngs = nnx.Rngs(1)
    for index, layer in enumerate(model.layers):
        model.layers[index] = nnx.LoRA(WIDTH, 8, WIDTH, base_module=layer, rngs=rngs)
    before = codes(model)
    ids = jnp.arange(11)
    losses = train(model, nnx.LoRAParam, ids, jax.nn.one_hot((ids + 1) % 11, 11), steps=150)
    assert losses[-1] < 0.2 * losses[0]
    assert codes(model) == before
    assert isinstance(model.embed, MXFP4Embed)
