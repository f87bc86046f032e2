"""Sharded loads on eight host devices: each holds its slice, and only bytes that some device holds are read."""

import re
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
from tensorport import _core, buffers, load
from tensorport.mxfp4 import MXFP4Array
from tensorport.streaming import Callback

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


def model_tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    return {
        "embed.w": random_array((24, 96), ml_dtypes.bfloat16, 1),
        "head.w": random_array((40, 65_536), np.uint8, 2),
        "moe.w_blocks": rng.integers(0, 256, (8, 6, 4, 16), np.uint8),
        "moe.w_scales": rng.integers(100, 140, (8, 6, 4), np.uint8),
        "norm.w": random_array((13,), np.float32, 3),
        "scalar": np.array(3.5, np.float32),
        "f4": random_array((8, 10), np.uint8, 4),
    }


RULES = [("embed|head", P("x", "y")), (r"^moe\.w$", P("x", None, "y")), ("norm|scalar", P()), ("", P(("x",)))]


@pytest.fixture(params=["aligned", "misaligned", "tree", "split"])
def source(request: pytest.FixtureRequest, tmp_path: Path, write_safetensors: Callable[..., Path]) -> Path:
    """The same tensors in files that are mapped, in files that are read, and in files that hold parts."""
    path = write_safetensors(tmp_path / "m.safetensors", model_tensors())
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    misalign = (8 if request.param == "misaligned" else 0) - header
    path = write_safetensors(path, model_tensors(), misalign=misalign % 64)
    if request.param in ("aligned", "misaligned"):
        return path
    shard_size = 1.8 if request.param == "tree" else 1e-4
    tensorport.convert(path, tmp_path / "tree", shard_size=shard_size, progress=False)
    return tmp_path / "tree"


def assert_sharded(array: jax.Array, expected: np.ndarray[Any, Any], sharding: Any) -> None:
    """Each device holds its slice of `expected`, compared byte for byte."""
    assert array.sharding.is_equivalent_to(sharding, array.ndim)
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert len(array.addressable_shards) == len(sharding.device_set)
    for shard in array.addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(expected[shard.index]).tobytes()


def test_rules_place_every_leaf(source: Path, mesh: Mesh) -> None:
    tensors = model_tensors()
    params, report = tensorport.load_params(source, sharding=RULES, mesh=mesh, nested=False, return_report=True)
    blocks, scales = tensors.pop("moe.w_blocks"), tensors.pop("moe.w_scales")
    pair = params.pop("moe.w")
    assert isinstance(pair, MXFP4Array)
    assert_sharded(pair.blocks, blocks, NamedSharding(mesh, P("x", None, "y")))
    assert_sharded(pair.scales, scales, NamedSharding(mesh, P("x", None, "y")))
    for name, array in params.items():
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        assert_sharded(array, tensors[name], NamedSharding(mesh, spec))
    # The devices are all here: nothing is read twice, and what several hold is read once.
    assert report.nbytes == sum(array.nbytes for array in [*tensors.values(), blocks, scales])
    assert report.mapped_bytes + report.bytes_read <= report.nbytes + 1
    # A sharded computation sees the same values.
    total = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32).sum(), tree))(params)
    assert np.isclose(float(total["norm.w"]), float(tensors["norm.w"].astype(np.float64).sum()))


def test_shards_of_a_leading_axis_lie_in_the_file(tmp_path: Path, mesh: Mesh, write_safetensors: Any) -> None:
    tensors = {"w": random_array((8, 5, 64), ml_dtypes.bfloat16, 1)}
    tensorport.convert(write_safetensors(tmp_path / "m.safetensors", tensors), tmp_path / "tree", progress=False)
    sharding = NamedSharding(mesh, P(("x", "y")))
    params, report = tensorport.load_params(tmp_path / "tree", sharding=sharding, return_report=True)
    assert_sharded(params["w"], tensors["w"], sharding)
    assert (report.mapped_bytes, report.shared_bytes, report.bytes_read) == (report.nbytes, report.nbytes, 0)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in params["w"].addressable_shards]
    assert np.diff(pointers).tolist() == [5 * 64 * 2] * 7
    # The last axis is in pieces in the file.
    params, report = tensorport.load_params(
        tmp_path / "tree", sharding=NamedSharding(mesh, P(None, None, "x")), return_report=True
    )
    assert_sharded(params["w"], tensors["w"], NamedSharding(mesh, P(None, None, "x")))
    assert (report.mapped_bytes, report.reasons) == (0, {"not in one piece": 4})
    assert report.bytes_read == tensors["w"].nbytes


