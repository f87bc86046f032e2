"""Which GPUs run Pallas kernels through Triton, and which arguments they take."""

from typing import Any, Final

import jax
import jax.numpy as jnp

from tensorport.kernels.registry import Device

__all__ = ["NOT_MEASURED", "refuses"]

NOT_MEASURED: Final = "not measured on a GPU yet, and runs where it is named alone"
"""Why the automatic choice leaves a kernel out."""

_OLDEST: Final = (8, 0)


def refuses(device: Device, *inputs: Any) -> str | None:
    """What speaks against all kernels through Triton; None if nothing does."""
    if device.compute_capability is None:
        return "runs on NVIDIA GPUs alone"
    if device.compute_capability < _OLDEST:
        found, expected = (".".join(map(str, version)) for version in (device.compute_capability, _OLDEST))
        return f"found compute capability {found}, expected at least {expected}"
    arrays = jax.tree.leaves(inputs)
    if any(array.dtype == jnp.float64 for array in arrays):
        return "found float64, expected float32, bfloat16 or float16"
    if not all(isinstance(size, int) for array in arrays for size in array.shape):
        return "found a symbolic size, expected numbers"
    if not all(array.size for array in arrays):
        return "found an empty array"
    return None
