"""The loop that makes tokens: prompts in chunks through the model, then several tokens for each call of the device.

>>> decoding = decode(decoder, params, [[1, 2, 3], [4]], vocab_size=100, max_new_tokens=20, stop_tokens=[0])
>>> for step in decoding:
...     print(step.ids)                                        # new tokens of each row
>>> decoding.stats.decode_tokens_per_s

It knows token ids alone, and a model as a :class:`Decoder`.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tensorport.text.decoder import (
    MAX_TOKENS_PER_DISPATCH,
    Decoder,
    Made,
    Settings,
    first_token,
    loop_for,
    new_cache,
    placement,
    prefill,
)
from tensorport.text.sampling import Sampling, row_keys

__all__ = ["Decoder", "Decoding", "DecodingStats", "Step", "decode"]

_SMOOTH_S = 0.05
"""A dispatch shorter than this may make twice as many tokens, one of twice this length makes half: pieces of text that
come 10 to 20 times a second read as a stream."""

_SMALLEST_CACHE, _SMALLEST_STOP = 128, 8
"""Where the sizes begin that are compiled for."""


class Step(NamedTuple):
    """What one call of the device made."""

    ids: list[list[int]]
    """New tokens of each row, a stop token included; none where the row has ended."""
    logprobs: list[list[float]]
    """Natural logarithm of the probability of each by the model's own logits, before any setting of sampling."""


@dataclass
class DecodingStats:
    """What was made, and how long it took by the wall clock, without the caller's own time between steps."""

    prompt_tokens: int
    """Of all rows, without padding."""
    new_tokens: int = 0
    """Of all rows, stop tokens included."""
    prefill_s: float = 0.0
    """All prompts through the model, to compile that included where a size is new."""
    first_token_s: float | None = None
    """From the start until the first tokens are on the host: `prefill_s` and the draw, to compile included."""
    decode_tokens: int = 0
    """Of all rows, made in `decode_s`."""
    decode_s: float = 0.0
    """All dispatches but two, which may compile: the one of the first token, and the first one of the loop."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of all rows together, nothing compiled; None where too few tokens were made to tell."""
        return self.decode_tokens / self.decode_s if self.decode_tokens else None


class Decoding(Iterator[Step]):
    """A running decode, as :func:`decode` returns it: an iterator of steps.

    Attributes:
        stats: what was done so far.
        cache_length: tokens that a row of the cache has room for; 0 where no token is to be made.
    """

    def __init__(self, stats: DecodingStats, cache_length: int, done: NDArray[np.bool_], steps: Iterator[Step]) -> None:
        self.stats = stats
        self.cache_length = cache_length
        self._done = done
        self._steps = steps

    def __next__(self) -> Step:
        return next(self._steps)

    def stop(self, row: int) -> None:
        """Ends a row: no later step has tokens of it. The iterator ends where all rows have."""
        self._done[row] = True


