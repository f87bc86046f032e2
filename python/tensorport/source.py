"""What a `source` names: a path, or with the extra `hub` a repository. The one place that tells them apart."""

import errno
import os
from pathlib import Path

from tensorport.hub.ids import SCHEME, HubId, parse
from tensorport.progress import Progress

__all__ = ["local_path"]


class _SourceNotFoundError(FileNotFoundError):
    """A source that is neither a path nor an id."""

    def __str__(self) -> str:
        return str(self.strerror)


def local_path(source: str | os.PathLike[str], progress: Progress = False, *, name: str = "source") -> Path:
    """The path that `source` names; what it names on a hub is downloaded, unless it is in the cache.

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
        hub_id = parse(source)
    except ValueError as fault:
        if is_forced:
            raise ValueError(f"{name}: found {source!r}, expected {SCHEME}{_FORM}: {fault}") from None
        raise _missing(source, str(fault)) from None
    return _download(hub_id, progress)


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


def _download(hub_id: HubId, progress: Progress) -> Path:
    try:
        from tensorport.hub.snapshot import download  # noqa: PLC0415 - an extra
    except ImportError as fault:
        raise ImportError(f"{hub_id}: found no such file or folder, and {fault}") from fault
    return download(hub_id, progress)
