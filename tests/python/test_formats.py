"""convert(format=): each format is read by the library that it is of, comes back whole, and becomes any other."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint
import pytest
import safetensors
import tensorport
from format_cases import (
    FORMATS,
    SMALL_SHARDS,
    TAKE_ANY_TENSOR,
    RawTensor,
    as_arrays,
    empty,
    everything,
    files,
    manifest,
    raw,
)
from jax.sharding import NamedSharding, PartitionSpec

Write = Callable[..., Path]
Arrays = Mapping[str, np.ndarray[Any, Any]]

pytestmark = pytest.mark.filterwarnings("ignore:.*more than the shard size")

METADATA = {"format": "pt", "note": 'é "quoted" \\ \n'}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_safetensors: Write) -> Path:
    """What every format can hold. Not to be edited."""
    return write_safetensors(tmp_path_factory.mktemp("source") / "m.safetensors", everything(), METADATA)


@pytest.fixture(scope="module")
def trees(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source in every format, in several files. Not to be edited."""
    folder = tmp_path_factory.mktemp("trees")
    return {name: convert(source, folder / name, format=name, shard_size=SMALL_SHARDS) for name in FORMATS}


def convert(source: Path, output: Path, **options: Any) -> Path:
    assert tensorport.convert(source, output, progress=False, **options).verified
    return output


