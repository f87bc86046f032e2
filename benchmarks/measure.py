"""Runs commands and measures them: wall time, CPU time, peak anonymous memory of the process tree, cgroup peak.

Linux only: memory is read from /proc.
"""

import dataclasses
import mmap
import os
import platform
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

# Where a group that counts memory can be made, and the file with its peak: cgroup v2, then v1.
CGROUPS = ((Path("/sys/fs/cgroup"), "memory.peak"), (Path("/sys/fs/cgroup/memory"), "memory.max_usage_in_bytes"))
SAMPLE_INTERVAL_S = 0.005


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of one command.

    Attributes:
        wall_s: seconds from its start to its end.
        cpu_s: seconds of CPU time, in user and kernel.
        anonymous_bytes: peak anonymous memory of the process tree.
        cgroup_peak_bytes: peak of its cgroup, page cache included; None where no cgroup can be made.
        output: what it printed.
        samples: its anonymous memory every few milliseconds, with the `time.perf_counter` of each sample.
    """

    wall_s: float
    cpu_s: float
    anonymous_bytes: int
    cgroup_peak_bytes: int | None
    output: str = ""
    samples: tuple[tuple[float, int], ...] = ()

    def peak_between(self, start_s: float, end_s: float) -> int:
        """Peak anonymous memory between two points in time; 0 where no sample fell between them."""
        return max((nbytes for at_s, nbytes in self.samples if start_s <= at_s <= end_s), default=0)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and all its descendants, in bytes; page cache and mapped files do not count."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        total += next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, StopIteration, ProcessLookupError):
        return total
    return total + sum(anonymous_bytes(int(child)) for child in children)


def run(command: Sequence[str], env: dict[str, str] | None = None) -> Measurement:
    """Runs a command to its end; raises CalledProcessError when it fails."""
    with tempfile.TemporaryFile() as output:
        return _run(command, env, output)


def _run(command: Sequence[str], env: dict[str, str] | None, output: IO[bytes]) -> Measurement:
    cgroup, peak_name = _new_cgroup() or (None, "")
    samples: list[tuple[float, int]] = []
    started = time.perf_counter()

    def join_cgroup() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")  # the writer itself

    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.PIPE,
        env=env,
        preexec_fn=join_cgroup,  # noqa: PLW1509 (no other thread runs yet)
    )
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append((time.perf_counter(), anonymous_bytes(process.pid)))
            done.wait(SAMPLE_INTERVAL_S)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stderr is not None
    with process.stderr:
        errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    sampler.join()
    cgroup_peak = None
    if cgroup is not None:
        cgroup_peak = int((cgroup / peak_name).read_text())
        cgroup.rmdir()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
    output.seek(0)
    printed = output.read().decode(errors="replace")
    peak = max((nbytes for _, nbytes in samples), default=0)
    return Measurement(wall, usage.ru_utime + usage.ru_stime, peak, cgroup_peak, printed, tuple(samples))


def _new_cgroup() -> tuple[Path, str] | None:
    """A cgroup of our own that counts memory, where the system lets us make one, and the name of its peak."""
    for root, peak_name in CGROUPS:
        folder = root / f"tensorport-bench-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / peak_name).exists():
            return folder, peak_name
        folder.rmdir()
    return None


def warm_memory(nbytes: int) -> None:
    """Touches and frees memory, so that a job does not pay for what the machine has to find first.

    A virtual machine may give free pages back to its host; the first touch of such a page is ten times as slow.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    with mmap.mmap(-1, nbytes, flags=flags):
        pass


def interleave(
    jobs: dict[str, Callable[[], Sequence[str]]], rounds: int, warmups: int, say: Callable[[str], None]
) -> dict[str, Measurement]:
    """Medians of what :func:`repeat` measures."""
    return {name: _median(values) for name, values in repeat(jobs, rounds, warmups, say).items()}


def repeat(
    jobs: dict[str, Callable[[], Sequence[str]]], rounds: int, warmups: int, say: Callable[[str], None]
) -> dict[str, list[Measurement]]:
    """Runs every job once per round, so that a drift of the machine meets all of them.

    The order is another one in each round: what a job leaves behind must not always meet the same next one. A job makes
    its command anew each time, cleaning up what the last run left.
    """
    order = random.Random(0)
    samples: dict[str, list[Measurement]] = {name: [] for name in jobs}
    for number in range(warmups + rounds):
        for name in order.sample(list(jobs), len(jobs)):
            measured = run(jobs[name]())
            say(
                f"{'warm-up' if number < warmups else f'round {number - warmups + 1}'}: {name}: {measured.wall_s:.2f} s"
            )
            if number >= warmups:
                samples[name].append(measured)
    return samples


def _median(values: list[Measurement]) -> Measurement:
    peaks = [value.cgroup_peak_bytes for value in values if value.cgroup_peak_bytes is not None]
    return Measurement(
        statistics.median(value.wall_s for value in values),
        statistics.median(value.cpu_s for value in values),
        max(value.anonymous_bytes for value in values),
        max(peaks) if peaks else None,
    )


def machine() -> str:
    """The machine in a line."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, {platform.system()} {platform.release()}"
