"""mxfp4.expert_matmul: checked once, computed by one of several implementations, differentiable in x."""

from functools import partial

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, BFloat16, Float, Integer

from tensorport.kernels import native as native_kernels
from tensorport.kernels import triton
from tensorport.kernels.arguments import float_array, integer_array, mxfp4_array, same_size
from tensorport.kernels.frozen import no_gradient
from tensorport.kernels.mxfp4_expert_matmul import native, xla
from tensorport.kernels.registry import Implementation, ImplementationName, Op
from tensorport.kernels.varying import vary_alike
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["OP", "expert_matmul"]


def _arguments(x: ArrayLike, w: MXFP4Array, expert_ids: ArrayLike) -> tuple[Array, MXFP4Array, Array]:
    x, w, expert_ids = float_array("x", x, 2), mxfp4_array("w", w, 3), integer_array("expert_ids", expert_ids, 1)
    same_size("T, the number of tokens", {"x": x.shape[0], "expert_ids": expert_ids.shape[0]})
    same_size("K, the last axis", {"x": x.shape[1], "w": w.shape[2]})
    return x, w, expert_ids


def _pallas_triton(x: Array, w: MXFP4Array, expert_ids: Array) -> Array:
    from tensorport.kernels.mxfp4_expert_matmul import pallas_triton  # noqa: PLC0415 - Pallas is imported where it runs

    return pallas_triton.expert_matmul(x, w, expert_ids)


OP = Op(
    "mxfp4.expert_matmul",
    _arguments,
    Implementation("pallas_triton", _pallas_triton, triton.refuses, opt_in=triton.NOT_MEASURED),
    Implementation("native", native.expert_matmul, native.refuses, elsewhere=xla.expert_matmul),
    Implementation(
        "native_int8", native.expert_matmul_int8, native.refuses, is_for_cpu=True, opt_in=native_kernels.ROUNDS_TO_INT8
    ),
    Implementation("xla", xla.expert_matmul),
)


def expert_matmul(
    x: Float[ArrayLike, "t k"],
    w: BFloat16[MXFP4Array, "e n k"],
    expert_ids: Integer[ArrayLike, " t"],
    *,
    implementation: ImplementationName = "auto",
) -> Float[Array, "t n"]:
    """Multiplies each token by the MXFP4 matrix of its expert: x [T, K] . w[expert_ids] [T, N, K] -> [T, N].

    Only the experts that have tokens are decoded, a tile of rows at a time; tokens of one expert are multiplied
    together. Codes and scales are exact, `x` is never narrowed, and sums are taken in float32 (float64 where `x` is).
    Differentiable in `x` (in reverse mode, any number of times), by the implementation `xla`.

    Args:
        x: bfloat16, float16, float32 or float64.
        w: codes and scales of [E, N, K], the contraction axis last.
        expert_ids: in any order. The row of a token whose id is not in 0 .. E - 1 becomes NaN.
        implementation: see :func:`tensorport.kernels.explain`. `native_int8` alone rounds `x`.

    Returns:
        In the dtype of `x`, on its device.

    Raises:
        NotImplementedError: the named implementation cannot run here; says why.
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    arrays = _arguments(x, w, expert_ids)
    out: Array = _expert_matmul(OP.choose(implementation, *arrays).name, *vary_alike(arrays))
    return out


_Frozen = tuple[MXFP4Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(implementation: str, x: Array, w: MXFP4Array, expert_ids: Array) -> Array:
    return OP.implementations[implementation].run(x, w, expert_ids)


_expert_matmul = jax.jit(_differentiable, static_argnums=0)


def _forward(implementation: str, x: Array, w: MXFP4Array, expert_ids: Array) -> tuple[Array, _Frozen]:
    return _expert_matmul(implementation, x, w, expert_ids), (w, expert_ids)


def _backward(_: str, frozen: _Frozen, g: Array) -> tuple[Array, MXFP4Array, Array]:
    return _transposed(g, *frozen), *no_gradient(frozen)


@jax.custom_vjp
def _transposed(g: Array, w: MXFP4Array, expert_ids: Array) -> Array:
    return xla.expert_matmul_transposed(g, w, expert_ids)


def _transposed_forward(g: Array, w: MXFP4Array, expert_ids: Array) -> tuple[Array, _Frozen]:
    return _transposed(g, w, expert_ids), (w, expert_ids)


def _transposed_backward(frozen: _Frozen, x: Array) -> tuple[Array, MXFP4Array, Array]:
    return _expert_matmul("xla", x, *frozen), *no_gradient(frozen)


_differentiable.defvjp(_forward, _backward)
_transposed.defvjp(_transposed_forward, _transposed_backward)
