"""The forward pass of gpt-oss in NumPy: plain float32, one sequence, no cache. An oracle, read from top to bottom.

Weights are read where they are used, and experts decoded only where the router chose them: gpt-oss-20b takes less than
2 GB. Mathematics and constants: openai/gpt-oss, gpt_oss/torch/model.py. Axes: t tokens, v words, e experts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Config = Mapping[str, Any]  # config.json of the Hugging Face layout
Weights = Mapping[str, NDArray[Any]]  # a tensorport.Checkpoint of that layout, or what `from_original` makes of another
Hook = Callable[[int, str, Array], Array]
"""Gets layer, name and value of each activation, and returns the value to go on with."""

# Value of each E2M1 code, OCP MX v1.0, and of each byte: two codes, low nibble first.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([E2M1[np.arange(256) % 16], E2M1[np.arange(256) // 16]], axis=-1)  # [256, 2]


def forward(weights: Weights, config: Config, input_ids: NDArray[Any], hook: Hook = lambda _, __, x: x) -> Array:
    """Logits [t, v] of the word after each of `input_ids` [t]."""
    depth, rope = config["num_hidden_layers"], yarn(config, len(input_ids))
    x = hook(-1, "stream", f32(weights["model.embed_tokens.weight"][input_ids]))  # [t, hidden]
    for index in range(depth):
        layer = Layer(index, weights, config, hook)
        normed = layer.see("attention_norm", rms_norm(x, layer["input_layernorm.weight"], config))
        x = layer.see("middle", x + attention(layer, rope, normed))
        normed = layer.see("experts_norm", rms_norm(x, layer["post_attention_layernorm.weight"], config))
        x = layer.see("stream", x + mixture_of_experts(layer, normed))
    x = hook(depth, "final_norm", rms_norm(x, weights["model.norm.weight"], config))
    # A slice of the head at a time, for it is the largest tensor: 2.3 GB in float32.
    head = weights["lm_head.weight"]
    logits = np.concatenate([x @ f32(head[start : start + 8192]).T for start in range(0, len(head), 8192)], axis=-1)
    return hook(depth, "logits", logits)


@dataclasses.dataclass(frozen=True)
class Layer:
    index: int
    weights: Weights
    config: Config
    hook: Hook

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.weights[f"model.layers.{self.index}.{name}"]

    def see(self, name: str, value: Array) -> Array:
        return self.hook(self.index, name, value)

    def linear(self, name: str, x: Array) -> Array:
        return x @ f32(self[f"{name}.weight"]).T + f32(self[f"{name}.bias"])

    def expert_linear(self, name: str, expert: int, x: Array) -> Array:
        weight = decode(self[f"{name}_blocks"][expert], self[f"{name}_scales"][expert])
        return x @ weight.T + f32(self[f"{name}_bias"][expert])


def attention(layer: Layer, rope: tuple[Array, Array], x: Array) -> Array:
    """Grouped-query attention [t, hidden]: of n key-value heads g, each serves m query heads, g * m and following."""
    config, t, n, d = layer.config, len(x), layer.config["num_key_value_heads"], layer.config["head_dim"]
    query = layer.see("query", rotate(layer.linear("self_attn.q_proj", x).reshape(t, n, -1, d), rope))
    key = layer.see("key", rotate(layer.linear("self_attn.k_proj", x).reshape(t, n, 1, d), rope))
    value = layer.see("value", layer.linear("self_attn.v_proj", x).reshape(t, n, d))
    scores = layer.see("scores", np.einsum("qgmd,kgxd->gmqk", query, key) * np.float32(d**-0.5))
    distance = np.arange(t)[:, None] - np.arange(t)  # from key to query
    visible = distance >= 0
    if config["layer_types"][layer.index] == "sliding_attention":
        visible &= distance < config["sliding_window"]  # so many keys, the query's own among them
    scores = np.where(visible, scores, -np.inf)
    # The sink is one more logit in the softmax, with no value behind it.
    sinks = f32(layer["self_attn.sinks"]).reshape(n, -1, 1, 1)
    largest = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
    shares = np.exp(scores - largest)
    shares /= shares.sum(axis=-1, keepdims=True) + np.exp(sinks - largest)
    mixed = layer.see("mixed", np.einsum("gmqk,kgd->qgmd", shares, value).reshape(t, -1))
    return layer.see("attention", layer.linear("self_attn.o_proj", mixed))


def mixture_of_experts(layer: Layer, x: Array) -> Array:
    """Outputs [t, hidden] of the chosen experts, weighted by a softmax over these alone."""
    logits = layer.see("router", layer.linear("mlp.router", x))  # [t, e]
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : layer.config["num_experts_per_tok"]]
    layer.see("chosen", f32(chosen))
    shares = np.take_along_axis(logits, chosen, axis=-1)
    shares = np.exp(shares - shares.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    limit, mixed = np.float32(layer.config["swiglu_limit"]), np.zeros_like(x)
    for expert in np.unique(chosen):
        tokens, rank = np.nonzero(chosen == expert)
        both = layer.see("gate_up", layer.expert_linear("mlp.experts.gate_up_proj", expert, x[tokens]))
        gate, up = np.minimum(both[:, ::2], limit), np.clip(both[:, 1::2], -limit, limit)
        sigmoid = np.exp(-np.logaddexp(np.float32(0), np.float32(-1.702) * gate))
        activated = layer.see("activated", gate * sigmoid * (up + 1))
        down = layer.see("down", layer.expert_linear("mlp.experts.down_proj", expert, activated))
        mixed[tokens] += shares[tokens, rank, None] * down
    return layer.see("experts", mixed)


def yarn(config: Config, tokens: int) -> tuple[Array, Array]:
    """Cosines and sines [t, d / 2] of YaRN, whose ramp gpt-oss does not truncate to whole pairs of dimensions."""
    scaling, half, theta = config["rope_scaling"], int(config["head_dim"]) // 2, float(config["rope_theta"])
    assert scaling["rope_type"] == "yarn"
    assert not scaling["truncate"]

    def pair(turns: float) -> float:
        """The pair of dimensions that makes so many turns within the context that came before the scaling."""
        return half * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(theta)

    low, high = max(pair(scaling["beta_fast"]), 0), min(pair(scaling["beta_slow"]), 2 * half - 1)
    pairs = np.arange(half)
    ramp = np.clip((pairs - low) / (high - low), 0, 1)
    frequencies = theta ** (-pairs / half) * (ramp / scaling["factor"] + (1 - ramp))
    angles = np.arange(tokens)[:, None] * frequencies
    concentration = 0.1 * math.log(scaling["factor"]) + 1
    return f32(np.cos(angles) * concentration), f32(np.sin(angles) * concentration)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates dimensions i and i + d / 2 of x [t, n, m, d] together."""
    cos, sin = (table[:, None, None] for table in rope)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: Array, scale: NDArray[Any], config: Config) -> Array:
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    return f32(x / np.sqrt(mean_square + config["rms_norm_eps"])) * f32(scale)


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> Array:
    """MXFP4 [rows, groups, 16] with scales [rows, groups] as [rows, 32 * groups]; 2 ** (scale - 127) is exact."""
    scale_f32 = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    return (PAIRS[blocks] * scale_f32[..., None, None]).reshape(len(blocks), -1)


