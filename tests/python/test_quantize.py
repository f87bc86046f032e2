"""convert(mxfp4="quantize"): bytes, errors and configurations against what NumPy and ml_dtypes make of the values."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorport
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tensorport import mxfp4

Write = Callable[..., Path]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Options = dict[str, Any]

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
RULES = ("floor", "ceil", "nearest")


def encode(values: NDArray[Any], rule: str) -> tuple[Bytes, Bytes]:
    """Blocks and scales by arithmetic on the exponents of float64 and by ml_dtypes' cast to E2M1."""
    groups = values.astype(np.float64).reshape(*values.shape[:-1], -1, 32)
    amax = abs(groups).max(-1)
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(amax)  # mantissa in [0.5, 1)
    up = {"floor": mantissa > 1, "ceil": mantissa > 0.75, "nearest": mantissa >= 0.875}[rule]
    # floor(log2(amax)) is exponent - 1; 2 is the exponent of the largest code, 6; 127 the bias of a scale byte.
    scales = np.clip(exponent - 1 - 2 + up + 127, 0, 252)
    scales = np.where(amax == 0, 0, scales)
    scales = np.where(np.isinf(amax), 254, np.where(np.isnan(amax), 255, scales))
    is_nan = np.isnan(amax)[..., None]
    codes = to_e2m1(np.ldexp(np.where(is_nan, 0.0, groups), 127 - scales[..., None]))
    codes = np.where(is_nan, 0, codes)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8), scales.astype(np.uint8)


def to_e2m1(scaled: Floats) -> Bytes:
    """Codes nearest to values that were divided by their scale."""
    # ml_dtypes may come from float64 by way of float32. One step towards odd lets the second rounding be the only one.
    with np.errstate(over="ignore", under="ignore"):
        nearest = scaled.astype(np.float32)
    inexact = nearest.astype(np.float64) != scaled
    other = np.nextafter(nearest, np.where(nearest > scaled, -np.inf, np.inf).astype(np.float32))
    is_even = nearest.view(np.uint32) % 2 == 0
    odd = np.where(inexact & is_even & np.isfinite(scaled), other, nearest)
    codes = odd.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & np.uint8(0xF)
    # An infinity is no number of E2M1; it saturates like any other.
    return np.where(np.isinf(scaled), np.where(scaled > 0, 7, 15), codes).astype(np.uint8)


def decode(blocks: Bytes, scales: Bytes) -> Floats:
    """The exact values, by the dtypes of ml_dtypes."""
    codes = np.stack([blocks & 0xF, blocks >> 4], -1).reshape(*blocks.shape[:-1], 32)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    decoded = values * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[..., None]
    return np.asarray(decoded.reshape(*scales.shape[:-1], -1))


def errors(values: NDArray[Any], blocks: Bytes, scales: Bytes) -> dict[str, Any]:
    """What quantizing lost, with NumPy's sums in float64."""
    source = values.astype(np.float64)
    is_finite = np.isfinite(source).reshape(*scales.shape, 32).all(-1).repeat(32, -1).reshape(source.shape)
    kept = source[is_finite]
    lost = kept - decode(blocks, scales)[is_finite]
    noise = (lost**2).sum()
    return {
        "mse": float((lost**2).mean()) if kept.size else None,
        "sqnr_db": float(10 * np.log10((kept**2).sum() / noise)) if noise else None,
        "max_error": float(abs(lost).max(initial=0)),
        "nonfinite": int((~np.isfinite(source)).sum()),
    }


