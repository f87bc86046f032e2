"""Conversion of a repository while it is downloaded: the same bytes, earlier, and from any interruption on."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport
from arrays import random_array
from fake_hub import FakeHub, Fault
from huggingface_hub import constants
from tensorport.hub import transfer

REPO = "org/model"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
NAMES = ["a.weight", "b.weight", "c.weight"]

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _stand_ins_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test nothing is left of the stand-ins."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.fixture
def model(tmp_path: Path, write_safetensors: Write) -> Path:
    """What the repository has: one tensor of 1.2 MB and more in each file."""
    folder = tmp_path / "model"
    folder.mkdir()
    for number, (shard, name) in enumerate(zip(SHARDS, NAMES, strict=True), 1):
        write_safetensors(folder / shard, {name: random_array((1000 + number, 300 + number), np.float32, number)})
    (folder / "config.json").write_text("{}")
    return folder


def add(hub: FakeHub, folder: Path, **changed: bytes) -> str:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.add(REPO, {**files, **changed})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def headers(hub: FakeHub) -> list[str]:
    return sorted(name for name, part in hub.sent if (part or "").startswith("bytes=0-"))


@pytest.mark.parametrize("options", [{}, {"precision": "float16"}, {"mxfp4": "dequantize"}, {"include": "*.0.*"}])
def test_the_bytes_are_those_of_a_conversion_from_a_folder(
    hub: FakeHub, tiny: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    add(hub, tiny)
    tensorport.convert(REPO, tmp_path / "out", progress=False, **options)
    tensorport.convert(tiny, tmp_path / "expected", progress=False, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_the_first_files_are_converted_while_later_ones_are_on_their_way(
    hub: FakeHub, model: Path, tmp_path: Path
) -> None:
    add(hub, model)
    gate = threading.Event()
    hub.faults[SHARDS[2]] = [Fault(until=gate)]
    events: list[tensorport.ProgressEvent] = []

    def tell(event: tensorport.ProgressEvent) -> None:
        events.append(event)
        if event.phase == "convert" and event.tensors_done == 2 and not gate.is_set():
            assert (tmp_path / "out" / "shard_000" / "a_weight.npy").exists()
            assert not list((tmp_path / "hub-cache").rglob(SHARDS[2]))
            gate.set()

    tensorport.convert(REPO, tmp_path / "out", progress=tell)
    assert gate.is_set()
    assert tensorport.verify(tmp_path / "out", model, progress=False).ok
    downloads = [event for event in events if event.phase == "download"]
    total = sum((model / shard).stat().st_size for shard in SHARDS)
    assert (downloads[-1].bytes_done, downloads[-1].bytes_total, downloads[-1].tensors_done) == (total, total, 3)
    assert hub.ranges(SHARDS[2]) == [None]


def test_both_bars_show(hub: FakeHub, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    add(hub, model)
    tensorport.convert(REPO, tmp_path / "out")
    shown = capfd.readouterr().err
    assert "download: 100%" in shown
    assert "convert: 100%" in shown


def test_headers_are_asked_for_once_and_not_of_what_is_here(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    add(hub, model)
    tensorport.convert(REPO, tmp_path / "out", progress=False)
    assert headers(hub) == SHARDS
    assert hub.downloads() == sorted([*SHARDS, "config.json"])
    before = len(hub.sent)
    tensorport.convert(REPO, tmp_path / "again", progress=False)
    assert len(hub.sent) == before
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    # All of it came, which is what the revision is without a network.
    hub.faults["api"] = [Fault(status=503)]
    with pytest.warns(UserWarning, match="the copy in the cache is used"):
        assert list(tensorport.open(REPO)) == NAMES


def test_a_long_header_is_asked_for_twice(hub: FakeHub, model: Path, tmp_path: Path, write_safetensors: Write) -> None:
    array = random_array((300, 5), np.float32)
    write_safetensors(model / SHARDS[1], {"b.weight": array}, metadata={"long": "x" * 300_000})
    add(hub, model)
    tensorport.convert(REPO, tmp_path / "out", progress=False)
    assert headers(hub) == sorted([*SHARDS, SHARDS[1]])
    np.testing.assert_array_equal(tensorport.open(tmp_path / "out")["b.weight"], array)


class StopError(Exception):
    pass


def interrupted(output: Path, hub: FakeHub) -> None:
    """A conversion that stops when two files are converted and the third is on its way."""
    hub.faults[SHARDS[2]] = [Fault(sent=100, end="stall")]

    def stop(event: tensorport.ProgressEvent) -> None:
        if event.phase == "convert" and event.tensors_done == 2:
            raise StopError

    begin = time.monotonic()
    with pytest.raises(StopError):
        tensorport.convert(REPO, output, progress=stop)
    assert time.monotonic() - begin < 8  # the server that stalls is not waited for


def test_an_interrupted_conversion_goes_on_with_what_came(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    add(hub, model)
    interrupted(tmp_path / "out", hub)
    hub.sent.clear()
    begin = time.monotonic()
    report = tensorport.convert(REPO, tmp_path / "out", resume=True, progress=False)
    assert time.monotonic() - begin < 5  # nor does what was stopped hold the file
    assert report.resumed_tensors == 2
    assert hub.downloads() == [SHARDS[2]]
    tensorport.convert(model, tmp_path / "expected", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_it_goes_on_without_a_network_once_all_is_here(
    hub: FakeHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, model)
    interrupted(tmp_path / "out", hub)
    tensorport.open(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tensorport.convert(REPO, tmp_path / "out", resume=True, progress=False).resumed_tensors == 2


def test_another_commit_with_the_same_headers_is_another_source(
    hub: FakeHub, model: Path, tmp_path: Path, write_safetensors: Write
) -> None:
    add(hub, model)
    interrupted(tmp_path / "out", hub)
    write_safetensors(model / SHARDS[0], {"a.weight": random_array((1001, 301), np.float32, 99)})
    add(hub, model)
    with pytest.raises(tensorport.ConversionError, match="source"):
        tensorport.convert(REPO, tmp_path / "out", resume=True, progress=False)


def test_a_download_that_fails_ends_the_conversion_with_its_own_error(
    hub: FakeHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.01)
    add(hub, model)
    hub.faults[SHARDS[2]] = [Fault(sent=1000)] + [Fault(sent=0)] * 20
    with pytest.raises(ConnectionError, match=r"org/model: found .*: what came so far is kept"):
        tensorport.convert(REPO, tmp_path / "out", progress=False)
    hub.faults.clear()
    hub.sent.clear()
    tensorport.convert(REPO, tmp_path / "out", resume=True, progress=False)
    assert hub.downloads() == [SHARDS[2]]
    assert tensorport.verify(tmp_path / "out", model, progress=False).ok


def test_a_gated_repository_is_refused_before_anything_is_written(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    add(hub, model)
    hub.gates[REPO] = "hf_good"
    with pytest.raises(tensorport.CheckpointError, match="org/model: found a gated repository"):
        tensorport.convert(REPO, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_fault_of_the_conversion_does_not_wait_for_the_download(
    hub: FakeHub, model: Path, tmp_path: Path, write_safetensors: Write
) -> None:
    write_safetensors(model / SHARDS[0], {"a.weight": np.full((3, 5), 1e30, np.float32)})
    add(hub, model)
    never = threading.Event()
    hub.faults[SHARDS[1]] = [Fault(until=never)]
    hub.faults[SHARDS[2]] = [Fault(until=never)]
    begin = time.monotonic()
    with pytest.raises(tensorport.ConversionError, match="15 finite values beyond float16"):
        tensorport.convert(REPO, tmp_path / "out", precision="float16", workers=4, progress=False)
    assert time.monotonic() - begin < 8


def test_a_file_with_another_header_than_was_announced_is_refused(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    add(hub, model)
    content = (model / SHARDS[1]).read_bytes()
    hub.faults[f"{SHARDS[1]} header"] = [Fault(content=content.replace(b"b.weight", b"x.weight", 1))]
    with pytest.raises(tensorport.CheckpointError, match=f"{SHARDS[1]}: found another size or header"):
        tensorport.convert(REPO, tmp_path / "out", progress=False)


def test_what_no_header_is_is_refused_as_in_a_folder(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    (model / SHARDS[1]).write_bytes(b"\xff" * 3000)
    add(hub, model)
    with pytest.raises(tensorport.CheckpointError, match=SHARDS[1]):
        tensorport.convert(REPO, tmp_path / "out", progress=False)


def test_the_command_converts_while_it_downloads(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    add(hub, model)
    gate = threading.Event()
    hub.faults[SHARDS[2]] = [Fault(until=gate)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "TMPDIR": str(tmp_path / "temporary"),
    }
    command = [sys.executable, "-m", "tensorport", "convert", "--input", REPO, "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        give_up = time.monotonic() + 60
        while not (tmp_path / "out" / "shard_000" / "b_weight.npy").exists() and time.monotonic() < give_up:
            time.sleep(0.02)
        assert not list((tmp_path / "hub-cache").rglob(SHARDS[2]))
        gate.set()
        output, error = job.communicate(timeout=60)
    assert (job.returncode, error) == (0, ""), output
    assert tensorport.verify(tmp_path / "out", model, progress=False).ok
