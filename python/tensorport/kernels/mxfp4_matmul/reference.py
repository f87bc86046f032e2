"""The definition of :func:`tensorport.mxfp4.matmul`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tensorport.kernels.tiles import accumulator_dtype
from tensorport.mxfp4.codec import decode
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["matmul"]


def matmul(x: Float[Array, "*batch k"], w: MXFP4Array) -> Float[Array, "*batch n"]:
    """X [..., K] . w [N, K] -> [..., N], all of w decoded."""
    dtype = accumulator_dtype(x.dtype)
    dense = decode(w.blocks, w.scales, dtype)
    return jnp.einsum("...k,nk->...n", x.astype(dtype), dense, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)
