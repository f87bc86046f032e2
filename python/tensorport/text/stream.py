"""Ids to text as they come, without half a character and without what may become a stop string."""

from collections.abc import Iterable, Sequence
from typing import Final

from tensorport.text.tokenizer import Tokenizer

__all__ = ["TextStream"]

_REPLACEMENT: Final = "\ufffd"

# Ids that are decoded together, at most, and those of them that stay then. Four would do for bytes, for a character has
# no more of them; one for decoders that treat the first token of a text in a way of its own.
_WINDOW_TOKENS: Final = 32
_CONTEXT_TOKENS: Final = 8


class TextStream:
    """Turns ids into text piece by piece; the pieces together are `decode` of all ids, cut at the first stop string.

    A stop string is met as soon as its last character is there; of two that end at the same character the longer one
    counts. How ids are spread over calls of `push` makes no difference. An id costs the decoding of a few tokens,
    however long the text is.

    Attributes:
        stopped: the stop string that was met, or None. Neither it nor what follows is ever given out.
        tokens_used: ids pushed so far, those of the stop string included; ids behind it do not count.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """Begins a text.

        Args:
            tokenizer: whose ids they are.
            stop: strings at which the text ends, which tokens may spell in any way.
            skip_special_tokens: leave special tokens out, as `decode` does.

        Raises:
            ValueError: a stop string is empty.
        """
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("stop: found an empty string, expected strings of at least one character")
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._window_shown = 0  # characters of the window's text that went on to the search for stop strings
        self._held = ""  # what may become a stop string
        self.stopped: str | None = None
        self.tokens_used = 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; empty once a stop string was met.

        Raises:
            ValueError: an id is negative, or beyond 32 bits.
        """
        pieces = []
        for token_id in ids:
            if self.stopped is not None:
                break
            self.tokens_used += 1
            pieces.append(self._search(self._decoded(int(token_id))))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text, with what was held back; nothing more comes behind it."""
        if self.stopped is not None:
            return ""
        text = self._search(self._window_text()[self._window_shown :])
        text, self._held = text + self._held, ""
        self._window, self._window_shown = [], 0
        return text

    def _window_text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)

    def _decoded(self, token_id: int) -> str:
        """The characters that no later id can change."""
        token = self._tokenizer.token(token_id)
        if token is None or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            self._tokenizer.decode([token_id])  # refuses what is no id
            return ""  # `decode` leaves it out before it joins the others
        self._window.append(token_id)
        if _is_byte(token):
            return ""  # a run of them is one text or, if the last is wrong, none
        text = self._window_text()
        # Of bytes that are no UTF-8, all but the last are settled: what follows may complete a character.
        settled = len(text) - text.endswith(_REPLACEMENT)
        piece, self._window_shown = text[self._window_shown : settled], max(settled, self._window_shown)
        if len(self._window) >= _WINDOW_TOKENS:
            # What comes next depends on the newest ids alone; a character at most has not been shown yet.
            unshown = len(text) - self._window_shown
            del self._window[:-_CONTEXT_TOKENS]
            self._window_shown = len(self._window_text()) - unshown
        return piece

    def _search(self, text: str) -> str:
        """What of the held and the new text can be given out."""
        if not self._stop:
            return text
        text = self._held + text
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if ends:
            end, _, self.stopped = min(ends)
            self._held = ""
            return text[: end - len(self.stopped)]
        held = max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown]


def _is_byte(token: str) -> bool:
    """Whether it is a byte of a vocabulary with byte fallback, such as `<0xE2>`."""
    return len(token) == len("<0xE2>") and token.startswith("<0x") and token.endswith(">")
