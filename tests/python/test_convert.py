"""convert(): the numpy-direct tree, its manifest, and everything that reads it."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray
from safetensors.numpy import load_file

Write = Callable[..., Path]

NPY_DESCR = {
    "BOOL": "|b1",
    "F4": "|u1",
    "F6_E2M3": "|u1",
    "F6_E3M2": "|u1",
    "U8": "|u1",
    "I8": "|i1",
    "F8_E5M2": "|u1",
    "F8_E4M3": "|u1",
    "F8_E8M0": "|u1",
    "F8_E4M3FNUZ": "|u1",
    "F8_E5M2FNUZ": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "BF16": "<V2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "C64": "<c8",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
}


def read_manifest(tree: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((tree / "manifest.json").read_text("utf-8"))
    return manifest


def tree_bytes(tree: Path) -> dict[str, bytes]:
    return {str(file.relative_to(tree)): file.read_bytes() for file in sorted(tree.rglob("*")) if file.is_file()}


def golden_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def test_the_tree_has_the_files_of_the_format_and_no_others(tmp_path: Path, golden_hf: Path) -> None:
    tree = tmp_path / "tree"
    report = tensorport.convert(golden_hf, tree, progress=False)
    names = list(tensorport.open(golden_hf))
    expected = {f"shard_000/{name.replace('.', '_')}.npy" for name in names}
    assert set(tree_bytes(tree)) == expected | {"manifest.json", "load_params.py", "config.json"}
    assert report.output == tree
    assert (report.total_tensors, report.total_files) == (len(names), len(names))
    assert report.verified
    assert report.copied_files == ("config.json",)
    assert report.edited_files == report.warnings == ()
    assert report.overflow == report.underflow == {}


def test_npy_headers_are_aligned_and_name_what_npy_can_name(
    tmp_path: Path, write_safetensors: Write, safetensors_dtypes: dict[str, tuple[np.dtype[Any], int]]
) -> None:
    content: dict[str, tuple[str, tuple[int, ...], bytes]]
    content = {tag: (tag, (2, 3, 4), bytes(24 * bits // 8)) for tag, (_, bits) in safetensors_dtypes.items()}
    content["scalar"] = ("I16", (), b"\1\2")
    content["empty"] = ("F32", (5, 0, 3), b"")
    content["flat"] = ("BF16", (7,), bytes(14))
    content["deep"] = ("U8", (1,) * 63 + (2,), b"ab")
    tree = tmp_path / "tree"
    tensorport.convert(write_safetensors(tmp_path / "m.safetensors", content), tree, progress=False)
    for name, (tag, shape, data) in content.items():
        path = tree / "shard_000" / f"{name}.npy"
        with path.open("rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            found_shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            assert file.tell() % 64 == 0
            assert file.read() == data
        packed = safetensors_dtypes[tag][1] < 8
        assert found_shape == ((len(data),) if packed else shape)
        assert not fortran_order
        assert dtype == np.dtype(NPY_DESCR[tag])
        assert f"'descr': '{NPY_DESCR[tag]}'".encode() in path.read_bytes()


def test_bytes_do_not_depend_on_workers_memory_place_or_time(
    tmp_path: Path, golden_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"mxfp4": "dequantize", "shard_size": 0.0003, "progress": False}
    first = tmp_path / "first"
    tensorport.convert(golden_hf, first, workers=1, **options)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "link").symlink_to(golden_hf)
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    tensorport.convert("link", Path("x") / "y", workers=7, max_memory=1_000_000, verify=False, **options)
    assert tree_bytes(first) == tree_bytes(elsewhere / "x" / "y")
    assert str(tmp_path).encode() not in b"".join(tree_bytes(first).values())


def test_tensors_larger_than_a_shard_are_split_into_whole_rows(tmp_path: Path, write_safetensors: Write) -> None:
    rows = np.arange(7 * 3 * 5, dtype=np.float32).reshape(7, 3, 5)
    arrays: dict[str, NDArray[Any]]
    arrays = {"rows": rows, "long.row": np.arange(200, dtype=np.float64).reshape(2, 100), "small": np.arange(3)}
    tree = tmp_path / "tree"
    with pytest.warns(UserWarning, match=r"long\.row.*800 bytes.*250 bytes"):
        report = tensorport.convert(
            write_safetensors(tmp_path / "m.safetensors", arrays), tree, shard_size=250e-9, progress=False
        )
    assert len(report.warnings) == 1
    tensors = read_manifest(tree)["tensors"]
    assert [Path(file).name for file in tensors["rows"]["files"]] == [f"rows.part00{i}.npy" for i in range(2)]
    assert tensors["rows"]["part_nbytes"] == [240, 180]
    assert tensors["long.row"]["part_nbytes"] == [800, 800]
    assert [len(tensors[name]["files"]) for name in arrays] == [2, 2, 1]
    for name, array in arrays.items():
        parts = [np.load(tree / file) for file in tensors[name]["files"]]
        assert all(part.shape[1:] == array.shape[1:] for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), array)
        np.testing.assert_array_equal(tensorport.open(tree)[name], array)


@pytest.mark.parametrize(
    ("tag", "shape", "part_nbytes"),
    [
        ("F4", (6, 3), [3, 3, 3]),  # a row is 12 bits, two rows 3 bytes
        ("F4", (5, 2), [4, 1]),
        ("F6_E3M2", (12, 1), [3, 3, 3]),  # a row is 6 bits
        ("F6_E2M3", (8, 3), [9, 9]),  # four rows are 9 bytes, over the limit
        ("U8", (9,), [4, 4, 1]),
        ("BF16", (5,), [4, 4, 2]),
        ("U8", (3, 0), [0]),
        ("U8", (1, 7), [7]),
    ],
)
def test_parts_hold_whole_rows_and_whole_bytes(
    tmp_path: Path, write_safetensors: Write, tag: str, shape: tuple[int, ...], part_nbytes: list[int]
) -> None:
    data = bytes(range(1, sum(part_nbytes) + 1))
    source = write_safetensors(tmp_path / "m.safetensors", {"a": (tag, shape, data)})
    tree = tmp_path / "tree"
    if max(part_nbytes) > 4:
        with pytest.warns(UserWarning, match=f"{max(part_nbytes)} bytes"):
            tensorport.convert(source, tree, shard_size=4e-9, progress=False)
    else:
        tensorport.convert(source, tree, shard_size=4e-9, progress=False)
    assert read_manifest(tree)["tensors"]["a"]["part_nbytes"] == part_nbytes
    ours, theirs = tensorport.open(tree), tensorport.open(source)
    assert (ours["a"].dtype, ours["a"].shape) == (theirs["a"].dtype, theirs["a"].shape)
    assert ours["a"].tobytes() == data
    assert tensorport.verify(tree, source, progress=False).ok


@pytest.mark.parametrize("precision", ["source", "float16", "bfloat16", "float32"])
def test_jax_loads_every_file_at_every_precision(
    tmp_path: Path, golden_hf: Path, precision: Literal["source", "float16", "bfloat16", "float32"]
) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(golden_hf, tree, precision=precision, mxfp4="dequantize", progress=False)
    checkpoint = tensorport.open(tree)
    dtype = jnp.dtype("bfloat16" if precision == "source" else precision)
    for name, spec in checkpoint.specs.items():
        loaded = jnp.load(tree / spec.files[0])
        assert (loaded.dtype, loaded.shape) == (dtype, spec.shape)
        assert np.asarray(loaded).tobytes() == checkpoint[name].tobytes()
        if precision in ("float16", "float32"):
            plain = jnp.array(np.load(tree / spec.files[0]))
            assert plain.dtype == dtype
            assert (np.asarray(plain) == checkpoint[name]).all()


@pytest.mark.parametrize("shard_size", [1.8, 20e-6])
def test_the_trees_own_reader_needs_no_tensorport(
    tmp_path: Path, write_safetensors: Write, golden_hf: Path, shard_size: float
) -> None:
    rng = np.random.default_rng(5)
    arrays = golden_arrays(golden_hf)
    for dtype in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        arrays[f"f8.{dtype}"] = np.frombuffer(rng.bytes(23_000), np.dtype(dtype)).reshape(230, 10, 10)
    arrays |= {"flags": rng.integers(0, 2, (3, 5)).astype(np.bool_), "int": np.arange(9, dtype=np.int16)}
    tensors: dict[str, NDArray[Any] | tuple[str, tuple[int, ...], bytes]]
    tensors = {**arrays, "f4": ("F4", (60, 1000), rng.bytes(30_000)), "f6": ("F6_E2M3", (8, 3), rng.bytes(18))}
    tree = tmp_path / "tree"
    source = write_safetensors(tmp_path / "m.safetensors", tensors)
    report = tensorport.convert(source, tree, shard_size=shard_size, progress=False)
    assert (report.total_files > report.total_tensors) == (shard_size < 1)
    program = """
