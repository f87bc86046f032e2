"""Repositories of a hub as sources: which files come, where they land, and what is not asked for twice."""

import json
import operator
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorport
from arrays import random_array
from fake_hub import FakeHub, Fault
from huggingface_hub import constants, hf_hub_download

REPO = "org/model"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SIDE_FILES = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
UNWANTED = [
    ".gitattributes",
    "metal/model.bin",
    "model.gguf",
    "onnx/model.onnx",
    "pytorch_model.bin",
    "unlisted.safetensors",
]
ORIGINAL = ["original/config.json", "original/dtypes.json", "original/model.safetensors"]

Write = Callable[..., Path]
Files = dict[str, bytes]
Tensors = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def tensors() -> Tensors:
    """One for each shard."""
    return {
        "a.weight": random_array((7, 31), np.float32, 1),
        "b.weight": random_array((5, 43), np.float32, 2),
        "c.weight": random_array((3, 137), np.float32, 3),
    }


@pytest.fixture
def files(tmp_path: Path, write_safetensors: Write, tensors: Tensors) -> Files:
    """A repository with all that real ones have: sharded tensors, other formats, another layout in a subfolder."""

    def content(tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
        return write_safetensors(tmp_path / "written.safetensors", tensors).read_bytes()

    shards = {shard: content({name: tensors[name]}) for shard, name in zip(SHARDS, tensors, strict=True)}
    index = {"metadata": {}, "weight_map": dict(zip(tensors, SHARDS, strict=True))}
    return {
        **{name: f"{{}} {name}".encode() for name in SIDE_FILES + UNWANTED + ORIGINAL},
        **shards,
        "config.json": b"{}",
        INDEX: json.dumps(index).encode(),
        "original/model.safetensors": content({"block.0": random_array((2, 11), np.float32, 4)}),
    }


def assert_holds(checkpoint: Mapping[str, Any], tensors: Tensors) -> None:
    assert set(checkpoint) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint[name], array)


def test_an_id_brings_the_files_of_the_checkpoint_and_no_others(hub: FakeHub, files: Files, tensors: Tensors) -> None:
    commit = hub.add(REPO, files)
    checkpoint = tensorport.open(REPO)
    assert_holds(checkpoint, tensors)
    assert hub.downloads() == sorted([*SIDE_FILES, INDEX, *SHARDS])
    for name in (*UNWANTED, *ORIGINAL):
        assert not any(name in request.path for request in hub.requests), name
    assert checkpoint.path.name == commit
    assert {path.name for path in checkpoint.path.iterdir()} == {*SIDE_FILES, INDEX, *SHARDS}
    assert all((checkpoint.path / shard).is_symlink() for shard in SHARDS)


def test_nothing_is_downloaded_twice(hub: FakeHub, files: Files, tensors: Tensors, tmp_path: Path) -> None:
    hub.add(REPO, files)
    tensorport.open(REPO)
    before = len(hub.requests)
    assert_holds(tensorport.load_params(REPO, nested=False), tensors)
    tensorport.convert(REPO, tmp_path / "out", progress=False)
    assert tensorport.verify(tmp_path / "out", REPO, progress=False).ok
    assert [request.path.partition("?")[0] for request in hub.requests[before:]] == [f"/api/models/{REPO}"] * 3
    assert_holds(tensorport.open(tmp_path / "out"), tensors)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == files["tokenizer.json"]


def test_what_huggingface_hub_has_is_used_and_it_finds_what_came(hub: FakeHub, files: Files) -> None:
    commit = hub.add(REPO, files)
    first = hf_hub_download(REPO, SHARDS[1])
    folder = tensorport.open(REPO).path
    assert folder == Path(first).parent
    assert hub.downloads().count(SHARDS[1]) == 1
    before = len(hub.sent)
    assert hf_hub_download(REPO, "config.json", revision="main") == str(folder / "config.json")
    assert hf_hub_download(REPO, SHARDS[0], revision=commit) == str(folder / SHARDS[0])
    assert len(hub.sent) == before


