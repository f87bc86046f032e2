"""matmul in Rust, on CPU: codes are expanded in registers, or for many rows in the cache."""

import math

import jax
from jaxtyping import Array, Float

from tensorport.kernels import native
from tensorport.kernels.registry import Device
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["matmul", "matmul_int8", "refuses"]


def refuses(device: Device, x: Array, w: MXFP4Array) -> str | None:
    """Why it cannot run on these arguments."""
    return native.refuses(device, x, w)


def matmul(x: Float[Array, "*batch k"], w: MXFP4Array) -> Float[Array, "*batch n"]:
    """X [..., K] . w [N, K] -> [..., N]."""
    return _call("tensorport.v1.mxfp4_matmul", x, w)


def matmul_int8(x: Float[Array, "*batch k"], w: MXFP4Array) -> Float[Array, "*batch n"]:
    """As `matmul`, with x rounded to int8."""
    return _call("tensorport.v1.mxfp4_matmul_int8", x, w)


def _call(target: str, x: Float[Array, "*batch k"], w: MXFP4Array) -> Float[Array, "*batch n"]:
    *batch, k = x.shape
    result = jax.ShapeDtypeStruct((math.prod(batch), w.shape[0]), x.dtype)
    args = x.reshape(math.prod(batch), k), w.blocks, w.scales
    rows: Array = native.call(target, result, *args)
    return rows.reshape(*batch, w.shape[0])
