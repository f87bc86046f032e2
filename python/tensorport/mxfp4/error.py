"""What quantization loses: error_between() and quantization_error().

Sums are taken on the host in float64, a piece of the array at a time, whatever the arrays' dtype and device.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Final, TypeAlias

import jax
import numpy as np
from jaxtyping import Array

from tensorport.mxfp4.codec import FLOATS, Rounding, ScaleRule, dequantize, quantize
from tensorport.mxfp4.types import MX_BLOCK_BYTES, MX_BLOCK_SIZE, MXFP4Array
from tensorport.reports import grouped, human_bytes

__all__ = ["QuantizationError", "error_between", "quantization_error"]

_PIECE_BLOCKS: Final = 8192  # 2 MiB in float64: the passes over a piece stay within a processor's cache

_SAFE_EXPONENT: Final = 400  # squares of magnitudes within 2 ** +-400 are normal in float64, and so are sums of them


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizationError:
    """What MXFP4 loses of one array, and what it saves.

    Blocks of 32 in which the source has a NaN or an infinity are left out of mse, sqnr_db and max_error: the format has
    no such elements, so that the whole block is lost with them. `nonfinite` counts them.

    Attributes:
        mse: mean squared error. NaN where no values are left to compare; infinite beyond the range of float64.
        sqnr_db: signal to quantization noise, 10 log10(sum of squares of values / sum of squares of errors), in dB.
            Infinite where nothing is lost (also of zeros), minus infinity where zeros did not stay zeros, NaN where no
            values are left to compare.
        max_error: largest magnitude of an error; 0 where no values are left to compare.
        nonfinite: number of NaNs and infinities in the source.
        shape: logical shape [..., K].
        dtype: name of the source's dtype.
        source_bytes: size in that dtype.
        quantized_bytes: size of codes and scales.
    """

    mse: float
    sqnr_db: float
    max_error: float
    nonfinite: int
    shape: tuple[int, ...]
    dtype: str
    source_bytes: int
    quantized_bytes: int

    @property
    def compression(self) -> float:
        """How many times smaller codes and scales are: 3.76 for 16-bit floats, 7.53 for float32."""
        return self.source_bytes / self.quantized_bytes if self.quantized_bytes else 1.0

    def to_json(self) -> str:
        """Every attribute and `compression` as JSON; null in place of NaN and infinities."""
        return json.dumps(self._plain(), indent=2, allow_nan=False)

    def _plain(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"compression": self.compression}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }

    def __repr__(self) -> str:
        parts = [
            f"sqnr_db={self.sqnr_db:.2f}",
            f"mse={self.mse:.3g}",
            f"max_error={self.max_error:.3g}",
            f"compression={self.compression:.2f} ({human_bytes(self.source_bytes)} -> "
            f"{human_bytes(self.quantized_bytes)})",
            f"shape={self.shape}",
            f"dtype={self.dtype}",
        ]
        if self.nonfinite:
            parts.append(f"nonfinite={grouped(self.nonfinite)}")
        return f"QuantizationError({', '.join(parts)})"


def quantization_error(
    x: Any, *, scale_rule: ScaleRule = "floor", rounding: Rounding = "nearest", key: Array | None = None
) -> QuantizationError:
    """What :func:`quantize` would lose of an array: quantizes it and compares.

    >>> mxfp4.quantization_error(x, scale_rule="ceil")

    Args:
        x: bfloat16, float16, float32 or float64 [..., K], K a multiple of 32: a NumPy array, for which JAX starts no
            backend, or a jax.Array that this process holds whole.
        scale_rule: see :func:`quantize`.
        rounding: see :func:`quantize`.
        key: see :func:`quantize`.

    Raises:
        TypeError, ValueError: as :func:`quantize` and :func:`error_between`.

    Cost: codes and scales of `x`, and then that of :func:`error_between`.
    """
    return error_between(x, quantize(x, scale_rule=scale_rule, rounding=rounding, key=key))


def error_between(x: Any, w: MXFP4Array) -> QuantizationError:
    """What codes and scales have lost of the array that they were made of.

    Values and codes become float64 without rounding, and are subtracted, squared and summed in it: mse has a relative
    error below 1e-14, sqnr_db an absolute one below 1e-12. A code that stands for NaN where `x` is finite counts as an
    infinite error.

    Args:
        x: bfloat16, float16, float32 or float64 [..., K]: NumPy, or a jax.Array that this process holds whole.
        w: an MXFP4Array of the same logical shape, on the host or on any device.

    Raises:
        TypeError: `x` is not an array of one of those dtypes, `w` is no MXFP4Array, or one of them is traced: the
            figures are numbers of Python.
        ValueError: the shapes differ, or this process holds only a part of an array.

    Cost: arrays on devices come to the host a piece at a time; some ten MB of memory, whatever the size of `x`.
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype")) or isinstance(x, MXFP4Array):
        raise TypeError(f"x: found {type(x).__name__}, expected an array")
    if str(x.dtype) not in FLOATS:
        raise TypeError(f"x: found an array of {x.dtype}, expected one of {', '.join(FLOATS)}")
    if not isinstance(w, MXFP4Array):
        raise TypeError(f"w: found {type(w).__name__}, expected an MXFP4Array")
    if tuple(x.shape) != w.shape:
        raise ValueError(f"x and w: found shapes {tuple(x.shape)} and {w.shape}, expected the same")
    x, blocks, scales = (_readable(name, array) for name, array in (("x", x), ("w", w.blocks), ("w", w.scales)))
    sums = _Sums()
    for start, size in _pieces(scales.shape):
        *leading, first = start
        *rows, groups = size
        sums.add(
            _cut(x, (*leading, MX_BLOCK_SIZE * first), (*rows, MX_BLOCK_SIZE * groups)),
            MXFP4Array(_cut(blocks, (*start, 0), (*size, MX_BLOCK_BYTES)), _cut(scales, start, size)),
        )
    mse, sqnr_db = sums.total()
    return QuantizationError(
        mse=mse,
        sqnr_db=sqnr_db,
        max_error=sums.max_error,
        nonfinite=sums.nonfinite,
        shape=w.shape,
        dtype=str(x.dtype),
        source_bytes=w.size * x.dtype.itemsize,
        quantized_bytes=w.nbytes,
    )


