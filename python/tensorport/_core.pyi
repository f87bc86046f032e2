"""The Rust extension module."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "MappingError",
    "TensorportError",
    "VerificationError",
    "__version__",
    "convert",
    "run_cli",
    "synthesize",
    "verify",
]

__version__: Final[str]

_Path = str | os.PathLike[str]
# phase, bytes_done, bytes_total, tensors_done, tensors_total, tensor
_Callback = Callable[[str, int, int, int, int, str], Any]

class TensorportError(Exception): ...
class CheckpointError(TensorportError): ...
class MappingError(TensorportError): ...
class ConversionError(TensorportError): ...

class VerificationError(TensorportError):
    report: Any

@final
class Checkpoint:
    def __new__(cls, source: _Path) -> Checkpoint: ...
    def names(self) -> list[str]: ...
    def spec(self, name: str) -> tuple[str, list[int], int, list[str], int]: ...
    def view(self, name: str) -> list[NDArray[np.uint8]]: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def total_parameters(self) -> int: ...
    @property
    def stored_elements(self) -> int: ...

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
) -> str: ...
def verify(output: _Path, source: _Path | None, *, workers: int | None, callback: _Callback | None) -> str: ...
def synthesize(folder: _Path, files: str, seed: int, *, workers: int | None, callback: _Callback | None) -> int: ...
def run_cli(args: Sequence[str]) -> int: ...
