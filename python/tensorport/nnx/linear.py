"""MXFP4Linear: `nnx.Linear` over codes."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, BFloat16, Float, Num

from tensorport.kernels.arguments import float_array, mxfp4_array, same_size
from tensorport.kernels.mxfp4_matmul.api import matmul
from tensorport.kernels.registry import ImplementationName
from tensorport.mxfp4.codec import ScaleRule
from tensorport.mxfp4.types import MXFP4Array
from tensorport.nnx.dense import (
    Initializer,
    assembled,
    check_blocks,
    compute_dtype,
    fault_of,
    initialized,
    quantized_param,
)
from tensorport.nnx.sharding import OutSharding, explicit_spec, on_auto_axes
from tensorport.nnx.variables import MXFP4Param

__all__ = ["MXFP4Linear", "linear_fault", "product"]


class MXFP4Linear(nnx.Module):
    """A linear layer on a frozen MXFP4 kernel, in the place of `nnx.Linear`: y = x . kernel + bias.

    Codes and scales are exact, the input is never narrowed below `dtype`, and sums are taken in float32: see
    :func:`tensorport.mxfp4.matmul`. Gradients flow to the input and the bias. `nnx.LoRA(..., base_module=layer)` trains
    an adapter beside it.

    What `kernel_init` and `kernel_metadata` say is said of the dense kernel [in, out], as for `nnx.Linear`: the same
    arguments and the same key give the layer that :meth:`from_linear` makes of that `nnx.Linear`, and names of axes in
    `out_sharding` change places with the axes.

    Args:
        in_features: a multiple of 32.
        out_features: any size.
        use_bias: whether to add a bias.
        dtype: of the computation and the result; by default that of inputs, `param_dtype` and bias, promoted.
        param_dtype: of the bias, and of the dense kernel before it is quantized.
        kernel_init: initializer of the dense kernel, which is quantized and dropped.
        bias_init: initializer of the bias.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        implementation: see :func:`tensorport.kernels.explain`.
        rngs: its stream `params` is used, for the kernel and then for the bias.
        kernel_metadata: metadata of the kernel's variable.
        bias_metadata: metadata of the bias's variable.

    Attributes:
        kernel: MXFP4Param [out, in]: the axis that is contracted is last, unlike in `nnx.Linear`.
        bias: nnx.Param [out], or None.

    Raises:
        ValueError: `in_features` is not a multiple of 32.
    """

    kernel: MXFP4Param
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        check_blocks("in_features", in_features)
        dense = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        self.kernel = initialized(dense, scale_rule, kernel_metadata, transpose=True)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
        else:
            self.bias = nnx.data(None)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, *, scale_rule: ScaleRule = "floor", implementation: ImplementationName = "auto"
    ) -> Self:
        """Quantizes a dense layer.

        The kernel's sharding and metadata go over to its codes, and the bias to the new layer as it is: the two layers
        share that variable. A stack of layers, made by `nnx.vmap`, becomes a stack.

        Args:
            linear: a layer with a kernel [in, out], or a stack of such [..., in, out].
            scale_rule: see :func:`tensorport.mxfp4.quantize`.
            implementation: see :func:`tensorport.kernels.explain`.

        Raises:
            ValueError: the layer cannot be quantized without a change of its meaning: `in_features` is not a multiple
                of 32, it is of a subclass of `nnx.Linear`, or it has a `dot_general`, `promote_dtype`, `precision` or
                `preferred_element_type` of its own that MXFP4Linear has not.
            TypeError: it is no `nnx.Linear`.
        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"linear: found {type(linear).__name__}, expected an nnx.Linear")
        fault = linear_fault(linear)
        if fault is not None:
            raise ValueError(f"linear: {fault}")
        kernel = quantized_param(linear.kernel, scale_rule, transpose=True)
        return cls._around(
            kernel,
            linear.bias,
            dtype=linear.dtype,
            param_dtype=linear.kernel[...].dtype,
            implementation=implementation,
            sizes=(linear.in_features, linear.out_features),
        )

    @classmethod
    def from_array(
        cls,
        kernel: BFloat16[MXFP4Array, "out_features in_features"],
        bias: Float[ArrayLike, " out_features"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        implementation: ImplementationName = "auto",
    ) -> Self:
        """A layer on codes that exist already, such as those of a checkpoint.

        Args:
            kernel: [out, in], as checkpoints have it; kept as it is.
            bias: [out], or None for a layer without.
            dtype: of the computation; by default that of inputs and bias, promoted.
            implementation: see :func:`tensorport.kernels.explain`.

        Raises:
            TypeError: `kernel` is no MXFP4Array, or `bias` no array of floats.
            ValueError: shapes do not fit.
        """
        out_features, _ = mxfp4_array("kernel", kernel, 2).shape
        if bias is not None:
            bias = float_array("bias", bias, 1)
            same_size("out, the first axis of the kernel", {"kernel": out_features, "bias": bias.shape[0]})
        return cls._around(
            MXFP4Param(kernel),
            None if bias is None else nnx.Param(bias),
            dtype=dtype,
            # Codes promote to nothing wider than what they are multiplied with.
            param_dtype=jnp.bfloat16 if bias is None else bias.dtype,
            implementation=implementation,
            sizes=(kernel.shape[1], kernel.shape[0]),
        )

    @classmethod
    def _around(
        cls,
        kernel: MXFP4Param,
        bias: nnx.Param[jax.Array] | None,
        *,
        sizes: tuple[int, int],
        **options: Any,
    ) -> Self:
        variables = {"kernel": kernel, "bias": nnx.data(None) if bias is None else bias}
        return assembled(cls, *sizes, variables=variables, use_bias=bias is not None, **options)

    def __call__(
        self, inputs: Num[ArrayLike, "*batch in_features"], out_sharding: OutSharding = None
    ) -> Float[Array, "*batch out_features"]:
        """Applies the layer to the last axis.

        Args:
            inputs: [..., in].
            out_sharding: of the result, on a mesh with explicit axes.

        Returns:
            [..., out], in the dtype of the computation.

        Raises:
            NotImplementedError: the implementation that was named cannot run here.
            TypeError, ValueError: the inputs do not fit.
        """
        bias = None if self.bias is None else self.bias[...]
        dtype = compute_dtype(self.dtype, inputs, self.param_dtype, bias)
        y = product(jnp.asarray(inputs, dtype), self.kernel[...], self.implementation, out_sharding)
        if bias is not None:
            y += jnp.reshape(bias.astype(dtype), (1,) * (y.ndim - 1) + (-1,))
        return y


def product(
    x: Float[Array, "*batch k"], w: MXFP4Array, implementation: ImplementationName, out_sharding: OutSharding
) -> Array:
    """:func:`tensorport.mxfp4.matmul`, also on meshes with explicit axes.

    Args:
        x: [..., K].
        w: [N, K].
        implementation: see :func:`tensorport.kernels.explain`.
        out_sharding: of the result; on explicit axes by default that of the axes of `x` and `w` that it has.
    """
    if out_sharding is None:
        x_spec, w_spec = explicit_spec(x), explicit_spec(jnp.asarray(w.scales))
        if x_spec is not None and w_spec is not None:
            out_sharding = PartitionSpec(*x_spec[:-1], w_spec[0])
    return on_auto_axes(partial(matmul, implementation=implementation), out_sharding)(x, w)


_ATTRIBUTES: Final = frozenset(
    [
        *("kernel", "bias", "in_features", "out_features", "use_bias", "dtype", "param_dtype"),
        *("precision", "dot_general", "promote_dtype", "preferred_element_type"),
    ]
)


def linear_fault(linear: nnx.Linear) -> str | None:
    """Why a layer has no counterpart that means the same; None if it has."""
    fault = fault_of(linear, nnx.Linear, "kernel", axis=-2, attributes=_ATTRIBUTES)
    if fault is not None:
        return fault
    if linear.dot_general is not jax.lax.dot_general:
        return "found a dot_general of its own, expected jax.lax.dot_general"
    if linear.promote_dtype is not dtypes.promote_dtype:
        return "found a promote_dtype of its own, expected that of Flax"
    if linear.preferred_element_type is not None:
        return f"found preferred_element_type={linear.preferred_element_type}, expected None"
    try:
        # Codes are multiplied at the highest precision, which is all that one of these asks for.
        jax.lax.Precision(linear.precision)
    except ValueError:
        return f"found precision={linear.precision!r}, expected one of jax.lax.Precision or None"
    return None
