"""A hub on 127.0.0.1: the calls that huggingface_hub makes of one, a log of them, and faults on demand.

Small files come from the hub itself. Large ones are redirected to a second server, as hubs send them to a content
delivery network, where a token must not follow.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 1000


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong in one answer with a body, or in one answer of the API.

    Attributes:
        status: an error instead of an answer.
        sent: bytes of the body before `end`.
        end: `reset` of the connection, `close` of it, or a `stall` until the hub closes.
        ignores_range: the whole file though a part was asked for.
        pause_s: before each 64 KiB of the body.
        content: other bytes in place of the file's.
        until: nothing is sent before it is set.
    """

    status: int | None = None
    code: str = ""
    sent: int | None = None
    end: str = "reset"
    ignores_range: bool = False
    pause_s: float = 0
    content: bytes | None = None
    until: threading.Event | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as it came."""

    method: str
    path: str
    token: str | None
    is_cdn: bool


@dataclasses.dataclass
class FakeHub:
    """Repositories, what was asked for, and what is to go wrong.

    Attributes:
        commits: by `org/name` and commit the files.
        branches: by `org/name` and branch or tag the commit.
        gates: by `org/name` the token that may read files.
        private: by `org/name` the token without which there is no such repository.
        faults: by path of a file, by path and ` header`, or by `api`, what goes wrong in the next answers, in turn.
        requests: all requests, in order.
        sent: the file of each request for content, and which part of it was asked for.
    """

    endpoint: str = ""
    cdn: str = ""
    commits: dict[str, dict[str, Mapping[str, bytes]]] = dataclasses.field(default_factory=dict)
    branches: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    gates: dict[str, str] = dataclasses.field(default_factory=dict)
    private: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: dict[str, list[Fault]] = dataclasses.field(default_factory=dict)
    requests: list[Request] = dataclasses.field(default_factory=list)
    sent: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    closing: threading.Event = dataclasses.field(default_factory=threading.Event)
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A commit of a repository, at the tip of a branch; returns its hash."""
        text = repr(sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items()))
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for beyond their headers, once for each time, sorted."""
        return sorted(name for name, part in self.sent if not (part or "").startswith("bytes=0-"))

    def ranges(self, name: str) -> list[str | None]:
        """Which part of a file was asked for, each time but those for its header."""
        return [part for file, part in self.sent if file == name and not (part or "").startswith("bytes=0-")]

    def take_fault(self, key: str) -> Fault | None:
        with self._lock:
            waiting = self.faults.get(key, [])
            return waiting.pop(0) if waiting else None


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers until the end of the block."""
    hub = FakeHub()
    with contextlib.ExitStack() as stack:
        hub.endpoint = stack.enter_context(_server(hub, is_cdn=False))
        hub.cdn = stack.enter_context(_server(hub, is_cdn=True))
        yield hub
        hub.closing.set()


@contextlib.contextmanager
def _server(hub: FakeHub, *, is_cdn: bool) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that were killed are what tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: ClassVar[FakeHub]
    is_cdn: ClassVar[bool]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, self.path, token, self.is_cdn))
        path = unquote(urlsplit(self.path).path)
        if self.is_cdn:
            name = unquote(urlsplit(self.path).query).removeprefix("file=")
            repo, commit = path.strip("/").rsplit("/", 1)
            self._send_file(name, self.hub.commits[repo][commit][name], {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._send_info(match[1], match[2] or "main", token)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], token)
        else:
            self._send_error(404, "EntryNotFound")

    def _send_info(self, repo: str, revision: str, token: str | None) -> None:
        fault = self.hub.take_fault("api")
        if fault is not None and fault.end == "stall":
            self.hub.closing.wait()
        if fault is not None:
            self._send_error(fault.status or 500, fault.code)
        elif (commit := self._commit(repo, revision, token)) is not None:
            files = self.hub.commits[repo][commit]
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            self._send_json({"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _commit(self, repo: str, revision: str, token: str | None) -> str | None:
        """The commit of a revision; where there is none, or nothing to see without a token, the error is sent."""
        if repo not in self.hub.commits or self.hub.private.get(repo, token) != token:
            self._send_error(404 if token else 401, "RepoNotFound")
            return None
        commit = self.hub.branches[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            self._send_error(404, "RevisionNotFound")
            return None
        return commit

    def _resolve(self, repo: str, revision: str, name: str, token: str | None) -> None:
        commit = self._commit(repo, revision, token)
        if commit is None:
            return
        if self.hub.gates.get(repo, token) != token:
            self._send_error(403 if token else 401, "GatedRepo")
            return
        if name not in self.hub.commits[repo][commit]:
            self._send_error(404, "EntryNotFound")
            return
        content = self.hub.commits[repo][commit][name]
        etag = hashlib.sha256(content).hexdigest()
        if len(content) < LARGE_BYTES:
            self._send_file(name, content, {"X-Repo-Commit": commit, "ETag": f'"{etag[:40]}"'})
            return
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.cdn}/{repo}/{commit}?file={name}",
        }
        self._send(302, headers, b"")

    def _send_file(self, name: str, content: bytes, headers: Mapping[str, str]) -> None:
        fault = None
        if self.command == "GET":
            part = self.headers.get("Range")
            self.hub.sent.append((name, part))
            is_header = (part or "").startswith("bytes=0-")
            fault = self.hub.take_fault(f"{name} header" if is_header else name)
        if fault is not None and fault.status is not None:
            self._send_error(fault.status, fault.code)
            return
        if fault is not None and fault.content is not None:
            content = fault.content
        status, more = 200, {"Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match and not (fault and fault.ignores_range):
            begin, size = int(match[1]), len(content)
            content = content[begin : int(match[2] or size) + 1]
            status, more = 206, {"Content-Range": f"bytes {begin}-{begin + len(content) - 1}/{size}"}
        self._send(status, {**headers, **more}, content, fault)

    def _send_json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send_error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"{}")

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self._send_body(body, fault or Fault())

    def _send_body(self, body: bytes, fault: Fault) -> None:
        while fault.until is not None and not (fault.until.wait(0.02) or self.hub.closing.is_set()):
            pass
        end = len(body) if fault.sent is None else fault.sent
        for begin in range(0, end, 1 << 16):
            if self.hub.closing.wait(fault.pause_s) and fault.pause_s:
                break
            self.wfile.write(body[begin : min(begin + (1 << 16), end)])
        if fault.sent is None:
            return
        self.wfile.flush()
        self.close_connection = True
        if fault.end == "stall":
            self.hub.closing.wait()
        elif fault.end == "reset":
            time.sleep(0.2)  # what was sent is read before the reset drops what was not
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
