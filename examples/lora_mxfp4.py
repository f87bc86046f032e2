"""LoRA on a checkpoint whose experts stay in MXFP4.

    pip install 'tensorport[jax]' optax
    python lora_mxfp4.py                                # a random gpt-oss of 1 MB, under half a minute on a CPU
    python lora_mxfp4.py --checkpoint gpt-oss-tiny      # one of your own

The experts of gpt-oss are the bulk of its weights, and have 4 bits per value. They are loaded as `MXFP4Array`s and
never change: no dense copy of them is made, neither for the products nor for the gradients. What is trained are
adapters of low rank beside each expert's matrices: W x becomes W x + B A x.

The task is a cipher: each token is to be followed by another one, as a permutation of the vocabulary says. A next token
that depends on the last one alone needs no attention, so this model leaves it out: embedding, experts of all layers,
head.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
import tensorport
from tensorport import mxfp4

Params: TypeAlias = dict[str, Any]
Config: TypeAlias = dict[str, Any]


def load(checkpoint: Path, num_layers: int | None) -> tuple[Params, Config]:
    """What this model needs of a gpt-oss checkpoint: dense weights in float32, experts as MXFP4Arrays; its config."""
    config = json.loads((checkpoint / "config.json").read_text())
    params = tensorport.load_params(checkpoint, dtype="float32", exclude="*.self_attn.*")
    model = params["model"]
    layers = [model["layers"][str(i)] for i in range(len(model["layers"]))][:num_layers]
    frozen = {
        "embedding": model["embed_tokens"]["weight"],
        "layers": layers,
        "norm": model["norm"]["weight"],
        "head": params["lm_head"]["weight"],
    }
    return frozen, config


def new_adapters(frozen: Params, rank: int, key: jax.Array) -> list[Params]:
    """A of normal values and B of zeros for both matrices [experts, out, in] of every layer: they add nothing yet."""

    def pair(key: jax.Array, w: mxfp4.MXFP4Array) -> Params:
        experts, rows, columns = w.shape
        a = jax.random.normal(key, (experts, rank, columns)) * columns**-0.5
        return {"a": a, "b": jnp.zeros((experts, rows, rank))}

    adapters = []
    for layer, layer_key in zip(frozen["layers"], jax.random.split(key, len(frozen["layers"])), strict=True):
        experts, keys = layer["mlp"]["experts"], jax.random.split(layer_key)
        names = ("gate_up_proj", "down_proj")
        adapters.append({name: pair(key, experts[name]) for name, key in zip(names, keys, strict=True)})
    return adapters


def adapted_matmul(x: jax.Array, w: mxfp4.MXFP4Array, adapter: Params, expert_ids: jax.Array) -> jax.Array:
    """(W + B A) x with the matrices of each row's expert: x [T, in] -> [T, out].

    The gradient passes through W to x, and stops at its codes. A and B are gathered, a copy for each row: for thousands
    of tokens sort the rows by expert and take `jax.lax.ragged_dot`.
    """
    low = jnp.einsum("tk,trk->tr", x, adapter["a"][expert_ids])
    return mxfp4.expert_matmul(x, w, expert_ids) + jnp.einsum("tr,tnr->tn", low, adapter["b"][expert_ids])


def route(x: jax.Array, router: Params, config: Config) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights."""
    logits, indices = jax.lax.top_k(x @ router["weight"].T + router["bias"], config["num_experts_per_tok"])
    return indices, jax.nn.softmax(logits)


def plain_experts(x: jax.Array, mlp: Params, config: Config) -> jax.Array:
    """The mixture of experts as the checkpoint has it."""
    experts = mlp["experts"]
    return mxfp4.moe(
        x,
        *route(x, mlp["router"], config),
        experts["gate_up_proj"],
        experts["gate_up_proj_bias"],
        experts["down_proj"],
        experts["down_proj_bias"],
        limit=config["swiglu_limit"],
    )


def adapted_experts(x: jax.Array, mlp: Params, config: Config, adapter: Params) -> jax.Array:
    """The same with adapters. They act between the two products of mxfp4.moe, so that it is written out here."""
    experts, limit = mlp["experts"], config["swiglu_limit"]
    indices, weights = route(x, mlp["router"], config)
    expert_ids = indices.reshape(-1)
    pairs = jnp.repeat(x, indices.shape[1], axis=0)  # a row for every token and expert of it
    h = adapted_matmul(pairs, experts["gate_up_proj"], adapter["gate_up_proj"], expert_ids)
    h += experts["gate_up_proj_bias"][expert_ids]
    gate, up = jnp.minimum(h[:, 0::2], limit), jnp.clip(h[:, 1::2], -limit, limit)
    a = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    y = adapted_matmul(a, experts["down_proj"], adapter["down_proj"], expert_ids)
    y += experts["down_proj_bias"][expert_ids]
    return jnp.einsum("tkh,tk->th", y.reshape(*indices.shape, -1), weights)