def test_a_subfolder_is_a_checkpoint_of_its_own(hub: FakeHub, files: Files) -> None:
    hub.add(REPO, files)
    checkpoint = tensorport.open(f"{REPO}/original")
    assert list(checkpoint) == ["block.0"]
    assert hub.downloads() == ORIGINAL
    assert checkpoint.path.name == "original"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, files: Files) -> None:
    old = hub.add(REPO, {**files, "config.json": b'{"is": "old"}'}, branch="v1")
    new = hub.add(REPO, files)
    pull = hub.add(REPO, {**files, "config.json": b'{"is": "pull"}'}, branch="refs/pr/2")
    for source, commit in (
        (f"{REPO}@v1", old),
        (REPO, new),
        (f"{REPO}@{old}", old),
        (f"{REPO}@refs/pr/2", pull),
        (f"hf://{REPO}@main", new),
    ):
        assert tensorport.open(source).path.name == commit
    # Content that commits share is there once.
    assert hub.downloads().count(SHARDS[0]) == 1


def test_a_branch_that_moved_is_followed(hub: FakeHub, files: Files) -> None:
    hub.add(REPO, files)
    tensorport.open(REPO)
    moved = hub.add(REPO, {**files, "config.json": b'{"is": "new"}'})
    checkpoint = tensorport.open(REPO)
    assert checkpoint.path.name == moved
    assert (checkpoint.path / "config.json").read_bytes() == b'{"is": "new"}'


def test_files_without_an_index_come_all_but_those_in_folders(hub: FakeHub, files: Files, tensors: Tensors) -> None:
    del files[INDEX], files["unlisted.safetensors"]
    hub.add(REPO, files)
    assert_holds(tensorport.open(REPO), tensors)
    assert hub.downloads() == sorted([*SIDE_FILES, *SHARDS])


