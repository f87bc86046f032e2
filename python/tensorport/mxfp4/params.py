"""quantize_params(): chosen matrices of a pytree become MXFP4Arrays."""

import re
import warnings as python_warnings
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jaxtyping import Array

from tensorport.errors import MappingError
from tensorport.leaf_names import named_leaves
from tensorport.mxfp4.codec import FLOATS, Rounding, ScaleRule, quantize
from tensorport.mxfp4.error import error_between
from tensorport.mxfp4.report import QuantizationReport
from tensorport.mxfp4.types import MX_BLOCK_SIZE, MXFP4Array
from tensorport.reports import printable

__all__ = ["Where", "quantize_params"]

Where: TypeAlias = str | re.Pattern[str] | Callable[[str, Any], bool]
"""A regular expression that is searched in dotted names, or a function of name and leaf."""


def quantize_params(
    params: Any,
    where: Where,
    *,
    scale_rule: ScaleRule = "floor",
    rounding: Rounding = "nearest",
    key: Array | None = None,
) -> tuple[Any, QuantizationReport]:
    """Quantizes chosen matrices of a pytree to MXFP4, and reports what each of them lost.

    >>> params, report = mxfp4.quantize_params(params, r"mlp.*weight$")

    Blocks of 32 run along the last axis, and products contract over it: matrices must be [..., out, in], as PyTorch,
    Equinox and checkpoints of Hugging Face have them. Kernels of Flax are [in, out] and would be quantized along the
    wrong axis; `tensorport.nnx.quantize_model` transposes them.

    What is quantized are matrices: arrays of floats with two or more axes. Whatever else is chosen, biases and norms
    among them, stays as it is, and so do MXFP4Arrays. A matrix whose last axis is not a multiple of 32 stays too, with
    a warning.

    Args:
        params: any pytree: nested dicts, Flax NNX states, Equinox modules. NumPy arrays are quantized by the Rust core,
            jax.Arrays where they are.
        where: which leaves, by their dotted names, such as `layers.0.mlp.up.weight`: a regular expression, of which
            `re.search` finds a match, or a callable `(name, leaf) -> bool`.
        scale_rule: see :func:`quantize`.
        rounding: see :func:`quantize`.
        key: for stochastic rounding. Each tensor has a key of its own, `fold_in(key, crc32(name))`, so that the others
            make no difference to it.

    Returns:
        A pytree of the same structure with MXFP4Arrays in place of the chosen matrices, and the report. All other
        leaves are those of `params`; nothing is copied.

    Raises:
        MappingError: no matrix is quantized, or two of them have one name.
        TypeError, ValueError: `where` is none of those or no regular expression, or an option is none of those of
            :func:`quantize`.
    """
    is_chosen = _predicate(where)
    named = named_leaves(params, _is_mxfp4)
    leaves, tensors, warnings = [], {}, []
    matching = 0
    for name, leaf in named:
        leaves.append(leaf)
        if not is_chosen(name, leaf):
            continue
        matching += 1
        if not _is_float_matrix(leaf):
            continue
        if not leaf.shape[-1] or leaf.shape[-1] % MX_BLOCK_SIZE:
            warnings.append(
                f"tensor {name!r} is not quantized: its last axis has {leaf.shape[-1]} values, no whole blocks of "
                f"{MX_BLOCK_SIZE}"
            )
            continue
        if name in tensors:
            raise MappingError(f"params: found several leaves named {name!r}, expected one of each name")
        own_key = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        leaves[-1] = quantize(leaf, scale_rule=scale_rule, rounding=rounding, key=own_key)
        tensors[name] = error_between(leaf, leaves[-1])
    if not tensors:
        told = "".join(f"\n  {warning}" for warning in warnings)
        raise MappingError(
            f"where: found {len(named)} leaves, {matching} of them chosen by {_told(where)}, expected a float matrix "
            f"with a last axis of whole blocks of {MX_BLOCK_SIZE} among these{printable(told)}"
        )
    for warning in warnings:
        python_warnings.warn(warning, stacklevel=2)
    treedef = jax.tree.structure(params, is_leaf=_is_mxfp4)
    return jax.tree.unflatten(treedef, leaves), QuantizationReport(tensors, tuple(warnings))


def _predicate(where: Where) -> Callable[[str, Any], bool]:
    if isinstance(where, str | re.Pattern):
        try:
            pattern = re.compile(where)
        except re.error as fault:
            raise ValueError(f"where: found the pattern {where!r} ({fault}), expected a regular expression") from fault
        return lambda name, _: pattern.search(name) is not None
    if not callable(where):
        raise TypeError(f"where: found {type(where).__name__}, expected a regular expression or a callable")
    return where


def _told(where: Where) -> str:
    if isinstance(where, str | re.Pattern):
        return repr(where.pattern if isinstance(where, re.Pattern) else where)
    return getattr(where, "__name__", repr(where))


def _is_mxfp4(node: Any) -> bool:
    return isinstance(node, MXFP4Array)


def _is_float_matrix(leaf: Any) -> bool:
    return (
        not _is_mxfp4(leaf)
        and hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and len(leaf.shape) >= 2
        and str(leaf.dtype) in FLOATS
    )
