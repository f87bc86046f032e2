"""The variable that holds frozen codes in an NNX module."""

from collections.abc import Iterator
from types import EllipsisType
from typing import Any, Never

import jax
import numpy as np
from flax import nnx
from flax.nnx import reprlib
from flax.typing import MISSING
from jax.sharding import PartitionSpec, Sharding

from tensorport.mxfp4.types import MX_BLOCK_BYTES, MX_BLOCK_SIZE, MXFP4Array

__all__ = ["MXFP4Param"]


class MXFP4Param(nnx.Variable[MXFP4Array]):
    """A variable with an MXFP4Array: weights that are used and stored, but never trained.

    It is no `nnx.Param`, so that `nnx.Optimizer(..., wrt=nnx.Param)` and `nnx.grad` pass it by. Split, merge, state,
    jit, vmap and scan see its two leaves, `blocks` and `scales`, under the path of the variable. `variable[...]` is the
    MXFP4Array, and `variable.shape` the logical shape.

    Metadata is that of any variable. `out_sharding` names the logical axes, (..., out, in) for kernels, and places both
    leaves: both have those axes, the last one in blocks of 32.

    Codes are not written element by element; `variable[...] = w` and `set_value` put another MXFP4Array in their place.

    Raises:
        TypeError: the value is no MXFP4Array.
    """

    def __init__(self, value: MXFP4Array | nnx.VariableMetadata[MXFP4Array], **metadata: Any) -> None:
        """As `nnx.Variable`; but codes are never written, so that they need no Ref."""
        super().__init__(value, **metadata | {"ref": False})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., K)."""
        return self.get_value().shape

    def create_value(self, value: MXFP4Array) -> MXFP4Array:
        """Checks what the variable is made with."""
        return _checked(value)

    def get_value(self, *, index: Any = ...) -> MXFP4Array:
        """The codes, or some of them by an index into leading axes: see :class:`tensorport.mxfp4.MXFP4Array`."""
        value: MXFP4Array = super().get_value()
        return value if isinstance(index, EllipsisType) else value[index]

    def set_value(self, value: Any, *, index: Any = ...) -> None:
        """Puts other codes in place of these.

        Args:
            value: an MXFP4Array, or what :meth:`copy` takes for one.
            index: Ellipsis: codes are replaced as a whole.

        Raises:
            IndexError: another index.
            TypeError: another value.
        """
        if not isinstance(index, EllipsisType):
            raise IndexError(f"found the index {index!r}, expected ...: codes are replaced as a whole, never in part")
        super().set_value(_checked(_both_leaves(value)))

    def copy(self, value: Any = MISSING, **updates: Any) -> Any:
        """As `nnx.Variable.copy`, also under the name `replace`.

        Flax says with it how variables are sharded. So a PartitionSpec or a Sharding as the value stands for both
        leaves (`nnx.get_partition_spec`), and a ShapeDtypeStruct of the logical shape for the abstract array
        (`nnx.as_abstract`).
        """
        if "value" in updates:
            value = updates.pop("value")
        updates.pop("ref", None)
        return super().copy(_both_leaves(value), **updates)

    replace = copy
    to_state = copy

    def __jax_array__(self) -> Never:
        """Refuses: a dense array is never made unasked."""
        raise TypeError("an MXFP4Param does not become a dense array unasked: call variable[...].dequantize()")

    def __nnx_repr__(self) -> Iterator[Any]:
        """As `nnx.Variable`; Flax shows models with stand-ins for arrays, of which nothing is said."""
        for part in super().__nnx_repr__():  # type: ignore[no-untyped-call]
            if isinstance(part, reprlib.Attr) and part.key == "value":
                text = repr(part.value).replace(", leaves=ArrayRepr", "")
                yield reprlib.Attr("value", text, use_raw_value=True)
            else:
                yield part


def _checked(value: Any) -> MXFP4Array:
    if not isinstance(value, MXFP4Array):
        raise TypeError(f"value: found {type(value).__name__}, expected an MXFP4Array")
    return value


def _both_leaves(value: Any) -> Any:
    """What Flax says of one logical array, said of codes and scales; all else as it is."""
    if isinstance(value, jax.ShapeDtypeStruct):
        *leading, k = value.shape
        shape = (*leading, k // MX_BLOCK_SIZE)
        return MXFP4Array(
            jax.ShapeDtypeStruct((*shape, MX_BLOCK_BYTES), np.uint8, sharding=value.sharding),
            jax.ShapeDtypeStruct(shape, np.uint8, sharding=value.sharding),
        )
    if isinstance(value, PartitionSpec | Sharding):
        return jax.tree.unflatten(_STRUCTURE, (value, value))
    return value


_STRUCTURE = jax.tree.structure(MXFP4Array(np.empty((0, MX_BLOCK_BYTES), np.uint8), np.empty(0, np.uint8)))
