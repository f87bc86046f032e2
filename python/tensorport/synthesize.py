"""Random checkpoints in real layouts: every name, shape, dtype and config field of gpt-oss, with seeded values.

Names and shapes: the checkpoints openai/gpt-oss-20b and -120b, and `original/` beside them.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from tensorport import _core
from tensorport.errors import ConversionError
from tensorport.progress import Progress, observe
from tensorport.synthetic_tokenizer import default_ids, special_ids, text_files

__all__ = ["LAYOUTS", "PRESETS", "synthesize"]

LAYOUTS: Final = ("huggingface", "original")

_MX_BLOCK_SIZE = 32  # values that share one scale: OCP MX v1.0

# config.json of openai/gpt-oss-20b, without the fields that follow from others.
_GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    **default_ids(201088),
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "tiny": {
        "head_dim": 32,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "sliding_window": 8,
        "vocab_size": 519,
    },
    "demo": {
        "head_dim": 64,
        "hidden_size": 768,
        "intermediate_size": 544,
        "num_attention_heads": 12,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "vocab_size": 16000,
    },
    "gpt-oss-20b": {},
    "gpt-oss-120b": {"num_hidden_layers": 36, "num_local_experts": 128},
}
"""What each preset changes in the configuration of gpt-oss-20b."""

# Largest shard file of the Hugging Face layout, as transformers splits by default.
_SHARD_FILE_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor; `stream` and `skip_elems` make it a slice of random values that both layouts share."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: dict[str, dict[str, float]] | str
    stream: str
    skip_elems: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype == "bfloat16" else 1)

    def spec(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "shape": self.shape,
            "fill": self.fill,
            "stream": self.stream,
            "skip_elems": self.skip_elems,
        }


def synthesize(
    output: str | os.PathLike[str],
    preset: str = "demo",
    *,
    seed: int = 0,
    layout: Literal["huggingface", "original"] = "huggingface",
    workers: int | None = None,
    progress: Progress = True,
    **config_overrides: Any,
) -> Path:
    """Writes a random gpt-oss checkpoint: safetensors files, config.json, an index if sharded, and a tokenizer.

    Values are normal, with deviations that keep activations finite and routing spread through all layers; experts are
    MXFP4. One seed is one model: both layouts of it hold the same weights, and the number of workers changes nothing.

    The tokenizer is a small one of common English words, in the form that the library `tokenizers` reads, with the
    special tokens of the harmony format: at gpt-oss's ids in vocabularies of its size, else at the last ones.
    `<|return|>` and `<|endoftext|>` are config.json's `eos_token_id` and `pad_token_id`, which follow `vocab_size`
    where they are not given. A vocabulary without room for 256 bytes and the special tokens, or ids outside of it, get
    no tokenizer. In both layouts, though the published `original/` has none: so that all can be tried.

    Args:
        output: the folder to write; a new or an empty one.
        preset: `tiny` (1 MB), `demo` (some tens of millions of parameters), `gpt-oss-20b` (13.8 GB) or
            `gpt-oss-120b` (65.2 GB).
        seed: a number between 0 and 2**64 - 1.
        layout: `huggingface`, or `original` as OpenAI publishes it beside.
        workers: threads; all cores by default.
        progress: False, True for a bar, or a callable that gets a :class:`ProgressEvent`.
        **config_overrides: fields of config.json in place of the preset's, such as `num_hidden_layers=3`.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown preset, layout or config field, or fields that do not fit each other.
        ConversionError: the folder is not empty.
        OSError: the system refused.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: found {preset!r}, expected one of {', '.join(map(repr, PRESETS))}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: found {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: found {seed}, expected a number between 0 and 2**64 - 1")
    config = _config(preset, config_overrides)
    if layout == "huggingface":
        tensors = list(_huggingface_tensors(config))
        files = _shard(tensors)
    else:
        tensors = list(_original_tensors(config))
        files = {"model.safetensors": tensors}

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConversionError(f"{folder}: found files in it, expected a new or an empty folder")
    spec = {name: {tensor.name: tensor.spec() for tensor in content} for name, content in files.items()}
    beside = {
        "config.json": config if layout == "huggingface" else _original_config(config),
        "generation_config.json": _generation_config(config),
        **text_files(config),
    }
    if len(files) > 1:
        beside["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {tensor.name: name for name, content in files.items() for tensor in content},
        }
    try:
        # The index first: without it, some of the files would pass for a whole checkpoint.
        for name, content in beside.items():
            _write(folder / name, content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
        with observe(progress) as callback:
            _core.synthesize(folder, json.dumps(spec), seed, workers=workers, callback=callback)
    except BaseException:
        # The folder was empty: what is in it was never a checkpoint, and would only be in the way of the next try.
        for name in (*beside, *files, *(f"{name}.tmp" for name in files)):
            (folder / name).unlink(missing_ok=True)
        raise
    return folder


def _config(preset: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """config.json of the Hugging Face layout, checked."""
    derived = {"experts_per_token", "layer_types", "quantization_config"}
    unknown = sorted(set(overrides) - set(_GPT_OSS_20B) - derived)
    if unknown:
        raise ValueError(f"config fields: found {unknown}, expected fields of {sorted({*_GPT_OSS_20B, *derived})}")
    config = {**_GPT_OSS_20B, **PRESETS[preset]}
    if "experts_per_token" in overrides:
        config["num_experts_per_tok"] = overrides["experts_per_token"]
    config.update(overrides)
    if type(config["vocab_size"]) is int:
        config |= default_ids(config["vocab_size"]) | {
            field: overrides[field] for field in ("eos_token_id", "pad_token_id") if field in overrides
        }
    config["experts_per_token"] = config["num_experts_per_tok"]
    for field, default in _GPT_OSS_20B.items():
        value, least = config[field], 0 if field.endswith("token_id") else 1
        if type(default) is int and field != "rope_theta" and (type(value) is not int or value < least):
            raise ValueError(f"{field}: found {value!r}, expected an integer of at least {least}")
    missing = sorted(set(_GPT_OSS_20B["rope_scaling"]) - set(config["rope_scaling"]))
    if missing:
        raise ValueError(f"rope_scaling: found no {', '.join(missing)}, expected {_GPT_OSS_20B['rope_scaling']}")
    layers = config["num_hidden_layers"]
    config.setdefault("layer_types", ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)])
    config.setdefault(
        "quantization_config",
        {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    )
    for field in ("hidden_size", "intermediate_size"):
        if config[field] % _MX_BLOCK_SIZE:
            raise ValueError(
                f"{field}: found {config[field]}, expected a multiple of {_MX_BLOCK_SIZE}, the MXFP4 block"
            )
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ValueError(
            f"num_attention_heads: found {config['num_attention_heads']}, expected a multiple of "
            f"num_key_value_heads ({config['num_key_value_heads']})"
        )
    if config["num_experts_per_tok"] > config["num_local_experts"]:
        raise ValueError(
            f"num_experts_per_tok: found {config['num_experts_per_tok']}, expected at most num_local_experts "
            f"({config['num_local_experts']})"
        )
    if len(config["layer_types"]) != layers:
        raise ValueError(f"layer_types: found {len(config['layer_types'])} entries, expected {layers}")
    return dict(sorted(config.items()))


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """What ends a text: an answer, a document and, with harmony's special tokens, a call of a tool."""
    eos, pad, ids = config["eos_token_id"], config["pad_token_id"], special_ids(config)
    if ids is None:
        return {"do_sample": True, "eos_token_id": [eos, pad], "pad_token_id": pad}
    return {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]],
        "pad_token_id": pad,
    }