def by_pickle(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with path.open("rb") as file:
        arrays: dict[str, np.ndarray[Any, Any]] = pickle.load(file)
    return arrays


def by_safetensors(content: bytes) -> dict[str, dict[str, Any]]:
    return dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def test_flax_reads_msgpack_and_writes_the_same_bytes(
    tmp_path: Path, trees: dict[str, Path], write_safetensors: Write
) -> None:
    shards = sorted(trees["msgpack"].glob("shard_*.msgpack"))
    assert len(shards) > 5
    parts: list[dict[str, np.ndarray[Any, Any]]] = [flax.serialization.msgpack_restore(s.read_bytes()) for s in shards]
    assert_equal({name: array for part in parts for name, array in part.items()}, as_arrays(everything()))
    for shard, part in zip(shards, parts, strict=True):
        assert flax.serialization.msgpack_serialize(part, in_place=True) == shard.read_bytes()

    # More than 15 and more than 65,535 in a map, names of every length of prefix, and a size of each width.
    many: dict[str, RawTensor] = {f"many.{number}": ("U8", (1,), bytes([number % 251])) for number in range(65_537)}
    sizes = {f"{size}": raw("U8", (size,), size) for size in (0, 1, 4, 200, 220, 233, 240, 250, 65_500, 65_530, 70_000)}
    names = {"x" * length: raw("I16", (length, 0), 0) for length in (31, 32, 255, 256, 65_535, 65_536)}
    cases: list[dict[str, RawTensor]] = [many, {**sizes, **names}, {}]
    for number, tensors in enumerate(cases):
        path = write_safetensors(tmp_path / f"{number}.safetensors", tensors)
        tree = convert(path, tmp_path / str(number), format="msgpack")
        arrays = as_arrays(tensors)
        contents = [shard.read_bytes() for shard in tree.glob("*.msgpack")]
        assert contents == ([flax.serialization.msgpack_serialize(arrays, in_place=True)] if arrays else [])


def test_an_array_beyond_a_gigabyte_has_the_chunks_of_flax(tmp_path: Path) -> None:
    shape = (3, 180_000_007)
    nbytes = 2 * shape[0] * shape[1]
    assert 2**30 < nbytes < 2**31
    header = json.dumps({"large": {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + nbytes)
    tensorport.convert(tmp_path, tmp_path / "tree", format="msgpack", verify=False, progress=False)

    # Chunks by their sizes and their beginnings: the arrays themselves would take gigabytes of memory.
    def head(code: int, data: bytes) -> tuple[int, int, bytes]:
        return code, len(data), data[:HEAD_BYTES]

    def expected(chunk: np.ndarray[Any, Any]) -> tuple[int, int, bytes]:
        before = b"\x93" + msgpack.packb(chunk.shape) + msgpack.packb(chunk.dtype.name)
        before += b"\xc6" + chunk.nbytes.to_bytes(4, "big")
        assert len(before) < HEAD_BYTES
        return 1, len(before) + chunk.nbytes, before + bytes(HEAD_BYTES - len(before))

    tree = tmp_path / "tree" / "shard_000.msgpack"
    with tree.open("rb") as shard, mmap(shard.fileno(), 0, access=ACCESS_READ) as content:
        found = msgpack.unpackb(content, ext_hook=head)["large"]
    tree.unlink()
    chunked = flax.serialization._chunk(np.zeros(shape, ml_dtypes.bfloat16))
    assert list(found.pop("chunks").items()) == [(key, expected(chunk)) for key, chunk in chunked.pop("chunks").items()]
    assert list(found.items()) == list(chunked.items())


# More than what stands before the data of a chunk.
HEAD_BYTES = 64


def test_pickle_reads_jax_pickle(trees: dict[str, Path]) -> None:
    shards = sorted(trees["jax-pickle"].glob("shard_*.pkl"))
    assert len(shards) > 5
    found: dict[str, np.ndarray[Any, Any]] = {}
    for shard in shards:
        found |= by_pickle(shard)
    assert_equal(found, as_arrays(everything()))
    for array in found.values():
        assert type(array) is np.ndarray
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_the_data_of_pickles_is_aligned(trees: dict[str, Path]) -> None:
    tensors = manifest(trees["jax-pickle"])["tensors"]
    assert {offset % 64 for info in tensors.values() for offset in info["offsets"]} == {0}


def test_safetensors_reads_safetensors_byte_for_byte(trees: dict[str, Path]) -> None:
    tree, expected = trees["safetensors"], everything()
    shards = sorted(tree.glob("model-*.safetensors"))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    assert [shard.name for shard in shards] == names
    assert len(shards) > 5
    found: dict[str, RawTensor] = {}
    weight_map = {}
    for shard in shards:
        content = shard.read_bytes()
        header_bytes = 8 + int.from_bytes(content[:8], "little")
        assert header_bytes % 64 == 0
        with safetensors.safe_open(shard, "numpy") as opened:
            assert opened.metadata() == METADATA
        for name, tensor in by_safetensors(content).items():
            found[name] = expected[name][0], tuple(tensor["shape"]), bytes(tensor["data"])
            weight_map[name] = shard.name
            assert tensor["dtype"] == expected[name][0]
        entries = {name: entry for name, entry in json.loads(content[8:header_bytes]).items() if name in expected}
        for begin, end in (entry["data_offsets"] for entry in entries.values()):
            assert begin % 64 == 0 or (end - begin) % 64 != 0
    assert found == expected
    index = json.loads((tree / "model.safetensors.index.json").read_bytes())
    total = sum(len(content) for _, _, content in expected.values())
    assert index == {"metadata": {"total_size": total}, "weight_map": weight_map}


def test_elements_in_safetensors_are_aligned(source: Path, tmp_path: Path) -> None:
    tree = convert(source, tmp_path / "tree", format="safetensors")
    for name, info in manifest(tree)["tensors"].items():
        itemsize = max(1, info["nbytes"] // max(1, int(np.prod(info["shape"]))))
        assert info["offsets"][0] % itemsize == 0, name


# Dtypes that zarr has neither of its own nor as an extension.
BYTES_IN_ORBAX = {"dtypes.F4", "dtypes.F6_E2M3", "dtypes.F6_E3M2", "dtypes.F8_E8M0"}


def in_orbax() -> dict[str, np.ndarray[Any, Any]]:
    arrays = as_arrays(everything())
    return {name: array.view(np.uint8) if name in BYTES_IN_ORBAX else array for name, array in arrays.items()}


def flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


def test_orbax_restores_orbax_without_a_target(trees: dict[str, Path]) -> None:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(trees["orbax"])
        structure = checkpointer.metadata(trees["orbax"]).item_metadata.tree
    assert jax.tree.map(np.shape, restored) == jax.tree.map(np.shape, nested(in_orbax()))
    assert_equal({name: np.asarray(array) for name, array in flat(restored).items()}, in_orbax())
    assert {name: leaf.shape for name, leaf in flat(structure).items()} == {n: a.shape for n, a in in_orbax().items()}
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        assert_equal({n: np.asarray(a) for n, a in flat(checkpointer.restore(trees["orbax"])).items()}, in_orbax())


def test_orbax_restores_orbax_by_its_newer_interface(trees: dict[str, Path]) -> None:
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    # Deprecated where there is `load`.
    load = getattr(v1, "load", v1.load_pytree)
    restored = load(trees["orbax"])
    assert_equal({name: np.asarray(array) for name, array in flat(restored).items()}, in_orbax())


def test_orbax_restores_chunks_of_rows_onto_devices(tmp_path: Path, write_safetensors: Write) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=jax.devices()[:8])
    specs = {
        # Rows of 12 bytes, 6 of them to a chunk, and 4 in the last.
        "rows": ((16, 3), PartitionSpec("x")),
        "columns": ((5, 14), PartitionSpec(None, "y")),
        "both": ((20, 8), PartitionSpec("y", "x")),
        "all": ((24, 2, 3, 1), PartitionSpec(("x", "y"))),
        "flat": ((104,), PartitionSpec("x")),
        "none": ((7, 9, 2), PartitionSpec()),
        "scalar": ((), PartitionSpec()),
    }
    tensors = {f"layer.{name}": raw("F32", shape, seed) for seed, (name, (shape, _)) in enumerate(specs.items())}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    tree = convert(path, tmp_path / "tree", format="orbax", shard_size=75e-9)
    assert [len(info["files"]) for info in manifest(tree)["tensors"].values()] == [3, 5, 10, 8, 6, 7, 1]
    sizes = {file.stat().st_size for file in (tree / "layer.rows").glob("*.0")}
    assert sizes == {72}
    target = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in specs.items()
    }
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tree, {"layer": target})["layer"]
    for name, array in as_arrays(tensors).items():
        leaf = restored[name.removeprefix("layer.")]
        assert leaf.sharding == target[name.removeprefix("layer.")].sharding
        np.testing.assert_array_equal(np.asarray(leaf), array)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, array[shard.index])


