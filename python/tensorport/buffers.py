"""Regions of tensors in host memory: views of mapped files where those can be shared, else read into aligned memory."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import numpy as np
from numpy.typing import NDArray

from tensorport import _core
from tensorport.checkpoint import Checkpoint
from tensorport.leaves import ArraySource
from tensorport.sharding import Region

__all__ = ["Buffer", "Reader", "make_buffers"]

ALIGNMENT: Final = 64
"""JAX on CPU shares host memory that begins at a multiple of this and copies other memory (openxla/xla#18611)."""

_MAX_MAPPED_FILES: Final = 16_384
"""A quarter of the mappings that Linux allows a process (vm.max_map_count): beyond, small files are read."""

_SMALL_FILE_BYTES: Final = 1_000_000


@dataclasses.dataclass(slots=True)
class Buffer:
    """A region of an array in host memory, and the devices that get it.

    Attributes:
        source: the array.
        region: (start, stop) for each axis.
        devices: who gets it; empty for JAX's default device.
        reason: why it has to be read; None where the file is mapped.
        data: the values, once they are there.
    """

    source: ArraySource
    region: Region
    devices: list[jax.Device]
    reason: str | None = None
    data: NDArray[Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the region."""
        return tuple(stop - start for start, stop in self.region)

    @property
    def tensor_region(self) -> Region:
        """The region as one of the tensor, of which the array may be a part."""
        if not self.source.first_row:
            return self.region
        (start, stop), *rest = self.region
        return ((start + self.source.first_row, stop + self.source.first_row), *rest)

    @property
    def nbytes(self) -> int:
        """Bytes of the region in host memory."""
        return math.prod(self.shape) * self.source.dtype.itemsize


@dataclasses.dataclass(slots=True)
class Reader:
    """Fills buffers, and counts what that took.

    Attributes:
        checkpoint: what is read.
        on_overflow: what becomes of values that do not fit.
        workers: threads; all cores by default.
        bytes_read: bytes read from files.
        overflow: values beyond the dtype, by tensor.
        underflow: values that became zero and were not, by tensor.
    """

    checkpoint: Checkpoint
    on_overflow: str
    workers: int | None
    bytes_read: int = 0
    overflow: Counter[str] = dataclasses.field(default_factory=Counter)
    underflow: Counter[str] = dataclasses.field(default_factory=Counter)
    _memory: _core.Memory = dataclasses.field(default_factory=_core.Memory)

    def choose(self, buffers: Sequence[Buffer], io: str, is_shared: Callable[[Buffer], bool]) -> None:
        """Decides for each buffer whether its file is mapped; `is_shared`: its devices use host memory as it is."""
        files: Counter[int] = Counter()
        places = []
        for buffer in buffers:
            place = _place(self.checkpoint, buffer)
            buffer.reason = _reason(buffer, place, io, is_shared)
            places.append(place)
            if buffer.reason is None and place is not None:
                files[place.file] += 1
        if len(files) > _MAX_MAPPED_FILES:
            for buffer, place in zip(buffers, places, strict=True):
                if buffer.reason is None and place is not None and buffer.nbytes < _SMALL_FILE_BYTES:
                    buffer.reason = f"more than {_MAX_MAPPED_FILES} files"

    def fill(self, buffers: Sequence[Buffer], callback: Callable[..., None] | None) -> None:
        """Brings the data of all buffers; those of one array must stand together."""
        to_read = [buffer for buffer in buffers if buffer.reason is not None]
        requests: list[tuple[list[str], str, list[list[tuple[int, int]]]]] = []
        batch: list[list[Buffer]] = []
        for buffer in to_read:
            if not batch or batch[-1][0].source is not buffer.source:
                batch.append([])
                requests.append((list(buffer.source.names), buffer.source.conversion, []))
            batch[-1].append(buffer)
            requests[-1][2].append(list(buffer.tensor_region))
        if requests:
            results, bytes_read = self.checkpoint._core.read(
                requests, on_overflow=self.on_overflow, workers=self.workers, memory=self._memory, callback=callback
            )
            self.bytes_read += bytes_read
            for group, (arrays, overflow, underflow) in zip(batch, results, strict=True):
                name = group[0].source.names[0]
                # Only tensors that lost something are listed.
                if overflow:
                    self.overflow[name] += overflow
                if underflow:
                    self.underflow[name] += underflow
                for buffer, array in zip(group, arrays, strict=True):
                    buffer.data = array.view(buffer.source.dtype).reshape(buffer.shape)
        for buffer in buffers:
            if buffer.reason is None:
                buffer.data = self._mapped(buffer)

    def _mapped(self, buffer: Buffer) -> NDArray[Any]:
        place = _place(self.checkpoint, buffer)
        if place is None:
            return np.empty(buffer.shape, buffer.source.dtype)
        view = self.checkpoint._core.view(buffer.source.names[0])[place.part]
        data = view[place.start : place.start + buffer.nbytes]
        return data.view(buffer.source.dtype).reshape(buffer.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a region lies in one stretch of one file: number of part and file, offsets in the part and in the file."""

    part: int
    file: int
    start: int
    offset: int
    is_remote: bool


def _place(checkpoint: Checkpoint, buffer: Buffer) -> _Place | None:
    """The one place of a region in the files; None if it is not in one piece, or empty."""
    stretch = _stretch(buffer.source.shape, buffer.tensor_region)
    if stretch is None or len(buffer.source.names) != 1:
        return None
    itemsize = checkpoint.specs[buffer.source.names[0]].dtype.itemsize
    start, stop = (elements * itemsize for elements in stretch)
    position = 0
    for part, (file, offset, nbytes, is_remote) in enumerate(checkpoint._core.parts(buffer.source.names[0])):
        if position <= start and stop <= position + nbytes:
            return _Place(part, file, start - position, offset + start - position, is_remote)
        position += nbytes
    return None


def _stretch(shape: tuple[int, ...], region: Region) -> tuple[int, int] | None:
    """First and last element of a region in row-major order, if it is one stretch; None if not, or if it is empty.

    The size of the first axis does not matter.
    """
    elements = math.prod(stop - start for start, stop in region)
    if not elements:
        return None
    stride, first, last = 1, 0, 0
    for size, (start, stop) in zip(reversed(shape), reversed(region), strict=True):
        first += start * stride
        last += (stop - 1) * stride
        stride *= size
    return (first, last + 1) if last + 1 - first == elements else None


def _reason(buffer: Buffer, place: _Place | None, io: str, is_shared: Callable[[Buffer], bool]) -> str | None:
    """Why a buffer's file is not mapped; None if it is."""
    if not buffer.nbytes:
        return None
    if buffer.source.conversion != "none":
        return "converted"
    if place is None:
        return "not in one piece"
    alignment = ALIGNMENT if io == "auto" else buffer.source.dtype.alignment
    reasons = {
        'io="read"': io == "read",
        "accelerator": io == "auto" and not is_shared(buffer),
        "misaligned": place.offset % alignment != 0,
        "remote filesystem": io == "auto" and place.is_remote,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def make_buffers(source: ArraySource, regions: dict[Region, list[jax.Device]] | None) -> list[Buffer]:
    """Buffers for what the devices hold of an array; None is the whole of it on JAX's default device."""
    if regions is None:
        return [Buffer(source, tuple((0, size) for size in source.shape), [])]
    return [Buffer(source, region, devices) for region, devices in regions.items()]
