"""A decoder whose next token hangs on every (token, position) before it, and the same in plain Python.

A token that is missing in the cache, stands at another place, is written twice or seen too early changes all that
follows, or makes it NaN.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 40
NO_TOKEN = -1

TRACES: Counter[tuple[str, str]] = Counter()
"""(name of the decoder, method): how often Python ran it, which is how often jit traced it."""


@dataclass(frozen=True)
class ToyDecoder:
    """Frozen and hashable; tests that count traces take a name of their own."""

    name: str = "toy"

    def empty_cache(self, params: Any, batch: int, max_length: int) -> Any:  # noqa: ARG002 - the loop's protocol
        return {"tokens": jnp.full((batch, max_length), NO_TOKEN, jnp.int32), "broken": jnp.zeros(batch, bool)}

    def hidden(self, params: Any, tokens: Any, cache: Any, positions: Any) -> Any:
        TRACES[self.name, "hidden"] += 1
        written, broken = cache["tokens"], cache["broken"]
        batch, length = written.shape
        rows, real = jnp.arange(batch)[:, None], positions >= 0
        twice = written.at[rows, positions].get(mode="fill", fill_value=NO_TOKEN) != NO_TOKEN
        broken = broken | jnp.any(real & ((positions >= length) | twice), axis=1)
        written = written.at[rows, jnp.where(real, positions, length)].set(tokens, mode="drop")

        slots = jnp.arange(length, dtype=jnp.uint32)[None, :]
        parts = mixed(written.astype(jnp.uint32) * np.uint32(40503) + slots * np.uint32(2654435761) + params["salt"])
        there = written != NO_TOKEN
        sums = jnp.cumsum(jnp.where(there, parts, np.uint32(0)), axis=1, dtype=jnp.uint32)
        numbers = jnp.cumsum(there, axis=1, dtype=jnp.int32)
        at = jnp.clip(positions, 0, length - 1)
        state = jnp.take_along_axis(sums, at, axis=1)
        # All tokens before stand in the cache, which was never written wrongly.
        sound = real & (jnp.take_along_axis(numbers, at, axis=1) == positions + 1) & ~broken[:, None]
        sound &= positions != params["nan_at"]
        as_bytes = (state[..., None] >> jnp.array([[[0, 8, 16, 24]]], jnp.uint32)) & np.uint32(255)
        x = jnp.where(sound[..., None], as_bytes.astype(jnp.float32), jnp.nan)
        return x, {"tokens": written, "broken": broken}

    def logits(self, params: Any, x: Any) -> Any:  # noqa: ARG002 - the loop's protocol
        TRACES[self.name, "logits"] += 1
        shifts = jnp.array([[0, 8, 16, 24]], jnp.uint32)
        state = jnp.sum(x.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)
        bits = mixed(state[:, None] + jnp.arange(VOCAB_SIZE, dtype=jnp.uint32)[None, :] * np.uint32(2246822519))
        # 0 .. 8, in steps that float32 has exactly.
        logits = (bits >> np.uint32(16)).astype(jnp.float32) / np.float32(8192)
        return jnp.where(jnp.isnan(x[:, :1]), jnp.nan, logits)


def toy_params(salt: int = 5, nan_at: int = -1) -> Any:
    """`nan_at`: the position whose logits are NaN."""
    return {"salt": jnp.uint32(salt), "nan_at": jnp.int32(nan_at)}


def mixed(x: Any) -> Any:
    """Bits of 32-bit integers well mixed; arrays of NumPy and JAX alike. Source: the finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def true_logits(context: Sequence[int], salt: int = 5) -> NDArray[np.float32]:
    """The logits after all of these tokens, in plain Python's integers."""
    state = 0
    for position, token in enumerate(context):
        state += _mixed_int(token * 40503 + position * 2654435761 + salt)
    logits = [(_mixed_int(state + token * 2246822519) >> 16) / 8192 for token in range(VOCAB_SIZE)]
    return np.array(logits, np.float32)


def _mixed_int(x: int) -> int:
    x %= 2**32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float64)


def greedy(prompt: Sequence[int], max_new_tokens: int, *, salt: int = 5, penalty: float = 1.0) -> list[int]:
    """The most likely token again and again, one by one, without any cache."""
    context = list(prompt)
    for _ in range(max_new_tokens):
        logits = true_logits(context, salt)
        seen = sorted(set(context))
        logits[seen] = logits[seen] / np.float32(penalty)  # Toy logits are never negative.
        context.append(int(logits.argmax()))
    return context[len(prompt) :]
