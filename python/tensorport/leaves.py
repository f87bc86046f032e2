"""What a checkpoint becomes in JAX: named leaves with their shapes and dtypes. Touches no tensor data and no device."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import jax
import ml_dtypes
import numpy as np

from tensorport import _core
from tensorport.checkpoint import Checkpoint, TensorSpec
from tensorport.errors import CheckpointError, MappingError
from tensorport.mxfp4.types import MX_BLOCK_SIZE, MXFP4Array
from tensorport.reports import printable

__all__ = ["ArraySource", "Leaf", "Rename", "find_leaves", "renamed", "split"]

_CASTABLE: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Dtypes that `dtype` casts, as `precision` of convert() does."""

_NOT_IN_JAX: Final = frozenset({"float6_e2m3fn", "float6_e3m2fn"})
"""Dtypes that JAX names but cannot use: 0.10 cannot hold them, 0.12 holds them and fails to compile any operation. How
their codes are packed in a file, safetensors leaves open."""

Rename: TypeAlias = Callable[[str], str] | Mapping[str, str] | Sequence[tuple[str | re.Pattern[str], str]]


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySource:
    """One jax.Array and where its values come from.

    Attributes:
        names: the checkpoint's tensor; blocks, or a float8 weight, and scales where these are decoded.
        conversion: what happens on the way, in the extension module's words.
        shape: shape of the array.
        dtype: dtype of the array.
        first_row: where the array begins along the first axis of the tensor, if it is a part of one.
    """

    names: tuple[str, ...]
    conversion: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    first_row: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of the tree: an array, or the blocks and scales of an MXFP4Array.

    Attributes:
        name: full dotted name, after `rename`.
        arrays: one array; blocks and scales for an MXFP4Array.
    """

    name: str
    arrays: tuple[ArraySource, ...]

    @property
    def is_mxfp4(self) -> bool:
        """Whether the leaf is an MXFP4Array."""
        return len(self.arrays) == 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        shape = self.arrays[-1].shape
        return (*shape[:-1], MX_BLOCK_SIZE * shape[-1]) if self.is_mxfp4 else shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Logical dtype."""
        return np.dtype(ml_dtypes.bfloat16) if self.is_mxfp4 else self.arrays[0].dtype

    def build(self, arrays: Sequence[Any]) -> Any:
        """The leaf made of its arrays, or of what stands for them."""
        return MXFP4Array(*arrays) if self.is_mxfp4 else arrays[0]


