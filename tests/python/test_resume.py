"""convert(): what is left after a kill, an interrupt or a fault, and what resume makes of it."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorport
from format_cases import files
from interrupted import Options, Stop, interrupt, journal_lines, kill, listed, start, wait_for

Trees = dict[str, dict[str, bytes]]

# Small shards and buffers: tensors are split over many files, and files are written in many pieces.
SMALL: Options = {"shard_size": 0.0005, "max_memory": 300_000}

VARIANTS: dict[str, Options] = {
    "source": {**SMALL, "workers": 1},
    "float32": {**SMALL, "precision": "float32", "workers": 2},
    "dequantize": {**SMALL, "mxfp4": "dequantize", "workers": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB in 307 tensors: some tenths of a second of work."""
    fields: Options = {"num_hidden_layers": 16, "vocab_size": 30_000, "num_local_experts": 20}
    return tensorport.synthesize(tmp_path_factory.mktemp("source") / "model", "tiny", progress=False, **fields)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Trees:
    """The files of an uninterrupted conversion, by variant."""
    trees = {}
    for variant, options in VARIANTS.items():
        output = tmp_path_factory.mktemp("whole") / variant
        tensorport.convert(source, output, progress=False, **options)
        trees[variant] = files(output)
    return trees


def stats(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = ((str(path.relative_to(folder)), path.stat()) for path in folder.rglob("*"))
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found}


def check_interrupted(output: Path, whole: dict[str, bytes]) -> None:
    """Nothing half-written bears a final name, and nothing is there that does not belong there."""
    for name, content in files(output).items():
        if name.removesuffix(".tmp") != "journal.jsonl" and not name.endswith(".tmp"):
            assert content == whole[name], f"{name}: {len(content)} bytes, expected {len(whole[name])}"
        else:
            assert name.removesuffix(".tmp") in {*whole, "journal.jsonl"}


def moments(duration_s: float, seed: str) -> list[tuple[str, Callable[[Path], bool], float]]:
    """States of the output folder and delays behind them at which to kill."""

    def written(count: int) -> Callable[[Path], bool]:
        return lambda output: sum(1 for _ in output.glob("shard_*/*.npy")) >= count

    def begun(output: Path) -> bool:
        return (output / "journal.jsonl").exists()

    delays = random.Random(seed)
    return [
        ("journal", begun, 0.0),
        ("first temporary file", lambda output: any(output.glob("shard_*/*.tmp")), 0.0),
        *((f"{count} files", written(count), 0.0) for count in (1, 17, 100, 200)),
        *((f"{count} lines", listed(count), 0.0) for count in (5, 150)),
        ("manifest", lambda output: (output / "manifest.json").exists(), 0.0),
        *(("delay", begun, delays.uniform(0, duration_s)) for _ in range(4)),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_conversion_resumes_to_the_same_bytes(
    source: Path, tmp_path: Path, whole: Trees, variant: str
) -> None:
    options, expected = VARIANTS[variant], whole[variant]
    duration_s = tensorport.convert(source, tmp_path / "timed", progress=False, **options).seconds
    delays = random.Random(variant)
    kills, hits = 0, 0
    for number, (moment, reached, delay_s) in enumerate(moments(duration_s, variant)):
        output = tmp_path / f"out{number}"
        child = start(source, output, options)
        wait_for(child, output, reached)
        time.sleep(delay_s)
        hit = kill(child)
        kills, hits = kills + 1, hits + (hit and (output / "journal.jsonl").exists())
        check_interrupted(output, expected)
        if number % 2:
            # Killed again while it resumes: once its journal has grown, or while it re-checks.
            known = len(journal_lines(output)) - 1
            child = start(source, output, {**options, "resume": True})
            if number % 4 == 1:
                wait_for(child, output, listed(known))
            time.sleep(delays.uniform(0, duration_s / 4))
            kills, hits = kills + 1, hits + (kill(child) and (output / "journal.jsonl").exists())
            check_interrupted(output, expected)
        report = tensorport.convert(source, output, resume=True, progress=False, **options)
        assert report.verified
        assert files(output) == expected, f"resumed after a kill at {moment!r}"
    assert kills >= 15
    assert hits >= 0.6 * kills, f"{hits} of {kills} kills hit a running conversion"


def test_resumed_tensors_are_counted_and_not_rewritten(source: Path, tmp_path: Path, whole: Trees) -> None:
    output = tmp_path / "out"
    names = interrupt(source, output, **VARIANTS["dequantize"])
    manifest = json.loads(whole["dequantize"]["manifest.json"])
    finished = {file for name in names for file in manifest["tensors"][name]["files"]}
    before = stats(output)
    report = tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["dequantize"])
    assert report.resumed_tensors == len(names) > 0
    after = stats(output)
    assert {file: before[file] for file in finished} == {file: after[file] for file in finished}
    assert files(output) == whole["dequantize"]