def test_one_device_of_many_reads_its_part_alone(tmp_path: Path, write_safetensors: Any) -> None:
    # What a process reads whose devices hold part of an array: the first device of a mesh stands for it.
    tensors = {"w": random_array((6, 16, 81_920), np.uint8, 1)}
    path = write_safetensors(tmp_path / "m.safetensors", tensors, misalign=8)

    checkpoint = tensorport.open(path)
    for region, expected in [
        ([(0, 6), (0, 8), (0, 81_920)], 6 * 8 * 81_920),
        ([(0, 6), (0, 16), (0, 40_960)], 6 * 16 * 40_960),
        # Gaps of 20,480 bytes are too short to be left out; the one at each end of the tensor is too.
        ([(0, 6), (0, 16), (0, 61_440)], 6 * 16 * 81_920),
        ([(2, 3), (4, 5), (100, 200)], 100),
    ]:
        results, bytes_read = checkpoint._core.read(
            [(["w"], "none", [region])], on_overflow="error", workers=2, memory=_core.Memory(), callback=None
        )
        index = tuple(slice(*bounds) for bounds in region)
        assert results[0][0][0].tobytes() == np.ascontiguousarray(tensors["w"][index]).tobytes()
        assert bytes_read == expected


@pytest.mark.parametrize("number", [0, 3])
def test_a_device_or_its_sharding_places_everything_there(source: Path, number: int) -> None:
    device = jax.devices()[number]
    for sharding in (device, SingleDeviceSharding(device), lambda *_: device, lambda *_: SingleDeviceSharding(device)):
        params = tensorport.load_params(source, sharding=sharding, mxfp4="raw", nested=False)
        assert_same(params, model_tensors())
        assert all(array.devices() == {device} and array.committed for array in params.values())


def test_without_a_sharding_arrays_are_on_the_default_device_and_free(source: Path) -> None:
    params = tensorport.load_params(source, mxfp4="raw", nested=False)
    assert all(array.devices() == {jax.devices()[0]} and not array.committed for array in params.values())
    with jax.default_device(jax.devices()[5]):
        params = tensorport.load_params(source, mxfp4="raw", nested=False)
    assert_same(params, model_tensors())
    assert all(array.devices() == {jax.devices()[5]} for array in params.values())


def test_a_callable_sees_names_and_logical_shapes(source: Path, mesh: Mesh) -> None:
    seen = {}

    def choose(name: str, struct: jax.ShapeDtypeStruct) -> NamedSharding | None:
        seen[name] = (struct.shape, struct.dtype.name)
        return NamedSharding(mesh, P("x")) if struct.shape[:1] == (24,) else None

    params = tensorport.load_params(source, sharding=choose, rename=[("^embed", "tokens")], nested=False)
    assert seen["tokens.w"] == ((24, 96), "bfloat16")
    assert seen["moe.w"] == ((8, 6, 128), "bfloat16")
    assert params["tokens.w"].sharding.spec == P("x")
    assert not params["head.w"].committed


def test_rules_see_the_new_names_and_the_first_match_wins(source: Path, mesh: Mesh) -> None:
    rules = [("tokens", P("x")), ("^embed", P("y")), (re.compile("w$"), P()), (".*", P())]
    params = tensorport.load_params(
        source, sharding=rules, mesh=mesh, rename=[("^embed", "tokens")], include=["embed*", "head*"], nested=False
    )
    assert params["tokens.w"].sharding.spec == P("x")
    assert params["head.w"].sharding.spec == P()