def test_a_converted_tree_in_a_repository_is_a_source(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    tensorport.convert(tiny, tmp_path / "tree", progress=False)
    tree = {
        path.relative_to(tmp_path / "tree").as_posix(): path.read_bytes()
        for path in (tmp_path / "tree").rglob("*")
        if path.is_file()
    }
    hub.add(REPO, {**tree, "shard_000/other.npy": b"x"})
    checkpoint, expected = tensorport.open(REPO), tensorport.open(tiny)
    assert set(checkpoint) == set(expected)
    for name in expected:
        assert checkpoint[name].tobytes() == expected[name].tobytes()
    assert "shard_000/other.npy" not in hub.downloads()


def test_a_model_of_a_repository_is_that_of_its_folder(hub: FakeHub, golden_hf: Path) -> None:
    hub.add(REPO, {path.name: path.read_bytes() for path in golden_hf.iterdir() if path.is_file()})
    ids = np.array([[3, 1, 2]])
    model = tensorport.load_model(REPO, dtype="float32")
    np.testing.assert_array_equal(model(ids), tensorport.load_model(golden_hf, dtype="float32")(ids))
    assert tensorport.models.gpt_oss.load_config(REPO) == model.config


def test_shapes_and_configurations_of_a_repository_take_its_headers_alone(hub: FakeHub, tiny: Path) -> None:
    hub.add(REPO, {path.name: path.read_bytes() for path in tiny.iterdir()})
    shapes = tensorport.load_params_shapes(REPO, mxfp4="dequantize")
    assert jax.tree.all(jax.tree.map(operator.eq, shapes, tensorport.load_params_shapes(tiny, mxfp4="dequantize")))
    assert tensorport.models.gpt_oss.load_config(REPO) == tensorport.models.gpt_oss.load_config(tiny)
    assert hub.downloads() == sorted(path.name for path in tiny.iterdir() if path.suffix != ".safetensors")
    # That no tensor is here is not forgotten.
    checkpoint, expected = tensorport.open(REPO), tensorport.open(tiny)
    assert all(checkpoint[name].tobytes() == expected[name].tobytes() for name in expected)


def test_progress_counts_the_bytes_and_the_files_of_the_download(hub: FakeHub, files: Files) -> None:
    hub.add(REPO, files)
    hub.faults[SHARDS[1]] = [Fault(pause_s=0.2)]
    events: list[tensorport.ProgressEvent] = []
    tensorport.load_params(REPO, progress=events.append)
    downloads = [event for event in events if event.phase == "download"]
    assert [event.phase for event in events].index("load") >= len(downloads)
    # The index came before: it says which files there are.
    total = sum(len(files[name]) for name in (*SIDE_FILES, *SHARDS))
    assert {event.bytes_total for event in downloads} == {total}
    assert {event.tensors_total for event in downloads} == {len(SIDE_FILES) + len(SHARDS)}
    done = [event.bytes_done for event in downloads]
    assert done == sorted(done)
    assert done[-1] == total
    assert downloads[-1].tensors_done == len(SIDE_FILES) + len(SHARDS)
    assert downloads[-1].tensor in files
    events.clear()
    tensorport.load_params(REPO, progress=events.append)
    assert "download" not in {event.phase for event in events}


def test_a_bar_shows_the_download_and_false_shows_nothing(
    hub: FakeHub, files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add(REPO, files)
    tensorport.open(f"{REPO}@{commit}/original")
    assert capfd.readouterr() == ("", "")
    tensorport.open(REPO, progress=True)
    assert "download" in capfd.readouterr().err


def test_a_callback_that_raises_stops_the_download(hub: FakeHub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)  # the thread that stays behind ends sooner
    hub.add(REPO, files)
    hub.faults[SHARDS[2]] = [Fault(sent=100, end="stall")]

    class EnoughError(Exception):
        pass

    def stop(event: tensorport.ProgressEvent) -> None:
        if event.tensors_done == event.tensors_total - 1:
            raise EnoughError

    with pytest.raises(EnoughError):
        tensorport.open(REPO, progress=stop)


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    hub: FakeHub, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files)
    hub.private[REPO] = hub.gates[REPO] = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tensorport.open(REPO)
    assert {request.token for request in hub.requests if not request.is_cdn} == {"hf_secret"}
    assert {request.token for request in hub.requests if request.is_cdn} == {None}


def test_xet_is_not_needed(hub: FakeHub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, files)
    monkeypatch.setitem(sys.modules, "hf_xet", None)
    assert len(tensorport.open(REPO)) == 3


def test_what_no_checkpoint_is_says_what_there_is(hub: FakeHub, files: Files) -> None:
    hub.add(REPO, {"pytorch_model.bin": b"x", "config.json": b"{}"})
    with pytest.raises(
        tensorport.CheckpointError, match=r"org/model: found no \*\.safetensors among pytorch_model\.bin"
    ):
        tensorport.open(REPO)
    hub.add(REPO, files)
    with pytest.raises(
        tensorport.CheckpointError, match="org/model/nothing: found the folders metal, onnx, original in org/model"
    ):
        tensorport.open(f"{REPO}/nothing")
    del files[SHARDS[1]]
    hub.add(REPO, files)
    with pytest.raises(
        tensorport.CheckpointError, match=f"found no {SHARDS[1]}, expected the 3 files that {INDEX} names"
    ):
        tensorport.open(REPO)
    hub.add(REPO, {INDEX: b"[]", **files, "model.safetensors.index.json": b"[]"})
    with pytest.raises(tensorport.CheckpointError, match=f"org/model/{INDEX}: found list, expected a JSON object"):
        tensorport.open(REPO)
    assert not any(name.endswith(".safetensors") for name in hub.downloads())


def test_an_index_that_names_a_path_brings_no_file_of_it(hub: FakeHub, files: Files) -> None:
    for path in ("original/model.safetensors", "../model.safetensors", "/etc/passwd"):
        hub.add(REPO, {**files, INDEX: json.dumps({"weight_map": {"a": path}}).encode()})
        with pytest.raises(tensorport.CheckpointError, match=f"found no {path}, expected the 1 files"):
            tensorport.open(REPO)
    assert set(hub.downloads()) == {INDEX}


def test_a_listing_that_leads_out_of_the_cache_is_left_out(hub: FakeHub, tmp_path: Path) -> None:
    evil = ["../../../evil.npy", "shard_000/../../../../evil.npy", "/evil.npy", "shard_000\\..\\evil.npy"]
    for path in evil:
        manifest = {"tensorport_version": "", "format_version": 1, "tensors": {"a": {"files": [path]}}}
        hub.add(REPO, {"manifest.json": json.dumps(manifest).encode(), path: b"x"})
        with pytest.raises(
            tensorport.CheckpointError, match=r"found no .*evil\.npy, expected the 1 files that manifest"
        ):
            tensorport.open(REPO)
    assert not list(tmp_path.rglob("*evil.npy"))
    assert hub.downloads() == ["manifest.json"] * len(evil)


def test_a_warning_comes_with_a_copy_from_the_cache_only(hub: FakeHub, files: Files, tensors: Tensors) -> None:
    hub.add(REPO, files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensorport.open(REPO)
    hub.faults["api"] = [Fault(status=503)]
    with pytest.warns(UserWarning, match=r"org/model: http://127\.0\.0\.1:\d+ does not answer as it should \(.*503"):
        checkpoint = tensorport.open(REPO)
    assert_holds(checkpoint, tensors)
