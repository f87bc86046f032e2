"""MXFP4: which tensors form a pair, and that pairs decode exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import tensorport
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Write = Callable[..., Path]
Bytes = NDArray[np.uint8]
DTYPES = {"source": ml_dtypes.bfloat16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
NAMINGS = [("_blocks", "_scales"), (".blocks", ".scales")]


def decode(blocks: Bytes, scales: Bytes) -> NDArray[np.float64]:
    """The exact values, by the dtypes of ml_dtypes: low nibble first, one scale for 32 codes."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    values: NDArray[np.float64] = codes.reshape(*scales.shape, 32) * factors[..., None]
    return values.reshape(*scales.shape[:-1], 32 * scales.shape[-1])


def random_pair(*groups_shape: int, seed: int = 0) -> tuple[Bytes, Bytes]:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*groups_shape, 16), dtype=np.uint8)
    return blocks, rng.integers(115, 130, groups_shape, dtype=np.uint8)


def every_code_under_every_scale() -> tuple[Bytes, Bytes]:
    """[2, 32, 4, 16] and [2, 32, 4]: each of the 256 blocks has all 16 codes, in another order."""
    scales = np.arange(256, dtype=np.uint8).reshape(2, 32, 4)
    order = np.stack([np.random.default_rng(seed).permutation(16) for seed in range(512)]).astype(np.uint8)
    codes = order.reshape(256, 32)
    blocks = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return blocks.reshape(2, 32, 4, 16), scales


def dequantize(source: Path, tree: Path, **options: Any) -> tensorport.Checkpoint:
    tensorport.convert(source, tree, mxfp4="dequantize", progress=False, **options)
    return tensorport.open(tree)