def f32(x: NDArray[Any]) -> Array:
    return x.astype(np.float32)


def from_original(checkpoint: Weights, config: Config) -> dict[str, NDArray[Any]]:
    """Views of a checkpoint in the layout of `original/`, under the names of the Hugging Face layout."""
    top = {"embedding.weight": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
    top["unembedding.weight"] = "lm_head.weight"
    below_layer = {
        "attn.norm.scale": "input_layernorm.weight",
        "attn.sinks": "self_attn.sinks",
        "attn.out": "self_attn.o_proj",
        "mlp.norm.scale": "post_attention_layernorm.weight",
        "mlp.gate": "mlp.router",
        "mlp.mlp1_weight.": "mlp.experts.gate_up_proj_",
        "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
        "mlp.mlp2_weight.": "mlp.experts.down_proj_",
        "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
    }
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    weights = {}
    for name in checkpoint:
        if name in top:
            weights[top[name]] = checkpoint[name]
            continue
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}"
        if rest.startswith("attn.qkv."):
            parts = np.split(checkpoint[name], [queries, queries + keys])
            for which, part in zip("qkv", parts, strict=True):
                weights[f"{prefix}.self_attn.{which}_proj.{rest.removeprefix('attn.qkv.')}"] = part
        else:
            old = next(old for old in below_layer if rest.startswith(old))
            weights[f"{prefix}.{below_layer[old]}{rest.removeprefix(old)}"] = checkpoint[name]
    return weights
