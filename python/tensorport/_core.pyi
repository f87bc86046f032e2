"""The Rust extension module."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Arrivals",
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "MappingError",
    "Memory",
    "TensorportError",
    "VerificationError",
    "__version__",
    "convert",
    "ffi_targets",
    "mxfp4_decode",
    "mxfp4_encode",
    "run_cli",
    "select",
    "simd_level",
    "synthesize",
    "verify",
]

__version__: Final[str]
"""The version of the package: that of `Cargo.toml`."""

_Path = str | os.PathLike[str]
# phase, bytes_done, bytes_total, tensors_done, tensors_total, tensor
_Callback = Callable[[str, int, int, int, int, str], Any]

class TensorportError(Exception):
    """Base of the errors that only tensorport raises."""

class CheckpointError(TensorportError):
    """The bytes of a checkpoint are wrong. Names the file, the tensor, what was found and what was expected."""

class MappingError(TensorportError):
    """Names or shapes of tensors do not fit what was asked for."""

class ConversionError(TensorportError):
    """A conversion cannot go on: the output folder is in use, or values do not fit the precision."""

class VerificationError(TensorportError):
    """What was written does not read back. The attribute `report` is the VerificationReport."""

    report: Any

@final
class Arrivals:
    def __new__(cls) -> Arrivals: ...
    def arrived(self, name: str, path: _Path) -> None: ...
    def failed(self, fault: str) -> None: ...

@final
class Memory:
    def __new__(cls) -> Memory: ...

# names of one tensor, or of one and its scales; the conversion's name; regions as (start, stop) for each axis
_Request = tuple[list[str], str, list[list[tuple[int, int]]]]

@final
class Checkpoint:
    def __new__(cls, source: _Path) -> Checkpoint: ...
    def names(self) -> list[str]: ...
    def spec(self, name: str) -> tuple[str, list[int], int, list[str], int]: ...
    def view(self, name: str) -> list[NDArray[np.uint8]]: ...
    def parts(self, name: str) -> list[tuple[int, int, int, bool]]: ...
    def pairs(self) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]: ...
    def float8_pairs(self) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]: ...
    def read(
        self,
        requests: Sequence[_Request],
        *,
        on_overflow: str,
        workers: int | None,
        memory: Memory,
        callback: _Callback | None,
    ) -> tuple[list[tuple[list[NDArray[np.uint8]], int, int]], int]: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def total_parameters(self) -> int: ...
    @property
    def stored_elements(self) -> int: ...

def select(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[bool]: ...
def convert(
    source: _Path,
    output: _Path,
    options: str,
    *,
    resume: bool,
    overwrite: bool,
    verify: bool,
    workers: int | None,
    max_memory: int,
    callback: _Callback | None,
    arrivals: Arrivals | None = None,
) -> str: ...
def verify(output: _Path, source: _Path | None, *, workers: int | None, callback: _Callback | None) -> str: ...
def synthesize(folder: _Path, files: str, seed: int, *, workers: int | None, callback: _Callback | None) -> int: ...
def mxfp4_decode(
    blocks: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    dtype: str,
    *,
    workers: int | None,
    memory: Memory,
) -> NDArray[np.uint8]: ...
def mxfp4_encode(
    data: NDArray[np.uint8],
    dtype: str,
    scale_rule: str,
    *,
    workers: int | None,
    memory: Memory,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...
def simd_level() -> str: ...
def ffi_targets() -> dict[str, object]: ...
def run_cli(args: Sequence[str], local_path: Callable[[str, bool], tuple[_Path, Arrivals | None]]) -> int: ...