def decode(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    repetition_penalty: float | Sequence[float] | None = None,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    max_length: int | None = None,
    max_positions: int | None = None,
    chunk: int = 512,
    tokens_per_dispatch: int | None = None,
) -> Decoding:
    """Continues prompts of any lengths, all rows at once, until each has a stop token or `max_new_tokens`.

    What a row becomes depends on its prompt, its settings, the seed and its number in the batch alone: not on the other
    rows, nor on how many tokens are made at a time. (As far as the model's own arithmetic does not depend on them.)
    Tokens are drawn on the device. The first dispatch makes one token; later ones make twice as many as long as they
    are short, so that a stream stays smooth on slow devices and the host does not matter on fast ones.

    Nothing is computed before the first step is asked for. Compiled once for each number of rows and size of the cache,
    whatever the settings, the number of stop tokens and of new tokens.

    Args:
        decoder: the model.
        params: its weights, handed to jitted functions as they are.
        prompts: ids of each row, at least one.
        vocab_size: size of the logits' last axis; ids are below it.
        max_new_tokens: for each row, a stop token included; 0: no steps.
        temperature: see :meth:`Sampling.of`.
        top_k: see there.
        top_p: see there.
        repetition_penalty: see there; tokens of the prompt count as seen.
        seed: 0 .. 2**32 - 1. The draw of row b for position p has the key fold_in(fold_in(key(seed), b), p).
        stop_tokens: a row ends with the first of these.
        max_length: tokens that a row of the cache has room for. By default the longest prompt and `max_new_tokens`,
            rounded up to 128, 192, 256, 384, 512 and so on, so that few sizes are compiled for.
        max_positions: the most that the model can do; the cache is never longer.
        chunk: tokens of each row that go through the model at a time in prompts.
        tokens_per_dispatch: 1 .. 64, instead of what the time of dispatches suggests.

    Raises:
        TypeError: ids, or a number of tokens or the seed, that are no integers.
        ValueError: no prompts, an empty one, ids out of the vocabulary, a setting out of its range, or a length that
            `max_length` or `max_positions` has no room for.
        FloatingPointError: by the iterator, where logits are NaN or +inf; tokens before that come first.
    """
    rows = [_ids(f"prompts[{row}]", prompt, vocab_size) for row, prompt in enumerate(prompts)]
    if not rows:
        raise ValueError("prompts: found none, expected at least one")
    for row, ids in enumerate(rows):
        if not ids.size:
            raise ValueError(f"prompts[{row}]: found no tokens, expected at least one")
    sampling = Sampling.of(
        len(rows), temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
    )
    # Python's numbers: sums of NumPy's small ones overflow.
    max_new_tokens = _integer("max_new_tokens", max_new_tokens, 0)
    chunk = _integer("chunk", chunk, 1)
    seed = _integer("seed", seed, 0, 2**32 - 1)
    if tokens_per_dispatch is not None:
        tokens_per_dispatch = _integer("tokens_per_dispatch", tokens_per_dispatch, 1, MAX_TOKENS_PER_DISPATCH)
    if max_length is not None:
        max_length = _integer("max_length", max_length, 1)
    stats = DecodingStats(prompt_tokens=sum(ids.size for ids in rows))
    cache_length = _cache_length(max(ids.size for ids in rows), max_new_tokens, max_length, max_positions)
    done = np.zeros(len(rows), np.bool_)
    stops = _padded(_ids("stop_tokens", list(stop_tokens), vocab_size))
    settings = Settings(sampling, row_keys(seed, len(rows)), jnp.asarray(stops))
    loop = _Loop(decoder, params, rows, settings, vocab_size, cache_length, chunk, stats, done)
    return Decoding(stats, cache_length, done, loop.steps(max_new_tokens, tokens_per_dispatch))


