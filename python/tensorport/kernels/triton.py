"""What Pallas kernels through Triton share: which GPUs run them, and how MXFP4 becomes floats in registers.

Kernels see the checkpoint's own bytes: byte j of a row holds element 2j in its low four bits and 2j + 1 in its high
ones, and sixteen bytes share a scale. So activations come apart in even and odd elements; codes stay as they are.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt16

from tensorport.kernels.registry import Device
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["BYTES_OF_BLOCK", "NOT_MEASURED", "decode", "refuses", "scale_of", "split_pairs", "spread"]

BYTES_OF_BLOCK: Final = 16
"""Bytes of codes under one scale."""

NOT_MEASURED: Final = "not measured on a GPU yet, and runs where it is named alone"
"""Why the automatic choice leaves a kernel out."""

_OLDEST: Final = (8, 0)


def refuses(device: Device, x: Array, w: MXFP4Array) -> str | None:
    """What speaks against all kernels through Triton for activations `x`; None if nothing does."""
    if x.dtype == jnp.float64:
        return "found x in float64, expected float32, bfloat16 or float16"
    if not x.size or not w.size:
        return "found an empty array"
    if device.compute_capability is None:
        return "runs on NVIDIA GPUs alone"
    if device.compute_capability < _OLDEST:
        found, expected = (".".join(map(str, version)) for version in (device.compute_capability, _OLDEST))
        return f"found compute capability {found}, expected at least {expected}"
    return None


def split_pairs(x: Float[Array, "m k"]) -> tuple[Float[Array, "m k/2"], Float[Array, "m k/2"]]:
    """The even and the odd elements of each row."""
    pairs = x.reshape(x.shape[0], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def decode(codes: UInt16[Array, "*tile"]) -> Float[Array, "*tile"]:
    """The values of codes 0 .. 15, in float32.

    Exponent and mantissa of a code are those of a float16 that is 2 ** 14 too small, subnormal ones included: 1 is the
    code 0.5 there. The product is exact.
    """
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 2.0**14


def scale_of(scales: UInt8[Array, "*tile"]) -> Float[Array, "*tile"]:
    """2 ** (scale - 127) in float32: byte 0 is subnormal, byte 255 NaN."""
    wide = scales.astype(jnp.uint32)
    bits = jnp.where(wide == 0, jnp.uint32(1 << 22), jnp.where(wide == 255, jnp.uint32(0x7FC0_0000), wide << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def spread(scales: Float[Array, "n blocks"]) -> Float[Array, "n 16*blocks"]:
    """Each scale for each of its block's bytes."""
    rows, blocks = scales.shape
    return jnp.broadcast_to(scales[:, :, None], (rows, blocks, BYTES_OF_BLOCK)).reshape(rows, blocks * BYTES_OF_BLOCK)
