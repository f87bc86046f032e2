"""linear in Rust, on CPU: bfloat16 weights come from memory once, as they are."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tensorport.kernels import native
from tensorport.kernels.linear import xla
from tensorport.kernels.registry import Device

__all__ = ["linear", "refuses"]


def refuses(device: Device, x: Array, weight: Array, bias: Array | None) -> str | None:
    """Why it cannot run on these arguments."""
    if weight.dtype != jnp.bfloat16:
        return f"found weight in {weight.dtype}, expected bfloat16"
    return native.refuses(device, x, weight, bias)


def linear(
    x: Float[Array, "*batch k"], weight: Float[Array, "n k"], bias: Float[Array, " n"] | None, out_dtype: DTypeLike
) -> Float[Array, "*batch n"]:
    """X . weight transposed + bias, rounded once; derivatives by the implementation `xla`."""
    out: Array = _linear(jnp.dtype(out_dtype), x, weight, bias)
    return out


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _linear(out_dtype: jnp.dtype, x: Array, weight: Array, bias: Array | None) -> Array:
    *batch, k = x.shape
    computed = out_dtype if out_dtype.name in native.FLOATS else jnp.dtype(jnp.float32)
    result = jax.ShapeDtypeStruct((math.prod(batch), weight.shape[0]), computed)
    args = [x.reshape(math.prod(batch), k), weight] + ([] if bias is None else [native.as_float(bias)])
    rows: Array = native.call("tensorport.v1.linear", result, *args)
    return rows.astype(out_dtype).reshape(*batch, weight.shape[0])


@_linear.defjvp
def _linear_jvp(
    out_dtype: jnp.dtype,
    primals: tuple[Array, Array, Array | None],
    tangents: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    def product(x: Array, weight: Array, bias: Array | None) -> Array:
        return xla.linear(x, weight, bias, out_dtype)

    _, tangent = jax.jvp(product, primals, tangents)
    return _linear(out_dtype, *primals), tangent
