"""What a checkpoint's tensors become: dtypes, casts, MXFP4 pairs, selection and names."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorport
from arrays import assert_same, random_array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tensorport.mxfp4 import MXFP4Array

Write = Callable[..., Path]


def test_every_dtype_of_safetensors_that_jax_has_arrives_bit_for_bit(
    tmp_path: Path, write_safetensors: Write, safetensors_dtypes: dict[str, tuple[np.dtype[Any], int]]
) -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for tag, (dtype, bits) in safetensors_dtypes.items():
        data = rng.integers(0, 2 if tag == "BOOL" else 256, 24 * bits // 8, np.uint8).tobytes()
        tensors[tag] = (tag, (4, 6), data)
        if bits == 8 * dtype.itemsize:
            expected[tag] = np.frombuffer(data, dtype).reshape(4, 6)
    nibbles = np.frombuffer(tensors["F4"][2], np.uint8)
    codes = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(4, 6)
    expected["F4"] = codes.view(ml_dtypes.float4_e2m1fn)
    path = write_safetensors(tmp_path / "all.safetensors", tensors)
    with jax.enable_x64(True):
        params = tensorport.load_params(path, nested=False, exclude="F6_*")
        assert set(params) == set(tensors) - {"F6_E2M3", "F6_E3M2"}
        for tag, array in params.items():
            assert (array.dtype, array.shape) == (expected[tag].dtype, (4, 6)), tag
            assert np.asarray(array).tobytes() == expected[tag].tobytes(), tag


def test_float6_with_which_jax_cannot_compute_is_refused_by_name(tmp_path: Path, write_safetensors: Write) -> None:
    path = write_safetensors(tmp_path / "f6.safetensors", {"x": ("F6_E2M3", (4,), b"abc"), "y": np.zeros(3, np.int8)})
    with pytest.raises(tensorport.MappingError, match=r"x \(float6_e2m3fn\).*exclude"):
        tensorport.load_params(path)
    assert list(tensorport.load_params(path, exclude="x")) == ["y"]


def test_float4_of_odd_rows_keeps_its_order(tmp_path: Path, write_safetensors: Write) -> None:
    path = write_safetensors(tmp_path / "f4.safetensors", {"x": ("F4", (2, 3), b"\x10\x32\x54")})
    array = tensorport.load_params(path)["x"]
    assert array.astype(jnp.float32).tolist() == [[0.0, 0.5, 1.0], [1.5, 2.0, 3.0]]


def test_64_bit_numbers_are_narrowed_only_with_a_warning_that_names_them(
    tmp_path: Path, write_safetensors: Write
) -> None:
    tensors: dict[str, Any] = {
        "ids": np.array([-5, 7], np.int64),
        "sizes": np.array([2**32 - 1], np.uint64),
        "w": np.array([1.5, 1e-300], np.float64),
        "plain": np.zeros(2, np.float32),
    }
    path = write_safetensors(tmp_path / "wide.safetensors", tensors)
    with pytest.warns(UserWarning, match=re.escape("ids (int64), sizes (uint64), w (float64)")) as caught:
        params, report = tensorport.load_params(path, return_report=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert {name: array.dtype.name for name, array in params.items()} == {
        "ids": "int32",
        "sizes": "uint32",
        "w": "float32",
        "plain": "float32",
    }
    assert params["ids"].tolist() == [-5, 7]
    assert params["sizes"].tolist() == [2**32 - 1]
    assert report.underflow == {"w": 1}
    with pytest.warns(UserWarning, match="jax_enable_x64"):
        shapes = tensorport.load_params_shapes(path)
    assert {name: struct.dtype for name, struct in shapes.items()} == {n: a.dtype for n, a in params.items()}
    # A cast that was asked for is no surprise.
    with pytest.warns(UserWarning, match=re.escape("ids (int64), sizes (uint64)")) as caught:
        tensorport.load_params(path, dtype="float32")
    assert "w (" not in str(caught[0].message)
    with jax.enable_x64(True):
        params = tensorport.load_params(path)
        assert {name: array.dtype for name, array in params.items()} == {
            n: np.dtype(a.dtype) for n, a in tensors.items()
        }


@pytest.mark.filterwarnings("ignore:JAX holds 64-bit")
def test_integers_beyond_32_bits_are_an_error_unless_they_may_saturate(
    tmp_path: Path, write_safetensors: Write
) -> None:
    path = write_safetensors(tmp_path / "big.safetensors", {"ids": np.array([2**31, -(2**40), 3], np.int64)})
    with pytest.raises(tensorport.ConversionError, match=r'"ids".*2 finite values beyond int32'):
        tensorport.load_params(path)
    with pytest.warns(UserWarning, match="ids: 2 values overflowed"):
        params = tensorport.load_params(path, on_overflow="saturate")
    assert params["ids"].tolist() == [2**31 - 1, -(2**31), 3]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_casts_are_those_of_convert(tmp_path: Path, minilm: Path, name: Any) -> None:
    tensorport.convert(minilm, tmp_path / "tree", precision=name, progress=False)
    with pytest.warns(UserWarning, match="position_ids"):
        params, report = tensorport.load_params(minilm, dtype=name, nested=False, return_report=True)
    converted = tensorport.open(tmp_path / "tree")
    for tensor, array in params.items():
        if tensor != "embeddings.position_ids":
            assert array.dtype == jnp.dtype(name)
            assert np.asarray(array).tobytes() == converted[tensor].tobytes(), tensor
    manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())["tensors"]
    assert report.underflow == {n: info["underflow"] for n, info in manifest.items() if info["underflow"]}


def test_overflow_fails_warns_or_saturates(tmp_path: Path, write_safetensors: Write) -> None:
    values = np.array([1.0, 1e6, -1e6, np.inf, np.nan], np.float32)
    path = write_safetensors(tmp_path / "big.safetensors", {"w": values, "ok": values[:1], "n": np.zeros(3, np.int8)})
    with pytest.raises(tensorport.ConversionError, match=r'"w".*2 finite values beyond float16'):
        tensorport.load_params(path, dtype="float16")
    with pytest.warns(UserWarning, match="w: 2 values overflowed"):
        params, report = tensorport.load_params(path, dtype=jnp.float16, on_overflow="warn", return_report=True)
    assert np.isposinf(params["w"][1])
    assert np.isneginf(params["w"][2])
    assert report.overflow == {"w": 2}
    with pytest.warns(UserWarning, match="w: 2 values overflowed"):
        params = tensorport.load_params(path, dtype=np.float16, on_overflow="saturate")
    assert params["w"][1:3].tolist() == [65504.0, -65504.0]
    assert np.isposinf(params["w"][3])
    assert np.isnan(params["w"][4])
    assert params["n"].dtype == jnp.int8
    with pytest.raises(ValueError, match="dtype: found int32, expected float16, bfloat16 or float32"):
        tensorport.load_params(path, dtype="int32")


def mxfp4_tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(2)
    return {
        "m.w_scales": rng.integers(100, 140, (3, 5, 2), np.uint8),
        "m.norm": random_array((7,), np.float32, 1),
        "m.w_blocks": rng.integers(0, 256, (3, 5, 2, 16), np.uint8),
        "lone_blocks": rng.integers(0, 256, (2, 4, 16), np.uint8),
    }


def test_pairs_become_one_array_two_or_a_dense_one(tmp_path: Path, write_safetensors: Write) -> None:
    tensors = mxfp4_tensors()
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    keep = tensorport.load_params(path)
    assert set(keep) == {"m", "lone_blocks"}
    w = keep["m"]["w"]
    assert isinstance(w, MXFP4Array)
    assert (w.shape, w.dtype) == ((3, 5, 64), jnp.bfloat16)
    assert np.array_equal(w.blocks, tensors["m.w_blocks"])
    assert np.array_equal(w.scales, tensors["m.w_scales"])
    assert isinstance(w.blocks, jax.Array)
    raw = tensorport.load_params(path, mxfp4="raw", nested=False)
    assert_same(raw, tensors)
    with pytest.raises(tensorport.CheckpointError, match="lone_blocks"):
        tensorport.load_params(path, mxfp4="dequantize")
    for dtype in (None, "float32", "bfloat16", "float16"):
        tree = tmp_path / f"tree-{dtype}"
        tensorport.convert(
            path,
            tree,
            mxfp4="dequantize",
            precision=dtype or "source",
            exclude="lone*",
            progress=False,
        )
        dense = tensorport.load_params(path, mxfp4="dequantize", dtype=dtype, exclude="lone*", nested=False)
        assert_same(dense, tensorport.open(tree))
        assert dense["m.w"].dtype == jnp.dtype(dtype or "bfloat16")


def test_a_pair_goes_by_the_name_of_its_tensor(tmp_path: Path, write_safetensors: Write) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", mxfp4_tensors())
    assert list(tensorport.load_params(path, include="m.w", nested=False)) == ["m.w"]
    assert list(tensorport.load_params(path, include="m.w_*", mxfp4="raw", nested=False)) == [
        "m.w_scales",
        "m.w_blocks",
    ]
    with pytest.raises(tensorport.MappingError, match=r"none of them selected.*'m\.w_\*'"):
        tensorport.load_params(path, include="m.w_*")
    renamed = tensorport.load_params(path, exclude="lone*", rename={"m.w": "experts.up"})
    assert isinstance(renamed["experts"]["up"], MXFP4Array)
    assert set(renamed["m"]) == {"norm"}


def test_a_tensor_with_the_name_of_a_pair_is_refused(tmp_path: Path, write_safetensors: Write) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", mxfp4_tensors() | {"m.w": np.zeros(3, np.float32)})
    with pytest.raises(tensorport.MappingError, match=r"'m\.w' both as a tensor and as an MXFP4 pair"):
        tensorport.load_params(path)
    assert len(tensorport.load_params(path, mxfp4="raw", nested=False)) == 5


def test_names_split_at_dots_unless_they_are_to_stay_whole(misaligned: Path) -> None:
    nested = tensorport.load_params(misaligned)
    assert list(nested) == ["a", "b", "c"]
    assert list(nested["b"]) == ["f8", "mask", "one", "ragged"]
    flat = tensorport.load_params(misaligned, nested=False)
    assert list(flat) == list(tensorport.open(misaligned))


def test_a_name_that_goes_on_where_another_ends_is_refused(tmp_path: Path, write_safetensors: Write) -> None:
    tensors = {"a.b.c": np.zeros(1, np.int8), "a": np.ones(2, np.int8)}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(tensorport.MappingError, match=r"'a' and 'a\.b\.c'.*nested=False"):
        tensorport.load_params(path)
    other = write_safetensors(tmp_path / "other.safetensors", dict(reversed(tensors.items())))
    with pytest.raises(tensorport.MappingError, match=r"'a' and 'a\.b\.c'.*nested=False"):
        tensorport.load_params(other)
    assert_same(tensorport.load_params(path, nested=False), tensors)
    assert set(tensorport.load_params(path, rename={"a": "z"})) == {"a", "z"}


def test_include_and_exclude_are_globs_on_full_names(misaligned: Path) -> None:
    params = tensorport.load_params(misaligned, include=["a.*", "b.*"], exclude="*e", nested=False)
    assert list(params) == ["a.w", "b.f8", "b.mask", "b.ragged"]
    with pytest.raises(ValueError, match=r"include.*a\["):
        tensorport.load_params(misaligned, include="a[")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("a.", "x.").replace("late", "l"),
        {"a.w": "x.w", "a.scale": "x.scale", "c.late": "c.l"},
        [(r"^a\.", "x."), (re.compile("late"), "l")],
        [(r"^(a)\.", r"\1x."), (r"^ax", "x"), ("ate$", "")],
    ],
)
def test_names_change_by_a_callable_a_dict_or_rules(misaligned: Path, rename: Any) -> None:
    params = tensorport.load_params(misaligned, rename=rename, nested=False)
    assert list(params) == ["x.w", "x.scale", "b.f8", "b.mask", "b.one", "b.ragged", "c.l"]


@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        (lambda _: "one", tensorport.MappingError, r"one \(from a\.w, a\.scale"),
        ({"a.v": "x"}, tensorport.MappingError, "'a.v'"),
        ([("(", "x")], ValueError, r"'\('"),
        ([("a", r"\9")], ValueError, r"the replacement '\\\\9' \(invalid group reference 9.*, expected one for 'a'"),
        (("a", "b"), TypeError, "'a'"),
        ("a", TypeError, "'a'"),
        (7, TypeError, "7"),
        (lambda _: None, TypeError, "None for 'a.w'"),
    ],
)
def test_renaming_that_cannot_be_is_refused(misaligned: Path, rename: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        tensorport.load_params(misaligned, rename=rename)


def test_shapes_are_those_of_the_params(golden_hf: Path) -> None:
    for arguments in ({}, {"mxfp4": "dequantize", "dtype": "float32"}, {"mxfp4": "raw", "nested": False}):
        shapes = tensorport.load_params_shapes(golden_hf, **arguments)
        params = tensorport.load_params(golden_hf, **arguments)
        assert [path for path, _ in jax.tree.leaves_with_path(shapes)] == [
            path for path, _ in jax.tree.leaves_with_path(params)
        ]
        for struct, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(params), strict=True):
            assert isinstance(struct, jax.ShapeDtypeStruct)
            assert (struct.shape, struct.dtype) == (array.shape, array.dtype)


def test_shapes_start_no_backend(golden_hf: Path) -> None:
    script = """
