"""The one table of dtypes: names as NumPy, ml_dtypes and JAX use them."""

from typing import Any, Final

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "SUB_BYTE"]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        (
            np.bool_,
            np.uint8,
            np.int8,
            np.uint16,
            np.int16,
            np.uint32,
            np.int32,
            np.uint64,
            np.int64,
            np.float16,
            np.float32,
            np.float64,
            np.complex64,
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e4m3fnuz,
            ml_dtypes.float8_e5m2,
            ml_dtypes.float8_e5m2fnuz,
            ml_dtypes.float8_e8m0fnu,
            ml_dtypes.float6_e2m3fn,
            ml_dtypes.float6_e3m2fn,
            ml_dtypes.float4_e2m1fn,
        ),
    )
}
"""Every dtype of safetensors 0.8, by its name."""

SUB_BYTE: Final = frozenset({"float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"})
"""Dtypes whose elements share bytes in a file. NumPy and ml_dtypes spend a whole byte on each."""