def flip_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the data": flip_bit,
    "a bit of the header": lambda path: flip_bit(path, 20),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_finished_file_is_found_and_redone(source: Path, tmp_path: Path, whole: Trees, damage: str) -> None:
    output = tmp_path / "out"
    names = interrupt(source, output, **VARIANTS["float32"])
    tensors = json.loads(whole["float32"]["manifest.json"])["tensors"]
    DAMAGES[damage](output / tensors[names[0]]["files"][-1])
    report = tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["float32"])
    assert report.resumed_tensors == len(names) - 1
    assert files(output) == whole["float32"]


GARBAGE = {
    "a torn line": b'{"tensor": "model.nor',
    "no JSON": b"garbage\n",
    "zeros, as a crash of the system leaves them": bytes(4096),
    "no UTF-8": b"\xff\xfe\n",
    "another JSON value": b"[]\n",
    "an unknown tensor": b'{"tensor":"x","xxh3_128":"00000000000000000000000000000000","overflow":0,"underflow":0}\n',
    "a wrong hash": b'{"tensor":"lm_head.weight","xxh3_128":"%s","overflow":0,"underflow":0}\n' % (b"0" * 32),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_the_end_of_the_journal_costs_no_finished_tensor(
    source: Path, tmp_path: Path, whole: Trees, garbage: str
) -> None:
    output = tmp_path / "out"
    names = interrupt(source, output, **VARIANTS["source"])
    with (output / "journal.jsonl").open("ab") as journal:
        journal.write(GARBAGE[garbage])
    report = tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
    assert report.resumed_tensors == len(set(names) - ({"lm_head.weight"} if "hash" in garbage else set()))
    assert files(output) == whole["source"]


def unfinished(source: Path, output: Path, **options: Any) -> list[str]:
    """A tree whose journal lists every tensor and that has no manifest yet; returns their names."""
    blocker = output / "manifest.json.tmp"

    def block(_: tensorport.ProgressEvent) -> None:
        # A folder in the place of the temporary manifest stops the conversion at its last step.
        blocker.mkdir(exist_ok=True)

    with pytest.raises(IsADirectoryError) as fault:
        tensorport.convert(source, output, progress=block, **options)
    assert (fault.value.errno, fault.value.filename) == (errno.EISDIR, str(blocker))
    blocker.rmdir()
    return [json.loads(line)["tensor"] for line in journal_lines(output)[1:]]


def test_a_journal_that_is_cut_anywhere_in_its_last_line_loses_one_tensor(
    source: Path, tmp_path: Path, whole: Trees
) -> None:
    output = tmp_path / "out"
    total = len(unfinished(source, output, **VARIANTS["source"]))
    journal = journal_lines(output)
    for cut in (1, 2, 40, len(journal[-1]) - 1, len(journal[-1])):
        (output / "journal.jsonl").write_bytes(b"".join(journal)[:-cut])
        report = tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
        assert report.resumed_tensors == total - 1
        assert files(output) == whole["source"]


def test_a_journal_beside_the_finished_manifest_is_no_obstacle(source: Path, tmp_path: Path, whole: Trees) -> None:
    output = tmp_path / "out"
    total = len(unfinished(source, output, **VARIANTS["source"]))
    journal = (output / "journal.jsonl").read_bytes()
    tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
    (output / "journal.jsonl").write_bytes(journal)
    report = tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
    assert report.resumed_tensors == total
    assert files(output) == whole["source"]


def test_overwriting_an_unfinished_tree_removes_its_manifest_first(source: Path, tmp_path: Path) -> None:
    # Killed between the manifest and the end of the journal, then replaced, then stopped: what is left is no tree of
    # the first options any more.
    output = tmp_path / "out"
    unfinished(source, output, **VARIANTS["source"])
    journal = (output / "journal.jsonl").read_bytes()
    tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
    (output / "journal.jsonl").write_bytes(journal)
    interrupt(source, output, overwrite=True, **VARIANTS["float32"])
    assert not (output / "manifest.json").exists()


def test_overwriting_twice_leaves_nothing_of_the_first_tree(tmp_path: Path, source: Path, tiny: Path) -> None:
    # The second tree replaces a first one that has a file more beside its tensors. It is stopped, and then its place is
    # taken as well.
    first, output = tmp_path / "first", tmp_path / "out"
    shutil.copytree(tiny, first)
    (first / "vocab.json").write_text("{}")
    tensorport.convert(first, output, progress=False)
    interrupt(source, output, overwrite=True, **VARIANTS["source"])
    assert not (output / "vocab.json").exists()
    # As a kill leaves it that comes before the first tree's files are removed.
    (output / "vocab.json").write_text("{}")
    tensorport.convert(tiny, output, overwrite=True, progress=False)
    tensorport.convert(tiny, tmp_path / "whole", progress=False)
    assert files(output) == files(tmp_path / "whole")


def edit_time(source: Path) -> None:
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))


