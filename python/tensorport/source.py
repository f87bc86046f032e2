"""What a `source` names: a path, or with the extra `hub` a repository. The one place that tells them apart."""

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorport import _core, orbax
from tensorport.hub.ids import SCHEME, HubId, parse
from tensorport.progress import Progress

__all__ = ["LocalSource", "arriving_source", "headers_source", "local_path"]


class _SourceNotFoundError(FileNotFoundError):
    """A source that is neither a path nor an id."""

    def __str__(self) -> str:
        return str(self.strerror)


def local_path(source: str | os.PathLike[str], progress: Progress = False, *, name: str = "source") -> Path:
    """The path that `source` names; what it names on a hub is downloaded, unless it is in the cache.

    A checkpoint that orbax wrote is copied into a file that can be read, see :mod:`tensorport.orbax`.

    A path that exists wins. Otherwise `org/name[@revision][/subfolder]` is an id, and `hf://` forces that reading; only
    strings are ids.

    Args:
        source: a path or an id.
        progress: of a download.
        name: of the argument, for messages.

    Raises:
        CheckpointError: the hub refuses, or has no such repository, revision, folder or checkpoint.
        ConnectionError: the hub does not answer, and the cache has no copy.
        FileNotFoundError: neither a path nor an id; says why.
        ImportError: it is an id, and the extra `hub` is not installed.
        ValueError: it is empty, or `hf://` stands before what is no id.
    """
    found = _parsed(source, name)
    if isinstance(found, Path):
        return _readable(found)
    downloaded: Path = _hub("snapshot", found).download(found, progress)
    return downloaded


class LocalSource:
    """A source on this machine, or of which a part is still on its way. A context manager, which stops what is.

    Attributes:
        path: where it is.
        arrivals: what tells of its files; None where all are here.
    """

    arrivals: _core.Arrivals | None = None

    def __init__(self, path: Path) -> None:
        """A source that is here."""
        self.path = path

    def watched(self, callback: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A callback of a job that tells of the download, too."""
        return callback

    def finish(self) -> None:
        """Nothing more is needed than what came."""

    def raise_fault(self) -> None:
        """Raises what ended the download, if something did."""

    def close(self) -> None:
        """Stops what is on its way, and lets go of what was made for it."""

    def __enter__(self) -> "LocalSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def arriving_source(source: str | os.PathLike[str], progress: Progress = False) -> LocalSource:
    """As :func:`local_path`, for a conversion: what it names on a hub may be on its way while it is read."""
    found = _parsed(source, "source")
    if isinstance(found, Path):
        return LocalSource(_readable(found))
    arriving: LocalSource = _hub("arriving", found).arriving(found, progress)
    return arriving


def headers_source(source: str | os.PathLike[str], progress: Progress = False) -> LocalSource:
    """As :func:`local_path`, for those who read headers and side files alone: nothing else is downloaded."""
    found = _parsed(source, "source")
    if isinstance(found, Path):
        return LocalSource(_readable(found))
    headers: LocalSource = _hub("arriving", found).headers_alone(found, progress)
    return headers


def _readable(path: Path) -> Path:
    """The path itself, or that of what it is copied to before it can be read."""
    return orbax.staged(path) if orbax.is_checkpoint(path) else path


def _parsed(source: str | os.PathLike[str], name: str) -> Path | HubId:
    text = os.fspath(source)
    # Path("") is the current folder, which an unset variable should not mean.
    if not text:
        raise ValueError(f"{name}: found an empty path, expected a file or a folder")
    path = Path(source)
    if not isinstance(source, str):
        if not _exists(path):
            raise _missing(text, "which only a string can be")
        return path
    is_forced = source.startswith(SCHEME)
    if not is_forced and _exists(path):
        return path
    try:
        return parse(source)
    except ValueError as fault:
        if is_forced:
            raise ValueError(f"{name}: found {source!r}, expected {SCHEME}{_FORM}: {fault}") from None
        raise _missing(source, str(fault)) from None


_FORM = "org/name[@revision][/subfolder]"


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True  # opening it says what is wrong
    return True


def _missing(text: str, reason: str) -> _SourceNotFoundError:
    message = f"{text}: found no such file or folder, and no id of a repository ({reason}), expected a path or {_FORM}"
    return _SourceNotFoundError(errno.ENOENT, message, text)


def _hub(module: str, hub_id: HubId) -> Any:
    """A module of the extra."""
    try:
        importlib.import_module("huggingface_hub")
    except ImportError as fault:
        raise ImportError(
            f"{hub_id}: found no such file or folder, and an id of a repository needs huggingface_hub: "
            "pip install 'tensorport[hub]'"
        ) from fault
    return importlib.import_module(f"tensorport.hub.{module}")
