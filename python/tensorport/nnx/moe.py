"""MXFP4MoE: the mixture of experts of gpt-oss over codes."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int32, Num

from tensorport.kernels.mxfp4_moe.api import moe
from tensorport.kernels.registry import ImplementationName
from tensorport.mxfp4.codec import ScaleRule
from tensorport.nnx.checkpoint import codes_of, tensors_and_sizes
from tensorport.nnx.dense import Initializer, assembled, check_blocks, compute_dtype, initialized_experts
from tensorport.nnx.sharding import explicit_spec, on_auto_axes
from tensorport.nnx.variables import MXFP4Param

__all__ = ["MXFP4MoE"]


class MXFP4MoE(nnx.Module):
    """The mixture of experts of gpt-oss on frozen MXFP4 weights, with its router.

    Each token goes through the `num_experts_per_tok` experts of the largest router logits, weighted by a softmax over
    these alone; what an expert computes: :func:`tensorport.mxfp4.moe`. Gradients flow to the input, to the router (by
    the weights of the chosen experts) and to all biases.

    The router is dense. Its logits are float32 at the highest precision (float64 where `dtype` is), whatever the dtype
    of the computation: which experts are chosen hangs on them.

    Args:
        hidden_size: width of the stream, a multiple of 32.
        intermediate_size: width within an expert, a multiple of 32.
        num_experts: experts (`num_local_experts` in the config of Hugging Face).
        num_experts_per_tok: experts of each token.
        swiglu_limit: where gate and up are clamped.
        dtype: of the computation and the result; by default that of the input, `param_dtype` and the biases, promoted.
            Biases are added in float32, as they are.
        param_dtype: of router and biases, and of dense kernels before they are quantized.
        kernel_init: initializer of one dense kernel [in, out]. It is called for the router and for each expert in turn;
            a dense copy of all experts is never made.
        bias_init: initializer of the biases.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        implementation: see :func:`tensorport.kernels.explain`.
        rngs: its stream `params` is used.
        gate_up_metadata: metadata of `gate_up`, said of dense kernels [experts, in, out]:
            `{"out_sharding": ("expert", None, None)}`.
        down_metadata: metadata of `down`, said likewise.

    Attributes:
        router: nnx.Linear from hidden_size to num_experts.
        gate_up: MXFP4Param [experts, 2 intermediate_size, hidden_size], gate and up interleaved along the second axis.
        gate_up_bias: nnx.Param [experts, 2 intermediate_size].
        down: MXFP4Param [experts, hidden_size, intermediate_size].
        down_bias: nnx.Param [experts, hidden_size].

    Raises:
        ValueError: a size is not a multiple of 32, or there are fewer experts than a token takes.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, MLPBlock.
    """

    router: nnx.Linear
    gate_up: MXFP4Param
    gate_up_bias: nnx.Param[jax.Array]
    down: MXFP4Param
    down_bias: nnx.Param[jax.Array]

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        swiglu_limit: float = 7.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
        rngs: nnx.Rngs,
        gate_up_metadata: Mapping[str, Any] = MappingProxyType({}),
        down_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        check_blocks("hidden_size", hidden_size)
        check_blocks("intermediate_size", intermediate_size)
        if not 0 < num_experts_per_tok <= num_experts:
            raise ValueError(
                f"num_experts_per_tok: found {num_experts_per_tok}, expected 1 to {num_experts}, all experts"
            )

        def experts(in_features: int, out_features: int, metadata: Mapping[str, Any]) -> MXFP4Param:
            shape = (num_experts, in_features, out_features)
            return initialized_experts(
                kernel_init, rngs.params(), shape, param_dtype, scale_rule=scale_rule, metadata=metadata
            )

        def biases(features: int) -> nnx.Param[jax.Array]:
            return nnx.Param(bias_init(rngs.params(), (num_experts, features), param_dtype))

        self.router = nnx.Linear(
            hidden_size,
            num_experts,
            dtype=jnp.promote_types(param_dtype if dtype is None else dtype, jnp.float32),
            param_dtype=param_dtype,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.gate_up = experts(hidden_size, 2 * intermediate_size, gate_up_metadata)
        self.gate_up_bias = biases(2 * intermediate_size)
        self.down = experts(intermediate_size, hidden_size, down_metadata)
        self.down_bias = biases(hidden_size)
        self.num_experts_per_tok = num_experts_per_tok
        self.swiglu_limit = swiglu_limit
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation

    @classmethod
    def from_params(
        cls,
        mlp: Mapping[str, Any],
        *,
        num_experts_per_tok: int,
        swiglu_limit: float = 7.0,
        dtype: DTypeLike | None = None,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
    ) -> Self:
        """The `mlp` of a layer of gpt-oss, as `tensorport.load_params` returns it, in either layout.

        >>> params = tensorport.load_params("gpt-oss-20b")
        >>> layer = MXFP4MoE.from_params(params["model"]["layers"]["0"]["mlp"], num_experts_per_tok=4)

        Args:
            mlp: the layout of Hugging Face, with `experts` and `router`, or the original one, with `gate`,
                `mlp1_weight` and so on, of which `norm` is left out: it is no part of this layer. Weights of experts
                are MXFP4Arrays, kept as they are, or dense arrays of the same logical shape, which are quantized.
            num_experts_per_tok: of the checkpoint's config (`experts_per_token` in the original layout).
            swiglu_limit: of the checkpoint's config.
            dtype: see :class:`MXFP4MoE`.
            scale_rule: for dense weights, see :func:`tensorport.mxfp4.quantize`.
            implementation: see :func:`tensorport.kernels.explain`.

        Raises:
            MappingError: names or shapes are others.
            ValueError: a size is not a multiple of 32, or there are fewer experts than a token takes.
        """
        is_original = "mlp1_weight" in mlp
        axes = _ORIGINAL if is_original else _HUGGING_FACE
        tensors, sizes = tensors_and_sizes(mlp, axes, ignored=["norm.scale"] if is_original else [])
        weight, bias, gate_up, gate_up_bias, down, down_bias = (tensors[name] for name in axes)

        layer = assembled(
            cls,
            *(sizes["H"], sizes["I"], sizes["E"], num_experts_per_tok),
            variables={
                "gate_up": MXFP4Param(codes_of(gate_up, scale_rule)),
                "gate_up_bias": nnx.Param(jnp.asarray(gate_up_bias)),
                "down": MXFP4Param(codes_of(down, scale_rule)),
                "down_bias": nnx.Param(jnp.asarray(down_bias)),
            },
            swiglu_limit=swiglu_limit,
            dtype=dtype,
            param_dtype=weight.dtype,
            implementation=implementation,
        )
        layer.router.kernel = nnx.Param(jnp.asarray(weight).T)
        layer.router.bias = nnx.Param(jnp.asarray(bias))
        return layer

    def route(
        self, x: Num[ArrayLike, "*batch hidden_size"]
    ) -> tuple[Int32[Array, "*batch k"], Float[Array, "*batch k"]]:
        """The experts of each token and their weights.

        Args:
            x: [..., hidden_size].

        Returns:
            Indices [..., num_experts_per_tok], the largest logit first, and weights of that shape, whose sum is 1.
        """
        logits, indices = jax.lax.top_k(self.router(jnp.asarray(x)), self.num_experts_per_tok)
        return indices, jax.nn.softmax(logits, axis=-1)

    def __call__(self, x: Num[ArrayLike, "*batch hidden_size"]) -> Float[Array, "*batch hidden_size"]:
        """Sends each token through its experts.

        Raises:
            NotImplementedError: the implementation that was named cannot run here.
            TypeError, ValueError: the input does not fit.
        """
        gate_up_bias, down_bias = self.gate_up_bias[...], self.down_bias[...]
        dtype = compute_dtype(self.dtype, x, self.param_dtype, gate_up_bias, down_bias)
        x = jnp.asarray(x, dtype)
        indices, weights = self.route(x)

        def experts(x: Array, indices: Array, weights: Array, *parameters: Any) -> Array:
            tokens, k = math.prod(x.shape[:-1]), indices.shape[-1]
            flat = x.reshape(tokens, x.shape[-1]), indices.reshape(tokens, k), weights.reshape(tokens, k)
            return moe(*flat, *parameters, limit=self.swiglu_limit, implementation=self.implementation).reshape(x.shape)

        parameters = self.gate_up[...], gate_up_bias, self.down[...], down_bias
        return on_auto_axes(experts, explicit_spec(x))(x, indices, weights, *parameters)


# What the layer is made of in the two layouts of gpt-oss, in the same order, and its axes: E experts, H the width of
# the stream, I that within an expert.
_AXES: Final = (("E", "H"), ("E",), ("E", "2I", "H"), ("E", "2I"), ("E", "H", "I"), ("E", "H"))
_EXPERTS: Final = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_HUGGING_FACE: Final = dict(
    zip(("router.weight", "router.bias", *(f"experts.{name}" for name in _EXPERTS)), _AXES, strict=True)
)
_ORIGINAL: Final = dict(
    zip(("gate.weight", "gate.bias", "mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias"), _AXES, strict=True)
)
