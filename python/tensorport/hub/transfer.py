"""Brings files of a repository into huggingface_hub's cache: in their order, some at once, and on after faults."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from filelock import Timeout
from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status
from tqdm import tqdm

from tensorport.hub.cache import CachedRepo
from tensorport.hub.faults import HUB_FAULTS, is_transient

__all__ = ["RemoteFile", "Transfer", "patient"]

_CONNECTIONS: Final = 4
"""Files at once. More fill no line that these do not, and the first files would come later."""

_RESUMED_BYTES: Final = 1_000_000
"""Smaller files are begun anew."""

_TRIES: Final = 5
"""Without a byte of progress."""

_FIRST_PAUSE_S: Final = 0.5
"""Doubled after each try."""

_STOP_S: Final = 1.0
"""For threads to stop in."""

_EVENT_S: Final = 0.05
"""Between two events, as in all jobs."""

_T = TypeVar("_T")

# Entity tags that can be names of files; those of large files are their SHA-256.
_ETAG: Final = re.compile(r"[0-9A-Za-z_-]{1,128}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its path there, and its size, if the hub tells."""

    path: str
    nbytes: int | None


class _StoppedError(Exception):
    """Somebody else failed, or the caller has had enough."""


def patient(
    job: Callable[[], _T], pause: Callable[[float], object] = time.sleep, progress: Callable[[], int] = lambda: 0
) -> _T:
    """Runs a job again after faults that may pass, until there was no `progress` for some tries."""
    tries, before = 0, progress()
    while True:
        try:
            return job()
        except HUB_FAULTS as fault:
            now = progress()
            tries, before = (1, now) if now > before else (tries + 1, before)
            if tries >= _TRIES or not is_transient(fault):
                raise
            pause(_FIRST_PAUSE_S * 2 ** (tries - 1))


