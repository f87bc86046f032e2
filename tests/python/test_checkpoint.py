"""open(): what a checkpoint's mapping gives, and what it is opened from."""

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray
from safetensors.numpy import load_file

Write = Callable[..., Path]
Dtypes = dict[str, tuple[np.dtype[Any], int]]

SUB_BYTE = {"F4", "F6_E2M3", "F6_E3M2"}


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def bits(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def test_every_safetensors_dtype_opens_as_its_numpy_dtype(
    tmp_path: Path, write_safetensors: Write, safetensors_dtypes: Dtypes
) -> None:
    # Booleans are 0 or 1; every other dtype gives each bit pattern a meaning.
    content = {
        tag: bytes(b & 1 for b in random_bytes(24)) if tag == "BOOL" else random_bytes(24 * width // 8, seed=width)
        for tag, (_, width) in safetensors_dtypes.items()
    }
    path = write_safetensors(tmp_path / "m.safetensors", {tag: (tag, (2, 3, 4), content[tag]) for tag in content})
    checkpoint = tensorport.open(path)
    assert len(checkpoint) == 22
    for tag, (dtype, width) in safetensors_dtypes.items():
        spec = checkpoint.specs[tag]
        assert (spec.dtype, spec.shape, spec.nbytes) == (dtype, (2, 3, 4), 24 * width // 8)
        array = checkpoint[tag]
        if tag in SUB_BYTE:
            assert (array.dtype, array.shape) == (np.dtype(np.uint8), (24 * width // 8,))
        else:
            assert (array.dtype, array.shape) == (dtype, (2, 3, 4))
        assert bits(array) == content[tag]


def test_values_are_those_that_the_safetensors_library_reads(
    tmp_path: Path, write_safetensors: Write, safetensors_dtypes: Dtypes
) -> None:
    rng = np.random.default_rng(1)
    plain = {tag: dtype for tag, (dtype, _) in safetensors_dtypes.items() if dtype.isbuiltin == 1}
    arrays = {tag: rng.integers(0, 2, (3, 5)).astype(dtype) * dtype.type(1) for tag, dtype in plain.items()}
    path = write_safetensors(tmp_path / "m.safetensors", arrays)
    theirs, ours = load_file(path), tensorport.open(path)
    assert set(theirs) == set(ours) == set(plain)
    assert len(plain) == 13
    for tag, array in theirs.items():
        assert ours[tag].dtype == array.dtype
        np.testing.assert_array_equal(ours[tag], array)


@pytest.mark.parametrize("misalign", [0, 1, 3, 4])
def test_scalars_empty_and_misaligned_tensors_keep_their_values(
    tmp_path: Path, write_safetensors: Write, misalign: int
) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "flag": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((3, 0, 5), np.float32),
        "words": np.arange(14, dtype=np.int32).reshape(2, 7),
        "last_empty": np.zeros((0,), np.int64),
    }
    checkpoint = tensorport.open(write_safetensors(tmp_path / "m.safetensors", arrays, misalign=misalign))
    for name, array in arrays.items():
        found = checkpoint[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
        assert not found.flags.writeable
        assert found.flags.aligned


def test_arrays_are_read_only_views_of_one_mapping(tiny: Path) -> None:
    checkpoint = tensorport.open(tiny)
    name = "model.embed_tokens.weight"
    first, second = checkpoint[name], checkpoint[name]
    assert np.shares_memory(first, second)
    assert first.ctypes.data == second.ctypes.data
    assert not first.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        first.flags.writeable = True
    other = checkpoint["model.norm.weight"]
    distance = checkpoint.specs["model.norm.weight"].offset - checkpoint.specs[name].offset
    assert other.ctypes.data - first.ctypes.data == distance


def test_views_outlive_the_checkpoint_and_the_file(tmp_path: Path, write_safetensors: Write) -> None:
    expected = np.arange(40_000, dtype=np.int32)
    path = write_safetensors(tmp_path / "m.safetensors", {"a": expected})
    checkpoint = tensorport.open(path)
    view = checkpoint["a"][10_000:]
    del checkpoint
    gc.collect()
    np.testing.assert_array_equal(view, expected[10_000:])
    replacement = write_safetensors(tmp_path / "other", {"a": expected * 2})
    replacement.replace(path)
    np.testing.assert_array_equal(view, expected[10_000:])
    path.unlink()
    np.testing.assert_array_equal(view, expected[10_000:])


def test_a_file_that_was_replaced_since_it_was_opened_is_not_read_as_if_it_were_the_old_one(
    tmp_path: Path, write_safetensors: Write
) -> None:
    arrays = {"a": np.arange(5, dtype=np.int32), "b": np.arange(5, 12, dtype=np.int32)}
    path = write_safetensors(tmp_path / "m.safetensors", arrays)
    checkpoint = tensorport.open(path)
    swapped = write_safetensors(tmp_path / "other", dict(reversed(arrays.items())))
    assert swapped.stat().st_size == path.stat().st_size
    os.utime(swapped, (1, 1))
    swapped.replace(path)
    with pytest.raises(tensorport.CheckpointError, match=r"m\.safetensors"):
        checkpoint["a"]


def test_a_relative_path_is_the_one_it_was_when_it_was_opened(
    tmp_path: Path, write_safetensors: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": np.arange(5)})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    checkpoint = tensorport.open("m.safetensors")
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(checkpoint["a"], np.arange(5))


def test_a_directory_without_index_is_all_its_top_level_files(tmp_path: Path, write_safetensors: Write) -> None:
    for number in range(130):
        write_safetensors(tmp_path / f"part{number}.safetensors", {f"t.{number}": np.full(number + 1, number)})
    (tmp_path / "below").mkdir()
    write_safetensors(tmp_path / "below" / "x.safetensors", {"hidden": np.zeros(3)})
    (tmp_path / "notes.txt").write_text("no checkpoint")
    checkpoint = tensorport.open(tmp_path)
    assert set(checkpoint) == {f"t.{number}" for number in range(130)}
    for number in range(130):
        np.testing.assert_array_equal(checkpoint[f"t.{number}"], np.full(number + 1, number))
        assert checkpoint.specs[f"t.{number}"].files == (f"part{number}.safetensors",)


def test_a_directory_with_an_index_is_the_files_that_it_names(tmp_path: Path, write_safetensors: Write) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": np.arange(3)})
    write_safetensors(tmp_path / "b.safetensors", {"b": np.arange(4)})
    write_safetensors(tmp_path / "consolidated.safetensors", {"a": np.arange(5), "c": np.arange(6)})
    index = '{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    checkpoint = tensorport.open(tmp_path)
    assert list(checkpoint) == ["a", "b"]
    np.testing.assert_array_equal(checkpoint["a"], np.arange(3))


def test_symbolic_links_are_followed(tmp_path: Path, golden_hf: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in golden_hf.iterdir():
        blob = tmp_path / "blobs" / f"{abs(hash(file.name))}"
        blob.write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / blob.name)
    (tmp_path / "link").symlink_to("snapshot")
    linked, direct = tensorport.open(tmp_path / "link"), tensorport.open(golden_hf)
    assert dict(linked.specs) == dict(direct.specs)
    assert all(bits(linked[name]) == bits(direct[name]) for name in direct)


@pytest.mark.parametrize("manifest", ['{"name": "an extension", "version": 3}', "[1, 2]", "3", "not JSON", ""])
def test_the_manifest_of_another_tool_is_ignored_beside_safetensors(
    tmp_path: Path, write_safetensors: Write, manifest: str
) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": np.arange(3)})
    (tmp_path / "manifest.json").write_text(manifest)
    assert list(tensorport.open(tmp_path)) == ["a"]


def test_specs_metadata_and_counts_tell_what_is_there(tmp_path: Path, write_safetensors: Write) -> None:
    tensors = {
        "m.w_blocks": np.zeros((3, 2, 16), np.uint8),
        "m.w_scales": np.zeros((3, 2), np.uint8),
        "m.b": np.zeros(7, np.float16),
        "m.lone_scales": np.zeros(5, np.uint8),
    }
    path = write_safetensors(tmp_path / "m.safetensors", tensors, metadata={"format": "pt", "é": "ü\n"})
    checkpoint = tensorport.open(path)
    assert checkpoint.path == path
    assert checkpoint.metadata == {"format": "pt", "é": "ü\n"}
    assert checkpoint.total_parameters == 3 * 2 * 32 + 7 + 5
    assert checkpoint.stored_elements == 3 * 2 * 32 + 3 * 2 + 7 + 5
    assert checkpoint.nbytes == 96 + 6 + 14 + 5
    header_bytes = path.stat().st_size - checkpoint.nbytes
    assert [spec.offset - header_bytes for spec in checkpoint.specs.values()] == [0, 96, 102, 116]
    assert checkpoint.specs["m.b"] == tensorport.TensorSpec(
        "m.b", np.dtype(np.float16), (7,), 14, ("m.safetensors",), header_bytes + 102
    )
    for part in (str(path), "4 tensors", "204 parameters", "121 B"):
        assert part in repr(checkpoint)
    with pytest.raises(TypeError):
        checkpoint.specs["x"] = checkpoint.specs["m.b"]  # type: ignore[index]


def test_where_files_disagree_the_first_ones_metadata_counts(tmp_path: Path, write_safetensors: Write) -> None:
    write_safetensors(tmp_path / "b.safetensors", {"b": np.zeros(3)}, metadata={"who": "b", "b": "1"})
    write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(2)}, metadata={"who": "a"})
    assert tensorport.open(tmp_path).metadata == {"who": "a", "b": "1"}


def test_an_unknown_name_is_a_key_error(tiny: Path) -> None:
    checkpoint = tensorport.open(tiny)
    with pytest.raises(KeyError, match="no such tensor"):
        checkpoint["no such tensor"]
    assert "no such tensor" not in checkpoint
    assert checkpoint.get("no such tensor") is None
    assert 3 not in checkpoint  # type: ignore[comparison-overlap]
    assert "lm_head.weight" in checkpoint


def test_a_missing_path_is_file_not_found_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        tensorport.open(tmp_path / "nowhere")
    assert caught.value.filename == str(tmp_path / "nowhere")


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tensorport.CheckpointError, match="directory without"):
        tensorport.open(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["m.safetensors", "model.safetensors.index.json", "manifest.json"])
def test_a_named_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    program = (
        "import sys, tensorport\ntry: tensorport.open(sys.argv[1])\nexcept tensorport.CheckpointError as e: print(e)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert "special file" in result.stdout
    assert name in result.stdout


def test_importing_loads_neither_jax_nor_any_extra() -> None:
    program = "import sys, tensorport, tensorport.cli; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    modules = {line.partition(".")[0] for line in result.stdout.splitlines()}
    assert "tensorport" in modules
    extras = {"jax", "jaxlib", "flax", "huggingface_hub", "tokenizers", "jinja2", "orbax", "torch", "safetensors"}
    assert not modules & (extras | {"IPython", "ipywidgets", "modal"})


@pytest.mark.parametrize("shard_size", [1.8, 20e-6])
def test_a_converted_tree_opens_like_its_source(
    tmp_path: Path, write_safetensors: Write, safetensors_dtypes: Dtypes, golden_hf: Path, shard_size: float
) -> None:
    mixed = write_safetensors(
        tmp_path / "mixed.safetensors",
        {
            f"every.{tag}": (tag, (40, 8, 11), bytes(3520 * width // 8))
            if tag == "BOOL"
            else (tag, (40, 8, 11), random_bytes(3520 * width // 8, seed=width))
            for tag, (_, width) in safetensors_dtypes.items()
        }
        | {"scalar": np.array(7, np.int64), "empty": np.zeros((0, 3), np.float32)},
        metadata={"format": "pt", "of": "mixed"},
        misalign=1,
    )
    for source in (mixed, golden_hf):
        tree = tmp_path / f"{source.name}.tree"
        tensorport.convert(source, tree, shard_size=shard_size, progress=False)
        ours, theirs = tensorport.open(tree), tensorport.open(source)
        assert list(ours) == list(theirs)
        assert ours.metadata == theirs.metadata
        assert ours.total_parameters == theirs.total_parameters
        assert ours.stored_elements == theirs.stored_elements
        for name in theirs:
            for field in ("dtype", "shape", "nbytes"):
                assert getattr(ours.specs[name], field) == getattr(theirs.specs[name], field)
            assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
            assert bits(ours[name]) == bits(theirs[name])
            assert not ours[name].flags.writeable
        splits = sum(len(spec.files) > 1 for spec in ours.specs.values())
        assert (splits > 0) == (shard_size < 1)


def test_a_checkpoint_is_equal_to_itself_alone_and_can_be_pickled(golden_hf: Path) -> None:
    checkpoint = tensorport.open(golden_hf)
    assert checkpoint == checkpoint  # noqa: PLR0124 - comparing as mappings do would compare arrays
    assert checkpoint != tensorport.open(golden_hf)
    assert {checkpoint: 1}[checkpoint] == 1
    again = pickle.loads(pickle.dumps(checkpoint))
    assert (again.path, list(again)) == (checkpoint.path, list(checkpoint))
