"""Arrays within `jax.shard_map`: along which axes of the mesh they differ between devices.

A loop must carry what differs alike before and after a step, and the gradient of an array must differ as the array
does. Ops therefore make all their arrays differ alike first; JAX sums the gradients of those that did not.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

__all__ = ["full_alike", "vary_alike"]

Tree = TypeVar("Tree")


def vary_alike(tree: Tree) -> Tree:
    """The arrays of a tree, each differing along all axes along which one does. Outside of shard_map, the tree."""
    axes = _axes(tree)
    return jax.tree.map(lambda leaf: _cast(leaf, axes), tree) if axes else tree


def full_alike(like: Any, shape: tuple[Any, ...], value: float, dtype: DTypeLike) -> Array:
    """A constant array that counts as differing as an array or a tree does."""
    full: Array = _cast(jnp.full(shape, value, dtype), _axes(like))
    return full


def _axes(tree: Any) -> frozenset[str]:
    axes = [_varying_axes(leaf) for leaf in jax.tree.leaves(tree)]
    return frozenset().union(*axes)


def _varying_axes(leaf: Any) -> frozenset[str]:
    kind: Any = jax.typeof(leaf)
    # `manual_axis_type.varying` since JAX 0.10, `vma` before.
    manual = getattr(kind, "manual_axis_type", None)
    axes: frozenset[str] = getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    return axes


def _cast(leaf: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _varying_axes(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf
