"""A model as the loop of decoding sees it, and what runs on the device: prompts in chunks, then tokens one by one."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, Key
from numpy.typing import NDArray

from tensorport.text.sampling import Sampling, sample, token_keys

__all__ = [
    "CAPTURES_LOOP",
    "MAX_TOKENS_PER_DISPATCH",
    "ONE_GRAPH",
    "Decoder",
    "Made",
    "Placement",
    "Settings",
    "first_token",
    "loop_for",
    "more_tokens",
    "new_cache",
    "placement",
    "prefill",
]

MAX_TOKENS_PER_DISPATCH = 64
"""Size of the buffer that one call of `more_tokens` fills."""

CAPTURES_LOOP = False
"""Whether on NVIDIA GPUs all tokens of a dispatch are one CUDA graph: compiled so for an H200, not run on a GPU yet.

XLA of 2025 ended the process at the second run of such a graph (https://github.com/openxla/xla/pull/35760).
"""

ONE_GRAPH: Final[dict[str, Any]] = {
    # What XLA captures by default, and loops and branches: else the host decides after each token whether to go on.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
    # A loop counts as one command, and by default a graph has five or more.
    "xla_gpu_graph_min_graph_size": 1,
}
"""XLA's compile options (DebugOptions in xla.proto) by which `more_tokens` becomes one CUDA graph."""

_SMALLEST_CHUNK = 16
"""Where the sizes of chunks begin that are compiled for."""


@runtime_checkable
class Decoder(Protocol):
    """A model as the loop sees it. Frozen and hashable: it is a static argument of jitted functions.

    What is equal must compute the same; the weights are not part of it, they come as `params` with every call.
    """

    def hidden(
        self, params: Any, tokens: Int32[Array, "b t"], cache: Any, positions: Int32[Array, "b t"]
    ) -> tuple[Float[Array, "b t h"], Any]:
        """Runs tokens through the model and puts them into the cache.

        Positions of a row ascend from where the row ended before. Position -1 is padding: nothing is written for it,
        and what comes out has no meaning.
        """
        ...

    def logits(self, params: Any, x: Float[Array, "*rows h"]) -> Float32[Array, "*rows v"]:
        """The logits of the token after each of those."""
        ...

    def empty_cache(self, params: Any, batch: int, max_length: int) -> Any:
        """Room for `max_length` tokens of each row: any pytree of distinct arrays, which the loop donates.

        Where they are placed they stay: arrays committed to devices or to a mesh keep their shardings through all
        calls, others go where the weights are.
        """
        ...


Placement = tuple[NamedSharding | None, ...]
"""Where each leaf of a cache is on a mesh; None for those that are on none."""


def new_cache(decoder: Decoder, params: Any, batch: int, max_length: int) -> Any:
    """An empty cache that is committed to the devices of the weights, if those are.

    Jitted functions return committed arrays where they get some. A first cache that is not would compile them twice.
    """
    cache = decoder.empty_cache(params, batch, max_length)
    committed = [leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) and leaf.committed]
    if not committed:
        return cache
    place = NamedSharding(committed[0].mesh, P()) if isinstance(committed[0], NamedSharding) else committed[0]
    return jax.tree.map(lambda array: array if array.committed else jax.device_put(array, place), cache)


def placement(cache: Any) -> Placement:
    """Where a cache is, for jitted functions to leave it there: on a mesh, XLA may choose anew in each of them."""
    shardings = (leaf.sharding for leaf in jax.tree.leaves(cache))
    return tuple(sharding if isinstance(sharding, NamedSharding) else None for sharding in shardings)


def prefill(
    decoder: Decoder, params: Any, prompts: Sequence[NDArray[np.int32]], cache: Any, *, chunk: int = 512
) -> tuple[Float[Array, "b h"], Any]:
    """Puts prompts into an empty cache, `chunk` tokens of each row at a time.

    The last chunk is padded to a power of two, of at least 16, so that few sizes are compiled for.

    Args:
        decoder: the model.
        params: its weights.
        prompts: ids of each row, at least one.
        cache: of :func:`new_cache`; donated.
        chunk: the most tokens of a row that go through the model at once.

    Returns:
        What the model made of the last token of each row, and the cache.
    """
    lengths = np.array([ids.size for ids in prompts], np.int32)
    longest, last, place = int(lengths.max()), None, placement(cache)
    for start in range(0, longest, chunk):
        width = min(chunk, max(_SMALLEST_CHUNK, 1 << (longest - start - 1).bit_length()))
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, ids in enumerate(prompts):
            here = ids[start : start + width]
            tokens[row, : here.size] = here
        positions = np.broadcast_to(np.arange(start, start + width, dtype=np.int32), tokens.shape)
        positions = np.where(positions < lengths[:, None], positions, np.int32(-1))
        x, cache = _prefill_chunk(decoder, place, params, cache, tokens, positions, lengths - 1 - start)
        last = x if last is None else _replaced(last, x, lengths - 1 >= start)
    assert last is not None
    return last, cache


