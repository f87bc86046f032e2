"""Named leaves as pytrees: nested dicts, flat dicts, or the structure of a target that they must fit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from tensorport.errors import MappingError
from tensorport.leaf_names import named_leaves
from tensorport.leaves import Leaf
from tensorport.mxfp4.types import MXFP4Array
from tensorport.reports import printable

__all__ = ["Target", "nested_dict", "refuse_prefixes"]


def refuse_prefixes(names: Sequence[str]) -> None:
    """Refuses names that are both a leaf and a branch of nested dicts.

    Raises:
        MappingError: one name goes on where another ends, as `a.b` does beside `a`.
    """
    # One pass over the components: names are as long as a file wants them.
    tree: dict[str, Any] = {}
    for name in names:
        *branches, last = name.split(".")
        branch: Any = tree
        for key in branches:
            branch = branch.setdefault(key, {})
            if isinstance(branch, str):
                raise _meeting(branch, name)
        if last in branch:
            inner = branch[last]
            while not isinstance(inner, str):
                inner = next(iter(inner.values()))
            raise _meeting(name, inner)
        branch[last] = name


def _meeting(name: str, longer: str) -> MappingError:
    return MappingError(
        f"found tensors {name!r} and {longer!r}, expected no name that goes on where another ends "
        "(nested=False keeps names whole, rename changes them)"
    )


def nested_dict(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Nested dicts, with the names split at dots."""
    tree: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *branches, last = name.split(".")
        branch = tree
        for key in branches:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return tree


class Target:
    """A tree whose arrays are to be filled, each found under its dotted path.

    Keys of dicts, indices of sequences and names of attributes are joined by dots. A variable of Flax NNX counts as its
    value. Leaves without shape and dtype (functions, numbers) stay as they are.
    """

    def __init__(self, tree: Any) -> None:
        """Looks at the structure; touches no array."""
        named = named_leaves(tree, _is_mxfp4)
        self._names = [name for name, _ in named]
        self._leaves = [leaf for _, leaf in named]
        self._treedef = jax.tree.structure(tree, is_leaf=_is_mxfp4)

    def wanted(self) -> dict[str, Any]:
        """The leaves to fill, by name."""
        return {name: leaf for name, leaf in zip(self._names, self._leaves, strict=True) if _is_array(leaf)}

    def check(self, leaves: Sequence[Leaf]) -> None:
        """Compares names, shapes and dtypes.

        Raises:
            MappingError: something does not fit; says all that does not.
        """
        wanted = self.wanted()
        found = {leaf.name: leaf for leaf in leaves}
        faults = []
        if len(wanted) < sum(map(_is_array, self._leaves)):
            twice = sorted({name for name in self._names if self._names.count(name) > 1})
            faults.append(f"target: found several leaves named {', '.join(twice)}, expected one of each name")
        for name, leaf in wanted.items():
            if name not in found:
                faults.append(f"{name}: found no such tensor, expected {_described(leaf)}")
            elif _described(leaf) != _described_leaf(found[name]):
                faults.append(f"{name}: found {_described_leaf(found[name])}, expected {_described(leaf)}")
        faults += [
            f"{leaf.name}: found {_described_leaf(leaf)}, expected no such tensor (exclude leaves it out, rename gives "
            "it another name)"
            for leaf in leaves
            if leaf.name not in wanted
        ]
        if faults:
            told = "\n  ".join(map(printable, faults))
            raise MappingError(f"{len(faults)} mismatches with the target:\n  {told}")

    def shardings(self) -> Callable[[str, jax.ShapeDtypeStruct], Any]:
        """The shardings that the target's own leaves say: those of ShapeDtypeStructs, and of committed arrays."""
        wanted = self.wanted()

        def choose(name: str, _: jax.ShapeDtypeStruct) -> Any:
            leaf = wanted[name]
            if isinstance(leaf, MXFP4Array):
                leaf = leaf.scales
            is_free = isinstance(leaf, jax.Array) and not leaf.committed
            return None if is_free else getattr(leaf, "sharding", None)

        return choose

    def fill(self, names: Sequence[str], values: Sequence[Any]) -> Any:
        """The target's structure around `values`."""
        by_name = dict(zip(names, values, strict=True))
        leaves = [
            by_name[name] if _is_array(leaf) else leaf for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self._treedef, leaves)


def _is_mxfp4(node: Any) -> bool:
    return isinstance(node, MXFP4Array)


def _is_array(leaf: Any) -> bool:
    return _is_mxfp4(leaf) or (hasattr(leaf, "shape") and hasattr(leaf, "dtype"))


def _described(leaf: Any) -> str:
    return f"{'MXFP4' if isinstance(leaf, MXFP4Array) else leaf.dtype} {list(leaf.shape)}"


def _described_leaf(leaf: Leaf) -> str:
    return f"MXFP4 {list(leaf.shape)}" if leaf.is_mxfp4 else f"{leaf.dtype.name} {list(leaf.shape)}"
