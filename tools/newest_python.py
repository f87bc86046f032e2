"""Prints the newest supported Python of this machine, if it is newer than the one that runs this.

Looks on PATH and beside the running interpreter's version (as pyenv lays them out).
"""

import shutil
import subprocess
import sys
from pathlib import Path

NEWEST_SUPPORTED = 13


def works(python: str) -> bool:
    """Whether the interpreter starts and can make a virtual environment."""
    check = [python, "-c", "import venv, ensurepip"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


for minor in range(NEWEST_SUPPORTED, sys.version_info.minor, -1):
    name = f"python3.{minor}"
    on_path = shutil.which(name)
    versions = Path(sys.base_prefix).parent
    beside = sorted(versions.glob(f"3.{minor}.*/bin/python3"))
    found = [python for python in ([on_path] if on_path else []) + [str(path) for path in beside] if works(python)]
    if found:
        print(found[0])
        break
