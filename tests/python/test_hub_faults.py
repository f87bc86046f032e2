"""Hubs and networks that fail: what is tried again, what goes on where it stopped, and what the errors say."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport
from arrays import random_array
from fake_hub import FakeHub, Fault
from huggingface_hub import constants, hf_hub_download
from tensorport.hub import transfer

REPO = "org/model"
SHARD = "model.safetensors"
CONFIG = "config.json"
NBYTES = 3_000_000
"""Large enough to go on with: tensorport.hub.transfer says from where on."""

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def array() -> np.ndarray[Any, Any]:
    return random_array((NBYTES // 4 // 3, 3), np.float32)


@pytest.fixture
def files(tmp_path: Path, write_safetensors: Write, array: np.ndarray[Any, Any]) -> dict[str, bytes]:
    shard = write_safetensors(tmp_path / "written.safetensors", {"w": array})
    return {CONFIG: b"{}", SHARD: shard.read_bytes()}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and nobody listens where the hub was."""

    def stop() -> None:
        gone = "http://127.0.0.1:9"  # the port that discards, where nothing listens
        monkeypatch.setattr(constants, "ENDPOINT", gone)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", gone + "/{repo_id}/resolve/{revision}/{filename}")

    return stop


def assert_opens(source: str, array: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(tensorport.open(source)["w"], array)


def left_over(folder: Path) -> list[str]:
    return [path.name for path in (folder / "hub-cache").rglob("*.incomplete")]


@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_broken_connection_goes_on_where_it_stopped(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], tmp_path: Path, end: str
) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=1_200_000, end=end), Fault(sent=500_000, end=end)]
    assert_opens(REPO, array)
    first, second, third = hub.ranges(SHARD)
    assert first is None
    begins = [int(re.fullmatch(r"bytes=(\d+)-", part or "")[1]) for part in (second, third)]  # type: ignore[index]
    assert 0 < begins[0] <= 1_200_000
    assert begins[0] < begins[1] <= begins[0] + 500_000
    assert left_over(tmp_path) == []


def test_progress_does_not_count_bytes_twice_after_a_reset(hub: FakeHub, files: dict[str, bytes]) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=1_200_000), Fault(ignores_range=True, pause_s=0.01)]
    hub.faults[CONFIG] = [Fault(sent=1)]
    events: list[tensorport.ProgressEvent] = []
    tensorport.open(REPO, progress=events.append)
    total = sum(map(len, files.values()))
    assert max(event.bytes_done for event in events) == events[-1].bytes_done == total


def test_a_small_file_that_breaks_is_brought_again(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any]
) -> None:
    hub.add(REPO, files)
    hub.faults[CONFIG] = [Fault(sent=1, end="reset"), Fault(sent=0, end="close"), Fault(status=500)]
    assert_opens(REPO, array)
    assert (tensorport.open(REPO).path / CONFIG).read_bytes() == b"{}"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_fails_once_is_asked_again(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], status: int
) -> None:
    hub.add(REPO, files)
    hub.faults["api"] = [Fault(status=status)]
    hub.faults[SHARD] = [Fault(status=status)]
    assert_opens(REPO, array)


def test_a_server_that_ignores_ranges_sends_the_whole_file_once_more(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any]
) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=1_200_000), Fault(ignores_range=True)]
    assert_opens(REPO, array)
    assert len(hub.ranges(SHARD)) == 2


def test_a_slow_server_is_waited_for(hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any]) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(pause_s=0.02)]
    assert_opens(REPO, array)
    assert hub.ranges(SHARD) == [None]


def test_a_server_that_stalls_is_left_and_asked_for_the_rest(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=1_200_000, end="stall")]
    assert_opens(REPO, array)
    assert [part is None for part in hub.ranges(SHARD)] == [True, False]


def test_a_server_that_always_breaks_is_given_up_and_what_came_is_kept(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=1_200_000), *[Fault(sent=0)] * 20]
    with pytest.raises(ConnectionError, match=r"org/model: found .* expected one of them: what came so far is kept"):
        tensorport.open(REPO)
    assert len(hub.ranges(SHARD)) < 10
    assert len(left_over(tmp_path)) == 1
    hub.faults.clear()
    hub.sent.clear()
    assert_opens(REPO, array)
    assert hub.downloads() == [SHARD]
    assert hub.ranges(SHARD)[0] not in (None, "bytes=0-")


PROGRAM = """
import sys, tensorport
def tell(event):
    if event.bytes_done > 1_000_000 and event.tensors_done == 1:
        print("half", flush=True)
print(tensorport.open(sys.argv[1], progress=tell))
"""