def assert_same_values(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    is_number = ~np.isnan(expected)
    width = f"u{found.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(width)[is_number], expected.view(width)[is_number])


@pytest.mark.parametrize("precision", ["source", "bfloat16", "float32", "float16"])
@pytest.mark.parametrize("on_overflow", ["warn", "saturate"])
def test_every_code_under_every_scale_decodes_bit_for_bit(
    tmp_path: Path,
    write_safetensors: Write,
    precision: Literal["source", "bfloat16", "float32", "float16"],
    on_overflow: Literal["warn", "saturate"],
) -> None:
    blocks, scales = every_code_under_every_scale()
    source = write_safetensors(tmp_path / "m.safetensors", {"w_blocks": blocks, "w_scales": scales})
    options: dict[str, Any] = {"precision": precision, "on_overflow": on_overflow}
    if on_overflow == "warn":
        with pytest.warns(UserWarning, match='"w"'):
            checkpoint = dequantize(source, tmp_path / "tree", **options)
    else:
        checkpoint = dequantize(source, tmp_path / "tree", **options)
    exact, dtype = decode(blocks, scales), np.dtype(DTYPES[precision])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = exact.astype(dtype)
        lost = np.isfinite(exact) & np.isinf(expected)
        vanished = (exact != 0) & (expected == 0)
    if on_overflow == "saturate":
        largest = {"float16": 65504.0, "float32": float(np.finfo(np.float32).max)}.get(precision, 255 * 2.0**120)
        expected[lost] = np.copysign(largest, exact[lost]).astype(dtype)
    assert_same_values(checkpoint["w"], expected)
    assert np.isnan(checkpoint["w"][1, 31, -32:]).all()
    info = json.loads((tmp_path / "tree" / "manifest.json").read_text())["tensors"]["w"]
    assert (info["overflow"], info["underflow"]) == (lost.sum(), vanished.sum())
    assert (info["source_dtype"], info["dtype"]) == ("mxfp4", dtype.name)
    if dtype.itemsize == 4 or dtype == ml_dtypes.bfloat16:
        # Exact up to scale 252; 4 and 6 overflow under 253, 2 and 3 too under 254, each with both signs and twice.
        assert (checkpoint["w"].astype(np.float64) == exact)[scales.repeat(32, axis=-1) <= 252].all()
        assert lost.sum() == (2 + 4) * 2 * 2
        assert vanished.sum() == 0


def test_overflowing_pairs_are_an_error_by_default(tmp_path: Path, write_safetensors: Write) -> None:
    blocks, scales = random_pair(3, 5, 2)
    scales[:] = 125
    scales[2, 4, 1] = 254
    blocks[2, 4, 1] = 0x22
    blocks[2, 4, 1, 3] = 0x7F
    source = write_safetensors(tmp_path / "m.safetensors", {"w_blocks": blocks, "w_scales": scales})
    with pytest.raises(tensorport.ConversionError, match=r'"w": found 2 finite values beyond bfloat16.*1\.02.*e39'):
        dequantize(source, tmp_path / "tree")


@pytest.mark.parametrize("suffixes", NAMINGS)
@pytest.mark.parametrize("place", ["scales first", "blocks first", "files", "files, scales first"])
def test_the_halves_of_a_pair_may_stand_anywhere(
    tmp_path: Path, write_safetensors: Write, suffixes: tuple[str, str], place: str
) -> None:
    blocks, scales = random_pair(3, 5, 2)
    pair = [(f"m.w{suffixes[0]}", blocks), (f"m.w{suffixes[1]}", scales)]
    if "scales first" in place:
        pair.reverse()
    other = {"m.b": np.arange(7, dtype=np.float32)}
    source = tmp_path / "source"
    source.mkdir()
    if place.startswith("files"):
        write_safetensors(source / "1.safetensors", dict(pair[:1]))
        write_safetensors(source / "2.safetensors", other | dict(pair[1:]))
    else:
        write_safetensors(source / "1.safetensors", {**dict(pair[:1]), **other, **dict(pair[1:])})
    checkpoint = dequantize(source, tmp_path / "tree")
    assert set(checkpoint) == {"m.w", "m.b"}
    assert_same_values(checkpoint["m.w"], decode(blocks, scales).astype(ml_dtypes.bfloat16))
    assert checkpoint["m.b"].tobytes() == other["m.b"].tobytes()
    assert checkpoint.total_parameters == tensorport.open(source).total_parameters == 3 * 5 * 64 + 7
    assert checkpoint.stored_elements == 3 * 5 * 64 + 7
    assert tensorport.verify(tmp_path / "tree", source, progress=False).ok
    tensorport.convert(source, tmp_path / "kept", mxfp4="keep", progress=False)
    kept = tensorport.open(tmp_path / "kept")
    assert list(kept) == list(tensorport.open(source))
    assert kept[pair[0][0]].tobytes() == pair[0][1].tobytes()
    assert kept[pair[1][0]].tobytes() == pair[1][1].tobytes()


shapes = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(groups_shape=shapes, seed=st.integers(0, 999), shard_bytes=st.sampled_from([200, 5000, 10**9]))
def test_pairs_of_any_shape_decode(
    groups_shape: list[int],
    seed: int,
    shard_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
    write_safetensors: Write,
) -> None:
    blocks, scales = random_pair(*groups_shape, seed=seed)
    folder = tmp_path_factory.mktemp("pair")
    source = write_safetensors(folder / "m.safetensors", {"w_scales": scales, "w_blocks": blocks})
    expected = decode(blocks, scales).astype(np.float32)
    row_bytes = expected.nbytes // max(expected.shape[0], 1)
    if len(groups_shape) > 1 and row_bytes > shard_bytes:
        with pytest.warns(UserWarning, match="one row"):
            checkpoint = dequantize(source, folder / "tree", precision="float32", shard_size=shard_bytes / 1e9)
    else:
        checkpoint = dequantize(source, folder / "tree", precision="float32", shard_size=shard_bytes / 1e9)
    assert_same_values(checkpoint["w"], expected)


def test_large_pairs_decode_across_chunks_and_parts(tmp_path: Path, write_safetensors: Write) -> None:
    blocks, scales = random_pair(7, 300, 11)
    source = write_safetensors(tmp_path / "m.safetensors", {"w_blocks": blocks, "w_scales": scales})
    checkpoint = dequantize(source, tmp_path / "tree", workers=3, max_memory=400_000, shard_size=0.0007)
    assert len(checkpoint.specs["w"].files) == 3  # of 3, 3 and 1 rows
    assert_same_values(checkpoint["w"], decode(blocks, scales).astype(ml_dtypes.bfloat16))


U8 = np.uint8
MISFITS: dict[str, dict[str, NDArray[Any]]] = {
    "w_blocks": {"w_blocks": np.zeros((3, 2, 16), U8)},
    "w_scales": {"w_scales": np.zeros((3, 2), U8)},
    "w.blocks": {"w.blocks": np.zeros((3, 2, 16), U8), "w_scales": np.zeros((3, 2), np.float32)},
    "w_blocks is not 16 wide": {"w_blocks": np.zeros((3, 2, 8), U8), "w_scales": np.zeros((3, 2), U8)},
    "w_blocks has no groups": {"w_blocks": np.zeros(16, U8), "w_scales": np.zeros((), U8)},
    "w_scales of fewer groups": {"w_blocks": np.zeros((3, 2, 16), U8), "w_scales": np.zeros((3, 1), U8)},
    "w_scales transposed": {"w_blocks": np.zeros((3, 2, 16), U8), "w_scales": np.zeros((2, 3), U8)},
    "w_scales flat": {"w_blocks": np.zeros((3, 2, 16), U8), "w_scales": np.zeros(6, U8)},
    "w_scales are floats": {"w_blocks": np.zeros((3, 2, 16), U8), "w_scales": np.zeros((3, 2), np.float32)},
    "w_blocks are signed": {"w_blocks": np.zeros((3, 2, 16), np.int8), "w_scales": np.zeros((3, 2), U8)},
}


@pytest.mark.parametrize("case", MISFITS)
def test_half_pairs_and_misfits_are_refused_when_decoding_and_plain_when_kept(
    tmp_path: Path, write_safetensors: Write, case: str
) -> None:
    arrays = {**MISFITS[case], "fine": np.arange(7, dtype=np.float32)}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    with pytest.raises(tensorport.CheckpointError) as caught:
        dequantize(source, tmp_path / "decoded")
    for part in (str(source), f'"{case.split(maxsplit=1)[0]}"', "expected"):
        assert part in str(caught.value)
    tensorport.convert(source, tmp_path / "kept", progress=False)
    kept = tensorport.open(tmp_path / "kept")
    assert set(kept) == set(arrays)
    assert kept.total_parameters == sum(array.size for array in arrays.values())
    for name, array in arrays.items():
        assert (kept[name].dtype, kept[name].shape) == (array.dtype, array.shape)
    assert list(dequantize(source, tmp_path / "selected", include="fine")) == ["fine"]


def test_names_alone_make_no_pair(tmp_path: Path, write_safetensors: Write) -> None:
    arrays = {"w_blocks": np.arange(7, dtype=np.float32), "w_scales": np.arange(5, dtype=np.float32)}
    arrays["lone.scales"] = np.arange(3, dtype=np.float32)
    checkpoint = dequantize(write_safetensors(tmp_path / "m.safetensors", arrays), tmp_path / "tree")
    assert set(checkpoint) == set(arrays)
    np.testing.assert_array_equal(checkpoint["w_blocks"], arrays["w_blocks"])


@pytest.mark.parametrize("other", ["w", "w.blocks"])
def test_a_decoded_name_that_is_taken_is_refused(tmp_path: Path, write_safetensors: Write, other: str) -> None:
    blocks, scales = random_pair(3, 5, 2)
    arrays: dict[str, NDArray[Any]] = {"w_blocks": blocks, "w_scales": scales}
    arrays |= {"w": np.arange(7)} if other == "w" else {"w.blocks": blocks, "w.scales": scales}
    source = write_safetensors(tmp_path / "m.safetensors", arrays)
    with pytest.raises(tensorport.CheckpointError, match='"w": found two'):
        dequantize(source, tmp_path / "tree")


def test_decoded_experts_are_those_that_transformers_computes(tmp_path: Path, golden_hf: Path) -> None:
    golden = np.load(golden_hf / "golden.npz")["gate_up_0"]
    assert golden.shape == (2, 96, 320)
    checkpoint = dequantize(golden_hf, tmp_path / "tree", precision="float32", include="*.0.mlp.experts.gate_up_proj")
    decoded = checkpoint["model.layers.0.mlp.experts.gate_up_proj"]
    assert_same_values(decoded[:2], np.ascontiguousarray(golden.transpose(0, 2, 1)))


def test_both_layouts_decode_to_the_same_experts(tmp_path: Path, golden_hf: Path, golden_original: Path) -> None:
    ours = dequantize(golden_hf, tmp_path / "huggingface")
    theirs = dequantize(golden_original, tmp_path / "original")
    for layer in range(4):
        for name, original in (("gate_up_proj", "mlp1_weight"), ("down_proj", "mlp2_weight")):
            decoded = ours[f"model.layers.{layer}.mlp.experts.{name}"]
            assert decoded.shape == ((6, 320, 96) if name == "gate_up_proj" else (6, 96, 160))
            assert np.ptp(decoded.astype(np.float32)) > 0
            assert_same_values(decoded, theirs[f"block.{layer}.mlp.{original}"])
    assert ours.total_parameters == theirs.total_parameters == tensorport.open(golden_hf).total_parameters
