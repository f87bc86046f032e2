"""From dense weights to codes: orientation, sharding and metadata.

Flax contracts the first axis of a kernel [in, out]; codes have the axis that is contracted last, [out, in]. What
initializers and metadata say speaks of the dense kernel, as it does for `nnx.Linear`, and is turned here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from tensorport.mxfp4.codec import FLOATS, ScaleRule, quantize
from tensorport.mxfp4.types import MX_BLOCK_SIZE, MXFP4Array
from tensorport.nnx.variables import MXFP4Param

__all__ = [
    "Initializer",
    "assembled",
    "check_blocks",
    "compute_dtype",
    "fault_of",
    "initialized",
    "initialized_experts",
    "quantized",
    "quantized_param",
]

M = TypeVar("M", bound=nnx.Module)

Initializer: TypeAlias = Callable[..., Any]
"""As those of JAX: (key, shape, dtype) -> array, or what `nnx.with_partitioning` makes of one."""

_SHARDINGS = ("out_sharding", "sharding", "sharding_names")  # the last two are older names of the first


def check_blocks(name: str, size: int) -> None:
    """Refuses a size of a contracted axis that is not whole blocks.

    Raises:
        ValueError: as said.
    """
    if size <= 0 or size % MX_BLOCK_SIZE:
        raise ValueError(
            f"{name}: found {size}, expected a multiple of {MX_BLOCK_SIZE}: that many values along it share a scale"
        )


def compute_dtype(dtype: DTypeLike | None, *operands: Any) -> jnp.dtype:
    """The dtype of a computation by the rules of `nnx.Linear`: as asked, else by promotion, and inexact.

    Args:
        dtype: what was asked for.
        operands: arrays and dtypes; None where there is none.
    """
    if dtype is not None:
        return jnp.dtype(dtype)
    found = jnp.result_type(*(operand for operand in operands if operand is not None))
    return found if jnp.issubdtype(found, jnp.inexact) else jnp.promote_types(jnp.float32, found)


def initialized(dense: Any, scale_rule: ScaleRule, metadata: Mapping[str, Any], *, transpose: bool) -> MXFP4Param:
    """A variable of codes from what an initializer returned; the dense array is dropped.

    Args:
        dense: an array [..., in, out] (with `transpose`) or [..., out, in], or metadata around one, as
            `nnx.with_partitioning` makes.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        metadata: more metadata, of the dense array.
        transpose: whether the last two axes of the dense array change places.
    """
    metadata = dict(metadata)
    if isinstance(dense, nnx.VariableMetadata):
        hooks = {
            field.name: getattr(dense, field.name)
            for field in dataclasses.fields(dense)
            if field.name.startswith("on_") and getattr(dense, field.name)
        }
        # As in nnx.Variable: what the initializer says counts.
        metadata |= {**dense.metadata, **hooks}
        dense = dense.raw_value
    fault = _hooks_fault(metadata)
    if fault is not None:
        raise ValueError(fault)
    if transpose:
        metadata = _swapped_metadata(metadata, dense.ndim)
    return MXFP4Param(quantized(dense, scale_rule, transpose=transpose), **metadata)


def initialized_experts(
    init: Initializer,
    key: Array,
    shape: tuple[int, int, int],
    dtype: DTypeLike,
    *,
    scale_rule: ScaleRule,
    metadata: Mapping[str, Any],
) -> MXFP4Param:
    """A variable of codes [experts, out, in] from an initializer of one kernel [in, out].

    One expert is dense at a time.

    Args:
        init: called for every expert, with a key of its own.
        key: a key for all.
        shape: of the dense kernels [experts, in, out].
        dtype: of the dense kernels.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        metadata: of the variable, said of dense kernels.

    Raises:
        ValueError: the initializer returns metadata.
    """
    codes = _expert_codes(key, init=init, shape=shape, dtype=jnp.dtype(dtype), scale_rule=scale_rule)
    return MXFP4Param(codes, **_swapped_metadata(metadata, len(shape)))


# Compiled once for all layers of one shape.
@partial(jax.jit, static_argnames=("init", "shape", "dtype", "scale_rule"))
def _expert_codes(
    key: Array, *, init: Initializer, shape: tuple[int, int, int], dtype: DTypeLike, scale_rule: ScaleRule
) -> MXFP4Array:
    num_experts, *kernel_shape = shape

    def expert(key: Array) -> MXFP4Array:
        dense = init(key, tuple(kernel_shape), dtype)
        if isinstance(dense, nnx.VariableMetadata):
            raise ValueError(
                "kernel_init: found metadata around the kernel of one expert, expected an array: say how all experts "
                "are sharded by gate_up_metadata and down_metadata"
            )
        return quantize(dense.T, scale_rule=scale_rule)

    codes: MXFP4Array = jax.lax.map(expert, jax.random.split(key, num_experts))
    return codes


def quantized_param(dense: nnx.Variable[Any], scale_rule: ScaleRule, *, transpose: bool) -> MXFP4Param:
    """A variable of codes from one of a dense array, sharded like it, with its metadata."""
    metadata = dense.get_metadata()
    value = dense[...]
    if transpose:
        metadata = _swapped_metadata(metadata, value.ndim)
    # Not the constructor, which would place the codes by the metadata once more, and need a mesh for it.
    codes = quantized(value, scale_rule, transpose=transpose)
    return cast(MXFP4Param, MXFP4Param.from_metadata(codes, metadata | {"ref": False}))


def quantized(dense: Any, scale_rule: ScaleRule, *, transpose: bool) -> MXFP4Array:
    """Codes of a dense array [..., in, out] (with `transpose`) or [..., out, in], where it is."""
    if isinstance(dense, np.ndarray):
        return quantize(np.ascontiguousarray(dense.swapaxes(-1, -2)) if transpose else dense, scale_rule=scale_rule)
    codes: MXFP4Array = _quantized(dense, scale_rule=scale_rule, transpose=transpose)
    sharding = getattr(dense, "sharding", None)
    if isinstance(dense, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return codes
    if transpose:
        sharding = _swapped(sharding, dense.ndim)
    placed: MXFP4Array = jax.device_put(codes, sharding)
    return placed


# One program: the transposed array need not exist as a whole.
@partial(jax.jit, static_argnames=("scale_rule", "transpose"))
def _quantized(dense: Array, *, scale_rule: ScaleRule, transpose: bool) -> MXFP4Array:
    return quantize(dense.swapaxes(-1, -2) if transpose else dense, scale_rule=scale_rule)


def _swapped_metadata(metadata: Mapping[str, Any], ndim: int) -> dict[str, Any]:
    """Metadata of an array whose last two axes change places."""
    return {name: _swapped(value, ndim) if name in _SHARDINGS else value for name, value in metadata.items()}


def _swapped(sharding: Any, ndim: int) -> Any:
    match sharding:
        case None:
            return None
        case NamedSharding():
            return NamedSharding(sharding.mesh, _swapped(sharding.spec, ndim), memory_kind=sharding.memory_kind)
        case PartitionSpec() | tuple() | list():
            axes = [*iter(sharding), *[None] * (ndim - len(sharding))]
            names = (*axes[:-2], axes[-1], axes[-2])
            return PartitionSpec(*names) if isinstance(sharding, PartitionSpec) else names
        case _:
            raise TypeError(
                f"out_sharding: found {type(sharding).__name__}, expected names of axes, a PartitionSpec or a "
                "NamedSharding"
            )


def fault_of(layer: nnx.Module, kind: type[nnx.Module], weight: str, *, axis: int, attributes: Set[str]) -> str | None:
    """Why a dense layer has no counterpart over codes that means the same; None if it has.

    Args:
        layer: the layer.
        kind: what it must be.
        weight: its attribute that becomes codes.
        axis: the axis of the weight that is contracted.
        attributes: all that the counterpart knows of.
    """
    if type(layer) is not kind:
        return (
            f"found a {type(layer).__name__}, expected nnx.{kind.__name__} itself: what a subclass adds would be lost"
        )
    extra = sorted(name for name in vars(layer) if name not in attributes and not name.startswith("_"))
    if extra:
        return f"found an nnx.{kind.__name__} with more attributes ({', '.join(extra)}), which would be lost"
    variable = getattr(layer, weight)
    dense = variable.get_value()
    if not isinstance(dense, jax.Array | np.ndarray):
        return f"found {weight} of {type(dense).__name__}, expected an array"
    if dense.ndim < 2 or str(dense.dtype) not in FLOATS:
        return f"found {weight} of {dense.dtype}{list(dense.shape)}, expected a matrix of one of {', '.join(FLOATS)}"
    return _hooks_fault(variable.get_metadata()) or _blocks_fault(weight, dense, axis)


def _hooks_fault(metadata: Mapping[str, Any]) -> str | None:
    hooks = [name for name, value in metadata.items() if name.startswith("on_") and value]
    return (
        f"found hooks on its weights ({', '.join(hooks)}), expected none: they would be given codes" if hooks else None
    )


def _blocks_fault(weight: str, dense: Any, axis: int) -> str | None:
    size = dense.shape[axis]
    if not size or size % MX_BLOCK_SIZE:
        return f"found {weight} {list(dense.shape)}, expected a multiple of {MX_BLOCK_SIZE} in place of {size}"
    sharding = getattr(dense, "sharding", None)
    if isinstance(sharding, NamedSharding):
        names = (*sharding.spec, *[None] * (dense.ndim - len(sharding.spec)))[axis]
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        parts, blocks = math.prod(sharding.mesh.shape[name] for name in names), size // MX_BLOCK_SIZE
        if blocks % parts:
            return f"found {blocks} blocks of the {weight} spread over {parts} devices, expected whole blocks on each"
    return None


def assembled(kind: Callable[..., M], *sizes: int, variables: Mapping[str, Any], **options: Any) -> M:
    """A module of given variables; those that its constructor would initialize are never computed.

    Args:
        kind: the module's class.
        sizes: positional arguments of its constructor.
        variables: every variable (and module with variables) of it, by attribute.
        options: keyword arguments of its constructor.
    """
    module: M = nnx.eval_shape(lambda: kind(*sizes, rngs=nnx.Rngs(0), **options))
    for name, variable in variables.items():
        setattr(module, name, variable)
    return module
