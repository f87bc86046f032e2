"""MXFP4Attention: the self-attention of gpt-oss, and of other models with grouped queries, over codes."""

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Self, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int32, Integer, Num

from tensorport.errors import MappingError
from tensorport.kernels.arguments import integer_array
from tensorport.kernels.registry import ImplementationName
from tensorport.models.gpt_oss.cache import LayerCache
from tensorport.models.gpt_oss.config import Rope
from tensorport.models.gpt_oss.model import attend, rotary_table, rotate
from tensorport.mxfp4.codec import ScaleRule
from tensorport.nnx.checkpoint import codes_of, tensors_and_sizes
from tensorport.nnx.dense import Initializer, assembled, check_blocks, compute_dtype
from tensorport.nnx.linear import MXFP4Linear
from tensorport.nnx.sharding import explicit_spec, on_auto_axes

__all__ = ["AttentionCache", "MXFP4Attention"]


class AttentionCache(NamedTuple):
    """Keys and values of the tokens so far, of one layer: what :meth:`MXFP4Attention.empty_cache` makes.

    Attributes:
        layer: the slots; all of `max_length`, or a ring of the last `sliding_window`.
        lengths: [B] tokens in each row, of all leading axes of the input taken together.
    """

    layer: LayerCache
    lengths: Int32[Array, " b"]


