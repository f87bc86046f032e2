"""load_params on one CPU device: what is shared with the files, what is read, and how that can be told."""

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorport
from arrays import assert_same
from safetensors.numpy import load_file

Write = Callable[..., Path]


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Address ranges at which this process maps a file."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path.resolve()))]
    return [(int(a, 16), int(b, 16)) for a, b in (line.split()[0].split("-") for line in lines)]


def lies_in(array: jax.Array, path: Path) -> bool:
    pointer = array.unsafe_buffer_pointer()
    return any(start <= pointer and pointer + array.nbytes <= stop for start, stop in mapped_ranges(path))


def test_aligned_tensors_lie_in_the_mapping_of_their_file(aligned: Path) -> None:
    params, report = tensorport.load_params(aligned, nested=False, return_report=True)
    source = tensorport.open(aligned)
    assert_same(params, source)
    for name, array in params.items():
        offset = source.specs[name].offset
        assert lies_in(array, aligned) == (offset % 64 == 0), name
    in_file = [array.nbytes for array in params.values() if lies_in(array, aligned)]
    assert len(in_file) == len(params) - 1
    assert report.mapped_bytes == sum(in_file)
    # What had to be read is shared too: it was read into aligned memory.
    assert report.shared_bytes == report.nbytes == sum(array.nbytes for array in params.values())
    assert report.bytes_read == params["c.late"].nbytes
    assert report.reasons == {"misaligned": 1}


def test_every_tensor_of_a_converted_tree_lies_in_its_file(tmp_path: Path, tiny: Path) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(tiny, tree, progress=False)
    params, report = tensorport.load_params(tree, nested=False, mxfp4="raw", return_report=True)
    specs = tensorport.open(tree).specs
    assert_same(params, tensorport.open(tiny))
    for name, array in params.items():
        (file,) = specs[name].files
        assert lies_in(array, tree / file), name
    assert (report.mapped_bytes, report.bytes_read, report.reasons) == (report.nbytes, 0, {})


def test_nothing_is_read_until_it_is_touched(tmp_path: Path) -> None:
    # A process of its own, whose reads and page faults are counted.
    path = tmp_path / "large.safetensors"
    nbytes = 512 << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-(8 + len(header)) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + nbytes)
    script = """
import sys, jax, tensorport
jax.devices()
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status").read().splitlines() if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}
def read_bytes():
    return int(open("/proc/self/io").read().split("rchar:")[1].split()[0])
before, read_before = memory(), read_bytes()
params = tensorport.load_params(sys.argv[1])
after, read_after = memory(), read_bytes()
grown = [after[name] - before[name] for name in ("RssAnon", "RssFile")]
print(params["w"].nbytes, *grown, read_after - read_before)
"""
    output = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True).stdout
    loaded, anonymous, from_file, was_read = map(int, output.split())
    assert loaded == nbytes
    # What the imports of the first call take.
    assert anonymous < 32 << 20
    assert from_file < 32 << 20
    assert was_read < 8 << 20


@pytest.mark.parametrize("io", ["map", "read"])
def test_arrays_outlive_the_file_and_everything_else(misaligned: Path, aligned: Path, io: Any) -> None:
    for path in (aligned, misaligned):
        expected = {name: array.tobytes() for name, array in tensorport.open(path).items()}
        params = tensorport.load_params(path, nested=False, io=io)
        del_me = weakref.ref(params["a.w"])
        path.unlink()
        gc.collect()
        kept = {name: params[name] for name in ("b.f8", "c.late")}
        del params
        gc.collect()
        assert del_me() is None
        # Memory that was let go may be used again by now.
        junk = [np.full(1 << 16, 255, np.uint8) for _ in range(64)]
        for name, array in kept.items():
            assert np.asarray(array).tobytes() == expected[name]
        del junk


def test_donating_a_shared_array_leaves_the_file_alone(aligned: Path) -> None:
    before = aligned.read_bytes()
    params = tensorport.load_params(aligned, nested=False, include="b.one")
    out = jax.jit(lambda x: x + 1, donate_argnums=0)(params["b.one"])
    assert np.array_equal(out, tensorport.open(aligned)["b.one"] + np.float32(1))
    assert aligned.read_bytes() == before


def test_a_replaced_file_does_not_show_in_arrays(aligned: Path) -> None:
    params = tensorport.load_params(aligned, nested=False)
    expected = np.array(params["a.w"]).tobytes()
    other = aligned.with_suffix(".new")
    other.write_bytes(bytes(aligned.stat().st_size))
    other.rename(aligned)
    assert np.asarray(params["a.w"]).tobytes() == expected


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_ordinary_files_are_read_into_memory_that_jax_shares(misaligned: Path, workers: int) -> None:
    params, report = tensorport.load_params(misaligned, nested=False, workers=workers, return_report=True)
    assert_same(params, tensorport.open(misaligned))
    for name, array in params.items():
        assert array.unsafe_buffer_pointer() % 64 == 0, name
    assert report.mapped_bytes == 0
    assert report.bytes_read == report.nbytes == report.shared_bytes
    assert report.reasons == {"misaligned": len(params)}


