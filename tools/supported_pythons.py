"""Finds the supported Pythons of this machine; as a program it prints the newest that is newer than its own.

Looks on PATH and beside the running interpreter's version (as pyenv lays them out).
"""

import shutil
import subprocess
import sys
from pathlib import Path

SUPPORTED = range(11, 14)
"""Minor versions; pyproject.toml has the oldest, in requires-python."""


def works(python: str) -> bool:
    """Whether the interpreter starts and can make a virtual environment."""
    check = [python, "-c", "import venv, ensurepip"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def find(minor: int) -> str | None:
    """The interpreter of Python 3.`minor`, if there is one."""
    if minor == sys.version_info.minor:
        return sys.executable
    on_path = shutil.which(f"python3.{minor}")
    beside = sorted(Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/python3"))
    candidates = ([on_path] if on_path else []) + [str(path) for path in beside]
    return next((python for python in candidates if works(python)), None)


def main() -> None:
    newer = (find(minor) for minor in reversed(SUPPORTED) if minor > sys.version_info.minor)
    newest = next((python for python in newer if python), None)
    if newest:
        print(newest)


if __name__ == "__main__":
    main()
