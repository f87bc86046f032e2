"""MXFP4MLP: the gated feed-forward layer of Llama over codes."""

from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Num

from tensorport.kernels.registry import ImplementationName
from tensorport.mxfp4.codec import ScaleRule
from tensorport.nnx.checkpoint import codes_of, tensors_and_sizes
from tensorport.nnx.dense import Initializer, assembled
from tensorport.nnx.linear import MXFP4Linear

__all__ = ["MXFP4MLP"]

Activation = Callable[[Array], Array]


class MXFP4MLP(nnx.Module):
    """A gated feed-forward layer on frozen MXFP4 kernels: down(activation(gate(x)) * up(x)).

    With `nnx.silu` (SwiGLU) it is that of Llama, Mistral and Qwen, with `nnx.gelu` (GeGLU) that of Gemma.

    Args:
        hidden_size: width of the stream, a multiple of 32.
        intermediate_size: width between the layers, a multiple of 32.
        activation: of the gate.
        use_bias: whether the three layers have biases.
        dtype: see :class:`MXFP4Linear`, as for all that follow.
        param_dtype: of the biases, and of the dense kernels before they are quantized.
        kernel_init: initializer of the dense kernels.
        bias_init: initializer of the biases.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        implementation: see :func:`tensorport.kernels.explain`.
        rngs: its stream `params` is used, for gate, up and down in turn.

    Attributes:
        gate: MXFP4Linear from `hidden_size` to `intermediate_size`.
        up: the same.
        down: MXFP4Linear from `intermediate_size` to `hidden_size`.

    Raises:
        ValueError: a size is not a multiple of 32.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """

    gate: MXFP4Linear
    up: MXFP4Linear
    down: MXFP4Linear

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = nnx.silu,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        def linear(in_features: int, out_features: int) -> MXFP4Linear:
            return MXFP4Linear(
                in_features,
                out_features,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                bias_init=bias_init,
                scale_rule=scale_rule,
                implementation=implementation,
                rngs=rngs,
            )

        self.gate = linear(hidden_size, intermediate_size)
        self.up = linear(hidden_size, intermediate_size)
        self.down = linear(intermediate_size, hidden_size)
        self.activation = activation

    @classmethod
    def from_linears(
        cls,
        gate: nnx.Linear,
        up: nnx.Linear,
        down: nnx.Linear,
        *,
        activation: Activation = nnx.silu,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
    ) -> Self:
        """Quantizes three dense layers, each by :meth:`MXFP4Linear.from_linear`.

        Raises:
            ValueError: their sizes do not fit each other, or one of them cannot be quantized.
        """
        layers = {
            name: MXFP4Linear.from_linear(layer, scale_rule=scale_rule, implementation=implementation)
            for name, layer in (("gate", gate), ("up", up), ("down", down))
        }
        return cls._of(layers, activation)

    @classmethod
    def from_params(
        cls,
        mlp: Mapping[str, Any],
        *,
        activation: Activation = nnx.silu,
        dtype: DTypeLike | None = None,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
    ) -> Self:
        """The `mlp` of a layer of a Llama in the layout of Hugging Face, as `tensorport.load_params` returns it.

        Args:
            mlp: {"gate_proj": {"weight": ...}, "up_proj": ..., "down_proj": ...}, with "bias" or without. A weight is
                an MXFP4Array [out, in], or a dense array of that orientation, which is quantized.
            activation: of the gate.
            dtype: of the computation; by default that of inputs and biases, promoted.
            scale_rule: for dense weights, see :func:`tensorport.mxfp4.quantize`.
            implementation: see :func:`tensorport.kernels.explain`.

        Raises:
            MappingError: names or shapes are others.
            ValueError: an axis of a dense weight that is contracted is not a multiple of 32.
        """
        tensors, _ = tensors_and_sizes(mlp, _WEIGHTS, optional=_BIASES)
        layers = {}
        for name in ("gate", "up", "down"):
            kernel = codes_of(tensors[f"{name}_proj.weight"], scale_rule)
            bias = tensors.get(f"{name}_proj.bias")
            layers[name] = MXFP4Linear.from_array(kernel, bias, dtype=dtype, implementation=implementation)
        return cls._of(layers, activation)

    @classmethod
    def _of(cls, layers: Mapping[str, MXFP4Linear], activation: Activation) -> Self:
        (hidden_size, intermediate_size) = layers["gate"].in_features, layers["gate"].out_features
        for name, sizes in {
            "up": (hidden_size, intermediate_size),
            "down": (intermediate_size, hidden_size),
        }.items():
            found = layers[name].in_features, layers[name].out_features
            if found != sizes:
                raise ValueError(
                    f"{name}: found a layer from {found[0]} to {found[1]}, expected {sizes[0]} to {sizes[1]}"
                )

        return assembled(cls, hidden_size, intermediate_size, variables=layers, activation=activation)

    def __call__(self, x: Num[ArrayLike, "*batch hidden_size"]) -> Float[Array, "*batch hidden_size"]:
        """Applies the layer to the last axis.

        Raises:
            NotImplementedError: the implementation that was named cannot run here.
            TypeError, ValueError: the input does not fit.
        """
        return self.down(self.activation(self.gate(x)) * self.up(x))


# H is the width of the stream, I that between the layers.
_WEIGHTS: Final = {"gate_proj.weight": ("I", "H"), "up_proj.weight": ("I", "H"), "down_proj.weight": ("H", "I")}
_BIASES: Final = {"gate_proj.bias": ("I",), "up_proj.bias": ("I",), "down_proj.bias": ("H",)}
