"""Where arrays go: rules to shardings, shardings to the regions that each device holds."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from tensorport.errors import MappingError
from tensorport.leaves import ArraySource, Leaf
from tensorport.reports import printable

__all__ = ["Region", "ShardingLike", "device_regions", "place", "rule_of"]

Rules: TypeAlias = Sequence[tuple[str | re.Pattern[str], PartitionSpec | None]]
ShardingLike: TypeAlias = (
    Sharding | jax.Device | Callable[[str, jax.ShapeDtypeStruct], Sharding | jax.Device | None] | Rules
)

Region: TypeAlias = tuple[tuple[int, int], ...]
"""A box of an array: (start, stop) for each axis."""


def place(leaves: Sequence[Leaf], sharding: ShardingLike | None, mesh: Mesh | None) -> list[Sharding | None]:
    """The sharding of each leaf, fit for its shape; None is JAX's default device.

    Raises:
        MappingError: no rule matches a leaf, or a sharding does not fit its shape; says all of them.
        TypeError: `sharding` is none of what it can be.
        ValueError: rules without a mesh, or a mesh without rules.
    """
    choose = _chooser(sharding, mesh)
    faults: list[str] = []
    shardings = []
    for leaf in leaves:
        try:
            chosen = choose(leaf.name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            shardings.append(_checked(leaf, chosen))
        except MappingError as fault:
            faults.append(str(fault))
    if faults:
        raise MappingError("sharding does not fit:\n  " + "\n  ".join(map(printable, faults)))
    return shardings


def _chooser(
    sharding: ShardingLike | None, mesh: Mesh | None
) -> Callable[[str, jax.ShapeDtypeStruct], Sharding | jax.Device | None]:
    is_one = sharding is None or isinstance(sharding, Sharding | jax.Device)
    if mesh is not None and (is_one or callable(sharding)):
        raise ValueError("mesh: found a mesh without rules, expected sharding=[(regex, PartitionSpec), ...] with it")
    if is_one:
        return lambda *_: sharding
    if callable(sharding):
        return sharding
    if isinstance(sharding, str | PartitionSpec) or not isinstance(sharding, Sequence):
        raise TypeError(
            f"sharding: found {sharding!r}, expected a Sharding, a device, a callable, or (regex, PartitionSpec) rules "
            "with a mesh"
        )
    return rule_of(sharding, mesh)


def rule_of(rules: Rules, mesh: Mesh | None) -> Callable[[str, jax.ShapeDtypeStruct], Sharding]:
    """The sharding of the first rule that is found in a name.

    Raises:
        MappingError: by what is returned, where no rule matches.
        TypeError, ValueError: no rules, or no mesh.
    """
    if mesh is None:
        raise ValueError("mesh: found None, expected the mesh of the PartitionSpecs in sharding")
    compiled = []
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], PartitionSpec | None)):
            raise TypeError(f"sharding: found the rule {rule!r}, expected (regex, PartitionSpec)")
        try:
            compiled.append((re.compile(rule[0]), NamedSharding(mesh, rule[1] or PartitionSpec())))
        except re.error as fault:
            raise ValueError(
                f"sharding: found the pattern {rule[0]!r} ({fault}), expected a regular expression"
            ) from fault

    def choose(name: str, _: jax.ShapeDtypeStruct) -> Sharding:
        for pattern, sharding in compiled:
            if pattern.search(name):
                return sharding
        raise MappingError(
            f"{name}: found no rule that matches, expected one (a last rule ('', PartitionSpec()) replicates)"
        )

    return choose


def _checked(leaf: Leaf, sharding: Any) -> Sharding | None:
    if sharding is None:
        return None
    if isinstance(sharding, jax.Device):
        return SingleDeviceSharding(sharding)
    if not isinstance(sharding, Sharding):
        raise TypeError(f"sharding: found {sharding!r} for {leaf.name!r}, expected a Sharding or a device")
    placed = _concrete(leaf, sharding)
    for array in leaf.arrays:
        try:
            placed.shard_shape(array.shape)
        # IndexError: a specification of more axes than the array has.
        except (IndexError, ValueError) as fault:
            found = f"MXFP4 {list(leaf.shape)} in blocks of 32" if leaf.is_mxfp4 else str(list(leaf.shape))
            raise MappingError(
                f"{leaf.name}: found {found} under {_described(placed)}, expected axes that it divides evenly"
            ) from fault
    return placed


def _concrete(leaf: Leaf, sharding: Sharding) -> Sharding:
    """The sharding on devices: an abstract mesh stands for the mesh in force (`jax.set_mesh`), if that has its axes."""
    if not isinstance(sharding, NamedSharding) or isinstance(sharding.mesh, Mesh):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh != sharding.mesh:
        raise MappingError(
            f"{leaf.name}: found an abstract mesh {dict(sharding.mesh.shape)}, expected devices: that mesh in force "
            "(jax.set_mesh), or a sharding over a Mesh"
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _described(sharding: Sharding) -> str:
    if isinstance(sharding, NamedSharding):
        return f"{sharding.spec} on a mesh of {dict(sharding.mesh.shape)}"
    return str(sharding)


def device_regions(array: ArraySource, sharding: Sharding) -> dict[Region, list[jax.Device]]:
    """What this process's devices hold of an array: each region once, with the devices that hold it."""
    regions: dict[Region, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        indices = (slice(None),) * len(array.shape) if index is None else index
        region = tuple(
            (item.indices(size)[0], item.indices(size)[1]) for item, size in zip(indices, array.shape, strict=True)
        )
        regions.setdefault(region, []).append(device)
    return regions