def forward(adapters: list[Params] | None, frozen: Params, config: Config, tokens: jax.Array) -> jax.Array:
    """Logits of the next token: tokens [T] -> [T, vocabulary]. Without adapters, those of the checkpoint."""

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * weight

    x = frozen["embedding"][tokens]
    for i, layer in enumerate(frozen["layers"]):
        normed = norm(x, layer["post_attention_layernorm"]["weight"])
        if adapters is None:
            x += plain_experts(normed, layer["mlp"], config)
        else:
            x += adapted_experts(normed, layer["mlp"], config, adapters[i])
    logits: jax.Array = norm(x, frozen["norm"]) @ frozen["head"].T
    return logits


def loss_and_accuracy(
    adapters: list[Params], frozen: Params, config: Config, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss to differentiate, and what people read."""
    logits = forward(adapters, frozen, config, tokens)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == targets)


def train(
    adapters: list[Params],
    frozen: Params,
    config: Config,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    steps: int,
    learning_rate: float,
) -> tuple[list[Params], list[float]]:
    """Adam on the adapters alone; returns them and the loss of every step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    state = optimizer.init(adapters)  # moments of the adapters: none of the frozen weights

    # `frozen` is an argument like any other: value_and_grad differentiates the first one alone. Were it a variable from
    # outside, jit would write all weights into the compiled program as constants.
    @jax.jit
    def step(adapters: list[Params], state: Any, frozen: Params) -> Any:
        loss_and_gradients = jax.value_and_grad(loss_and_accuracy, has_aux=True)
        (loss, accuracy), gradients = loss_and_gradients(adapters, frozen, config, tokens, targets)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, loss, accuracy

    losses = []
    for number in range(steps):
        adapters, state, loss, accuracy = step(adapters, state, frozen)
        losses.append(float(loss))
        if number % max(1, steps // 8) == 0 or number == steps - 1:
            print(f"step {number:4}  loss {loss:7.4f}  accuracy {accuracy:6.1%}")
    return adapters, losses


def print_memory(frozen: Params, adapters: list[Params]) -> None:
    """Bytes of what is frozen and of what is trained."""
    experts = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_mxfp4) if is_mxfp4(leaf)]
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    print(f"experts in MXFP4, frozen    {sum(w.nbytes for w in experts):>12,} bytes")
    print(f"experts if they were bf16   {sum(w.size * 2 for w in experts):>12,} bytes")
    print(f"adapters, float32           {trained:>12,} bytes, and twice as many for Adam's moments")


def is_mxfp4(node: object) -> bool:
    """For pytree functions that shall see an MXFP4Array whole."""
    return isinstance(node, mxfp4.MXFP4Array)


def code_bytes(frozen: Params) -> list[bytes]:
    """Codes and scales, to compare."""
    return [leaf.tobytes() for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.uint8]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains adapters and returns the losses."""
    parser = argparse.ArgumentParser(description="LoRA on frozen MXFP4 experts")
    parser.add_argument("--checkpoint", type=Path, help="a gpt-oss checkpoint; a random one by default")
    parser.add_argument("--layers", type=int, help="how many of its layers to use; all by default")
    parser.add_argument("--tokens", type=int, default=512, help="how many tokens the cipher changes")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or tensorport.synthesize(Path(folder) / "tiny", "tiny", progress=False)
        frozen, config = load(checkpoint, options.layers)
        adapter_key, cipher_key = jax.random.split(jax.random.key(options.seed))
        adapters = new_adapters(frozen, options.rank, adapter_key)
        print_memory(frozen, adapters)

        tokens = jnp.arange(min(options.tokens, config["vocab_size"]))
        targets = jax.random.permutation(cipher_key, tokens)
        # Adapters that add nothing change nothing: the model begins as the checkpoint has it.
        before = forward(None, frozen, config, tokens)
        assert jnp.allclose(forward(adapters, frozen, config, tokens), before, atol=1e-3)

        codes = code_bytes(frozen)
        schedule = {"steps": options.steps, "learning_rate": options.learning_rate}
        adapters, losses = train(adapters, frozen, config, tokens, targets, **schedule)
        assert code_bytes(frozen) == codes
        print("codes and scales: as they were, byte for byte")
        return losses


if __name__ == "__main__":
    main()
