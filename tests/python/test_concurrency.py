"""Several conversions and verifications at once, in one process and in several."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorport

# Arguments: source, output, options. Prints ok, or the class of the error and its message.
CONVERT = """
import json, sys, tensorport
print("ready", flush=True)
sys.stdin.readline()
try:
    tensorport.convert(sys.argv[1], sys.argv[2], progress=False, **json.loads(sys.argv[3]))
    print("ok")
except tensorport.TensorportError as fault:
    print(type(fault).__name__, fault)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion leaves that is alone."""
    output = tmp_path_factory.mktemp("whole")
    tensorport.convert(tiny, output, progress=False)
    return files(output)


def convert_together(source: Path, outputs: list[Path], **options: Any) -> list[str]:
    """Converts in processes that begin together; returns what each of them prints."""
    commands = [[sys.executable, "-c", CONVERT, str(source), str(output), json.dumps(options)] for output in outputs]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    jobs = [subprocess.Popen(command, text=True, **pipes) for command in commands]
    for job in jobs:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("go\n")
        job.stdin.flush()
    printed = [job.communicate(timeout=60) for job in jobs]
    assert [(job.returncode, stderr) for job, (_, stderr) in zip(jobs, printed, strict=True)] == [(0, "")] * len(jobs)
    return [stdout.strip() for stdout, _ in printed]


def finished(source: Path, output: Path) -> None:
    tensorport.convert(source, output, precision="float32", progress=False)


def unfinished(source: Path, output: Path) -> None:
    def stop(_: tensorport.ProgressEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorport.convert(source, output, progress=stop)


# What is in the folder before, the options, and how many of four conversions are refused at least: who comes when the
# first is done may resume or overwrite as well.
CONTESTS: dict[str, tuple[Callable[[Path, Path], None] | None, dict[str, Any], int]] = {
    "new": (None, {}, 3),
    "resume": (unfinished, {"resume": True}, 0),
    "overwrite": (finished, {"overwrite": True}, 0),
}


@pytest.mark.parametrize("contest", CONTESTS)
def test_of_several_processes_one_converts_into_a_folder_and_the_others_are_told(
    tiny: Path, tmp_path: Path, whole: dict[str, bytes], contest: str
) -> None:
    prepare, options, least = CONTESTS[contest]
    output = tmp_path / "out"
    if prepare is not None:
        prepare(tiny, output)
    outcomes = convert_together(tiny, [output] * 4, **options)
    refused = [outcome for outcome in outcomes if outcome != "ok"]
    assert least <= len(refused) <= 3
    assert all(outcome.startswith(f"ConversionError {output}: found ") for outcome in refused), refused
    assert files(output) == whole


def test_several_processes_convert_one_source_into_folders_of_their_own(
    tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    outputs = [tmp_path / f"out{number}" for number in range(4)]
    assert convert_together(tiny, outputs) == ["ok"] * 4
    assert all(files(output) == whole for output in outputs)


def test_a_conversion_disturbs_nothing_but_its_own_folder(tiny: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    output, other, calls = tmp_path / "out", tmp_path / "other", 0

    def look_around(_: tensorport.ProgressEvent) -> None:
        nonlocal calls
        if calls == 0:
            calls += 1
            (failure,) = tensorport.verify(output, progress=False).failures
            assert failure.file == "manifest.json"
            assert "unfinished" in failure.what
            with pytest.raises(tensorport.ConversionError, match="another conversion") as fault:
                tensorport.convert(tiny, output, overwrite=True, progress=False)
            assert str(output) in str(fault.value)
            tensorport.convert(tiny, other, progress=False)
            assert tensorport.verify(other, tiny, progress=False).ok

    tensorport.convert(tiny, output, progress=look_around)
    assert calls == 1
    assert files(output) == files(other) == whole


def test_a_verification_beside_conversions_of_the_same_tree_always_ends_in_a_report(
    tiny: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    tensorport.convert(tiny, output, progress=False)
    is_done = threading.Event()
    ends: list[object] = []

    def verify() -> None:
        while not is_done.is_set():
            try:
                ends.append(tensorport.verify(output, tiny, progress=False).ok)
            except Exception as fault:
                ends.append(fault)

    thread = threading.Thread(target=verify)
    thread.start()
    for _ in range(6):
        tensorport.convert(tiny, output, overwrite=True, progress=False)
    is_done.set()
    thread.join()
    assert {type(end) for end in ends} == {bool}, ends
    assert files(output) == whole
    assert tensorport.verify(output, tiny, progress=False).ok
