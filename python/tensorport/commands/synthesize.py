"""`tensorport synthesize`: a random checkpoint in a real layout."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorport.checkpoint import open
from tensorport.synthesize import LAYOUTS, PRESETS, synthesize

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser("tensorport synthesize", description="Write a random checkpoint in a real layout.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--layout", choices=LAYOUTS, default="huggingface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", action="append", default=[], help="override a field of config.json; repeatable"
    )
    parsed = parser.parse_args(arguments)
    overrides: dict[str, Any] = {}
    for item in parsed.set:
        field, separator, value = item.partition("=")
        if not separator:
            parser.error(f"--set {item}: expected FIELD=VALUE")
        try:
            overrides[field] = float(value) if "." in value or "e" in value else int(value)
        except ValueError:
            parser.error(f"--set {item}: expected a number")
    synthesize(
        parsed.output,
        parsed.preset,
        seed=parsed.seed,
        layout=parsed.layout,
        progress=sys.stderr is not None and sys.stderr.isatty(),
        **overrides,
    )
    print(open(parsed.output))
    return 0
