"""Where huggingface_hub keeps a repository: its documented layout of `blobs`, `refs` and `snapshots`."""

import contextlib
import dataclasses
import re
import uuid
from pathlib import Path

from huggingface_hub import constants

__all__ = ["CachedRepo"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True, slots=True)
class CachedRepo:
    """A repository `org/name` in the cache, which may not have it yet."""

    repo: str

    @property
    def _name(self) -> str:
        return "models--" + self.repo.replace("/", "--")

    @property
    def _folder(self) -> Path:
        return Path(constants.HF_HUB_CACHE) / self._name

    def blob(self, etag: str) -> Path:
        """The content of a file."""
        return self._folder / "blobs" / etag

    def lock(self, etag: str) -> Path:
        """The lock of a blob."""
        return Path(constants.HF_HUB_CACHE) / ".locks" / self._name / f"{etag}.lock"

    def snapshot(self, commit: str) -> Path:
        """The files of a commit, as links to blobs."""
        return self._folder / "snapshots" / commit

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that a revision was when it was last looked up, if it was."""
        revision = revision or constants.DEFAULT_REVISION
        if _COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self._folder / "refs" / revision).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if _COMMIT.fullmatch(commit) else None

    def remember(self, revision: str | None, commit: str) -> None:
        """Notes the commit of a revision; a cache that cannot be written to is used as it is."""
        revision = revision or constants.DEFAULT_REVISION
        if revision == commit or self.commit_of(revision) == commit:
            return
        path = self._folder / "refs" / revision
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(commit, "utf-8")
            temporary.replace(path)
