"""float8 weights with block scales: decoded bit for bit, in conversions and in loads, whole and in parts."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorport
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray
from tensorport import _core

Write = Callable[..., Path]
Arrays = dict[str, NDArray[Any]]

DTYPES = {"source": ml_dtypes.bfloat16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
FORMATS = {
    "bfloat16": (7, -126, 255 * 2.0**120),
    "float16": (10, -14, 65504.0),
    "float32": (23, -126, (2 - 2.0**-23) * 2.0**127),
}


def exact(weight: NDArray[Any], scales: NDArray[Any], block: tuple[int, int] = (128, 128)) -> NDArray[np.float64]:
    """The products, which float64 holds exactly; each scale is spread over its block."""
    spread = scales.astype(np.float64).repeat(block[0], axis=-2).repeat(block[1], axis=-1)
    with np.errstate(invalid="ignore"):
        products: NDArray[np.float64] = weight.astype(np.float64) * spread[..., : weight.shape[-2], : weight.shape[-1]]
    return products


def rounded(values: NDArray[np.float64], dtype: Any) -> NDArray[Any]:
    """Rounded once, to nearest even, by arithmetic on exact multiples of the distance between neighbours."""
    # bits of the mantissa, smallest normal exponent, largest value
    nmant, minexp, largest = FORMATS[np.dtype(dtype).name]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        exponent = np.maximum(np.frexp(values)[1] - 1, minexp)
        step = np.ldexp(1.0, exponent - nmant)
        result = np.where(np.isfinite(values), np.rint(values / step) * step, values)
        result[np.abs(result) > largest] = np.copysign(np.inf, result[np.abs(result) > largest])
        found: NDArray[Any] = np.copysign(result, values).astype(dtype)
    return found


def assert_same_values(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    is_number = ~np.isnan(expected)
    width = f"u{found.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(width)[is_number], expected.view(width)[is_number])


def random_pair(*shape: int, seed: int = 0, block: tuple[int, int] = (128, 128)) -> tuple[NDArray[Any], NDArray[Any]]:
    """Finite codes, and scales of the size that checkpoints have."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x55
    lead, (rows, columns) = shape[:-2], shape[-2:]
    counts = (*lead, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    return codes.view(ml_dtypes.float8_e4m3fn), rng.uniform(1e-4, 2e-3, counts).astype(np.float32)


def dequantize(source: Path, tree: Path, **options: Any) -> tensorport.Checkpoint:
    tensorport.convert(source, tree, float8="dequantize", progress=False, **options)
    return tensorport.open(tree)


def every_code_under_many_scales() -> Arrays:
    """[2688, 256]: each block of 128 rows has all codes, in another order, under its own two scales."""
    scales = [
        0.0,
        -0.0,
        np.nan,
        np.inf,
        -np.inf,
        1e-45,
        3e-42,
        -1.2e-38,
        2.0**-126,
        3e-39,
        2.0**-100,
        2.0**-15,
        2.0**-16,
    ]
    scales += [
        1.0,
        -1.0,
        1 / 3,
        -0.1,
        1.9999999,
        3e-4,
        7e-4,
        128.0,
        129.0,
        146.25,
        147.0,
        2.0**100,
        2.0**101,
        7.5e35,
        -8e35,
    ]
    scales += [
        1e38,
        -3.4e38,
        float(np.finfo(np.float32).max),
        1.0078125,
        1.00390625,
        65504 / 448,
        2.0**-133,
        2.0**-125,
        0.7,
        5.0,
    ]
    scales += [2.0**-24, 1e-7, 6e-8, 1.5]
    rng = np.random.default_rng(7)
    rows = 128 * len(scales) // 2
    codes = np.stack([rng.permutation(256) for _ in range(rows)]).astype(np.uint8)
    return {
        "w.weight": codes.view(ml_dtypes.float8_e4m3fn),
        "w.weight_scale_inv": np.array(scales, np.float32).reshape(-1, 2),
    }


@pytest.fixture(scope="module")
def pairs() -> Arrays:
    """Ragged weights, one of them a stack and one with scales in bfloat16, and tensors beside them."""
    tensors: Arrays = {}
    tensors["a.weight"], tensors["a.weight_scale_inv"] = random_pair(200, 330, seed=1)
    tensors["experts.up"], tensors["experts.up_scale_inv"] = random_pair(3, 130, 257, seed=2)
    tensors["b.weight"], scales = random_pair(128, 640, seed=3)
    tensors["b.weight_scale_inv"] = scales.astype(ml_dtypes.bfloat16)
    tensors["norm.weight"] = np.linspace(-3, 3, 330, dtype=np.float32)
    tensors["plain.f8"] = random_pair(5, 7)[0]
    return tensors


WEIGHTS = ("a.weight", "experts.up", "b.weight")


@pytest.fixture
def source(tmp_path: Path, write_safetensors: Write, pairs: Arrays) -> Path:
    """A folder in which weights and scales stand in different files, scales first for one of them."""
    folder = tmp_path / "source"
    folder.mkdir()
    first = ["experts.up_scale_inv", "a.weight", "b.weight", "b.weight_scale_inv"]
    write_safetensors(folder / "1.safetensors", {name: pairs[name] for name in first})
    write_safetensors(folder / "2.safetensors", {name: pairs[name] for name in pairs if name not in first})
    config = {
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def decoded(pairs: Arrays, dtype: Any) -> Arrays:
    return {name: rounded(exact(pairs[name], pairs[f"{name}_scale_inv"]), dtype) for name in WEIGHTS}


def test_the_oracle_rounds_as_numpy_and_ml_dtypes_do() -> None:
    tensors = every_code_under_many_scales()
    values = exact(tensors["w.weight"], tensors["w.weight_scale_inv"])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        # ml_dtypes goes to bfloat16 by float32, which rounds twice: it is no oracle for that.
        for dtype in (np.float16, np.float32):
            assert_same_values(rounded(values, dtype), values.astype(dtype))
        once, twice = rounded(values, ml_dtypes.bfloat16), values.astype(np.float32).astype(ml_dtypes.bfloat16)
    is_number = ~np.isnan(values)
    steps = once.view("u2").astype(int) - twice.view("u2").astype(int)
    assert np.abs(steps[is_number]).max() <= 1


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("on_overflow", ["warn", "saturate"])
def test_every_code_under_scales_of_every_kind_is_rounded_once(
    tmp_path: Path, write_safetensors: Write, precision: str, on_overflow: str
) -> None:
    tensors = every_code_under_many_scales()
    source = write_safetensors(tmp_path / "m.safetensors", tensors)
    options: dict[str, Any] = {"precision": precision, "on_overflow": on_overflow}
    if on_overflow == "warn":
        with pytest.warns(UserWarning, match='"w.weight"'):
            checkpoint = dequantize(source, tmp_path / "tree", **options)
    else:
        checkpoint = dequantize(source, tmp_path / "tree", **options)
    values, dtype = exact(tensors["w.weight"], tensors["w.weight_scale_inv"]), np.dtype(DTYPES[precision])
    expected = rounded(values, dtype)
    lost = np.isfinite(values) & np.isinf(expected)
    vanished = (values != 0) & (expected == 0)
    assert lost.any()
    assert vanished.any()
    if on_overflow == "saturate":
        expected[lost] = np.copysign(FORMATS[dtype.name][2], values[lost]).astype(dtype)
    assert_same_values(checkpoint["w.weight"], expected)
    info = json.loads((tmp_path / "tree" / "manifest.json").read_text())["tensors"]["w.weight"]
    assert (info["overflow"], info["underflow"]) == (lost.sum(), vanished.sum())
    assert (info["source_dtype"], info["dtype"]) == ("float8_e4m3fn", dtype.name)
    assert tensorport.verify(tmp_path / "tree", source, progress=False).ok
    load: dict[str, Any] = {"on_overflow": on_overflow, "dtype": None if precision == "source" else dtype}
    if on_overflow == "warn":
        with pytest.warns(UserWarning, match="w.weight: .* values overflowed"):
            loaded = tensorport.load_params(source, float8="dequantize", nested=False, **load)
    else:
        with pytest.warns(UserWarning, match="overflowed"):
            loaded = tensorport.load_params(source, float8="dequantize", nested=False, **load)
    assert list(loaded) == ["w.weight"]
    assert_same_values(np.asarray(loaded["w.weight"]), expected)


def test_overflow_is_an_error_by_default(tmp_path: Path, write_safetensors: Write) -> None:
    weight, scales = random_pair(130, 140)
    weight.view(np.uint8)[...] = 0x38
    weight.view(np.uint8)[129, 135:139] = [0x7E, 0xFE, 0x7F, 0x78]
    scales[1, 1] = 1e36
    source = write_safetensors(tmp_path / "m.safetensors", {"w": weight, "w_scale_inv": scales})
    message = r'"w": found 2 finite values beyond bfloat16.*4\.479.*e38'
    with pytest.raises(tensorport.ConversionError, match=message):
        dequantize(source, tmp_path / "tree")
    with pytest.raises(tensorport.ConversionError, match=message):
        tensorport.load_params(source, float8="dequantize")


@pytest.mark.parametrize("precision", DTYPES)
def test_ragged_weights_in_other_files_decode_everywhere(
    tmp_path: Path, source: Path, pairs: Arrays, precision: Any
) -> None:
    checkpoint = dequantize(
        source, tmp_path / "tree", precision=precision, shard_size=0.00014, max_memory=300_000, workers=2
    )
    # In the order of the weights.
    assert list(checkpoint) == ["a.weight", "b.weight", "experts.up", "norm.weight", "plain.f8"]
    for name, expected in decoded(pairs, DTYPES[precision]).items():
        assert_same_values(checkpoint[name], expected)
    assert len(checkpoint.specs["experts.up"].files) == (3 if precision == "float32" else 2)
    assert checkpoint["plain.f8"].tobytes() == pairs["plain.f8"].tobytes()
    assert tensorport.verify(tmp_path / "tree", source, progress=False).ok
    parameters = sum(pairs[name].size for name in checkpoint)
    assert checkpoint.total_parameters == checkpoint.stored_elements == parameters
    dtype = None if precision == "source" else DTYPES[precision]
    loaded, report = tensorport.load_params(source, float8="dequantize", dtype=dtype, nested=False, return_report=True)
    for name, expected in decoded(pairs, DTYPES[precision]).items():
        assert_same_values(np.asarray(loaded[name]), expected)
    assert report.reasons["converted"] >= len(WEIGHTS)
    shapes = tensorport.load_params_shapes(source, float8="dequantize", dtype=dtype, nested=False)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in loaded.items()
    }


def test_kept_weights_and_scales_are_plain_tensors(tmp_path: Path, source: Path, pairs: Arrays) -> None:
    tensorport.convert(source, tmp_path / "tree", progress=False)
    kept = tensorport.open(tmp_path / "tree")
    assert set(kept) == set(pairs)
    for name, array in pairs.items():
        assert (kept[name].dtype, kept[name].tobytes()) == (array.dtype, array.tobytes())
    assert '"float8":' not in (tmp_path / "tree" / "manifest.json").read_text()
    scales = sum(pairs[f"{name}_scale_inv"].size for name in WEIGHTS)
    stored = sum(array.size for array in pairs.values())
    for checkpoint in (kept, tensorport.open(source)):
        assert (checkpoint.total_parameters, checkpoint.stored_elements) == (stored - scales, stored)
    loaded = tensorport.load_params(source, nested=False, dtype="bfloat16")
    assert set(loaded) == set(pairs)
    assert loaded["a.weight"].dtype == ml_dtypes.float8_e4m3fn
    # What was kept can be decoded later, and is the same.
    assert (tmp_path / "tree" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    later = dequantize(tmp_path / "tree", tmp_path / "later")
    for name, expected in decoded(pairs, ml_dtypes.bfloat16).items():
        assert_same_values(later[name], expected)


def test_configuration_loses_the_quantization_that_is_gone_and_names_the_dtype(tmp_path: Path, source: Path) -> None:
    dequantize(source, tmp_path / "bfloat16")
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    dequantize(source, tmp_path / "float32", precision="float32")
    assert json.loads((tmp_path / "float32" / "config.json").read_text()) == {"torch_dtype": "float32"}
    report = tensorport.convert(source, tmp_path / "none", float8="dequantize", include="norm*", progress=False)
    assert report.edited_files == ()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_configuration_says_how_large_blocks_are(tmp_path: Path, write_safetensors: Write, kind: str) -> None:
    block = (48, 80)
    weight, scales = random_pair(200, 330, block=block)
    file = write_safetensors(tmp_path / "m.safetensors", {"w": weight, "w_scale_inv": scales})
    source = file if kind == "file" else tmp_path
    with pytest.raises(tensorport.CheckpointError, match="128 x 128"):
        tensorport.load_params_shapes(source, float8="dequantize")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}, "limit": math.inf}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = rounded(exact(weight, scales, block), np.float32)
    assert_same_values(dequantize(source, tmp_path / "tree", precision="float32")["w"], expected)
    loaded = tensorport.load_params(source, float8="dequantize", dtype="float32")
    assert_same_values(np.asarray(loaded["w"]), expected)
    assert tensorport.verify(tmp_path / "tree", source, progress=False).ok


