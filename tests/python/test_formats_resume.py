"""convert(format=): a conversion into any format that is killed goes on to the same bytes."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorport
from format_cases import FORMATS, Format, files
from interrupted import Options, interrupt, journal_lines, kill, listed, start, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*more than the shard size")

# Small shards and buffers: files of several tensors, tensors of several files, and many writes to each.
OPTIONS: Options = {
    "shard_size": 0.0003,
    "max_memory": 300_000,
    "workers": 2,
    "mxfp4": "dequantize",
    "precision": "float32",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 200 tensors of 7 MB, which become 16 MB."""
    fields: Options = {"num_hidden_layers": 10, "vocab_size": 7000, "num_local_experts": 12}
    return tensorport.synthesize(tmp_path_factory.mktemp("source") / "model", "tiny", progress=False, **fields)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of an uninterrupted conversion into each format."""
    trees: dict[str, dict[str, bytes]] = {}
    for name in FORMATS:
        output = tmp_path_factory.mktemp("whole") / name
        tensorport.convert(source, output, format=name, progress=False, **OPTIONS)
        trees[name] = files(output)
    return trees


def files_of(whole: dict[str, bytes]) -> dict[str, list[str]]:
    """The files of each tensor."""
    return {name: info["files"] for name, info in json.loads(whole["manifest.json"])["tensors"].items()}


def check_interrupted(output: Path, whole: dict[str, bytes]) -> None:
    """Only whole files bear their names, and those of the tensors that the journal lists are among them."""
    found = files(output)
    for name, content in found.items():
        final = name.removesuffix(".tmp")
        assert final in {*whole, "journal.jsonl"}
        if name == final != "journal.jsonl":
            assert content == whole[name], f"{name}: {len(content)} bytes, expected {len(whole[name])}"
    owners = files_of(whole)
    # The last line may be torn.
    for line in journal_lines(output)[1:]:
        if line.endswith(b"\n"):
            assert set(owners[json.loads(line)["tensor"]]) <= set(found)


def moments(
    whole: dict[str, bytes], delays: random.Random, duration_s: float
) -> list[tuple[Callable[[Path], bool], float]]:
    """States of the output folder, and delays behind them, at which to kill."""
    data = sorted({file for owned in files_of(whole).values() for file in owned})

    def begun(output: Path) -> bool:
        return (output / "journal.jsonl").exists()

    def written(share: float) -> Callable[[Path], bool]:
        return lambda output: sum((output / file).exists() for file in data) >= share * len(data)

    return [
        (lambda output: any(output.rglob("*.tmp")), 0.0),
        (written(0.1), 0.0),
        (listed(len(files_of(whole)) // 2), 0.0),
        (written(1), 0.0),
        *((begun, delays.uniform(0, duration_s)) for _ in range(3)),
    ]


@pytest.mark.parametrize("name", FORMATS[1:])
def test_a_killed_conversion_resumes_to_the_same_bytes(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes]], name: Format
) -> None:
    options, delays, hits = {**OPTIONS, "format": name}, random.Random(name), 0
    duration_s = tensorport.convert(source, tmp_path / "timed", progress=False, **options).seconds
    chosen = moments(whole[name], delays, duration_s)
    for number, (reached, delay_s) in enumerate(chosen):
        output = tmp_path / f"out{number}"
        child = start(source, output, options)
        wait_for(child, output, reached)
        time.sleep(delay_s)
        hits += kill(child) and (output / "journal.jsonl").exists()
        check_interrupted(output, whole[name])
        if number % 2:
            # Killed again, while it re-checks or writes.
            known = len(journal_lines(output)) - 1
            child = start(source, output, {**options, "resume": True})
            wait_for(child, output, listed(known))
            kill(child)
            check_interrupted(output, whole[name])
        assert tensorport.convert(source, output, resume=True, progress=False, **options).verified
        assert files(output) == whole[name], f"resumed after kill {number}"
    # On a busy machine some conversions are done before the kill.
    assert hits > 1


def flip(content: bytes, position: int) -> bytes:
    position %= len(content)
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "its first byte": lambda content: flip(content, 0),
    "its middle byte": lambda content: flip(content, len(content) // 2),
    "its last byte": lambda content: flip(content, -1),
    "truncated": lambda content: content[:-1],
    "emptied": lambda _: b"",
    "extended": lambda content: content + b"\0",
}


@pytest.mark.parametrize("name", FORMATS[1:])
def test_damaged_files_of_a_stopped_conversion_are_redone_and_no_others(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes]], name: Format
) -> None:
    options = {**OPTIONS, "format": name}
    owners = files_of(whole[name])
    for number, damage in enumerate([*DAMAGES.values(), None]):
        output = tmp_path / f"out{number}"
        names = interrupt(source, output, lines=30, **options)
        damaged = owners[names[number]][-1]
        if damage is None:
            (output / damaged).unlink()
        else:
            (output / damaged).write_bytes(damage((output / damaged).read_bytes()))
        lost = {tensor for tensor in names if damaged in owners[tensor]}
        kept = {file for tensor in names if tensor not in lost for file in owners[tensor]}
        before = {file: (output / file).stat().st_ino for file in kept}
        report = tensorport.convert(source, output, resume=True, progress=False, **options)
        assert report.resumed_tensors == len(names) - len(lost)
        assert files(output) == whole[name]
        assert {file: (output / file).stat().st_ino for file in kept} == before


@pytest.mark.parametrize("before", FORMATS)
def test_another_format_takes_the_place_of_a_stopped_and_of_a_finished_tree(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes]], before: Format
) -> None:
    output, has_temporary = tmp_path / "out", False
    for after in FORMATS:
        child = start(source, output, {**OPTIONS, "format": before, "overwrite": True})
        wait_for(child, output, listed(20))
        kill(child)
        has_temporary |= any(output.rglob("*.tmp"))
        for name in (after, before):
            tensorport.convert(source, output, format=name, overwrite=True, progress=False, **OPTIONS)
            assert files(output) == whole[name]
            assert {str(path.relative_to(output)) for path in output.rglob("*") if path.is_dir()} == {
                file.partition("/")[0] for file in whole[name] if "/" in file
            }
    assert has_temporary
