"""Parts of a checkpoint, as `tensorport.load_params` returns them, for the layers that are made of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tensorport.errors import MappingError
from tensorport.mxfp4.codec import ScaleRule, quantize
from tensorport.mxfp4.types import MXFP4Array
from tensorport.reports import printable

__all__ = ["codes_of", "tensors_and_sizes"]

Axes = Mapping[str, Sequence[str]]
"""Names of a tensor's axes by its dotted name. `2I` is twice as long as `I`."""


def tensors_and_sizes(
    params: Mapping[str, Any], axes: Axes, *, optional: Axes | None = None, ignored: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, int]]:
    """The tensors of a nested dict by dotted name, and the sizes of their axes by name.

    Args:
        params: nested dicts.
        axes: the tensors that must be there.
        optional: tensors that may be there.
        ignored: tensors that may be there and are left out.

    Raises:
        MappingError: tensors are missing, there are others, or an axis has several sizes; says all.
    """
    tensors = {name: tensor for name, tensor in _flat(params) if name not in ignored}
    known = {**axes, **(optional or {})}
    faults = [f"{name}: found no such tensor, expected {_told(axes[name])}" for name in axes if name not in tensors]
    faults += [f"{name}: found, expected no such tensor" for name in tensors if name not in known]
    sizes: dict[str, int] = {}
    for name, names in known.items():
        if name not in tensors:
            continue
        shape = tuple(tensors[name].shape)
        fits = len(shape) == len(names)
        for axis, size in zip(names, shape, strict=fits):
            factor = 2 if axis.startswith("2") else 1
            fits = fits and size == factor * sizes.setdefault(axis[factor - 1 :], size // factor)
        if not fits:
            faults.append(f"{name}: found shape {list(shape)}, expected {_told(names)}")
    if faults:
        where = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
        told = "\n  ".join(map(printable, faults))
        raise MappingError(f"{len(faults)} tensors do not fit the layer (with {where}):\n  {told}")
    return tensors, sizes


def _told(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def codes_of(tensor: Any, scale_rule: ScaleRule) -> MXFP4Array:
    """Codes of a tensor of a checkpoint [..., out, in]: as it is, or quantized where it is dense.

    Raises:
        TypeError: it is neither an MXFP4Array nor an array of floats.
        ValueError: the last axis of a dense tensor is not a multiple of 32.
    """
    if isinstance(tensor, MXFP4Array):
        return tensor
    if isinstance(tensor, np.ndarray) or tensor.ndim < 3:
        return quantize(tensor, scale_rule=scale_rule)
    # Matrix by matrix: what lies between floats and codes takes several times their memory.
    codes: MXFP4Array = jax.lax.map(lambda matrix: quantize(matrix, scale_rule=scale_rule), tensor)
    return codes
