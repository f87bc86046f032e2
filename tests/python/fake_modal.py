"""A server on 127.0.0.1 in place of Modal's: it notes what the client asks for, and has no machine behind it.

Every call is answered by an empty message of its type, with what the client needs to go on: ids, and images that are
built.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

BUILDER_VERSION = "2025.06"

# Calls that make something, the field of the answer that has its id, and how ids of its kind begin.
MAKES = {
    "AppCreate": ("app_id", "ap"),
    "AppGetOrCreate": ("app_id", "ap"),
    "EnvironmentGetOrCreate": ("environment_id", "en"),
    "FunctionBindParams": ("bound_function_id", "fu"),
    "FunctionCreate": ("function_id", "fu"),
    "FunctionPrecreate": ("function_id", "fu"),
    "ImageGetOrCreate": ("image_id", "im"),
    "MountGetOrCreate": ("mount_id", "mo"),
    "SecretGetOrCreate": ("secret_id", "st"),
    "VolumeGetOrCreate": ("volume_id", "vo"),
}


@dataclasses.dataclass
class FakeModal:
    """What was asked for, in order: the call's name and its message."""

    url: str = ""
    requests: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def asked(self, name: str) -> list[Any]:
        return [request for called, request in self.requests if called == name]

    def answer(self, name: str, request: Any, reply: Any) -> Any:
        if name in MAKES:
            field, prefix = MAKES[name]
            setattr(reply, field, f"{prefix}-{next(self.numbers):020d}")
        for field in ("metadata", "handle_metadata"):
            if field in reply.DESCRIPTOR.fields_by_name:
                getattr(reply, field).SetInParent()
        if name == "EnvironmentGetOrCreate":
            reply.metadata.settings.image_builder_version = BUILDER_VERSION
        elif name == "ImageGetOrCreate":
            reply.result.status = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
        elif name == "FunctionCreate":
            reply.function_id = request.existing_function_id or reply.function_id
            reply.handle_metadata.function_name = request.function.function_name
            reply.function.CopyFrom(request.function)
            reply.function_data.ranked_functions.add().function.CopyFrom(request.function)
        return reply

    def __mapping__(self) -> dict[str, Handler]:
        """What grpclib serves: a handler for each call of Modal's interface."""
        nothing = dict.fromkeys(ModalClientBase.__abstractmethods__)
        described = type("Described", (ModalClientBase,), nothing)().__mapping__()
        return {path: handler._replace(func=self._handle(path, handler)) for path, handler in described.items()}

    def _handle(self, path: str, handler: Handler) -> Callable[[Any], Any]:
        name = path.rpartition("/")[2]

        async def handle(stream: Any) -> None:
            request = await stream.recv_message()
            self.requests.append((name, request))
            if name == "FunctionMap":
                raise GRPCError(Status.FAILED_PRECONDITION, "no machine is behind this server")
            if handler.cardinality is Cardinality.UNARY_UNARY:
                await stream.send_message(self.answer(name, request, handler.reply_type()))
                return
            await asyncio.sleep(
                0.2
            )  # logs: none, and the client asks again, until it is told that there will be no more
            if name == "AppGetLogs" and self.asked("AppClientDisconnect"):
                await stream.send_message(api_pb2.TaskLogsBatch(app_done=True))

        return handle


@contextlib.contextmanager
def serving_modal() -> Iterator[FakeModal]:
    """A server in a thread, while the context lasts."""
    fake = FakeModal()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fake.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        started: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

        async def serve() -> None:
            server, end = Server([fake]), asyncio.Event()
            await server.start(sock=listening)
            started.put((asyncio.get_running_loop(), end))
            await end.wait()
            server.close()
            await server.wait_closed()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        loop, end = started.get(timeout=10)
        try:
            yield fake
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join()