@pytest.mark.parametrize("name", FORMATS)
def test_a_tree_comes_back_as_its_source(source: Path, trees: dict[str, Path], name: str) -> None:
    before, after = tensorport.open(source), tensorport.open(trees[name])
    assert_equal(after, before)
    assert list(after) == list(before)
    assert after.metadata == before.metadata
    for tensor, spec in before.specs.items():
        assert (after.specs[tensor].dtype, after.specs[tensor].shape) == (spec.dtype, spec.shape)
    assert (after.total_parameters, after.stored_elements) == (before.total_parameters, before.stored_elements)
    for kept in (None, source):
        report = tensorport.verify(trees[name], kept, progress=False)
        assert report.ok
        assert report.tensors == len(before)
    options: dict[str, Any] = {"mxfp4": "raw", "exclude": "dtypes.F6*"}
    with jax.enable_x64(True):
        loaded, expected = (tensorport.load_params(path, **options) for path in (trees[name], source))
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, expected)
    assert_equal(
        {n: np.asarray(a) for n, a in flat(loaded).items()}, {n: np.asarray(a) for n, a in flat(expected).items()}
    )


@pytest.mark.parametrize("name", ["numpy-direct", "jax-pickle", "safetensors"])
def test_jax_maps_what_is_aligned(misaligned: Path, tmp_path: Path, name: str) -> None:
    assert tensorport.load_params(misaligned, return_report=True)[1].mapped_bytes == 0
    tree = convert(misaligned, tmp_path / "tree", format=name)
    mapped = sum(info["nbytes"] for info in manifest(tree)["tensors"].values() if info["offsets"][0] % 64 == 0)
    assert (
        mapped >= sum(info.nbytes for info in tensorport.open(misaligned).specs.values() if info.nbytes % 64 == 0) > 0
    )
    assert tensorport.load_params(tree, return_report=True)[1].mapped_bytes == mapped


