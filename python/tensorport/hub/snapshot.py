"""A repository's checkpoint as a folder of the local cache: asked for, chosen, downloaded, or found there."""

import contextlib
import warnings as python_warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from tensorport._core import __version__
from tensorport.errors import CheckpointError
from tensorport.hub.cache import CachedRepo
from tensorport.hub.faults import HUB_FAULTS, explained, words_of
from tensorport.hub.ids import HubId, is_plain
from tensorport.hub.selection import select
from tensorport.hub.transfer import RemoteFile, Transfer, patient
from tensorport.progress import Progress, observe

__all__ = ["HubCheckpoint", "download", "explaining", "find"]

_MAX_INDEX_BYTES: Final = 100_000_000
"""Of an index or a manifest; headers may be as long."""


def download(hub_id: HubId, progress: Progress = False) -> Path:
    """Brings a repository's checkpoint into huggingface_hub's cache; asks for what is not there yet.

    Side files and an index come first, then the files with tensors in their order. Where the hub does not answer, a
    whole copy in the cache is used, with a warning unless HF_HUB_OFFLINE is set.

    Args:
        hub_id: what to bring.
        progress: of the download: its events have the phase `download`, and count files as tensors.

    Returns:
        The folder in the cache. Its files are links.

    Raises:
        CheckpointError: the hub refuses, or has no such repository, revision, folder or checkpoint.
        ConnectionError: the hub does not answer, and the cache has no whole copy.
        OSError: the system refused.
    """
    found = find(hub_id)
    with explaining(hub_id):
        found.bring(found.missing(found.selection.side_files + found.selection.tensor_files), progress)
    found.remember()
    return found.folder


def find(hub_id: HubId) -> "HubCheckpoint":
    """What the hub has, with its index read; or the copy in the cache where it does not answer.

    Raises what :func:`download` raises.
    """
    cached = _cached(hub_id)
    try:
        info = _ask(hub_id, is_patient=cached is None)
    except HUB_FAULTS as fault:
        if cached is None or isinstance(fault, RevisionNotFoundError):
            raise explained(hub_id, fault) from fault
        if not isinstance(fault, OfflineModeIsEnabled):
            python_warnings.warn(
                f"{hub_id}: {constants.ENDPOINT} does not answer as it should ({words_of(fault)}), so the copy in the "
                f"cache is used: {cached.folder}",
                stacklevel=2,
            )
        return cached
    if info.sha is None or info.siblings is None:
        raise CheckpointError(f"{hub_id}: found an answer without commit or files, expected both")
    with explaining(hub_id):
        return HubCheckpoint(hub_id, info.sha, [RemoteFile(file.rfilename, file.size) for file in info.siblings])


@contextlib.contextmanager
def explaining(hub_id: HubId) -> Iterator[None]:
    """Says in our words what the hub and the network raise."""
    try:
        yield
    except HUB_FAULTS as fault:
        raised = explained(hub_id, fault)
        if raised is fault:
            raise
        raise raised from fault


def _ask(hub_id: HubId, *, is_patient: bool) -> ModelInfo:
    api = HfApi(library_name="tensorport", library_version=__version__)

    def ask() -> ModelInfo:
        return api.model_info(
            hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )

    return patient(ask) if is_patient else ask()


def _cached(hub_id: HubId) -> "HubCheckpoint | None":
    """The copy in the cache of the commit that was current last, if it is whole."""
    cache = CachedRepo(hub_id.repo)
    commit = cache.commit_of(hub_id.revision)
    if commit is None:
        return None
    top = cache.snapshot(commit)
    paths = [path for path in top.rglob("*") if path.is_file()]
    try:
        files = [RemoteFile(path.relative_to(top).as_posix(), path.stat().st_size) for path in paths]
        return HubCheckpoint(hub_id, commit, files)
    except CheckpointError:
        return None


class HubCheckpoint:
    """A checkpoint of a repository, at a commit.

    Attributes:
        cache: the repository in the cache.
        commit: its hash.
        folder: where the files of the checkpoint are in the cache, once they are.
        files: what the folder has, by names relative to it; in the cache alone if the hub does not answer.
        selection: which of them make the checkpoint.
    """

    def __init__(self, hub_id: HubId, commit: str, files: Sequence[RemoteFile]) -> None:
        """Reads the index among the files of the commit; brings it, where it has to."""
        self._hub_id = hub_id
        self.cache = CachedRepo(hub_id.repo)
        self.commit = commit
        self.folder = self.cache.snapshot(commit) / hub_id.subfolder
        self.files = self._in_subfolder(files)
        self.selection = select(str(hub_id), self.files, self._read)

    def _in_subfolder(self, files: Sequence[RemoteFile]) -> Mapping[str, RemoteFile]:
        prefix = f"{self._hub_id.subfolder}/" if self._hub_id.subfolder else ""
        below = {file.path.removeprefix(prefix): file for file in files if file.path.startswith(prefix)}
        if not below and prefix:
            folders = sorted({file.path.rpartition("/")[0] for file in files} - {""})
            found = f"the folders {', '.join(folders[:5])}" if folders else "no folders"
            raise CheckpointError(f"{self._hub_id}: found {found} in {self._hub_id.repo}, expected the one of the id")
        # What leads out of a folder is nothing that a hub lists.
        return {name: file for name, file in below.items() if is_plain(name)}

    def missing(self, names: Sequence[str]) -> list[RemoteFile]:
        """Those of these files that are not in the cache."""
        return [self.files[name] for name in names if not (self.folder / name).exists()]

    def bring(self, files: Sequence[RemoteFile], progress: Progress = False) -> None:
        """Brings files into the cache."""
        if files:
            with observe(progress) as callback:
                Transfer(self.cache, self.commit, files).run(callback)

    def remember(self) -> None:
        """Notes that all of this commit is here: from now on it is what the revision is without a network."""
        self.cache.remember(self._hub_id.revision, self.commit)

    def _read(self, name: str) -> bytes:
        file = self.files[name]
        if (file.nbytes or 0) > _MAX_INDEX_BYTES:
            found = f"{file.nbytes} bytes"
            raise CheckpointError(f"{self._hub_id}/{name}: found {found}, expected at most {_MAX_INDEX_BYTES}")
        self.bring(self.missing([name]))
        return (self.folder / name).read_bytes()
