"""LanguageModel: logits, text from text, chats; and load_model, which makes one of a checkpoint."""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer
from numpy.typing import NDArray

from tensorport.errors import CheckpointError
from tensorport.kernels.registry import ImplementationName
from tensorport.models.generation import ChatStream, TextGeneration
from tensorport.models.registry import Loaded, architecture_of
from tensorport.progress import Progress
from tensorport.reports import LoadReport, human_bytes
from tensorport.sharding import ShardingLike
from tensorport.source import local_path
from tensorport.text import Tokenizer

__all__ = ["LanguageModel", "load_model"]

_CHAT_SETTINGS: Final = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "chunk")
"""What `chat` takes as `generate` does. A reply has its stats; the end of an answer is the format's."""

Prompt = str | Sequence[str] | Integer[ArrayLike, "b t"] | Sequence[Sequence[int]]


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike = "bfloat16",
    sharding: ShardingLike | None = None,
    mesh: Mesh | None = None,
    implementation: ImplementationName = "auto",
    workers: int | None = None,
    progress: Progress = False,
) -> "LanguageModel":
    """Loads a model of any kind that tensorport runs, from checkpoint to text.

    >>> model = tensorport.load_model("openai/gpt-oss-20b")
    >>> model.generate("The capital of France is", max_new_tokens=8, temperature=0)

    Weights come as :func:`tensorport.load_params` brings them: on CPU without a copy where their file is aligned, which
    every tree that `convert` wrote is. MXFP4 stays at 4 bits.

    Args:
        source: a checkpoint in the layout of Hugging Face or the publisher's, or a converted tree, with its
            config.json; see :func:`tensorport.open`.
        dtype: of weights that are not MXFP4, and of the computation: bfloat16 or float32.
        sharding: see :func:`tensorport.load_params`; by default the model's own rules for `mesh`, or JAX's default
            device.
        mesh: devices to spread the model over.
        implementation: of the products; see :func:`tensorport.kernels.explain`.
        workers: threads that read; all cores by default.
        progress: False, True for a bar, or a callable that gets a :class:`ProgressEvent`.

    Raises:
        CheckpointError: no config.json, a kind of model that there is not (lists those there are), a field of
            config.json that is missing, unknown or not supported, or wrong bytes.
        MappingError: tensors that do not fit the configuration, or a mesh that does not divide the model.
        OSError: the system refused.
        ValueError: an argument is out of its range.
    """
    source = local_path(source, progress)
    fields, file = read_config(source)
    architecture = architecture_of(fields, str(file))
    loaded = architecture.load(
        source,
        fields,
        str(file),
        dtype=dtype,
        sharding=sharding,
        mesh=mesh,
        implementation=implementation,
        workers=workers,
        progress=progress,
    )
    return LanguageModel(loaded, file.parent)


def read_config(source: str | os.PathLike[str]) -> tuple[dict[str, Any], Path]:
    """The config.json of a checkpoint, beside its tensors, and where it is.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
        FileNotFoundError: there is no such source.
    """
    path = local_path(source)
    path.stat()
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: found no config.json, expected one beside the tensors") from None
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{file}: found no JSON, expected an object: {fault}") from fault
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: found {type(fields).__name__}, expected a JSON object")
    return fields, file


