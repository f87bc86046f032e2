"""The command line. Its flags are defined in Rust; here are the commands that need Python."""

import argparse
import contextlib
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tensorport import _core
from tensorport.checkpoint import open
from tensorport.convert import convert, verify
from tensorport.errors import TensorportError
from tensorport.synthesize import LAYOUTS, PRESETS, synthesize

__all__ = ["main"]


# Exit status of a job that was stopped: 128 and the number of SIGINT, as shells count.
_INTERRUPTED = 130

# Signals other than Ctrl-C's that ask a program to stop.
_STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line on `argv` (default: sys.argv) and returns its exit status."""
    received: list[int] = []
    try:
        with _stopped_by_signals(received):
            status = _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = _INTERRUPTED
    return 128 + received[0] if received and status == _INTERRUPTED else status


@contextlib.contextmanager
def _stopped_by_signals(received: list[int]) -> Iterator[None]:
    """Signals that would end the process are listed and raise KeyboardInterrupt instead."""

    def stop(number: int, _: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    # What is ignored stays ignored, for nohup asks for that; only the main thread may choose.
    is_main = threading.current_thread() is threading.main_thread()
    caught = [number for number in _STOPPING if is_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    command = _COMMANDS.get(arguments[0]) if arguments else None
    if sys.stdout is not None:  # closed before Python started
        sys.stdout.flush()
    if command is None:
        return _core.run_cli(arguments)
    try:
        return command(arguments[1:])
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return int(stop.code or 0)
    except ValueError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except (TensorportError, OSError, ImportError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1


def _synthesize(arguments: list[str]) -> int:
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
        progress=sys.stderr.isatty(),
        **overrides,
    )
    print(open(parsed.output))
    return 0


def _demo(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "tensorport demo", description="Synthesize, convert, verify and load a small checkpoint."
    )
    parser.add_argument("--output", type=Path, help="folder for the demo's files; a new temporary one by default")
    parsed = parser.parse_args(arguments)
    try:
        import jax.numpy as jnp  # noqa: PLC0415 - an extra
    except ImportError:
        raise ImportError("the demo needs JAX: pip install 'tensorport[jax]'") from None
    folder = parsed.output or Path(tempfile.mkdtemp(prefix="tensorport-demo-"))
    checkpoint, tree = folder / "checkpoint", folder / "converted"

    print(f"1. synthesize: a random gpt-oss checkpoint in {checkpoint}")
    synthesize(checkpoint, "demo", progress=False)
    print(f"   {open(checkpoint)!r}")

    print("2. convert: bfloat16 and MXFP4 tensors to npy files that jnp.load reads")
    report = convert(checkpoint, tree, mxfp4="dequantize", progress=False)
    print(f"   {report.total_files} files, {report.total_bytes / 1e6:.1f} MB, {report.seconds:.2f} s")

    print("3. verify: every value against the source")
    verification = verify(tree, checkpoint, progress=False)
    print(f"   {'ok' if verification.ok else verification}")

    print("4. load one tensor with plain JAX")
    name = "model.layers.0.mlp.experts.down_proj"
    file = tree / open(tree).specs[name].files[0]
    array = jnp.load(file)
    print(f"   jnp.load({str(file)!r})\n   {array.dtype} {array.shape}, mean |w| = {float(abs(array).mean()):.4f}")

    program = sys.argv[0] if Path(sys.argv[0]).name == "tensorport" else "python -m tensorport"
    print(f"\nTo look around:\n  {program} inspect {tree} --stats\n  cat {tree}/manifest.json\n  ls {tree}/shard_000")
    return 0 if verification.ok else 1


_COMMANDS: dict[str, Callable[[list[str]], int]] = {"synthesize": _synthesize, "demo": _demo}
