"""Casts, bit for bit against an oracle of its own: the nearest of all values of the target, ties to even."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray

Write = Callable[..., Path]
Precision = Literal["float16", "bfloat16", "float32"]

SOURCES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
PRECISIONS: list[Precision] = ["float16", "bfloat16", "float32"]


def unsigned(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")


def magnitudes(dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """The non-negative finite values of a 16-bit dtype, each at the index that its bits are, then the next one."""
    infinity = unsigned(np.array([np.inf], dtype))[0]
    finite = np.arange(infinity, dtype=np.uint16).view(dtype).astype(np.float64)
    return np.append(finite, 2 * finite[-1] - finite[-2])


def nearest(values: NDArray[Any], precision: Precision) -> NDArray[Any]:
    """`values` rounded once, to nearest even. NumPy's float64 holds every midpoint exactly."""
    dtype = SOURCES[precision]
    if precision == "float32":
        return values.astype(dtype)  # NumPy rounds once here
    exact = values.astype(np.float64)
    table = magnitudes(dtype)
    midpoints = (table[:-1] + table[1:]) / 2
    size = np.where(np.isnan(exact), 0, np.abs(exact))
    below = np.searchsorted(midpoints, size, side="left")
    is_tie = np.append(midpoints, np.inf)[below] == size
    bits = (below + (is_tie & (below % 2 == 1) & (below < len(midpoints)))).astype(np.uint16)
    result = np.where(np.signbit(exact), bits | 0x8000, bits).astype(np.uint16).view(dtype)
    result[np.isnan(exact)] = np.nan
    rounded: NDArray[Any] = result
    return rounded


def hard_values(dtype: np.dtype[Any]) -> NDArray[Any]:
    """Every bit pattern of a narrow dtype; random patterns, ties and what is next to them of a wide one."""
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype=np.uint16).view(dtype)
    rng = np.random.default_rng(20)
    patterns = rng.integers(0, 2 ** (8 * dtype.itemsize), 20_000, dtype=f"u{dtype.itemsize}").view(dtype)
    with np.errstate(all="ignore"):
        middling = (rng.standard_normal(20_000) * 2.0 ** rng.integers(-160, 130, 20_000)).astype(dtype)
        ties = []
        for target in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
            narrow = rng.integers(0, 2 ** (8 * target.itemsize), 3000, dtype=f"u{target.itemsize}").view(target)
            if target.itemsize == 2:
                table = magnitudes(target)
                exact = np.concatenate([(table[:-1] + table[1:]) / 2, table[-3:]])
            else:
                following = (unsigned(narrow) + np.uint32(1)).view(target)
                exact = (narrow.astype(np.float64) + following.astype(np.float64)) / 2
            ties.append(exact.astype(dtype))
        wide = np.concatenate([patterns, middling, *ties])
        around = [wide, np.nextafter(wide, dtype.type(np.inf)), np.nextafter(wide, dtype.type(-np.inf))]
    edges = [
        0.0,
        np.inf,
        np.nan,
        np.finfo(dtype).max,
        np.finfo(dtype).tiny,
        np.finfo(dtype).smallest_subnormal,
        65520.0,
    ]
    signed = np.concatenate([*around, np.array(edges, dtype)])
    return np.concatenate([signed, -signed])


VALUES = {name: hard_values(dtype) for name, dtype in SOURCES.items()}


