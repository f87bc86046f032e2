"""The answers of gpt-oss: harmony messages in channels, parsed as their ids come, whatever a model makes of the format.

Source: openai/harmony, docs/format.md for the format, src/encoding.rs for how headers are read.
"""

import dataclasses
import enum
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tensorport.text.stream import TextStream
from tensorport.text.tokenizer import Tokenizer

__all__ = [
    "CHANNELS",
    "ChatReply",
    "HarmonyDelta",
    "HarmonyMessage",
    "HarmonyParser",
    "ToolCall",
    "reply",
    "stop_token_ids",
]

CHANNELS: Final = ("analysis", "commentary", "final")

_ROLES: Final = ("assistant", "user", "system", "developer", "tool")

_CONSTRAIN: Final = "<|constrain|>"

# Tokens behind which a model that follows the format says no more. `<|end|>` ends a message, not an answer.
_STOPS: Final = ("<|return|>", "<|call|>", "<|endoftext|>")

# Headers are a role, a recipient, a channel and a type; a longer one is a text whose beginning looks like a header.
_HEADER_TOKENS: Final = 64


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer: `<|return|>`, `<|call|>`, `<|endoftext|>`, and the tokenizer's `eos_token_ids`."""
    own = [id for id in map(tokenizer.token_id, _STOPS) if id is not None]
    return list(dict.fromkeys([*own, *tokenizer.eos_token_ids]))


@dataclasses.dataclass(frozen=True)
class HarmonyDelta:
    """More text of one message.

    Attributes:
        channel: `analysis`, `commentary` or `final`.
        recipient: whom it is for, such as `functions.get_weather`; None for the user.
        text: what was added.
    """

    channel: str
    recipient: str | None
    text: str


@dataclasses.dataclass(frozen=True)
class HarmonyMessage:
    """One message.

    Attributes:
        role: `assistant`, unless the model wrote the words of somebody else.
        channel: `analysis`, `commentary` or `final`; `final` where the model named none of them.
        recipient: whom it is for, such as `functions.get_weather`; None for the user.
        content_type: such as `<|constrain|>json`, or None.
        content: the text.
    """

    role: str
    channel: str
    recipient: str | None
    content_type: str | None
    content: str


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a function that the model asks for.

    Attributes:
        name: without `functions.`.
        arguments: as the model wrote them.
        parsed: the arguments as a dict; None where they are no JSON object.
    """

    name: str
    arguments: str
    parsed: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, repr=False)
class ChatReply:
    """What a model answered.

    Attributes:
        text: the answer for the user: all of the channel `final`.
        analysis: the model's reasoning, not meant for users; messages are lines.
        commentary: what it told the user beside calls of tools.
        tool_calls: functions to call; answer each with a message `{"role": "tool", "content": result}`.
        stats: what the caller measured, or None.
    """

    text: str
    analysis: str = ""
    commentary: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    stats: Any = None

    @property
    def message(self) -> dict[str, Any]:
        """The message to append to the history, in the form that the chat template of gpt-oss reads.

        Beside a call of a tool the template takes reasoning or text, not both, and shows either as reasoning: text
        gives way. The reasoning of other answers is dropped when a later question is asked.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["content"] = "" if self.analysis else self.commentary + self.text
            # A template writes arguments as JSON: given as text they would be quoted twice.
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if call.parsed is None else call.parsed,
                    },
                }
                for call in self.tool_calls
            ]
        if self.analysis:
            message["thinking"] = self.analysis
        return message

    def __str__(self) -> str:
        """The text for the user."""
        return self.text

    def __repr__(self) -> str:
        """The fields that hold something, long texts cut."""
        shown = [f"text={_cut(self.text)}"]
        shown += [f"{name}={_cut(getattr(self, name))}" for name in ("analysis", "commentary") if getattr(self, name)]
        if self.tool_calls:
            shown.append(f"tool_calls={self.tool_calls!r}")
        if self.stats is not None:
            shown.append(f"stats={self.stats!r}")
        return f"ChatReply({', '.join(shown)})"