@pytest.mark.parametrize("size", [[128, 0], [128], "128x128", [1.5, 128], [-128, 128], [True, 128], {}])
def test_sizes_of_blocks_that_make_no_sense_are_refused(tmp_path: Path, source: Path, size: Any) -> None:
    (source / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": size}}))
    for job in (
        lambda: dequantize(source, tmp_path / "t"),
        lambda: tensorport.load_params(source, float8="dequantize"),
    ):
        with pytest.raises(tensorport.CheckpointError, match=r"config\.json: found weight_block_size .*two positive"):
            job()
    # Nobody asks while weights are kept.
    assert set(tensorport.load_params(source, nested=False)) == set(tensorport.open(source))


F8 = ml_dtypes.float8_e4m3fn
MISFITS: dict[str, Arrays] = {
    "transposed": {"w": np.zeros((200, 330), F8), "w_scale_inv": np.ones((3, 2), np.float32)},
    "of other blocks": {"w": np.zeros((200, 330), F8), "w_scale_inv": np.ones((4, 6), np.float32)},
    "flat": {"w": np.zeros((200, 330), F8), "w_scale_inv": np.ones(6, np.float32)},
    "one for all": {"w": np.zeros((200, 330), F8), "w_scale_inv": np.ones((), np.float32)},
    "of another stack": {"w": np.zeros((3, 200, 330), F8), "w_scale_inv": np.ones((2, 2, 3), np.float32)},
    "of another dtype": {"w": np.zeros((200, 330), F8), "w_scale_inv": np.ones((2, 3), np.float16)},
    "of another float8": {
        "w": np.zeros((200, 330), ml_dtypes.float8_e5m2),
        "w_scale_inv": np.ones((2, 3), np.float32),
    },
    "of a vector": {"w": np.zeros(200, F8), "w_scale_inv": np.ones((2, 1), np.float32)},
    "alone": {"w_scale_inv": np.ones((2, 3), np.float32)},
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused_when_decoding_and_plain_when_kept(
    tmp_path: Path, write_safetensors: Write, case: str
) -> None:
    arrays = {**MISFITS[case], "fine": np.arange(7, dtype=np.float32)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    for job in (
        lambda: dequantize(source, tmp_path / "t"),
        lambda: tensorport.load_params(source, float8="dequantize"),
    ):
        with pytest.raises(tensorport.CheckpointError) as caught:
            job()
        for part in (str(source), '"w"', '"w_scale_inv"', "expected"):
            assert part in str(caught.value)
    tensorport.convert(source, tmp_path / "kept", progress=False)
    assert set(tensorport.open(tmp_path / "kept")) == set(arrays)
    assert list(dequantize(source, tmp_path / "selected", include="fine")) == ["fine"]
    assert list(tensorport.load_params(source, float8="dequantize", include="fine")) == ["fine"]


def test_names_alone_make_no_pair(tmp_path: Path, write_safetensors: Write) -> None:
    arrays: Arrays = {"w": np.ones((200, 330), np.float32), "w_scale_inv": np.ones((9, 9), np.float32)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    assert set(dequantize(source, tmp_path / "tree")) == set(arrays)
    assert set(tensorport.load_params(source, float8="dequantize")) == set(arrays)


def test_globs_see_the_decoded_names(tmp_path: Path, source: Path) -> None:
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"include": ["a.weight", "norm*"]}, {"a.weight", "norm.weight"}),
        ({"include": ["*_scale_inv", "norm*"]}, {"norm.weight"}),
        ({"exclude": ["a.*", "plain*", "*_scale_inv"]}, {"b.weight", "experts.up", "norm.weight"}),
    ]
    for number, (globs, names) in enumerate(cases):
        assert set(dequantize(source, tmp_path / str(number), **globs)) == names
        assert set(tensorport.load_params(source, float8="dequantize", nested=False, **globs)) == names


def test_empty_weights_stay_empty(tmp_path: Path, write_safetensors: Write) -> None:
    arrays = {
        "w": np.zeros((0, 330), F8),
        "w_scale_inv": np.zeros((0, 3), np.float32),
        "v": np.zeros((200, 0), F8),
        "v_scale_inv": np.zeros((2, 0), np.float32),
    }
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    for found in (dequantize(source, tmp_path / "tree"), tensorport.load_params(source, float8="dequantize")):
        assert {name: found[name].shape for name in found} == {"w": (0, 330), "v": (200, 0)}
        assert found["w"].dtype == found["v"].dtype == ml_dtypes.bfloat16


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[:8]).reshape(4, 2), ("x", "y"))


