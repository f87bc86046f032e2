"""Prompts of any kind to what is generated: between a LanguageModel's arguments and the loop that makes tokens."""

import dataclasses
import functools
import reprlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from tensorport.reports import _Report, grouped, human_bytes
from tensorport.text import ChatReply, HarmonyDelta, HarmonyParser, TextStream, reply, stop_token_ids
from tensorport.text.decoding import Decoding, DecodingStats, decode
from tensorport.text.tokenizer import configured_ids

if TYPE_CHECKING:
    from tensorport.models.language_model import LanguageModel

__all__ = ["ChatStream", "Generation", "GenerationStats", "TextGeneration"]

FinishReason = Literal["stop", "length"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = 200


@dataclasses.dataclass(frozen=True, repr=False)
class GenerationStats(_Report):
    """What was generated, and how fast; of all rows together.

    Attributes:
        prompt_tokens: tokens of the prompts.
        new_tokens: tokens made, end tokens included.
        prefill_s: seconds for the prompts, to compile included where a size is new.
        first_token_s: seconds until the first tokens were there, to compile included; None if there are none.
        tokens_per_s: tokens per second after that, without what may have compiled; None if too few were made to tell.
        weight_bytes_per_step: bytes of weights that a step of all rows reads: one token of each. Of several rows at
            most so many, for they may share experts.
        cache_bytes: bytes of the cache of keys and values.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    first_token_s: float | None
    tokens_per_s: float | None
    weight_bytes_per_step: int
    cache_bytes: int

    def _lines(self) -> list[tuple[str, str]]:
        def seconds(value: float | None) -> str:
            return "none was made" if value is None else f"{value:.3f} s"

        rate = "too few to tell" if self.tokens_per_s is None else f"{self.tokens_per_s:.2f} tokens/s"
        return [
            ("prompt", f"{grouped(self.prompt_tokens)} tokens in {self.prefill_s:.3f} s"),
            ("new", f"{grouped(self.new_tokens)} tokens"),
            ("time to first token", seconds(self.first_token_s)),
            ("once compiled", rate),
            ("weights read per step", human_bytes(self.weight_bytes_per_step)),
            ("cache", human_bytes(self.cache_bytes)),
        ]


@dataclasses.dataclass(frozen=True, repr=False)
class Generation:
    """What was generated; each field is one for one prompt, and a list of them for several.

    Attributes:
        ids: new tokens, end tokens included.
        text: the text of them; None for prompts of ids.
        logprobs: natural logarithm of the probability of each new token by the model itself, before any setting.
        finish_reason: `stop`: an end token or `stop`; `length`: `max_new_tokens`.
        stats: times and rates.
    """

    ids: Any
    text: Any
    logprobs: Any
    finish_reason: Any
    stats: GenerationStats

    def __repr__(self) -> str:
        """All fields, long ones cut."""
        short = [f"{name}={_SHORT.repr(getattr(self, name))}" for name in ("ids", "text", "logprobs", "finish_reason")]
        return f"Generation({', '.join(short)}, stats={self.stats!r})"


class TextGeneration:
    """One call of :meth:`LanguageModel.generate`."""

    def __init__(
        self,
        model: "LanguageModel",
        prompt: Any,
        *,
        max_new_tokens: int,
        stop: str | int | Sequence[str | int] | None,
        ignore_eos: bool = False,
        stop_tokens: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        """Checks everything; computes nothing yet. `stop_tokens` are the end tokens besides the checkpoint's own."""
        self._model = model
        self._is_text, self._is_one, self._rows, self._is_array = _prompts(model, prompt)
        strings, ids = _stops(stop)
        if strings and not self._is_text:
            model.tokenizer  # noqa: B018 - strings cannot be found without it
        self._pad = padding_token(model)
        self._ends = [*ids] if ignore_eos else [*dict.fromkeys([*ids, *stop_tokens, *end_tokens(model)])]
        self._streams = [TextStream(model.tokenizer, strings) for _ in self._rows] if self._is_text or strings else None
        self._decoding: Decoding = decode(
            model.decoder,
            model.params,
            self._rows,
            vocab_size=model.decoder.vocab_size,
            max_positions=model.decoder.max_positions,
            max_new_tokens=max_new_tokens,
            stop_tokens=self._ends,
            **settings,
        )
        self._ids: list[list[int]] = [[] for _ in self._rows]
        self._logprobs: list[list[float]] = [[] for _ in self._rows]
        self._texts = ["" for _ in self._rows]

    def steps(self) -> Iterator[tuple[list[list[int]], list[str]]]:
        """New ids and new text of each row, as they come; at last what was held back."""
        for step in self._decoding:
            pieces = ["" for _ in self._rows]
            new = step.ids
            for row, ids in enumerate(step.ids):
                stream = None if self._streams is None else self._streams[row]
                if stream is not None:
                    if stream.stopped is not None:
                        new[row] = []
                        continue
                    before = stream.tokens_used
                    pieces[row] = stream.push(ids)
                    if stream.stopped is not None:
                        self._decoding.stop(row)
                        new[row] = ids[: stream.tokens_used - before]
                self._ids[row] += new[row]
                self._logprobs[row] += step.logprobs[row][: len(new[row])]
                self._texts[row] += pieces[row]
            yield new, pieces
        if self._streams is not None:
            rest = [stream.finish() for stream in self._streams]
            self._texts = [text + piece for text, piece in zip(self._texts, rest, strict=True)]
            if any(rest):
                yield [[] for _ in self._rows], rest

    def pieces(self) -> Iterator[Any]:
        """What is new, as it comes, in the form of the prompt."""
        for ids, texts in self.steps():
            new: list[Any] = list(texts) if self._is_text else list(ids)
            if any(new):
                yield new[0] if self._is_one else new

    def run(self) -> Generation:
        """Everything, when it is done."""
        for _ in self.steps():
            pass
        return self.result()

    def result(self) -> Generation:
        """What was made so far."""
        one = self._is_one
        reasons = [self._finish_reason(row) for row in range(len(self._rows))]
        return Generation(
            ids=self._ids[0] if one else self._ids,
            text=(self._texts[0] if one else self._texts) if self._is_text else None,
            logprobs=self._logprobs[0] if one else self._logprobs,
            finish_reason=reasons[0] if one else reasons,
            stats=self.stats(),
        )

    def plain(self, result: Generation) -> Any:
        """What `generate` returns without logprobs and stats."""
        if self._is_text:
            return result.text
        rows = [[*prompt, *new] for prompt, new in zip(self._rows, self._ids, strict=True)]
        if not self._is_array:
            return rows[0] if self._is_one else rows
        longest = max(map(len, rows))
        padded = np.array([row + [self._pad] * (longest - len(row)) for row in rows], np.int32)
        return padded[0] if self._is_one else padded

    def stats(self) -> GenerationStats:
        """Times and rates so far."""
        stats: DecodingStats = self._decoding.stats
        decoder, params, batch = self._model.decoder, self._model.params, len(self._rows)
        cache_bytes = 0
        if self._decoding.cache_length:
            make = functools.partial(decoder.empty_cache, params, batch, self._decoding.cache_length)
            cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))
        return GenerationStats(
            prompt_tokens=stats.prompt_tokens,
            new_tokens=sum(map(len, self._ids)),
            prefill_s=stats.prefill_s,
            first_token_s=stats.first_token_s,
            tokens_per_s=stats.decode_tokens_per_s,
            weight_bytes_per_step=decoder.bytes_per_token(params, batch),
            cache_bytes=cache_bytes,
        )

    def _finish_reason(self, row: int) -> FinishReason:
        stopped = self._streams is not None and self._streams[row].stopped is not None
        return "stop" if stopped or (self._ids[row][-1:] and self._ids[row][-1] in self._ends) else "length"


