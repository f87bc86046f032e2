"""Signals that ask a program to stop: what the command line says, its exit status, and what resume makes of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import tensorport
from tensorport import cli

if sys.platform != "linux":
    pytest.skip("signals as Linux has them", allow_module_level=True)

PYTHON = [sys.executable, "-m", "tensorport"]
STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
LINE = "interrupted (an unfinished conversion goes on with --resume)\n"


@pytest.fixture(params=["python", "binary"])
def command(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "python":
        return PYTHON
    path = os.environ.get("TENSORPORT_BINARY")
    if not path:
        pytest.skip("needs the plain binary: set TENSORPORT_BINARY to its path")
    return [str(Path(path).absolute())]


@pytest.fixture(autouse=True)
def _default_signals() -> Iterator[None]:
    """What starts the tests may ignore signals, and the programs that they start would inherit that."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, write_safetensors: Callable[..., Path]) -> Path:
    """300 tensors: some tenths of a second of work, which is synced to the disk file by file."""
    random = np.random.default_rng(9)
    tensors = {f"{i:03}": random.standard_normal((50, 90), np.float32) for i in range(300)}
    return write_safetensors(tmp_path_factory.mktemp("source") / "model.safetensors", tensors)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed conversion leaves."""
    output = tmp_path_factory.mktemp("whole")
    tensorport.convert(source, output, progress=False)
    return files(output)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(command: list[str], output: Path, number: signal.Signals, **options: Any) -> tuple[int, str]:
    """Sends a signal to a program that converts into `output`, after some tensors; returns its status and stderr."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options) as job:
        journal = output / "journal.jsonl"
        while job.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
            time.sleep(0.0005)
        job.send_signal(number)
        _, stderr = job.communicate(timeout=60)
    assert "panicked" not in stderr
    return job.returncode, stderr


def convert(command: list[str], source: Path, output: Path) -> list[str]:
    return [*command, "convert", "--input", str(source), "--output", str(output), "--workers", "1"]


def assert_resumes(source: Path, output: Path, whole: dict[str, bytes]) -> None:
    assert not (output / "manifest.json").exists()
    report = tensorport.convert(source, output, resume=True, progress=False)
    assert report.resumed_tensors > 0
    assert files(output) == whole


@pytest.mark.parametrize("number", STOPPING)
def test_a_stopped_conversion_says_so_in_one_line_and_resumes(
    command: list[str], source: Path, tmp_path: Path, whole: dict[str, bytes], number: signal.Signals
) -> None:
    output = tmp_path / "out"
    status, stderr = stop(convert(command, source, output), output, number)
    # The plain binary ends by the signal itself, which shells show as 128 and its number.
    assert (status, stderr) == (128 + number if command == PYTHON else -number, LINE)
    assert_resumes(source, output, whole)


@pytest.mark.parametrize("number", STOPPING)
def test_an_ignored_signal_stays_ignored(
    command: list[str], source: Path, tmp_path: Path, whole: dict[str, bytes], number: signal.Signals
) -> None:
    # As nohup and shells start programs. Such a child ignores what its parent ignored.
    signal.signal(number, signal.SIG_IGN)
    status, stderr = stop(convert(command, source, tmp_path / "out"), tmp_path / "out", number)
    assert (status, stderr) == (0, "")
    assert files(tmp_path / "out") == whole


# What a Python program does, and the status that it ends with after SIGTERM.
PROGRAMS = {
    "with the default action": ("", -signal.SIGTERM),
    "with a handler that raises": ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))", 7),
    "with a handler that returns": ("signal.signal(signal.SIGTERM, lambda *_: None)", 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_python_program_ends_as_its_own_handler_says(
    source: Path, tmp_path: Path, whole: dict[str, bytes], name: str
) -> None:
    handler, expected = PROGRAMS[name]
    output = tmp_path / "out"
    program = "import signal, sys, tensorport; exec(sys.argv[3])\n"
    program += "tensorport.convert(sys.argv[1], sys.argv[2], workers=1, progress=False)"
    command = [sys.executable, "-c", program, str(source), str(output), handler]
    assert stop(command, output, signal.SIGTERM) == (expected, "")
    if expected:
        assert_resumes(source, output, whole)
    assert files(output) == whole


def test_a_stopped_synthesis_leaves_an_empty_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [
        *PYTHON,
        "synthesize",
        "--preset",
        "gpt-oss-20b",
        "--set",
        "num_hidden_layers=2",
        "--output",
        str(output),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        while job.poll() is None and not list(output.glob("*.safetensors.tmp")):
            time.sleep(0.0005)
        job.send_signal(signal.SIGTERM)
        _, stderr = job.communicate(timeout=60)
    assert (job.returncode, stderr) == (128 + signal.SIGTERM, "interrupted\n")
    assert not list(output.iterdir())


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in STOPPING]


def test_the_command_line_restores_the_handlers_of_its_caller(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def own(number: int, frame: FrameType | None) -> None:
        raise AssertionError((number, frame))

    for handler in (signal.SIG_DFL, signal.SIG_IGN, own):
        signal.signal(signal.SIGTERM, handler)
        before = handlers()
        for arguments, status in ((["inspect", str(tiny)], 0), (["inspect", "missing"], 1), (["synthesize"], 2)):
            assert cli.main(arguments) == status
            assert handlers() == before
    assert "79 tensors" in capfd.readouterr().out


def test_the_command_line_runs_on_any_thread(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(cli.main(["inspect", str(tiny), "--json"])))
    thread.start()
    thread.join()
    assert statuses == [0]
    assert json.loads(capfd.readouterr().out)["total_tensors"] == 79


def test_ctrl_c_while_jax_compiles_ends_in_one_line(tiny: Path) -> None:
    # What JAX compiles runs on: Python must not end below it.
    program = """
import os, signal, sys, threading, time
from tensorport.cli import program

def interrupt(main=threading.get_ident()):
    while True:
        frame = sys._current_frames()[main]
        while frame is not None and not (frame.f_code.co_name == "prefill" and "text" in frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None and sys._current_frames()[main].f_code.co_name == "backend_compile_and_load":
            break
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
program()
"""
    command = [sys.executable, "-c", program, "generate", "--model", str(tiny), "--prompt-ids", "1,2,3"]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "interrupted\n")
