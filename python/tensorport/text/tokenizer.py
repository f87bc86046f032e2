"""A checkpoint's own tokenizer, and what its side files say about ids and chats."""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tensorport.errors import CheckpointError
from tensorport.text.template import render

if TYPE_CHECKING:
    from typing import Self

    import tokenizers

__all__ = ["Tokenizer", "configured_ids"]

_TOKENIZER: Final = "tokenizer.json"


class Tokenizer:
    """Text to ids and back, by the Hugging Face library `tokenizers`.

    Attributes:
        eos_token_ids: the ids that end a text, as generation_config.json has them; else those of config.json, else the
            `eos_token` of tokenizer_config.json.
        pad_token_id: from the same files; None where none of them names it.
        chat_template: the text of the Jinja template for chats, or None.
        special_tokens: `bos_token`, `eos_token` and so on, as text: chat templates may ask for them.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        eos_token_ids: Iterable[int] = (),
        pad_token_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Wraps a tokenizer of the library, which is not to be changed any more."""
        # Files may carry the limits of a training run; a prompt is never cut or padded silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> "Self":
        """Reads the tokenizer of a checkpoint or a converted tree, and the configurations beside it.

        Args:
            path: a folder with tokenizer.json; tokenizer_config.json, special_tokens_map.json, generation_config.json,
                config.json and chat_template.jinja are read where they are there.

        Raises:
            CheckpointError: there is no tokenizer.json, or one of the files is broken; names it.
            FileNotFoundError: there is no such folder.
            ImportError: the extra `text` is not installed.
        """
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        file = folder / _TOKENIZER
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: found no {_TOKENIZER}, expected the tokenizer of the checkpoint; "
                "without it prompts have to be ids, and so is what is generated"
            )
        try:
            import tokenizers  # noqa: PLC0415 - an extra
        except ImportError as fault:
            raise ImportError("text needs the library tokenizers: pip install 'tensorport[text]'") from fault
        content = file.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except BaseException as fault:
            # The library has no class of its own, and panics, at merges that do not fit, are no Exceptions.
            if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{file}: found no tokenizer that can be read, expected one: {fault}") from fault

        config = _read(folder / "tokenizer_config.json")
        special = _special_tokens(_read(folder / "special_tokens_map.json")) | _special_tokens(config)
        eos, pad = configured_ids(folder, "eos_token_id"), configured_ids(folder, "pad_token_id")
        if not eos and "eos_token" in special:
            eos = [id for id in [backend.token_to_id(special["eos_token"])] if id is not None]
        return cls(
            backend,
            eos_token_ids=eos,
            pad_token_id=pad[0] if pad else backend.token_to_id(special.get("pad_token", "")),
            chat_template=_chat_template(folder, config),
            special_tokens=special,
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are. Ids may be higher, for a vocabulary may have gaps."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens that are spelled in it, such as `<|end|>`, become their ids.

        Args:
            text: of any length.
            add_special_tokens: also what the tokenizer itself puts around a text, such as a beginning; gpt-oss's puts
                nothing.

        Raises:
            ValueError: the text has half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            wrong = ascii(text[fault.start])
            raise ValueError(f"text: found {wrong} at {fault.start}, expected characters of Unicode") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids without a token are left out; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is negative, or beyond 32 bits.
        """
        ids = [int(id) for id in ids]
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            wrong = next(id for id in ids if not 0 <= id < 2**32)
            raise ValueError(f"ids: found {wrong}, expected numbers between 0 and 2**32 - 1") from None

    def token_id(self, text: str) -> int | None:
        """The id of one token, such as `<|end|>`; None where it is none."""
        return self._backend.token_to_id(text)

    def token(self, id: int) -> str | None:  # noqa: A002 - the field's word
        """One token as the vocabulary spells it, or None; byte-level ones have letters of their own for bytes."""
        return self._backend.id_to_token(int(id)) if 0 <= id < 2**32 else None

    def is_special(self, id: int) -> bool:  # noqa: A002 - the field's word
        """Whether `skip_special_tokens` leaves the id out."""
        return id in self._special_ids

    def chat_prompt(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a chat by the checkpoint's own template, which puts the special tokens in: ready for `encode`.

        Arguments and failures are those of :func:`tensorport.text.render`; `variables` are the template's own, such as
        gpt-oss's `reasoning_effort`.

        Raises:
            CheckpointError: the checkpoint has no chat template.
        """
        if self.chat_template is None:
            raise CheckpointError(
                "found neither chat_template.jinja nor chat_template in tokenizer_config.json, expected one for a chat"
            )
        variables = {**self.special_tokens, **variables}
        return render(
            self.chat_template, messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def __repr__(self) -> str:
        """One line: how many tokens, which of them end a text."""
        chat = "a chat template" if self.chat_template else "no chat template"
        return f"Tokenizer({self.vocab_size} tokens, eos_token_ids={self.eos_token_ids}, {chat})"


def _read(file: Path) -> dict[str, Any]:
    """A configuration, or nothing where there is no such file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{file}: found no JSON, expected an object: {fault}") from fault
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: found {type(config).__name__}, expected a JSON object")
    return config


def configured_ids(folder: Path, field: str) -> list[int]:
    """What the first configuration that has the field says: an id or a list of them; no tokenizer is needed."""
    for name in ("generation_config.json", "config.json"):
        value = _read(folder / name).get(field)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(id) is int and 0 <= id < 2**32 for id in ids):
            raise CheckpointError(f"{folder / name}: {field}: found {value!r}, expected an id or a list of ids")
        return ids
    return []


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`eos_token` and the like: each is a text, or an object with the text as its content."""
    tokens = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        pass
    except UnicodeDecodeError as fault:
        raise CheckpointError(f"{file}: found no UTF-8, expected a template: {fault}") from fault
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        name = folder / "tokenizer_config.json"
        raise CheckpointError(f"{name}: chat_template: found {type(template).__name__}, expected a text")
    return template
