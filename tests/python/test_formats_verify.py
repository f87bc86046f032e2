"""verify() and open() of trees in every format: whatever byte of whatever file changes, it is noticed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorport
from format_cases import FORMATS, files, manifest, raw

pytestmark = pytest.mark.filterwarnings("ignore:.*more than the shard size")

# Small, for every byte is flipped; with frames before, between and behind the tensors of most formats.
TENSORS = {
    "a.matrix": raw("F32", (5, 3), 1),
    "a.odd": raw("U8", (13,), 2),
    "b": raw("BF16", (2, 3), 3),
    "scale": raw("F64", (), 4),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_safetensors: Callable[..., Path]) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("source") / "m.safetensors", TENSORS, {"note": "kept"})


@pytest.fixture(scope="module", params=FORMATS)
def tree(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tree of two files at least, which every test leaves as it was."""
    output = tmp_path_factory.mktemp("tree") / request.param
    tensorport.convert(source, output, format=request.param, shard_size=48e-9, progress=False)
    before = files(output)
    assert len(data_files(output)) > 1
    yield output
    assert files(output) == before


def data_files(tree: Path) -> dict[str, list[tuple[str, int, int]]]:
    """For each file with data its tensors, and where their bytes begin and end."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name, info in manifest(tree)["tensors"].items():
        for file, offset, nbytes in zip(info["files"], info["offsets"], info["part_nbytes"], strict=True):
            found.setdefault(file, []).append((name, offset, offset + nbytes))
    return found


def verify(tree: Path) -> set[tuple[str, str | None]]:
    report = tensorport.verify(tree, workers=1, progress=False)
    return {(failure.file, failure.tensor) for failure in report.failures}


def opens(tree: Path) -> bool:
    try:
        tensorport.open(tree)
    except tensorport.CheckpointError:
        return False
    return True


def test_every_flipped_byte_of_every_file_is_found(tree: Path) -> None:
    assert verify(tree) == set()
    for file in files(tree):
        with (tree / file).open("r+b") as handle:
            content = handle.read()
            for position, byte in enumerate(content):
                handle.seek(position)
                handle.write(bytes([byte ^ 1 << position % 8]))
                handle.flush()
                assert file in {found for found, _ in verify(tree)}, position
                handle.seek(position)
                handle.write(bytes([byte]))
                handle.flush()


def test_a_flipped_byte_of_a_tensor_is_told_of_that_tensor_alone(tree: Path) -> None:
    for file, tensors in data_files(tree).items():
        content = (tree / file).read_bytes()
        for name, begin, end in tensors:
            for position in (begin, end - 1):
                (tree / file).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
                assert verify(tree) == {(file, name)}
                assert opens(tree)
        (tree / file).write_bytes(content)


def test_trees_with_another_byte_between_tensors_do_not_open(tree: Path) -> None:
    frames = 0
    for file, tensors in data_files(tree).items():
        content = (tree / file).read_bytes()
        last = max(end for _, _, end in tensors)
        for position, byte in enumerate(content):
            # Zeros behind the last rows in orbax are padding, which nobody reads.
            if any(begin <= position < end for _, begin, end in tensors) or (tree.name, last <= position) == (
                "orbax",
                True,
            ):
                continue
            frames += 1
            (tree / file).write_bytes(content[:position] + bytes([byte ^ 1 << position % 8]) + content[position + 1 :])
            assert not opens(tree), (file, position)
        (tree / file).write_bytes(content)
    assert (frames > 20) == (tree.name != "orbax")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-1],
    "halved": lambda content: content[: len(content) // 2],
    "emptied": lambda _: b"",
    "longer": lambda content: content + b"\0",
    "twice": lambda content: content * 2,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_of_another_size_is_found_and_not_opened(tree: Path, damage: str) -> None:
    of_tensors = set(data_files(tree))
    for file, content in files(tree).items():
        (tree / file).write_bytes(DAMAGES[damage](content))
        assert file in {found for found, _ in verify(tree)}
        if file in of_tensors:
            assert not opens(tree)
        (tree / file).write_bytes(content)


def test_a_missing_file_is_found_and_not_opened(tree: Path) -> None:
    of_tensors = set(data_files(tree))
    for file, content in files(tree).items():
        (tree / file).unlink()
        assert (file, "missing") in {
            (failure.file, failure.what.split(":")[0]) for failure in tensorport.verify(tree, progress=False).failures
        }
        assert not (file in of_tensors and opens(tree))
        (tree / file).write_bytes(content)


def test_files_in_each_others_places_are_found(tree: Path) -> None:
    owners = data_files(tree)
    of_tensors = sorted(owners)
    for number, one in enumerate(of_tensors):
        for other in of_tensors[:number]:
            contents = (tree / one).read_bytes(), (tree / other).read_bytes()
            assert contents[0] != contents[1]
            (tree / one).write_bytes(contents[1])
            (tree / other).write_bytes(contents[0])
            found = verify(tree)
            for file in (one, other):
                # Of a tensor in several files the first fault is told.
                assert any(file == at or tensor in {name for name, _, _ in owners[file]} for at, tensor in found)
            (tree / one).write_bytes(contents[0])
            (tree / other).write_bytes(contents[1])


def test_a_tree_that_says_it_is_of_another_format_is_refused(tree: Path, tmp_path: Path) -> None:
    for name in set(FORMATS) - {tree.name}:
        copy = Path(shutil.copytree(tree, tmp_path / name))
        text = (copy / "manifest.json").read_text()
        assert text.count(f'"{tree.name}"') == 2
        (copy / "manifest.json").write_text(text.replace(f'"{tree.name}"', f'"{name}"'))
        assert not opens(copy)
        assert len(verify(copy)) > 1


@pytest.mark.parametrize("nbytes", [14, 2**40, 2**58, 2**62])
def test_a_manifest_that_claims_more_than_its_files_hold_is_refused(tree: Path, tmp_path: Path, nbytes: int) -> None:
    copy = Path(shutil.copytree(tree, tmp_path / tree.name))
    content = manifest(copy)
    content["tensors"]["a.odd"] |= {"shape": [nbytes], "nbytes": nbytes, "part_nbytes": [nbytes]}
    (copy / "manifest.json").write_text(json.dumps(content))
    assert not opens(copy)
    (file,) = content["tensors"]["a.odd"]["files"]
    assert file in {found for found, _ in verify(copy)}


def test_values_that_the_source_does_not_make_are_found(tree: Path, source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    (tmp_path / "m.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert tensorport.verify(tree, source, progress=False).ok
    report = tensorport.verify(tree, tmp_path / "m.safetensors", progress=False)
    assert {failure.tensor for failure in report.failures} == {"scale"}


def test_a_source_may_have_its_tensors_in_another_order(
    tree: Path, tmp_path: Path, write_safetensors: Callable[..., Path]
) -> None:
    turned = dict(reversed(TENSORS.items()))
    other = write_safetensors(tmp_path / "m.safetensors", turned, {"note": "kept"})
    report = tensorport.verify(tree, other, progress=False)
    assert report.ok, report.failures
    changed = write_safetensors(
        tmp_path / "changed.safetensors", turned | {"b": raw("BF16", (2, 3), 5)}, {"note": "kept"}
    )
    assert {failure.tensor for failure in tensorport.verify(tree, changed, progress=False).failures} == {"b"}
