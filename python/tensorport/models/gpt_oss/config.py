"""What config.json says of a gpt-oss, in either layout."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Self, TypeAlias

from tensorport.errors import CheckpointError
from tensorport.mxfp4.types import MX_BLOCK_SIZE

__all__ = ["Config", "LayerType", "Rope"]

LayerType: TypeAlias = Literal["sliding_attention", "full_attention"]


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, stretched by YaRN (Peng et al. 2023) unless `factor` is 1.

    Attributes:
        theta: base of the wavelengths.
        factor: by how much the context is longer than the one trained first.
        beta_fast: dimensions that turn more often than this within that context stay as they are.
        beta_slow: those that turn less often are interpolated.
        original_context: positions of the context trained first.
        truncate: whether the ramp between the two begins and ends at whole pairs of dimensions.
        attention_factor: what cosines and sines are multiplied by; None is 0.1 ln(factor) + 1.
    """

    theta: float
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 4096
    truncate: bool = False
    attention_factor: float | None = None

    def frequencies(self, head_dim: int) -> list[float]:
        """Radians per position of each of the head_dim / 2 pairs of dimensions.

        Source: openai/gpt-oss, gpt_oss/torch/model.py, RotaryEmbedding; transformers' modeling_rope_utils.py.
        """
        pairs = [self.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
        if self.factor == 1:
            return pairs

        def pair_that_turns(times: float) -> float:
            turns = self.original_context / (times * 2 * math.pi)
            return head_dim / 2 * math.log(turns) / math.log(self.theta)

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # As transformers does, so that nothing divides by zero.
        width = high - low or 0.001
        ramp = [min(max((pair - low) / width, 0), 1) for pair in range(head_dim // 2)]
        return [share * f / self.factor + (1 - share) * f for share, f in zip(ramp, pairs, strict=True)]

    @property
    def concentration(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Sizes and constants of a gpt-oss; names as in the config.json of Hugging Face.

    Attributes:
        vocab_size: tokens.
        hidden_size: width of the stream; a multiple of 32.
        intermediate_size: width within an expert; a multiple of 32.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values.
        head_dim: width of a head; even.
        num_local_experts: experts of a layer.
        num_experts_per_tok: experts of a token.
        layer_types: for each layer, which attention it has.
        sliding_window: keys that a query of a sliding layer sees, its own among them.
        rope: of queries and keys.
        max_position_embeddings: positions that the model is made for.
        rms_norm_eps: added to the mean of squares.
        swiglu_limit: where gate and up are clamped.
        swiglu_alpha: steepness of the sigmoid.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int
    rope: Rope
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return len(self.layer_types)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str = "config.json") -> Self:
        """Reads a config.json of the Hugging Face layout, or of `original/`.

        Args:
            fields: what the file holds.
            where: the file, for messages.

        Raises:
            CheckpointError: a field is missing, unknown, of another type, or asks for what this model is not; says all.
        """
        reader = _Reader(fields)
        config = cls._original(reader) if is_original(fields) else cls._huggingface(reader)
        reader.finish(where)
        assert config is not None, "a reader without faults has read everything"
        return config

    @classmethod
    def _huggingface(cls, read: "_Reader") -> Self | None:
        read.expect("model_type", "gpt_oss")
        read.expect("hidden_act", "silu", default="silu")
        read.expect("attention_bias", True, default=True)
        read.expect("tie_word_embeddings", False, default=False)
        layers = read.integer("num_hidden_layers")
        heads = read.integer("num_attention_heads")
        max_positions = read.integer("max_position_embeddings", default=131072)
        sizes = {name: read.integer(name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        experts = read.integer("num_local_experts", "num_experts")
        chosen = read.integer("num_experts_per_tok", "experts_per_token")
        key_heads = read.integer("num_key_value_heads", default=heads)
        head_dim = read.integer("head_dim", default=sizes["hidden_size"] // max(heads, 1))
        kinds = read.layer_types(layers)
        window = read.integer("sliding_window", default=128)
        rope = read.rope(max_positions)
        constants = {
            "rms_norm_eps": read.number("rms_norm_eps", default=1e-5),
            "swiglu_limit": read.number("swiglu_limit", default=7.0),
            "swiglu_alpha": read.number("swiglu_alpha", default=1.702),
        }
        read.quantization()
        read.ignore(_IGNORED)
        return cls._checked(
            read, heads, key_heads, head_dim, experts, chosen, kinds, window, rope, max_positions, sizes, constants
        )

    @classmethod
    def _original(cls, read: "_Reader") -> Self | None:
        # A conversion that decodes the experts says so there.
        read.ignore(_DTYPES)
        context = read.integer("initial_context_length")
        rope = Rope(
            theta=read.number("rope_theta"),
            factor=read.number("rope_scaling_factor"),
            beta_fast=read.number("rope_ntk_beta"),
            beta_slow=read.number("rope_ntk_alpha"),
            original_context=context,
            truncate=False,
        )
        sizes = {name: read.integer(name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        return cls._checked(
            read,
            read.integer("num_attention_heads"),
            read.integer("num_key_value_heads"),
            read.integer("head_dim"),
            read.integer("num_experts"),
            read.integer("experts_per_token"),
            read.layer_types(read.integer("num_hidden_layers")),
            read.integer("sliding_window"),
            rope,
            max(round(context * rope.factor), 1),
            sizes,
            {"swiglu_limit": read.number("swiglu_limit", default=7.0)},
        )

    @classmethod
    def _checked(  # noqa: PLR0917 - what both layouts say, by their own names
        cls,
        read: "_Reader",
        heads: int,
        key_heads: int,
        head_dim: int,
        experts: int,
        chosen: int,
        kinds: tuple[LayerType, ...],
        window: int,
        rope: Rope,
        max_positions: int,
        sizes: Mapping[str, int],
        constants: Mapping[str, float],
    ) -> Self | None:
        if read.faults:
            return None
        for name in ("hidden_size", "intermediate_size"):
            if sizes[name] % MX_BLOCK_SIZE:
                read.faults.append(f"{name}: found {sizes[name]}, expected a multiple of {MX_BLOCK_SIZE}")
        if heads % key_heads:
            read.faults.append(
                f"num_attention_heads: found {heads}, expected a multiple of num_key_value_heads ({key_heads})"
            )
        if chosen > experts:
            read.faults.append(f"num_experts_per_tok: found {chosen}, expected at most {experts}, all experts")
        if rope.theta <= 1:
            read.faults.append(f"rope_theta: found {rope.theta}, expected a number above 1")
        if rope.original_context < 1:
            read.faults.append(f"original_max_position_embeddings: found {rope.original_context}, expected at least 1")
        if head_dim % 2:
            read.faults.append(f"head_dim: found {head_dim}, expected an even number")
        return cls(
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            layer_types=kinds,
            sliding_window=window,
            rope=rope,
            max_position_embeddings=max_positions,
            rms_norm_eps=constants.get("rms_norm_eps", 1e-5),
            swiglu_limit=constants["swiglu_limit"],
            swiglu_alpha=constants.get("swiglu_alpha", 1.702),
            **sizes,
        )


def is_original(fields: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of `original/`: no `model_type`, and YaRN's constants under names of its own."""
    return "model_type" not in fields and {"num_experts", "rope_ntk_alpha", "rope_ntk_beta"} <= set(fields)


_DTYPES: Final = frozenset({"dtype", "torch_dtype"})
"""How tensors are stored; they say so themselves."""

_IGNORED: Final = _DTYPES | frozenset({
    # What the model is called and what wrote the file.
    "_name_or_path", "architectures", "auto_map", "transformers_version",
    # Tokens: read with the tokenizer.
    "bos_token_id", "eos_token_id", "pad_token_id",
    # Training, and options of other programs.
    "attention_dropout", "initializer_range", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "router_aux_loss_coef", "use_cache",
    # What initial_context_length says stands in rope_scaling, too.
    "initial_context_length", "experts_per_token",
})  # fmt: skip
"""Fields of config.json that do not change what the model computes."""


class _Reader:
    """Takes fields out of a config, and notes all that is wrong with it."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._taken: set[str] = set()
        self.faults: list[str] = []

    def take(self, *names: str) -> Any:
        """The value under the first of the names that is there; None if none is."""
        self._taken.update(names)
        found = [self._fields[name] for name in names if self._fields.get(name) is not None]
        if any(value != found[0] for value in found[1:]):
            self.faults.append(f"{' and '.join(names)}: found {' and '.join(map(repr, found))}, expected the same")
        return found[0] if found else None

    def expect(self, name: str, value: Any, default: Any = None) -> None:
        """Notes a field that asks for something else than this model is."""
        found = self.take(name)
        found = default if found is None else found
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            self.faults.append(f"{name}: found {found!r}, expected {value!r}")

    def integer(self, *names: str, default: int | None = None) -> int:
        """A positive number."""
        found = self.take(*names)
        found = default if found is None else found
        # Tokens, positions and their distances are int32 on the device.
        if isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**31:
            return found
        self.faults.append(f"{names[0]}: found {found!r}, expected a positive integer")
        return 1

    def number(self, name: str, default: float | None = None, within: Mapping[str, Any] | None = None) -> float:
        """A positive number that float32 holds, and so does what YaRN makes of some."""
        found = self.take(name) if within is None else within.get(name)
        found = default if found is None else found
        if isinstance(found, int | float) and not isinstance(found, bool) and _LEAST <= found <= _MOST:
            return float(found)
        self.faults.append(f"{name}: found {found!r}, expected a positive number")
        return 1.0

    def layer_types(self, layers: int) -> tuple[LayerType, ...]:
        """The attention of each layer; by default they alternate, and the first is a sliding one."""
        found = self.take("layer_types")
        if layers > _MOST_LAYERS:
            self.faults.append(f"num_hidden_layers: found {layers}, expected at most {_MOST_LAYERS}")
            return ()
        if found is None:
            return tuple("full_attention" if layer % 2 else "sliding_attention" for layer in range(layers))
        known = ("sliding_attention", "full_attention")
        if not isinstance(found, Sequence) or isinstance(found, str) or not all(kind in known for kind in found):
            self.faults.append(f"layer_types: found {found!r}, expected a list of {' and '.join(map(repr, known))}")
            return ()
        if len(found) != layers:
            self.faults.append(f"layer_types: found {len(found)} entries, expected {layers}, one for each layer")
        return tuple(found)

    def rope(self, max_positions: int) -> Rope:
        """From `rope_scaling` and `rope_theta`, or `rope_parameters`, which holds both."""
        theta = self.take("rope_theta")
        scaling = self.take("rope_parameters", "rope_scaling")
        if not isinstance(scaling, Mapping):
            # transformers would take defaults; a gpt-oss without YaRN is worth a look.
            self.faults.append(f"rope_scaling: found {scaling!r}, expected an object")
            scaling = {}
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in ("yarn", "default"):
            self.faults.append(f"rope_type: found {kind!r}, expected 'yarn' or 'default'")
        unknown = sorted(set(scaling) - _ROPE_FIELDS)
        if unknown:
            self.faults.append(f"rope_scaling: found {', '.join(unknown)}, expected no fields but the known ones")
        own = scaling.get("rope_theta")
        if None not in (theta, own) and theta != own:
            self.faults.append(f"rope_theta: found {theta!r} and {own!r}, expected the same")
        theta = own if theta is None else theta
        if kind == "default":
            return Rope(self.number("rope_theta", within={"rope_theta": theta}), 1, 32, 1, max_positions, False)
        truncate = scaling.get("truncate", True)
        if not isinstance(truncate, bool):
            self.faults.append(f"truncate: found {truncate!r}, expected true or false")
        attention_factor = scaling.get("attention_factor")
        context = self.number("original_max_position_embeddings", within=scaling)
        return Rope(
            theta=self.number("rope_theta", within={"rope_theta": theta}),
            factor=self.number("factor", within=scaling),
            beta_fast=self.number("beta_fast", default=32.0, within=scaling),
            beta_slow=self.number("beta_slow", default=1.0, within=scaling),
            original_context=round(context),
            truncate=bool(truncate),
            attention_factor=None if attention_factor is None else self.number("attention_factor", within=scaling),
        )

    def quantization(self) -> None:
        """MXFP4 or none: which tensors are quantized, the checkpoint says itself."""
        found = self.take("quantization_config")
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        if method not in (None, "mxfp4"):
            self.faults.append(f"quantization_config: found the method {method!r}, expected 'mxfp4', or none")

    def ignore(self, names: frozenset[str]) -> None:
        """Fields that may be there and say nothing about the computation."""
        self._taken |= names

    def finish(self, where: str) -> None:
        """Raises what is wrong, all together."""
        unknown = [name for name in self._fields if name not in self._taken]
        if unknown:
            self.faults.append(f"found the unknown fields {', '.join(map(repr, unknown))}, expected only known ones")
        if self.faults:
            faults = "\n  ".join(self.faults)
            raise CheckpointError(f"{where}: no configuration of a gpt-oss that this version runs:\n  {faults}")


_ROPE_FIELDS: Final = frozenset({
    "attention_factor", "beta_fast", "beta_slow", "factor", "original_max_position_embeddings", "rope_theta",
    "rope_type", "truncate", "type",
})  # fmt: skip

_LEAST: Final = 1e-30
_MOST: Final = 1e30
"""Of all numbers: logarithms, powers and quotients of these are finite."""

_MOST_LAYERS: Final = 10_000
