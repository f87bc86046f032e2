"""The values of a checkpoint: NaNs and infinities, in the files and without JAX."""

import dataclasses
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorport.checkpoint import Checkpoint
from tensorport.reports import grouped

__all__ = ["ValueCounts", "count_values"]

_NAN_SCALE: Final = 255
"""The byte of E8M0 that is no power of two: OCP MX v1.0."""

_CHUNK_ELEMS: Final = 1 << 22

# All ones in the exponent are infinity or NaN: dtype as which the bits are read, and the bits of the exponent.
_EXPONENTS: Final = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
}


@dataclasses.dataclass(frozen=True, slots=True)
class ValueCounts:
    """What was read, and what is wrong with it.

    Attributes:
        scales: scales of MXFP4 blocks.
        floats: other values.
        failures: tensors with NaNs or infinities, and how many.
    """

    scales: int
    floats: int
    failures: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{grouped(self.floats)} values and {grouped(self.scales)} MXFP4 scales read, "
            f"{len(self.failures)} tensors with NaNs or infinities"
        )


def count_values(checkpoint: Checkpoint) -> ValueCounts:
    """Reads all floats and all scales of MXFP4, a few megabytes at a time; codes are finite, whatever they are."""
    pairs, _ = checkpoint._core.pairs()
    scale_names = {scales for _, _, scales in pairs}
    failures, scales, floats = [], 0, 0
    for name, spec in checkpoint.specs.items():
        if name in scale_names:
            array = checkpoint[name].reshape(-1)
            scales += array.size
            count = int(np.count_nonzero(array == _NAN_SCALE))
            if count:
                failures.append(f"{name}: found {grouped(count)} scales of 255, which is NaN, expected none")
        elif spec.dtype in _EXPONENTS:
            array = checkpoint[name].reshape(-1)
            floats += array.size
            count = _nonfinite(array)
            if count:
                failures.append(f"{name}: found {grouped(count)} NaNs or infinities, expected none")
    return ValueCounts(scales, floats, tuple(failures))


def _nonfinite(array: NDArray[Any]) -> int:
    bits_dtype, exponent = _EXPONENTS[array.dtype]
    bits, mask = array.view(bits_dtype), bits_dtype(exponent)
    chunks = (bits[start : start + _CHUNK_ELEMS] for start in range(0, bits.size, _CHUNK_ELEMS))
    return sum(int(np.count_nonzero(chunk & mask == mask)) for chunk in chunks)
