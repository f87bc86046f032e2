"""A repository's checkpoint as a folder of the local cache: asked for, chosen, downloaded, or found there."""

import warnings as python_warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

try:
    from huggingface_hub import HfApi, constants
except ImportError as fault:
    raise ImportError("an id of a repository needs huggingface_hub: pip install 'tensorport[hub]'") from fault
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

__all__ = ["download"]

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
    cached = _cached(hub_id)
    try:
        info = _ask(hub_id, is_patient=cached is None)
    except HUB_FAULTS as fault:
        if cached is None or isinstance(fault, RevisionNotFoundError):
            raise explained(hub_id, fault) from fault
        if not isinstance(fault, OfflineModeIsEnabled):
            python_warnings.warn(
                f"{hub_id}: {constants.ENDPOINT} does not answer as it should ({words_of(fault)}), so the copy in the "
                f"cache is used: {cached}",
                stacklevel=2,
            )
        return cached
    try:
        return _Download(hub_id, info).run(progress)
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


def _cached(hub_id: HubId) -> Path | None:
    """The folder in the cache of the commit that was current last, if it is whole."""
    cache = CachedRepo(hub_id.repo)
    commit = cache.commit_of(hub_id.revision)
    if commit is None:
        return None
    folder = cache.snapshot(commit) / hub_id.subfolder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        select(str(hub_id), names, lambda name: (folder / name).read_bytes())
    except CheckpointError:
        return None
    return folder


class _Download:
    """The way from the hub's answer to a whole folder."""

    def __init__(self, hub_id: HubId, info: ModelInfo) -> None:
        if info.sha is None or info.siblings is None:
            raise CheckpointError(f"{hub_id}: found an answer without commit or files, expected both")
        self._hub_id = hub_id
        self._cache = CachedRepo(hub_id.repo)
        self._commit = info.sha
        self._folder = self._cache.snapshot(info.sha) / hub_id.subfolder
        self._files = self._in_subfolder([RemoteFile(file.rfilename, file.size) for file in info.siblings])

    def _in_subfolder(self, files: list[RemoteFile]) -> Mapping[str, RemoteFile]:
        """The files below the subfolder, by their names there."""
        prefix = f"{self._hub_id.subfolder}/" if self._hub_id.subfolder else ""
        below = {file.path.removeprefix(prefix): file for file in files if file.path.startswith(prefix)}
        if not below and prefix:
            folders = sorted({file.path.rpartition("/")[0] for file in files} - {""})
            found = f"the folders {', '.join(folders[:5])}" if folders else "no folders"
            raise CheckpointError(f"{self._hub_id}: found {found} in {self._hub_id.repo}, expected the one of the id")
        # What leads out of a folder is nothing that a hub lists.
        return {name: file for name, file in below.items() if is_plain(name)}

    def run(self, progress: Progress) -> Path:
        selection = select(str(self._hub_id), self._files, self._read)
        wanted = [self._files[name] for name in (*selection.side_files, *selection.tensor_files)]
        missing = [file for file in wanted if not (self._cache.snapshot(self._commit) / file.path).exists()]
        if missing:
            with observe(progress) as callback:
                Transfer(self._cache, self._commit, missing).run(callback)
        self._cache.remember(self._hub_id.revision, self._commit)
        return self._folder

    def _read(self, name: str) -> bytes:
        file = self._files[name]
        if (file.nbytes or 0) > _MAX_INDEX_BYTES:
            found = f"{file.nbytes} bytes"
            raise CheckpointError(f"{self._hub_id}/{name}: found {found}, expected at most {_MAX_INDEX_BYTES}")
        Transfer(self._cache, self._commit, [file]).run(None)
        return (self._folder / name).read_bytes()