import hashlib, json, sys, warnings
sys.modules["tensorport"] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
from load_params import load_params
warnings.simplefilter("error")
print(json.dumps({name: (str(array.dtype), array.shape, hashlib.sha256(np.asarray(array).tobytes()).hexdigest())
                  for name, array in load_params().items()}))
"""
    command = [sys.executable, "-c", program, str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=True)
    expected = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            expected[name] = ["uint8", [len(tensor[2])], hashlib.sha256(tensor[2]).hexdigest()]
        else:
            expected[name] = [tensor.dtype.name, list(tensor.shape), hashlib.sha256(tensor.tobytes()).hexdigest()]
    assert json.loads(result.stdout) == expected


def test_a_converted_tree_can_be_converted_again(tmp_path: Path, golden_hf: Path) -> None:
    first, second, direct = tmp_path / "first", tmp_path / "second", tmp_path / "direct"
    tensorport.convert(golden_hf, first, shard_size=0.0001, progress=False)
    options: dict[str, Any] = {"precision": "float32", "mxfp4": "dequantize", "shard_size": 0.001, "progress": False}
    tensorport.convert(first, second, **options)
    tensorport.convert(golden_hf, direct, **options)
    differing = {name for name, content in tree_bytes(direct).items() if tree_bytes(second).get(name) != content}
    assert set(tree_bytes(second)) == set(tree_bytes(direct))
    assert differing == {"manifest.json"}  # the fingerprint of the source
    assert read_manifest(second)["tensors"] == read_manifest(direct)["tensors"]
    assert tensorport.verify(second, first, progress=False).ok


def test_the_trees_own_reader_refuses_to_narrow_64_bits(tmp_path: Path, write_safetensors: Write) -> None:
    arrays = {"a": np.array([2**40 + 5, 7]), "b": np.array([1e300])}
    for name, array in arrays.items():
        tree = tmp_path / name
        tensorport.convert(write_safetensors(tmp_path / f"{name}.safetensors", {name: array}), tree, progress=False)
        command = [sys.executable, "-c", "from load_params import load_params; print(load_params())"]
        plain = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tree, check=False)
        assert plain.returncode == 1
        assert f"TypeError: {name} is {array.dtype.name}" in plain.stderr
        wide = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tree,
            check=True,
            env=os.environ | {"JAX_ENABLE_X64": "1"},
        )
        assert array.dtype.name in wide.stdout
