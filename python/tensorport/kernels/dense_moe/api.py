"""dense_moe: the mixture of experts with matrices that are not MXFP4, as dequantized checkpoints have them."""

from functools import partial
from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from tensorport.kernels.arguments import float_array, integer_array
from tensorport.kernels.mxfp4_moe import native, xla
from tensorport.kernels.mxfp4_moe.api import check_sizes
from tensorport.kernels.mxfp4_moe.types import Activation, DenseExperts, TransposedExperts
from tensorport.kernels.registry import Implementation, ImplementationName, Op

__all__ = ["OP", "dense_moe"]


def _arguments(  # noqa: PLR0917 - the order of mxfp4.moe
    x: ArrayLike,
    router_indices: ArrayLike,
    router_weights: ArrayLike,
    gate_up: ArrayLike,
    gate_up_bias: ArrayLike,
    down: ArrayLike,
    down_bias: ArrayLike,
    *,
    transposed: bool = False,
) -> "_Inputs":
    x = float_array("x", x, 2)
    router_indices = integer_array("router_indices", router_indices, 2)
    router_weights = float_array("router_weights", router_weights, 2)
    experts = DenseExperts(
        float_array("gate_up", gate_up, 3),
        float_array("gate_up_bias", gate_up_bias, 2),
        float_array("down", down, 3),
        float_array("down_bias", down_bias, 2),
    )
    if not transposed:
        check_sizes(x, router_indices, router_weights, experts)
        return x, router_indices, router_weights, experts
    out_in: list[Any] = [
        jax.ShapeDtypeStruct((experts_axis, n, k), matrices.dtype)
        for matrices in (experts.gate_up, experts.down)
        for experts_axis, k, n in [matrices.shape]
    ]
    check_sizes(x, router_indices, router_weights, experts._replace(gate_up=out_in[0], down=out_in[1]))
    return x, router_indices, router_weights, TransposedExperts(*experts)


_Inputs = tuple[Array, Array, Array, DenseExperts | TransposedExperts]
"""x, router_indices, router_weights, experts."""


OP = Op(
    "dense_moe",
    _arguments,
    Implementation("native", native.moe, native.refuses, elsewhere=xla.moe),
    Implementation("xla", xla.moe),
)


def dense_moe(  # noqa: PLR0917 - the order of mxfp4.moe
    x: Float[ArrayLike, "t h"],
    router_indices: Integer[ArrayLike, "t k"],
    router_weights: Float[ArrayLike, "t k"],
    gate_up: Float[ArrayLike, "e i2 h"],
    gate_up_bias: Float[ArrayLike, "e i2"],
    down: Float[ArrayLike, "e h i"],
    down_bias: Float[ArrayLike, "e h"],
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    transposed: bool = False,
    implementation: ImplementationName = "auto",
) -> Float[Array, "t h"]:
    """As :func:`tensorport.mxfp4.moe`, with dense matrices. Not differentiable in reverse mode.

    Only the experts that have tokens are touched. A pair with the index `ELSEWHERE` adds nothing, as there. With
    `transposed` the matrices are [in, out], as transformers holds and saves decoded ones: gate_up [E, H, 2 I] and down
    [E, I, H].

    Raises:
        NotImplementedError: the named implementation cannot run here; says why.
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    inputs = _arguments(
        x, router_indices, router_weights, gate_up, gate_up_bias, down, down_bias, transposed=transposed
    )
    activation = Activation.checked(limit, alpha)
    out: Array = _run(OP.choose(implementation, *inputs).name, activation, inputs)
    return out


# One program, as mxfp4.moe is: a loop of single operations would keep nothing of what is said above.
@partial(jax.jit, static_argnums=(0, 1))
def _run(implementation: str, activation: Activation, inputs: _Inputs) -> Array:
    return OP.implementations[implementation].run(*inputs, activation)
