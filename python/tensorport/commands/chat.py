"""`tensorport chat`: questions and answers, with a history.

Answers go to standard output, all else to standard error.
"""

import argparse
import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from tensorport.commands.options import COMPILES, add_model, add_sampling, load, sampling
from tensorport.commands.terminal import dim, encodable, has_colors, is_terminal, note, visible

if TYPE_CHECKING:
    from tensorport.models import LanguageModel
    from tensorport.models.generation import ChatStream

__all__ = ["run"]

_HELP = """\
/reset  forget all that was said
/stats  how long the last answer took
/help   this text
/exit   leave, as Ctrl-D does
Ctrl-C stops an answer."""

_PROMPT = "> "

INTERRUPTED = "[interrupted by the user]"
"""What stands in the history behind an answer that was stopped."""


class _ControlC(KeyboardInterrupt):
    """Ctrl-C while no answer is coming; a signal that ends the program raises another KeyboardInterrupt."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        "tensorport chat",
        description="Talk to a model: a line is a question. Standard input may be a file or a pipe.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all questions")
    parser.add_argument("--reasoning", choices=("low", "medium", "high"), help="effort before an answer")
    parser.add_argument("--show-analysis", action="store_true", help="show the model's reasoning, too")
    add_sampling(parser, max_new_tokens=1024)
    parsed = parser.parse_args(arguments)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end a chat
    model = load(parsed, text=True)
    chat = _Chat(model, parsed)
    chat.check()
    if is_terminal(sys.stdin):
        with contextlib.suppress(ImportError):  # history and editing of lines, where Python was built with it
            import readline  # noqa: F401, PLC0415 - what importing does
        note(f"{model!r}\n{COMPILES}\n/help lists commands.")
    chat.run()
    # A person has seen what failed; a program that pipes questions in is told.
    return 1 if chat.has_failed and not is_terminal(sys.stdin) else 0


class _Chat:
    """What was said, and the answer that is coming."""

    def __init__(self, model: "LanguageModel", parsed: argparse.Namespace) -> None:
        self._model = model
        self._parsed = parsed
        self._first = [] if parsed.system is None else [{"role": "system", "content": parsed.system}]
        self.messages: list[dict[str, Any]] = [*self._first]
        self._stats: Any = None
        self._answer: ChatStream | None = None
        self._is_stopped = False
        self.has_failed = False

    def check(self) -> None:
        """Refuses a checkpoint that has no template, or one that refuses what is said first."""
        self._model.tokenizer.chat_prompt([*self.messages, {"role": "user", "content": ""}])

    def run(self) -> None:
        """Questions and answers until the input ends."""
        with self._control_c():
            while True:
                try:
                    line = _read()
                    if line is None or line.strip() == "/exit":
                        return
                    self._take(line.strip())
                except _ControlC:
                    if not is_terminal(sys.stdin):
                        raise
                    note("\n/exit or Ctrl-D leaves.")

    def _take(self, line: str) -> None:
        if line == "/reset":
            self.messages = [*self._first]
            note("All is forgotten.")
        elif line == "/stats":
            note("There was no answer yet." if self._stats is None else repr(self._stats))
        elif line == "/help":
            note(_HELP)
        elif line.startswith("/") and line[1:].isalpha():
            note(f"{line}: no such command; /help lists them.")
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        asked = [*self.messages, {"role": "user", "content": question}]
        self._is_stopped = False
        printer = _Printer(show_analysis=self._parsed.show_analysis)
        try:
            self._answer = self._model.chat(
                asked, reasoning_effort=self._parsed.reasoning, stream=True, **sampling(self._parsed)
            )
            printer.wait()
            with contextlib.suppress(_ControlC):  # a second one, while a step takes long
                for delta in self._answer:
                    printer.add(delta.channel, delta.recipient, delta.text)
            printer.end()
            reply = self._answer.reply
        except (ValueError, ArithmeticError) as fault:
            # Too long a history, or a model whose logits are not finite: the chat itself goes on.
            printer.end()
            hint = "" if isinstance(fault, ArithmeticError) else " /reset makes room."
            note(f"error: {fault}\nThe question was dropped.{hint}")
            self.has_failed = True
            return
        finally:
            self._answer = None
            printer.end()  # also where a signal ends the program
        self._stats = reply.stats
        if self._is_stopped:
            note(INTERRUPTED)
            said = {"role": "assistant", "content": f"{printer.said} {INTERRUPTED}".lstrip()}
        else:
            said = reply.message
            if not printer.said and not reply.tool_calls:
                note(f"(no answer: {reply.stats.new_tokens} tokens of reasoning; --max-new-tokens allows more)")
        self.messages = [*asked, said]

    @contextlib.contextmanager
    def _control_c(self) -> Iterator[None]:
        """Ctrl-C stops the answer that is coming, and raises where there is none, or at once the second time."""

        def stop(_: int, __: FrameType | None) -> None:
            if self._answer is None or self._is_stopped:
                raise _ControlC
            self._is_stopped = True
            self._answer.stop()

        # What is ignored stays ignored; only the main thread may choose.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT)
        if not is_main or before == signal.SIG_IGN:
            yield
            return
        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _Printer:
    """Shows an answer as it comes.

    Attributes:
        said: what the user was told, all but reasoning and calls of functions.
    """

    def __init__(self, *, show_analysis: bool) -> None:
        self._show_analysis = show_analysis
        self._has_colors = has_colors(sys.stdout)
        self._kind: tuple[str, str | None] | None = None
        self._is_waiting = False
        self.said = ""

    def wait(self) -> None:
        """A mark on a terminal, on a line of its own, until there is something to show."""
        if self._has_colors and not self._is_waiting:
            self.end()
            self._is_waiting = True
            _write(dim("thinking…"))

    def add(self, channel: str, recipient: str | None, text: str) -> None:
        """More text of a message; of hidden reasoning the mark alone."""
        is_analysis = channel == "analysis" and recipient is None
        if not is_analysis and recipient is None:
            self.said += text
        if is_analysis and not self._show_analysis:
            self.wait()
            return
        self._clear()
        if self._kind != (channel, recipient):
            _write("\n" * (self._kind is not None))
            self._kind = channel, recipient
            if recipient is not None:
                _write(f"[calls {visible(recipient)}] ")
        text = visible(text)
        _write(dim(text) if is_analysis and self._has_colors else text)

    def end(self) -> None:
        """Ends the line, if there is one."""
        self._clear()
        _write("\n" * (self._kind is not None))
        self._kind = None

    def _clear(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            _write("\r\x1b[K")


def _write(text: str) -> None:
    if sys.stdout is not None:
        print(encodable(text, sys.stdout), end="", flush=True)


def _read() -> str | None:
    """The next line; None where the input ends."""
    if sys.stdin is None:
        return None
    if not is_terminal(sys.stdin):
        return sys.stdin.readline() or None
    try:
        if is_terminal(sys.stdout):
            return input(_PROMPT)
        # input() would write the prompt between the answers.
        print(_PROMPT, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline() or None
    except EOFError:
        _write("\n")
        return None
