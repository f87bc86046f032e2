"""linear: checked once, computed by one of several implementations."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from tensorport.kernels.arguments import float_array, same_size
from tensorport.kernels.linear import native, xla
from tensorport.kernels.registry import Implementation, ImplementationName, Op
from tensorport.mxfp4.codec import FLOATS

__all__ = ["OP", "linear"]


def _arguments(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, weight = float_array("x", x), float_array("weight", weight, 2)
    bias = None if bias is None else float_array("bias", bias, 1)
    same_size("K, the contracted axis", {"x": x.shape[-1], "weight": weight.shape[1]})
    if bias is not None:
        same_size("N, the width of the result", {"weight": weight.shape[0], "bias": bias.shape[0]})
    return x, weight, bias


OP = Op(
    "linear",
    _arguments,
    Implementation("native", native.linear, native.refuses, elsewhere=xla.linear),
    Implementation("xla", xla.linear),
)


def linear(
    x: Float[ArrayLike, "*batch k"],
    weight: Float[ArrayLike, "n k"],
    bias: Float[ArrayLike, " n"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: ImplementationName = "auto",
) -> Float[Array, "*batch n"]:
    """X [..., K] . weight [N, K] + bias [N] -> [..., N], the matrix as checkpoints store it.

    Products are summed in float32 (float64 where `x` is) and rounded once, after the bias.

    Args:
        x: any float dtype.
        weight: any float dtype.
        bias: added before rounding; None for none.
        out_dtype: of the result; the dtype of `x` by default.
        implementation: see :func:`tensorport.kernels.explain`.

    Raises:
        NotImplementedError: the named implementation cannot run here; says why.
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    inputs = _arguments(x, weight, bias)
    dtype = inputs[0].dtype if out_dtype is None else jnp.dtype(out_dtype)
    if dtype.name not in FLOATS:
        raise TypeError(f"out_dtype: found {dtype.name}, expected one of {', '.join(FLOATS)}")
    return OP.choose(implementation, *inputs).run(*inputs, dtype)