def test_safetensors_need_no_manifest(trees: dict[str, Path], source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trees["safetensors"], tmp_path / "copy"))
    (copy / "manifest.json").unlink()
    assert_equal(tensorport.open(copy), tensorport.open(source))


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_without_tensors_has_a_tree(tmp_path: Path, write_safetensors: Write, name: str) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {}, METADATA)
    tree = convert(source, tmp_path / "tree", format=name)
    assert dict(tensorport.open(tree)) == {}
    assert tensorport.open(tree).metadata == METADATA
    assert dict(tensorport.open(convert(tree, tmp_path / "again", format=name))) == {}


def inspect(path: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tensorport", "inspect", str(path), "--json", "--stats"]
    rows: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["tensors"]
    return rows


def test_every_format_is_inspected_as_its_source(source: Path, trees: dict[str, Path]) -> None:
    of_source = inspect(source)
    assert len(of_source) == len(everything())
    for tree in trees.values():
        for row, expected in zip(inspect(tree), of_source, strict=True):
            assert {**row, "files": None} == {**expected, "files": None}


@pytest.mark.parametrize("name", TAKE_ANY_TENSOR)
def test_empty_tensors_come_back(tmp_path: Path, write_safetensors: Write, name: str) -> None:
    tensors = {**empty(), "last": raw("F32", (3,), 1), "empty.d": ("I64", (0,), b"")}
    source = write_safetensors(tmp_path / "m.safetensors", tensors)
    tree = convert(source, tmp_path / "tree", format=name)
    assert_equal(tensorport.open(tree), tensorport.open(source))
    for number, only in enumerate(tensors):
        tree = convert(source, tmp_path / str(number), format=name, include=only)
        assert_equal(tensorport.open(tree), {only: tensorport.open(source)[only]})


def test_dimensions_of_every_width_are_read(tmp_path: Path, write_safetensors: Write) -> None:
    widths = [d + near for d in (2**7, 2**8, 2**15, 2**16, 2**31, 2**32, 2**62) for near in (-1, 0)]
    tensors = {f"{width}": ("U8", (width, 0), b"") for width in widths}
    source = write_safetensors(tmp_path / "m.safetensors", tensors)
    for name in TAKE_ANY_TENSOR:
        assert_equal(tensorport.open(convert(source, tmp_path / name, format=name)), as_arrays(tensors))
    assert_equal(by_pickle(tmp_path / "jax-pickle" / "shard_000.pkl"), as_arrays(tensors))
    content = (tmp_path / "msgpack" / "shard_000.msgpack").read_bytes()
    assert_equal(flax.serialization.msgpack_restore(content), as_arrays(tensors))
    assert flax.serialization.msgpack_serialize(as_arrays(tensors), in_place=True) == content


@pytest.mark.parametrize("name", sorted(empty()))
def test_orbax_refuses_empty_tensors(tmp_path: Path, write_safetensors: Write, name: str) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {**everything(), name: empty()[name]})
    with pytest.raises(tensorport.MappingError, match=re.escape(f'"{name}"') + r".*at least one element"):
        tensorport.convert(source, tmp_path / "tree", format="orbax", progress=False)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("after", FORMATS)
@pytest.mark.parametrize("before", FORMATS)
def test_any_format_becomes_any_other_as_its_source_does(
    trees: dict[str, Path], tmp_path: Path, before: str, after: str
) -> None:
    tree = convert(trees[before], tmp_path / "tree", format=after, shard_size=SMALL_SHARDS)
    found, expected = files(tree), files(trees[after])
    told, original = json.loads(found.pop("manifest.json")), json.loads(expected.pop("manifest.json"))
    assert found == expected
    assert told.pop("source") != original.pop("source")
    for text in (told, original):
        del text["manifest_xxh3_128"]
    assert told == original
    assert tensorport.verify(tree, trees[before], progress=False).ok


