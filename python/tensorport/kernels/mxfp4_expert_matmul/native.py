"""expert_matmul in Rust, on CPU."""

import jax
from jaxtyping import Array, Float, Int32

from tensorport.kernels import native
from tensorport.kernels.registry import Device
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["expert_matmul", "expert_matmul_int8", "refuses"]


def refuses(device: Device, x: Array, w: MXFP4Array, expert_ids: Array) -> str | None:
    """Why it cannot run on these arguments."""
    return native.refuses(device, x, w, expert_ids)


def expert_matmul(x: Float[Array, "t k"], w: MXFP4Array, expert_ids: Int32[Array, " t"]) -> Float[Array, "t n"]:
    """X [T, K] . w[expert_ids] [T, N, K] -> [T, N]."""
    return _call("tensorport.v1.mxfp4_expert_matmul", x, w, expert_ids)


def expert_matmul_int8(x: Float[Array, "t k"], w: MXFP4Array, expert_ids: Int32[Array, " t"]) -> Float[Array, "t n"]:
    """As `expert_matmul`, with x rounded to int8."""
    return _call("tensorport.v1.mxfp4_expert_matmul_int8", x, w, expert_ids)


def _call(target: str, x: Float[Array, "t k"], w: MXFP4Array, expert_ids: Int32[Array, " t"]) -> Float[Array, "t n"]:
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    rows: Array = native.call(target, result, x, w.blocks, w.scales, expert_ids)
    return rows