class ChatStream(Iterator[HarmonyDelta]):
    """An answer as it comes: pieces of text with their channels.

    Attributes:
        reply: the whole answer, when the iterator has ended; before, what there is so far.
    """

    def __init__(self, model: "LanguageModel", prompt: str, *, stop: Any = None, **settings: Any) -> None:
        """Checks everything; computes nothing yet."""
        tokenizer = model.tokenizer
        strings, ids = _stops(stop)
        self._parser = HarmonyParser(tokenizer, strings)
        self._generation = TextGeneration(
            model,
            # The template has put in what a tokenizer may add.
            [tokenizer.encode(prompt, add_special_tokens=False)],
            stop=ids,
            stop_tokens=stop_token_ids(tokenizer),
            **settings,
        )
        self._deltas = self._run()
        self._is_stopped = False

    def stop(self) -> None:
        """Ends the answer where it is: the iterator has what was held back, if anything, and then ends."""
        self._is_stopped = True

    def __next__(self) -> HarmonyDelta:
        """The next piece."""
        return next(self._deltas)

    def _run(self) -> Iterator[HarmonyDelta]:
        for (ids,), _ in self._generation.steps():
            yield from self._parser.push(ids)
            if self._is_stopped or self._parser.stopped is not None:
                break
        yield from self._parser.finish()

    @property
    def reply(self) -> ChatReply:
        """What there is so far, as an answer."""
        return reply(self._parser.messages, self._generation.stats())

    def run(self) -> ChatReply:
        """The whole answer."""
        for _ in self:
            pass
        return self.reply