class MXFP4Attention(nnx.Module):
    """Causal self-attention with grouped queries on frozen MXFP4 projections: q, k, v and o.

    Queries and keys are rotated by `rope`, each head of queries has a sink in its softmax, and a query sees the last
    `sliding_window` keys: the attention of :mod:`tensorport.models.gpt_oss`, by the same functions. Gradients flow to
    the input, the biases and the sinks.

    gpt-oss itself has these projections in bfloat16, and its quality was measured so: :meth:`from_params` quantizes
    them.

    Args:
        hidden_size: width of the stream, a multiple of 32.
        num_attention_heads: heads of queries; times `head_dim` a multiple of 32.
        num_key_value_heads: heads of keys and values; divides `num_attention_heads`.
        head_dim: width of a head.
        rope: rotation of queries and keys; None for none. `Rope(theta)` is the plain one, `Config.from_json(...).rope`
            that of a gpt-oss.
        sliding_window: keys that a query sees, its own among them; None for all before it.
        use_bias: whether the four projections have biases.
        use_sinks: whether heads have sinks.
        dtype: see :class:`MXFP4Linear`. Scores and shares are float32 (float64 where the input is).
        param_dtype: of biases and sinks, and of the dense kernels before they are quantized.
        kernel_init: initializer of the dense kernels.
        bias_init: initializer of the biases.
        sinks_init: initializer of the sinks.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        implementation: see :func:`tensorport.kernels.explain`.
        rngs: its stream `params` is used, for q, k, v, o and the sinks in turn.
        qkv_metadata: metadata of the kernels of q, k and v, said of dense kernels [in, out]:
            `{"out_sharding": (None, "model")}`.
        o_metadata: metadata of the kernel of o, said likewise.
        sinks_metadata: metadata of the sinks.

    Attributes:
        q_proj: MXFP4Linear from `hidden_size` to `num_attention_heads * head_dim`.
        k_proj: MXFP4Linear from `hidden_size` to `num_key_value_heads * head_dim`.
        v_proj: the same.
        o_proj: MXFP4Linear from `num_attention_heads * head_dim` to `hidden_size`.
        sinks: nnx.Param [num_attention_heads], or None.

    Raises:
        ValueError: a size is not a multiple of 32, heads are not whole groups, or dimensions that turn not whole pairs.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, AttentionBlock.
    """

    q_proj: MXFP4Linear
    k_proj: MXFP4Linear
    v_proj: MXFP4Linear
    o_proj: MXFP4Linear
    sinks: nnx.Param[jax.Array] | None

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        rope: Rope | None = None,
        sliding_window: int | None = None,
        use_bias: bool = True,
        use_sinks: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        sinks_init: Initializer = nnx.nn.linear.default_bias_init,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
        rngs: nnx.Rngs,
        qkv_metadata: Mapping[str, Any] = MappingProxyType({}),
        o_metadata: Mapping[str, Any] = MappingProxyType({}),
        sinks_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        check_blocks("hidden_size", hidden_size)
        check_blocks("num_attention_heads * head_dim", num_attention_heads * head_dim)
        if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: found {num_attention_heads}, expected a multiple of num_key_value_heads "
                f"({num_key_value_heads})"
            )
        if rope is not None and head_dim % 2:
            raise ValueError(f"head_dim: found {head_dim}, expected an even number: two dimensions turn together")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window: found {sliding_window}, expected at least 1, or None")

        def linear(in_features: int, heads: int, metadata: Mapping[str, Any], *, width: int = head_dim) -> MXFP4Linear:
            return MXFP4Linear(
                in_features,
                heads * width,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                bias_init=bias_init,
                scale_rule=scale_rule,
                implementation=implementation,
                rngs=rngs,
                kernel_metadata=metadata,
            )

        self.q_proj = linear(hidden_size, num_attention_heads, qkv_metadata)
        self.k_proj = linear(hidden_size, num_key_value_heads, qkv_metadata)
        self.v_proj = linear(hidden_size, num_key_value_heads, qkv_metadata)
        self.o_proj = linear(num_attention_heads * head_dim, 1, o_metadata, width=hidden_size)
        if use_sinks:
            self.sinks = nnx.Param(sinks_init(rngs.params(), (num_attention_heads,), param_dtype), **sinks_metadata)
        else:
            self.sinks = nnx.data(None)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rope = rope
        self.sliding_window = sliding_window
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation

    @classmethod
    def from_params(
        cls,
        self_attn: Mapping[str, Any],
        *,
        head_dim: int,
        rope: Rope | None,
        sliding_window: int | None = None,
        dtype: DTypeLike | None = None,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
    ) -> Self:
        """The `self_attn` of a layer, as `tensorport.load_params` returns it, or the `attn` of the original gpt-oss.

        >>> params = tensorport.load_params("gpt-oss-20b")
        >>> config = gpt_oss.Config.from_json(json.loads(pathlib.Path("gpt-oss-20b/config.json").read_text()))
        >>> layer = MXFP4Attention.from_params(
        ...     params["model"]["layers"]["1"]["self_attn"], head_dim=config.head_dim, rope=config.rope
        ... )

        Args:
            self_attn: the layout of Hugging Face, with `q_proj`, `k_proj`, `v_proj` and `o_proj`, or the original one,
                with `qkv` and `out`, of which `norm` is left out: it is no part of this layer. Biases and `sinks` may
                be missing. Weights are dense arrays [out, in], which are quantized, or MXFP4Arrays, kept as they are.
            head_dim: of the checkpoint's config; how many heads there are follows.
            rope: of the checkpoint's config, as :class:`tensorport.models.gpt_oss.Config` reads it; None for none.
            sliding_window: of the checkpoint's config if the layer is one of its `sliding_attention`.
            dtype: see :class:`MXFP4Attention`.
            scale_rule: for dense weights, see :func:`tensorport.mxfp4.quantize`.
            implementation: see :func:`tensorport.kernels.explain`.

        Raises:
            MappingError: names or shapes are others, or rows are not whole heads.
            ValueError: see :class:`MXFP4Attention`.
        """
        if "qkv" in self_attn:
            axes, optional, ignored = _ORIGINAL, _ORIGINAL_OPTIONAL, ["norm.scale"]
        else:
            axes, optional, ignored = _HUGGING_FACE, _HUGGING_FACE_OPTIONAL, []
        tensors, sizes = tensors_and_sizes(self_attn, axes, optional=optional, ignored=ignored)
        queries, sinks = sizes["Q"], tensors.get("sinks")
        keys = sizes["K"] if "K" in sizes else (sizes["F"] - queries) // 2
        _check_heads(queries, keys, sizes, head_dim)

        if "qkv" in self_attn:
            tensors = _parts(tensors, queries, keys)
        layers = {
            name: MXFP4Linear.from_array(
                codes_of(tensors[f"{name}.weight"], scale_rule),
                tensors.get(f"{name}.bias"),
                dtype=dtype,
                implementation=implementation,
            )
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        return assembled(
            cls,
            *(sizes["H"], queries // head_dim, keys // head_dim, head_dim),
            variables={**layers, "sinks": nnx.data(None) if sinks is None else nnx.Param(jnp.asarray(sinks))},
            rope=rope,
            sliding_window=sliding_window,
            use_sinks=sinks is not None,
            dtype=dtype,
            param_dtype=layers["q_proj"].param_dtype,
            implementation=implementation,
        )

    def empty_cache(self, batch: int, max_length: int, *, dtype: DTypeLike | None = None) -> AttentionCache:
        """A cache without tokens, to decode with.

        Args:
            batch: rows; the product of all leading axes of the input.
            max_length: positions that a row may have. With a sliding window, the cache is a ring of that many slots
                whatever `max_length` is.
            dtype: of keys and values; that of the computation by default, as far as it hangs on no input.

        Raises:
            ValueError: fewer than one of either.
        """
        if batch < 1 or max_length < 1:
            raise ValueError(
                f"empty_cache: found batch {batch} and max_length {max_length}, expected at least 1 of each"
            )
        dtype = compute_dtype(self.dtype, self.param_dtype) if dtype is None else dtype
        slots = max_length if self.sliding_window is None else self.sliding_window
        layer = LayerCache.empty(batch, slots, self.num_key_value_heads, self.head_dim, dtype=dtype)
        return AttentionCache(layer, jnp.zeros(batch, jnp.int32))

    @overload
    def __call__(
        self,
        x: Num[ArrayLike, "*batch t hidden_size"],
        *,
        positions: Integer[ArrayLike, "*batch t"] | None = None,
        cache: None = None,
    ) -> Float[Array, "*batch t hidden_size"]: ...

    @overload
    def __call__(
        self,
        x: Num[ArrayLike, "*batch t hidden_size"],
        *,
        positions: Integer[ArrayLike, "*batch t"] | None = None,
        cache: AttentionCache,
    ) -> tuple[Float[Array, "*batch t hidden_size"], AttentionCache]: ...

    def __call__(
        self,
        x: Num[ArrayLike, "*batch t hidden_size"],
        *,
        positions: Integer[ArrayLike, "*batch t"] | None = None,
        cache: AttentionCache | None = None,
    ) -> Any:
        """Lets tokens attend to themselves, to those before them and to the cache.

        >>> y = layer(x)                                       # all tokens of a sequence
        >>> cache = layer.empty_cache(batch=2, max_length=100)
        >>> y, cache = layer(x[:, :7], cache=cache)            # or some, and then the next, with the same results
        >>> y, cache = layer(x[:, 7:8], cache=cache)

        Pure: the cache that is given stays as it is, unless it is donated to a jitted function.

        Args:
            x: [..., T, hidden_size].
            positions: [..., T], those of a row rising by one from its cache's length on; -1 for padding, which nothing
                sees. By default no token is padding.
            cache: what came before, by :meth:`empty_cache`; None for nothing, and nothing to be kept.

        Returns:
            [..., T, hidden_size]; with a cache also the cache with these tokens in it. Rows of padding are the bias of
            `o_proj`; those at a position behind the cache's last slot are NaN.

        Raises:
            NotImplementedError: the implementation that was named cannot run here.
            TypeError, ValueError: the input does not fit.
        """
        x = jnp.asarray(x)
        if x.ndim < 2:
            raise ValueError(f"x: found shape {x.shape}, expected [..., T, {self.q_proj.in_features}]")
        rows = math.prod(x.shape[:-2])
        if cache is not None and cache.lengths.shape[0] != rows:
            raise ValueError(f"cache: found {cache.lengths.shape[0]} rows, expected {rows}, those of x")
        if positions is not None:
            positions = integer_array("positions", positions, x.ndim - 1)
            if positions.shape != x.shape[:-1]:
                raise ValueError(f"positions: found shape {positions.shape}, expected {x.shape[:-1]}, that of tokens")

        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        sinks = None if self.sinks is None else self.sinks[...]
        spec = explicit_spec(query)
        # What XLA divides among devices it must compute itself.
        is_divided = spec is not None and self.implementation == "auto"
        attend_rows = partial(self._attend, implementation="xla" if is_divided else self.implementation)
        if cache is None:
            alone = on_auto_axes(lambda *args: attend_rows(*args)[0], spec)
            return self.o_proj(alone(query, key, value, sinks, positions))
        both: Any = None if spec is None else (spec, jax.tree.map(_spec_of, cache))
        mixed, cache = on_auto_axes(attend_rows, both)(query, key, value, sinks, positions, cache)
        return self.o_proj(mixed), cache

    def _attend(  # noqa: PLR0917 - for on_auto_axes
        self,
        query: Float[Array, "*batch t nd"],
        key: Float[Array, "*batch t gd"],
        value: Float[Array, "*batch t gd"],
        sinks: Float[Array, " n"] | None,
        positions: Int32[Array, "*batch t"] | None,
        cache: AttentionCache | None = None,
        *,
        implementation: ImplementationName,
    ) -> tuple[Float[Array, "*batch t nd"], AttentionCache | None]:
        """What the projection o is given, and the cache with the tokens in it."""
        *batch, tokens, _ = query.shape
        rows = math.prod(batch)
        lengths = jnp.zeros(rows, jnp.int32) if cache is None else cache.lengths
        if positions is None:
            at = lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
        else:
            at = positions.reshape(rows, tokens)
        lengths = jnp.maximum(lengths, jnp.max(at, axis=1, initial=-1) + 1)

        def heads(x: Float[Array, "*batch t width"]) -> Float[Array, "b t heads d"]:
            return x.reshape(rows, tokens, x.shape[-1] // self.head_dim, self.head_dim)

        query, key, value = heads(query), heads(key), heads(value)
        if self.rope is not None:
            table = rotary_table(self.rope, self.head_dim, at)
            query, key = rotate(query, table), rotate(key, table)
        mixed, layer = attend(
            query,
            key,
            value,
            sinks,
            at,
            lengths,
            None if cache is None else cache.layer,
            self.sliding_window,
            implementation=implementation,
        )
        mixed = mixed.reshape(*batch, tokens, self.num_attention_heads * self.head_dim)
        if layer is None:
            return mixed, None
        if self.sliding_window is None:
            is_beyond = at.reshape(*batch, tokens, 1) >= layer.keys.shape[1]
            mixed = jnp.where(is_beyond, jnp.full((), jnp.nan, mixed.dtype), mixed)
        return mixed, AttentionCache(layer, lengths)


def _spec_of(x: Array) -> PartitionSpec:
    spec = explicit_spec(x)
    return PartitionSpec() if spec is None else spec


def _check_heads(queries: int, keys: int, sizes: Mapping[str, int], head_dim: int) -> None:
    """Refuses rows of projections that are not whole heads."""
    faults = [
        f"{rows} rows of {name}, expected whole heads of {head_dim}"
        for name, rows in (("queries", queries), ("keys", keys))
        if head_dim < 1 or rows < 1 or rows % head_dim
    ]
    if "F" in sizes and sizes["F"] != queries + 2 * keys:
        faults.append(f"{sizes['F']} rows of qkv and {queries} of queries, expected as many of keys as of values")
    if not faults and "N" in sizes and sizes["N"] * head_dim != queries:
        faults.append(f"{sizes['N']} sinks, expected {queries // head_dim}, one for each head of queries")
    if faults:
        raise MappingError("the tensors do not fit the layer: found " + "; found ".join(faults))


def _parts(tensors: Mapping[str, Any], queries: int, keys: int) -> dict[str, Any]:
    """The tensors of the original layout by the names of Hugging Face."""
    rows = {"q_proj": slice(queries), "k_proj": slice(queries, queries + keys), "v_proj": slice(queries + keys, None)}
    parts = {name.replace("out.", "o_proj."): tensor for name, tensor in tensors.items() if not name.startswith("qkv.")}
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in tensors:
            parts |= {f"{name}.{kind}": tensors[f"qkv.{kind}"][of] for name, of in rows.items()}
    return parts


# What the layer is made of in the two layouts, and its axes: H the width of the stream, Q all heads of queries, K all
# those of keys, F queries, keys and values together, N heads of queries.
_HUGGING_FACE: Final = {
    "q_proj.weight": ("Q", "H"),
    "k_proj.weight": ("K", "H"),
    "v_proj.weight": ("K", "H"),
    "o_proj.weight": ("H", "Q"),
}
_HUGGING_FACE_OPTIONAL: Final = {
    "q_proj.bias": ("Q",),
    "k_proj.bias": ("K",),
    "v_proj.bias": ("K",),
    "o_proj.bias": ("H",),
    "sinks": ("N",),
}
_ORIGINAL: Final = {"qkv.weight": ("F", "H"), "out.weight": ("H", "Q")}
_ORIGINAL_OPTIONAL: Final = {"qkv.bias": ("F",), "out.bias": ("H",), "sinks": ("N",)}
