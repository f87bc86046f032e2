"""Hostile bytes: every fault is a CheckpointError that says what is wrong, and costs little to find."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

MALFORMED = Path(__file__).parents[1] / "data" / "malformed"
EXPECTED = MALFORMED / "expected.json"

VALID_HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [34, 34]},
    "flag": {"dtype": "BOOL", "shape": [], "data_offsets": [34, 35]},
}
DATA = bytes(range(34)) + b"\x01"


def file_bytes(header: object, data: bytes = DATA) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


VALID = file_bytes(VALID_HEADER)


def malformed_cases() -> list[Any]:
    if not EXPECTED.is_file():
        return [pytest.param("", [], marks=pytest.mark.skip(reason="tests/data/malformed is not there"))]
    return [pytest.param(path, words, id=path) for path, words in json.loads(EXPECTED.read_text("utf-8")).items()]


@pytest.mark.parametrize(("relative", "words"), malformed_cases())
def test_malformed_files_are_refused_with_words_that_help(relative: str, words: list[str]) -> None:
    with pytest.raises(tensorport.CheckpointError) as caught:
        tensorport.open(MALFORMED / relative)
    for word in words:
        assert word in str(caught.value)


def open_bytes(content: bytes) -> dict[str, tuple[tuple[int, ...], bytes]] | str:
    """Shapes and data that tensorport reads of a file, or the message where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        path.write_bytes(content)
        try:
            checkpoint = tensorport.open(path)
        except tensorport.CheckpointError as fault:
            message = str(fault)
        else:
            return {name: (checkpoint.specs[name].shape, checkpoint[name].tobytes()) for name in checkpoint}
    assert message.startswith(str(path))
    assert len(message) < 2000
    return message


def library_reads(content: bytes) -> dict[str, tuple[tuple[int, ...], bytes]] | str:
    """The same of the safetensors library."""
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]
        return {name: (tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}
    except SafetensorError as fault:
        return str(fault)


def check_against_library(content: bytes, stricter: str) -> None:
    """Both read the same or both refuse, except where `stricter`, a regular expression, says why we alone do."""
    ours, theirs = open_bytes(content), library_reads(content)
    if isinstance(ours, dict):
        assert ours == theirs
    elif isinstance(theirs, dict):
        assert re.search(stricter, ours), (ours, content)


def test_the_valid_file_opens() -> None:
    expected = {"a.weight": ((3, 2), DATA[:24]), "b": ((5,), DATA[24:34]), "empty": ((0, 7), b""), "flag": ((), b"\1")}
    assert open_bytes(VALID) == library_reads(VALID) == expected


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_file_with_changed_bytes_opens_as_the_library_opens_it_or_is_refused(data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        position = data.draw(st.integers(0, len(content) - 1), label="position")
        match data.draw(st.sampled_from(["set", "flip", "delete", "insert"]), label="kind"):
            case "set":
                content[position] = data.draw(st.integers(0, 255))
            case "flip":
                content[position] ^= 1 << data.draw(st.integers(0, 7))
            case "delete":
                del content[position : position + data.draw(st.integers(1, 9))]
            case _:
                content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
        if not content:
            break
    check_against_library(bytes(content), "unknown field|twice|begins with byte|2\\^63")


numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**32, 2**61, 2**62, 2**63, 2**64 - 1, 2**64, 1.5, None, True])
tags = st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4", "F6_E2M3", "C64", "f32", "F128", "", 7])
entries = st.fixed_dictionaries(
    {"dtype": tags, "shape": st.lists(numbers, max_size=4), "data_offsets": st.lists(numbers, max_size=3)}
)
mostly_valid_headers = st.dictionaries(
    st.sampled_from([*VALID_HEADER, "new", "__metadata__"]), entries | st.sampled_from([3, None, [], {}]), max_size=3
).map(lambda changes: {**VALID_HEADER, **changes})


@settings(max_examples=400, deadline=None)
@given(mostly_valid_headers)
@example({"a": {"dtype": "F32", "shape": [2**32, 2**32, 0], "data_offsets": [0, 0]}})
@example({"a": {"dtype": "F64", "shape": [2**61 + 1], "data_offsets": [0, 8]}})
@example({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}})
def test_a_header_with_other_values_opens_as_the_library_opens_it_or_is_refused(header: dict[str, Any]) -> None:
    check_against_library(file_bytes(header), "2\\^63")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.binary(max_size=40).map(lambda text: len(text).to_bytes(8, "little") + text))
def test_arbitrary_bytes_are_refused_where_the_library_refuses_them(content: bytes) -> None:
    check_against_library(content, "begins with byte")


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x) | st.dictionaries(st.text(max_size=12), x)
)


@settings(max_examples=50, deadline=None)
@given(json_values)
@example([{"a.weight": "m.safetensors"}])
@example({"weight_map": {}})
@example({"weight_map": {"a": "m.safetensors"}})
@example(["numpy-direct", 1])
def test_an_arbitrary_index_or_manifest_is_refused(content: object) -> None:
    for name in ("model.safetensors.index.json", "manifest.json"):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_text(json.dumps(content))
            if name != "manifest.json":  # beside safetensors files it would be another tool's, and no fault
                (Path(folder) / "m.safetensors").write_bytes(VALID)
            with pytest.raises(tensorport.CheckpointError, match=name):
                tensorport.open(folder)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path, write_safetensors: Callable[..., Path]) -> None:
    write_safetensors(tmp_path / "here.safetensors", {"a": np.arange(3)})
    index = {"weight_map": {"a": "here.safetensors", "b": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(tensorport.CheckpointError, match=r"gone\.safetensors"):
        tensorport.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": ["../outside.npy"]}, ["plain path"]),
        ({"files": ["/etc/passwd"]}, ["plain path"]),
        ({"files": ["shard_000/missing.npy"]}, ["missing.npy"]),
        ({"files": []}, ["files"]),
        ({"shape": [3, 5]}, ["nbytes"]),
        ({"shape": [2**63, 2**63]}, ["2^63"]),
        ({"dtype": "float7"}, ["float7"]),
        ({"dtype": "int32"}, ["another header"]),
        ({"nbytes": 23}, ["nbytes"]),
        ({"offsets": [64]}, ["offset"]),
        ({"part_nbytes": [20]}, ["part_nbytes"]),
        ({"part_nbytes": [2**64 - 1]}, ["part_nbytes"]),
        ({"xxh3_128": "short"}, ["hexadecimal"]),
        ({"surprise": 1}, ["surprise"]),
    ],
)
def test_a_manifest_that_lies_is_refused(
    tmp_path: Path, write_safetensors: Callable[..., Path], change: dict[str, Any], words: list[str]
) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3)})
    tree = tmp_path / "tree"
    tensorport.convert(source, tree, progress=False)
    manifest = json.loads((tree / "manifest.json").read_text())
    manifest["tensors"]["a.b"].update(change)
    (tree / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(tensorport.CheckpointError) as caught:
        tensorport.open(tree)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("declared", [99_999_999, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_costs_no_memory(tmp_path: Path, declared: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(declared.to_bytes(8, "little") + b'{"a":')
    program = """
import sys, tensorport
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status", encoding="ascii") if l.startswith("VmHWM"))
before = peak()
try: tensorport.open(sys.argv[1])
except tensorport.CheckpointError as fault: print(peak() - before, fault)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True, timeout=60
    )
    grown_kib, _, message = result.stdout.partition(" ")
    assert int(grown_kib) < 4096
    assert str(declared) in message