def assert_same_error(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    assert (found["max_error"], found["nonfinite"]) == (expected["max_error"], expected["nonfinite"])
    for figure in ("mse", "sqnr_db"):
        assert found[figure] == (None if expected[figure] is None else pytest.approx(expected[figure], rel=1e-12))


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> NDArray[Any]:
    """Numbers over many exponents; blocks of zeros, with NaNs and infinities; ties and the values beside them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * np.exp2(rng.integers(-14, 12, (*shape[:-1], 1)))
    flat = values.reshape(-1, 32)
    flat[0] = 0
    flat[1, ::2] = -0.0
    flat[1, 1::2] = 0.0
    flat[2, 5] = np.nan
    flat[3, 7], flat[3, 9] = np.inf, -np.inf
    flat[4, 3], flat[4, 4] = np.inf, np.nan
    # Under the scale of 4: halfway between codes, and as near to that as the dtype allows.
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.0], np.float64)
    finfo = ml_dtypes.finfo(DTYPES[dtype])  # type: ignore[no-untyped-call]
    eps = float(finfo.eps)
    flat[5] = np.concatenate([ties, -ties, ties * (1 + eps), ties * (1 - eps / 2)])
    # Where the rules differ: amax at and beside 6, 7 and 8 times a power of two.
    for row, amax in enumerate([6.0, 6 * (1 + eps), 7 * (1 - eps / 2), 7.0, 8 * (1 - eps / 2), 8.0]):
        flat[6 + row] = rng.uniform(-1, 1, 32)
        flat[6 + row, 11] = amax
    flat[12] = rng.integers(-9, 10, 32) * float(finfo.smallest_subnormal)
    flat[13] = rng.uniform(-1, 1, 32) * float(finfo.max)
    return values.astype(DTYPES[dtype])


def entries(tree: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = json.loads((tree / "manifest.json").read_bytes())["tensors"]
    return tensors


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_errors_are_those_of_numpy_and_ml_dtypes(
    tmp_path: Path, write_safetensors: Write, dtype: str, rule: Any
) -> None:
    arrays = {"m.two": numbers((37, 192), dtype, 1), "m.three": numbers((3, 11, 96), dtype, 2)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    tree = tmp_path / "tree"
    report = tensorport.convert(
        source, tree, mxfp4="quantize", quantize="m.*", scale_rule=rule, shard_size=1e-6, progress=False
    )
    checkpoint, told = tensorport.open(tree), entries(tree)
    assert set(checkpoint) == {f"{name}_{half}" for name in arrays for half in ("blocks", "scales")}
    for name, array in arrays.items():
        blocks, scales = encode(array, rule)
        assert checkpoint[f"{name}_blocks"].shape == (*array.shape[:-1], array.shape[-1] // 32, 16)
        np.testing.assert_array_equal(checkpoint[f"{name}_scales"], scales)
        np.testing.assert_array_equal(checkpoint[f"{name}_blocks"], blocks)
        assert {0, 254, 255} <= set(scales.ravel().tolist())
        entry = told[f"{name}_blocks"]
        assert (entry["dtype"], entry["source_dtype"]) == ("uint8", dtype)
        assert len(entry["files"]) > 1
        assert "quantization" not in told[f"{name}_scales"]
        # The squares of the last rows of float64 are beyond it.
        if dtype != "float64":
            assert_same_error(entry["quantization"], errors(array, blocks, scales))
        reported = dict(report.quantization[name])
        assert reported.pop("compression") == array.nbytes / (blocks.nbytes + scales.nbytes)
        assert reported == entry["quantization"]
    assert checkpoint.total_parameters == sum(array.size for array in arrays.values())
    assert tensorport.verify(tree, source, progress=False).ok


def test_errors_of_float64_are_those_of_numpy_where_squares_fit(tmp_path: Path, write_safetensors: Write) -> None:
    array = np.random.default_rng(3).normal(size=(513, 224)) * np.exp2(np.arange(513) % 90 - 45)[:, None]
    source = write_safetensors(tmp_path / "m.safetensors", {"w": array})
    report = tensorport.convert(source, tmp_path / "tree", mxfp4="quantize", quantize=["w"], progress=False)
    expected = errors(array, *encode(array, "floor"))
    assert 10 < expected["sqnr_db"] < 30
    assert_same_error({key: value for key, value in report.quantization["w"].items() if key != "compression"}, expected)


def test_a_real_models_matrices_load_as_quantized_arrays(tmp_path: Path, minilm: Path) -> None:
    tree = tmp_path / "tree"
    report = tensorport.convert(minilm, tree, mxfp4="quantize", quantize=["*.weight"], shard_size=0.01, progress=False)
    theirs = load_file(minilm / "model.safetensors")
    matrices = {name for name, array in theirs.items() if name.endswith(".weight") and array.ndim == 2}
    assert set(report.quantization) == matrices
    assert report.total_parameters == sum(array.size for array in theirs.values())
    # JAX holds the one integer tensor in 32 bits alone.
    params = tensorport.load_params(tree, nested=False, exclude="*.position_ids")
    del theirs["embeddings.position_ids"]
    assert set(params) == set(theirs)
    for name, array in theirs.items():
        if name in matrices:
            blocks, scales = encode(array, "floor")
            assert isinstance(params[name], mxfp4.MXFP4Array)
            assert params[name].shape == array.shape
            assert_same_error(
                {key: value for key, value in report.quantization[name].items() if key != "compression"},
                errors(array, blocks, scales),
            )
            decoded = decode(np.asarray(params[name].blocks), np.asarray(params[name].scales))
            np.testing.assert_array_equal(decoded, decode(blocks, scales))
        else:
            assert np.asarray(params[name]).tobytes() == array.tobytes()
    dense = tensorport.load_params(tree, nested=False, mxfp4="dequantize", dtype="float32", include="*.weight")
    for name in matrices:
        assert isinstance(dense[name], jax.Array)
        np.testing.assert_array_equal(np.asarray(dense[name]), decode(*encode(theirs[name], "floor")))
    config = json.loads((tree / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "mxfp4", "modules_to_not_convert": []}
    assert report.edited_files == ("config.json",)
    assert tensorport.verify(tree, minilm, progress=False).ok


EXPERTS = ["*.experts.gate_up_proj", "*.experts.down_proj"]
EXPERTS_LAST = {"gate_up_proj", "down_proj"}


def test_what_was_mxfp4_before_comes_back_without_error(tmp_path: Path, golden_hf: Path) -> None:
    dense, tree, again = tmp_path / "dense", tmp_path / "tree", tmp_path / "again"
    tensorport.convert(golden_hf, dense, mxfp4="dequantize", precision="float32", progress=False)
    report = tensorport.convert(dense, tree, mxfp4="quantize", quantize=EXPERTS, progress=False)
    tensorport.convert(tree, again, mxfp4="dequantize", precision="float32", progress=False)
    before, after = tensorport.open(dense), tensorport.open(again)
    assert set(before) == set(after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert len(report.quantization) == 8
    for error in report.quantization.values():
        assert (error["mse"], error["sqnr_db"], error["max_error"]) == (0, None, 0)
    assert report.total_parameters == tensorport.open(golden_hf).total_parameters
    config = json.loads((tree / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": modules_in_order(dense, lambda name: name.rpartition(".")[2] not in EXPERTS_LAST),
    }
    assert {"model.layers.*.mlp.router", "model.layers.*.self_attn.q_proj", "model.embed_tokens", "lm_head"} <= set(
        config["quantization_config"]["modules_to_not_convert"]
    )


def modules_in_order(source: Path, is_kept: Callable[[str], bool]) -> list[str]:
    modules: dict[str, None] = {}
    for name, spec in tensorport.open(source).specs.items():
        if len(spec.shape) in (2, 3) and is_kept(name):
            module = name.removesuffix(".weight")
            modules[".".join("*" if part.isdecimal() else part for part in module.split("."))] = None
    return list(modules)


def test_pairs_of_the_source_stay_beside_new_ones(tmp_path: Path, golden_hf: Path) -> None:
    tree = tmp_path / "tree"
    report = tensorport.convert(golden_hf, tree, mxfp4="quantize", quantize="*q_proj*", progress=False)
    ours, theirs = tensorport.open(tree), tensorport.open(golden_hf)
    assert sorted(report.quantization) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)]
    pairs = [name for name in theirs if name.endswith(("_blocks", "_scales"))]
    assert len(pairs) == 16
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in pairs)
    for name in report.quantization:
        blocks, scales = encode(theirs[name], "floor")
        np.testing.assert_array_equal(ours[f"{name}_blocks"], blocks)
        np.testing.assert_array_equal(ours[f"{name}_scales"], scales)
    assert ours.total_parameters == theirs.total_parameters
    modules = json.loads((tree / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.*.self_attn.k_proj" in modules
    assert not any("q_proj" in module for module in modules)
    assert tensorport.verify(tree, golden_hf, progress=False).ok


def test_precision_is_for_what_is_not_quantized(tmp_path: Path, write_safetensors: Write) -> None:
    # Under the scale of 5, 2.5 + 2^-20 is nearer to 3 than to 2; as bfloat16 it would be 2.5, a tie.
    array = np.linspace(-5, 5, 64, dtype=np.float32).reshape(2, 32)
    array[0, 1] = 2.5 + 2**-20
    source = write_safetensors(tmp_path / "m.safetensors", {"w": array, "bias": array[0], "kept.w": array})
    tensorport.convert(source, tmp_path / "tree", precision="bfloat16", mxfp4="quantize", quantize="w", progress=False)
    checkpoint = tensorport.open(tmp_path / "tree")
    blocks, scales = encode(array, "floor")
    assert (encode(array.astype(ml_dtypes.bfloat16), "floor")[0] != blocks).any()
    np.testing.assert_array_equal(checkpoint["w_blocks"], blocks)
    np.testing.assert_array_equal(checkpoint["w_scales"], scales)
    assert checkpoint["bias"].dtype == checkpoint["kept.w"].dtype == ml_dtypes.bfloat16


def test_a_glob_that_matches_nothing_beside_one_that_does_is_named(tmp_path: Path, write_safetensors: Write) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {"a.weight": np.ones((3, 64), np.float32)})
    with pytest.warns(UserWarning, match=r'quantize: no tensor matches "typo\*"'):
        tensorport.convert(source, tmp_path / "tree", mxfp4="quantize", quantize=["a.weight", "typo*"], progress=False)


def test_a_matrix_of_nan_has_no_error_to_report(tmp_path: Path, write_safetensors: Write) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {"a": np.full((2, 32), np.nan, np.float32)})
    report = tensorport.convert(source, tmp_path / "tree", mxfp4="quantize", quantize="a", progress=False)
    assert report.quantization["a"]["mse"] is None
    assert "a: 7.53 times smaller, no values to compare, 64 NaNs and infinities" in repr(report)


def test_what_cannot_be_quantized_is_kept_and_named(tmp_path: Path, write_safetensors: Write) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "a.weight": np.ones((3, 64), np.float32),
        "b.weight": np.ones((64, 33), np.float32),
        "c.weight": np.ones((2, 3, 4, 32), np.float32),
        "norm.weight": np.ones(64, np.float32),
        "ids.weight": np.ones((3, 64), np.int32),
    }
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    with pytest.warns(UserWarning, match=r'"b\.weight" is not quantized.*33'):
        report = tensorport.convert(source, tmp_path / "tree", mxfp4="quantize", quantize="*", progress=False)
    assert len(report.warnings) == 1
    assert list(report.quantization) == ["a.weight"]
    checkpoint = tensorport.open(tmp_path / "tree")
    for name in set(arrays) - {"a.weight"}:
        assert checkpoint[name].tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mxfp4": "quantize"}, "quantize"),
        ({"mxfp4": "quantize", "quantize": []}, "quantize"),
        ({"mxfp4": "quantize", "quantize": None}, "quantize"),
        ({"mxfp4": "quantize", "quantize": ["a["]}, "quantize"),
        ({"quantize": "*"}, "quantize"),
        ({"quantize": []}, "quantize"),
        ({"mxfp4": "dequantize", "quantize": "*"}, "quantize"),
        ({"scale_rule": "floor"}, "scale_rule"),
        ({"mxfp4": "dequantize", "scale_rule": "ceil"}, "scale_rule"),
        ({"mxfp4": "quantize", "quantize": "*", "scale_rule": "round"}, "scale_rule.*'round'"),
        ({"mxfp4": "quantise", "quantize": "*"}, "mxfp4.*'quantise'"),
    ],
)
def test_arguments_that_do_not_fit_are_value_errors(tiny: Path, tmp_path: Path, options: Options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tensorport.convert(tiny, tmp_path / "tree", progress=False, **options)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("globs", [3, [3], ["*", None], b"*"])
def test_globs_that_are_no_text_are_type_errors(tiny: Path, tmp_path: Path, globs: Any) -> None:
    with pytest.raises(TypeError):
        tensorport.convert(tiny, tmp_path / "tree", mxfp4="quantize", quantize=globs, progress=False)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("globs", [["nothing*"], ["*norm*"], ["*_blocks"]])
def test_globs_that_choose_no_matrix_are_a_mapping_error(tiny: Path, tmp_path: Path, globs: list[str]) -> None:
    with pytest.raises(tensorport.MappingError, match="quantize"):
        tensorport.convert(tiny, tmp_path / "tree", mxfp4="quantize", quantize=globs, progress=False)


@pytest.mark.parametrize("other", ["w_blocks", "w_scales"])
def test_a_name_that_is_taken_is_a_checkpoint_error(tmp_path: Path, write_safetensors: Write, other: str) -> None:
    arrays = {"w": np.ones((2, 32), np.float32), other: np.ones(3, np.float32)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    with pytest.raises(tensorport.CheckpointError, match=other):
        tensorport.convert(source, tmp_path / "tree", mxfp4="quantize", quantize="w", progress=False)


def test_hostile_names_are_quantized_like_others(tmp_path: Path, write_safetensors: Write) -> None:
    array = np.arange(64, dtype=np.float32).reshape(2, 32)
    names = ["../../x", "", "a\0b", "\x1b[31m", "*", "[", "con", "é.0.weight"]
    source = write_safetensors(tmp_path / "m.safetensors", dict.fromkeys(names, array))
    report = tensorport.convert(source, tmp_path / "tree", mxfp4="quantize", quantize="*", progress=False)
    assert set(report.quantization) == set(names)
    assert "\x1b" not in repr(report)
    params = tensorport.load_params(tmp_path / "tree", nested=False)
    assert set(params) == set(names)
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "tree"}


# Configurations


@pytest.fixture
def model(tmp_path: Path, write_safetensors: Write) -> Path:
    """Three layers of which the first is another one, as in mixtures of experts with dense layers."""
    folder = tmp_path / "model"
    folder.mkdir()
    array = np.ones((4, 32), np.float32)
    names = ["embed.weight", "layers.0.gate_proj.weight"]
    for layer in (1, 2):
        names += [f"layers.{layer}.{name}.weight" for name in ("gate", "q", "experts.0.up", "experts.1.up")]
        names += [f"layers.{layer}.sinks"]
    write_safetensors(folder / "m.safetensors", dict.fromkeys(names, array))
    return folder


def config_after(model: Path, tree: Path, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    (model / "config.json").write_text(json.dumps(config))
    report = tensorport.convert(model, tree, mxfp4="quantize", progress=False, **options)
    assert report.edited_files == ("config.json",)
    edited: dict[str, Any] = json.loads((tree / "config.json").read_text())
    assert tensorport.verify(tree, model, progress=False).ok
    return edited


def test_the_configuration_lists_what_is_not_quantized(model: Path, tmp_path: Path) -> None:
    config = config_after(
        model, tmp_path / "tree", {"a": 1, "dtype": "float32"}, quantize=["*.up.weight", "*.gate_proj*"]
    )
    assert config == {
        "a": 1,
        "dtype": "float32",
        "quantization_config": {
            "quant_method": "mxfp4",
            # "layers.*.gate" would be the beginning of layers.0.gate_proj too, which is quantized.
            "modules_to_not_convert": ["embed", "layers.1.gate", "layers.*.q", "layers.*.sinks", "layers.2.gate"],
        },
    }


def test_layers_that_differ_are_listed_one_by_one(model: Path, tmp_path: Path) -> None:
    config = config_after(model, tmp_path / "tree", {}, quantize="layers.1.*")
    assert config["quantization_config"]["modules_to_not_convert"] == [
        "embed",
        "layers.*.gate_proj",
        "layers.2.gate",
        "layers.2.q",
        "layers.2.experts.0.up",
        "layers.2.experts.1.up",
        "layers.2.sinks",
    ]


@pytest.mark.parametrize("earlier", [None, {"quant_method": "mxfp4", "modules_to_not_convert": ["x"], "more": [1]}])
def test_an_earlier_quantization_of_the_same_method_is_replaced(
    model: Path, tmp_path: Path, earlier: dict[str, Any] | None
) -> None:
    config = config_after(model, tmp_path / "tree", {"quantization_config": earlier, "z": 1}, quantize="*")
    assert config == {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}, "z": 1}
    assert list(config) == ["quantization_config", "z"]


@pytest.mark.parametrize("earlier", [{"quant_method": "fp8"}, {}, {"quant_method": 4}, "mxfp4", ["mxfp4"], 4])
def test_another_quantization_is_refused(model: Path, tmp_path: Path, earlier: Any) -> None:
    (model / "config.json").write_text(json.dumps({"quantization_config": earlier}))
    with pytest.raises(tensorport.CheckpointError, match=r"config\.json.*quantization_config"):
        tensorport.convert(model, tmp_path / "tree", mxfp4="quantize", quantize="*", progress=False)
    assert not (tmp_path / "tree").exists()
    tensorport.convert(model, tmp_path / "kept", progress=False)


def test_a_cast_of_the_rest_corrects_the_dtype_too(model: Path, tmp_path: Path) -> None:
    config = config_after(model, tmp_path / "tree", {"dtype": "float32"}, quantize="*.up.*", precision="bfloat16")
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == "mxfp4"


# Manifests, reports, the command line


def test_other_conversions_have_none_of_the_new_fields(tiny: Path, tmp_path: Path) -> None:
    report = tensorport.convert(tiny, tmp_path / "tree", progress=False)
    assert report.quantization == {}
    text = (tmp_path / "tree" / "manifest.json").read_text()
    assert '"quantization"' not in text
    assert '"quantize"' not in text
    assert "scale_rule" not in text


def test_the_manifest_says_how_it_was_quantized(model: Path, tmp_path: Path) -> None:
    for number, rule in enumerate([None, *RULES]):
        tree = tmp_path / str(number)
        options: Options = {} if rule is None else {"scale_rule": rule}
        tensorport.convert(model, tree, mxfp4="quantize", quantize="*.up.*", progress=False, **options)
        told = json.loads((tree / "manifest.json").read_text())["options"]
        assert (told["mxfp4"], told["quantize"], told["scale_rule"]) == ("quantize", ["*.up.*"], rule or "floor")
    assert files(tmp_path / "0") == files(tmp_path / "1")


def test_reports_show_the_error_of_each_matrix(tmp_path: Path, write_safetensors: Write) -> None:
    arrays = {"w.a": numbers((5, 192), "float32"), "w.b": np.ones((3, 32), np.float32)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    report = tensorport.convert(source, tmp_path / "tree", mxfp4="quantize", quantize="w.*", progress=False)
    told = json.loads(report.to_json())["quantization"]
    assert told == {name: dict(error) for name, error in report.quantization.items()}
    assert set(told["w.a"]) == {"mse", "sqnr_db", "max_error", "nonfinite", "compression"}
    for text in (repr(report), report._repr_html_()):
        assert f"w.a: 7.53 times smaller, SQNR {told['w.a']['sqnr_db']:.2f} dB" in text
        assert "5 NaNs and infinities" in text
        assert "w.b: 7.53 times smaller, no error" in text


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tensorport", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_line_quantizes_as_the_function_does(model: Path, tmp_path: Path) -> None:
    flags = ["--mxfp4", "quantize", "--quantize", "*.up.weight", "--quantize", "*.q.*", "--scale-rule", "ceil"]
    done = run("convert", "--input", model, "--output", tmp_path / "shell", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layers.1.q.weight: quantized, 7.53 times smaller, no error" in done.stdout
    globs = ["*.up.weight", "*.q.*"]
    report = tensorport.convert(
        model, tmp_path / "python", mxfp4="quantize", quantize=globs, scale_rule="ceil", progress=False
    )
    assert files(tmp_path / "shell") == files(tmp_path / "python")
    done = run("convert", "--input", model, "--output", tmp_path / "json", *flags, "--json")
    assert json.loads(done.stdout)["quantization"] == report.quantization


# Order, interruption, verification, splits


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB in 307 tensors, dense: some tenths of a second of work."""
    folder = tmp_path_factory.mktemp("large")
    fields: Options = {"num_hidden_layers": 16, "vocab_size": 30_000, "num_local_experts": 20}
    model = tensorport.synthesize(folder / "model", "tiny", progress=False, **fields)
    tensorport.convert(model, folder / "dense", mxfp4="dequantize", precision="float32", progress=False)
    return folder / "dense"


SMALL: Options = {"mxfp4": "quantize", "quantize": [*EXPERTS, "*proj.weight", "model.embed*"], "shard_size": 0.0005}


@pytest.fixture(scope="module")
def whole(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    tree = tmp_path_factory.mktemp("whole") / "tree"
    report = tensorport.convert(large, tree, progress=False, **SMALL)
    assert len(report.quantization) > 90
    assert len(entries(tree)["model.embed_tokens.weight_blocks"]["files"]) > 1
    return files(tree)


@pytest.mark.parametrize(("workers", "max_memory"), [(1, 150_000), (2, 64_000_000), (8, 1_100_000)])
def test_any_number_of_workers_writes_the_same_bytes(
    large: Path, tmp_path: Path, whole: dict[str, bytes], workers: int, max_memory: int
) -> None:
    options: Options = {"workers": workers, "max_memory": max_memory, "progress": False, **SMALL}
    tensorport.convert(large, tmp_path / "tree", **options)
    assert files(tmp_path / "tree") == whole


CONVERT = """
import json, sys, tensorport
source, output, options = sys.argv[1:]
tensorport.convert(source, output, progress=False, **json.loads(options))
"""


@pytest.mark.parametrize("lines", [1, 40, 150, 250])
def test_a_killed_conversion_resumes_to_the_same_bytes(
    large: Path, tmp_path: Path, whole: dict[str, bytes], lines: int
) -> None:
    output, journal = tmp_path / "tree", tmp_path / "tree" / "journal.jsonl"
    options = {**SMALL, "workers": 2, "max_memory": 300_000}
    child = subprocess.Popen([sys.executable, "-c", CONVERT, str(large), str(output), json.dumps(options)])
    while child.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") <= lines):
        time.sleep(0.0002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    known = {line["tensor"]: line for line in map(json.loads, journal.read_text().splitlines()[1:])}
    assert len(known) >= lines
    encoded = {name for name in known if name.endswith("_blocks")}
    assert all(("quantization" in line) == (name in encoded) for name, line in known.items())
    report = tensorport.convert(large, output, resume=True, progress=False, **options)
    assert report.resumed_tensors == len(known)
    assert {name.removesuffix("_blocks") for name in encoded} <= set(report.quantization)
    assert files(output) == whole


def test_blocks_in_a_journal_without_their_error_are_done_again(
    large: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    output, journal = tmp_path / "tree", tmp_path / "tree" / "journal.jsonl"

    class Stop(Exception):  # noqa: N818 - what a user's callback raises need not be an error
        pass

    def stop(_: tensorport.ProgressEvent) -> None:
        if journal.exists() and journal.read_bytes().count(b'"quantization"') > 3:
            raise Stop

    with pytest.raises(Stop):
        tensorport.convert(large, output, **{**SMALL, "progress": stop})
    head, *lines = journal.read_text().splitlines()
    told = [json.loads(line) for line in lines]
    missing = sum(line.pop("quantization", None) is not None for line in told)
    journal.write_text("\n".join([head, *map(json.dumps, told)]) + "\n")
    report = tensorport.convert(large, output, resume=True, progress=False, **SMALL)
    assert report.resumed_tensors == len(told) - missing
    assert files(output) == whole


def test_options_that_differ_are_no_resume(model: Path, tmp_path: Path) -> None:
    options: Options = {"mxfp4": "quantize", "progress": False}
    tensorport.convert(model, tmp_path / "tree", quantize="*.up.*", **options)
    others: list[Options] = [{"quantize": "*.q.*"}, {"quantize": "*.up.*", "scale_rule": "nearest"}]
    for other in others:
        with pytest.raises(tensorport.ConversionError, match="another conversion"):
            tensorport.convert(model, tmp_path / "tree", resume=True, **options, **other)
    same = tensorport.convert(model, tmp_path / "tree", quantize=["*.up.*"], scale_rule="floor", resume=True, **options)
    assert len(same.quantization) == 4


@pytest.fixture
def quantized(tmp_path: Path, write_safetensors: Write) -> tuple[Path, Path]:
    """A source and a tree of it, of which a matrix is split."""
    arrays = {"w": numbers((20, 192), "float32"), "kept": np.ones((3, 5), np.float32)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    options: Options = {"mxfp4": "quantize", "quantize": "w", "shard_size": 1e-6, "progress": False}
    tensorport.convert(source, tmp_path / "tree", **options)
    return source, tmp_path / "tree"


def failures(tree: Path, source: Path | None) -> set[tuple[str, str | None]]:
    report = tensorport.verify(tree, source, progress=False)
    return {(failure.file, failure.tensor) for failure in report.failures}


@pytest.mark.parametrize("with_source", [False, True])
def test_a_flipped_bit_is_found_and_named(quantized: tuple[Path, Path], with_source: bool) -> None:
    source, tree = quantized
    assert len(entries(tree)["w_blocks"]["files"]) == 2
    for name in ("w_blocks", "w_scales"):
        for file in entries(tree)[name]["files"]:
            content = bytearray((tree / file).read_bytes())
            for place in (130, -1):
                content[place] ^= 16
                (tree / file).write_bytes(content)
                assert failures(tree, source if with_source else None) == {(file, name)}
                content[place] ^= 16
            (tree / file).write_bytes(content)
    assert failures(tree, source) == set()


# Each with whether it is found without the source, and the tensor that is named.
EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], bool, str]] = {
    "another mse": (lambda t: error(t).update(mse=error(t)["mse"] * 0.99), False, "w_blocks"),
    "another sqnr_db": (lambda t: error(t).update(sqnr_db=error(t)["sqnr_db"] + 1e-9), False, "w_blocks"),
    "another max_error": (lambda t: error(t).update(max_error=error(t)["max_error"] * 1.01), False, "w_blocks"),
    "another nonfinite": (lambda t: error(t).update(nonfinite=4), False, "w_blocks"),
    "mse beyond max_error": (lambda t: error(t).update(mse=1e300), True, "w_blocks"),
    "a negative mse": (lambda t: error(t).update(mse=-1.0), True, "w_blocks"),
    "a negative max_error": (lambda t: error(t).update(max_error=-1.0), True, "w_blocks"),
    "no error but noise": (lambda t: error(t).update(mse=0.0, max_error=0.0), True, "w_blocks"),
    "more nonfinite than values": (lambda t: error(t).update(nonfinite=3841), True, "w_blocks"),
    "left out": (lambda t: t["w_blocks"].pop("quantization"), True, "w_blocks"),
    "of scales": (lambda t: t["w_scales"].update(quantization=error(t)), True, "w_scales"),
    "of another tensor": (lambda t: t["kept"].update(quantization=error(t)), True, "kept"),
}


def error(tensors: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tensors["w_blocks"]["quantization"]
    return found


def rewrite(tree: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the tensors of a manifest and makes its own hash hold again."""
    content = json.loads((tree / "manifest.json").read_bytes())
    del content["manifest_xxh3_128"]
    edit(content["tensors"])
    covered = json.dumps(content)[:-1].encode() + b",\n"
    own = f'  "manifest_xxh3_128": "{xxhash.xxh3_128_hexdigest(covered)}"\n}}\n'
    (tree / "manifest.json").write_bytes(covered + own.encode())


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_error_is_found(quantized: tuple[Path, Path], name: str) -> None:
    source, tree = quantized
    edit, is_found_alone, tensor = EDITS[name]
    rewrite(tree, lambda _: None)
    assert failures(tree, source) == set()
    rewrite(tree, edit)
    assert failures(tree, source) == {("manifest.json", tensor)}
    assert failures(tree, None) == ({("manifest.json", tensor)} if is_found_alone else set())


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: error(t).update(mse="0"),
        lambda t: error(t).update(more=1),
        lambda t: error(t).pop("max_error"),
        lambda t: error(t).update(max_error=None),
        lambda t: error(t).update(nonfinite=-1),
        lambda t: t["w_blocks"].update(quantization=[1, 2, 3, 4, 5]),
    ],
)
def test_an_error_that_is_none_makes_the_manifest_malformed(
    quantized: tuple[Path, Path], edit: Callable[[dict[str, Any]], object]
) -> None:
    _, tree = quantized
    rewrite(tree, edit)
    assert failures(tree, None) == {("manifest.json", None)}
    with pytest.raises(tensorport.CheckpointError, match="manifest"):
        tensorport.open(tree)


def test_a_quantized_tree_can_be_converted_again(quantized: tuple[Path, Path], tmp_path: Path) -> None:
    _, tree = quantized
    tensorport.convert(tree, tmp_path / "again", progress=False)
    ours, theirs = tensorport.open(tmp_path / "again"), tensorport.open(tree)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert "quantization" not in entries(tmp_path / "again")["w_blocks"]
    assert tensorport.verify(tmp_path / "again", tree, progress=False).ok
    shutil.rmtree(tmp_path / "again")