def edit_bytes(source: Path) -> None:
    flip_bit(next(source.glob("*.safetensors")))


@pytest.mark.parametrize("edit", [edit_time, edit_bytes])
def test_an_edited_source_is_not_resumed(tmp_path: Path, source: Path, edit: Callable[[Path], None]) -> None:
    edited, output = tmp_path / "edited", tmp_path / "out"
    shutil.copytree(source, edited)
    interrupt(edited, output, **VARIANTS["source"])
    edit(edited)
    refused(edited, output, "edited source", resume=True, **VARIANTS["source"])


def refused(source: Path, output: Path, words: str, **options: Any) -> None:
    """The conversion is refused and nothing in the folder changes."""
    before = stats(output)
    with pytest.raises(tensorport.ConversionError, match=words) as fault:
        tensorport.convert(source, output, progress=False, **options)
    assert str(output) in str(fault.value)
    assert stats(output) == before


OTHER_OPTIONS: list[Options] = [
    {"precision": "bfloat16"},
    {"mxfp4": "keep"},
    {"shard_size": 0.0006},
    {"include": "model.*"},
    {"exclude": "lm_head.*"},
    {"on_overflow": "saturate"},
]


def test_what_does_not_fit_an_unfinished_tree_is_refused_and_loses_nothing(
    source: Path, tiny: Path, tmp_path: Path, whole: Trees
) -> None:
    output, options = tmp_path / "out", VARIANTS["dequantize"]
    names = interrupt(source, output, **options)
    for other in OTHER_OPTIONS:
        refused(source, output, "options", resume=True, **{**options, **other})
    refused(tiny, output, "another or an edited source", resume=True, **options)
    for wanted in (options, VARIANTS["source"]):
        refused(source, output, r"(?s)unfinished conversion.*resume.*overwrite", **wanted)
    report = tensorport.convert(source, output, resume=True, progress=False, **{**options, "workers": 1})
    assert report.resumed_tensors == len(names)
    assert files(output) == whole["dequantize"]


def test_overwrite_replaces_unfinished_and_finished_trees_and_nothing_else(
    source: Path, tmp_path: Path, whole: Trees
) -> None:
    output = tmp_path / "out"
    interrupt(source, output, **VARIANTS["dequantize"])
    tensorport.convert(source, output, overwrite=True, progress=False, **VARIANTS["float32"])
    assert files(output) == whole["float32"]
    (output / "notes.txt").write_text("mine")
    (output / "shard_000" / "notes.txt").write_text("mine")
    refused(source, output, r"(?s)finished tree.*overwrite", **VARIANTS["source"])
    tensorport.convert(source, output, overwrite=True, progress=False, **VARIANTS["source"])
    mine = {"notes.txt": b"mine", "shard_000/notes.txt": b"mine"}
    assert files(output) == {**whole["source"], **mine}


def test_resuming_a_finished_tree_reports_and_changes_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = tensorport.convert(source, output, progress=False, **VARIANTS["float32"])
    before = stats(output)
    again = tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["float32"])
    assert stats(output) == before
    assert (again.resumed_tensors, first.resumed_tensors) == (first.total_tensors, 0)
    fields = ("total_parameters", "total_bytes", "total_files", "underflow", "copied_files", "edited_files", "verified")
    assert [getattr(again, field) for field in fields] == [getattr(first, field) for field in fields]
    refused(source, output, "finished tree of another conversion", resume=True, **VARIANTS["source"])


def test_resuming_a_finished_tree_notices_that_it_was_edited(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    tensorport.convert(source, output, progress=False, **VARIANTS["source"])
    manifest = (output / "manifest.json").read_bytes()
    (output / "manifest.json").write_bytes(manifest.replace(b'"underflow":0', b'"underflow":7', 1))
    with pytest.raises(tensorport.TensorportError):
        tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
    (output / "manifest.json").write_bytes(manifest)
    flip_bit(next(output.glob("shard_*/*.npy")))
    with pytest.raises(tensorport.VerificationError):
        tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])


