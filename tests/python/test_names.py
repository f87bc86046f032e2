"""File names for tensor names, which may be hostile: distinct, plain, and inside the output folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorport
from hypothesis import given, settings
from hypothesis import strategies as st

Write = Callable[..., Path]

HOSTILE = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:x",
    "line\nbreak",
    "nul\0byte",
    "it's",
    'a "quoted" name',
    "\x1b[31mred",
    "é",
    "重み",
    "\N{PILE OF POO}",
    "e\u0301",
    " ",
    "trailing ",
    "%2E",
    "~root",
    "$HOME",
    "-rf",
    "*?[a]",
    "x" * 300,
    "x" * 299 + "y",
    "é" * 150,
    "con",
    "NUL",
    "Aux",
    "prn",
    "com1",
    "LPT9",
    "a.b",
    "a_b",
    "A.B",
    "manifest",
    "w.part000",
    "__proto__",
]


def escaped(name: str) -> str:
    """The rule of the format, written again."""
    text = name.encode().decode("latin-1").replace(".", "_")
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f"%{ord(found[0]):02X}", text)


def write_names(path: Path, names: list[str], write: Write) -> Path:
    return write(path, {name: np.arange(index + 2, dtype=np.int32) for index, name in enumerate(names)})


def files_of(tree: Path) -> dict[str, str]:
    tensors = json.loads((tree / "manifest.json").read_text("utf-8"))["tensors"]
    assert all(len(info["files"]) == 1 for info in tensors.values())
    return {name: info["files"][0] for name, info in tensors.items()}


def test_hostile_names_stay_inside_and_keep_their_values(tmp_path: Path, write_safetensors: Write) -> None:
    source = write_names(tmp_path / "m.safetensors", HOSTILE, write_safetensors)
    tree = tmp_path / "deep" / "below" / "tree"
    before = {path for path in tmp_path.rglob("*") if tree not in path.parents}
    report = tensorport.convert(source, tree, progress=False)
    created = {path for path in tmp_path.rglob("*") if tree not in path.parents} - before
    assert created == {tmp_path / "deep", tmp_path / "deep" / "below", tree}
    assert report.total_tensors == len(HOSTILE)
    files = files_of(tree)
    assert list(files) == HOSTILE
    assert {f"shard_000/{path.name}" for path in (tree / "shard_000").iterdir()} == set(files.values())
    assert len({file.lower() for file in files.values()}) == len(HOSTILE)
    assert all(re.fullmatch(r"shard_000/[A-Za-z0-9_%-]{1,200}\.npy", file) for file in files.values())
    checkpoint = tensorport.open(tree)
    for index, name in enumerate(HOSTILE):
        np.testing.assert_array_equal(np.load(tree / files[name]), np.arange(index + 2))
        np.testing.assert_array_equal(checkpoint[name], np.arange(index + 2))
    assert tensorport.verify(tree, source, progress=False).ok


def test_only_names_that_meet_or_are_reserved_or_too_long_get_a_suffix(
    tmp_path: Path, write_safetensors: Write
) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(write_names(tmp_path / "m.safetensors", HOSTILE, write_safetensors), tree, progress=False)
    stems = {name: Path(file).stem for name, file in files_of(tree).items()}
    # "." and ".." become "_" and "__", which are names like others.
    suffixed = {
        "",
        "x" * 300,
        "x" * 299 + "y",
        "é" * 150,
        "a.b",
        "a_b",
        "A.B",
        "con",
        "NUL",
        "Aux",
        "prn",
        "com1",
        "LPT9",
    }
    for name, stem in stems.items():
        if name in suffixed:
            kept, _, suffix = stem.rpartition("-")
            assert escaped(name).startswith(kept)
            assert len(kept) == min(len(escaped(name)), 180)
            assert re.fullmatch("[0-9a-f]{16}", suffix)
        else:
            assert stem == escaped(name)


def test_file_names_do_not_depend_on_the_order_of_the_tensors(tmp_path: Path, write_safetensors: Write) -> None:
    forward = write_names(tmp_path / "a.safetensors", HOSTILE, write_safetensors)
    backward = write_names(tmp_path / "b.safetensors", HOSTILE[::-1], write_safetensors)
    tensorport.convert(forward, tmp_path / "a", progress=False)
    tensorport.convert(backward, tmp_path / "b", progress=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_name_that_looks_like_a_part_does_not_meet_the_part(tmp_path: Path, write_safetensors: Write) -> None:
    arrays = {"w": np.arange(60, dtype=np.int32).reshape(6, 10), "w_part000": np.arange(3), "w.part000": np.arange(2)}
    tree = tmp_path / "tree"
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    report = tensorport.convert(source, tree, shard_size=100e-9, progress=False)
    assert report.total_files == 5
    checkpoint = tensorport.open(tree)
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint[name], array)


def test_many_shards_have_folders_of_their_own(tmp_path: Path, write_safetensors: Write) -> None:
    arrays = {f"t.{number}": np.full(3, number, np.int64) for number in range(1005)}
    tree = tmp_path / "tree"
    tensorport.convert(
        write_safetensors(tmp_path / "m.safetensors", arrays), tree, shard_size=24e-9, verify=False, progress=False
    )
    files = files_of(tree)
    assert files["t.7"] == "shard_007/t_7.npy"
    assert files["t.1004"] == "shard_1004/t_1004.npy"
    np.testing.assert_array_equal(tensorport.open(tree)["t.1004"], arrays["t.1004"])


any_name = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("aA._/-%", max_size=4)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(any_name.filter(lambda name: name != "__metadata__"), min_size=1, max_size=12, unique=True))
def test_any_set_of_names_gets_distinct_files(
    names: list[str], tmp_path_factory: pytest.TempPathFactory, write_safetensors: Write
) -> None:
    folder = tmp_path_factory.mktemp("names")
    tree = folder / "tree"
    tensorport.convert(write_names(folder / "m.safetensors", names, write_safetensors), tree, progress=False)
    files = files_of(tree)
    assert list(files) == names
    assert len({file.lower() for file in files.values()}) == len(names)
    assert {f"shard_000/{path.name}" for path in (tree / "shard_000").iterdir()} == set(files.values())
    for index, name in enumerate(names):
        assert np.load(tree / files[name]).shape == (index + 2,)
