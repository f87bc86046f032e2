"""The forward pass of gpt-oss, read from top to bottom.

Parameters are the nested dicts that `load_params` makes of a checkpoint of Hugging Face. Mathematics and constants:
openai/gpt-oss, gpt_oss/torch/model.py. Axes: b rows of the batch, t tokens, h the stream, n heads of queries, g heads
of keys and values, d the width of a head, e experts, k experts of a token, v the vocabulary.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int32, Integer

from tensorport.kernels.attention.api import attention
from tensorport.kernels.linear.api import linear
from tensorport.kernels.registry import ImplementationName
from tensorport.kernels.tiles import accumulator_dtype
from tensorport.models.gpt_oss.cache import Cache, LayerCache
from tensorport.models.gpt_oss.config import Config, LayerType, Rope
from tensorport.models.gpt_oss.experts import dense_implementation, mixture_of_experts

__all__ = [
    "add_attention",
    "add_experts",
    "attend",
    "embed",
    "forward",
    "hidden_states",
    "logits_of",
    "rms_norm",
    "rotary_table",
    "rotate",
]

Params: TypeAlias = Mapping[str, Any]


def forward(
    params: Params,
    config: Config,
    tokens: Integer[ArrayLike, "b t"],
    cache: Cache | None = None,
    positions: Integer[ArrayLike, "b t"] | None = None,
    *,
    mesh: Mesh | None = None,
    implementation: ImplementationName = "auto",
) -> tuple[Float[Array, "b t v"], Cache | None]:
    """Logits of the token that follows each of `tokens`, and the cache with these tokens in it.

    Pure, and made for `jit` with `config`, `mesh` and `implementation` static. Pass `params` as an argument: a constant
    would be copied. Donate the cache. The dtype of the computation is that of the embeddings.

    Args:
        params: nested dicts as `load_params` makes them of a checkpoint in the layout of Hugging Face, or
            :func:`tensorport.models.gpt_oss.load` of any.
        config: sizes and constants.
        tokens: [B, T].
        cache: what came before; None for nothing, and nothing to be kept.
        positions: [B, T], those of a row rising by one from its cache's length on; -1 for padding, which nothing sees
            and whose logits mean nothing. By default no token is padding.
        mesh: devices that the parameters are spread over, by :func:`sharding_rules`; with automatic axes.
        implementation: of the products; see :func:`tensorport.kernels.explain`.

    Returns:
        [B, T, V] float32, and the cache. Logits are NaN where a token or its position cannot be (one that is not in the
        vocabulary, or behind the cache's last slot), and at all tokens of its row behind it.
    """
    x, cache = hidden_states(params, config, tokens, cache, positions, mesh=mesh, implementation=implementation)
    return logits_of(params, x, implementation=dense_implementation(implementation, mesh)), cache


def hidden_states(
    params: Params,
    config: Config,
    tokens: Integer[ArrayLike, "b t"],
    cache: Cache | None = None,
    positions: Integer[ArrayLike, "b t"] | None = None,
    *,
    mesh: Mesh | None = None,
    implementation: ImplementationName = "auto",
) -> tuple[Float[Array, "b t h"], Cache | None]:
    """As :func:`forward`, but the stream after the last norm [B, T, H], of which :func:`logits_of` makes logits."""
    tokens = jnp.asarray(tokens, jnp.int32)
    lengths = jnp.zeros(tokens.shape[0], jnp.int32) if cache is None else cache.lengths
    if positions is None:
        positions = lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.asarray(positions, jnp.int32)
    lengths = jnp.maximum(lengths, jnp.max(positions, axis=1, initial=-1) + 1)
    rope = rotary_table(config.rope, config.head_dim, positions)

    model = params["model"]
    x = embed(params, tokens)
    dense = dense_implementation(implementation, mesh)
    layer_caches: list[LayerCache] = []
    for index, kind in enumerate(config.layer_types):
        layer = model["layers"][str(index)]
        layer_cache = None if cache is None else cache.layers[index]
        x, layer_cache = add_attention(
            layer, config, kind, x, rope, positions, lengths, layer_cache, implementation=dense
        )
        x = add_experts(layer, config, x, positions, mesh=mesh, implementation=implementation)
        if layer_cache is not None:
            layer_caches.append(layer_cache)

    x = rms_norm(x, model["norm"]["weight"], config.rms_norm_eps)
    x = jnp.where(cannot_be(config, tokens, positions, cache)[..., None], jnp.nan, x)
    if cache is None:
        return x, None
    return x, Cache(tuple(layer_caches), lengths)


def embed(params: Params, tokens: Int32[Array, "b t"]) -> Float[Array, "b t h"]:
    """The stream before the first layer. Tokens that there are not take the nearest: :func:`cannot_be` marks them."""
    embeddings = params["model"]["embed_tokens"]["weight"]
    return jnp.take(embeddings, jnp.clip(tokens, 0, len(embeddings) - 1), axis=0)


def add_attention(  # noqa: PLR0917 - what the layers share
    layer: Params,
    config: Config,
    kind: LayerType,
    x: Float[Array, "b t h"],
    rope: tuple[Float[Array, "b t half_d"], Float[Array, "b t half_d"]],
    positions: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
    cache: LayerCache | None,
    *,
    implementation: ImplementationName,
) -> tuple[Float[Array, "b t h"], LayerCache | None]:
    """The first half of a layer: the stream with what its tokens see in each other, and the layer's cache."""
    window = config.sliding_window if kind == "sliding_attention" else None
    normed = rms_norm(x, layer["input_layernorm"]["weight"], config.rms_norm_eps)
    mixed, cache = self_attention(
        layer["self_attn"], config, normed, rope, positions, lengths, cache, window, implementation
    )
    return x + mixed, cache


def add_experts(
    layer: Params,
    config: Config,
    x: Float[Array, "b t h"],
    positions: Int32[Array, "b t"],
    *,
    mesh: Mesh | None,
    implementation: ImplementationName,
) -> Float[Array, "b t h"]:
    """The second half of a layer: the stream with what the experts say to each token."""
    normed = rms_norm(x, layer["post_attention_layernorm"]["weight"], config.rms_norm_eps)
    return x + mixture_of_experts(layer["mlp"], config, normed, positions >= 0, mesh, implementation)


def logits_of(
    params: Params, x: Float[Array, "*batch h"], *, implementation: ImplementationName = "auto"
) -> Float[Array, "*batch v"]:
    """Logits in float32 from the stream after the last norm."""
    return linear(x, params["lm_head"]["weight"], out_dtype=jnp.float32, implementation=implementation)


def cannot_be(
    config: Config, tokens: Int32[Array, "b t"], positions: Int32[Array, "b t"], cache: Cache | None
) -> Bool[Array, "b t"]:
    """Tokens out of the vocabulary or behind the last slot of the cache, and all behind them: they would see it."""
    is_wrong = (tokens < 0) | (tokens >= config.vocab_size)
    max_length = None if cache is None else cache.max_length(config)
    if max_length is not None:
        is_wrong |= positions >= max_length
    return jax.lax.cummax((is_wrong & (positions >= 0)).astype(jnp.int32), axis=1) > 0


def rms_norm(x: Float[Array, "*batch h"], scale: Float[Array, " h"], eps: float) -> Float[Array, "*batch h"]:
    """X over the root of its mean square, times `scale`; in float32, rounded once."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def self_attention(  # noqa: PLR0917 - what a layer hands on
    layer: Params,
    config: Config,
    x: Float[Array, "b t h"],
    rope: tuple[Float[Array, "b t half_d"], Float[Array, "b t half_d"]],
    positions: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
    cache: LayerCache | None,
    sliding_window: int | None,
    implementation: ImplementationName,
) -> tuple[Float[Array, "b t h"], LayerCache | None]:
    """Attention of the tokens to themselves and to the cache; and the cache with them in it."""

    def heads(name: str, count: int) -> Float[Array, "b t heads d"]:
        rows = linear(x, layer[name]["weight"], layer[name]["bias"], implementation=implementation)
        return rows.reshape(*x.shape[:2], count, config.head_dim)

    query = rotate(heads("q_proj", config.num_attention_heads), rope)
    key = rotate(heads("k_proj", config.num_key_value_heads), rope)
    value = heads("v_proj", config.num_key_value_heads)

    mixed, cache = attend(
        query, key, value, layer["sinks"], positions, lengths, cache, sliding_window, implementation=implementation
    )
    mixed = mixed.reshape(*x.shape[:2], -1)
    return linear(mixed, layer["o_proj"]["weight"], layer["o_proj"]["bias"], implementation=implementation), cache


def attend(  # noqa: PLR0917 - as above
    query: Float[Array, "b t n d"],
    key: Float[Array, "b t g d"],
    value: Float[Array, "b t g d"],
    sinks: Float[Array, " n"] | None,
    positions: Int32[Array, "b t"],
    lengths: Int32[Array, " b"],
    cache: LayerCache | None,
    sliding_window: int | None,
    *,
    implementation: ImplementationName = "auto",
) -> tuple[Float[Array, "b t n d"], LayerCache | None]:
    """Mixed values of what each query sees, among these tokens and in the cache; and the cache with the tokens in it.

    `lengths` are those of the rows with these tokens. A cache of a sliding window is a ring of that many slots.
    """
    if cache is None:
        keys, values, key_positions = key, value, positions
    else:
        before, cache = cache, cache.write(key, value, positions, lengths, implementation=implementation)
        keys, values, key_positions = cache.keys, cache.values, cache.positions(lengths)
        if sliding_window is not None and key.shape[1] > 1:
            # Tokens have overwritten in the ring what those before them still see.
            keys = jnp.concatenate([before.keys, key.astype(before.keys.dtype)], axis=1)
            values = jnp.concatenate([before.values, value.astype(before.values.dtype)], axis=1)
            seen = jnp.min(jnp.where(positions >= 0, positions, lengths[:, None]), axis=1)
            key_positions = jnp.concatenate([before.positions(seen), positions], axis=1)

    mixed = attention(
        query,
        keys,
        values,
        positions,
        key_positions,
        sinks,
        sliding_window=sliding_window,
        implementation=implementation,
    )
    return mixed, cache


def rotary_table(
    rope: Rope, head_dim: int, positions: Int32[Array, "b t"]
) -> tuple[Float[Array, "b t half_d"], Float[Array, "b t half_d"]]:
    """Cosines and sines of the angles at `positions`, in float32."""
    frequencies = jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * rope.concentration, jnp.sin(angles) * rope.concentration


def rotate(
    x: Float[Array, "b t heads d"], rope: tuple[Float[Array, "b t half_d"], Float[Array, "b t half_d"]]
) -> Float[Array, "b t heads d"]:
    """Turns dimensions i and i + d / 2 together, in float32 (float64 where `x` is), rounded once."""
    dtype = accumulator_dtype(x.dtype)
    cos, sin = (table[:, :, None].astype(dtype) for table in rope)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