@pytest.mark.parametrize("spec", [("x", "y"), ("y", "x"), (("x", "y"), None), (None, ("x", "y")), (None, None)])
def test_shards_are_those_of_the_whole(
    tmp_path: Path, write_safetensors: Write, mesh: Mesh, spec: tuple[Any, Any]
) -> None:
    # Parts that cut through blocks: 264 / 4 = 66 rows, 1000 / 8 = 125 columns.
    weight, scales = random_pair(264, 1000)
    source = write_safetensors(tmp_path / "m.safetensors", {"w": weight, "w_scale_inv": scales})
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    loaded = tensorport.load_params(source, float8="dequantize", dtype="float32", sharding=sharding)["w"]
    expected = rounded(exact(weight, scales), np.float32)
    assert loaded.sharding == sharding
    assert_same_values(np.asarray(loaded), expected)
    for shard in loaded.addressable_shards:
        assert_same_values(np.asarray(shard.data), expected[shard.index])


def test_a_part_is_read_with_its_scales_alone(tmp_path: Path, write_safetensors: Write) -> None:
    # Rows so long that halves of them are read alone.
    weight, scales = random_pair(160, 163_840)
    source = write_safetensors(tmp_path / "m.safetensors", {"w": weight, "w_scale_inv": scales})
    expected = rounded(exact(weight, scales), ml_dtypes.bfloat16)
    checkpoint = tensorport.open(source)
    for region, most in [
        # Where rows are done in pieces, scales may be read for each of them.
        ([(32, 64), (0, 163_840)], 32 * 163_840 * 1.03),
        ([(0, 160), (0, 81_920)], 160 * 81_920 * 1.03),
        ([(7, 8), (100, 200)], 100 + 2 * 4),
        ([(127, 129), (0, 128)], 163_840 + 256 + 2 * 1280 * 4),
    ]:
        results, bytes_read = checkpoint._core.read(
            [(["w", "w_scale_inv"], "bfloat16", [region])],
            on_overflow="error",
            workers=2,
            memory=_core.Memory(),
            callback=None,
        )
        part = expected[tuple(slice(*bounds) for bounds in region)]
        assert results[0][0][0].tobytes() == np.ascontiguousarray(part).tobytes()
        assert part.size < bytes_read <= most


