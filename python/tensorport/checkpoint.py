"""Opens a checkpoint as named NumPy views. No JAX."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorport import _core
from tensorport.dtypes import DTYPES, SUB_BYTE
from tensorport.progress import Progress
from tensorport.reports import grouped, human_bytes
from tensorport.source import local_path

__all__ = ["Checkpoint", "TensorSpec", "open"]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a checkpoint says of one tensor.

    Attributes:
        name: full dotted name.
        dtype: logical dtype, an ml_dtypes one where NumPy has none. For float4 and float6 its itemsize is 1 although
            their elements share bytes in the file; `nbytes` counts those.
        shape: logical shape.
        nbytes: bytes of data.
        files: files that hold the data, relative to the checkpoint; more than one if a conversion split the tensor.
        offset: where the data begins in the first file, in bytes.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int
    files: tuple[str, ...]
    offset: int


class Checkpoint(Mapping[str, NDArray[Any]]):
    """A checkpoint as a mapping from full dotted tensor names to read-only NumPy arrays.

    Arrays are views of the mapped files: nothing is read until it is touched, and nothing is copied, except that a
    tensor that a conversion split is joined, and one whose data is not aligned to its elements is moved, into a fresh
    array on each access. A view stays valid without the Checkpoint. While one lives, its file must not be edited or
    truncated: an edit shows in the array, and touching data behind a new end of file ends the process (SIGBUS).
    Replacing the file by a rename is safe.

    float4 and float6 tensors are 1-D uint8 arrays of their packed bytes; `specs` has their dtype and shape.
    """

    def __init__(self, source: str | os.PathLike[str], *, progress: Progress = False) -> None:
        """Opens `source`; see :func:`tensorport.open`."""
        self._path = local_path(source, progress)
        self._core = _core.Checkpoint(self._path)

    def __getitem__(self, name: str) -> NDArray[Any]:
        spec = self.specs[name]
        parts = self._core.view(name)
        data = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if data.ctypes.data % spec.dtype.alignment:
            data = data.copy()
        data.flags.writeable = False
        if spec.dtype.name in SUB_BYTE:
            return data
        return data.view(spec.dtype).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    @property
    def path(self) -> Path:
        """The path that was opened; of an id the folder in the cache."""
        return self._path

    @functools.cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """What is known of each tensor without touching its data: file by file, in the order of the data."""
        specs = {}
        for name in self._core.names():
            dtype, shape, nbytes, files, offset = self._core.spec(name)
            specs[name] = TensorSpec(name, DTYPES[dtype], tuple(shape), nbytes, tuple(files), offset)
        return MappingProxyType(specs)

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of the files; where two files disagree, the first one's word."""
        return self._core.metadata

    @property
    def total_parameters(self) -> int:
        """Number of parameters; MXFP4 values count once, scales do not."""
        return self._core.total_parameters

    @property
    def stored_elements(self) -> int:
        """Parameters and scales: the number that model hubs show."""
        return self._core.stored_elements

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(spec.nbytes for spec in self.specs.values())

    # A Checkpoint is equal to itself alone: comparing as mappings do would read every tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[type["Checkpoint"], tuple[Path]]:
        return Checkpoint, (self._path,)

    def __repr__(self) -> str:
        return (
            f"<Checkpoint {str(self._path)!r}: {len(self)} tensors, {grouped(self.total_parameters)} parameters, "
            f"{human_bytes(self.nbytes)}>"
        )


def open(source: str | os.PathLike[str], *, progress: Progress = False) -> Checkpoint:
    """Opens a checkpoint; reads its headers and no tensor data.

    Args:
        source: a `.safetensors` file; a directory with an index (its files and no others) or without one (every
            top-level `*.safetensors`); a directory that `convert` wrote; a `.msgpack` file by Flax or a `.pkl` file of
            arrays; or a folder that Orbax saved a PyTree to (extra `orbax`). Symbolic links are followed. Where there
            is no such path, a string `org/name[@revision][/subfolder]` is a repository's id on a hub (extra `hub`), of
            which the files of the checkpoint are downloaded; `hf://` before it forces that reading.
        progress: of a download: False, True for a bar, or a callable that gets a :class:`ProgressEvent`.

    Raises:
        CheckpointError: there is no checkpoint, or its bytes are wrong; names file, tensor, found, expected. Or the hub
            refuses, or has no such repository or revision.
        ImportError: `source` is an id, and the extra `hub` is not installed.
        OSError: the system refused; FileNotFoundError where `source` is neither a path nor an id, ConnectionError where
            the hub does not answer and the cache has no whole copy.
    """
    return Checkpoint(source, progress=progress)
