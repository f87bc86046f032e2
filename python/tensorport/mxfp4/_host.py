"""The MXFP4 codec of NumPy arrays: the Rust core on all cores, bit for bit what the JAX codec does."""

from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tensorport import _core
from tensorport.dtypes import DTYPES

__all__ = ["decode", "encode"]

_BLOCK_SIZE: Final = 32
_BLOCK_BYTES: Final = 16
_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")


def decode(
    blocks: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    dtype: DTypeLike,
    *,
    workers: int | None = None,
    memory: _core.Memory | None = None,
) -> NDArray[Any]:
    """Decodes MXFP4, the last axis of the result being the values of all blocks of the last axis of `scales`.

    Exact in float64 under every scale byte, in bfloat16 and float32 up to scale byte 252; under 253 and 254 the largest
    codes become infinities there. float16 rounds to nearest even, and what it cannot hold becomes infinity or zero.

    Args:
        blocks: two E2M1 codes per byte, the low nibble first: uint8 [..., G, 16], in any memory order.
        scales: biased E8M0 exponents, 255 is NaN: uint8 [..., G].
        dtype: float16, bfloat16, float32 or float64.
        workers: threads; all cores by default. Small arrays are decoded by the calling thread.
        memory: what earlier results lay in, to be used again once nobody looks at them; fresh memory by default.

    Returns:
        An array [..., 32 * G] of `dtype`, read-only, at a multiple of 64 bytes (JAX on CPU then shares it). float64 is
        decoded by way of float32, into an ordinary array.

    Raises:
        TypeError: blocks or scales are not arrays of uint8.
        ValueError: their shapes do not fit each other, or `dtype` is none of the four.

    The arrays must not be written to by other threads meanwhile.
    """
    name = np.dtype(dtype).name
    if name not in _FLOATS:
        raise ValueError(f"dtype: found {name}, expected one of {', '.join(_FLOATS)}")
    for argument, array in (("blocks", blocks), ("scales", scales)):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise TypeError(f"{argument}: found {_kind(array)}, expected an array of uint8")
    if blocks.ndim < 2 or blocks.shape[-1] != _BLOCK_BYTES:
        raise ValueError(f"blocks: found shape {blocks.shape}, expected (..., G, {_BLOCK_BYTES})")
    if scales.shape != blocks.shape[:-1]:
        raise ValueError(f"scales: found shape {scales.shape}, expected {blocks.shape[:-1]}, one for each block")
    if name == "float64":
        # float32 holds all values up to scale byte 252; blocks under 253 and 254 are decoded 256 times smaller.
        is_large = (scales == 253) | (scales == 254)
        values = decode(blocks, np.where(is_large, scales - np.uint8(8), scales), np.float32, workers=workers)
        factors = np.where(is_large, 256.0, 1.0)
        return (values.reshape(*scales.shape, _BLOCK_SIZE) * factors[..., None]).reshape(values.shape)
    decoded = _core.mxfp4_decode(
        _flat(blocks), _flat(scales), name, workers=workers, memory=_core.Memory() if memory is None else memory
    )
    return decoded.view(DTYPES[name]).reshape(*scales.shape[:-1], _BLOCK_SIZE * scales.shape[-1])


def encode(
    x: NDArray[Any],
    scale_rule: str,
    *,
    workers: int | None = None,
    memory: _core.Memory | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Encodes floats to MXFP4, in blocks of 32 along the last axis.

    Elements round to the nearest code, ties to the even one, and saturate at 6 times the scale; the sign of zero stays.
    A block of zeros has scale byte 0. A NaN makes its whole block NaN: scale byte 255, codes 0. Infinities stay: their
    block has scale byte 254, under which the largest codes decode to infinities in bfloat16 and float32.

    Args:
        x: float16, bfloat16, float32 or float64 [..., 32 * G], in any memory and byte order.
        scale_rule: `floor`: the exponent of a block is floor(log2(amax)) - 2, as in OCP MX v1.0; `ceil`: the smallest
            under which nothing saturates; `nearest`: the one under which the largest magnitude has the smallest error.
        workers: threads; all cores by default. Small arrays are encoded by the calling thread.
        memory: what earlier results lay in, to be used again once nobody looks at them; fresh memory by default.

    Returns:
        blocks [..., G, 16] and scales [..., G], read-only uint8 arrays at multiples of 64 bytes.

    Raises:
        TypeError: x is no array.
        ValueError: its dtype is none of the four, its last axis is no multiple of 32, or there is no such rule.

    The array must not be written to by other threads meanwhile.
    """
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x: found {_kind(x)}, expected an array of floats")
    if x.dtype.name not in _FLOATS:
        raise ValueError(f"x: found an array of {x.dtype}, expected one of {', '.join(_FLOATS)}")
    if x.ndim < 1 or x.shape[-1] % _BLOCK_SIZE:
        raise ValueError(f"x: found shape {x.shape}, expected a last axis that is a multiple of {_BLOCK_SIZE}")
    groups_shape = (*x.shape[:-1], x.shape[-1] // _BLOCK_SIZE)
    blocks, scales = _core.mxfp4_encode(
        _flat(np.ascontiguousarray(x, DTYPES[x.dtype.name])),
        x.dtype.name,
        scale_rule,
        workers=workers,
        memory=_core.Memory() if memory is None else memory,
    )
    return blocks.reshape(*groups_shape, _BLOCK_BYTES), scales.reshape(groups_shape)


def _flat(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array's bytes in C order; a copy only where they lie in another one."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _kind(value: object) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