@dataclass
class _Loop:
    """The host's side: what it knows of each row between dispatches."""

    decoder: Decoder
    params: Any
    prompts: list[NDArray[np.int32]]
    settings: Settings
    vocab_size: int
    cache_length: int
    chunk: int
    stats: DecodingStats
    done: NDArray[np.bool_]
    """Rows that make no more tokens; shared with the `Decoding`, whose caller may end some."""

    def steps(self, max_new_tokens: int, tokens_per_dispatch: int | None) -> Iterator[Step]:
        if not max_new_tokens:
            return
        begin = time.perf_counter()
        cache = new_cache(self.decoder, self.params, len(self.prompts), self.cache_length)
        place = placement(cache)
        x, cache = prefill(self.decoder, self.params, self.prompts, cache, chunk=self.chunk)
        x.block_until_ready()
        self.stats.prefill_s = time.perf_counter() - begin

        # Where the next token of each row will stand.
        positions = np.array([ids.size for ids in self.prompts], np.int32)
        made, seen = first_token(self.decoder, self.params, self._seen(), x, positions, self.done, self.settings)
        step, tokens, fault = self._collected(made, positions)
        self.stats.first_token_s = time.perf_counter() - begin
        yield from self._delivered(step, fault)

        more_tokens = loop_for(cache)
        made_tokens, size, warm = 1, tokens_per_dispatch or 1, False
        while made_tokens < max_new_tokens and not self.done.all():
            begin = time.perf_counter()
            limit = min(size, max_new_tokens - made_tokens)
            made, cache, seen = more_tokens(
                self.decoder,
                place,
                self.params,
                cache,
                seen,
                tokens,
                positions - 1,
                self.done,
                np.int32(limit),
                self.settings,
            )
            step, tokens, fault = self._collected(made, positions)
            took_s = time.perf_counter() - begin
            if warm:
                self.stats.decode_s += took_s
                self.stats.decode_tokens += sum(map(len, step.ids))
            made_tokens, warm = made_tokens + limit, True
            if tokens_per_dispatch is None:
                size = _next_size(size, took_s)
            yield from self._delivered(step, fault)

    def _seen(self) -> NDArray[np.bool_]:
        seen = np.zeros((len(self.prompts), self.vocab_size), np.bool_)
        for row, ids in enumerate(self.prompts):
            seen[row, ids] = True
        return seen

    def _collected(self, made: Made, positions: NDArray[np.int32]) -> tuple[Step, NDArray[np.int32], str | None]:
        """The new tokens, the last one of each row, and what is wrong with them; waits for the device."""
        ids, logprobs, counts, done = map(np.asarray, made)
        step, fault = Step([], []), None
        for row, n in enumerate(counts.tolist()):
            row_ids = ids[row, :n].tolist()
            if row_ids and row_ids[-1] < 0:
                fault = fault or f"row {row}, position {positions[row] + n - 1}"
                row_ids.pop()
            step.ids.append(row_ids)
            step.logprobs.append(logprobs[row, : len(row_ids)].tolist())
        last = ids[np.arange(counts.size), np.maximum(counts - 1, 0)]
        positions += counts
        self.done |= done
        self.stats.new_tokens += sum(map(len, step.ids))
        return step, last, fault

    def _delivered(self, step: Step, fault: str | None) -> Iterator[Step]:
        if any(step.ids):
            yield step
        if fault:
            raise FloatingPointError(f"{fault}: found NaN or infinity in the logits, expected finite numbers")


def _next_size(size: int, took_s: float) -> int:
    if took_s < _SMOOTH_S:
        return min(2 * size, MAX_TOKENS_PER_DISPATCH)
    return max(size // 2, 1) if took_s > 2 * _SMOOTH_S else size


def _cache_length(longest: int, max_new_tokens: int, max_length: int | None, max_positions: int | None) -> int:
    if not max_new_tokens:
        return 0
    needed = longest + max_new_tokens
    for name, room in (("max_positions", max_positions), ("max_length", max_length)):
        if room is not None and needed > room:
            parts = f"{longest} tokens of a prompt and {max_new_tokens} new ones"
            raise ValueError(f"{name}: found {room}, expected at least {needed}: {parts}")
    if max_length is not None:
        if max_positions is not None and max_length > max_positions:
            raise ValueError(f"max_length: found {max_length}, expected at most {max_positions}, as max_positions says")
        return max_length
    power = 1 << (max(needed, _SMALLEST_CACHE) - 1).bit_length()
    bucket = power * 3 // 4 if needed <= power * 3 // 4 and power > _SMALLEST_CACHE else power
    return bucket if max_positions is None else min(bucket, max_positions)


def _ids(name: str, ids: ArrayLike, vocab_size: int) -> NDArray[np.int32]:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"{name}: found {array.ndim} axes, expected a sequence of tokens")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: found {array.dtype}, expected integers")
    for token in array[(array < 0) | (array >= vocab_size)]:
        raise ValueError(f"{name}: found token {token}, expected 0 .. {vocab_size - 1}")
    return array.astype(np.int32)


def _padded(stop_tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Padded with -2, which no token is, to one of few sizes."""
    size = max(_SMALLEST_STOP, 1 << max(stop_tokens.size - 1, 0).bit_length())
    return np.pad(stop_tokens, (0, size - stop_tokens.size), constant_values=-2)


def _integer(name: str, value: int, least: int, most: int | None = None) -> int:
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r}, expected an integer")
    if number < least or (most is not None and number > most):
        expected = f"at least {least}" if most is None else f"{least} .. {most}"
        raise ValueError(f"{name}: found {number}, expected {expected}")
    return number
