"""The definition of :func:`tensorport.kernels.linear.api.linear`."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tensorport.kernels.tiles import accumulator_dtype

__all__ = ["linear"]


def linear(
    x: Float[Array, "*batch k"], weight: Float[Array, "n k"], bias: Float[Array, " n"] | None, out_dtype: DTypeLike
) -> Float[Array, "*batch n"]:
    """Products and sums in float32, rounded once."""
    dtype = accumulator_dtype(x.dtype)
    out = jnp.einsum("...k,nk->...n", x.astype(dtype), weight.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        out += bias.astype(dtype).reshape((1,) * (out.ndim - 1) + bias.shape)
    return out.astype(out_dtype)
