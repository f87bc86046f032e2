"""The dotted names of a pytree's leaves, as checkpoints would name them."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

__all__ = ["named_leaves"]


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """Names and leaves, in the order of `jax.tree.flatten(tree, is_leaf)`.

    Keys of dicts, indices of sequences and names of attributes are joined by dots. A variable of Flax NNX counts as its
    value.
    """
    variables = {path for path, leaf in _flatten(tree, _is_nnx_variable) if _is_nnx_variable(leaf)}

    def name(path: tuple[Any, ...]) -> str:
        ends = [end for end in range(len(path) + 1) if path[:end] in variables]
        return ".".join(map(_key_text, path[: ends[0]] if ends else path))

    return [(name(path), leaf) for path, leaf in _flatten(tree, is_leaf)]


def _flatten(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]


def _is_nnx_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def _key_text(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key)
