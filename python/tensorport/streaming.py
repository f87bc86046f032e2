"""Batches on their way through host memory: one is read while those before are transferred, in bounded memory."""

import collections
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["stream"]

Batch = TypeVar("Batch")
Sent = TypeVar("Sent")
Callback = Callable[..., None]


def stream(
    batches: Sequence[Batch],
    *,
    read: Callable[[Batch, Callback], None],
    send: Callable[[Batch], Sent],
    wait: Callable[[Sent], object],
    nbytes: Callable[[Batch], int],
    limit: int,
    callback: Callback | None,
) -> list[Sent]:
    """Reads and sends every batch in turn; reading runs on a thread of its own, ahead of what is sent.

    Args:
        batches: what to read and send.
        read: fills a batch and passes events to a callback, whose exceptions stop it.
        send: begins the transfer of a filled batch; called on the caller's thread.
        wait: returns when a transfer is done and its host memory free.
        nbytes: host memory of a batch.
        limit: bytes of host memory for all that is read or in transfer; a batch larger than it goes alone.
        callback: gets the events of `read` on the caller's thread.

    Returns:
        What `send` returned, in order. The last transfers may still run.
    """
    stopped = threading.Event()
    newest: list[tuple[Any, ...]] = []
    in_flight: collections.deque[tuple[Sent, int]] = collections.deque()
    sent: list[Sent] = []

    def note(*event: Any) -> None:
        if stopped.is_set():
            raise InterruptedError
        newest[:] = [event]

    def make_room(needed: int) -> None:
        while in_flight and needed + sum(held for _, held in in_flight) > limit:
            wait(in_flight.popleft()[0])

    with ThreadPoolExecutor(1, "tensorport-load") as executor:
        try:
            reading: Future[None] | None = None
            for batch, following in itertools.zip_longest(batches, batches[1:]):
                reading = reading or executor.submit(read, batch, note)
                _await(reading, newest, callback)
                reading = None
                held = sum(held for _, held in in_flight) + nbytes(batch)
                if following is not None and held + nbytes(following) <= limit:
                    reading = executor.submit(read, following, note)
                sent.append(send(batch))
                in_flight.append((sent[-1], nbytes(batch)))
                if following is not None and reading is None:
                    make_room(nbytes(following))
        except BaseException:
            stopped.set()
            raise
    return sent


def _await(reading: Future[None], newest: list[tuple[Any, ...]], callback: Callback | None) -> None:
    """Waits for the reading thread, and passes its events on."""
    while not reading.done():
        try:
            reading.exception(timeout=0.05)
        except TimeoutError:
            if newest and callback is not None:
                callback(*newest.pop())
    reading.result()
