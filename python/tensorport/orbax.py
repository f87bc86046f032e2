"""Checkpoints that orbax-checkpoint wrote, as sources: their arrays are copied into a safetensors file first.

Orbax stores arrays compressed, in its own database; only orbax-checkpoint reads that. Trees that `convert` wrote in the
format `orbax` need nothing of this: they are read as they are.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tensorport.errors import CheckpointError
from tensorport.reports import human_bytes

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["is_checkpoint", "staged"]

_GROUP_BYTES = 256_000_000
"""What is restored at once, unless one array is larger."""

_ALIGNMENT = 64

_TAGS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""What safetensors calls dtypes whose elements fill bytes."""


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder that orbax wrote, and no tree of ours."""
    return (path / "_METADATA").is_file() and not (path / "manifest.json").is_file()


def staged(path: Path) -> Path:
    """A safetensors file with the arrays of an orbax checkpoint, under their keys joined by dots.

    It lies in a temporary folder (of `TMPDIR`), which goes when the process ends. What is asked for again is not copied
    again, unless the checkpoint was written anew.

    Args:
        path: the folder of a PyTree.

    Raises:
        CheckpointError: a leaf is no array, or has a dtype or a name that safetensors has not; or orbax cannot read it.
        ImportError: orbax-checkpoint is not installed.
        OSError: the system refused.
    """
    path = path.resolve()
    return _staged(path, (path / "_METADATA").stat().st_mtime_ns)


@functools.cache
def _staged(path: Path, modified_ns: int) -> Path:
    try:
        import orbax.checkpoint as ocp  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as fault:
        raise ImportError(
            f"{path}: found an Orbax checkpoint, which needs orbax-checkpoint: pip install 'tensorport[orbax]'"
        ) from fault
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        file = _copied(ocp, _Reader(checkpointer, path))
    # An interrupted conversion goes on where the source is still the same.
    os.utime(file, ns=(modified_ns, modified_ns))
    return file


class _Reader:
    """Orbax on one checkpoint, of which it raises all kinds of errors where that is damaged."""

    def __init__(self, checkpointer: Any, path: Path) -> None:
        self._checkpointer, self.path = checkpointer, path

    def tree(self) -> Any:
        metadata = self._call(self._checkpointer.metadata)
        return getattr(getattr(metadata, "item_metadata", metadata), "tree", None)

    def restore(self, args: Any) -> Any:
        return self._call(self._checkpointer.restore, args=args)

    def _call(self, method: Callable[..., Any], **options: Any) -> Any:
        try:
            return method(self.path, **options)
        except (MemoryError, PermissionError):
            raise
        except Exception as fault:
            raise CheckpointError(
                f"{self.path}: found what orbax-checkpoint cannot read, expected a whole checkpoint: "
                f"{type(fault).__name__}: {fault}"
            ) from fault


def _copied(ocp: Any, reader: _Reader) -> Path:
    path, tree = reader.path, reader.tree()
    leaves = dict(_leaves(path, tree, ()))
    if not leaves:
        raise CheckpointError(f"{path}: found no arrays, expected an Orbax checkpoint of some")
    arrays = {keys: (_tag(path, keys, leaf), tuple(leaf.shape), _nbytes(leaf)) for keys, leaf in leaves.items()}
    total = sum(nbytes for _, _, nbytes in arrays.values())
    folder = _temporary_folder()
    warnings.warn(
        f"{path} is an Orbax checkpoint: its {human_bytes(total)} are copied to {folder} before they are read",
        stacklevel=2,
    )
    file = folder / "model.safetensors"
    with file.open("wb") as out:
        out.write(_header(arrays))
        for group in _groups(arrays):
            # What has a placeholder is not read.
            item = _with_leaves(tree, dict.fromkeys(group, 0), ocp.PLACEHOLDER)
            as_numpy = dict.fromkeys(group, ocp.RestoreArgs(restore_type=np.ndarray))
            restore_args = _with_leaves(tree, as_numpy, ocp.PLACEHOLDER)
            restored = reader.restore(ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
            for keys in group:
                array = np.ascontiguousarray(functools.reduce(lambda node, key: node[key], keys, restored))
                out.write(array.reshape(-1).view(np.uint8).data)
    return file


_PREFIX = "tensorport-orbax-"
_LOCK = "lock"


def _temporary_folder() -> Path:
    """A folder that goes when the process ends; those of processes that were killed go now."""
    parent = Path(tempfile.gettempdir())
    for left_over in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (left_over / _LOCK).open("rb") as lock:
            if _lock(lock):
                shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    held = (folder / _LOCK).open("wb")
    _lock(held)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(held.close)  # which keeps it open until then
    return folder


def _lock(file: BinaryIO) -> bool:
    """Locks a file as long as it is open; False where another process has, or there are no such locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _leaves(path: Path, node: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf of a tree's description with its keys."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(path, value, (*keys, key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _leaves(path, value, (*keys, index))
    elif hasattr(node, "shape") and hasattr(node, "dtype"):
        yield keys, node
    elif node is not None:
        raise CheckpointError(f"{path}: tensor {_name(keys)!r}: found {type(node).__name__}, expected an array")


def _with_leaves(node: Any, leaves: dict[tuple[Any, ...], Any], other: Any, keys: tuple[Any, ...] = ()) -> Any:
    """The structure of a tree with these leaves, and `other` for the rest."""
    if isinstance(node, dict):
        return {key: _with_leaves(value, leaves, other, (*keys, key)) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_with_leaves(value, leaves, other, (*keys, index)) for index, value in enumerate(node)]
    return None if node is None else leaves.get(keys, other)


def _name(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys))


def _nbytes(leaf: Any) -> int:
    count: int = math.prod(leaf.shape)
    return count * int(np.dtype(leaf.dtype).itemsize)


def _tag(path: Path, keys: tuple[Any, ...], leaf: Any) -> str:
    """The name that safetensors has for a leaf's dtype."""
    name = np.dtype(leaf.dtype).name
    if name not in _TAGS:
        raise CheckpointError(f"{path}: tensor {_name(keys)!r}: found dtype {name}, expected one that safetensors has")
    return _TAGS[name]


def _header(arrays: dict[tuple[Any, ...], tuple[str, tuple[int, ...], int]]) -> bytes:
    entries, end = {}, 0
    for keys, (tag, shape, nbytes) in arrays.items():
        name = _name(keys)
        if name in entries:
            raise CheckpointError(f"tensor {name!r}: found two paths of keys with this name, expected one")
        entries[name] = {"dtype": tag, "shape": shape, "data_offsets": (end, end + nbytes)}
        end += nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _groups(arrays: dict[tuple[Any, ...], tuple[str, tuple[int, ...], int]]) -> Iterator[list[tuple[Any, ...]]]:
    """Leaves in their order, as many as are restored at once."""
    group: list[tuple[Any, ...]] = []
    filled = 0
    for keys, (_, _, nbytes) in arrays.items():
        if group and filled + nbytes > _GROUP_BYTES:
            yield group
            group, filled = [], 0
        group.append(keys)
        filled += nbytes
    yield group
