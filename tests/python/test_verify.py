"""verify(): every change to a converted tree is found and named, and so is every difference from the source."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport
import xxhash

Write = Callable[..., Path]
Edit = Callable[[dict[str, Any]], object]

SELF_HASH = b'  "manifest_xxh3_128"'
SPLIT = "model.embed_tokens.weight"
# 10^-5 GB are 10,000 bytes: the embedding, 519 x 96 bfloat16, is split.
OPTIONS: dict[str, Any] = {"mxfp4": "dequantize", "shard_size": 0.00003, "exclude": "model.layers.[1-3].*"}


@pytest.fixture(scope="module")
def tree(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tree") / "out"
    with pytest.warns(UserWarning, match="more than the shard size"):
        tensorport.convert(tiny, output, progress=False, **OPTIONS)
    return output


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "copy"))


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return content


def owners(folder: Path) -> dict[str, str]:
    """The tensor of each file."""
    return {file: name for name, info in manifest(folder)["tensors"].items() for file in info["files"]}


def failures(folder: Path, source: Path | None = None) -> set[tuple[str, str | None]]:
    report = tensorport.verify(folder, source, progress=False)
    assert report.ok == (not report.failures)
    assert all(failure.what for failure in report.failures)
    return {(failure.file, failure.tensor) for failure in report.failures}


def flip_bit(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def rewrite(folder: Path, edit: Edit, rehash: bool) -> None:
    """Edits the manifest; `rehash` makes its own hash hold again."""
    path = folder / "manifest.json"
    content = manifest(folder)
    own = content.pop("manifest_xxh3_128")
    edit(content)
    covered = json.dumps(content)[:-1].encode() + b",\n"
    if rehash:
        own = xxhash.xxh3_128_hexdigest(covered)
    path.write_bytes(covered + SELF_HASH + f': "{own}"\n}}\n'.encode())


def test_the_manifest_hash_covers_every_byte_before_its_line(copy: Path) -> None:
    content = (copy / "manifest.json").read_bytes()
    covered = content[: content.index(SELF_HASH)]
    assert manifest(copy)["manifest_xxh3_128"] == xxhash.xxh3_128_hexdigest(covered)
    rewrite(copy, lambda _: None, rehash=True)
    assert (copy / "manifest.json").read_bytes() != content
    assert failures(copy) == set()


@pytest.mark.parametrize("is_split", [False, True])
def test_a_flipped_bit_in_any_data_file_is_found_and_named(copy: Path, is_split: bool) -> None:
    choose = random.Random(1)
    tensors = manifest(copy)["tensors"]
    chosen = {file: name for file, name in owners(copy).items() if (len(tensors[name]["files"]) > 1) == is_split}
    assert len(chosen) > 5
    for file, tensor in chosen.items():
        path = copy / file
        nbytes = path.stat().st_size
        # Magic, version, length, dict, padding and newline of the header; the ends and the middle of the data.
        header = [0, 5, 6, 8, 9, *(choose.randrange(10, 64) for _ in range(3)), 63]
        for position in (*header, 64, nbytes - 1, choose.randrange(64, nbytes)):
            bit = choose.randrange(8)
            flip_bit(path, position, bit)
            assert failures(copy) == {(file, tensor)}, (file, position, bit)
            flip_bit(path, position, bit)
    assert failures(copy) == set()


@pytest.mark.parametrize("with_source", [False, True])
def test_a_flipped_bit_anywhere_in_the_manifest_is_found(copy: Path, tiny: Path, with_source: bool) -> None:
    path = copy / "manifest.json"
    nbytes = path.stat().st_size
    choose = random.Random(2)
    first = {position: bit for position in range(40) for bit in (position % 8,)}
    last = {nbytes - 1 - back: back % 8 for back in range(60)}
    rest = {choose.randrange(nbytes): choose.randrange(8) for _ in range(150)}
    options = path.read_bytes().index(b'"options"')
    flips = {**rest, **first, **last, **{options + offset: 0 for offset in range(200)}}
    assert len(flips) >= 200
    for position, bit in flips.items():
        flip_bit(path, position, bit)
        found = failures(copy, tiny if with_source else None)
        assert "manifest.json" in {file for file, _ in found}, (position, bit)
        flip_bit(path, position, bit)
    assert failures(copy) == set()


@pytest.mark.parametrize("name", ["load_params.py", "config.json", "generation_config.json"])
def test_a_flipped_bit_beside_the_tensors_is_found_and_named(copy: Path, name: str) -> None:
    nbytes = (copy / name).stat().st_size
    for position in range(0, nbytes, max(1, nbytes // 50)):
        flip_bit(copy / name, position, position % 8)
        assert failures(copy) == {(name, None)}
        flip_bit(copy / name, position, position % 8)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": Path.unlink,
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_named(tree: Path, tmp_path: Path, damage: str) -> None:
    tensors = owners(tree)
    for number, path in enumerate(path for path in tree.rglob("*") if path.is_file()):
        file = str(path.relative_to(tree))
        copy = Path(shutil.copytree(tree, tmp_path / str(number), symlinks=True))
        DAMAGES[damage](copy / file)
        assert failures(copy) == {(file, tensors.get(file))}
        shutil.rmtree(copy)


def test_two_swapped_files_are_found_and_named(copy: Path) -> None:
    files = manifest(copy)["tensors"][SPLIT]["files"]
    one, other = copy / files[0], copy / files[1]
    assert one.stat().st_size == other.stat().st_size
    one.rename(copy / "aside")
    other.rename(one)
    (copy / "aside").rename(other)
    assert {tensor for _, tensor in failures(copy)} == {SPLIT}


def test_a_file_that_the_manifest_does_not_know_is_no_fault_of_the_tree(copy: Path) -> None:
    (copy / "shard_000" / "extra.npy").write_bytes(b"")
    assert failures(copy) == set()


def test_a_manifest_that_claims_a_huge_tensor_is_answered_at_once(copy: Path) -> None:
    def claim(content: dict[str, Any]) -> None:
        info = tensor(content)
        info.update(dtype="uint8", shape=[2**50], nbytes=2**50, files=info["files"][:1], offsets=info["offsets"][:1])
        info.update(part_nbytes=[2**50], part_xxh3_128=info["part_xxh3_128"][:1])

    rewrite(copy, claim, rehash=True)
    started = time.monotonic()
    assert SPLIT in {name for _, name in failures(copy)}
    assert time.monotonic() - started < 10


def tensor(content: dict[str, Any], name: str = SPLIT) -> dict[str, Any]:
    found: dict[str, Any] = content["tensors"][name]
    return found


# Each with the tensor that the failure has to name, if any.
EDITS: dict[str, tuple[Edit, str | None]] = {
    "total_tensors": (lambda m: m.update(total_tensors=m["total_tensors"] + 1), None),
    "total_parameters": (lambda m: m.update(total_parameters=m["total_parameters"] - 1), None),
    "stored_elements": (lambda m: m.update(stored_elements=0), None),
    "total_bytes": (lambda m: m.update(total_bytes=2**64 - 1), None),
    "format_version": (lambda m: m.update(format_version=2), None),
    "an unknown field": (lambda m: m.update(more=1), None),
    "a missing field": (lambda m: m.pop("metadata"), None),
    "a tensor left out": (lambda m: m["tensors"].pop(SPLIT), None),
    "shape transposed": (lambda m: tensor(m)["shape"].reverse(), SPLIT),
    "shape of other size": (lambda m: tensor(m).update(shape=[519, 97]), SPLIT),
    "shape beyond 64 bits": (lambda m: tensor(m).update(shape=[2**63, 2**63]), SPLIT),
    "dtype of the same size": (lambda m: tensor(m).update(dtype="float16"), SPLIT),
    "dtype of another size": (lambda m: tensor(m).update(dtype="float32"), SPLIT),
    "dtype unknown": (lambda m: tensor(m).update(dtype="float5"), SPLIT),
    "nbytes": (lambda m: tensor(m).update(nbytes=tensor(m)["nbytes"] + 2), SPLIT),
    "checksum": (lambda m: tensor(m).update(xxh3_128="0" * 32), SPLIT),
    "files swapped": (lambda m: tensor(m)["files"].insert(0, tensor(m)["files"].pop(1)), SPLIT),
    "files outside": (lambda m: tensor(m)["files"].__setitem__(0, "../x.npy"), SPLIT),
    "file of another tensor": (
        lambda m: tensor(m, "lm_head.weight")["files"].__setitem__(0, tensor(m)["files"][0]),
        "lm_head.weight",
    ),
    "fewer files": (lambda m: tensor(m)["files"].pop(), SPLIT),
    "no files": (lambda m: tensor(m).update(files=[], offsets=[], part_nbytes=[]), SPLIT),
    "offsets": (lambda m: tensor(m)["offsets"].__setitem__(0, 64), SPLIT),
    "offsets beyond 64 bits in sum": (lambda m: tensor(m)["offsets"].__setitem__(0, 2**64 - 1), SPLIT),
    "part_nbytes": (lambda m: tensor(m)["part_nbytes"].__setitem__(0, 2**64 - 2), SPLIT),
    "shard bytes": (lambda m: m["shards"]["shard_000"].update(nbytes=0), None),
    "shard files": (lambda m: m["shards"]["shard_000"].update(files=2**64 - 1), None),
    "shard left out": (lambda m: m["shards"].pop("shard_000"), None),
    "shard more": (lambda m: m["shards"].update(shard_999={"files": 0, "nbytes": 0}), None),
    "side file's size": (lambda m: m["side_files"]["config.json"].update(nbytes=1), None),
    "side file's hash": (lambda m: m["side_files"]["config.json"].update(xxh3_128="f" * 32), None),
    "side file outside": (lambda m: m["side_files"].update({"../../x": m["side_files"].pop("config.json")}), None),
}


@pytest.mark.parametrize("rehash", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_found(copy: Path, name: str, rehash: bool) -> None:
    edit, named = EDITS[name]
    if name == "offsets":
        assert tensor(manifest(copy))["offsets"][0] != 64
    rewrite(copy, edit, rehash)
    found = failures(copy)
    assert found
    assert named in {tensor for _, tensor in found}
    if not rehash:
        assert ("manifest.json", None) in found


# Lies that no checksum in the tree contradicts, but the source does.
LIES: dict[str, Edit] = {
    "a tensor renamed": lambda m: m["tensors"].update({"x": m["tensors"].pop("lm_head.weight")}),
    "precision": lambda m: m["options"].update(precision="float32"),
    "mxfp4": lambda m: m["options"].update(mxfp4="keep"),
    "include": lambda m: m["options"].update(include=["lm_head.*"]),
    "exclude": lambda m: m["options"].update(exclude=None),
    "shard_size": lambda m: m["options"].update(shard_size=1.8),
    "a shard_size that no conversion takes": lambda m: m["options"].update(shard_size=-1),
    "source_dtype": lambda m: tensor(m).update(source_dtype="float32"),
    "underflow": lambda m: tensor(m).update(underflow=7),
}


@pytest.mark.parametrize("name", LIES)
def test_the_source_contradicts_what_the_manifest_says_of_it(copy: Path, tiny: Path, name: str) -> None:
    rewrite(copy, LIES[name], rehash=True)
    assert "manifest.json" in {file for file, _ in failures(copy, tiny)}


@pytest.mark.parametrize("mxfp4", ["keep", "dequantize"])
@pytest.mark.parametrize("precision", ["source", "float16", "bfloat16", "float32"])
def test_a_fresh_tree_agrees_with_its_source(tiny: Path, tmp_path: Path, precision: Any, mxfp4: Any) -> None:
    options: dict[str, Any] = {"precision": precision, "mxfp4": mxfp4, "on_overflow": "saturate", "shard_size": 0.0002}
    converted = tensorport.convert(tiny, tmp_path / "out", progress=False, **options)
    report = tensorport.verify(tmp_path / "out", tiny, progress=False)
    assert report.ok
    assert report.compared_with_source
    assert (report.tensors, report.nbytes) == (converted.total_tensors, converted.total_bytes)
    assert (report.failures, report.output) == ((), tmp_path / "out")


def values(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    blocks, scales = rng.integers(0, 256, (5, 3, 16), np.uint8), rng.integers(100, 140, (5, 3), np.uint8)
    return {
        "w": rng.normal(size=(7, 11)).astype(np.float32),
        "ids": np.arange(13, dtype=np.int32),
        "x_blocks": blocks,
        "x_scales": scales,
    }


def edited(name: str, byte: int, bit: int) -> dict[str, Any]:
    tensors = values(0)
    tensors[name].view(np.uint8).reshape(-1)[byte] ^= np.uint8(1 << bit)
    return tensors


SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "the lowest bit of a float": (edited("w", 4 * 76, 0), "w"),
    "the sign of a float": (edited("w", 3, 7), "w"),
    "a bit of an integer": (edited("ids", 51, 3), "ids"),
    "a bit of a code": (edited("x_blocks", 239, 5), "x"),
    "a bit of a scale": (edited("x_scales", 14, 0), "x"),
    "a tensor missing": ({k: v for k, v in values(0).items() if k != "ids"}, "ids"),
    "a tensor more": ({**values(0), "more": np.zeros(3, np.int8)}, "more"),
    "another dtype": ({**values(0), "ids": np.arange(13, dtype=np.uint32)}, "ids"),
    "another float dtype": ({**values(0), "w": values(0)["w"].astype(np.float64)}, "w"),
    "another shape": ({**values(0), "w": values(0)["w"].reshape(11, 7)}, "w"),
}


@pytest.mark.parametrize("difference", SOURCES)
def test_a_source_that_differs_is_found_and_the_tensor_named(
    tmp_path: Path, write_safetensors: Write, difference: str
) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", values(0))
    tensorport.convert(source, tmp_path / "out", mxfp4="dequantize", precision="float32", progress=False)
    assert failures(tmp_path / "out", source) == set()
    tensors, named = SOURCES[difference]
    write_safetensors(source, tensors)
    assert {name for _, name in failures(tmp_path / "out", source)} == {named}


def test_a_file_that_changes_after_it_was_written_fails_the_conversion(tmp_path: Path) -> None:
    # Large enough that the first file is finished long before the last one.
    source = tensorport.synthesize(
        tmp_path / "source", "tiny", progress=False, num_hidden_layers=20, vocab_size=20_000, num_local_experts=12
    )
    output = tmp_path / "out"
    written = output / "shard_000" / "model_embed_tokens_weight.npy"
    damaged: list[str] = []

    def damage(_: tensorport.ProgressEvent) -> None:
        if written.exists() and not damaged:
            flip_bit(written, written.stat().st_size - 1, 0)
            damaged.append(str(written.relative_to(output)))

    def convert() -> None:
        tensorport.convert(source, output, progress=damage, workers=1, resume=bool(damaged), max_memory=140_000)

    with pytest.raises(tensorport.VerificationError, match="checksum") as fault:
        convert()
    report = fault.value.report
    assert isinstance(report, tensorport.VerificationReport)
    assert not report.ok
    assert [(failure.file, failure.tensor) for failure in report.failures] == [(damaged[0], SPLIT)]
    assert not (output / "manifest.json").exists()
    convert()
    assert failures(output, source) == set()


def test_what_is_no_converted_tree_is_said_to_be_none(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as fault:
        tensorport.verify(tmp_path / "nothing", progress=False)
    assert fault.value.filename == str(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError):
        tensorport.verify(tiny / "config.json", progress=False)
    assert failures(tiny) == {("manifest.json", None)}
    (tmp_path / "foreign").mkdir()
    foreign = tmp_path / "foreign" / "manifest.json"
    for content in (b"", b"{}", b"[1]", b'{"format": "web", "version": 3}', b"\xff", b"[" * 100_000):
        foreign.write_bytes(content)
        assert failures(foreign.parent) == {("manifest.json", None)}
