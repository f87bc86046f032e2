"""Checks of arguments that the ops share; each says what was found and what was expected."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from tensorport.mxfp4.codec import FLOATS
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["float_array", "integer_array", "mxfp4_array", "same_size"]


def float_array(name: str, value: ArrayLike, ndim: int | None = None) -> jnp.ndarray:
    """An array of bfloat16, float16, float32 or float64; with `ndim` axes, or else at least one."""
    array = _array(name, value)
    if array.dtype.name not in FLOATS:
        raise TypeError(f"{name}: found an array of {array.dtype}, expected one of {', '.join(FLOATS)}")
    return _with_ndim(name, array, ndim)


def integer_array(name: str, value: ArrayLike, ndim: int) -> jnp.ndarray:
    """An array of integers, in int32: what it cannot hold as its ends, and not as some other number."""
    ends = np.iinfo(np.int32)
    # JAX may take 32 bits of NumPy's 64.
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        value = value.clip(ends.min, ends.max).astype(np.int32)
    array = _array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: found an array of {array.dtype}, expected integers")
    if array.dtype.name in ("uint32", "int64", "uint64"):
        array = array.clip(0 if array.dtype.kind == "u" else ends.min, ends.max)
    return _with_ndim(name, array.astype(np.int32), ndim)


def mxfp4_array(name: str, value: Any, ndim: int) -> MXFP4Array:
    """An MXFP4Array with so many logical axes."""
    if not isinstance(value, MXFP4Array):
        raise TypeError(f"{name}: found {type(value).__name__}, expected an MXFP4Array")
    if value.ndim != ndim:
        raise ValueError(f"{name}: found shape {value.shape}, expected {_axes(ndim)}")
    return value


def same_size(what: str, sizes: dict[str, int]) -> None:
    """Refuses sizes of one axis that differ between arrays."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ValueError(f"{what}: found {found}, expected the same in all")


def _array(name: str, value: ArrayLike) -> jnp.ndarray:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")) or isinstance(value, MXFP4Array):
        raise TypeError(f"{name}: found {type(value).__name__}, expected an array")
    return jnp.asarray(value)


def _with_ndim(name: str, array: jnp.ndarray, ndim: int | None) -> jnp.ndarray:
    if array.ndim != ndim if ndim is not None else array.ndim < 1:
        expected = "at least one axis" if ndim is None else _axes(ndim)
        raise ValueError(f"{name}: found shape {array.shape}, expected {expected}")
    return array


def _axes(ndim: int) -> str:
    return "1 axis" if ndim == 1 else f"{ndim} axes"
