"""linear in plain JAX."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tensorport import _core
from tensorport.kernels.registry import Device
from tensorport.kernels.tiles import accumulator_dtype

__all__ = ["linear"]


def linear(
    x: Float[Array, "*batch k"], weight: Float[Array, "n k"], bias: Float[Array, " n"] | None, out_dtype: DTypeLike
) -> Float[Array, "*batch n"]:
    """X . weight transposed + bias, rounded once.

    One row of bfloat16 by [4096, 2880] on 2 cores of an AMD EPYC with AVX-512 (JAX 0.10.2, 2026-11): 17 ms as a dot,
    1.7 ms as a sum of products, 1.0 ms as a dot of two rows. In a loop XLA converts the matrix for the sum of products
    once, before it: 11 ms each time, and the memory of the copy.
    """
    dtype = accumulator_dtype(x.dtype)
    *batch, k = x.shape
    rows = x.reshape(math.prod(batch), k)
    operand = x.dtype if x.dtype == weight.dtype else dtype
    is_row_on_cpu = rows.shape[0] == 1 and Device.of(x, weight).platform == "cpu"
    if is_row_on_cpu and (operand != jnp.bfloat16 or not _has_bfloat16_dot()):
        # XLA makes one loop of this, which reads the matrix once and needs no memory.
        out = jnp.sum(weight.astype(dtype) * rows.astype(dtype), axis=-1)[None]
    else:
        # XLA converts a matrix to float32 before it multiplies one row by it, and multiplies two as they are.
        repeated = jnp.concatenate([rows, rows]) if is_row_on_cpu else rows
        out = jax.lax.dot_general(
            repeated.astype(operand),
            weight.astype(operand),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )[: len(rows)]
    if bias is not None:
        out += bias.astype(dtype)[None]
    return out.astype(out_dtype).reshape(*batch, weight.shape[0])


@functools.cache
def _has_bfloat16_dot() -> bool:
    """Whether XLA multiplies bfloat16 on this CPU without converting it first: through oneDNN, with AVX-512."""
    return _core.simd_level().startswith("AVX-512")
