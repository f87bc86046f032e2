"""Quantization-aware training: weights that know that they will be MXFP4.

    pip install 'tensorport[jax]' optax safetensors
    python qat_mxfp4.py                                  # some 20 seconds on a CPU

A small network learns a picture: from coordinates to brightness. It is trained twice from the same start on the same
data, once as usual and once with `mxfp4.fake_quantize` on its weights: the forward pass then sees the values that MXFP4
can hold, and the gradient goes to the float weights behind them as if nothing had been rounded (a straight-through
estimator). Both networks are quantized in the end. The first loses much of what it learned; the second was trained for
what it becomes.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorport
from safetensors.numpy import save_file
from tensorport import mxfp4

Params: TypeAlias = dict[str, Any]
Matmul: TypeAlias = Callable[[jax.Array, Any], jax.Array]


def float_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product x [..., in] . w [out, in] -> [..., out]: it contracts the last axis, along which blocks run."""
    return x @ w.T


def fake_quantized_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same with the values that w has after quantization; gradients go to w itself."""
    return x @ mxfp4.fake_quantize(w).T


def network(params: Params, points: jax.Array, matmul: Matmul) -> jax.Array:
    """Brightness at points [N, 2] of the plane."""
    # Sines and cosines of learned frequencies; two rows and one, here and below, are not worth quantizing.
    phases = points @ params["frequencies"]
    x = jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)
    for layer in params["hidden"]:
        x = jax.nn.silu(matmul(x, layer["weight"]) + layer["bias"])
    brightness: jax.Array = x @ params["out"]
    return brightness


def picture(points: jax.Array) -> jax.Array:
    """What there is to learn: rings that get finer, with a soft edge."""
    radius = jnp.sqrt(jnp.sum(points**2, axis=-1))
    return jnp.sin(12 * radius**2) * jax.nn.sigmoid(6 * (points[:, 0] + 0.5 * jnp.sin(4 * points[:, 1])))


def new_network(width: int, depth: int, key: jax.Array) -> Params:
    """Random weights; `width` is a multiple of 32, the MXFP4 block."""
    frequency_key, out_key, *keys = jax.random.split(key, 2 + depth)
    hidden = [
        {"weight": jax.random.normal(key, (width, width)) * (2 / width) ** 0.5, "bias": jnp.zeros(width)}
        for key in keys
    ]
    return {
        "frequencies": 4 * jax.random.normal(frequency_key, (2, width // 2)),
        "hidden": hidden,
        "out": jax.random.normal(out_key, (width,)) * width**-0.5,
    }


def mean_squared_error(params: Params, points: jax.Array, matmul: Matmul) -> jax.Array:
    """The loss, and the figure that tells the networks apart."""
    return jnp.mean((network(params, points, matmul) - picture(points)) ** 2)


def train(
    params: Params, matmul: Matmul, *, steps: int, batch: int, learning_rate: float, key: jax.Array
) -> tuple[Params, list[float]]:
    """Adam on random points; returns the weights and the loss of every step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(params: Params, state: Any, key: jax.Array) -> Any:
        points = jax.random.uniform(key, (batch, 2), minval=-1, maxval=1)
        loss, gradients = jax.value_and_grad(mean_squared_error)(params, points, matmul)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for step_key in jax.random.split(key, steps):
        params, state, loss = step(params, state, step_key)
        losses.append(float(loss))
    return params, losses


def export(params: Params, file: Path) -> None:
    """Writes a safetensors file in which each MXFP4Array is a pair `X_blocks` and `X_scales`, as gpt-oss has them."""
    tensors: dict[str, np.ndarray[Any, Any]] = {"out": np.asarray(params["out"])}
    tensors["frequencies"] = np.asarray(params["frequencies"])
    for number, layer in enumerate(params["hidden"]):
        tensors[f"hidden.{number}.weight_blocks"] = np.asarray(layer["weight"].blocks)
        tensors[f"hidden.{number}.weight_scales"] = np.asarray(layer["weight"].scales)
        tensors[f"hidden.{number}.bias"] = np.asarray(layer["bias"])
    save_file(tensors, file)


def load(file: Path) -> Params:
    """Reads it back: pairs are MXFP4Arrays again."""
    params: Params = tensorport.load_params(file)
    params["hidden"] = [params["hidden"][str(i)] for i in range(len(params["hidden"]))]
    return params


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains both networks, quantizes both, and returns their errors."""
    parser = argparse.ArgumentParser(description="quantization-aware training for MXFP4")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a .safetensors file for the second network; none by default")
    options = parser.parse_args(arguments)

    start_key, train_key, test_key = jax.random.split(jax.random.key(options.seed), 3)
    start = new_network(options.width, options.depth, start_key)
    points = jax.random.uniform(test_key, (4096, 2), minval=-1, maxval=1)  # none of those trained on

    errors = {}
    print("mean squared error          while training    as MXFP4")
    for name, label, matmul in (
        ("usual", "trained as usual", float_matmul),
        ("aware", "trained for MXFP4", fake_quantized_matmul),
    ):
        schedule = {"steps": options.steps, "batch": options.batch, "learning_rate": options.learning_rate}
        trained, losses = train(start, matmul, **schedule, key=train_key)
        quantized, report = mxfp4.quantize_params(trained, r"hidden.*weight")
        errors[f"{name}_first_loss"] = losses[0]
        errors[f"{name}_while_training"] = float(mean_squared_error(trained, points, matmul))
        errors[f"{name}_mxfp4"] = float(mean_squared_error(quantized, points, mxfp4.matmul))
        print(f"{label:26}  {errors[f'{name}_while_training']:14.6f}  {errors[f'{name}_mxfp4']:10.6f}")
    # What training saw is what came out: the same weights bit for bit, and outputs but for the order of sums.
    for layer, codes in zip(trained["hidden"], quantized["hidden"], strict=True):
        assert jnp.array_equal(mxfp4.fake_quantize(layer["weight"]), codes["weight"].dequantize(jnp.float32))
    seen = network(trained, points, fake_quantized_matmul)
    assert jnp.allclose(network(quantized, points, mxfp4.matmul), seen, atol=1e-4)
    print(report)

    with tempfile.TemporaryDirectory() as folder:
        file = options.output or Path(folder) / "network.safetensors"
        export(quantized, file)
        assert jnp.allclose(network(load(file), points, mxfp4.matmul), seen, atol=1e-4)
        print(f"exported and loaded again: {file.stat().st_size:,} bytes")
    return errors


if __name__ == "__main__":
    main()
