"""Conversions that are stopped: killed at some state of their folder, or by their callback."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorport

Options = dict[str, Any]

CONVERT = """
import json, sys, tensorport
source, output, options = sys.argv[1:]
tensorport.convert(source, output, progress=False, **json.loads(options))
"""


class Stop(Exception):  # noqa: N818 - what a user's callback raises need not be an error
    """What a callback of these tests raises."""


def journal_lines(output: Path) -> list[bytes]:
    try:
        return (output / "journal.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:  # not begun, or done: a conversion removes it as it ends
        return []


def start(source: Path, output: Path, options: Options) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", CONVERT, str(source), str(output), json.dumps(options)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def listed(count: int) -> Callable[[Path], bool]:
    """Whether the journal lists more tensors than so many."""
    return lambda output: len(journal_lines(output)) > count + 1


def wait_for(child: "subprocess.Popen[bytes]", output: Path, reached: Callable[[Path], bool]) -> None:
    """Returns when the folder has reached the state, or the child is gone."""
    while child.poll() is None and not reached(output):
        time.sleep(0.0002)


def kill(child: "subprocess.Popen[bytes]") -> bool:
    """Whether the child was still running."""
    child.kill()
    _, stderr = child.communicate()
    assert child.returncode in {0, -signal.SIGKILL}, stderr.decode()
    return child.returncode != 0


def interrupt(source: Path, output: Path, lines: int = 20, **options: Any) -> list[str]:
    """Stops a conversion by its callback after some tensors; returns the names that the journal lists."""

    def stop(_: tensorport.ProgressEvent) -> None:
        if len(journal_lines(output)) > lines:
            raise Stop

    with pytest.raises(Stop):
        tensorport.convert(source, output, progress=stop, **options)
    return [json.loads(line)["tensor"] for line in journal_lines(output)[1:]]
