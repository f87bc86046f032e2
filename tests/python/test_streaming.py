"""Batches through host memory: read ahead of the transfer, never more than the limit."""

import threading
import time
from collections.abc import Callable

import pytest
from tensorport.streaming import stream

Callback = Callable[..., None]


class Transfers:
    """Batches are numbers of bytes; every transfer lasts until somebody waits for it."""

    def __init__(self) -> None:
        self.held = 0
        self.most = 0
        self.log: list[str] = []
        self.threads: set[int] = set()
        self.lock = threading.Lock()

    def read(self, batch: int, callback: Callback) -> None:
        with self.lock:
            self.held += batch
            self.most = max(self.most, self.held)
            self.log.append(f"read {batch}")
            self.threads.add(threading.get_ident())
        callback("load", batch)

    def send(self, batch: int) -> int:
        # The reading of the next batch has begun by now, if there is room for it.
        time.sleep(0.01)
        self.log.append(f"send {batch}")
        self.threads.add(-threading.get_ident())
        return batch

    def wait(self, batch: int) -> None:
        with self.lock:
            self.held -= batch
            self.log.append(f"wait {batch}")

    def run(self, batches: list[int], limit: int, callback: Callback | None = None) -> list[int]:
        return stream(
            batches, read=self.read, send=self.send, wait=self.wait, nbytes=int, limit=limit, callback=callback
        )


@pytest.mark.parametrize(("limit", "most"), [(100, 60), (40, 34), (31, 31), (1, 20)])
def test_memory_stays_below_the_limit_unless_one_batch_is_larger(limit: int, most: int) -> None:
    transfers = Transfers()
    assert transfers.run([10, 20, 11, 3, 16], limit) == [10, 20, 11, 3, 16]
    assert transfers.most == most


def test_reading_is_ahead_of_sending_where_there_is_room() -> None:
    transfers = Transfers()
    transfers.run([1, 2, 3], 100)
    assert transfers.log == ["read 1", "read 2", "send 1", "read 3", "send 2", "send 3"]
    transfers = Transfers()
    transfers.run([5, 6, 7], 6)
    assert transfers.log == ["read 5", "send 5", "wait 5", "read 6", "send 6", "wait 6", "read 7", "send 7"]


def test_reading_has_a_thread_of_its_own_and_sending_the_callers() -> None:
    transfers = Transfers()
    transfers.run([1, 2], 10)
    assert -threading.get_ident() in transfers.threads
    assert threading.get_ident() not in transfers.threads


def test_faults_of_either_side_reach_the_caller_and_stop_the_reader() -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    transfers = Transfers()
    transfers.read = fail  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        transfers.run([1, 2], 10)
    reads: list[int] = []

    def endless(batch: int, callback: Callback) -> None:
        reads.append(batch)
        while batch == 2:
            callback("load")

    transfers = Transfers()
    transfers.read, transfers.send = endless, fail  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        transfers.run([1, 2, 3], 10)
    assert reads == [1, 2]


def test_events_are_passed_on_by_the_calling_thread() -> None:
    seen = []

    def slow(_: int, callback: Callback) -> None:
        for done in range(4):
            callback("load", done)
            time.sleep(0.06)

    transfers = Transfers()
    transfers.read = slow  # type: ignore[assignment]
    transfers.run([1], 10, lambda phase, done: seen.append((phase, done, threading.get_ident())))
    assert {thread for *_, thread in seen} == {threading.get_ident()}
    assert {phase for phase, *_ in seen} == {"load"}
    assert len(seen) >= 2


def test_no_batches_are_no_work() -> None:
    assert Transfers().run([], 1) == []