class LanguageModel:
    """A model in memory, with its tokenizer.

    Attributes:
        config: sizes and constants, by the model's kind.
        params: weights; a pytree.
        decoder: the model's functions, which take `params`.
        report: what loading took.
        folder: where config.json is, and the tokenizer if there is one.
    """

    def __init__(self, loaded: Loaded, folder: Path) -> None:
        """Wraps what a registered architecture loaded."""
        self.decoder = loaded.decoder
        self.params = loaded.params
        self.config = loaded.decoder.config
        self.report: LoadReport = loaded.report
        self.folder = folder

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer, read when it is first used.

        Raises:
            CheckpointError: the checkpoint has none; ids still work.
            ImportError: the extra `text` is not installed.
        """
        return Tokenizer.from_directory(self.folder)

    def __call__(self, input_ids: Integer[ArrayLike, "b t"]) -> Float[Array, "b t v"]:
        """Logits of the token after each of `input_ids`, in float32, on the model's device.

        No cache: for the logits of whole sequences. Compiled once for each shape.

        Raises:
            ValueError: no integers, not two axes, no tokens, or ids out of the vocabulary.
        """
        # What is already on a device is not brought back to be looked at: ids out of the vocabulary become NaN there.
        ids = input_ids if isinstance(input_ids, jax.Array) else _rows(np.asarray(input_ids), self.decoder.vocab_size)
        if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"input_ids: found {ids.dtype} {ids.shape}, expected integers [B, T], at least one")
        logits: Array = _logits(self.decoder, self.params, ids)
        return logits

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: str | int | Sequence[str | int] | None = None,
        ignore_eos: bool = False,
        stream: bool = False,
        logprobs: bool = False,
        stats: bool = False,
        chunk: int = 512,
    ) -> Any:
        """Continues a prompt, or several at once.

        Each row ends at one of the model's end tokens, at `stop`, or after `max_new_tokens`. What a row becomes depends
        on its prompt, the settings, the seed and its number in the batch.

        Args:
            prompt: a text or several, whose tokens are exactly the text's (a chat goes through :meth:`chat`); ids
                [B, T], or rows of ids of any lengths.
            max_new_tokens: for each row.
            temperature: 0 takes the most likely token each time.
            top_k: only that many of the most likely tokens are drawn from.
            top_p: only the most likely tokens that together have this probability.
            repetition_penalty: logits of tokens that were there, also in the prompt, are divided by this if positive
                and multiplied if negative.
            seed: of the draws.
            stop: strings and token ids at which a row ends, besides the model's own. Strings need a tokenizer, and are
                not part of the text.
            ignore_eos: go on at the model's own end tokens.
            stream: return an iterator of what is new, as it comes: pieces of text, or ids, for one prompt; lists of
                them, one for each row, for several. Pieces are whole characters and never a part of a stop string.
            logprobs: return a :class:`Generation` with the logarithm of the probability of each new token, before any
                setting of sampling.
            stats: return a :class:`Generation` with times and rates.
            chunk: tokens of a prompt that go through the model at a time; bounds memory.

        Returns:
            A text for a text, and a list of texts for several: what is new. For ids [B, T] ids [B, T + N], prompt
            included, rows that ended early padded with the tokenizer's padding or else the model's first end token;
            for rows of ids a list of lists. With `logprobs` or `stats` a :class:`Generation`.

        Raises:
            CheckpointError: text without a tokenizer in the checkpoint.
            FloatingPointError: the model's logits are not finite.
            ImportError: text, and the extra `text` is not installed.
            TypeError, ValueError: an argument is out of its range, or prompt and new tokens are more than the model has
                positions for.
        """
        generation = TextGeneration(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            chunk=chunk,
        )
        if stream:
            if logprobs or stats:
                raise ValueError("stream: found it with logprobs or stats, expected one or the other")
            return generation.pieces()
        result = generation.run()
        return result if logprobs or stats else generation.plain(result)

    def chat(
        self,
        messages: str | Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        max_new_tokens: int = 1024,
        stream: bool = False,
        **settings: Any,
    ) -> Any:
        """Answers the last of `messages`, by the checkpoint's own chat template.

        >>> messages = [{"role": "user", "content": "What is 2 + 2?"}]
        >>> reply = model.chat(messages)
        >>> print(reply.text)
        >>> messages.append(reply.message)

        Args:
            messages: dicts with `role` and `content`, as chat templates take them; a text is one message of the user.
            tools: functions that the model may call, as JSON schemas in the form of OpenAI's API.
            reasoning_effort: `low`, `medium` or `high`, for templates that know it.
            max_new_tokens: reasoning included.
            stream: return an iterator of :class:`tensorport.text.HarmonyDelta`, whose `reply` is there at the end.
            **settings: of :meth:`generate`: `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`, `stop`,
                `chunk`.

        Returns:
            A :class:`tensorport.text.ChatReply`: `text`, `analysis`, `tool_calls`, `message` to append, `stats`.

        Raises:
            CheckpointError: the checkpoint has no tokenizer or no chat template.
            TypeError: a setting that there is not.
            ValueError: the template refuses the messages, or a setting is out of its range.
        """
        for name in settings.keys() - _CHAT_SETTINGS:
            raise TypeError(f"chat: found the argument {name!r}, expected some of {', '.join(_CHAT_SETTINGS)}")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        variables: dict[str, Any] = {} if reasoning_effort is None else {"reasoning_effort": reasoning_effort}
        prompt = self.tokenizer.chat_prompt(messages, tools=tools, **variables)
        answer = ChatStream(self, prompt, max_new_tokens=max_new_tokens, **settings)
        return answer if stream else answer.run()

    def __repr__(self) -> str:
        """What it is, how large, and where from."""
        nbytes = sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self.params))
        return f"<LanguageModel {type(self.decoder).__name__} from {str(self.folder)!r}: {human_bytes(nbytes)}>"


@functools.partial(jax.jit, static_argnums=0)
def _logits(decoder: Any, params: Any, ids: Integer[Array, "b t"]) -> Float[Array, "b t v"]:
    logits: Array = decoder.forward(params, ids)
    return logits


def _rows(ids: NDArray[Any], vocab_size: int) -> NDArray[Any]:
    if ids.dtype.kind in "iu" and ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"input_ids: found {ids.min()} .. {ids.max()}, expected ids between 0 and {vocab_size - 1}")
    return ids