MODES: dict[str, dict[str, Any]] = {
    "keep": {},
    "dequantize": {"mxfp4": "dequantize"},
    "quantize": {"mxfp4": "quantize", "quantize": "model.matrix"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["source", "float16", "bfloat16", "float32"])
def test_every_format_holds_the_same_values(source: Path, tmp_path: Path, precision: str, mode: str) -> None:
    options = {"precision": precision, "exclude": "*.layers.0.*", "include": ["model.*", "scalars.*"], **MODES[mode]}
    plain = tensorport.open(convert(source, tmp_path / "plain", **options))
    assert "one" not in plain
    assert "model.layers.0.w" not in plain
    assert ("model.mlp" in plain) == (mode == "dequantize")
    assert ("model.matrix_blocks" in plain) == (mode == "quantize")
    for name in FORMATS[1:]:
        for shard_size in (SMALL_SHARDS, 1.8):
            tree = convert(source, tmp_path / f"{name} {shard_size}", format=name, shard_size=shard_size, **options)
            assert_equal(tensorport.open(tree), plain)
            assert tensorport.verify(tree, source, progress=False).ok


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("limit", [10, 130, 300, 1000])
def test_flat_mxfp4_is_split_at_whole_blocks(tmp_path: Path, write_safetensors: Write, name: str, limit: int) -> None:
    pair = {"flat_blocks": raw("U8", (40, 16), 1), "flat_scales": ("U8", (40,), bytes(range(100, 140)))}
    source = write_safetensors(tmp_path / "m.safetensors", pair)
    tree = convert(source, tmp_path / "tree", format=name, mxfp4="dequantize", shard_size=limit / 1e9)
    plain = convert(source, tmp_path / "plain", mxfp4="dequantize")
    assert_equal(tensorport.open(tree), tensorport.open(plain))
    if name == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            assert_equal({"flat": np.asarray(checkpointer.restore(tree)["flat"])}, tensorport.open(plain))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_do_not_depend_on_the_number_of_workers(tiny: Path, tmp_path: Path, name: str) -> None:
    options = {"format": name, "shard_size": 0.0001, "mxfp4": "dequantize", "precision": "float32"}
    expected = files(convert(tiny, tmp_path / "1", workers=1, **options))
    assert len(expected) > 10
    for workers in (2, 8):
        tree = convert(tiny, tmp_path / str(workers), workers=workers, max_memory=workers * 130_000 * 2, **options)
        assert files(tree) == expected


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "..",
    "",
    " ",
    "a",
    "a.b",
    "A",
    "manifest.json",
    "config.json",
    "journal.jsonl",
    "shard_000.msgpack",
    "shard_000.pkl",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "load_params.py",
    'quo"te',
    "quo'te",
    "back\\slash",
    "line\nfeed",
    "nul\0",
    "é 漢字 \U0001f600",
    "\u202e",
    "%2e%2e",
    "con",
    "x" * 300,
    "x" * 70_000,
]

# Names that readers of a format take for something else, as decoding can make them.
MARKS = {"msgpack": "__msgpack_chunked_array__", "safetensors": "__metadata__"}


@pytest.mark.parametrize("name", TAKE_ANY_TENSOR)
def test_hostile_names_stay_names(tmp_path: Path, write_safetensors: Write, name: str) -> None:
    tensors = {hostile: raw("F32", (3, number + 1), number) for number, hostile in enumerate(HOSTILE)}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    source = write_safetensors(tmp_path / "in" / "m.safetensors", tensors).parent
    tree = convert(source, tmp_path / "deep" / "out" / "tree", format=name)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "deep"}
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["tree"]
    assert (tree / "config.json").read_text() == "{}"
    assert_equal(tensorport.open(tree), as_arrays(tensors))
    shards = {path.suffix: path for path in tree.glob("*") if path.name.endswith((".msgpack", ".pkl", ".safetensors"))}
    if name == "msgpack":
        assert_equal(flax.serialization.msgpack_restore(shards[".msgpack"].read_bytes()), as_arrays(tensors))
    if name == "jax-pickle":
        assert_equal(by_pickle(shards[".pkl"]), as_arrays(tensors))
    if name == "safetensors":
        assert set(by_safetensors(shards[".safetensors"].read_bytes())) == set(tensors)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mark", MARKS.values())
