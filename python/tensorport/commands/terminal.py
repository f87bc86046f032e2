"""What a terminal is shown: text without control characters, dimmed where that is wanted and possible."""

import os
import sys
import unicodedata
from typing import Final, TextIO

__all__ = ["dim", "encodable", "has_colors", "is_terminal", "note", "visible"]

# Marks that make a terminal show text in another order than it has: Unicode, Bidirectional Algorithm, 2.
_REORDERING: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """The text with what would drive a terminal spelled out; newlines, tabs and all of Unicode's spaces stay."""
    return "".join(f"\\u{ord(c):04x}" if _drives(c) else c for c in text)


def _drives(character: str) -> bool:
    if character in "\n\t":
        return False
    return character in _REORDERING or unicodedata.category(character) in ("Cc", "Cs")


def encodable(text: str, stream: TextIO) -> str:
    """The text with what the encoding of a stream lacks spelled out."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at it; None is a stream that was closed before Python started."""
    return stream is not None and stream.isatty()


def has_colors(stream: TextIO | None) -> bool:
    """Whether escape codes may be written: no-color.org, and terminals that know none."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dim(text: str) -> str:
    """The text in a weaker colour."""
    return f"\x1b[2m{text}\x1b[22m"


def note(text: str) -> None:
    """Writes a line to standard error, where all but results goes."""
    if sys.stderr is not None:
        print(encodable(visible(text), sys.stderr), file=sys.stderr, flush=True)