def end_tokens(model: "LanguageModel") -> list[int]:
    """The checkpoint's own end tokens: its tokenizer's, or those of its configurations."""
    size = model.decoder.vocab_size
    return [token for token in configured_ids(model.folder, "eos_token_id") if token < size]


def padding_token(model: "LanguageModel") -> int:
    """What fills rows that ended early: the checkpoint's padding, else its first end token, else 0."""
    padding = [token for token in configured_ids(model.folder, "pad_token_id") if token < model.decoder.vocab_size]
    return next(iter([*padding, *end_tokens(model)]), 0)


def _prompts(model: "LanguageModel", prompt: Any) -> tuple[bool, bool, list[list[int]], bool]:
    """Whether it is text, whether it is one, the ids of each row, and whether these were an array."""
    if isinstance(prompt, str):
        return True, True, [model.tokenizer.encode(prompt)], False
    if _is_array(prompt):
        ids = np.asarray(prompt)
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise TypeError(f"prompt: found an array {ids.dtype} {list(ids.shape)}, expected integers [B, T] or [T]")
        return False, ids.ndim == 1, np.atleast_2d(ids).tolist(), True
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise TypeError(f"prompt: found {type(prompt).__name__}, expected a text, ids, or a list of either")
    rows = list(prompt)
    if rows and all(isinstance(row, str) for row in rows):
        return True, False, [model.tokenizer.encode(row) for row in rows], False
    if any(isinstance(row, str) for row in rows):
        raise TypeError("prompt: found texts and ids, expected one or the other")
    if rows and all(isinstance(row, float | int | np.generic) or (_is_array(row) and not row.ndim) for row in rows):
        return False, True, [np.asarray(rows).tolist()], False
    return False, False, [np.asarray(row).tolist() for row in rows], False


def _is_array(prompt: Any) -> bool:
    return isinstance(prompt, np.ndarray | jax.Array)


def _stops(stop: str | int | Sequence[str | int] | None) -> tuple[list[str], list[int]]:
    """Strings and ids."""
    stops = [] if stop is None else [stop] if isinstance(stop, str | int | np.integer) else list(stop)
    for item in stops:
        if not isinstance(item, str | int | np.integer) or isinstance(item, bool):
            raise TypeError(f"stop: found {item!r}, expected strings and token ids")
    return [item for item in stops if isinstance(item, str)], [int(item) for item in stops if not isinstance(item, str)]