def find_leaves(
    checkpoint: Checkpoint,
    *,
    dtype: np.dtype[Any] | None,
    mxfp4: str,
    float8: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> tuple[list[Leaf], list[str]]:
    """The leaves that a checkpoint's selected tensors become, in the checkpoint's order, and what the user should know.

    Raises:
        CheckpointError: `mxfp4` or `float8` is "dequantize" and half of a pair is missing or does not fit.
        MappingError: nothing is selected, two leaves have one name, or JAX has no such dtype.
    """
    candidates = list(_candidates(checkpoint, dtype, mxfp4, float8, include, exclude))
    taken = _core.select([leaf.name for leaf in candidates], include, exclude)
    leaves = [leaf for leaf, is_taken in zip(candidates, taken, strict=True) if is_taken]
    if candidates and not leaves:
        raise MappingError(
            f"found {len(candidates)} tensors, none of them selected, expected include {_told(include)} and exclude "
            f"{_told(exclude)} to leave some"
        )
    _refuse_duplicates(leaf.name for leaf in leaves)
    missing = [leaf for leaf in leaves if leaf.dtype.name in _NOT_IN_JAX]
    if missing:
        named = ", ".join(f"{leaf.name} ({leaf.dtype.name})" for leaf in missing)
        raise MappingError(
            f"found dtypes that JAX cannot use: {printable(named)}, expected them in exclude= (open() has their bytes)"
        )
    _refuse_sizes(checkpoint, leaves)
    return leaves, _narrowed(checkpoint, leaves, dtype)


def _candidates(  # noqa: PLR0917 - what find_leaves hands on
    checkpoint: Checkpoint,
    dtype: np.dtype[Any] | None,
    mxfp4: str,
    float8: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> Iterator[Leaf]:
    """Every leaf that could be selected."""
    pairs, misfits = checkpoint._core.pairs() if mxfp4 != "raw" else ([], [])
    float8_pairs, float8_misfits = checkpoint._core.float8_pairs() if float8 == "dequantize" else ([], [])
    blocks_to_pair = {blocks: (name, scales) for name, blocks, scales in pairs}
    float8_scales = dict(float8_pairs)
    halves = {scales for _, _, scales in pairs} | set(float8_scales.values())
    # A misfit has two names, like a pair: leaving out either leaves it out.
    for name, pair_name, fault in (misfits if mxfp4 == "dequantize" else []) + float8_misfits:
        if all(_core.select([name, pair_name], include, exclude)):
            raise CheckpointError(fault)
        halves.add(name)
    decoded_dtype = dtype or np.dtype(ml_dtypes.bfloat16)
    for name, spec in checkpoint.specs.items():
        if name in halves:
            continue
        if name in float8_scales:
            names = (name, float8_scales[name])
            yield Leaf(name, (ArraySource(names, decoded_dtype.name, spec.shape, decoded_dtype),))
            continue
        if name not in blocks_to_pair:
            yield Leaf(name, (_plain(spec, dtype),))
            continue
        pair_name, scales = blocks_to_pair[name]
        if mxfp4 == "keep":
            yield Leaf(pair_name, (_plain(spec, None), _plain(checkpoint.specs[scales], None)))
        else:
            shape = (*spec.shape[:-2], spec.shape[-2] * MX_BLOCK_SIZE)
            yield Leaf(pair_name, (ArraySource((name, scales), decoded_dtype.name, shape, decoded_dtype),))


def _plain(spec: TensorSpec, dtype: np.dtype[Any] | None) -> ArraySource:
    """A tensor as one array: cast if it is a float, in 32 bits if JAX has no 64."""
    target = dtype if dtype is not None and spec.dtype.name in _CASTABLE else spec.dtype
    target = np.dtype(jax.dtypes.canonicalize_dtype(target))
    if spec.dtype.name == "float4_e2m1fn":
        conversion = "unpack"
    elif target == spec.dtype:
        conversion = "none"
    elif spec.dtype.name in _CASTABLE:
        conversion = target.name
    else:
        conversion = "narrow"
    return ArraySource((spec.name,), conversion, spec.shape, target)


def _narrowed(checkpoint: Checkpoint, leaves: list[Leaf], dtype: np.dtype[Any] | None) -> list[str]:
    """A warning that names the tensors which JAX's setting narrows to 32 bits, if there are any."""
    narrowed = [
        f"{leaf.name} ({spec.dtype.name})"
        for leaf in leaves
        for spec in [checkpoint.specs[leaf.arrays[0].names[0]]]
        if spec.dtype.itemsize == 8
        and leaf.dtype.itemsize == 4
        and not (dtype is not None and spec.dtype.name in _CASTABLE)
    ]
    if not narrowed:
        return []
    return [
        "JAX holds 64-bit numbers only after jax.config.update('jax_enable_x64', True): loaded in 32 bits: "
        + printable(", ".join(narrowed))
    ]


def renamed(leaves: list[Leaf], rename: Rename | None) -> list[Leaf]:
    """The leaves under their new names.

    Raises:
        MappingError: two leaves get one name, or a key of a dict names none.
        TypeError: `rename` is something else, or makes a name that is no text.
    """
    if rename is None:
        return leaves
    rename_one = _renamer(rename, {leaf.name for leaf in leaves})
    new_names = [rename_one(leaf.name) for leaf in leaves]
    for leaf, name in zip(leaves, new_names, strict=True):
        if not isinstance(name, str):
            raise TypeError(f"rename: found {name!r} for {leaf.name!r}, expected a name")
    sources: dict[str, list[str]] = {}
    for leaf, name in zip(leaves, new_names, strict=True):
        sources.setdefault(name, []).append(leaf.name)
    met = [f"{name} (from {', '.join(old)})" for name, old in sources.items() if len(old) > 1]
    if met:
        told = printable("; ".join(met))
        raise MappingError(f"rename: found one name for several tensors: {told}, expected a name for each")
    return [dataclasses.replace(leaf, name=name) for leaf, name in zip(leaves, new_names, strict=True)]


def split(leaves: list[Leaf], parts: Mapping[str, Mapping[str, int]]) -> list[Leaf]:
    """The leaves, and in place of those that `parts` names their parts along the first axis.

    Args:
        leaves: what is to be loaded.
        parts: for a leaf the names of its parts and their rows, in the order in which they stand in it.

    Raises:
        MappingError: the rows are more or fewer than the leaf has.
    """
    result = []
    for leaf in leaves:
        if leaf.name not in parts:
            result.append(leaf)
            continue
        rows, first_row = parts[leaf.name], 0
        if leaf.shape[:1] != (sum(rows.values()),):
            told = " + ".join(map(str, rows.values()))
            raise MappingError(f"{leaf.name}: found {list(leaf.shape)}, expected {told} rows for {', '.join(rows)}")
        for name, count in rows.items():
            result.append(Leaf(name, tuple(_rows(array, first_row, count) for array in leaf.arrays)))
            first_row += count
    return result


def _rows(array: ArraySource, first_row: int, count: int) -> ArraySource:
    return dataclasses.replace(array, shape=(count, *array.shape[1:]), first_row=array.first_row + first_row)


def _renamer(rename: Rename, names: set[str]) -> Callable[[str], str]:
    if isinstance(rename, Mapping):
        unknown = [name for name in rename if name not in names]
        if unknown:
            raise MappingError(f"rename: found {', '.join(map(repr, unknown))}, expected names of selected tensors")
        return lambda name: rename.get(name, name)
    if callable(rename):
        return rename
    if isinstance(rename, str) or not isinstance(rename, Sequence):
        raise TypeError(f"rename: found {rename!r}, expected a callable, a dict, or (regex, replacement) pairs")
    rules = []
    for rule in rename:
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2:
            raise TypeError(f"rename: found the rule {rule!r}, expected (regex, replacement)")
        try:
            rules.append((re.compile(rule[0]), rule[1]))
        except re.error as fault:
            raise ValueError(
                f"rename: found the pattern {rule[0]!r} ({fault}), expected a regular expression"
            ) from fault

    def apply(name: str) -> str:
        for pattern, replacement in rules:
            try:
                name = pattern.sub(replacement, name)
            except re.error as fault:
                raise ValueError(
                    f"rename: found the replacement {replacement!r} ({fault}), expected one for {pattern.pattern!r}"
                ) from fault
        return name

    return apply


def _refuse_duplicates(names: Iterator[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise MappingError(
            f"found {', '.join(map(repr, twice))} both as a tensor and as an MXFP4 pair, expected one of each name "
            '(mxfp4="raw" keeps the names of blocks and scales)'
        )


def _refuse_sizes(checkpoint: Checkpoint, leaves: list[Leaf]) -> None:
    """Refuses what neither NumPy nor JAX can hold: a wider dtype makes some sizes too large, also of empty arrays."""
    for leaf in leaves:
        for array in leaf.arrays:
            if math.prod(size or 1 for size in array.shape) * array.dtype.itemsize >= 2**63:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {array.names[0]!r}: found {array.dtype.name} {list(array.shape)}, "
                    "expected a size below 2^63 bytes"
                )


def _told(globs: Sequence[str] | None) -> str:
    return "(not given)" if globs is None else repr(list(globs))
