"""mxfp4.matmul: checked once, computed by one of several implementations, differentiable in x."""

from functools import partial

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, BFloat16, Float

from tensorport.kernels import native as native_kernels
from tensorport.kernels import triton
from tensorport.kernels.arguments import float_array, mxfp4_array, same_size
from tensorport.kernels.frozen import no_gradient
from tensorport.kernels.mxfp4_matmul import native, scaled_dot, xla
from tensorport.kernels.registry import Implementation, ImplementationName, Op
from tensorport.kernels.varying import vary_alike
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["OP", "matmul"]


def _arguments(x: ArrayLike, w: MXFP4Array) -> tuple[Array, MXFP4Array]:
    x, w = float_array("x", x), mxfp4_array("w", w, 2)
    same_size("K, the last axis", {"x": x.shape[-1], "w": w.shape[1]})
    return x, w


def _pallas_triton(x: Array, w: MXFP4Array) -> Array:
    from tensorport.kernels.mxfp4_matmul import pallas_triton  # noqa: PLC0415 - Pallas is imported where it runs

    return pallas_triton.matmul(x, w)


OP = Op(
    "mxfp4.matmul",
    _arguments,
    Implementation("pallas_triton", _pallas_triton, triton.refuses, opt_in=triton.NOT_MEASURED),
    Implementation("scaled_dot", scaled_dot.matmul, scaled_dot.refuses),
    Implementation("native", native.matmul, native.refuses, elsewhere=xla.matmul),
    Implementation(
        "native_int8", native.matmul_int8, native.refuses, is_for_cpu=True, opt_in=native_kernels.ROUNDS_TO_INT8
    ),
    Implementation("xla", xla.matmul),
)


def matmul(
    x: Float[ArrayLike, "*batch k"], w: BFloat16[MXFP4Array, "n k"], *, implementation: ImplementationName = "auto"
) -> Float[Array, "*batch n"]:
    """Multiplies by an MXFP4 matrix: x [..., K] . w [N, K] -> [..., N], as `x @ w.dequantize().T` would.

    Codes and scales are exact (but backends that flush subnormals, such as CPU, take weights below 2 ** -126 for zero),
    `x` is never narrowed, and sums are taken in float32 (float64 where `x` is). A tile of rows of `w` is decoded at a
    time: a dense copy of it is never made. Differentiable in `x` (in reverse mode, any
    number of times); the gradient is computed by the implementation `xla`. Codes are frozen.

    Args:
        x: bfloat16, float16, float32 or float64.
        w: codes and scales of [N, K], the contraction axis last.
        implementation: see :func:`tensorport.kernels.explain`. `native_int8` alone rounds `x`.

    Returns:
        In the dtype of `x`, on its device.

    Raises:
        NotImplementedError: the named implementation cannot run here; says why.
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    arrays = _arguments(x, w)
    out: Array = _matmul(OP.choose(implementation, *arrays).name, *vary_alike(arrays))
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(implementation: str, x: Array, w: MXFP4Array) -> Array:
    return OP.implementations[implementation].run(x, w)


_matmul = jax.jit(_differentiable, static_argnums=0)


def _matmul_forward(implementation: str, x: Array, w: MXFP4Array) -> tuple[Array, MXFP4Array]:
    return _matmul(implementation, x, w), w


def _matmul_backward(_: str, w: MXFP4Array, g: Array) -> tuple[Array, MXFP4Array]:
    return _transposed(g, w), no_gradient(w)


@jax.custom_vjp
def _transposed(g: Array, w: MXFP4Array) -> Array:
    return xla.matmul_transposed(g, w)


def _transposed_forward(g: Array, w: MXFP4Array) -> tuple[Array, MXFP4Array]:
    return _transposed(g, w), w


def _transposed_backward(w: MXFP4Array, x: Array) -> tuple[Array, MXFP4Array]:
    return _matmul("xla", x, w), no_gradient(w)


_differentiable.defvjp(_matmul_forward, _matmul_backward)
_transposed.defvjp(_transposed_forward, _transposed_backward)