def reply(messages: Iterable[HarmonyMessage], stats: Any = None) -> ChatReply:
    """One answer from the messages that a model wrote."""
    messages = list(messages)
    calls = [message for message in messages if message.recipient is not None]
    texts = {
        channel: [message.content for message in messages if message.channel == channel and message not in calls]
        for channel in CHANNELS
    }
    return ChatReply(
        text="".join(texts["final"]),
        analysis="\n".join(texts["analysis"]),
        commentary="\n".join(texts["commentary"]),
        tool_calls=tuple(
            ToolCall(str(call.recipient).removeprefix("functions."), call.content, _json_object(call.content))
            for call in calls
        ),
        stats=stats,
    )


class _State(enum.Enum):
    HEADER = enum.auto()
    CONTENT = enum.auto()


class HarmonyParser:
    """Reads the ids that a model writes behind a prompt that ends with `<|start|>assistant`.

    What is malformed never raises and never gets lost: text without a header counts as an answer, in the channel
    `final`, and a header without an end too. The texts of the deltas of a message are its content. How ids are spread
    over calls of `push` changes nothing but the pieces.

    Attributes:
        messages: those that have ended; all of them after `finish`.
        stopped: the stop string that was met, or None; nothing that comes behind it counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        """Begins an answer; a tokenizer without harmony's special tokens makes all of it one message.

        Args:
            tokenizer: whose ids they are.
            stop: strings at which the answer ends, if they are in the channel `final`; not part of it.
        """
        self._tokenizer = tokenizer
        self._stop = stop
        self.stopped: str | None = None
        self._start, self._channel, self._message = map(tokenizer.token_id, ("<|start|>", "<|channel|>", "<|message|>"))
        self._ends = {*stop_token_ids(tokenizer), tokenizer.token_id("<|end|>")}
        self._markers = {self._channel, tokenizer.token_id(_CONSTRAIN)}
        self._state = _State.HEADER
        self._role: str | None = "assistant"  # None behind `<|start|>`, where the header names it
        self._header: list[int] = []
        self._stream = TextStream(tokenizer)
        self._current: HarmonyMessage | None = None  # whose content is coming
        self._pieces: list[str] = []
        self.messages: list[HarmonyMessage] = []

    def push(self, ids: Iterable[int]) -> list[HarmonyDelta]:
        """The text that these ids add, one delta for each message that they touch."""
        deltas: list[HarmonyDelta] = []
        for token_id in ids:
            if self.stopped is not None:
                break
            self._push(int(token_id), deltas)
            self.stopped = self._stream.stopped
        return deltas

    def finish(self) -> list[HarmonyDelta]:
        """What was held back, when no more ids come. A header that was cut off holds no text and is dropped."""
        deltas: list[HarmonyDelta] = []
        if self._state is _State.CONTENT or not self._is_cut_header():
            self._end(deltas)
        self._header = []
        return deltas

    def _push(self, token_id: int, deltas: list[HarmonyDelta]) -> None:
        if token_id in self._ends or token_id == self._start:
            self._end(deltas)
            self._role = None if token_id == self._start else "assistant"
        elif token_id == self._channel and (self._state is _State.CONTENT or token_id in self._header):
            # The next message, without its `<|start|>assistant`.
            self._end(deltas)
            self._role, self._header = "assistant", [token_id]
        elif self._state is _State.CONTENT:
            self._add(self._stream.push([token_id]), deltas)
        elif token_id == self._message:
            self._begin(_parse_header(self._header_text(), self._role))
        elif token_id in self._markers or not self._tokenizer.is_special(token_id):
            self._header.append(token_id)
            if not _may_be_header(self._header_text(), self._role) or len(self._header) > _HEADER_TOKENS:
                self._begin_malformed(deltas)

    def _header_text(self) -> str:
        return self._tokenizer.decode(self._header, skip_special_tokens=False)

    def _begin(self, message: HarmonyMessage) -> None:
        self._state, self._current, self._header, self._pieces = _State.CONTENT, message, [], []
        self._stream = TextStream(self._tokenizer, self._stop if message.channel == "final" else ())

    def _begin_malformed(self, deltas: list[HarmonyDelta]) -> None:
        """Makes a message of what is no header: its text is content, behind a channel's name if there is one."""
        header = self._header
        name = _first_word(self._header_text().partition("<|channel|>")[2])
        self._begin(HarmonyMessage("assistant", name if name in CHANNELS else "final", None, None, ""))
        marker = next((place for place, token_id in enumerate(header) if token_id == self._channel), len(header))
        before, behind = self._stream.push(header[:marker]), self._stream.push(header[marker:])
        if name in CHANNELS:
            before, behind = "", _without_first(behind, CHANNELS)
        elif self._role is None:
            before = _without_first(before, _ROLES)
        self._add(before + behind, deltas)

    def _add(self, text: str, deltas: list[HarmonyDelta]) -> None:
        if not text or self._current is None:
            return
        self._pieces.append(text)
        channel, recipient = self._current.channel, self._current.recipient
        if deltas and len(self._pieces) > 1 and (deltas[-1].channel, deltas[-1].recipient) == (channel, recipient):
            deltas[-1] = dataclasses.replace(deltas[-1], text=deltas[-1].text + text)
        else:
            deltas.append(HarmonyDelta(channel, recipient, text))

    def _end(self, deltas: list[HarmonyDelta]) -> None:
        if self._state is _State.HEADER and (self._header_text().strip()):
            self._begin_malformed(deltas)
        if self._state is _State.CONTENT and self._current is not None:
            self._add(self._stream.finish(), deltas)
            self.messages.append(dataclasses.replace(self._current, content="".join(self._pieces)))
        self._state, self._current, self._header = _State.HEADER, None, []

    def _is_cut_header(self) -> bool:
        """Whether the header so far is the beginning of a right one, and not a short text."""
        before, marker, behind = self._header_text().partition("<|channel|>")
        role = "assistant" if self._role is not None else _first_word(before)
        is_role = any(known.startswith(role) for known in _ROLES)
        is_channel = any(known.startswith(_first_word(behind)) for known in CHANNELS)
        return (bool(marker) or self._role is None) and is_role and is_channel


