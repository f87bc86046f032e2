"""Progress of long jobs: events on the caller's thread, the bar, and what other threads do meanwhile."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorport
from tensorport import ProgressEvent

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 MB in 307 tensors: some tenths of a second of work for one thread."""
    fields: dict[str, Any] = {"num_hidden_layers": 16, "vocab_size": 60_000, "num_local_experts": 20}
    return tensorport.synthesize(tmp_path_factory.mktemp("source") / "model", "tiny", progress=False, **fields)


def phases(events: list[ProgressEvent]) -> list[str]:
    return [phase for phase, _ in itertools.groupby(events, key=lambda event: event.phase)]


def check(events: list[ProgressEvent], expected_phases: list[str]) -> None:
    """Every phase is there, in order, without a step back, from any number of bytes to all of them."""
    assert phases(events) == expected_phases
    for phase in expected_phases:
        of_phase = [event for event in events if event.phase == phase]
        totals = {(event.bytes_total, event.tensors_total) for event in of_phase}
        assert len(totals) == 1
        for one, next_one in itertools.pairwise(of_phase):
            assert one.bytes_done <= next_one.bytes_done
            assert one.tensors_done <= next_one.tensors_done
        last = of_phase[-1]
        assert (last.bytes_done, last.tensors_done) == (last.bytes_total, last.tensors_total)


def test_events_come_on_the_calling_thread(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, ProgressEvent]] = []

    def convert() -> None:
        tensorport.convert(source, tmp_path / "out", progress=lambda e: seen.append((threading.get_ident(), e)))

    thread = threading.Thread(target=convert)
    thread.start()
    thread.join()
    assert {ident for ident, _ in seen} == {thread.ident}
    assert all(type(event) is ProgressEvent for _, event in seen)


def test_every_phase_of_a_job_runs_from_nothing_to_all(source: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    report = tensorport.convert(source, tmp_path / "out", workers=1, progress=events.append)
    check(events, ["convert", "verify"])
    assert {event.bytes_total for event in events} == {report.total_bytes}
    assert {event.tensors_total for event in events} == {report.total_tensors}
    assert {event.tensor for event in events} <= {"", *tensorport.open(source)}
    assert events[-1].tensor == list(tensorport.open(source))[-1]
    assert len(events) >= 4

    events.clear()
    tensorport.verify(tmp_path / "out", source, progress=events.append)
    check(events, ["verify"])

    events.clear()
    tensorport.convert(source, tmp_path / "unverified", verify=False, progress=events.append)
    check(events, ["convert"])

    events.clear()
    folder = tensorport.synthesize(tmp_path / "random", "tiny", num_hidden_layers=5, progress=events.append)
    check(events, ["synthesize"])
    assert events[-1].bytes_total == tensorport.open(folder).nbytes


def test_a_resumed_conversion_checks_converts_and_verifies(source: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []

    def stop(event: ProgressEvent) -> None:
        if event.tensors_done > 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tensorport.convert(source, tmp_path / "out", workers=1, progress=stop)
    report = tensorport.convert(source, tmp_path / "out", resume=True, progress=events.append)
    check(events, ["check", "convert", "verify"])
    of_phase = {event.phase: event for event in events}
    assert of_phase["check"].tensors_total == report.resumed_tensors > 3
    assert of_phase["convert"].tensors_total == report.total_tensors - report.resumed_tensors
    assert of_phase["check"].bytes_total + of_phase["convert"].bytes_total == report.total_bytes


def test_a_job_that_is_over_at_once_still_reports_its_end(tiny: Path, tmp_path: Path) -> None:
    for number in range(20):
        events: list[ProgressEvent] = []
        tensorport.convert(tiny, tmp_path / str(number), include="*norm*", progress=events.append)
        check(events, ["convert", "verify"])


def test_true_shows_a_bar_per_phase_on_stderr(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensorport.convert(source, tmp_path / "out", workers=1, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    bars = {
        phase: [line for line in shown.err.split("\r") if line.startswith(phase)] for phase in ("convert", "verify")
    }
    for phase, lines in bars.items():
        assert lines, phase
        assert "B/s" in lines[-1]
        assert "100%" in lines[-1], lines[-1]


def test_false_shows_nothing(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensorport.convert(tiny, tmp_path / "out", progress=False)
    tensorport.verify(tmp_path / "out", tiny, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_shows_no_control_characters_of_tensor_names(tmp_path: Path, write_safetensors: Write) -> None:
    # In a process of its own, because tqdm's bar goes to the stderr of the process.
    names = [f"\x1b]0;owned\x07\x1b[2J\x9b31m\x08\x08{number}" for number in range(5)]
    path = write_safetensors(
        tmp_path / "m.safetensors", {name: ("U8", (3_000_000,), bytes(3_000_000)) for name in names}
    )
    code = "import sys, tensorport; tensorport.convert(*sys.argv[1:], workers=1, max_memory=140_000)"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, check=True)
    shown = run.stderr.decode()
    assert "owned" in shown
    assert not {"\x1b", "\x07", "\x08", "\x9b"} & set(shown), shown


@pytest.mark.parametrize("progress", [None, 1, "yes", 0])
def test_what_is_no_progress_is_refused_before_anything_is_written(tiny: Path, tmp_path: Path, progress: Any) -> None:
    with pytest.raises(TypeError, match=f"progress: found {type(progress).__name__}, expected a bool or a callable"):
        tensorport.convert(tiny, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_other_threads_run_during_a_job(source: Path, tmp_path: Path) -> None:
    stop, steps = threading.Event(), []

    def step() -> None:
        while not stop.is_set():
            steps.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=step)
    thread.start()
    began = time.monotonic()
    tensorport.convert(source, tmp_path / "out", workers=1, progress=False)
    ended = time.monotonic()
    stop.set()
    thread.join()
    meanwhile = [moment for moment in steps if began < moment < ended]
    # A job that held the interpreter would leave the other thread one step, at its end.
    assert len(meanwhile) >= 5


def test_two_conversions_run_beside_each_other(source: Path, tmp_path: Path) -> None:
    events: dict[str, list[tuple[int, ProgressEvent]]] = {"float32": [], "bfloat16": []}

    def convert(precision: Any) -> None:
        def note(event: ProgressEvent) -> None:
            events[precision].append((threading.get_ident(), event))

        tensorport.convert(source, tmp_path / precision, precision=precision, progress=note)

    threads = {precision: threading.Thread(target=convert, args=(precision,)) for precision in events}
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join()
    for precision, thread in threads.items():
        assert {ident for ident, _ in events[precision]} == {thread.ident}
        assert tensorport.verify(tmp_path / precision, source, progress=False).ok
