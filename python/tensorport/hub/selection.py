"""Which files of a folder make a checkpoint, by the rules that `tensorport.open` has for directories."""

import dataclasses
import json
import re
from collections.abc import Callable, Collection
from typing import Any, Final

from tensorport.errors import CheckpointError

__all__ = ["Selection", "select"]

_MANIFEST: Final = "manifest.json"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_USUAL_INDEX: Final = "model.safetensors.index.json"

# What `convert` copies: src/side_files.rs has the same lists.
_COPIED_SUFFIXES: Final = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_COPIED_PREFIXES: Final = ("LICENSE", "NOTICE", "USAGE_POLICY")

# Files that are numbered through: how many there are.
_NUMBERED: Final = re.compile(r"-of-(\d+)\.safetensors$")


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """The files of a checkpoint.

    Attributes:
        side_files: what stands beside the tensors: configuration, tokenizer, chat template, licence, index, manifest.
        tensor_files: what holds the tensors, in the order of its names, which is that of conversion.
    """

    side_files: list[str]
    tensor_files: list[str]


def select(where: str, names: Collection[str], read: Callable[[str], bytes]) -> Selection:
    """The files that a checkpoint needs.

    Args:
        where: the folder, for messages.
        names: its files, those in folders below it too, with `/`.
        read: brings the content of a file by its name.

    Raises:
        CheckpointError: there is no checkpoint, or an index or a manifest names files that are not there.
    """
    top = sorted(name for name in names if "/" not in name)
    side_files = [name for name in top if _is_side_file(name)]
    listing = _tree(top, where, read) or _index(top, where, read)
    if listing is None:
        tensor_files = [name for name in top if name.endswith(".safetensors")]
    else:
        file, tensor_files = listing
        # An index names bare files, a manifest those in its shards, too.
        known = names if file == _MANIFEST else top
        missing = [name for name in tensor_files if name not in known]
        if missing:
            shown = f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
            raise CheckpointError(
                f"{where}: found no {shown}, expected the {len(tensor_files)} files that {file} names"
            )
    if not tensor_files:
        others = [name for name in top if name not in side_files] or top or sorted(names)
        shown = f"{', '.join(others[:5]) or 'no files'}{', ...' * (len(others) > 5)}"
        raise CheckpointError(
            f"{where}: found no *.safetensors among {shown}, "
            "expected safetensors files, an index of them, or a converted tree with its manifest.json"
        )
    if listing is None:
        _check_numbers(where, tensor_files)
    return Selection(side_files, tensor_files)


def _is_side_file(name: str) -> bool:
    return not name.startswith(".") and (
        name.endswith(_COPIED_SUFFIXES) or ("." not in name and name.startswith(_COPIED_PREFIXES))
    )


def _tree(top: Collection[str], where: str, read: Callable[[str], bytes]) -> tuple[str, list[str]] | None:
    """The files of a tree that `convert` wrote, if there is one: src/manifest.rs has the marks of its manifest."""
    if _MANIFEST not in top:
        return None
    manifest = _object(where, _MANIFEST, read)
    if "tensorport_version" not in manifest or "format_version" not in manifest:
        return None
    tensors = manifest.get("tensors")
    infos = list(tensors.values()) if isinstance(tensors, dict) else [None]
    lists = [info.get("files") if isinstance(info, dict) else None for info in infos]
    return _MANIFEST, _files(where, _MANIFEST, [file for files in lists for file in (files or [None])])


def _index(top: Collection[str], where: str, read: Callable[[str], bytes]) -> tuple[str, list[str]] | None:
    indexes = [name for name in top if name.endswith(_INDEX_SUFFIX)]
    if not indexes:
        return None
    if len(indexes) > 1 and _USUAL_INDEX not in indexes:
        raise CheckpointError(f"{where}: found indexes {', '.join(indexes)}, expected one, or one that is named model")
    index = _USUAL_INDEX if len(indexes) > 1 else indexes[0]
    weight_map = _object(where, index, read).get("weight_map")
    return index, _files(where, index, list(weight_map.values()) if isinstance(weight_map, dict) else [None])


def _object(where: str, name: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        content = json.loads(read(name))
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{where}/{name}: found no JSON, expected an object: {fault}") from fault
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}/{name}: found {type(content).__name__}, expected a JSON object")
    return content


def _files(where: str, name: str, files: list[Any]) -> list[str]:
    if not all(isinstance(file, str) for file in files):
        raise CheckpointError(f"{where}/{name}: found something else, expected the names of files of each tensor")
    return sorted(set(files))


def _check_numbers(where: str, files: list[str]) -> None:
    """Refuses some of the files that are numbered through: without an index nothing else tells."""
    for count in {match[1] for file in files if (match := _NUMBERED.search(file))}:
        found = sum(file.endswith(f"-of-{count}.safetensors") for file in files)
        if found < int(count):
            raise CheckpointError(f"{where}: found {found} files *-of-{count}.safetensors, expected all of them")
