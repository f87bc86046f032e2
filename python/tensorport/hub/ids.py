"""Ids of repositories on a hub: `org/name[@revision][/subfolder]`."""

import dataclasses
import re
from urllib.parse import quote, unquote

__all__ = ["SCHEME", "HubId", "is_plain", "parse"]

SCHEME = "hf://"
"""What forces a source to be read as an id."""

# An organisation and a name as hubs allow them: huggingface_hub.utils.validate_repo_id.
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")

# Revisions whose slash is not written %2F: pull requests and conversions, as in huggingface_hub's own URIs.
_REF = re.compile(r"refs/(?:pr|convert)/[^/]+")


@dataclasses.dataclass(frozen=True, slots=True)
class HubId:
    """A folder of a repository, at a revision.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit; None is the main branch.
        subfolder: with `/` between its parts; empty is the repository's top.
    """

    repo: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        """The id that parses to this."""
        revision = self.revision or ""
        if not _REF.fullmatch(revision):
            revision = quote(revision, safe="")
        return self.repo + ("@" + revision if revision else "") + ("/" + self.subfolder if self.subfolder else "")


def parse(text: str) -> HubId:
    """Reads an id, with or without `hf://`.

    Raises:
        ValueError: it is none; the message is the reason, without the text.
    """
    text = text.removeprefix(SCHEME)
    org, _, rest = text.partition("/")
    if not rest:
        raise ValueError("an id has an organisation and a name: org/name")
    if text.endswith(".safetensors"):
        raise ValueError("an id names a folder, and this a file")
    at = re.match(r"[^/@]*@", rest)
    revision: str | None = None
    if at:
        name, rest = rest[: at.end() - 1], rest[at.end() :]
        ref = _REF.match(rest)
        written = ref[0] if ref else rest.partition("/")[0]
        rest = rest[len(written) :]
        revision = unquote(written)
        if not is_plain(revision):
            raise ValueError(f"{written!r} is no branch, tag or commit")
    else:
        name, slash, rest = rest.partition("/")
        rest = slash + rest
    for part in (org, name):
        if not _NAME.fullmatch(part) or "--" in part or ".." in part:
            raise ValueError(f"{part!r} is no name of an organisation or a repository")
    subfolder = rest.removeprefix("/")
    if rest and not is_plain(subfolder):
        raise ValueError(f"{subfolder!r} is no folder of a repository")
    return HubId(f"{org}/{name}", revision, subfolder)


def is_plain(path: str) -> bool:
    """Whether no part of a path with `/` leads elsewhere."""
    return path.isprintable() and not any(part in ("", ".", "..") or "\\" in part for part in path.split("/"))