def test_a_name_that_means_something_else_in_a_format_is_refused_there(
    tmp_path: Path, write_safetensors: Write, name: str, mark: str
) -> None:
    pair = {f"{mark}_blocks": raw("U8", (3, 2, 16), 1), f"{mark}_scales": ("U8", (3, 2), bytes([127] * 6))}
    source = write_safetensors(tmp_path / "m.safetensors", pair)
    options: dict[str, Any] = {"format": name, "mxfp4": "dequantize"}
    if MARKS.get(name) == mark:
        with pytest.raises(tensorport.MappingError, match=f'"{mark}": its name.*another one'):
            tensorport.convert(source, tmp_path / "tree", progress=False, **options)
    else:
        assert list(tensorport.open(convert(source, tmp_path / "tree", **options))) == [mark]


REFUSED_BY_ORBAX = [
    *(name for name in HOSTILE if re.fullmatch(r"[\w.+=@-]{1,200}", name, re.ASCII) is None),
    "..",
    "manifest.json",
    "Journal.jsonl",
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "checkpoint",
    "manifest.ocdbt",
    "manifest.json.tmp",
    "w.TMP",
    ".hidden",
    "a..b",
    "a.",
]


@pytest.mark.parametrize("name", REFUSED_BY_ORBAX)
def test_orbax_refuses_names_that_are_no_folders_of_a_tree(tmp_path: Path, write_safetensors: Write, name: str) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {"v": raw("F32", (3,), 1), name: raw("F32", (5,), 2)})
    with pytest.raises(tensorport.MappingError, match=r"names for folders|a file of the checkpoint"):
        tensorport.convert(source, tmp_path / "tree", format="orbax", progress=False)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a-2", "a"), ("a.b", "A.b"), ("w", "w.0.x", "w-1")])
def test_orbax_refuses_names_that_make_no_tree(tmp_path: Path, write_safetensors: Write, names: tuple[str]) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {name: raw("F32", (3,), 1) for name in names})
    with pytest.raises(tensorport.MappingError, match=r"leaves hold no leaves|by case alone"):
        tensorport.convert(source, tmp_path / "tree", format="orbax", progress=False)


@pytest.mark.parametrize("name", ["config.json", "Config.JSON", "LICENSE"])
def test_a_tensor_does_not_displace_a_file_of_its_name(tmp_path: Path, write_safetensors: Write, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_safetensors(source / "model.safetensors", {"v": raw("F32", (3,), 1), name: raw("F32", (5,), 2)})
    (source / {"LICENSE": "LICENSE"}.get(name, "config.json")).write_text("{}\n")
    with pytest.raises(tensorport.MappingError, match=r"would have one name in the output"):
        tensorport.convert(source, tmp_path / "tree", format="orbax", progress=False)
    assert not (tmp_path / "tree").exists()
    # Where names are no folders both have room.
    assert_equal(tensorport.open(convert(source, tmp_path / "plain")), tensorport.open(source))
    assert (tmp_path / "plain" / "LICENSE").exists() or (tmp_path / "plain" / "config.json").exists()


NAMES_IN_ORBAX = """0 d default item pytree params descriptor ocdbt.process_0 config.json a-b.c _strings.json con
    commit_success.txt shard_000.msgpack x+=@_-.0"""


def test_orbax_restores_all_names_that_are_not_refused(tmp_path: Path, write_safetensors: Write) -> None:
    names = [*NAMES_IN_ORBAX.split(), "x" * 200]
    tensors = {name: raw("F32", (3, number + 1), number) for number, name in enumerate(names)}
    source = write_safetensors(tmp_path / "m.safetensors", tensors)
    tree = convert(source, tmp_path / "tree", format="orbax")
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tree)
    assert_equal({name: np.asarray(array) for name, array in flat(restored).items()}, as_arrays(tensors))
    assert_equal(tensorport.open(tree), as_arrays(tensors))
