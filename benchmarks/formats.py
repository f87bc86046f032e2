"""Writing and reading each format, beside cp and beside the library whose format it is.

usage: python benchmarks/formats.py [--where FOLDER] [--layers 1] [--rounds 3] [--warmups 1] [--only NAME]...

A gpt-oss-20b of full width and one layer (2.8 GB) is written into every format at `precision="source"`, by tensorport
and by the library, from memory to memory (/dev/shm) unless --where says otherwise; then it is read into jax.Arrays on
CPU and summed once. Every job is a process of its own and times itself, imports excluded; jobs take turns in another
order each round, and before each as much memory as it needs is touched and freed. The libraries write arrays that are
views of the mapped source, so that nothing but their writing counts.

Prints two tables in Markdown: medians, with anonymous memory as the peak of the process.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
from pathlib import Path

import tensorport

sys.path.insert(0, str(Path(__file__).parent))
import measure

JOB = Path(__file__).parent / "formats_job.py"
LIBRARIES = {
    "numpy-direct": "np.save, np.load",
    "msgpack": "flax.serialization",
    "jax-pickle": "pickle",
    "safetensors": "safetensors.flax",
    "orbax": "orbax-checkpoint",
}
WARM_BYTES = 9 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--only", action="append", help="part of a job's name; cp always runs")
    options = parser.parse_args()
    folder = options.where.resolve() / "tensorport-bench-formats"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        source = folder / "source"
        tensorport.synthesize(source, "gpt-oss-20b", num_hidden_layers=options.layers, progress=False)
        jobs = [("cp", "")] + [(writer, name) for name in LIBRARIES for writer in ("tensorport", "library")]
        if options.only:
            jobs = [job for job in jobs if job[0] == "cp" or any(part in " ".join(job) for part in options.only)]
        print(f"{measure.machine()}; {options.where}; Python {sys.version.split()[0]}; medians of {options.rounds}\n")
        for action in ("write", "read"):
            _print_table(action, _measure(action, jobs, source, folder, options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(
    action: str, jobs: list[tuple[str, str]], source: Path, folder: Path, options: argparse.Namespace
) -> dict[tuple[str, str], tuple[float, int]]:
    order = random.Random(0)
    seconds: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    peaks = dict.fromkeys(jobs, 0)
    for number in range(options.warmups + options.rounds):
        for job in order.sample(jobs, len(jobs)):
            output = folder / "output"
            if action == "read":
                _run("write", job, source, output)
            else:
                shutil.rmtree(output, ignore_errors=True)
            measure.warm_memory(WARM_BYTES)
            measured, peak = _run(action, job, source, output)
            print(f"{action} {job}: {measured:.2f} s, {peak / 1e6:.0f} MB", file=sys.stderr)
            if number >= options.warmups:
                seconds[job].append(measured)
                peaks[job] = max(peaks[job], peak)
    return {job: (statistics.median(values), peaks[job]) for job, values in seconds.items()}


def _run(action: str, job: tuple[str, str], source: Path, output: Path) -> tuple[float, int]:
    if action == "write":
        shutil.rmtree(output, ignore_errors=True)
    measured = measure.run([sys.executable, str(JOB), action, *job, str(source), str(output)])
    return json.loads(measured.output.strip().splitlines()[-1])["seconds"], measured.anonymous_bytes


def _print_table(action: str, results: dict[tuple[str, str], tuple[float, int]]) -> None:
    cp_s = results["cp", ""][0]
    print(
        f"| {action} | tensorport, s | / cp | anonymous MB | library | s | / cp | anonymous MB | library / tensorport |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, library in LIBRARIES.items():
        ours, theirs = results.get(("tensorport", name)), results.get(("library", name))
        if ours is None or theirs is None:
            continue
        print(
            f"| {name} | {ours[0]:.2f} | {ours[0] / cp_s:.2f} | {ours[1] / 1e6:.0f} "
            f"| {library} | {theirs[0]:.2f} | {theirs[0] / cp_s:.2f} | {theirs[1] / 1e6:.0f} "
            f"| {theirs[0] / ours[0]:.1f} |"
        )
    print(f"\ncp -r: {cp_s:.2f} s\n")


if __name__ == "__main__":
    main()