@partial(jax.jit, static_argnames=("decoder", "place"), donate_argnames="cache")
def _prefill_chunk(  # noqa: PLR0917 - jit donates by position too
    decoder: Decoder,
    place: Placement,
    params: Any,
    cache: Any,
    tokens: Int32[Array, "b t"],
    positions: Int32[Array, "b t"],
    wanted: Int32[Array, " b"],
) -> tuple[Float[Array, "b h"], Any]:
    x, cache = decoder.hidden(params, tokens, cache, positions)
    wanted = jnp.clip(wanted, 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(x, wanted[:, None, None], axis=1)[:, 0], _kept(cache, place)


@jax.jit
def _replaced(last: Float[Array, "b h"], x: Float[Array, "b h"], rows: Bool[Array, " b"]) -> Float[Array, "b h"]:
    return jnp.where(rows[:, None], x, last)


class Made(NamedTuple):
    """Tokens of one dispatch: so many of each row as `counts` says, what stands behind has no meaning.

    A last one of -1: the logits were NaN or infinite.
    """

    ids: Int32[Array, "b n"]
    logprobs: Float32[Array, "b n"]
    counts: Int32[Array, " b"]
    done: Bool[Array, " b"]


class Settings(NamedTuple):
    """What stays the same through all calls of a loop; stop tokens are padded with what no token is."""

    sampling: Sampling
    keys: Key[Array, " b"]
    stop_tokens: Int32[Array, " s"]


@partial(jax.jit, static_argnames="decoder", donate_argnames="seen")
def first_token(  # noqa: PLR0917 - as above
    decoder: Decoder,
    params: Any,
    seen: Bool[Array, "b v"],
    x: Float[Array, "b h"],
    positions: Int32[Array, " b"],
    done: Bool[Array, " b"],
    settings: Settings,
) -> tuple[Made, Bool[Array, "b v"]]:
    """One token of each row at `positions`, from what the model made of the last token of its prompt."""
    ids, logprobs, done_after, seen = _draw(decoder.logits(params, x), seen, positions, done, settings)
    count = jnp.where(done, 0, 1).astype(jnp.int32)
    return Made(ids[:, None], logprobs[:, None], count, done_after), seen


def _more_tokens(  # noqa: PLR0917 - as above
    decoder: Decoder,
    place: Placement,
    params: Any,
    cache: Any,
    seen: Bool[Array, "b v"],
    tokens: Int32[Array, " b"],
    positions: Int32[Array, " b"],
    done: Bool[Array, " b"],
    limit: Int32[Array, ""],
    settings: Settings,
) -> tuple[Made, Any, Bool[Array, "b v"]]:
    """Up to `limit` tokens of each row, behind `tokens` at `positions`; ends early where all rows are done."""
    batch = tokens.shape[0]

    def unfinished(state: tuple[Any, ...]) -> Bool[Array, ""]:
        n, _, made, *_ = state
        going_on: Array = (n < limit) & ~jnp.all(made.done)
        return going_on

    def one_more(state: tuple[Any, ...]) -> tuple[Any, ...]:
        n, tokens, made, cache, seen = state
        # What hangs on the weights alone XLA would compute before the loop, such as all of them in float32: on CPU it
        # keeps that copy of each matrix in memory, and makes it anew in every dispatch. Bound to `n`, they look new.
        n, weights = jax.lax.optimization_barrier((n, params))
        active = ~made.done
        fed = jnp.where(active, positions + n, -1)
        x, cache = decoder.hidden(weights, tokens[:, None], cache, fed[:, None])
        ids, logprobs, done, seen = _draw(decoder.logits(weights, x[:, 0]), seen, fed + 1, made.done, settings)
        made = Made(
            made.ids.at[:, n].set(ids),
            made.logprobs.at[:, n].set(logprobs),
            made.counts + active.astype(jnp.int32),
            done,
        )
        return n + 1, ids, made, cache, seen

    buffer = (batch, MAX_TOKENS_PER_DISPATCH)
    made = Made(jnp.zeros(buffer, jnp.int32), jnp.zeros(buffer, jnp.float32), jnp.zeros(batch, jnp.int32), done)
    state = (jnp.int32(0), tokens, made, cache, seen)
    _, _, made, cache, seen = jax.lax.while_loop(unfinished, one_more, state)
    return made, _kept(cache, place), seen


_jit_loop = partial(jax.jit, static_argnames=("decoder", "place"), donate_argnames=("cache", "seen"))
more_tokens = _jit_loop(_more_tokens)
_more_tokens_in_one_graph = _jit_loop(_more_tokens, compiler_options=ONE_GRAPH)


def loop_for(cache: Any) -> Any:
    """`more_tokens`, compiled for where the cache is."""
    devices = {device for leaf in jax.tree.leaves(cache) for device in leaf.devices()}
    # AMD's GPUs are of the same platform.
    are_nvidia = all(device.platform == "gpu" and "cuda" in device.client.platform_version for device in devices)
    return _more_tokens_in_one_graph if CAPTURES_LOOP and are_nvidia else more_tokens


def _draw(
    logits: Float32[Array, "b vocab_size"],
    seen: Bool[Array, "b v"],
    positions: Int32[Array, " b"],
    done: Bool[Array, " b"],
    settings: Settings,
) -> tuple[Int32[Array, " b"], Float32[Array, " b"], Bool[Array, " b"], Bool[Array, "b v"]]:
    """The token at a position of each row that is not done; token 0 in the others."""
    if logits.shape != seen.shape:
        raise ValueError(f"vocab_size: found {seen.shape[1]}, expected {logits.shape[1]}, the size of the logits")
    # Rows that are done have no meaning: none of their numbers may make others wait or fail.
    logits = jnp.where(done[:, None], 0, logits.astype(jnp.float32))
    ids, logprobs = sample(logits, settings.sampling, seen, token_keys(settings.keys, positions))
    ids = jnp.where(done, 0, ids)
    ended = done | (ids < 0) | jnp.any(ids[:, None] == settings.stop_tokens[None, :], axis=1)
    seen = seen.at[jnp.arange(ids.shape[0]), jnp.maximum(ids, 0)].max(~done)
    return ids, logprobs, ended, seen


def _kept(cache: Any, place: Placement) -> Any:
    at = iter(place)

    def keep(leaf: Array) -> Array:
        sharding = next(at)
        return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(keep, cache)
