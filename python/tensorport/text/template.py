"""Chat templates: Jinja from a checkpoint, which is not to be trusted, in a sandbox set up as transformers does."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["render"]

# What a message may call the model's reasoning. Templates of gpt-oss read `thinking`, others `reasoning_content`.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    *,
    tools: Iterable[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a chat by a Jinja template, as `apply_chat_template(tokenize=False)` of transformers renders it.

    The template runs in Jinja's sandbox and sees nothing but plain JSON: it cannot reach Python's internals, change
    what it was given, or loop over a range of more than 100,000.

    Args:
        template: its text, :attr:`Tokenizer.chat_template`.
        messages: dicts with `role`, `content` and what else the template reads; keys that are None are left out.
        tools: functions that the model may call, as `{"type": "function", "function": {"name": ..., "description": ...,
            "parameters": JSON schema}}`.
        add_generation_prompt: end with the beginning of the assistant's answer.
        **variables: what else the template reads, such as `reasoning_effort="high"`.

    Raises:
        ValueError: the template is broken, refuses these messages, or wants what the sandbox forbids; says what and,
            where Jinja knows it, the line.
        TypeError: messages, tools or variables are no plain data.
        ImportError: the extra `text` is not installed.
    """
    chat = [_message(message) for message in messages]
    given = {
        "documents": None,  # templates of retrieval models compare it with none
        **_plain("variables", variables),
        "messages": chat,
        "tools": None if tools is None else _plain("tools", list(tools)),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        from tensorport.text.sandbox import FAULTS, compile_template  # noqa: PLC0415 - an extra
    except ImportError as fault:
        raise ImportError("chat templates need Jinja: pip install 'tensorport[text]'") from fault
    try:
        return compile_template(template).render(given)
    except FAULTS as fault:
        line = getattr(fault, "lineno", None)
        where = "chat template" if line is None else f"chat template, line {line}"
        raise ValueError(f"{where}: {str(fault) or type(fault).__name__}") from fault


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"messages: found {type(message).__name__}, expected dicts with role and content")
    plain: dict[str, Any] = _plain("messages", {key: value for key, value in message.items() if value is not None})
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(name: str, value: object) -> Any:
    """A copy of nothing but JSON's types: an object with methods would be a way out of the sandbox."""

    def fields(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise TypeError(f"{name}: found {type(value).__name__}, expected texts, numbers, lists and dicts")

    return json.loads(json.dumps(value, default=fields))
