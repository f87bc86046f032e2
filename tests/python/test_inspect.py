"""`tensorport inspect`: its table, its totals, and statistics compared with NumPy's on every dtype."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray

Write = Callable[..., Path]
Dtypes = dict[str, tuple[np.dtype[Any], int]]
Row = dict[str, Any]

# No order of values (complex), or none of elements in their bytes (float6).
WITHOUT_STATS = {"C64", "F6_E2M3", "F6_E3M2"}


def inspect(path: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tensorport", "inspect", str(path), "--json", *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    content: dict[str, Any] = json.loads(run.stdout)
    return content


def rows(path: Path, *flags: str) -> dict[str, Row]:
    return {row["name"]: row for row in inspect(path, *flags)["tensors"]}


def check(stats: Row, values: NDArray[Any], name: str) -> None:
    """Compares with NumPy in the highest precision it has."""
    with np.errstate(invalid="ignore"):
        wide = values.astype(np.longdouble)
    finite = wide[np.isfinite(wide)]
    assert stats["nan"] == int(np.isnan(wide).sum()), name
    assert stats["inf"] == int(np.isinf(wide).sum()), name
    if finite.size == 0:
        assert [stats[key] for key in ("min", "max", "mean", "std")] == [None] * 4, name
        return
    # Exact: every value of every dtype but the widest integers is a double, and those are rounded once.
    assert (stats["min"], stats["max"]) == (float(finite.min()), float(finite.max())), name
    # Each of n additions of a blocked sum rounds once; 4096 is the length of a block and the rest is merged pairwise.
    scale = float(np.abs(finite).max())
    tolerance = 2 * (4096 + finite.size / 4096) * np.finfo(np.float64).eps * scale
    assert math.isclose(stats["mean"], float(finite.mean()), rel_tol=0, abs_tol=tolerance), name
    assert math.isclose(stats["std"], float(finite.std()), rel_tol=1e-9, abs_tol=tolerance), name


def content(tag: str, dtype: np.dtype[Any], width: int, count: int) -> tuple[bytes, NDArray[Any] | None]:
    """Random bytes of a dtype and the values they mean, by ml_dtypes alone."""
    rng = np.random.default_rng(width * count)
    if tag == "BOOL":
        array = rng.integers(0, 2, count).astype(bool)
        return array.tobytes(), array.astype(np.uint8)
    data = rng.bytes(count * width // 8)
    if tag == "F4":
        packed = np.frombuffer(data, np.uint8)
        codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
        return data, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    if tag in WITHOUT_STATS:
        return data, None
    array = np.frombuffer(data, dtype)
    if tag == "F64":  # its squares leave the range of doubles where random bits do
        array = rng.normal(3e100, 5e99, count)
        array[::97] = np.nan
        array[::89] = -np.inf
        return array.tobytes(), array
    with np.errstate(invalid="ignore"):
        # float32 holds every narrower float exactly.
        return data, array if dtype.kind in "iu" else array.astype(np.float64)


@pytest.mark.parametrize("count", [8, 12_344])
def test_statistics_of_every_dtype_are_those_of_numpy(
    tmp_path: Path, write_safetensors: Write, safetensors_dtypes: Dtypes, count: int
) -> None:
    contents = {tag: content(tag, dtype, width, count) for tag, (dtype, width) in safetensors_dtypes.items()}
    path = write_safetensors(
        tmp_path / "m.safetensors", {f"t.{tag}": (tag, (2, count // 2), data) for tag, (data, _) in contents.items()}
    )
    found = rows(path, "--stats")
    assert len(found) == 22
    for tag, (_, values) in contents.items():
        stats = found[f"t.{tag}"]["stats"]
        if values is None:
            assert stats == {"min": None, "max": None, "mean": None, "std": None, "nan": 0, "inf": 0}
        else:
            check(stats, values, tag)


@pytest.mark.parametrize("tag", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"])
def test_every_code_of_the_eight_bit_floats_has_its_value(
    tmp_path: Path, write_safetensors: Write, safetensors_dtypes: Dtypes, tag: str
) -> None:
    codes = np.arange(256, dtype=np.uint8)
    tensors = {f"code{code:03}": (tag, (1,), bytes([code])) for code in codes}
    found = rows(write_safetensors(tmp_path / "m.safetensors", tensors), "--stats")
    values = codes.view(safetensors_dtypes[tag][0]).astype(np.float64)
    for code, value in zip(codes, values, strict=True):
        check(found[f"code{code:03}"]["stats"], np.array([value]), f"{tag} {code:#x}")


def test_nan_and_inf_are_counted_and_left_out(tmp_path: Path, write_safetensors: Write) -> None:
    special = [np.nan, 1.0, np.inf, -2.0, -np.inf, np.nan, np.nan]
    tensors: dict[str, Any] = {
        np.dtype(dtype).name: np.array(special, dtype) for dtype in (np.float16, np.float32, ml_dtypes.bfloat16)
    }
    tensors["all"] = np.array([np.nan, np.inf], np.float64)
    tensors["none"] = np.zeros((3, 0), np.float32)
    found = rows(write_safetensors(tmp_path / "m.safetensors", tensors), "--stats")
    for name in ("float16", "float32", "bfloat16"):
        assert found[name]["stats"] == {"min": -2.0, "max": 1.0, "mean": -0.5, "std": 1.5, "nan": 3, "inf": 2}
    nothing = {"min": None, "max": None, "mean": None, "std": None}
    assert found["all"]["stats"] == {**nothing, "nan": 1, "inf": 1}
    assert found["none"]["stats"] == {**nothing, "nan": 0, "inf": 0}


def test_statistics_do_not_depend_on_where_chunks_end(tmp_path: Path, write_safetensors: Write) -> None:
    # 40 MB are more than one chunk of each worker; a mean far from zero shows cancellation.
    values = np.random.default_rng(3).normal(1000, 0.25, 10_000_019).astype(np.float32)
    found = rows(write_safetensors(tmp_path / "m.safetensors", {"w": values}), "--stats")
    check(found["w"]["stats"], values, "w")


@pytest.mark.parametrize(("blocks", "scales"), [("x_blocks", "x_scales"), ("x.blocks", "x.scales")])
def test_mxfp4_pairs_are_marked_and_their_statistics_are_of_decoded_values(
    tmp_path: Path, write_safetensors: Write, blocks: str, scales: str
) -> None:
    rng = np.random.default_rng(4)
    tensors = {
        blocks: rng.integers(0, 256, (3, 5, 7, 16), np.uint8),
        scales: rng.integers(90, 140, (3, 5, 7), np.uint8),
        "alone_blocks": rng.integers(0, 256, (2, 16), np.uint8),
    }
    tensors[scales][0, 0, :3] = (0, 254, 255)
    found = rows(write_safetensors(tmp_path / "m.safetensors", tensors), "--stats")
    assert {name: row["mxfp4"] for name, row in found.items()} == {
        blocks: "blocks",
        scales: "scales",
        "alone_blocks": None,
    }
    nibbles = np.stack([tensors[blocks] & 15, tensors[blocks] >> 4], axis=-1).reshape(3, 5, 7, 32)
    codes = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = tensors[scales].view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    with np.errstate(over="ignore"):
        # Decoded to float32, in which 6 * 2**127 overflows.
        values = (codes * factors[..., None]).astype(np.float32)
    assert np.isinf(values).any()
    check(found[blocks]["stats"], values, blocks)
    for name in (scales, "alone_blocks"):
        check(found[name]["stats"], tensors[name], name)


@pytest.mark.parametrize("converted", [False, True])
def test_totals_and_rows_are_those_of_the_checkpoint(tiny: Path, tmp_path: Path, converted: bool) -> None:
    path = tiny
    if converted:
        path = tmp_path / "out"
        tensorport.convert(tiny, path, shard_size=0.00007, progress=False)
    checkpoint, found = tensorport.open(path), inspect(path)
    nbytes = sum(array.nbytes for array in checkpoint.values())
    shapes = {name: list(array.shape) for name, array in checkpoint.items()}
    scales = sum(array.size for name, array in checkpoint.items() if name.endswith("_scales"))
    elements = sum((2 if n.endswith("_blocks") else 1) * a.size for n, a in checkpoint.items())
    assert found["total_tensors"] == len(checkpoint) == 79
    assert found["total_bytes"] == nbytes
    assert found["stored_elements"] == elements
    assert found["total_parameters"] == elements - scales
    assert {row["name"]: row["shape"] for row in found["tensors"]} == shapes
    assert {row["name"]: tuple(row["files"]) for row in found["tensors"]} == {
        name: spec.files for name, spec in checkpoint.specs.items()
    }
    assert any(len(row["files"]) > 1 for row in found["tensors"]) == converted
    assert all("stats" not in row for row in found["tensors"])


def test_statistics_of_a_converted_tree_are_those_of_its_source(tiny: Path, tmp_path: Path) -> None:
    tensorport.convert(tiny, tmp_path / "out", shard_size=0.00007, progress=False)
    source, tree = rows(tiny, "--stats"), rows(tmp_path / "out", "--stats")
    assert {name: row["stats"] for name, row in source.items()} == {name: row["stats"] for name, row in tree.items()}


def test_the_table_has_a_line_per_tensor_and_the_totals(tiny: Path) -> None:
    command = [sys.executable, "-m", "tensorport", "inspect", str(tiny), "--stats"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    head = ["name", "dtype", "shape", "size", "file", "mxfp4", "min", "max", "mean", "std", "nan", "inf"]
    assert lines[0].split() == head
    checkpoint = tensorport.open(tiny)
    assert [line.split()[0] for line in lines[1:80]] == list(checkpoint)
    assert lines[81].startswith("79 tensors, ")
    assert f"{checkpoint.total_parameters:,} parameters ({checkpoint.stored_elements:,} stored" in lines[82]
