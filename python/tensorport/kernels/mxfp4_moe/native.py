"""moe in Rust, on CPU: both layers and all between them in one call, for MXFP4 and for bfloat16 experts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from tensorport.kernels import native
from tensorport.kernels.mxfp4_moe.types import Activation, DenseExperts, Experts, TransposedExperts
from tensorport.kernels.registry import Device

__all__ = ["moe", "moe_int8", "refuses"]


def refuses(device: Device, x: Array, router_indices: Array, router_weights: Array, experts: Any) -> str | None:
    """Why it cannot run on these arguments."""
    if isinstance(experts, TransposedExperts):
        return "found matrices [in, out], expected [out, in]"
    if isinstance(experts, DenseExperts):
        for name in ("gate_up", "down"):
            dtype = getattr(experts, name).dtype
            if dtype != jnp.bfloat16:
                return f"found {name} in {dtype}, expected bfloat16"
    if not experts.down.shape[-1]:
        return "found no values between the layers, expected some"
    return native.refuses(device, x, router_indices, router_weights, experts)


def moe(
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts | DenseExperts,
    activation: Activation,
) -> Float[Array, "t h"]:
    """The outputs of each token's experts, weighted and summed."""
    is_mxfp4 = isinstance(experts, Experts)
    target = "tensorport.v1.mxfp4_moe" if is_mxfp4 else "tensorport.v1.dense_moe"
    return _call(target, x, router_indices, router_weights, experts, activation)


def moe_int8(
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts,
    activation: Activation,
) -> Float[Array, "t h"]:
    """As `moe`, with what both layers multiply rounded to int8."""
    return _call("tensorport.v1.mxfp4_moe_int8", x, router_indices, router_weights, experts, activation)


def _call(  # noqa: PLR0917 - those of moe
    target: str,
    x: Float[Array, "t h"],
    router_indices: Int32[Array, "t k"],
    router_weights: Float[Array, "t k"],
    experts: Experts | DenseExperts,
    activation: Activation,
) -> Float[Array, "t h"]:
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    weights = router_weights.astype(jnp.float32)
    gate_up_bias, down_bias = native.as_float(experts.gate_up_bias), native.as_float(experts.down_bias)
    # An MXFP4Array has two leaves, blocks and scales, and a dense array is its own.
    args = jax.tree.leaves((x, router_indices, weights, experts.gate_up, gate_up_bias, experts.down, down_bias))
    constants = {"limit": np.float32(activation.limit), "alpha": np.float32(activation.alpha)}
    out: Array = native.call(target, result, *args, **constants)
    return out