def test_a_second_conversion_into_the_folder_is_refused_while_one_runs(
    source: Path, tmp_path: Path, whole: Trees
) -> None:
    output = tmp_path / "out"
    child = start(source, output, VARIANTS["source"])
    wait_for(child, output, listed(5))
    child.send_signal(signal.SIGSTOP)
    # The signal stops the last of the threads a little later.
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    try:
        modes: list[Options] = [{}, {"resume": True}, {"overwrite": True}]
        for mode in modes:
            refused(source, output, "another conversion", **VARIANTS["source"], **mode)
    finally:
        child.send_signal(signal.SIGCONT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 0, stderr.decode()
    assert files(output) == whole["source"]


def test_of_two_conversions_that_start_together_one_wins(tiny: Path, tmp_path: Path) -> None:
    tensorport.convert(tiny, tmp_path / "whole", progress=False)
    expected = files(tmp_path / "whole")
    for number in range(40):
        output, barrier = tmp_path / f"out{number}", threading.Barrier(2)
        outcomes: list[object] = []

        def run(output: Path = output, barrier: threading.Barrier = barrier, to: list[object] = outcomes) -> None:
            barrier.wait()
            try:
                to.append(tensorport.convert(tiny, output, progress=False, workers=1))
            except Exception as fault:
                to.append(fault)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kinds = {type(outcome) for outcome in outcomes}
        assert kinds == {tensorport.ConversionReport, tensorport.ConversionError}, outcomes
        assert files(output) == expected


def test_control_c_stops_at_once_and_resumes(source: Path, tmp_path: Path, whole: Trees) -> None:
    output = tmp_path / "out"
    child = start(source, output, VARIANTS["source"])
    wait_for(child, output, listed(5))
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert time.monotonic() - sent < 2
    assert stderr.splitlines()[-1].startswith(b"KeyboardInterrupt"), stderr.decode()
    check_interrupted(output, whole["source"])
    known = len(journal_lines(output)) - 1
    report = tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
    assert report.resumed_tensors == known > 0
    assert files(output) == whole["source"]


@pytest.mark.parametrize("exception", [Stop("enough"), KeyboardInterrupt(), SystemExit(3)])
def test_what_a_callback_raises_stops_the_job(
    source: Path, tmp_path: Path, whole: Trees, exception: BaseException
) -> None:
    output = tmp_path / "out"

    def stop(_: tensorport.ProgressEvent) -> None:
        raise exception

    with pytest.raises(type(exception)) as raised:
        tensorport.convert(source, output, progress=stop, **VARIANTS["source"])
    assert raised.value is exception
    check_interrupted(output, whole["source"])
    tensorport.convert(source, output, resume=True, progress=False, **VARIANTS["source"])
    assert files(output) == whole["source"]


def test_a_source_that_is_edited_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(source, edited)
    with pytest.raises(tensorport.CheckpointError, match=r"model\.safetensors"):
        tensorport.convert(edited, tmp_path / "out", progress=lambda _: edit_bytes(edited), **VARIANTS["source"])
    assert not (tmp_path / "out" / "manifest.json").exists()


FULL = """
import json, resource, sys, tensorport
source, output, limit = sys.argv[1:]
# Python ignores SIGXFSZ, so that a write beyond the limit is an error.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    tensorport.convert(source, output, progress=False)
except OSError as fault:
    print(json.dumps([fault.errno, fault.filename, fault.strerror]))
"""


@pytest.mark.parametrize("limit", [100, 20_000, 80_000])
def test_a_failed_write_names_the_file_and_can_be_resumed(tiny: Path, tmp_path: Path, limit: int) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", FULL, str(tiny), str(output), str(limit)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    number, filename, words = json.loads(run.stdout)
    assert (number, words) == (errno.EFBIG, os.strerror(errno.EFBIG))
    assert Path(filename).is_relative_to(output)
    tensorport.convert(tiny, tmp_path / "whole", progress=False)
    check_interrupted(output, files(tmp_path / "whole"))
    tensorport.convert(tiny, output, resume=True, progress=False)
    assert files(output) == files(tmp_path / "whole")


def test_a_read_only_folder_is_an_os_error(tiny: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    output = tmp_path / "out"
    output.mkdir(mode=0o500)
    with pytest.raises(PermissionError) as fault:
        tensorport.convert(tiny, output, progress=False)
    assert (fault.value.errno, fault.value.filename) == (errno.EACCES, str(output / "journal.jsonl.tmp"))


def test_a_journal_line_without_checksums_of_the_parts_vouches_for_nothing(
    source: Path, tmp_path: Path, whole: Trees
) -> None:
    output = tmp_path / "out"
    interrupt(source, output, **VARIANTS["source"])
    lines = (output / "journal.jsonl").read_text().splitlines()
    entry = json.loads(lines[1])
    entry["part_xxh3_128"] = []
    (output / "journal.jsonl").write_text("\n".join([lines[0], json.dumps(entry), *lines[2:]]) + "\n")
    name = entry["tensor"].replace(".", "_")
    flip_bit(next(output.glob(f"shard_*/{name}*.npy")))
    tensorport.convert(source, output, resume=True, verify=False, progress=False, **VARIANTS["source"])
    assert files(output) == whole["source"]
