"""The command line. Its flags are defined in Rust; `commands` has those that need Python."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tensorport import _core
from tensorport.commands import COMMANDS
from tensorport.errors import TensorportError
from tensorport.reports import printable
from tensorport.source import LocalSource, arriving_source, local_path

__all__ = ["main", "program"]


# Exit status of a job that was stopped: 128 and the number of SIGINT, as shells count.
_INTERRUPTED = 130

# From here on exit statuses are 128 and the number of a signal.
_SIGNALLED = 128

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
    return _SIGNALLED + received[0] if received and status == _INTERRUPTED else status


def program() -> NoReturn:
    """Runs the command line as a program, and ends it."""
    status = main()
    if "jax" not in sys.modules or status < _SIGNALLED:
        sys.exit(status)
    # JAX compiles on a thread of its own, which goes on behind Ctrl-C and cannot be waited for. Where it still runs
    # when Python takes JAX's client down, that is a segmentation fault (jaxlib 0.10.2): nothing is taken down.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            stream.flush()
    os._exit(status)


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
    if sys.stdout is not None:  # closed before Python started
        sys.stdout.flush()
    try:
        if not arguments or arguments[0] not in COMMANDS:
            return _run_core(arguments)
        command = importlib.import_module(f"tensorport.commands.{arguments[0]}")
        status: int = command.run(arguments[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return int(stop.code or 0)
    except BrokenPipeError:  # a reader that closed the pipe has seen enough
        _let_go_of_stdout()
        return 0
    except ValueError as fault:
        _complain(fault)
        return 2
    except (TensorportError, OSError, ImportError, ArithmeticError) as fault:
        # Writing a result has no file to name; the network has none either.
        if isinstance(fault, OSError) and fault.filename is None and not isinstance(fault, ConnectionError):
            _let_go_of_stdout()
        _complain(fault)
        return 1


def _run_core(arguments: list[str]) -> int:
    is_shown = sys.stderr is not None and sys.stderr.isatty()
    opened: list[LocalSource] = []

    def open_source(source: str, may_arrive: bool) -> tuple[Path, _core.Arrivals | None]:
        if not may_arrive:
            return local_path(source, is_shown), None
        opened.append(arriving_source(source, is_shown))
        return opened[-1].path, opened[-1].arrivals

    try:
        status = _core.run_cli(arguments, open_source)
        for source in opened if status == 0 else []:
            source.finish()
        return status
    finally:
        for source in opened:
            source.close()


def _complain(fault: Exception) -> None:
    if sys.stderr is not None:
        # Names and texts of a checkpoint may carry control characters.
        print(f"error: {printable(str(fault))}", file=sys.stderr)


def _let_go_of_stdout() -> None:
    """What could not be written is not tried again when Python ends, which would be one more message."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
