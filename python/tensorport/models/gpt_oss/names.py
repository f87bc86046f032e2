"""Names and shapes of parameters: those of Hugging Face, and how `original/` has them."""

import re
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tensorport.models.gpt_oss.config import Config
from tensorport.mxfp4.types import MX_BLOCK_BYTES, MX_BLOCK_SIZE, MXFP4Array
from tensorport.trees import nested_dict

__all__ = ["ExpertLayout", "experts_are_transposed", "original_names", "original_parts", "parameter_shapes"]


ExpertLayout: TypeAlias = Literal["mxfp4", "dense", "transposed"]
"""How the matrices of experts are stored: MXFP4 or dense [out, in], or dense [in, out] as transformers saves them."""


def parameter_shapes(config: Config, dtype: DTypeLike, experts_are: ExpertLayout = "mxfp4") -> dict[str, Any]:
    """Every parameter, as nested dicts of ShapeDtypeStructs: what `load_params` is to make of a checkpoint.

    Args:
        config: of the model.
        dtype: of all but MXFP4.
        experts_are: how the matrices of experts are stored.
    """
    hidden, inter, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))

    def dense(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def matrices(rows: int, columns: int) -> Any:
        if experts_are != "mxfp4":
            return dense(experts, rows, columns) if experts_are == "dense" else dense(experts, columns, rows)
        groups = columns // MX_BLOCK_SIZE
        shapes = (experts, rows, groups, MX_BLOCK_BYTES), (experts, rows, groups)
        return MXFP4Array(*(jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.uint8)) for shape in shapes))

    shapes = {"model.embed_tokens.weight": dense(config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": dense(hidden),
                "self_attn.q_proj.weight": dense(queries, hidden),
                "self_attn.q_proj.bias": dense(queries),
                "self_attn.k_proj.weight": dense(keys, hidden),
                "self_attn.k_proj.bias": dense(keys),
                "self_attn.v_proj.weight": dense(keys, hidden),
                "self_attn.v_proj.bias": dense(keys),
                "self_attn.sinks": dense(config.num_attention_heads),
                "self_attn.o_proj.weight": dense(hidden, queries),
                "self_attn.o_proj.bias": dense(hidden),
                "post_attention_layernorm.weight": dense(hidden),
                "mlp.router.weight": dense(experts, hidden),
                "mlp.router.bias": dense(experts),
                "mlp.experts.gate_up_proj": matrices(2 * inter, hidden),
                "mlp.experts.gate_up_proj_bias": dense(experts, 2 * inter),
                "mlp.experts.down_proj": matrices(hidden, inter),
                "mlp.experts.down_proj_bias": dense(experts, hidden),
            }.items()
        }
    shapes |= {"model.norm.weight": dense(hidden), "lm_head.weight": dense(config.vocab_size, hidden)}
    return nested_dict(list(shapes), list(shapes.values()))


def experts_are_transposed(config: Config, gate_up_shape: tuple[int, ...]) -> bool:
    """Whether dense matrices of experts are [in, out]: the shape of gate and up says so, unless it is square."""
    hidden, width = config.hidden_size, 2 * config.intermediate_size
    return hidden != width and gate_up_shape[1:] == (hidden, width)


def original_parts(config: Config) -> dict[str, dict[str, int]]:
    """The parts of the projections that `original/` stores as one, under names that :func:`original_names` knows."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    rows = {"q": queries, "k": keys, "v": keys}
    return {
        f"block.{layer}.attn.qkv.{kind}": {
            f"block.{layer}.attn.{name}_proj.{kind}": count for name, count in rows.items()
        }
        for layer in range(config.num_hidden_layers)
        for kind in ("weight", "bias")
    }


def original_names(name: str) -> str:
    """The name of Hugging Face for one of `original/`; others stay as they are, and then fit nothing."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"block\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _BELOW_LAYER:
        return name
    return f"model.layers.{match[1]}.{_BELOW_LAYER[match[2]]}"


_TOP: Final[Mapping[str, str]] = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}

_BELOW_LAYER: Final[Mapping[str, str]] = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.q_proj.bias": "self_attn.q_proj.bias",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.k_proj.bias": "self_attn.k_proj.bias",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.v_proj.bias": "self_attn.v_proj.bias",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight": "mlp.experts.gate_up_proj",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight": "mlp.experts.down_proj",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
"""Names below a layer, and the projections' parts."""