class Stop(Exception):  # noqa: N818 - what a user's callback raises need not be an error
    """What a callback of these tests raises."""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_conversion_goes_on(tmp_path: Path, write_safetensors: Write) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(12):
        weight, scales = random_pair(300, 2000, seed=number)
        write_safetensors(folder / f"{number:02}.safetensors", {f"{number}.w": weight, f"{number}.w_scale_inv": scales})
    options: dict[str, Any] = {"shard_size": 0.0005, "max_memory": 300_000, "workers": 2}
    dequantize(folder, tmp_path / "whole", **options)
    output = tmp_path / "output"
    journal = output / "journal.jsonl"

    def stop(_: tensorport.ProgressEvent) -> None:
        if journal.exists() and len(journal.read_bytes().splitlines()) > 3:
            raise Stop

    with pytest.raises(Stop):
        tensorport.convert(folder, output, float8="dequantize", progress=stop, **options)
    assert not (output / "manifest.json").exists()
    with pytest.raises(tensorport.ConversionError, match='"float8":"dequantize"'):
        tensorport.convert(folder, output, resume=True, progress=False, **options)
    report = tensorport.convert(folder, output, float8="dequantize", resume=True, progress=False, **options)
    assert report.resumed_tensors > 0
    assert files(output) == files(tmp_path / "whole")


