"""How far results are from those of a reference, position by position."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison"]

_FLOAT32: Final = 1e-4
"""Largest difference in standard deviations: some thousand roundings of 6e-8 that add up, and no error of a model."""

_BFLOAT16: Final = 0.06
"""Median over positions of the relative RMS. Activations have 8 bits: a rounding is 0.002 of a value, each layer has
several that add up at random, and single positions are off where a token changes one of its experts."""

_TINY: Final = 1e-38


class Comparison:
    """Collects positions, some at a time: of each only a few numbers are kept."""

    def __init__(self, dtype: str) -> None:
        """Begins; `dtype` is the coarser one of both sides."""
        self._dtype = dtype
        self._largest: list[NDArray[np.float64]] = []
        self._error: list[NDArray[np.float64]] = []
        self._square: list[NDArray[np.float64]] = []
        self._variance: list[NDArray[np.float64]] = []
        self._same: list[NDArray[np.bool_]] = []

    def add(self, found: NDArray[Any], expected: NDArray[Any]) -> None:
        """Compares positions [..., V] with those of the reference."""
        assert found.shape == expected.shape, (found.shape, expected.shape)
        found, expected = (np.asarray(a, np.float32).reshape(-1, a.shape[-1]) for a in (found, expected))
        difference = np.abs(found - expected)
        self._largest.append(difference.max(axis=-1).astype(np.float64))
        self._error.append(np.mean(np.square(difference, dtype=np.float64), axis=-1))
        self._square.append(np.mean(np.square(expected, dtype=np.float64), axis=-1))
        self._variance.append(np.var(expected, axis=-1, dtype=np.float64))
        self._same.append(found.argmax(axis=-1) == expected.argmax(axis=-1))

    @property
    def largest(self) -> float:
        """The largest difference, in standard deviations of the reference."""
        deviation = float(np.sqrt(np.mean(np.concatenate(self._variance))))
        return float(np.max(np.concatenate(self._largest))) / max(deviation, _TINY)

    @property
    def relative_rms(self) -> NDArray[np.float64]:
        """For each position the RMS of the difference over that of the reference."""
        square = np.maximum(np.concatenate(self._square), _TINY)
        return np.sqrt(np.concatenate(self._error) / square)

    @property
    def same_argmax(self) -> float:
        """The share of positions whose largest value is the same one."""
        return float(np.mean(np.concatenate(self._same)))

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance of the dtype."""
        if self._dtype == "float32":
            return self.largest <= _FLOAT32
        return float(np.median(self.relative_rms)) <= _BFLOAT16

    def __str__(self) -> str:
        rms = self.relative_rms
        is_float32 = self._dtype == "float32"
        largest = f"largest difference {self.largest:.2e} standard deviations"
        median = f"relative RMS of positions: median {np.median(rms):.2e}"
        largest += f" (tolerance {_FLOAT32:g})" if is_float32 else ""
        median += "" if is_float32 else f" (tolerance {_BFLOAT16:g})"
        return f"{largest}, {median}, worst {rms.max():.2e}, same argmax {self.same_argmax:.1%}"
