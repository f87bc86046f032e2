"""The definition of :func:`tensorport.mxfp4.expert_matmul`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tensorport.kernels.tiles import accumulator_dtype
from tensorport.mxfp4.codec import decode
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["expert_matmul"]


def expert_matmul(x: Float[Array, "t k"], w: MXFP4Array, expert_ids: Int32[Array, " t"]) -> Float[Array, "t n"]:
    """X [T, K] . w[expert_ids] [T, N, K] -> [T, N]: a decoded matrix for every token."""
    dtype = accumulator_dtype(x.dtype)
    chosen = w[expert_ids]
    dense = decode(chosen.blocks, chosen.scales, dtype)
    out = jnp.einsum("tk,tnk->tn", x.astype(dtype), dense, precision=jax.lax.Precision.HIGHEST)
    is_valid = (expert_ids >= 0) & (expert_ids < w.shape[0])
    return jnp.where(is_valid[:, None], out, jnp.nan).astype(x.dtype)
