"""What a model computes: layer by layer without a cache, and again with one."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from numpy.typing import NDArray

from tensorport.text.decoder import new_cache
from tensorport.validation.report import LayerActivations

__all__ = ["activations", "cached_stream", "logits_of"]

_BLOCK: Final = 32
"""Tokens of a row that go through the model with a cache, or become logits, at a time: bounds memory."""

_STEPS: Final = 8
"""Tokens that go through it one by one, behind those."""


def activations(output: Any) -> LayerActivations:
    """The numbers that tell of a layer's output."""
    stream = np.asarray(output.stream).astype(np.float64)
    is_finite = np.isfinite(stream)
    finite = np.where(is_finite, stream, 0.0)
    used = None if output.experts is None else int(np.unique(np.asarray(output.experts)).size)
    return LayerActivations(
        name=output.name,
        rms=float(np.sqrt(np.mean(np.square(finite)))),
        largest=float(np.max(np.abs(finite))),
        nonfinite=int(np.count_nonzero(~is_finite)),
        experts_used=used,
        experts=None if used is None else output.num_experts,
    )


def cached_stream(decoder: Any, params: Any, input_ids: NDArray[np.int32]) -> NDArray[Any]:
    """The stream after the last norm [B, T, H], with a cache: the prompt in chunks, and its last tokens one by one."""
    rows, tokens = input_ids.shape
    steps = min(_STEPS, tokens // 2)
    cache = new_cache(decoder, params, rows, tokens)
    parts = []
    starts = [*range(0, tokens - steps, _BLOCK), *range(tokens - steps, tokens)]
    for start, end in zip(starts, [*starts[1:], tokens], strict=True):
        width = _BLOCK if start < tokens - steps else 1
        ids = np.zeros((rows, width), np.int32)
        ids[:, : end - start] = input_ids[:, start:end]
        positions = np.where(np.arange(width) < end - start, np.arange(start, start + width), -1).astype(np.int32)
        x, cache = _hidden(decoder, params, ids, cache, np.broadcast_to(positions, ids.shape))
        parts.append(np.asarray(x)[:, : end - start])
    return np.concatenate(parts, axis=1)


def logits_of(decoder: Any, params: Any, x: NDArray[Any]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Logits of [B, T, H], a few tokens at a time, and which ones these are."""
    for start in range(0, x.shape[1], _BLOCK):
        here = x[:, start : start + _BLOCK]
        padded = np.pad(here, ((0, 0), (0, _BLOCK - here.shape[1]), (0, 0)))
        yield slice(start, start + here.shape[1]), np.asarray(_logits(decoder, params, padded))[:, : here.shape[1]]


@partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def _hidden(
    decoder: Any, params: Any, tokens: Int32[Array, "b t"], cache: Any, positions: Int32[Array, "b t"]
) -> tuple[Float[Array, "b t h"], Any]:
    x, cache = decoder.hidden(params, tokens, cache, positions)
    return x, cache


@partial(jax.jit, static_argnames="decoder")
def _logits(decoder: Any, params: Any, x: Float[Array, "b t h"]) -> Float[Array, "b t v"]:
    logits: Array = decoder.logits(params, x)
    return logits.astype(jnp.float32)
