"""`tensorport validate`: whether a model is right."""

import argparse
import sys
from collections.abc import Sequence

from tensorport.commands.terminal import encodable, is_terminal

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        "tensorport validate",
        description="Check a model: config against tensors, finite activations layer by layer, cached against uncached "
        "logits, and logits against a reference. Exit status 1 if something is wrong.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|HUB_ID",
        help="a checkpoint or a converted tree with its config.json, or org/name[@revision][/subfolder]",
    )
    parser.add_argument(
        "--reference", metavar="transformers|FILE.npz", help="also compare with transformers, or with stored results"
    )
    parser.add_argument("--source", metavar="DIR|HUB_ID", help="also compare a converted tree with its source")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation [default: float32 if there is memory for it]",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=160, metavar="N", help="length of the random prompt [default: 160]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompt [default: 0]")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parsed = parser.parse_args(arguments)
    if parsed.seed < 0:
        parser.error(f"--seed {parsed.seed}: expected 0 or more")
    from tensorport.validation import validate  # noqa: PLC0415 - needs JAX

    report = validate(
        parsed.model,
        reference=parsed.reference,
        source=parsed.source,
        dtype=parsed.dtype,
        max_tokens=parsed.max_tokens,
        seed=parsed.seed,
        progress=is_terminal(sys.stderr),
    )
    if sys.stdout is not None:
        print(encodable(report.to_json() if parsed.json else repr(report), sys.stdout))
    return 0 if report.ok else 1