@pytest.mark.parametrize("tensor", ["a.weight", "a.weight_scale_inv"])
def test_a_flipped_bit_of_the_source_is_found(tmp_path: Path, source: Path, tensor: str) -> None:
    dequantize(source, tmp_path / "tree")
    spec = tensorport.open(source).specs[tensor]
    file = source / spec.files[0]
    content = bytearray(file.read_bytes())
    content[spec.offset + spec.nbytes - 1] ^= 0x01 if tensor == "a.weight" else 0x04
    file.write_bytes(content)
    report = tensorport.verify(tmp_path / "tree", source, progress=False)
    assert not report.ok
    assert {failure.tensor for failure in report.failures} == {"a.weight"}


def test_a_flipped_bit_of_the_tree_is_found(tmp_path: Path, source: Path) -> None:
    checkpoint = dequantize(source, tmp_path / "tree")
    spec = checkpoint.specs["experts.up"]
    file = tmp_path / "tree" / spec.files[0]
    content = bytearray(file.read_bytes())
    content[spec.offset + 77] ^= 0x10
    file.write_bytes(content)
    for against in (None, source):
        report = tensorport.verify(tmp_path / "tree", against, progress=False)
        assert {failure.tensor for failure in report.failures} == {"experts.up"}


@pytest.mark.parametrize("format", ["numpy-direct", "msgpack", "jax-pickle", "safetensors", "orbax"])
def test_every_format_holds_decoded_weights(tmp_path: Path, source: Path, pairs: Arrays, format: Any) -> None:  # noqa: A002
    found = tensorport.load_params(
        dequantize(source, tmp_path / "tree", format=format, include=list(WEIGHTS)).path, nested=False
    )
    for name, expected in decoded(pairs, ml_dtypes.bfloat16).items():
        assert_same_values(np.asarray(found[name]), expected)


