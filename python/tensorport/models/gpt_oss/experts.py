"""The mixture of experts: on one device, or spread over those of a mesh."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from tensorport.kernels.dense_moe.api import dense_moe
from tensorport.kernels.linear.api import linear
from tensorport.kernels.mxfp4_moe.api import moe
from tensorport.kernels.mxfp4_moe.types import ELSEWHERE
from tensorport.kernels.registry import ImplementationName
from tensorport.models.gpt_oss.config import Config
from tensorport.models.gpt_oss.names import experts_are_transposed
from tensorport.models.gpt_oss.sharding import expert_specs, rows_spec
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["dense_implementation", "mixture_of_experts", "route"]


def mixture_of_experts(  # noqa: PLR0917 - what a layer hands on
    layer: Mapping[str, Any],
    config: Config,
    x: Float[Array, "b t h"],
    is_token: Bool[Array, "b t"],
    mesh: Mesh | None,
    implementation: ImplementationName,
) -> Float[Array, "b t h"]:
    """Each token through its experts, weighted and summed; padding goes through none."""
    indices, weights = route(layer["router"], config, x, dense_implementation(implementation, mesh))
    indices = jnp.where(is_token[..., None], indices, ELSEWHERE)
    stored = layer["experts"]
    experts = tuple(stored[name] for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"))
    compute: Callable[..., Array] = partial(_local, config=config, implementation=implementation)
    specs = None if mesh is None else expert_specs(mesh)
    if mesh is None or specs is None:
        return compute(x, indices, weights, experts)

    rows = rows_spec(mesh, x.shape[0])

    def on_device(x: Array, indices: Array, weights: Array, experts: tuple[Any, ...]) -> Array:
        *matrices, down_bias = experts
        if specs.experts is not None:
            first = jax.lax.axis_index(specs.experts) * down_bias.shape[0]
            is_here = (indices >= first) & (indices < first + down_bias.shape[0])
            indices = jnp.where(is_here, indices - first, ELSEWHERE)
        if specs.width is not None:
            # Every device has a part of the sum over the width, and one of them adds the bias.
            down_bias = jnp.where(jax.lax.axis_index(specs.width) == 0, down_bias, 0)
        part = compute(x.astype(jnp.float32), indices, weights, (*matrices, down_bias))
        total: Array = jax.lax.psum(part, specs.axes)
        return total.astype(x.dtype)

    spread = jax.shard_map(on_device, mesh=mesh, in_specs=(rows, rows, rows, specs.parameters), out_specs=rows)
    out: Array = spread(x, indices, weights, experts)
    return out


def dense_implementation(implementation: ImplementationName, mesh: Mesh | None) -> ImplementationName:
    """What multiplies by dense matrices: on a mesh XLA must, for it divides no call of native code among devices."""
    return "xla" if mesh is not None and implementation == "auto" else implementation


def route(
    router: Mapping[str, Any], config: Config, x: Float[Array, "b t h"], implementation: ImplementationName
) -> tuple[Int32[Array, "b t k"], Float[Array, "b t k"]]:
    """The experts with the largest logits, the largest first, and a softmax over these alone; in float32."""
    logits = linear(x, router["weight"], router["bias"], out_dtype=jnp.float32, implementation=implementation)
    largest, indices = jax.lax.top_k(logits, config.num_experts_per_tok)
    return indices, jax.nn.softmax(largest, axis=-1)


def _local(
    x: Float[Array, "b t h"],
    indices: Int32[Array, "b t k"],
    weights: Float[Array, "b t k"],
    experts: tuple[Any, ...],
    *,
    config: Config,
    implementation: ImplementationName,
) -> Float[Array, "b t h"]:
    tokens, k = x.shape[0] * x.shape[1], indices.shape[2]
    function: Any = moe
    if not isinstance(experts[0], MXFP4Array):
        function = partial(dense_moe, transposed=experts_are_transposed(config, experts[0].shape))
    out: Array = function(
        x.reshape(tokens, -1),
        indices.reshape(tokens, k),
        weights.reshape(tokens, k),
        *experts,
        limit=config.swiglu_limit,
        alpha=config.swiglu_alpha,
        implementation=implementation,
    )
    return out.reshape(x.shape)
