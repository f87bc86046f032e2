"""A repository's checkpoint that is converted while it comes.

The headers come first, by requests for parts of files. They make a folder of stand-ins, each of its file's size and
with nothing in it but the header, from which the conversion is planned. Its workers then wait for the file that they
read next, and files come in the order in which they are converted.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tensorport import _core
from tensorport.hub.faults import HUB_FAULTS, explained
from tensorport.hub.headers import local_header, read_header
from tensorport.hub.ids import HubId
from tensorport.hub.snapshot import HubCheckpoint, download, explaining, find
from tensorport.hub.transfer import RemoteFile, Transfer, patient
from tensorport.progress import Progress
from tensorport.source import LocalSource

__all__ = ["arriving", "headers_alone"]

_HEADERS_AT_ONCE: Final = 8


def arriving(hub_id: HubId, progress: Progress = False) -> LocalSource:
    """A repository's checkpoint whose side files are here, and whose tensors may be on their way.

    Args:
        hub_id: what to bring.
        progress: of what comes before this returns.

    Raises:
        CheckpointError, ConnectionError, OSError: as :func:`tensorport.hub.snapshot.download`.
    """
    return _opened(hub_id, progress, _Arriving)


def headers_alone(hub_id: HubId, progress: Progress = False) -> LocalSource:
    """As :func:`arriving`, for those who never read a tensor: none comes."""
    return _opened(hub_id, progress, _StandIns)


def _opened(hub_id: HubId, progress: Progress, kind: "type[_StandIns]") -> LocalSource:
    found = find(hub_id)
    # A converted tree is opened by its manifest, and has no headers that would be worth it.
    names = found.selection.tensor_files
    if not all(name.endswith(".safetensors") and found.files[name].nbytes for name in names):
        return LocalSource(download(hub_id, progress))
    with explaining(hub_id):
        found.bring(found.missing(found.selection.side_files), progress)
        return kind(hub_id, found)


class _StandIns(LocalSource):
    """A folder of the side files, and of stand-ins for the files with tensors."""

    def __init__(self, hub_id: HubId, checkpoint: HubCheckpoint) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="tensorport-hub-")))
        self._repo = hub_id.repo
        self._checkpoint = checkpoint
        self._missing = checkpoint.missing(checkpoint.selection.tensor_files)
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        for name in self._checkpoint.selection.side_files:
            (self.path / name).symlink_to(self._checkpoint.folder / name)
        with ThreadPoolExecutor(_HEADERS_AT_ONCE, "tensorport-headers") as pool:
            list(pool.map(self._make_one, self._checkpoint.selection.tensor_files))

    def _make_one(self, name: str) -> None:
        file, commit = self._checkpoint.files[name], self._checkpoint.commit
        if file in self._missing:
            header = patient(lambda: read_header(self._repo, commit, file.path))
        else:
            header = local_header(self._checkpoint.folder / name)
        with (self.path / name).open("wb") as output:
            output.write(header)
            output.truncate(file.nbytes)
        # The time of modification tells commits apart, whose headers may be the same: a conversion goes on where it is
        # the one that it was. 15 hexadecimal digits of nanoseconds are less than 37 years.
        modified_ns = int(commit[:15], 16)
        os.utime(self.path / name, ns=(modified_ns, modified_ns))

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class _Arriving(_StandIns):
    """Stand-ins, and what brings the files that they stand for."""

    def __init__(self, hub_id: HubId, checkpoint: HubCheckpoint) -> None:
        self.arrivals = self._arrivals = _core.Arrivals()
        self._hub_id = hub_id
        names = checkpoint.selection.tensor_files
        self._names = {checkpoint.files[name].path: name for name in names}
        self._transfer = Transfer(
            checkpoint.cache, checkpoint.commit, checkpoint.missing(names), arrived=self._arrived, failed=self._failed
        )
        super().__init__(hub_id, checkpoint)

    def _make(self) -> None:
        for file in self._checkpoint.files.values():
            if file.path in self._names and file not in self._missing:
                self._arrived(file)
        self._transfer.start()
        super()._make()

    def _arrived(self, file: RemoteFile) -> None:
        name = self._names[file.path]
        self._arrivals.arrived(name, self._checkpoint.folder / name)

    def _failed(self, fault: BaseException) -> None:
        self._arrivals.failed(str(explained(self._hub_id, fault) if isinstance(fault, HUB_FAULTS) else fault))

    def watched(self, callback: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if callback is None or self._transfer.is_done:
            return callback
        is_told = False

        def tell(*fields: Any) -> None:
            nonlocal is_told
            if not is_told:
                is_told = self._transfer.is_done
                self._transfer.tell(callback)
            callback(*fields)

        return tell

    def finish(self) -> None:
        self._transfer.stop()
        if self._transfer.is_done:
            self._checkpoint.remember()

    def raise_fault(self) -> None:
        fault = self._transfer.fault
        if fault is not None:
            with explaining(self._hub_id):
                raise fault

    def close(self) -> None:
        self._transfer.stop()
        super().close()