def test_everything_that_does_not_fit_is_told_at_once(source: Path, mesh: Mesh) -> None:
    rules = [("embed", P(None, ("x", "y"))), ("norm", P("x")), ("moe", P(None, None, ("x", "y"))), ("head", P("y"))]
    with pytest.raises(tensorport.MappingError) as caught:
        tensorport.load_params(source, sharding=rules, mesh=mesh)
    lines = str(caught.value).splitlines()
    assert lines[0] == "sharding does not fit:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["moe.w", "norm.w", "scalar", "f4"]
    assert "MXFP4 [8, 6, 128] in blocks of 32" in lines[1]
    assert "[13] under P" in lines[2]
    assert "no rule that matches" in lines[3]
    with pytest.raises(tensorport.MappingError, match=r"scalar: found \[\] under"):
        tensorport.load_params(source, sharding=NamedSharding(mesh, P("x")))


@pytest.mark.parametrize(
    ("sharding", "has_mesh", "error", "message"),
    [
        ([("a", P())], False, ValueError, "mesh: found None"),
        (None, True, ValueError, "mesh: found a mesh without rules"),
        (lambda *_: None, True, ValueError, "mesh: found a mesh without rules"),
        (P("x"), True, TypeError, "PartitionSpec"),
        ("x", True, TypeError, "'x'"),
        (3, False, TypeError, "3"),
        ([("a", "x")], True, TypeError, "('a', 'x')"),
        ([("(", P())], True, ValueError, "'('"),
        (lambda *_: "cpu", False, TypeError, "'cpu' for"),
    ],
)
def test_shardings_that_are_none_are_refused(  # noqa: PLR0917
    source: Path, mesh: Mesh, sharding: Any, has_mesh: bool, error: Any, message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tensorport.load_params(source, sharding=sharding, mesh=mesh if has_mesh else None)


def test_an_abstract_mesh_stands_for_the_one_in_force(source: Path, mesh: Mesh) -> None:
    rules = [("embed", P("x")), ("", P())]
    abstract = mesh.abstract_mesh
    with pytest.raises(tensorport.MappingError, match=r"embed\.w: found an abstract mesh"):
        tensorport.load_params(source, sharding=rules, mesh=abstract)
    with jax.set_mesh(mesh):
        params = tensorport.load_params(source, sharding=rules, mesh=abstract, nested=False)
    assert_sharded(params["embed.w"], model_tensors()["embed.w"], NamedSharding(mesh, P("x")))


def test_casts_and_decodes_are_sharded_too(tmp_path: Path, golden_hf: Path, mesh: Mesh) -> None:
    def choose(_: str, struct: jax.ShapeDtypeStruct) -> NamedSharding:
        # Every axis that four or two divide, the last one above all: decoded, it need not be split between blocks.
        spec: list[str | None] = [None] * len(struct.shape)
        for axis_name, size in (("x", 4), ("y", 2)):
            for axis in reversed(range(len(spec))):
                if spec[axis] is None and struct.shape[axis] % size == 0:
                    spec[axis] = axis_name
                    break
        return NamedSharding(mesh, P(*spec))

    whole = tensorport.load_params(golden_hf, mxfp4="dequantize", dtype="float32", nested=False)
    tensorport.convert(golden_hf, tmp_path / "tree", shard_size=2e-5, progress=False)
    for path in (golden_hf, tmp_path / "tree"):
        params = tensorport.load_params(path, mxfp4="dequantize", dtype="float32", sharding=choose, nested=False)
        assert set(params) == set(whole)
        for name, array in params.items():
            assert_sharded(array, np.asarray(whole[name]), array.sharding)
        assert any(array.sharding.spec[-1] == "x" for name, array in params.items() if "experts" in name)


def test_float4_is_sharded_between_the_halves_of_a_byte(
    tmp_path: Path, mesh: Mesh, write_safetensors: Callable[..., Path]
) -> None:
    data = np.random.default_rng(5).integers(0, 256, 4 * 12 // 2, np.uint8)
    path = write_safetensors(tmp_path / "f4.safetensors", {"x": ("F4", (4, 12), data.tobytes())})
    codes = np.stack([data & 15, data >> 4], -1).reshape(4, 12).view(ml_dtypes.float4_e2m1fn)
    sharding = NamedSharding(mesh, P("y", "x"))
    params = tensorport.load_params(path, sharding=sharding)
    for shard in params["x"].addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(codes[shard.index]).tobytes()


def test_what_jax_copies_may_be_replicated(tmp_path: Path, mesh: Mesh, write_safetensors: Callable[..., Path]) -> None:
    # JAX on CPU shares neither float4 nor misaligned memory: one buffer is copied to several devices.
    codes = np.random.default_rng(5).integers(0, 256, 8, np.uint8)
    plain = random_array((4, 6), np.float32, 1)
    path = write_safetensors(tmp_path / "m.safetensors", {"f4": ("F4", (16,), codes.tobytes()), "w": plain})
    sharding = NamedSharding(mesh, P("x"))
    params, report = tensorport.load_params(path, sharding=sharding, io="map", return_report=True)
    expected = np.stack([codes & 15, codes >> 4], -1).reshape(16).view(ml_dtypes.float4_e2m1fn)
    assert_sharded(params["f4"], expected, sharding)
    assert_sharded(params["w"], plain, sharding)
    assert report.reasons == {"converted": 4}


def test_shapes_carry_their_shardings(source: Path, mesh: Mesh) -> None:
    shapes = tensorport.load_params_shapes(source, sharding=RULES, mesh=mesh)
    assert shapes["embed"]["w"].sharding == NamedSharding(mesh, P("x", "y"))
    assert shapes["moe"]["w"].blocks.sharding == NamedSharding(mesh, P("x", None, "y"))
    # What jit compiles for, without a tensor in memory.
    lowered = jax.jit(lambda tree: tree["embed"]["w"] * 2).lower(shapes)
    assert lowered.compile() is not None


def test_batches_on_their_way_to_an_accelerator_arrive_whole(
    source: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The host stands for an accelerator.
    monkeypatch.setattr(load._Loading, "_is_host", lambda *_: False)
    monkeypatch.setattr(load, "_BATCH_BYTES", 3000)
    monkeypatch.setattr(load, "_IN_FLIGHT_BYTES", 7000)
    events: list[tensorport.ProgressEvent] = []
    params, report = tensorport.load_params(
        source, sharding=RULES, mesh=mesh, nested=False, return_report=True, progress=events.append
    )
    tensors = model_tensors()
    pair = params.pop("moe.w")
    assert np.array_equal(pair.blocks, tensors.pop("moe.w_blocks"))
    assert np.array_equal(pair.scales, tensors.pop("moe.w_scales"))
    assert_same({name: jax.device_put(array, jax.devices()[0]) for name, array in params.items()}, tensors)
    assert (report.mapped_bytes, report.bytes_read) == (0, report.nbytes)
    assert events[-1].bytes_done == events[-1].bytes_total == report.nbytes
    # A fault of the reading thread is the caller's.
    monkeypatch.setattr(load._Loading, "_deliver", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tensorport.load_params(source)


def test_batches_are_made_in_one_pass(
    tmp_path: Path, write_safetensors: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Mixtures of experts have tens of thousands of tensors: nothing may count all of them again for each.
    monkeypatch.setattr(load._Loading, "_is_host", lambda *_: False)
    monkeypatch.setattr(load, "_BATCH_BYTES", 50)
    counted = 0
    nbytes = load._Array.nbytes.fget  # type: ignore[attr-defined]

    def count(array: Any) -> Any:
        nonlocal counted
        counted += 1
        return nbytes(array)

    monkeypatch.setattr(load._Array, "nbytes", property(count))
    tensors = {f"w{number}": np.array([number], np.int16) for number in range(600)}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    assert_same(tensorport.load_params(path, progress=lambda _: None), tensors)
    assert counted <= 20 * len(tensors)


def test_tensors_are_done_when_all_their_parts_are(
    tmp_path: Path, mesh: Mesh, write_safetensors: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: random_array((4, 64), np.uint8, 1) for name in "abcdef"}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    fill = buffers.Reader.fill

    def report_parts(reader: Any, buffers: Any, callback: Callback) -> None:
        # Eight columns of each tensor are read as items of their own; two tensors are whole, a third one begun.
        callback("load", 0, 0, 20, 48, "c")
        fill(reader, buffers, callback)

    monkeypatch.setattr(buffers.Reader, "fill", report_parts)
    events: list[tensorport.ProgressEvent] = []
    sharding = NamedSharding(mesh, P(None, ("x", "y")))
    tensorport.load_params(path, sharding=sharding, io="read", progress=events.append)
    assert (events[0].tensors_done, events[0].tensors_total) == (2, 6)
    assert (events[-1].tensors_done, events[-1].tensors_total) == (6, 6)
