"""Computations on meshes with explicit axes, where JAX asks every operation how its result is sharded.

Products of codes are loops over tiles, of which nobody says that. So they are compiled as for axes that the compiler
shards, and only their result gets the sharding that is asked for.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

__all__ = ["OutSharding", "explicit_spec", "on_auto_axes"]

R = TypeVar("R")

OutSharding: TypeAlias = PartitionSpec | NamedSharding | None
"""How a result is to be sharded, on a mesh with explicit axes."""


def on_auto_axes(function: Callable[..., R], out_sharding: Any) -> Callable[..., R]:
    """The function, compiled for axes that the compiler shards; itself if no sharding of its result is known.

    Args:
        function: takes arrays and trees of them.
        out_sharding: an `OutSharding`, or a tree of them where the result is a tree.
    """
    if out_sharding is None:
        return function
    on_auto: Callable[..., R] = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    return on_auto


def explicit_spec(x: Array) -> PartitionSpec | None:
    """How an array is sharded, one entry for each axis, if that is on a mesh with explicit axes."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return PartitionSpec(*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
