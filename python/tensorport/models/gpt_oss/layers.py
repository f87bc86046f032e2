"""The forward pass layer by layer, for those who look into it; each layer is compiled on its own and then let go of."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tensorport.kernels.registry import ImplementationName
from tensorport.models.gpt_oss.config import Config, LayerType
from tensorport.models.gpt_oss.experts import route
from tensorport.models.gpt_oss.model import add_attention, add_experts, embed, rms_norm, rotary_table

__all__ = ["LayerOutput", "layer_outputs"]


class LayerOutput(NamedTuple):
    """What comes out of a part of the model.

    Attributes:
        name: `embeddings`, `layer 0`, `layer 1` and so on, `final norm`.
        stream: [B, T, H].
        experts: [B, T, K], those that each token went through; None where there are none.
        num_experts: those that there are.
    """

    name: str
    stream: Float[Array, "b t h"]
    experts: Int32[Array, "b t k"] | None = None
    num_experts: int = 0


def layer_outputs(
    params: Any, config: Config, tokens: Int32[Array, "b t"], *, implementation: ImplementationName
) -> Iterator[LayerOutput]:
    """The stream after the embeddings, after each layer, and after the last norm, from which logits are made.

    On one device, without a cache. Holds the activations of one layer at a time; compiles once for each kind of layer.
    """
    x = _embed({"model": {"embed_tokens": params["model"]["embed_tokens"]}}, tokens)
    yield LayerOutput("embeddings", x)
    for index, kind in enumerate(config.layer_types):
        x, experts = _layer(params["model"]["layers"][str(index)], config, kind, x, implementation)
        yield LayerOutput(f"layer {index}", x, experts, config.num_local_experts)
    yield LayerOutput("final norm", _final_norm(x, params["model"]["norm"]["weight"], config))


_embed = jax.jit(embed)


@partial(jax.jit, static_argnames=("config", "kind", "implementation"))
def _layer(
    layer: Any, config: Config, kind: LayerType, x: Float[Array, "b t h"], implementation: ImplementationName
) -> tuple[Float[Array, "b t h"], Int32[Array, "b t k"]]:
    batch, tokens, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    lengths = jnp.full(batch, tokens, jnp.int32)
    rope = rotary_table(config.rope, config.head_dim, positions)
    x, _ = add_attention(layer, config, kind, x, rope, positions, lengths, None, implementation=implementation)
    # As add_experts does, which keeps its choice to itself.
    normed = rms_norm(x, layer["post_attention_layernorm"]["weight"], config.rms_norm_eps)
    experts, _ = route(layer["mlp"]["router"], config, normed, implementation)
    return add_experts(layer, config, x, positions, mesh=None, implementation=implementation), experts


@partial(jax.jit, static_argnames="config")
def _final_norm(x: Float[Array, "b t h"], scale: Float[Array, " h"], config: Config) -> Float[Array, "b t h"]:
    return rms_norm(x, scale, config.rms_norm_eps)
