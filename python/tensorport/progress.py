"""Progress of long jobs: events, and the bar that shows them."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tensorport.reports import printable

__all__ = ["Progress", "ProgressEvent", "observe"]


@dataclasses.dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a job is.

    Attributes:
        phase: `download` (its bytes are those of files, which count as tensors), `check` (re-checking an interrupted
            conversion), `convert`, `verify`, `read`, `load` or `synthesize`.
        bytes_done: bytes of tensor data done in this phase.
        bytes_total: bytes of tensor data in this phase.
        tensors_done: tensors done in this phase.
        tensors_total: tensors in this phase.
        tensor: name of the tensor begun last; empty before the first.
    """

    phase: str
    bytes_done: int
    bytes_total: int
    tensors_done: int
    tensors_total: int
    tensor: str


Progress = bool | Callable[[ProgressEvent], Any]
"""`False`: silent; `True`: a tqdm bar, a widget in notebooks; a callable: gets a ProgressEvent some 20 times a second
on the calling thread, and stops the job by raising."""


@contextlib.contextmanager
def observe(progress: Progress) -> Iterator[Callable[[str, int, int, int, int, str], None] | None]:
    """The callback for the extension module that `progress` asks for, and its clean-up."""
    if progress is False or (progress is True and sys.stderr is None):
        yield None
    elif progress is True:
        with contextlib.closing(_Bar()) as bar:
            yield lambda *fields: bar.show(ProgressEvent(*fields))
    elif callable(progress):
        yield lambda *fields: progress(ProgressEvent(*fields))
    else:
        raise TypeError(f"progress: found {type(progress).__name__}, expected a bool or a callable")


class _Bar:
    """One tqdm bar per phase, and one for a download that goes on beside it."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def show(self, event: ProgressEvent) -> None:
        from tqdm.auto import tqdm  # noqa: PLC0415 - loads notebook widgets where there are some

        if event.phase not in self._bars:
            self._close({phase for phase in self._bars if "download" not in (phase, event.phase)})
            self._bars[event.phase] = tqdm(total=event.bytes_total, desc=event.phase, unit="B", unit_scale=True)
        bar = self._bars[event.phase]
        name = printable(event.tensor[-40:]).replace("\n", " ")
        bar.set_postfix_str(name, refresh=False)
        bar.update(event.bytes_done - bar.n)

    def close(self) -> None:
        self._close(set(self._bars))

    def _close(self, phases: set[str]) -> None:
        for phase in phases:
            self._bars.pop(phase).close()
