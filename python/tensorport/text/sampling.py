"""The next token from a model's logits, on the device: penalty, temperature, top-k, top-p, and the draw."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, UInt32
from numpy.typing import NDArray

__all__ = ["Sampling", "filtered_logits", "row_keys", "sample", "token_keys"]

_F32 = np.finfo(np.float32)


class Sampling(NamedTuple):
    """How each row of a batch is sampled. All arrays, so that a jitted function is compiled once for all settings."""

    temperature: Float32[Array, " b"]
    """0: the greatest logit, without chance."""
    top_k: Int32[Array, " b"]
    """0: off."""
    top_p: Float32[Array, " b"]
    """1: off."""
    repetition_penalty: Float32[Array, " b"]
    """1: off."""

    @classmethod
    def of(
        cls,
        batch: int,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        repetition_penalty: float | Sequence[float] | None = None,
    ) -> "Sampling":
        """Settings for `batch` rows; a number holds for all of them, a sequence has one for each.

        Args:
            batch: number of rows.
            temperature: what logits are divided by; 0 takes the greatest.
            top_k: only the k most likely tokens are drawn from; None: all.
            top_p: only the fewest most likely tokens whose probabilities reach this sum; None or 1: all.
            repetition_penalty: above 1, tokens seen before become less likely; None or 1: off.

        Raises:
            TypeError: `top_k` is no integer.
            ValueError: a setting is out of its range, or a sequence has not `batch` entries.
        """
        return cls(
            _floats("temperature", temperature, batch, lambda t: t >= 0, "a finite number of at least 0"),
            _integers("top_k", top_k, batch),
            _floats(
                "top_p", 1.0 if top_p is None else top_p, batch, lambda p: (p > 0) & (p <= 1), "above 0, at most 1"
            ),
            _floats(
                "repetition_penalty",
                1.0 if repetition_penalty is None else repetition_penalty,
                batch,
                lambda penalty: penalty > 0,
                "a finite number above 0",
            ),
        )


def filtered_logits(
    logits: Float32[Array, "b v"], sampling: Sampling, seen: Bool[Array, "b v"]
) -> Float32[Array, "b v"]:
    """The logits that tokens are drawn from; those of dropped tokens are -inf.

    In this order: the repetition penalty (logits of seen tokens divided by it where positive, else multiplied), the
    temperature, top_k, and top_p among what top_k left. Tokens as likely as the last one kept are all kept, which may
    be more than top_k. With temperature 0 the first of the greatest is left alone.

    No sorting: thresholds are found exactly by bisection over the 32 bits of a float, one reduction for each; where no
    row uses top_k or top_p, it is skipped at run time. Probabilities of top_p are summed in float32.

    Args:
        logits: as the model made them. Rows with NaN, +inf or only -inf give rows without meaning.
        sampling: settings of each row.
        seen: which tokens the penalty applies to.

    Source: the logits processors of transformers (generation/logits_process.py), which cuts ties of top_p at random.
    """
    penalised = _penalised(logits, sampling, seen)
    greedy = jnp.arange(logits.shape[1])[None, :] == jnp.argmax(penalised, axis=1)[:, None]
    filtered = _drawn_from(penalised, sampling)
    return jnp.where(sampling.temperature[:, None] > 0, filtered, jnp.where(greedy, penalised, -jnp.inf))


def sample(
    logits: Float32[Array, "b v"], sampling: Sampling, seen: Bool[Array, "b v"], keys: Key[Array, " b"]
) -> tuple[Int32[Array, " b"], Float32[Array, " b"]]:
    """Draws a token for each row.

    A row depends on nothing but its own logits, settings and key. No random numbers are made where all rows are greedy.

    Args:
        logits: as the model made them; -inf: never drawn.
        sampling: settings of each row.
        seen: tokens that the repetition penalty applies to.
        keys: a key for each row, see :func:`token_keys`.

    Returns:
        The tokens, and the logarithm of their probability by the model's own logits, before any setting. A row whose
        logits have NaN or +inf, or are all -inf, gives -1 and NaN.
    """
    penalised = _penalised(logits, sampling, seen)
    greedy = jnp.argmax(penalised, axis=1).astype(jnp.int32)

    def draw() -> Int32[Array, " b"]:
        # "high": in float32 the usual draw never finds tokens of probability below 1e-7, and a vocabulary has many.
        def draw_row(key: Key[Array, ""], row: Float32[Array, " v"]) -> Array:
            return jax.random.categorical(key, row, mode="high")

        x = _drawn_from(penalised, sampling)
        # From 0 down, the noise that decides is not rounded to the size of the logits.
        drawn = jax.vmap(draw_row)(keys, x - jnp.max(x, axis=1, keepdims=True)).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    ids = jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
    greatest = jnp.max(logits, axis=1)
    logprobs = chosen - greatest - jnp.log(jnp.sum(jnp.exp(logits - greatest[:, None]), axis=1))
    # NaN for NaN and for either infinity as the greatest: each meets itself in a difference or in the sum.
    return jnp.where(jnp.isnan(logprobs), -1, ids), logprobs


def row_keys(seed: int, batch: int) -> Key[Array, " b"]:
    """A key for each row: `fold_in(key(seed), row)`, with JAX's threefry whatever its default is."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: found {seed}, expected 0 .. 2**32 - 1")
    # Of JAX's generators, threefry alone gives a row the same numbers under vmap as by itself.
    key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch, dtype=jnp.uint32))


