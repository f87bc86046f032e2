"""mxfp4.moe: checked once, computed by one of several implementations, differentiable in all that is not a code."""

from functools import partial

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, BFloat16, Float, Integer

from tensorport.kernels import native as native_kernels
from tensorport.kernels import triton
from tensorport.kernels.arguments import float_array, integer_array, mxfp4_array, same_size
from tensorport.kernels.frozen import no_gradient
from tensorport.kernels.mxfp4_moe import native, xla
from tensorport.kernels.mxfp4_moe.types import Activation, DenseExperts, Experts
from tensorport.kernels.registry import Implementation, ImplementationName, Op
from tensorport.kernels.varying import vary_alike
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["OP", "check_sizes", "moe"]


def _arguments(  # noqa: PLR0917 - the order of the contract
    x: ArrayLike,
    router_indices: ArrayLike,
    router_weights: ArrayLike,
    gate_up: MXFP4Array,
    gate_up_bias: ArrayLike,
    down: MXFP4Array,
    down_bias: ArrayLike,
) -> "_Inputs":
    x = float_array("x", x, 2)
    router_indices = integer_array("router_indices", router_indices, 2)
    router_weights = float_array("router_weights", router_weights, 2)
    experts = Experts(
        mxfp4_array("gate_up", gate_up, 3),
        float_array("gate_up_bias", gate_up_bias, 2),
        mxfp4_array("down", down, 3),
        float_array("down_bias", down_bias, 2),
    )
    check_sizes(x, router_indices, router_weights, experts)
    return x, router_indices, router_weights, experts


def _pallas_triton(
    x: Array, router_indices: Array, router_weights: Array, experts: Experts, activation: Activation
) -> Array:
    from tensorport.kernels.mxfp4_moe import pallas_triton  # noqa: PLC0415 - Pallas is imported where it runs

    return pallas_triton.moe(x, router_indices, router_weights, experts, activation)


OP = Op(
    "mxfp4.moe",
    _arguments,
    Implementation("pallas_triton", _pallas_triton, triton.refuses, opt_in=triton.NOT_MEASURED),
    Implementation("native", native.moe, native.refuses, elsewhere=xla.moe),
    Implementation(
        "native_int8", native.moe_int8, native.refuses, is_for_cpu=True, opt_in=native_kernels.ROUNDS_TO_INT8
    ),
    Implementation("xla", xla.moe),
)


def moe(  # noqa: PLR0917 - the order of the contract
    x: Float[ArrayLike, "t h"],
    router_indices: Integer[ArrayLike, "t k"],
    router_weights: Float[ArrayLike, "t k"],
    gate_up: BFloat16[MXFP4Array, "e i2 h"],
    gate_up_bias: Float[ArrayLike, "e i2"],
    down: BFloat16[MXFP4Array, "e h i"],
    down_bias: Float[ArrayLike, "e h"],
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    implementation: ImplementationName = "auto",
) -> Float[Array, "t h"]:
    """The mixture of experts of gpt-oss on MXFP4 weights: each token through its k experts, weighted and summed.

    For expert e: h = gate_up[e] x + bias; gate = h[0::2] and up = h[1::2]; gate is clamped to at most `limit`, up to
    -limit .. limit; y = down[e] (gate * sigmoid(alpha * gate) * (up + 1)) + bias. The result is the sum of y times the
    router's weights, as they are given.

    Only the experts that have tokens are decoded, a tile of rows at a time, and tokens of one expert go through it
    together; memory does not grow with the number of experts. Codes and scales are exact, `x` is never narrowed, and
    all in between is float32 (float64 where `x` is). Differentiable in reverse mode, once, with
    respect to `x`, `router_weights` and the biases, by the implementation `xla`; codes are frozen.

    Args:
        x: bfloat16, float16, float32 or float64 [T, H].
        router_indices: the experts of each token [T, k]. A token with an index that is not in 0 .. E - 1 becomes NaN;
            but a pair with `kernels.mxfp4_moe.types.ELSEWHERE` adds nothing.
        router_weights: [T, k].
        gate_up: codes and scales of [E, 2 I, H], gate and up interleaved along the second axis.
        gate_up_bias: [E, 2 I].
        down: codes and scales of [E, H, I].
        down_bias: [E, H].
        limit: where gate and up are clamped; at least 0.
        alpha: steepness of the sigmoid.
        implementation: see :func:`tensorport.kernels.explain`. `native_int8` alone rounds `x`, and what is between the
            layers.

    Returns:
        In the dtype of `x`, on its device.

    Raises:
        NotImplementedError: the named implementation cannot run here; says why.
        TypeError, ValueError: dtypes or shapes do not fit.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, MLPBlock and swiglu.
    """
    inputs = _arguments(x, router_indices, router_weights, gate_up, gate_up_bias, down, down_bias)
    activation = Activation.checked(limit, alpha)
    out: Array = _moe(OP.choose(implementation, *inputs).name, activation, vary_alike(inputs))
    return out


def check_sizes(x: Array, router_indices: Array, router_weights: Array, experts: Experts | DenseExperts) -> None:
    """Refuses arrays whose axes do not fit each other."""
    (tokens, hidden), (num_experts, width, k) = x.shape, experts.gate_up.shape
    if not num_experts:
        raise ValueError("gate_up: found no experts, expected at least one")
    same_size(
        "T, the number of tokens",
        {"x": tokens, "router_indices": router_indices.shape[0], "router_weights": router_weights.shape[0]},
    )
    same_size(
        "k, the experts of a token",
        {"router_indices": router_indices.shape[1], "router_weights": router_weights.shape[1]},
    )
    same_size(
        "E, the number of experts",
        {"gate_up": num_experts, **{name: getattr(experts, name).shape[0] for name in experts._fields[1:]}},
    )
    sizes = {"x": hidden, "gate_up (last axis)": k, "down (second axis)": experts.down.shape[1]}
    same_size("H, the width of the stream", sizes | {"down_bias": experts.down_bias.shape[1]})
    sizes = {"gate_up (second axis)": width, "gate_up_bias": experts.gate_up_bias.shape[1]}
    same_size("2 I, gate and up", sizes | {"down (last axis, twice)": 2 * experts.down.shape[2]})


_Inputs = tuple[Array, Array, Array, Experts]
"""x, router_indices, router_weights, experts."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(implementation: str, activation: Activation, inputs: _Inputs) -> Array:
    return OP.implementations[implementation].run(*inputs, activation)


_moe = jax.jit(_differentiable, static_argnums=(0, 1))


def _forward(implementation: str, activation: Activation, inputs: _Inputs) -> tuple[Array, _Inputs]:
    return _moe(implementation, activation, inputs), inputs


def _backward(implementation: str, activation: Activation, inputs: _Inputs, g: Array) -> tuple[_Inputs]:  # noqa: ARG001 - XLA's for all
    _, router_indices, _, experts = inputs
    dx, dweights, dgate_up_bias, ddown_bias = xla.moe_gradients(g, *inputs, activation)
    dexperts = Experts(no_gradient(experts.gate_up), dgate_up_bias, no_gradient(experts.down), ddown_bias)
    return ((dx, no_gradient(router_indices), dweights, dexperts),)


_differentiable.defvjp(_forward, _backward)