def _parse_header(text: str, role: str | None) -> HarmonyMessage:
    """A message without content; as the parser of openai/harmony reads headers, but for channels that there are not."""
    before, _, behind = text.partition("<|channel|>")
    channel = _first_word(behind)
    behind = behind.lstrip()[len(channel) :]
    words = _words(before)
    if role is None:
        role = words.pop(0) if words and not words[0].startswith("to=") else "assistant"
    words += _words(behind)
    recipient = next((word.removeprefix("to=") for word in words if word.startswith("to=")), None)
    rest = [word for word in words if not word.startswith("to=")]
    content_type = None
    if rest and (recipient is not None or len(rest) > 1 or rest[-1].startswith(_CONSTRAIN)):
        content_type = rest.pop()
    if rest and recipient is None:
        recipient = rest.pop()
    return HarmonyMessage(role, channel if channel in CHANNELS else "final", recipient or None, content_type, "")


def _may_be_header(text: str, role: str | None) -> bool:
    """Whether more ids can make this the header of a message."""
    before, marker, behind = text.partition("<|channel|>")
    words = _words(before)
    if role is None:
        words = words[1:]
    elif not marker and words and not words[0].startswith("to="):
        # Without a role only a recipient may stand here, or the beginning of one.
        return len(words) == 1 and "to=".startswith(words[0])
    return len(words) + max(0, len(_words(behind)) - 1) <= 2  # a recipient and a content type


def _words(text: str) -> list[str]:
    # The marker of a content type is a word's beginning, wherever a model puts blanks.
    return re.sub(r"\s*<\|constrain\|>\s*", f" {_CONSTRAIN}", text).split()


def _first_word(text: str) -> str:
    match = re.match(r"\s*([^\s<]*)", text)
    return match[1] if match else ""


def _without_first(text: str, words: tuple[str, ...]) -> str:
    word = _first_word(text)
    return text.lstrip().removeprefix(word).lstrip() if word in words else text


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _cut(text: str, size: int = 200) -> str:
    return repr(text) if len(text) <= size else f"{text[: size - 1]!r}… ({len(text)} characters)"