class Transfer:
    """Files of one commit on their way into the cache.

    Attributes:
        fault: what ended it, if something did.
    """

    def __init__(
        self,
        cache: CachedRepo,
        commit: str,
        files: Sequence[RemoteFile],
        *,
        arrived: Callable[[RemoteFile], object] = lambda _: None,
        failed: Callable[[BaseException], object] = lambda _: None,
    ) -> None:
        """Plans to bring `files`, in their order; `arrived` and `failed` are told so, on other threads."""
        self.fault: BaseException | None = None
        self._cache = cache
        self._commit = commit
        self._files = files
        self._arrived = arrived
        self._failed = failed
        self._todo: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        for file in files:
            self._todo.put(file)
        self._stop = threading.Event()
        # By file: bytes that are here, of the try that runs.
        self._bytes_here = dict.fromkeys((file.path for file in files), 0)
        self._files_done: list[RemoteFile] = []
        self._begun_last = ""
        self._connections: set[socket.socket] = set()
        self._threads = [
            threading.Thread(target=self._work, name="tensorport-download", daemon=True)
            for _ in range(min(_CONNECTIONS, len(files)))
        ]

    def run(self, callback: Callable[..., object] | None) -> None:
        """Brings all files; events are the caller's, on its thread. What fails first is raised."""
        self.start()
        try:
            for thread in self._threads:
                while thread.is_alive() and self.fault is None:
                    thread.join(_EVENT_S)
                    self.tell(callback)
        finally:
            self.stop()
        if self.fault is not None:
            raise self.fault
        self.tell(callback)

    def start(self) -> None:
        """Begins, on threads of its own."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends what is not done yet: threads stop at their next chunk, and do not wait for a server that stalls."""
        self._stop.set()
        for connection in [*self._connections]:
            with contextlib.suppress(OSError):  # closed meanwhile
                # Not by the method of a TLS connection, which is not for two threads.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        give_up = time.monotonic() + _STOP_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0, give_up - time.monotonic()))

    @property
    def is_done(self) -> bool:
        """Whether all files are there."""
        return len(self._files_done) == len(self._files)

    def tell(self, callback: Callable[..., object] | None) -> None:
        """Says how far it is."""
        if callback is not None:
            total = sum(file.nbytes or 0 for file in self._files)
            done = min(sum(self._bytes_here.values()), total)
            callback("download", done, total, len(self._files_done), len(self._files), self._begun_last)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                file = self._todo.get_nowait()
                self._begun_last = file.path
                patient(functools.partial(self._bring, file), self._pause, functools.partial(self._here, file))
                self._files_done.append(file)
                self._arrived(file)
        except queue.Empty:
            pass
        except BaseException as fault:  # raised by `run`
            if not isinstance(fault, _StoppedError) and self.fault is None:
                self.fault = fault
                self._failed(fault)

    def _here(self, file: RemoteFile) -> int:
        return self._bytes_here[file.path]

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _StoppedError

    def _bring(self, file: RemoteFile) -> None:
        if file.nbytes is None or file.nbytes >= _RESUMED_BYTES:
            self._bring_blob(file)
        hf_hub_download(self._cache.repo, file.path, revision=self._commit, tqdm_class=self._bar(file))
        self._bytes_here[file.path] = file.nbytes or 0

    def _bring_blob(self, file: RemoteFile) -> None:
        """Puts a file's content where huggingface_hub keeps it, and goes on with what an earlier try left.

        It does not do so itself since some 1.x: it removes what it could not finish. What Xet stores is its affair.
        """
        url = hf_hub_url(self._cache.repo, file.path, revision=self._commit)
        metadata = get_hf_file_metadata(url)
        etag, nbytes = metadata.etag, metadata.size
        if etag is None or nbytes is None or not _ETAG.fullmatch(etag):
            return
        if metadata.xet_file_data is not None and _has_xet():
            return
        with self._locked(etag):
            blob = self._cache.blob(etag)
            if blob.exists():
                return
            blob.parent.mkdir(parents=True, exist_ok=True)
            partial = blob.with_name(f"{etag}.incomplete")
            with partial.open("ab") as output:
                begun = output.tell()
                if begun > nbytes:
                    begun = _emptied(output)
                self._bytes_here[file.path] = begun
                self._append(url, output, nbytes, file)
            if _SHA256.fullmatch(etag) and not _has_digest(partial, etag):
                partial.unlink()
                self._bytes_here[file.path] = 0
                raise OSError(f"{file.path}: found other bytes than its SHA-256 says, expected {etag}")
            partial.replace(blob)

    def _append(self, url: str, output: BinaryIO, nbytes: int, file: RemoteFile) -> None:
        """Brings what `output`, which is open at its end, lacks of a file."""
        begin = output.tell()
        if begin == nbytes:
            return
        # Without compression, and without a token once a redirection leads to another host: the HTTP library's doing.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        with contextlib.ExitStack() as stack:
            stream = get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            response = stack.enter_context(stream)
            hf_raise_for_status(response)
            stack.enter_context(self._stoppable(response))
            here = begin
            if not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
                here = _emptied(output)  # a server without ranges sends all of it
            # As it comes: chunks of a size of ours would be lost half full where the connection breaks.
            for chunk in response.iter_bytes():
                if self._stop.is_set():
                    raise _StoppedError
                output.write(chunk)
                here += len(chunk)
                self._bytes_here[file.path] = min(here, nbytes)
                if here > nbytes:
                    break
        if here != nbytes:
            output.truncate(min(here, nbytes))
            raise OSError(f"{file.path}: found {here} bytes, expected {nbytes}")

    @contextlib.contextmanager
    def _stoppable(self, response: Any) -> Iterator[None]:
        """Lets `stop` end the connection of a response, on which a thread may wait."""
        stream = response.extensions.get("network_stream")  # none where somebody set another HTTP client
        connection = None if stream is None else stream.get_extra_info("socket")
        connections = set() if connection is None else {connection}
        self._connections |= connections
        try:
            yield
        finally:
            self._connections -= connections

    @contextlib.contextmanager
    def _locked(self, etag: str) -> Iterator[None]:
        """huggingface_hub's own lock of a file, for other processes that want it; waits, but not behind a stop."""
        path = self._cache.lock(etag)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(WeakFileLock(path, timeout=1))
                    break
                except Timeout:
                    self._pause(0)
            yield

    def _bar(self, file: RemoteFile) -> "type[tqdm[Any]]":
        """A bar that shows nothing and counts for us."""
        here, stop = self._bytes_here, self._stop

        class Bar(tqdm):  # type: ignore[type-arg]  # it is generic in its stubs alone
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})
                here[file.path] = kwargs.get("initial") or 0

            def update(self, n: float | None = 1) -> None:
                here[file.path] += int(n or 0)
                if stop.is_set():
                    raise _StoppedError

            def update_transfer(self, n: float | None = 1) -> None:
                """What came compressed counts when it is unpacked."""

        return Bar


def _emptied(output: BinaryIO) -> int:
    output.truncate(0)
    return output.seek(0)


def _has_xet() -> bool:
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def _has_digest(path: Path, sha256: str) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