def test_the_command_line_decodes_and_marks_pairs(tmp_path: Path, source: Path, pairs: Arrays) -> None:
    command = [sys.executable, "-m", "tensorport"]
    options = ["--float8", "dequantize", "--json"]
    convert = [*command, "convert", "--input", str(source), "--output", str(tmp_path / "tree"), *options]
    report = json.loads(subprocess.run(convert, check=True, capture_output=True).stdout)
    assert report["options"]["float8"] == "dequantize"
    assert_same_values(tensorport.open(tmp_path / "tree")["a.weight"], decoded(pairs, ml_dtypes.bfloat16)["a.weight"])
    wrong = subprocess.run([*convert, "--float8", "raw"], check=False, capture_output=True)
    assert wrong.returncode == 2
    rows = json.loads(
        subprocess.run([*command, "inspect", str(source), "--json"], check=True, capture_output=True).stdout
    )
    marks = {row["name"]: row["float8"] for row in rows["tensors"]}
    expected: dict[str, str | None] = dict.fromkeys(pairs)
    expected |= dict.fromkeys(WEIGHTS, "weight") | {f"{name}_scale_inv": "scales" for name in WEIGHTS}
    assert marks == expected


@pytest.mark.parametrize("job", [tensorport.load_params, tensorport.load_params_shapes])
def test_values_that_the_option_does_not_have_are_refused(source: Path, tmp_path: Path, job: Any) -> None:
    with pytest.raises(ValueError, match="float8: found 'raw', expected one of 'keep', 'dequantize'"):
        job(source, float8="raw")
    with pytest.raises(ValueError, match="float8: found 'raw'"):
        tensorport.convert(source, tmp_path / "tree", float8="raw", progress=False)  # type: ignore[arg-type]
