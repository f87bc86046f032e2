"""What convert() does with an output folder that is not new, and with files that are not its own."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport

Write = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path, write_safetensors: Write) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    arrays = {"a.w": np.arange(15, dtype=np.float32).reshape(3, 5), "b": np.arange(7, dtype=np.float32)}
    write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def tree_bytes(tree: Path) -> dict[str, bytes]:
    return {str(file.relative_to(tree)): file.read_bytes() for file in sorted(tree.rglob("*")) if file.is_file()}


def test_an_empty_folder_is_as_good_as_a_new_one(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    tensorport.convert(source, tmp_path / "empty", progress=False)
    tensorport.convert(source, tmp_path / "new" / "below", progress=False)
    assert tree_bytes(tmp_path / "empty") == tree_bytes(tmp_path / "new" / "below")


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json", "load_params.py", ".hidden", "config.json"])
def test_a_foreign_folder_is_refused_and_left_alone(
    tmp_path: Path, source: Path, name: str, options: dict[str, bool]
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / name).write_text("{}")
    with pytest.raises(tensorport.ConversionError, match="output"):
        tensorport.convert(source, output, progress=False, **options)  # type: ignore[arg-type]
    assert tree_bytes(output) == {name: b"{}"}


def test_a_finished_tree_is_refused_and_left_alone(tmp_path: Path, source: Path) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(source, tree, progress=False)
    before = tree_bytes(tree)
    with pytest.raises(tensorport.ConversionError, match=r"finished tree.*overwrite"):
        tensorport.convert(source, tree, progress=False)
    with pytest.raises(tensorport.ConversionError, match="another conversion"):
        tensorport.convert(source, tree, precision="float16", resume=True, progress=False)
    assert tree_bytes(tree) == before


def test_overwrite_leaves_what_a_fresh_conversion_would(tmp_path: Path, source: Path, golden_hf: Path) -> None:
    tree, fresh = tmp_path / "tree", tmp_path / "fresh"
    tensorport.convert(golden_hf, tree, shard_size=0.0002, progress=False)
    assert len(list(tree.glob("shard_*"))) > 2
    tensorport.convert(source, tree, precision="float16", overwrite=True, progress=False)
    tensorport.convert(source, fresh, precision="float16", progress=False)
    assert tree_bytes(tree) == tree_bytes(fresh)
    assert {path.name for path in tree.iterdir()} == {path.name for path in fresh.iterdir()}


@pytest.mark.parametrize("name", ["notes.txt", "shard_000/notes.txt", "shard_000/my_own_array.npy", "shard_007/x.npy"])
def test_overwrite_spares_files_that_no_conversion_wrote(tmp_path: Path, source: Path, name: str) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(source, tree, progress=False)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_bytes(b"mine")
    tensorport.convert(source, tree, include="b", overwrite=True, progress=False)
    assert (tree / name).read_bytes() == b"mine"
    assert list(tensorport.open(tree)) == ["b"]
    assert not (tree / "shard_000" / "a_w.npy").exists()


def test_a_symbolic_link_in_a_tree_is_not_followed_out_of_it(tmp_path: Path, source: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside.npy"
    tensorport.convert(source, tree, progress=False)
    outside.write_bytes(b"mine")
    (tree / "shard_000" / "b.npy").unlink()
    (tree / "shard_000" / "b.npy").symlink_to(outside)
    tensorport.convert(source, tree, overwrite=True, progress=False)
    assert outside.read_bytes() == b"mine"
    assert not (tree / "shard_000" / "b.npy").is_symlink()


def test_overwrite_keeps_its_journal_whatever_the_old_manifest_lists(tmp_path: Path, source: Path) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(source, tree, progress=False)
    whole = tree_bytes(tree)
    manifest = json.loads((tree / "manifest.json").read_text("utf-8"))
    manifest["side_files"]["journal.jsonl"] = manifest["side_files"]["load_params.py"]
    (tree / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    tensorport.convert(source, tree, overwrite=True, progress=False)
    assert tree_bytes(tree) == whole


def test_overwrite_deletes_nothing_behind_a_link_to_a_folder(tmp_path: Path, source: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tensorport.convert(source, tree, progress=False)
    outside.mkdir()
    (outside / "thesis.npy").write_bytes(b"mine")
    (tree / "shard_001").symlink_to(outside)
    tensorport.convert(source, tree, overwrite=True, progress=False)
    assert tree_bytes(outside) == {"thesis.npy": b"mine"}


def test_the_output_may_lie_inside_the_source(source: Path) -> None:
    tensorport.convert(source, source / "converted", progress=False)
    assert tensorport.verify(source / "converted", source, progress=False).ok
    assert list(tensorport.open(source)) == ["a.w", "b"]


@pytest.mark.parametrize("kind", ["folder", "link", "file's folder", "above"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_may_not_hold_the_source(tmp_path: Path, source: Path, kind: str, overwrite: bool) -> None:
    (tmp_path / "link").symlink_to(source)
    paths: dict[str, tuple[Path, Path]] = {
        "folder": (source, source),
        "link": (source, tmp_path / "link"),
        "file's folder": (source / "model.safetensors", source),
        "above": (source, tmp_path),
    }
    before = tree_bytes(tmp_path)
    with pytest.raises(tensorport.ConversionError, match="source"):
        tensorport.convert(*paths[kind], overwrite=overwrite, progress=False)
    assert tree_bytes(tmp_path) == before


def test_a_tree_cannot_be_converted_into_itself(tmp_path: Path, source: Path) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(source, tree, progress=False)
    before = tree_bytes(tree)
    with pytest.raises(tensorport.ConversionError, match="source"):
        tensorport.convert(tree, tree, precision="float16", overwrite=True, progress=False)
    assert tree_bytes(tree) == before


def test_an_output_that_is_a_file_is_an_os_error(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError) as caught:
        tensorport.convert(source, tmp_path / "file", overwrite=True, progress=False)
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_source_creates_no_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tensorport.convert(tmp_path / "nowhere", tmp_path / "tree", progress=False)
    assert not (tmp_path / "tree").exists()


def test_only_the_selected_tensors_are_taken(tmp_path: Path, golden_hf: Path) -> None:
    every = list(tensorport.open(golden_hf))
    cases: list[tuple[Any, Any, Callable[[str], bool]]] = [
        ("*.bias", None, lambda name: name.endswith(".bias")),
        (["model.layers.0.*", "lm_head*"], None, lambda name: name.startswith(("model.layers.0.", "lm_head"))),
        (None, "*experts*", lambda name: "experts" not in name),
        (
            "model.layers.[13].*",
            ["*proj*", "*norm*"],
            lambda n: n[:15] in ("model.layers.1.", "model.layers.3.") and "proj" not in n and "norm" not in n,
        ),
    ]
    for number, (include, exclude, taken) in enumerate(cases):
        tree = tmp_path / f"{number}"
        tensorport.convert(golden_hf, tree, include=include, exclude=exclude, progress=False)
        expected = [name for name in every if taken(name)]
        assert 0 < len(expected) < len(every)
        assert list(tensorport.open(tree)) == expected


def test_selection_sees_decoded_tensors_under_their_own_name(tmp_path: Path, golden_hf: Path) -> None:
    tree = tmp_path / "tree"
    options: dict[str, Any] = {"include": "*.experts.*", "exclude": "*_bias", "progress": False}
    tensorport.convert(golden_hf, tree, mxfp4="dequantize", **options)
    names = {f"model.layers.{i}.mlp.experts.{which}_proj" for i in range(4) for which in ("gate_up", "down")}
    assert set(tensorport.open(tree)) == names
    with pytest.raises(tensorport.MappingError):
        tensorport.convert(golden_hf, tmp_path / "none", mxfp4="dequantize", include="*_blocks", progress=False)


@pytest.mark.parametrize("selection", [{"include": "x*"}, {"exclude": "*"}, {"include": []}, {"include": "B"}])
def test_a_selection_of_nothing_is_a_mapping_error(tmp_path: Path, source: Path, selection: dict[str, Any]) -> None:
    with pytest.raises(tensorport.MappingError, match="2 tensors, none of them selected"):
        tensorport.convert(source, tmp_path / "tree", progress=False, **selection)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"format": "zarr"},
        {"precision": "float8"},
        {"precision": None},
        {"mxfp4": "quantise"},
        {"on_overflow": "ignore"},
        {"shard_size": 0},
        {"shard_size": -1.8},
        {"shard_size": float("nan")},
        {"shard_size": float("inf")},
        {"shard_size": 1e-12},
        {"shard_size": 1e300},
        {"shard_size": "large"},
        {"shard_size": None},
        {"workers": 0},
        {"workers": -1},
        {"workers": 1025},
        {"workers": 2**80},
        {"workers": 1.5},
        {"workers": "2"},
        {"max_memory": 0},
        {"max_memory": 1000},
        {"max_memory": 2**80},
        {"max_memory": "1GB"},
        {"include": 3},
        {"include": [3]},
        {"include": "a["},
        {"exclude": ["fine", "{a"]},
        {"progress": 3},
        {"progress": "yes"},
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_before_anything_is_written(
    tmp_path: Path, source: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        tensorport.convert(source, tmp_path / "tree", **{"progress": False, **arguments})
    if isinstance(caught.value, ValueError):  # a TypeError may have Python's own words
        assert next(iter(arguments)) in str(caught.value)
    assert not (tmp_path / "tree").exists()


def test_numpy_is_another_name_of_the_format(tmp_path: Path, source: Path) -> None:
    tensorport.convert(source, tmp_path / "a", format="numpy", progress=False)
    tensorport.convert(source, tmp_path / "b", format="numpy-direct", progress=False)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["format"] == "numpy-direct"


def test_a_finished_tree_of_another_source_with_the_same_headers_is_not_resumed(
    tmp_path: Path, write_safetensors: Write
) -> None:
    for name, first in (("one", 1.0), ("two", 7.0)):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "m.safetensors", {"a": np.arange(first, first + 3)})
    tensorport.convert(tmp_path / "one", tmp_path / "tree", progress=False)
    before = tree_bytes(tmp_path / "tree")
    with pytest.raises(tensorport.ConversionError, match="another source"):
        tensorport.convert(tmp_path / "two", tmp_path / "tree", resume=True, progress=False)
    (tmp_path / "one" / "config.json").write_text("{}")
    with pytest.raises(tensorport.ConversionError, match="another source"):
        tensorport.convert(tmp_path / "one", tmp_path / "tree", resume=True, progress=False)
    assert tree_bytes(tmp_path / "tree") == before


@pytest.mark.parametrize("relative", ["x/link/data.txt", "../outside/data.txt", "x/data.txt"])
def test_overwrite_deletes_no_file_that_a_conversion_could_not_have_written(
    tmp_path: Path, source: Path, relative: str
) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tensorport.convert(source, tree, progress=False)
    outside.mkdir()
    (tree / "x").mkdir()
    (tree / "x" / "link").symlink_to(outside)
    victim = tree / relative
    victim.write_bytes(b"mine")
    manifest = json.loads((tree / "manifest.json").read_text())
    manifest["side_files"][relative] = manifest["side_files"]["config.json"]
    (tree / "manifest.json").write_text(json.dumps(manifest))
    tensorport.convert(source, tree, overwrite=True, progress=False)
    assert victim.read_bytes() == b"mine"


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(tmp_path: Path, source: Path) -> None:
    tree, victim = tmp_path / "tree", tmp_path / "victim"
    victim.write_bytes(b"mine")
    tree.mkdir()
    (tree / "journal.jsonl.tmp").symlink_to(victim)
    tensorport.convert(source, tree, progress=False)
    assert victim.read_bytes() == b"mine"


def test_a_source_of_links_into_the_output_is_refused(tmp_path: Path, source: Path) -> None:
    tree, links = tmp_path / "tree", tmp_path / "links"
    tensorport.convert(source, tree, progress=False)
    (links / "shard_000").mkdir(parents=True)
    for name in tree_bytes(tree):
        (links / name).symlink_to(tree / name)
    before = tree_bytes(tree)
    with pytest.raises(tensorport.ConversionError, match="source"):
        tensorport.convert(links, tree, overwrite=True, shard_size=4e-9, progress=False)
    assert tree_bytes(tree) == before


def test_a_refused_conversion_does_not_touch_a_journal(tmp_path: Path, source: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    tree.mkdir()
    for content in (b"torn", b'{"journal_version": 1}\n{"tensor"'):
        outside.write_bytes(content)
        (tree / "journal.jsonl").unlink(missing_ok=True)
        (tree / "journal.jsonl").symlink_to(outside)
        with pytest.raises(tensorport.ConversionError, match="journal"):
            tensorport.convert(source, tree, progress=False)
        assert outside.read_bytes() == content


@pytest.mark.skipif(os.name == "nt", reason="paths are Unicode there")
def test_a_path_that_is_not_utf8_is_reported_as_it_is(tmp_path: Path, source: Path) -> None:
    tree = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xff"))
    assert tensorport.convert(source, tree, progress=False).output == tree
    report = tensorport.verify(tree, source, progress=False)
    assert (report.ok, report.output) == (True, tree)
    with pytest.raises(FileNotFoundError) as fault:
        tensorport.open(tree / "missing")
    assert fault.value.filename == str(tree / "missing")


def test_an_empty_path_is_not_the_current_folder(source: Path) -> None:
    for call in (lambda: tensorport.open(""), lambda: tensorport.verify(""), lambda: tensorport.convert(source, "")):
        with pytest.raises(ValueError, match="empty path"):
            call()
