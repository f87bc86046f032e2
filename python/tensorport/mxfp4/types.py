"""The quantized array as a pytree: codes and scales that act as one array of bfloat16."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from types import EllipsisType
from typing import Any, ClassVar, Final, Never, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import export
from jax.typing import DTypeLike

from tensorport.reports import human_bytes

__all__ = ["MX_BLOCK_BYTES", "MX_BLOCK_SIZE", "MXFP4Array"]

MX_BLOCK_SIZE: Final = 32
"""Values that share one scale: OCP MX v1.0, table 1."""

MX_BLOCK_BYTES: Final = 16
"""Bytes of the codes of one block, two codes in each."""

_BFLOAT16: Final[np.dtype[Any]] = np.dtype(ml_dtypes.bfloat16)

Leaf: TypeAlias = Any
"""An array of uint8: NumPy, JAX, a tracer or a ShapeDtypeStruct; inside of pytree operations anything at all."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False, weakref_slot=True)
class MXFP4Array:
    """An array of MXFP4 values; to its user an array of bfloat16 whose last axis is stored in blocks of 32.

    A pytree with two leaves, under the keys `blocks` and `scales`: jit, vmap, scan, device_put, shardings and
    checkpoints see those. Both have the logical leading axes, and the last logical axis (K, the one that products
    contract) in blocks. A sharding that fits the logical shape therefore fits both leaves, if it splits K only
    between blocks: `jax.device_put(w, NamedSharding(mesh, PartitionSpec("expert", "row")))`.

    Codes are frozen: nothing here changes them, and an instance is equal to itself alone. The leaves are kept as they
    are, without a copy.

    Attributes:
        blocks: codes, uint8 [..., K / 32, 16]: two E2M1 values per byte, the low nibble first.
        scales: biased E8M0 exponents, uint8 [..., K / 32]: 2 ** (byte - 127), and 255 is NaN.

    Raises:
        TypeError: a leaf is not an array of uint8.
        ValueError: the shapes do not fit each other.

    Source: value formula from OCP Microscaling Formats (MX) v1.0; the order of the nibbles, which that document leaves
        open, from the gpt-oss checkpoints.
    """

    # NumPy leaves operators to the other operand, and raises TypeError where it has none.
    __array_ufunc__: ClassVar[None] = None

    blocks: Leaf
    scales: Leaf

    def __post_init__(self) -> None:
        """Checks what a person or a loader passed in; pytree operations come past here with leaves of any kind."""
        for name, leaf in (("blocks", self.blocks), ("scales", self.scales)):
            if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
                raise TypeError(f"{name}: found {type(leaf).__name__}, expected an array of uint8")
            if leaf.dtype != np.uint8:
                raise TypeError(f"{name}: found an array of {leaf.dtype}, expected uint8")
        blocks_shape, scales_shape = tuple(self.blocks.shape), tuple(self.scales.shape)
        if len(blocks_shape) < 2 or blocks_shape[-1] != MX_BLOCK_BYTES:
            raise ValueError(f"blocks: found shape {blocks_shape}, expected (..., K / {MX_BLOCK_SIZE}, 16)")
        if scales_shape != blocks_shape[:-1]:
            raise ValueError(
                f"scales: found shape {scales_shape}, expected {blocks_shape[:-1]}, "
                f"one scale for each of the blocks {blocks_shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (..., K)."""
        *leading, groups = self.scales.shape
        return (*leading, MX_BLOCK_SIZE * groups)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Logical dtype: bfloat16, which holds every value exactly for scale bytes up to 252."""
        return _BFLOAT16

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.scales.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, 17 for every 32 values."""
        return self.size // MX_BLOCK_SIZE * (MX_BLOCK_BYTES + 1)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """How the logical array is spread over devices: as its scales are. None for leaves that have no devices."""
        return getattr(self.scales, "sharding", None)

    def dequantize(self, dtype: DTypeLike = _BFLOAT16) -> Any:
        """The values as a dense array [..., K]: see :func:`tensorport.mxfp4.dequantize`."""
        from tensorport.mxfp4.codec import dequantize  # noqa: PLC0415 - it is made of this type

        return dequantize(self, dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "MXFP4Array":
        """Indexes leading axes, by what the leaves take: ints, slices, arrays, Ellipsis, None.

        NumPy leaves stay NumPy (and basic indices views) unless the index is traced.

        Raises:
            IndexError: the index reaches into the last axis, whose values share bytes and scales.
        """
        leading = _leading_index(index, self.ndim)
        leaves = self.blocks, self.scales
        if any(isinstance(item, jax.core.Tracer) for item in leading):
            leaves = jnp.asarray(self.blocks), jnp.asarray(self.scales)
        return _unflatten(None, (leaf[leading] for leaf in leaves))

    def __iter__(self) -> Iterator["MXFP4Array"]:
        if self.ndim < 2:
            raise TypeError("the last axis of an MXFP4Array cannot be iterated: its values share bytes and scales")
        return (self[row] for row in range(len(self)))

    def __array__(self, *_: object, **__: object) -> Never:
        """Refuses: NumPy would otherwise take this for a sequence and decode value by value."""
        raise TypeError("an MXFP4Array does not become a dense array unasked: call its dequantize()")

    def __repr__(self) -> str:
        if not all(hasattr(leaf, "shape") for leaf in (self.blocks, self.scales)):
            return f"MXFP4Array(blocks={self.blocks!r}, scales={self.scales!r})"
        parts = [f"shape={self.shape}", f"dtype={self.dtype.name}", f"nbytes={human_bytes(self.nbytes)}"]
        if self.nbytes:
            parts[-1] += f" ({self.size * self.dtype.itemsize / self.nbytes:.2f}x smaller)"
        parts.append("leaves=" + "/".join(dict.fromkeys(map(_kind, (self.blocks, self.scales)))))
        if self.sharding is not None:
            parts.append(f"sharding={self.sharding}")
        return f"MXFP4Array({', '.join(parts)})"


def _kind(leaf: object) -> str:
    if isinstance(leaf, jax.core.Tracer):
        return "tracer"
    if isinstance(leaf, jax.Array):
        return "jax.Array"
    return "numpy.ndarray" if isinstance(leaf, np.ndarray) else type(leaf).__name__


def _leading_index(index: Any, ndim: int) -> tuple[Any, ...]:
    """The part of a logical index that acts on the axes before the last, without Ellipsis.

    Blocks and scales have one and two axes behind those, to which an Ellipsis or a `:` for the last axis must not
    spread.
    """
    items = [
        np.asarray(item) if isinstance(item, list) else item for item in (index if type(index) is tuple else (index,))
    ]
    consumed = sum(map(_axes_consumed, items))
    if consumed > ndim:
        raise IndexError(f"too many indices: found {consumed}, expected at most {ndim} for an MXFP4Array")
    ellipses = [position for position, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("found two Ellipsis in an index, expected one at most")
    position = ellipses[0] if ellipses else len(items)
    items[position : position + 1] = [slice(None)] * (ndim - consumed)
    last = items.pop() if items else None
    if not (isinstance(last, slice) and last == slice(None)):
        raise IndexError(
            f"found an index into the last axis ({index!r}), expected one into the {ndim - 1} before it: "
            f"{MX_BLOCK_SIZE} values along the last axis share a scale. Dequantize first, or index blocks and scales"
        )
    return tuple(items)


def _axes_consumed(item: Any) -> int:
    """How many axes one element of an index uses up: a boolean array as many as it has, None and Ellipsis none."""
    if item is None or isinstance(item, EllipsisType):
        return 0
    is_boolean = isinstance(item, bool) or getattr(item, "dtype", None) == np.bool_
    return int(np.ndim(item)) if is_boolean else 1


def _flatten_with_keys(array: MXFP4Array) -> tuple[tuple[tuple[Any, Any], tuple[Any, Any]], None]:
    blocks, scales = jax.tree_util.GetAttrKey("blocks"), jax.tree_util.GetAttrKey("scales")
    return ((blocks, array.blocks), (scales, array.scales)), None


def _flatten(array: MXFP4Array) -> tuple[tuple[Any, Any], None]:
    return (array.blocks, array.scales), None


def _unflatten(_: None, leaves: Iterable[Any]) -> MXFP4Array:
    """Builds an instance around any two leaves: transformations pass tracers, None, specs and plain objects."""
    array = object.__new__(MXFP4Array)
    for name, leaf in zip(("blocks", "scales"), leaves, strict=True):
        object.__setattr__(array, name, leaf)
    return array


jax.tree_util.register_pytree_with_keys(MXFP4Array, _flatten_with_keys, _unflatten, _flatten)
export.register_pytree_node_serialization(
    MXFP4Array,
    serialized_name="tensorport.mxfp4.MXFP4Array",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: None,
)
