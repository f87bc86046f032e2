"""attention on NVIDIA GPUs, by Pallas through Triton: flash attention for prompts, and flash decoding for tokens.

The queries of a group of heads share each tile of keys and values. Where there are few of them, the keys are divided
among programs, each of which has a softmax of its own; all are put together at the end.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from tensorport.kernels.attention import xla
from tensorport.kernels.attention.configs import TritonConfig
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.triton_tiles import span

__all__ = ["attention"]


def attention(  # noqa: PLR0917 - the arguments of the op in their order
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g d"],
    query_positions: Int32[Array, "b t"],
    key_positions: Int32[Array, "b s"],
    sinks: Float[Array, " n"] | None,
    settings: Settings,
    *,
    interpret: bool = False,
) -> Float[Array, "b t n d"]:
    """The weighted mean of values, for each query; derivatives by the implementation `xla`.

    `interpret` runs it on any device, slowly: for tests.
    """
    out: Array = _attention(settings, interpret, query_positions, key_positions, query, key, value, sinks)
    return out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attention(  # noqa: PLR0917 - as above
    settings: Settings,
    interpret: bool,
    query_positions: Array,
    key_positions: Array,
    query: Array,
    key: Array,
    value: Array,
    sinks: Array | None,
) -> Array:
    (batch, queries, heads, head_dim), (keys, key_heads) = query.shape, key.shape[1:3]
    heads_of_group = heads // key_heads
    rows = queries * heads_of_group
    config = TritonConfig.choose(batch * key_heads, rows, keys, head_dim, query.dtype)
    # What shares a head of keys stands together: row r is head r % heads_of_group of query r // heads_of_group.
    grouped = query.reshape(batch, queries, key_heads, heads_of_group, head_dim).swapaxes(1, 2)
    of_row = jax.ShapeDtypeStruct((config.splits, batch, key_heads, rows), jnp.float32)
    sums, largest, total = pl.pallas_call(
        functools.partial(_tile, config, settings, heads_of_group),
        out_shape=(jax.ShapeDtypeStruct((*of_row.shape, head_dim), jnp.float32), of_row, of_row),
        grid=(batch * key_heads, pl.cdiv(rows, config.block_rows), config.splits),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="attention",
    )(query_positions, key_positions, grouped.reshape(batch, key_heads, rows, head_dim), key, value)
    mixed = _put_together(sums, largest, total, None if sinks is None else sinks.reshape(key_heads, heads_of_group))
    by_query = mixed.reshape(batch, key_heads, queries, heads_of_group, head_dim).swapaxes(1, 2)
    return by_query.reshape(query.shape).astype(query.dtype)


@_attention.defjvp
def _attention_jvp(
    settings: Settings, interpret: bool, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    query_positions, key_positions, *floats = primals

    def mixed(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
        return xla.attention(query, key, value, query_positions, key_positions, sinks, settings)

    _, tangent = jax.jvp(mixed, tuple(floats), tuple(tangents[2:]))
    return _attention(settings, interpret, *primals), tangent


def _tile(config: TritonConfig, settings: Settings, heads_of_group: int, *refs: Any) -> None:
    """`block_rows` queries with one head of keys, of which a split has its part."""
    query_positions, key_positions, query, key, value, sums_out, largest_out, total_out = refs
    (keys, key_heads, head_dim), rows = key.shape[1:], query.shape[2]
    group, split = pl.program_id(0), pl.program_id(2)
    row_of_batch, head = group // key_heads, group % key_heads
    here = span(pl.program_id(1) * config.block_rows, config.block_rows, rows)
    # Beyond the last query there is one that sees nothing.
    number = (here.indices.start + jnp.arange(config.block_rows)) // heads_of_group
    at = pltriton.load(query_positions.at[row_of_batch, number], mask=here.is_there, other=-1)
    whole, index = pl.ds(0, head_dim), (row_of_batch, head, here.indices)
    # A query that is padding is zero before it is multiplied.
    q = pltriton.load(query.at[(*index, whole)], mask=_in_rows(at >= 0, head_dim), other=0)
    blocks = pl.cdiv(pl.cdiv(keys, config.block_keys), config.splits)
    scored = q.dtype if q.dtype == key.dtype else jnp.float32

    def add_block(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slots = span((split * blocks + block) * config.block_keys, config.block_keys, keys)
        of = pltriton.load(key_positions.at[row_of_batch, slots.indices], mask=slots.is_there, other=-1)
        is_seen = (of >= 0)[None] & (of[None] <= at[:, None])
        if settings.sliding_window is not None:
            is_seen &= at[:, None] - of[None] < settings.sliding_window
        tile = row_of_batch, slots.indices, head, whole

        def mix(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            sums, largest, total = carry
            k, v = (pltriton.load(ref.at[tile], mask=_in_rows(of >= 0, head_dim), other=0) for ref in (key, value))
            scores = pltriton.dot(q.astype(scored), k.astype(scored).T, allow_tf32=False) * settings.scale
            scores = jnp.where(is_seen, scores, -jnp.inf)
            new = jnp.maximum(largest, jnp.max(scores, axis=1))
            base = _finite(new)
            shares, kept = jnp.exp(scores - base[:, None]), jnp.exp(largest - base)
            mixed = pltriton.dot(shares.astype(v.dtype), v, allow_tf32=False)
            return sums * kept[:, None] + mixed, new, total * kept + jnp.sum(shares, axis=1)

        out: tuple[Array, Array, Array] = jax.lax.cond(
            jnp.max(is_seen.astype(jnp.int32)) > 0, mix, lambda carry: carry, carry
        )
        return out

    start = (
        jnp.zeros((config.block_rows, head_dim), jnp.float32),
        jnp.full(config.block_rows, -jnp.inf, jnp.float32),
        jnp.zeros(config.block_rows, jnp.float32),
    )
    sums, largest, total = jax.lax.fori_loop(0, blocks, add_block, start)
    pltriton.store(sums_out.at[(split, *index, whole)], sums, mask=_in_rows(here.is_there, head_dim))
    pltriton.store(largest_out.at[(split, *index)], largest, mask=here.is_there)
    pltriton.store(total_out.at[(split, *index)], total, mask=here.is_there)


def _in_rows(is_there: Array, columns: int) -> Array:
    return jnp.broadcast_to(is_there[:, None], (is_there.shape[0], columns))


def _put_together(
    sums: Float[Array, "splits b g rows d"],
    largest: Float[Array, "splits b g rows"],
    total: Float[Array, "splits b g rows"],
    sinks: Float[Array, "g heads_of_group"] | None,
) -> Float[Array, "b g rows d"]:
    """One softmax of those of all splits, and the sinks."""
    base = jnp.max(largest, axis=0)
    logits = None
    if sinks is not None:
        logits = jnp.tile(sinks.astype(jnp.float32), (1, base.shape[-1] // sinks.shape[1]))[None]
        base = jnp.maximum(base, logits)
    base = _finite(base)
    kept = jnp.exp(largest - base[None])
    whole = jnp.sum(total * kept, axis=0) + (0 if logits is None else jnp.exp(logits - base))
    mixed = jnp.sum(sums * kept[..., None], axis=0)
    return jnp.where(whole[..., None] == 0, 0, mixed / jnp.where(whole == 0, 1, whole)[..., None])


def _finite(largest: Array) -> Array:
    """What scores are taken relative to: 0 where there is none."""
    return jnp.where(largest == -jnp.inf, 0, largest)
