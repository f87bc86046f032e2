"""matmul on the block-scaled tensor cores of NVIDIA's Blackwell, through XLA's scaled dot.

That lowering is young: scales were dropped without a word before (openxla/xla#48543). So the first call on a kind of
device compares it with the reference, and a device on which it is wrong never runs it.
"""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tensorport.kernels.mxfp4_matmul import reference
from tensorport.kernels.registry import Device
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["matmul", "refuses", "self_check"]

_BLACKWELL = (10, 0)
_CHECKED_SHAPE = 48, 160, 256  # M, N, K: more than one tile, none a power of two but K


def matmul(x: Float[Array, "*batch k"], w: MXFP4Array) -> Float[Array, "*batch n"]:
    """X [..., K] . w [N, K] -> [..., N]."""
    *batch, k = x.shape
    codes = jax.lax.bitcast_convert_type(w.blocks, jnp.float4_e2m1fn)  # the low nibble first, as in the blocks
    out = jax.lax.scaled_dot(
        x.reshape(math.prod(batch), k),
        codes.reshape(w.shape),
        rhs_scale=jax.lax.bitcast_convert_type(w.scales, jnp.float8_e8m0fnu),
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    rounded: Array = out.astype(x.dtype)
    return rounded.reshape(*batch, w.shape[0])


def refuses(device: Device, x: Any, w: Any) -> str | None:
    """Why this cannot run on arrays, or on what has their shapes and dtypes."""
    if device.compute_capability is None or device.compute_capability < _BLACKWELL:
        return "needs an NVIDIA GPU of compute capability 10.0 (Blackwell) or newer"
    if x.dtype != jnp.bfloat16:
        return f"needs x in bfloat16, found {x.dtype}"
    if not (math.prod(x.shape) and math.prod(w.shape)):
        return "needs arrays that are not empty"
    return _checked(device)


@functools.cache
def _checked(device: Device) -> str | None:
    fault = self_check()
    if fault is not None:
        warnings.warn(f"mxfp4.matmul: scaled_dot is not used on {device}: {fault}", RuntimeWarning, stacklevel=2)
    return fault


def self_check() -> str | None:
    """Compares with the reference on the default device, under scales that differ; says what is wrong, if anything."""
    m, n, k = _CHECKED_SHAPE
    rng = np.random.default_rng(0)
    w = MXFP4Array(
        rng.integers(0, 256, (n, k // 32, 16), np.uint8), rng.integers(117, 138, (n, k // 32)).astype(np.uint8)
    )
    x = rng.standard_normal((m, k)).astype(jnp.bfloat16)
    # A caller may be traced; this is not.
    with jax.ensure_compile_time_eval():
        w = jax.tree.map(jnp.asarray, w)
        try:
            found = np.asarray(jax.jit(matmul)(jnp.asarray(x), w), np.float32)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, TypeError) as fault:
            return f"its self-check failed ({type(fault).__name__}: {str(fault).splitlines()[0]})"
        expected = np.asarray(reference.matmul(jnp.asarray(x, jnp.float32), w))
    # Rounded once to bfloat16, whose epsilon is 2 ** -8, and sums in another order.
    error = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
    if not error <= 2**-7:
        return f"its self-check failed (found a relative error of {error:.2g} against the reference, expected 2 ** -7)"
    return None