def token_keys(keys: Key[Array, " b"], positions: Int32[Array, " b"]) -> Key[Array, " b"]:
    """The key of each row for the token at a position, so that no draw depends on how many were made at once."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def _penalised(logits: Float32[Array, "b v"], sampling: Sampling, seen: Bool[Array, "b v"]) -> Float32[Array, "b v"]:
    penalty = sampling.repetition_penalty[:, None]
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty).clip(_F32.min, _F32.max)
    return jnp.where(seen & jnp.isfinite(logits), changed, logits)


def _drawn_from(penalised: Float32[Array, "b v"], sampling: Sampling) -> Float32[Array, "b v"]:
    # What the greatest logit divided by its temperature cannot exceed, lest it become infinite; so cold, all is greedy.
    coldest = jnp.maximum(_F32.tiny, jnp.abs(jnp.max(penalised, axis=1)) * 1e-37)
    scaled = penalised / jnp.maximum(sampling.temperature, coldest)[:, None]
    random = sampling.temperature > 0
    uses_k, uses_p = random & (sampling.top_k > 0), random & (sampling.top_p < 1)
    scaled = jax.lax.cond(jnp.any(uses_k), lambda x: _top_k(x, sampling.top_k, uses_k), lambda x: x, scaled)
    drawn_from: Array = jax.lax.cond(jnp.any(uses_p), lambda x: _top_p(x, sampling.top_p, uses_p), lambda x: x, scaled)
    return drawn_from


def _top_k(x: Float32[Array, "b v"], k: Int32[Array, " b"], used: Bool[Array, " b"]) -> Float32[Array, "b v"]:
    order = _order(x)

    def k_reach(bound: UInt32[Array, " b"]) -> Bool[Array, " b"]:
        return jnp.sum(order >= bound[:, None], axis=1, dtype=jnp.int32) >= k

    return jnp.where(order >= _greatest(k_reach, x.shape[0], used)[:, None], x, -jnp.inf)


def _top_p(x: Float32[Array, "b v"], p: Float32[Array, " b"], used: Bool[Array, " b"]) -> Float32[Array, "b v"]:
    order = _order(x)
    weights = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
    # The most likely token weighs 1: with a goal above 0 it is always kept.
    goal = jnp.maximum(p * jnp.sum(weights, axis=1), _F32.tiny)

    def reach_p(bound: UInt32[Array, " b"]) -> Bool[Array, " b"]:
        return jnp.sum(jnp.where(order >= bound[:, None], weights, 0), axis=1) >= goal

    return jnp.where(order >= _greatest(reach_p, x.shape[0], used)[:, None], x, -jnp.inf)


def _order(x: Float32[Array, "b v"]) -> UInt32[Array, "b v"]:
    """Integers in the order of the floats; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _greatest(
    reached: Callable[[UInt32[Array, " b"]], Bool[Array, " b"]], batch: int, used: Bool[Array, " b"]
) -> UInt32[Array, " b"]:
    """The greatest bound that is `reached`, as all smaller ones are; 0, which drops nothing, in rows without use."""

    def add_bit(step: Int[Array, ""], bound: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
        higher = bound | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(used & reached(higher), higher, bound)

    bound: Array = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(batch, jnp.uint32))
    return bound


def _floats(
    name: str,
    value: float | Sequence[float],
    batch: int,
    accepted: Callable[[NDArray[Any]], NDArray[np.bool_]],
    expected: str,
) -> Float32[Array, " b"]:
    exact = np.asarray(value, np.float64)
    with np.errstate(over="ignore", under="ignore"):
        rounded = exact.astype(np.float32)
    # Rounded too: what float32 turns into 0 or infinity is out of range as well.
    if not np.all(accepted(exact) & accepted(rounded) & np.isfinite(rounded)):
        raise ValueError(f"{name}: found {value}, expected {expected}")
    return jnp.asarray(_for_rows(name, rounded, batch))


def _integers(name: str, value: int | Sequence[int] | None, batch: int) -> Int32[Array, " b"]:
    array = np.asarray(0 if value is None else value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: found {value!r}, expected an integer")
    if value is not None and np.any(array < 1):
        raise ValueError(f"{name}: found {value}, expected at least 1")
    return jnp.asarray(_for_rows(name, array.clip(max=2**31 - 1).astype(np.int32), batch))


def _for_rows(name: str, array: NDArray[Any], batch: int) -> NDArray[Any]:
    if array.shape not in {(), (batch,)}:
        raise ValueError(f"{name}: found shape {array.shape}, expected a number or one for each of {batch} rows")
    return np.broadcast_to(array, (batch,))