@pytest.fixture(autouse=True)
def _no_numpy_warnings() -> Iterator[None]:
    """NumPy warns of the very overflows and signalling NaNs that are tested here."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_safetensors: Write) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("precision") / "m.safetensors", VALUES)


def assert_same_floats(found: NDArray[Any], expected: NDArray[Any], given: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype
    is_nan = np.isnan(given)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(given))
    np.testing.assert_array_equal(unsigned(found)[~is_nan], unsigned(expected)[~is_nan])


def overflows(given: NDArray[Any], rounded: NDArray[Any]) -> NDArray[np.bool_]:
    lost: NDArray[np.bool_] = np.isfinite(given) & np.isinf(rounded)
    return lost


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_oracle_agrees_with_numpy_and_ml_dtypes_where_those_round_once(precision: Precision) -> None:
    for name in ("float32", "float16", "bfloat16"):
        theirs = VALUES[name].astype(np.float32).astype(SOURCES[precision])
        assert_same_floats(theirs, nearest(VALUES[name], precision), VALUES[name])


def test_two_roundings_would_show() -> None:
    twice = VALUES["float64"].astype(np.float32).astype(ml_dtypes.bfloat16)
    assert (unsigned(twice) != unsigned(nearest(VALUES["float64"], "bfloat16"))).any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("on_overflow", ["warn", "saturate"])
def test_every_float_rounds_once_to_nearest_even(
    tmp_path: Path, source: Path, precision: Precision, on_overflow: Literal["warn", "saturate"]
) -> None:
    tree = tmp_path / "tree"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The smallest chunks, so that every array has many.
        report = tensorport.convert(
            source, tree, precision=precision, on_overflow=on_overflow, workers=2, max_memory=262_144, progress=False
        )
    tensors = json.loads((tree / "manifest.json").read_text())["tensors"]
    checkpoint = tensorport.open(tree)
    overflow: dict[str, int] = {}
    underflow: dict[str, int] = {}
    for name, given in VALUES.items():
        if name == precision:
            assert checkpoint[name].tobytes() == given.tobytes()
            continue
        expected = nearest(given, precision)
        lost = overflows(given, expected)
        vanished = (given != 0) & (expected == 0)
        if on_overflow == "saturate":
            limits = {"float16": 65504.0, "bfloat16": 255 * 2.0**120, "float32": float(np.finfo(np.float32).max)}
            signed = np.copysign(limits[precision], given.astype(np.float64))
            expected = np.where(lost, signed.astype(expected.dtype), expected)
        assert_same_floats(checkpoint[name], expected, given)
        assert (tensors[name]["overflow"], tensors[name]["underflow"]) == (lost.sum(), vanished.sum())
        assert tensors[name]["source_dtype"] == name
        overflow |= {name: int(lost.sum())} if lost.any() else {}
        underflow |= {name: int(vanished.sum())} if vanished.any() else {}
    assert report.overflow == overflow
    assert report.underflow == underflow
    assert "float64" in overflow
    assert "float64" in underflow
    messages = [str(warning.message) for warning in caught]
    assert messages == list(report.warnings)
    assert len(messages) == (len(overflow) if on_overflow == "warn" else 0)
    for name, count in overflow.items() if messages else ():
        assert any(re.search(rf'"{name}".*\b{count}\b', message) for message in messages)
    assert tensorport.verify(tree, source, progress=False).ok


def test_source_precision_keeps_every_bit_nan_payloads_included(tmp_path: Path, source: Path) -> None:
    report = tensorport.convert(source, tmp_path / "tree", progress=False)
    checkpoint = tensorport.open(tmp_path / "tree")
    assert all(checkpoint[name].tobytes() == given.tobytes() for name, given in VALUES.items())
    assert report.overflow == report.underflow == {}


def test_overflow_is_an_error_that_says_which_tensor_how_many_and_the_largest(
    tmp_path: Path, write_safetensors: Write
) -> None:
    fits = np.array([65519.996, -65504.0, np.inf, -np.inf, np.nan, 1e-30], np.float32)
    # Far apart, so that they lie in different chunks.
    exceeds = np.ones(100_000, np.float32)
    exceeds[[5, 40_000, 99_999]] = [65520.0, -3.5e37, 7e4]
    source = write_safetensors(tmp_path / "m.safetensors", {"layer.fits": fits, "layer.exceeds": exceeds})
    with pytest.raises(tensorport.ConversionError) as caught:
        tensorport.convert(
            source, tmp_path / "tree", precision="float16", max_memory=131_072, workers=1, progress=False
        )
    for part in ('"layer.exceeds"', "found 3 ", "float16", "3.5", "e37", "6.5504e4", "saturate"):
        assert part in str(caught.value)
    assert not (tmp_path / "tree" / "manifest.json").exists()
    report = tensorport.convert(source, tmp_path / "fits", precision="float16", exclude="*exceeds", progress=False)
    assert report.overflow == {}
    assert report.underflow == {"layer.fits": 1}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_narrow_floats_integers_and_booleans_stay(
    tmp_path: Path,
    write_safetensors: Write,
    safetensors_dtypes: dict[str, tuple[np.dtype[Any], int]],
    precision: Precision,
) -> None:
    content = {
        tag: (tag, (3, 16), bytes(48) if tag == "BOOL" else np.random.default_rng(bits).bytes(48 * bits // 8))
        for tag, (dtype, bits) in safetensors_dtypes.items()
        if dtype.name not in SOURCES
    }
    assert len(content) == 18
    source = write_safetensors(tmp_path / "m.safetensors", content)
    tensorport.convert(source, tmp_path / "tree", precision=precision, progress=False)
    checkpoint = tensorport.open(tmp_path / "tree")
    for tag, (_, shape, data) in content.items():
        assert (checkpoint.specs[tag].dtype, checkpoint.specs[tag].shape) == (safetensors_dtypes[tag][0], shape)
        assert checkpoint[tag].tobytes() == data


@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty_and_scalar_floats_are_cast(tmp_path: Path, write_safetensors: Write, precision: Precision) -> None:
    arrays = {"empty": np.zeros((3, 0, 5)), "scalar": np.array(-0.1)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    tensorport.convert(source, tmp_path / "tree", precision=precision, progress=False)
    checkpoint = tensorport.open(tmp_path / "tree")
    assert (checkpoint["empty"].dtype, checkpoint["empty"].shape) == (SOURCES[precision], (3, 0, 5))
    assert checkpoint["scalar"].shape == ()
    assert checkpoint["scalar"] == nearest(arrays["scalar"].reshape(1), precision)[0]