class _Sums:
    """Sums of squares of values and of errors, piece by piece."""

    def __init__(self) -> None:
        self.values = self.nonfinite = 0
        self.max_error = 0.0
        self._signal: list[_Scaled] = []
        self._noise: list[_Scaled] = []

    def add(self, x: np.ndarray[Any, Any], w: MXFP4Array) -> None:
        source = x.astype(np.float64).reshape(-1, MX_BLOCK_SIZE)
        decoded = dequantize(w, np.float64).reshape(-1, MX_BLOCK_SIZE)
        is_finite = np.isfinite(source)
        if not is_finite.all():
            self.nonfinite += source.size - int(np.count_nonzero(is_finite))
            is_whole = is_finite.all(axis=1)
            source, decoded = source[is_whole], decoded[is_whole]
        if not source.size:
            return
        error = np.abs(source - decoded)
        error[np.isnan(error)] = np.inf
        max_error = float(error.max())
        self.values += source.size
        self.max_error = max(self.max_error, max_error)
        self._signal.append(_sum_of_squares(source, float(np.abs(source).max())))
        self._noise.append(_sum_of_squares(error, max_error))

    def total(self) -> tuple[float, float]:
        """Mean squared error and SQNR in dB."""
        if not self.values:
            return math.nan, math.nan
        (signal, signal_exponent), (noise, noise_exponent) = _total(self._signal), _total(self._noise)
        if not noise:
            return 0.0, math.inf
        if math.isinf(noise):
            return math.inf, -math.inf
        try:
            mse = math.ldexp(noise / self.values, noise_exponent)
        except OverflowError:
            mse = math.inf
        if not signal:
            return mse, -math.inf
        exponent = signal_exponent - noise_exponent
        return mse, 10 * (math.log10(signal) - math.log10(noise) + exponent * math.log10(2))


_Scaled: TypeAlias = tuple[float, int]
"""A float and an exponent of two: their product can be beyond the range of floats."""


def _sum_of_squares(values: np.ndarray[Any, Any], largest: float) -> _Scaled:
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    if abs(exponent) <= _SAFE_EXPONENT:
        exponent = 0
    else:
        values = np.ldexp(values, -exponent)
    # NumPy sums in pairs, so that roundings do not add up.
    return float(np.sum(np.square(values))), 2 * exponent


def _total(sums: list[_Scaled]) -> _Scaled:
    top = max((exponent for value, exponent in sums if value), default=0)
    return math.fsum(math.ldexp(value, exponent - top) for value, exponent in sums if value), top


def _readable(name: str, array: Any) -> Any:
    """An array that :func:`_cut` can read: NumPy wherever that costs no copy."""
    if isinstance(array, np.ndarray):
        return array
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        kind = "a traced array" if isinstance(array, jax.core.Tracer) else type(array).__name__
        raise TypeError(f"{name}: found {kind}, expected values: a NumPy array or a jax.Array outside of jit")
    if not array.is_fully_addressable:
        raise ValueError(f"{name}: found an array of which this process holds a part, expected all of it")
    is_on_host = len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"
    return np.asarray(array) if is_on_host else array


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Starts and sizes of pieces that cover an array of so many blocks."""
    room, steps = _PIECE_BLOCKS, list[int]()
    for size in reversed(shape):
        steps.append(max(1, min(size, room)))
        room //= steps[-1]
    steps.reverse()
    for start in itertools.product(*(range(0, size, step) for size, step in zip(shape, steps, strict=True))):
        yield start, tuple(min(step, size - at) for at, step, size in zip(start, steps, shape, strict=True))


def _cut(array: Any, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A piece of an array, on the host."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))])
    return np.asarray(_dynamic_slice(array, start, size=size))


@partial(jax.jit, static_argnames="size")
def _dynamic_slice(array: Array, start: tuple[int, ...], *, size: tuple[int, ...]) -> Array:
    # Starts are traced: one compilation for all pieces of one size.
    return jax.lax.dynamic_slice(array, start, size)