@pytest.fixture
def start(hub: FakeHub, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python program in whose environment the hub is."""
    started = []

    def popen(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        program = subprocess.Popen(
            [sys.executable, *arguments],
            env={**inherited, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub-cache"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(program)
        return program

    yield popen
    for program in started:
        program.kill()
        program.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_was_killed_goes_on_in_the_next_process(
    hub: FakeHub,
    files: dict[str, bytes],
    array: np.ndarray[Any, Any],
    start: Callable[..., subprocess.Popen[str]],
    number: signal.Signals,
) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=2_200_000, end="stall")]
    program = start("-c", PROGRAM, REPO)
    assert program.stdout is not None
    assert program.stdout.readline() == "half\n"
    # Ctrl-C is not kept waiting by a server that stalls, which would take ten seconds to give up.
    begin = time.monotonic()
    program.send_signal(number)
    _, error = program.communicate(timeout=60)
    assert time.monotonic() - begin < 5
    assert program.returncode == -number, error
    hub.sent.clear()
    assert_opens(REPO, array)
    assert hub.downloads() == [SHARD]
    (part,) = hub.ranges(SHARD)
    assert int(re.fullmatch(r"bytes=(\d+)-", part or "")[1]) > 1_000_000  # type: ignore[index]


def test_what_a_killed_download_left_is_checked_against_its_hash(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=1_200_000), *[Fault(sent=0)] * 20]
    with pytest.raises(ConnectionError):
        tensorport.open(REPO)
    (partial,) = (tmp_path / "hub-cache").rglob("*.incomplete")
    content = bytearray(partial.read_bytes())
    content[1000] ^= 1
    partial.write_bytes(content)
    hub.faults.clear()
    assert_opens(REPO, array)
    assert hub.ranges(SHARD)[-1] is None
    assert left_over(tmp_path) == []


def test_a_bit_that_a_download_flips_is_found(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    hub.add(REPO, files)
    flipped = bytearray(files[SHARD])
    flipped[-7] ^= 1
    hub.faults[SHARD] = [Fault(content=bytes(flipped))] * 20
    with pytest.raises(ConnectionError, match="found other bytes than its SHA-256 says"):
        tensorport.open(REPO)
    assert left_over(tmp_path) == []
    hub.faults.clear()
    assert_opens(REPO, array)
    # Where it happens once, the file is asked for again.
    hub.faults[SHARD] = [Fault(content=bytes(flipped))]
    shutil.rmtree(tmp_path / "hub-cache")
    assert_opens(REPO, array)


@pytest.mark.parametrize("content", [b"", b"x" * (NBYTES + 1000)])
def test_a_left_over_of_another_length_is_no_harm(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], tmp_path: Path, content: bytes
) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(sent=1_200_000), *[Fault(sent=0)] * 20]
    with pytest.raises(ConnectionError):
        tensorport.open(REPO)
    (partial,) = (tmp_path / "hub-cache").rglob("*.incomplete")
    partial.write_bytes(content)
    hub.faults.clear()
    assert_opens(REPO, array)


def test_two_processes_bring_a_file_once(
    hub: FakeHub, files: dict[str, bytes], start: Callable[..., subprocess.Popen[str]]
) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(pause_s=0.05)]
    programs = [start("-c", PROGRAM, REPO) for _ in range(2)]
    for program in programs:
        output, error = program.communicate(timeout=60)
        assert output.endswith("1 tensors, 750,000 parameters, 3.00 MB>\n"), output + error
    assert hub.ranges(SHARD) == [None]


REFUSALS = {
    "no repository": (
        "org/nothing",
        "org/nothing: found no such file or folder, and no repository org/nothing at {hub}, expected a path or an id; "
        "a private repository needs `hf auth login` or HF_TOKEN",
    ),
    "private": (
        "org/private",
        "org/private: found no such file or folder, and no repository org/private at {hub}, expected a path or an id; "
        "a private repository needs `hf auth login` or HF_TOKEN",
    ),
    "gated": (
        "org/gated",
        "org/gated: found a gated repository, expected access to it: accept its terms at {hub}/org/gated, then log in "
        "with `hf auth login` or set HF_TOKEN",
    ),
    "no revision": (
        "org/model@v9",
        "org/model@v9: found no revision 'v9' of org/model at {hub}, expected a branch, a tag or a commit",
    ),
}


@pytest.mark.parametrize("token", [None, "hf_other"])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_what_to_do_in_one_sentence(
    hub: FakeHub, files: dict[str, bytes], case: str, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for repo in (REPO, "org/gated", "org/private"):
        hub.add(repo, files)
    hub.gates["org/gated"] = hub.private["org/private"] = "hf_good"
    source, message = REFUSALS[case]
    before = time.monotonic()
    with pytest.raises(tensorport.CheckpointError) as caught:
        tensorport.open(source)
    assert str(caught.value) == message.format(hub=hub.endpoint)
    # A refusal is final: nothing is tried again.
    assert len(hub.requests) <= 2 + len(files)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_said_to_be_one(hub: FakeHub, files: dict[str, bytes], status: int) -> None:
    hub.add(REPO, files)
    hub.faults["api"] = [Fault(status=status)]
    with pytest.raises(
        tensorport.CheckpointError, match=f"org/model: found {status} at {hub.endpoint}, expected access"
    ):
        tensorport.open(REPO)


def test_a_file_that_is_listed_and_not_there_is_named_as_the_hub_s_fault(hub: FakeHub, files: dict[str, bytes]) -> None:
    hub.add(REPO, files)
    hub.faults[SHARD] = [Fault(status=404, code="EntryNotFound")]
    with pytest.raises(tensorport.CheckpointError, match="found 404 for a file that org/model lists"):
        tensorport.open(REPO)


def test_without_a_network_the_copy_in_the_cache_is_used_with_a_warning(
    hub: FakeHub, files: dict[str, bytes], array: np.ndarray[Any, Any], refused: Callable[[], None]
) -> None:
    commit = hub.add(REPO, files)
    tensorport.open(REPO)
    refused()
    for source in (REPO, f"{REPO}@main", f"{REPO}@{commit}"):
        with pytest.warns(UserWarning, match=r"org/model.*: http://127\.0\.0\.1:9 does not answer as it should"):
            assert_opens(source, array)
    with pytest.raises(
        ConnectionError, match=r"org/model@v1: found no such file or folder, no whole copy of org/model"
    ):
        tensorport.open(f"{REPO}@v1")


def test_a_copy_that_is_not_whole_is_not_used(
    hub: FakeHub, files: dict[str, bytes], refused: Callable[[], None], tmp_path: Path
) -> None:
    hub.add(REPO, files)
    hf_hub_download(REPO, CONFIG)
    refused()
    with pytest.raises(ConnectionError, match=f"no whole copy of org/model in {tmp_path / 'hub-cache'}"):
        tensorport.open(REPO)


def test_numbered_files_without_an_index_are_whole_when_all_are_there(
    hub: FakeHub, files: dict[str, bytes], refused: Callable[[], None]
) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    hub.add(REPO, {CONFIG: b"{}", names[0]: files[SHARD], names[1]: files[SHARD]})
    hf_hub_download(REPO, names[0])
    refused()
    with pytest.raises(ConnectionError, match="no whole copy"):
        tensorport.open(REPO)


OFFLINE = "import sys, tensorport; print(list(tensorport.open(sys.argv[1])))"


def test_offline_mode_uses_the_cache_and_no_network(
    hub: FakeHub, files: dict[str, bytes], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    hub.add(REPO, files)
    tensorport.open(REPO)
    before = len(hub.requests)
    program = start("-W", "error", "-c", OFFLINE, REPO, HF_HUB_OFFLINE="1")
    output, error = program.communicate(timeout=60)
    assert (output, error) == ("['w']\n", "")
    program = start("-c", OFFLINE, "org/other", HF_HUB_OFFLINE="1")
    _, error = program.communicate(timeout=60)
    assert error.splitlines()[-1] == (
        f"ConnectionError: org/other: found no such file or folder, and no whole copy of org/other in "
        f"{tmp_path / 'hub-cache'}, expected one: HF_HUB_OFFLINE is set; without it, the repository is downloaded"
    )
    assert len(hub.requests) == before


def test_hf_home_says_where_the_cache_is(
    hub: FakeHub, files: dict[str, bytes], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    commit = hub.add(REPO, files)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    program = start("-c", "import sys, tensorport; print(tensorport.open(sys.argv[1]).path)", REPO, **environment)
    output, error = program.communicate(timeout=60)
    assert output == f"{tmp_path / 'home' / 'hub' / 'models--org--model' / 'snapshots' / commit}\n", error


def test_a_full_disk_is_named_and_not_tried_again(
    hub: FakeHub, files: dict[str, bytes], start: Callable[..., subprocess.Popen[str]]
) -> None:
    hub.add(REPO, files)
    code = (
        "import resource, signal, sys, tensorport\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "tensorport.open(sys.argv[1])"
    )
    program = start("-c", code, REPO)
    _, error = program.communicate(timeout=60)
    assert "File too large" in error.splitlines()[-1]
    assert len(hub.ranges(SHARD)) == 1
