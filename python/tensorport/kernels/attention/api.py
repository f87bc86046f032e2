"""attention: checked once, computed by one of several implementations."""

from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from tensorport.kernels import triton
from tensorport.kernels.arguments import float_array, integer_array, same_size
from tensorport.kernels.attention import native, xla
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.registry import Device, Implementation, ImplementationName, Op

__all__ = ["OP", "attention"]

_Inputs = tuple[Array, Array, Array, Array, Array, Array | None]


def _arguments(  # noqa: PLR0917 - the order of the op
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_positions: ArrayLike,
    key_positions: ArrayLike,
    sinks: ArrayLike | None = None,
) -> _Inputs:
    query, key, value = (
        float_array(name, array, 4) for name, array in (("query", query), ("key", key), ("value", value))
    )
    query_positions = integer_array("query_positions", query_positions, 2)
    key_positions = integer_array("key_positions", key_positions, 2)
    sinks = None if sinks is None else float_array("sinks", sinks, 1)
    _check_sizes(query, key, value, query_positions, key_positions, sinks)
    return query, key, value, query_positions, key_positions, sinks


def _pallas_triton(*args: Any) -> Array:
    from tensorport.kernels.attention import pallas_triton  # noqa: PLC0415 - Pallas is imported where it runs

    return pallas_triton.attention(*args)


def _refused_by_triton(device: Device, query: Array, *others: Array | None) -> str | None:
    head_dim = query.shape[3]
    reason = triton.refuses(device, query, *others)
    if reason is None and (head_dim < 16 or head_dim & (head_dim - 1)):
        return f"found heads of {head_dim}, expected a power of two from 16 on"
    return reason


OP = Op(
    "attention",
    _arguments,
    Implementation("pallas_triton", _pallas_triton, _refused_by_triton, opt_in=triton.NOT_MEASURED),
    Implementation("native", native.attention, native.refuses, elsewhere=xla.attention),
    Implementation("xla", xla.attention),
)


def attention(  # noqa: PLR0917 - arrays in the order in which every attention takes them
    query: Float[ArrayLike, "b t n d"],
    key: Float[ArrayLike, "b s g d"],
    value: Float[ArrayLike, "b s g d"],
    query_positions: Integer[ArrayLike, "b t"],
    key_positions: Integer[ArrayLike, "b s"],
    sinks: Float[ArrayLike, " n"] | None = None,
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    implementation: ImplementationName = "auto",
) -> Float[Array, "b t n d"]:
    """Causal grouped-query attention with sinks, each key and query at a position of its own.

    A query at position p sees the keys at positions 0 .. p, and of these the last `sliding_window`, its own among them.
    Where keys stand in the array does not matter: a cache may be a ring, and slots that hold nothing have position -1.
    Query head n uses key head n // (N / G). A sink is one more logit in the softmax of its head, with no value behind
    it. Scores and their sums are float32 (float64 where `query` is). On CPU values are mixed in float32, too; on
    accelerators, as flash attention does, the shares are rounded to the dtype of `value` first.

    What stands at position -1 is never read, be it NaN. A score of -inf is as good as a key that is not seen. But a
    value that is NaN or infinite at a position that is there may spoil all queries of its row, those before it too.

    Args:
        query: [B, T, N, D], rotated.
        key: [B, S, G, D], rotated; G divides N.
        value: [B, S, G, D].
        query_positions: [B, T]; -1 for a query that is padding, which sees nothing.
        key_positions: [B, S]; -1 for a key that is not there.
        sinks: [N] logits, not scaled; None for none.
        sliding_window: how many keys a query sees; None for all up to its own.
        scale: of the scores; 1 / sqrt(D) by default.
        implementation: see :func:`tensorport.kernels.explain`.

    Returns:
        [B, T, N, D] in the dtype of `query`, on its device. Zero for a query that sees nothing. Differentiable in
        reverse mode with respect to all floats, by the implementation `xla`. That has the scores of a block of queries
        in memory at once, for gradients all; the others those of a few queries with a few keys.

    Raises:
        NotImplementedError: the named implementation cannot run here; says why.
        TypeError, ValueError: dtypes or shapes do not fit.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, sdpa.
    """
    inputs = _arguments(query, key, value, query_positions, key_positions, sinks)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: found {sliding_window}, expected at least 1, or None")
    if sliding_window is not None and sliding_window >= 2**31:
        sliding_window = None  # So many positions there are.
    settings = Settings(float(scale if scale is not None else inputs[0].shape[3] ** -0.5), sliding_window)
    return OP.choose(implementation, *inputs).run(*inputs, settings)


def _check_sizes(  # noqa: PLR0917 - as above
    query: Array, key: Array, value: Array, query_positions: Array, key_positions: Array, sinks: Array | None
) -> None:
    batch, queries, heads, head_dim = query.shape
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "query_positions": query_positions,
        "key_positions": key_positions,
    }
    same_size("B, the rows of the batch", {name: array.shape[0] for name, array in arrays.items()} | {"query": batch})
    same_size("T, the number of queries", {"query": queries, "query_positions": query_positions.shape[1]})
    sizes = {name: arrays[name].shape[1] for name in ("key", "value", "key_positions")}
    same_size("S, the number of keys", sizes)
    same_size("G, the number of key heads", {"key": key.shape[2], "value": value.shape[2]})
    same_size("D, the size of a head", {"query": head_dim, "key": key.shape[3], "value": value.shape[3]})
    if not head_dim:
        raise ValueError("D, the size of a head: found 0, expected at least 1")
    if sinks is not None:
        same_size("N, the number of query heads", {"query": heads, "sinks": sinks.shape[0]})
    if not key.shape[2] or heads % key.shape[2]:
        raise ValueError(f"N, the number of query heads: found {heads}, expected a multiple of {key.shape[2]}, of key")
