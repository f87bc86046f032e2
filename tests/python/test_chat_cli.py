"""`tensorport chat`: questions from a pipe and from a terminal, the history that templates see, and Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorport
from tensorport import LanguageModel, cli
from tensorport.commands import chat as command
from tensorport.text import ChatReply, HarmonyDelta

Capture = pytest.CaptureFixture[str]
Asked = list[dict[str, Any]]


class Answer(Iterator[HarmonyDelta]):
    """A ChatStream without a model: given pieces; may be interrupted behind one of them."""

    def __init__(self, deltas: list[HarmonyDelta], interrupt_behind: int | None = None) -> None:
        self._deltas, self._interrupt_behind, self._given = deltas, interrupt_behind, 0
        self.is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True

    def __next__(self) -> HarmonyDelta:
        if self._given == self._interrupt_behind:
            signal.raise_signal(signal.SIGINT)
        if self.is_stopped or self._given == len(self._deltas):
            raise StopIteration
        self._given += 1
        return self._deltas[self._given - 1]

    @property
    def reply(self) -> ChatReply:
        texts = {
            channel: "".join(delta.text for delta in self._deltas[: self._given] if delta.channel == channel)
            for channel in ("analysis", "final")
        }
        return ChatReply(texts["final"], texts["analysis"], stats=f"{self._given} pieces")


def deltas(*pieces: str) -> list[HarmonyDelta]:
    """Pieces as `channel: text`."""
    parts = [piece.split(": ", 1) for piece in pieces]
    return [HarmonyDelta(channel, None, text) for channel, text in parts]


@pytest.fixture(scope="module")
def model(two_layers: Path) -> LanguageModel:
    return tensorport.load_model(two_layers)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[Asked, list[Answer]]:
    """What `chat` of the model is called with, and the answers that it gives one after the other."""
    calls: Asked = []
    answers: list[Answer] = []

    def answer(self: LanguageModel, messages: Any, **settings: Any) -> Answer:
        calls.append({"messages": [dict(message) for message in messages], **settings})
        self.tokenizer.chat_prompt(messages)  # the template refuses what it cannot render
        return answers.pop(0)

    monkeypatch.setattr(LanguageModel, "chat", answer)
    return calls, answers


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, two_layers: Path, lines: str, *flags: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    status = cli.main(["chat", "--model", str(two_layers), *flags])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_a_line_is_a_question_and_answers_stay_in_the_history(
    two_layers: Path, asked: tuple[Asked, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    calls, answers = asked
    answers += [
        Answer(deltas("analysis: think", "final: Hel", "final: lo")),
        Answer(deltas("final: again")),
        Answer(deltas("final: new")),
    ]
    lines = "first\n\n  second \n/reset\nthird\n/exit\nnever asked\n"
    status, out, err = run(monkeypatch, capsys, two_layers, lines, "--system", "Be kind.", "--reasoning", "high")
    assert (status, out, err) == (0, "Hello\nagain\nnew\n", "All is forgotten.\n")
    system = {"role": "system", "content": "Be kind."}
    first = [system, {"role": "user", "content": "first"}]
    said = {"role": "assistant", "content": "Hello", "thinking": "think"}
    assert [call["messages"] for call in calls] == [
        first,
        [*first, said, {"role": "user", "content": "second"}],
        [system, {"role": "user", "content": "third"}],
    ]
    assert all(call["reasoning_effort"] == "high" for call in calls)


def test_sampling_flags_reach_the_model(
    two_layers: Path, asked: tuple[Asked, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    calls, answers = asked
    answers += [Answer(deltas("final: a")), Answer(deltas("final: a"))]
    flags = "--max-new-tokens 7 --temperature 0.5 --top-k 9 --top-p 0.8 --repetition-penalty 1.2 --seed 4 --stop x"
    run(monkeypatch, capsys, two_layers, "question", *flags.split())
    run(monkeypatch, capsys, two_layers, "question")
    given, default = ({key: value for key, value in call.items() if key != "messages"} for call in calls)
    assert given == {
        "stream": True,
        "reasoning_effort": None,
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.8,
        "repetition_penalty": 1.2,
        "seed": 4,
        "stop": ["x"],
    }
    assert (default["max_new_tokens"], default["temperature"], default["stop"]) == (1024, 1.0, None)


def test_commands_answer_on_standard_error(
    two_layers: Path, asked: tuple[Asked, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    calls, answers = asked
    answers.append(Answer(deltas("final: yes")))
    lines = "/stats\n/help\n/nonsense\n/etc/hosts is what?\n/stats\n"
    status, out, err = run(monkeypatch, capsys, two_layers, lines)
    assert (status, out) == (0, "yes\n")
    assert err.startswith("There was no answer yet.\n/reset")
    assert "/nonsense: no such command" in err
    assert err.endswith("'1 pieces'\n")
    assert calls[0]["messages"][-1]["content"] == "/etc/hosts is what?"


def test_analysis_is_shown_where_it_is_asked_for_without_escape_codes_in_pipes(
    two_layers: Path, asked: tuple[Asked, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    _, answers = asked
    pieces = [*deltas("analysis: hm", "analysis: m"), HarmonyDelta("commentary", "functions.f", "{}")]
    pieces += deltas("commentary: wait", "final: so")
    answers += [Answer(pieces), Answer(pieces), Answer(deltas("analysis: endless"))]
    assert run(monkeypatch, capsys, two_layers, "q", "--show-analysis")[1] == "hmm\n[calls functions.f] {}\nwait\nso\n"
    assert run(monkeypatch, capsys, two_layers, "q")[1] == "[calls functions.f] {}\nwait\nso\n"


def test_reasoning_without_an_answer_is_said(
    two_layers: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = model.chat("q", max_new_tokens=3, seed=1)

    class Silent(Answer):
        @property
        def reply(self) -> ChatReply:
            return ChatReply("", "endless", stats=real.stats)

    monkeypatch.setattr(LanguageModel, "chat", lambda *_, **__: Silent(deltas("analysis: endless")))
    status, out, err = run(monkeypatch, capsys, two_layers, "q")
    assert (status, out) == (0, "")
    assert re.fullmatch(r"\(no answer: \d tokens of reasoning; --max-new-tokens allows more\)\n", err)


def test_what_would_drive_a_terminal_is_spelled_out(
    two_layers: Path, asked: tuple[Asked, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    _, answers = asked
    hostile = "\x1b]0;owned\x07\x9b31m\r\u202eabc\x7f\n\tnarrow\u202fspace 👩‍🔬"
    answers.append(Answer([HarmonyDelta("commentary", "f\x1b[2J", "x"), HarmonyDelta("final", None, hostile)]))
    _, out, _ = run(monkeypatch, capsys, two_layers, "q")
    expected = "\\u001b]0;owned\\u0007\\u009b31m\\u000d\\u202eabc\\u007f\n\tnarrow\u202fspace 👩‍🔬"
    assert out == f"[calls f\\u001b[2J] x\n{expected}\n"


def test_control_c_stops_the_answer_and_what_was_said_stays(
    two_layers: Path, asked: tuple[Asked, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    calls, answers = asked
    answers += [
        Answer(deltas("analysis: thought", "final: one two", "final: three"), interrupt_behind=2),
        Answer(deltas("analysis: thought", "final: never"), interrupt_behind=1),
        Answer(deltas("final: at last")),
    ]
    status, out, err = run(monkeypatch, capsys, two_layers, "a\nb\nc\n")
    assert (status, out) == (0, "one two\nat last\n")
    assert err == f"{command.INTERRUPTED}\n" * 2
    assert [message["content"] for message in calls[2]["messages"]] == [
        "a",
        f"one two {command.INTERRUPTED}",
        "b",
        command.INTERRUPTED,
        "c",
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_question_that_fails_is_dropped_and_the_chat_goes_on(
    two_layers: Path, asked: tuple[Asked, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    calls, answers = asked

    class Broken(Answer):
        def __next__(self) -> HarmonyDelta:
            raise FloatingPointError("row 0: found NaN")

    answers += [Broken([]), Answer(deltas("final: fine"))]
    status, out, err = run(monkeypatch, capsys, two_layers, "a\nb\n")
    assert (status, out) == (1, "fine\n")
    # No room would help.
    assert err == "error: row 0: found NaN\nThe question was dropped.\n"
    assert [message["content"] for message in calls[1]["messages"]] == ["b"]


def test_a_model_answers_as_its_chat_does(
    two_layers: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    expected = model.chat("Where is the water?", max_new_tokens=20, seed=6, reasoning_effort="low")
    flags = ["--max-new-tokens", "20", "--seed", "6", "--reasoning", "low"]
    status, out, _ = run(monkeypatch, capsys, two_layers, "Where is the water?\n", *flags)
    shown = re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), out)
    assert (status, shown) == (0, f"{expected.text}\n")


def test_stop_ends_a_stream_where_it_is(model: LanguageModel) -> None:
    whole = model.chat("Where is the water?", max_new_tokens=20, seed=6)
    stream = model.chat("Where is the water?", max_new_tokens=20, seed=6, stream=True)
    pieces = [next(stream)]
    stream.stop()
    pieces += list(stream)
    text = "".join(delta.text for delta in pieces)
    assert stream.reply.text == text
    assert 0 < stream.reply.stats.new_tokens < whole.stats.new_tokens
    assert whole.text.startswith(text.rstrip("\ufffd"))


def test_checkpoints_that_cannot_chat_are_refused(
    two_layers: Path, golden_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert run(monkeypatch, capsys, golden_hf, "")[0] == 1
    for file in two_layers.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").unlink()
    status, out, err = run(monkeypatch, capsys, tmp_path, "question\n")
    assert (status, out) == (1, "")
    assert "chat_template.jinja" in err
    assert cli.main(["chat"]) == 2


class Terminal:
    """`tensorport chat` behind a terminal of its own."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self._reader, writer = pty.openpty()
        self.job = subprocess.Popen(
            [sys.executable, "-m", "tensorport", "chat", *flags],
            stdin=writer,
            stdout=writer,
            stderr=writer,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm"} | environment,
        )
        os.close(writer)
        self.shown = b""

    def until(self, words: bytes, timeout_s: float = 120) -> bytes:
        """Reads until these words have come, and returns what came up to them."""
        end = time.monotonic() + timeout_s
        while words not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self._reader], [], [], 1)[0]:
                try:
                    self.shown += os.read(self._reader, 65536)
                except OSError:  # the other side is closed
                    assert words in self.shown, self.shown
        before, _, self.shown = self.shown.partition(words)
        return before

    def waits_at_prompt(self) -> None:
        """Reads the prompt. Python shows it before it waits in `select`; a signal in between is seen at a key."""
        self.until(b"> ")
        time.sleep(0.5)

    def type(self, content: bytes) -> None:
        os.write(self._reader, content)

    def interrupt(self) -> None:
        self.job.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.job.kill()
        self.job.wait()
        os.close(self._reader)