def _original_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the `original/` layout."""
    return {
        "num_hidden_layers": config["num_hidden_layers"],
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "swiglu_limit": config["swiglu_limit"],
        "head_dim": config["head_dim"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "sliding_window": config["sliding_window"],
        "initial_context_length": config["initial_context_length"],
        "rope_theta": config["rope_theta"],
        "rope_scaling_factor": config["rope_scaling"]["factor"],
        "rope_ntk_alpha": config["rope_scaling"]["beta_slow"],
        "rope_ntk_beta": config["rope_scaling"]["beta_fast"],
    }


def _normal(std: float, mean: float = 0.0) -> dict[str, dict[str, float]]:
    return {"normal": {"mean": mean, "std": std}}


def _huggingface_tensors(config: dict[str, Any]) -> Iterator[_Tensor]:
    """Every tensor of the Hugging Face layout: 3 + 19 per layer."""
    hidden, inter, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    q_rows, kv_rows = heads * head_dim, config["num_key_value_heads"] * head_dim

    def dense(name: str, *shape: int, std: float, mean: float = 0.0, stream: str = "", skip: int = 0) -> _Tensor:
        return _Tensor(name, "bfloat16", shape, _normal(std, mean), stream or name, skip)

    def mxfp4(name: str, rows: int, columns: int) -> Iterator[_Tensor]:
        groups = columns // _MX_BLOCK_SIZE
        blocks, scales = (experts, rows, groups, 16), (experts, rows, groups)
        std = columns**-0.5
        yield _Tensor(f"{name}_blocks", "uint8", blocks, "mxfp4_codes", f"{name}_blocks")
        yield _Tensor(f"{name}_scales", "uint8", scales, {"mxfp4_scales": {"std": std}}, f"{name}_scales")

    # Embeddings outweigh what a layer adds to them, and attention, which adds much the same to all positions, adds no
    # more than experts do. Else positions grow alike from layer to layer, until routers send most tokens to the same
    # few experts, and a rounding to bfloat16 in an early layer changes the choices of all that follow.
    yield dense("model.embed_tokens.weight", config["vocab_size"], hidden, std=4.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield dense(f"{prefix}.input_layernorm.weight", hidden, std=0.1, mean=1.0)
        # One stream for the three projections, which the original layout stores as one tensor.
        start = 0
        for projection, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            name, stream = f"{prefix}.self_attn.{projection}_proj", f"{prefix}.self_attn.qkv"
            weight_std = 1.5 * hidden**-0.5
            yield dense(f"{name}.weight", rows, hidden, std=weight_std, stream=f"{stream}.weight", skip=start * hidden)
            yield dense(f"{name}.bias", rows, std=0.3, stream=f"{stream}.bias", skip=start)
            start += rows
        yield dense(f"{prefix}.self_attn.o_proj.weight", hidden, q_rows, std=0.5 * q_rows**-0.5)
        yield dense(f"{prefix}.self_attn.o_proj.bias", hidden, std=0.1)
        yield dense(f"{prefix}.self_attn.sinks", heads, std=1.0)
        yield dense(f"{prefix}.post_attention_layernorm.weight", hidden, std=0.1, mean=1.0)
        yield dense(f"{prefix}.mlp.router.weight", experts, hidden, std=2.0 * hidden**-0.5)
        yield dense(f"{prefix}.mlp.router.bias", experts, std=0.3)
        yield from mxfp4(f"{prefix}.mlp.experts.gate_up_proj", 2 * inter, hidden)
        yield dense(f"{prefix}.mlp.experts.gate_up_proj_bias", experts, 2 * inter, std=0.5)
        yield from mxfp4(f"{prefix}.mlp.experts.down_proj", hidden, inter)
        yield dense(f"{prefix}.mlp.experts.down_proj_bias", experts, hidden, std=0.2)
    yield dense("model.norm.weight", hidden, std=0.1, mean=1.0)
    yield dense("lm_head.weight", config["vocab_size"], hidden, std=hidden**-0.5)


_ORIGINAL_NAMES: Final = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}
"""Names below a layer, Hugging Face to `original/`, without the projections that the latter joins."""

_ORIGINAL_TOP: Final = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}


def _original_tensors(config: dict[str, Any]) -> Iterator[_Tensor]:
    """Every tensor of the `original/` layout: 3 + 15 per layer, values as in the other layout."""
    rows = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * config["head_dim"]
    for tensor in _huggingface_tensors(config):
        if tensor.name in _ORIGINAL_TOP:
            yield dataclasses.replace(tensor, name=_ORIGINAL_TOP[tensor.name])
            continue
        layer, _, name = tensor.name.removeprefix("model.layers.").partition(".")
        if name in _ORIGINAL_NAMES:
            yield dataclasses.replace(tensor, name=f"block.{layer}.{_ORIGINAL_NAMES[name]}")
        elif name.startswith("self_attn.q_proj."):
            part = name.removeprefix("self_attn.q_proj.")
            yield dataclasses.replace(tensor, name=f"block.{layer}.attn.qkv.{part}", shape=(rows, *tensor.shape[1:]))


def _shard(tensors: list[_Tensor]) -> dict[str, list[_Tensor]]:
    """Shard files as transformers makes them: in order, up to a size; one file has a name without numbers."""
    shards: list[list[_Tensor]] = [[]]
    fill = 0
    for tensor in tensors:
        if fill + tensor.nbytes > _SHARD_FILE_BYTES and shards[-1]:
            shards.append([])
            fill = 0
        shards[-1].append(tensor)
        fill += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as fault:
        # Opening a file says which one; writing does not.
        fault.filename = str(path)
        raise