def test_the_way_of_reading_can_be_chosen(aligned: Path, misaligned: Path) -> None:
    params, report = tensorport.load_params(aligned, nested=False, io="read", return_report=True)
    assert_same(params, tensorport.open(aligned))
    assert (report.mapped_bytes, report.bytes_read) == (0, report.nbytes)
    assert not any(lies_in(array, aligned) for array in params.values())
    params, report = tensorport.load_params(misaligned, nested=False, io="map", return_report=True)
    assert_same(params, tensorport.open(misaligned))
    # JAX copied what it could not share.
    assert report.mapped_bytes > 0
    assert report.shared_bytes < report.mapped_bytes
    with pytest.raises(ValueError, match="io: found 'mmap', expected one of 'auto', 'map', 'read'"):
        tensorport.load_params(aligned, io="mmap")  # type: ignore[call-overload]


def test_a_remote_filesystem_is_read(aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tensorport._core.Checkpoint.parts

    class Remote:
        """A checkpoint on a network: what statfs would say, all else is real."""

        def __init__(self, core: Any) -> None:
            self._core = core

        def __getattr__(self, name: str) -> Any:
            return getattr(self._core, name)

        def parts(self, name: str) -> list[tuple[int, int, int, bool]]:
            return [(file, offset, nbytes, True) for file, offset, nbytes, _ in parts(self._core, name)]

    core = tensorport._core.Checkpoint
    monkeypatch.setattr(tensorport._core, "Checkpoint", lambda path: Remote(core(path)))
    params, report = tensorport.load_params(aligned, nested=False, return_report=True)
    assert report.mapped_bytes == 0
    assert report.reasons["remote filesystem"] == len(params) - 1
    _, report = tensorport.load_params(aligned, nested=False, io="map", return_report=True)
    assert report.mapped_bytes > 0


def test_split_tensors_are_joined(tmp_path: Path, minilm: Path) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(minilm, tree, shard_size=0.01, progress=False)
    with pytest.warns(UserWarning, match=re.escape("embeddings.position_ids (int64)")):
        params, report = tensorport.load_params(tree, nested=False, return_report=True)
    theirs = load_file(minilm / "model.safetensors")
    theirs["embeddings.position_ids"] = theirs["embeddings.position_ids"].astype(np.int32)
    assert_same(params, theirs)
    assert report.reasons == {"converted": 1, "not in one piece": 1}
    assert len(report.warnings) == 1


@pytest.mark.parametrize("layout", ["golden_hf", "golden_original"])
def test_both_layouts_and_their_trees_load_alike(tmp_path: Path, layout: str, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(layout)
    tensorport.convert(source, tmp_path / "tree", progress=False)
    for mxfp4 in ("keep", "dequantize", "raw"):
        first = tensorport.load_params(source, mxfp4=mxfp4, nested=False)
        second = tensorport.load_params(tmp_path / "tree", mxfp4=mxfp4, nested=False)
        leaves = jax.tree.leaves_with_path(first)
        others = dict(jax.tree.leaves_with_path(second))
        assert len(leaves) == len(others)
        for path, leaf in leaves:
            assert leaf.dtype == others[path].dtype
            assert np.asarray(leaf).tobytes() == np.asarray(others[path]).tobytes()


def test_progress_ends_with_everything_done(misaligned: Path, aligned: Path) -> None:
    for path in (misaligned, aligned):
        events: list[tensorport.ProgressEvent] = []
        params = tensorport.load_params(path, progress=events.append, nested=False)
        nbytes = sum(array.nbytes for array in params.values())
        last = events[-1]
        assert (last.phase, last.bytes_done, last.bytes_total) == ("load", nbytes, nbytes)
        assert (last.tensors_done, last.tensors_total) == (7, 7)
        assert [event.bytes_done for event in events] == sorted(event.bytes_done for event in events)


def test_an_exception_of_the_callback_stops_the_load(misaligned: Path) -> None:
    class StopError(Exception):
        pass

    def stop(_: tensorport.ProgressEvent) -> None:
        raise StopError

    with pytest.raises(StopError):
        tensorport.load_params(misaligned, progress=stop)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers: found 0"),
        ({"mxfp4": "drop"}, ValueError, "mxfp4: found 'drop'"),
        ({"on_overflow": "ignore"}, ValueError, "on_overflow: found 'ignore'"),
        ({"progress": 3}, TypeError, "progress: found int"),
        ({"include": [3]}, TypeError, "include"),
    ],
)
def test_arguments_out_of_range_are_refused(misaligned: Path, arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        tensorport.load_params(misaligned, **arguments)


def test_faults_of_the_source_keep_their_kind(tmp_path: Path, aligned: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tensorport.load_params(tmp_path / "missing")
    aligned.write_bytes(aligned.read_bytes()[:-1])
    with pytest.raises(tensorport.CheckpointError, match=r"aligned\.safetensors"):
        tensorport.load_params(aligned)


def test_the_report_prints_and_turns_into_json(misaligned: Path) -> None:
    _, report = tensorport.load_params(misaligned, return_report=True)
    assert isinstance(report, tensorport.LoadReport)
    assert "not mapped: 7: misaligned" in repr(report)
    assert json.loads(report.to_json())["bytes_read"] == report.bytes_read
    assert report.seconds > 0