@pytest.fixture
def endless(two_layers: Path, tmp_path: Path) -> Path:
    """A model that never ends an answer by itself: the rows of the head for tokens that do are zero."""
    shutil.copytree(two_layers, tmp_path / "endless")
    file = tmp_path / "endless" / "model.safetensors"
    content = bytearray(file.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8:data])["lm_head.weight"]["data_offsets"]
    tokens = json.loads((tmp_path / "endless" / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    ids = [
        token["id"] for token in tokens if token["content"] in {"<|end|>", "<|call|>", "<|endoftext|>", "<|return|>"}
    ]
    assert len(ids) == 4
    nbytes = 2 * json.loads((tmp_path / "endless" / "config.json").read_text("utf-8"))["hidden_size"]
    for row in ids:
        content[data + start + row * nbytes : data + start + (row + 1) * nbytes] = bytes(nbytes)
    file.write_bytes(content)
    return tmp_path / "endless"


def test_a_chat_at_a_terminal(endless: Path) -> None:
    """Everything in one session, for each compiles anew."""
    # So many tokens that Ctrl-C comes before their end.
    terminal = Terminal("--model", str(endless), "--max-new-tokens", "100000", "--top-k", "1")
    try:
        assert b"JAX compiles" in terminal.until(b"/help lists commands.")
        terminal.waits_at_prompt()
        terminal.interrupt()
        terminal.until(b"/exit or Ctrl-D leaves.")
        terminal.until(b"> ")
        terminal.type(b"Where is the water?\n")
        terminal.until(b"water?\r\n")
        # The answer is coming, in place of a mark.
        assert "thinking…".encode() in terminal.until(b"\x1b[K")
        while len(terminal.shown) < 20:
            terminal.shown += os.read(terminal._reader, 65536)
        terminal.interrupt()
        said = terminal.until(command.INTERRUPTED.encode())
        assert b"Traceback" not in said
        assert not re.findall(b"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]", said)
        terminal.until(b"> ")
        terminal.type(b"/stats\n")
        terminal.until(b"GenerationStats")
        terminal.until(b"> ")
        terminal.type(b"\x04")
        assert terminal.job.wait(timeout=60) == 0
    finally:
        terminal.close()


def test_sigterm_ends_a_chat(two_layers: Path) -> None:
    terminal = Terminal("--model", str(two_layers))
    try:
        terminal.waits_at_prompt()
        terminal.job.send_signal(signal.SIGTERM)
        terminal.until(b"interrupted")
        assert terminal.job.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        terminal.close()


@pytest.mark.parametrize(("no_color", "dims"), [("", True), ("1", False)])
def test_analysis_is_dim_on_a_terminal_unless_colours_are_off(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, no_color: str, dims: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    for show_analysis in (True, False):
        printer = command._Printer(show_analysis=show_analysis)
        for delta in deltas("analysis: hm\x1b", "final: so"):
            printer.add(delta.channel, delta.recipient, delta.text)
        printer.end()
        shown = capsys.readouterr().out
        if show_analysis:
            assert shown == ("\x1b[2mhm\\u001b\x1b[22m\nso\n" if dims else "hm\\u001b\nso\n")
        else:
            assert shown == ("\x1b[2mthinking…\x1b[22m\r\x1b[Kso\n" if dims else "so\n")
        assert printer.said == "so"


def test_waiting_for_reasoning_leaves_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    printer = command._Printer(show_analysis=False)
    printer.wait()
    for delta in deltas("commentary: I shall look.", "analysis: hm", "final: so"):
        printer.add(delta.channel, delta.recipient, delta.text)
    printer.end()
    mark = "\x1b[2mthinking…\x1b[22m\r\x1b[K"
    assert capsys.readouterr().out == f"{mark}I shall look.\n{mark}so\n"
    # An error while there is nothing but the mark.
    printer.wait()
    printer.end()
    printer.end()
    assert capsys.readouterr().out == mark