import sys, tensorport
assert "jax" not in sys.modules
tensorport.load_params_shapes(sys.argv[1])
import jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script, golden_hf], check=True)


def test_without_jax_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("raise ImportError('No module named jax')")
    script = """
import tensorport
for name in ("load_params", "load_params_shapes", "mxfp4"):
    assert name in dir(tensorport)
    try:
        getattr(tensorport, name)
    except ImportError as fault:
        assert "pip install 'tensorport[jax]'" in str(fault), fault
    else:
        raise AssertionError(name)
try:
    tensorport.nothing
except AttributeError as fault:
    assert "'tensorport' has no attribute 'nothing'" in str(fault)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_empty_tensors_scalars_and_empty_checkpoints_load(tmp_path: Path, write_safetensors: Write) -> None:
    tensors = {"none": np.zeros((0, 3), np.float32), "one": np.array(2.5, np.float32), "b": np.array(True)}
    for io in ("auto", "map", "read"):
        params = tensorport.load_params(write_safetensors(tmp_path / "m.safetensors", tensors), nested=False, io=io)
        assert_same(params, tensors)
    assert tensorport.load_params(write_safetensors(tmp_path / "empty.safetensors", {})) == {}


@pytest.mark.parametrize("load", [tensorport.load_params, tensorport.load_params_shapes])
def test_empty_arrays_that_a_wider_dtype_makes_too_large_are_refused(
    tmp_path: Path, write_safetensors: Write, load: Callable[..., Any]
) -> None:
    tensors = {"w": ("F16", (0, 1 << 61), b""), "x_blocks": ("U8", (0, 1 << 57, 16), b"")}
    tensors["x_scales"] = ("U8", (0, 1 << 57), b"")
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(tensorport.CheckpointError, match=r"m\.safetensors: tensor 'w': found float32 \[0, 2305843"):
        load(path, dtype="float32")
    with pytest.raises(tensorport.CheckpointError, match=r"tensor 'x_blocks': found bfloat16 .*below 2\^63 bytes"):
        load(path, mxfp4="dequantize", include="x")


def test_names_in_messages_cannot_steer_a_terminal(tmp_path: Path, write_safetensors: Write) -> None:
    name = "\x1b[31m\u202ew"
    path = write_safetensors(tmp_path / "m.safetensors", {name: np.full((3,), 1 << 40)})
    with pytest.warns(UserWarning, match="loaded in 32 bits|overflowed") as caught:
        tensorport.load_params(path, on_overflow="saturate")
    messages = [str(warning.message) for warning in caught]
    with pytest.warns(UserWarning, match="loaded in 32 bits"):  # noqa: SIM117
        with pytest.raises(tensorport.ConversionError) as overflow:
            tensorport.load_params(path)
    messages.append(str(overflow.value))
    sharding = SingleDeviceSharding(jax.devices()[0])
    two = write_safetensors(tmp_path / "two.safetensors", {name: np.ones(3, np.int8), name + "x": np.ones(3, np.int8)})
    f6 = write_safetensors(tmp_path / "f6.safetensors", {name: ("F6_E2M3", (4,), bytes(3))})
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    for source, options in (
        (f6, {}),
        (two, {"rename": lambda _: name}),
        (two, {"target": {"a": jax.ShapeDtypeStruct((3,), np.int8, sharding=sharding)}}),
        (two, {"sharding": NamedSharding(mesh, PartitionSpec("x"))}),
    ):
        with pytest.raises(tensorport.MappingError) as fault:
            tensorport.load_params(source, **options)
        messages.append(str(fault.value))
    assert len(messages) == 7
    for message in messages:
        assert "[31m" in message
        assert all(character.isprintable() or character == "\n" for character in message), message


@pytest.mark.parametrize(
    ("option", "error"),
    [({"io": "mmap"}, ValueError), ({"workers": 0}, ValueError), ({"on_overflow": "ignore"}, ValueError)],
)
def test_shapes_refuse_what_loading_refuses(misaligned: Path, option: dict[str, Any], error: Any) -> None:
    for load in (tensorport.load_params, tensorport.load_params_shapes):
        with pytest.raises(error, match=next(iter(option))):
            load(misaligned, **option)


def test_names_of_very_many_components_take_one_pass(tmp_path: Path, write_safetensors: Write) -> None:
    # Every prefix as a text of its own would be 20 GB.
    name = ".".join("a" * 200_000)
    shapes = tensorport.load_params_shapes(write_safetensors(tmp_path / "m.safetensors", {name: np.ones(3, np.int8)}))
    for _ in range(200_000):
        (shapes,) = shapes.values()
    assert shapes.shape == (3,)
