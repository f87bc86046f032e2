"""Converting a full-width gpt-oss-20b of three layers (3.7 GB), against cp and against scripts written by hand.

usage: python benchmarks/convert.py [--where FOLDER] [--rounds 5] [--warmups 3] [--sync] [--only NAME]...

Prints a table in Markdown: medians of whole processes, interleaved in one run, each with its ratio to `cp -r` of the
same checkpoint: of wall time, and of bytes written per second. Before each process as much memory as it can need is
touched and freed. --where puts the source and the outputs elsewhere than /dev/shm; --sync adds a sync to every job, for
disks; --baselines is a Python for the scripts written by hand, such as one that has torch.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tensorport

sys.path.insert(0, str(Path(__file__).parent))
import measure

BASELINES = Path(__file__).parent / "baselines"
LAYERS = 3
# More than the largest output; together with the source it has to fit in memory.
WARM_BYTES = 8 * 10**9
SYNTHESIZE = f"""
import sys, tensorport
tensorport.synthesize(sys.argv[1], "gpt-oss-20b", num_hidden_layers={LAYERS}, progress=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--only", action="append", help="part of a job's name; cp always runs")
    parser.add_argument("--baselines", default=sys.executable, help="the Python that runs the scripts written by hand")
    parser.add_argument("--binary", default=None, help="the tensorport to run; the Python entry point by default")
    options = parser.parse_args()

    folder = options.where / "tensorport-bench"
    source, output, tree = folder / "source", folder / "output", folder / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    tensorport.synthesize(source, "gpt-oss-20b", num_hidden_layers=LAYERS, progress=False)
    try:
        tensorport.convert(source, tree, progress=False)
        results, written = _measure(options, source, output, tree)
    finally:
        shutil.rmtree(folder)
    _print_table(results, written, options)


def _measure(
    options: argparse.Namespace, source: Path, output: Path, tree: Path
) -> tuple[dict[str, measure.Measurement], dict[str, int]]:
    command = [options.binary] if options.binary else [sys.executable, "-m", "tensorport"]
    written: dict[str, int] = {}

    def job(arguments: Sequence[str]) -> Callable[[], Sequence[str]]:
        def make() -> Sequence[str]:
            _clean(output)
            measure.warm_memory(WARM_BYTES)
            return ["sh", "-c", '"$@" && sync', "sh", *arguments] if options.sync else arguments

        return make

    convert = [*command, "convert", "--input", str(source), "--output", str(output)]
    jobs: dict[str, Sequence[str]] = {
        "cp -r": ["cp", "-r", str(source), str(output)],
        "tensorport source": [*convert, "--skip-verify"],
        "tensorport source, verified": convert,
        "tensorport float16": [*convert, "--skip-verify", "--precision", "float16"],
        "tensorport float32": [*convert, "--skip-verify", "--precision", "float32"],
        "tensorport dequantize": [*convert, "--skip-verify", "--mxfp4", "dequantize"],
        "tensorport verify": [*command, "verify", "--model", str(tree)],
        "tensorport verify --source": [*command, "verify", "--model", str(tree), "--source", str(source)],
        "tensorport synthesize": [sys.executable, "-c", SYNTHESIZE, str(output)],
    }
    scripts = {"numpy": BASELINES / "numpy_convert.py"}
    if subprocess.run([options.baselines, "-c", "import torch"], capture_output=True, check=False).returncode == 0:
        scripts["torch"] = BASELINES / "torch_convert.py"
    for library, script in scripts.items():
        base = [options.baselines, str(script), str(source), str(output)]
        for precision in ("source", "float16", "float32"):
            jobs[f"{library} {precision}"] = [*base, precision, "keep"]
        jobs[f"{library} dequantize"] = [*base, "source", "dequantize"]
    if options.only:
        jobs = {n: c for n, c in jobs.items() if n == "cp -r" or any(part in n for part in options.only)}

    made = {name: job(arguments) for name, arguments in jobs.items()}
    for name, make in made.items():  # once before counting: how much each job writes
        measure.run(make())
        written[name] = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    results = measure.interleave(made, options.rounds, options.warmups, lambda line: print(line, file=sys.stderr))
    return results, written


def _clean(output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)


def _print_table(results: dict[str, measure.Measurement], written: dict[str, int], options: argparse.Namespace) -> None:
    cp = results["cp -r"]
    cp_rate = written["cp -r"] / cp.wall_s
    print(
        f"{measure.machine()}; {options.where}{', with sync' if options.sync else ''}; Python {sys.version.split()[0]};"
    )
    print(f"tensorport {tensorport.__version__}; medians of {options.rounds} after {options.warmups} warm-ups\n")
    print("| job | wall s | / cp | CPU s | GB written | bytes/s / cp's | anonymous MB | cgroup peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        rate = f"{written[name] / result.wall_s / cp_rate:.2f}" if written[name] else "-"
        peak = "-" if result.cgroup_peak_bytes is None else f"{result.cgroup_peak_bytes / 1e6:.0f}"
        print(
            f"| {name} | {result.wall_s:.2f} | {result.wall_s / cp.wall_s:.2f} | {result.cpu_s:.2f} "
            f"| {written[name] / 1e9:.2f} | {rate} | {result.anonymous_bytes / 1e6:.0f} | {peak} |"
        )


if __name__ == "__main__":
    main()
