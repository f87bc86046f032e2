"""Loading a full-width gpt-oss-20b of three layers (3.75 GB) into JAX arrays on CPU, against other loaders.

usage: python benchmarks/load.py [--where FOLDER] [--rounds 5] [--warmups 3] [--cold] [--only NAME]... [--check]

The same parameters lie in FOLDER (14 GB) as an ordinary Hugging Face file, whose data begins 8 bytes behind a multiple
of 64, as the same file with its data at a multiple of 64, as a converted tree and as an Orbax checkpoint.

Every job is a process of its own (load_job.py). Before each, as much memory as it can need is touched and freed, and
its files are brought into the page cache, or with --cold dropped from it; that this worked is checked. First every job
runs once with the bytes of all its arrays compared, and with --check nothing else; a job that fails this is left out of
the table, and the exit status is 1. In each run that counts, the sums of all arrays are compared with those.

Prints a table in Markdown, and after it a line of JSON for each job with the figures of all its runs:

- arrays: seconds from the call until all arrays are ready; imports, JAX's start and compiling are over by then.
- touch: a sum over every value of all arrays, for the first time and once more. What a loader has put off shows here.
- anonymous: the peak from the call to the end of the first touch, above what the process had before.
- aliased: the share of the tensors' bytes that lies in mappings of the files.
- disk: bytes that the process made the disk read.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import tensorport
from tensorport.synthesize import PRESETS

sys.path.insert(0, str(Path(__file__).parent))
import measure
import page_cache

HERE = Path(__file__).parent
DTYPES = {"BF16": "bfloat16", "U8": "uint8"}
# The script of each job, the source that it reads, and options for its load().
JOBS: dict[str, tuple[Path, str, dict[str, Any]]] = {
    "tensorport, file": (HERE / "tensorport_load.py", "file", {}),
    "tensorport, file, io=map": (HERE / "tensorport_load.py", "file", {"io": "map"}),
    "tensorport, file, io=read": (HERE / "tensorport_load.py", "file", {"io": "read"}),
    "tensorport, aligned file": (HERE / "tensorport_load.py", "aligned", {}),
    "tensorport, tree": (HERE / "tensorport_load.py", "tree", {}),
    "np.memmap + device_put, tree": (HERE / "baselines" / "memmap_load.py", "tree", {}),
    "safetensors.flax": (HERE / "baselines" / "safetensors_flax_load.py", "file", {}),
    "safetensors.numpy + device_put": (HERE / "baselines" / "safetensors_numpy_load.py", "file", {}),
    "Orbax SafetensorsLayout": (HERE / "baselines" / "orbax_safetensors_load.py", "file", {}),
    "Orbax restore": (HERE / "baselines" / "orbax_restore.py", "orbax", {}),
}
REFERENCE, TOUCH_REFERENCE = "tensorport, file", "np.memmap + device_put, tree"
# What the hungriest job needs: its tensors twice, and JAX.
WARM_SHARE, WARM_BYTES = 2.0, 10**9
# Pages may come and go, and while memory is short the kernel may take some that were just read.
WARM_AT_LEAST, COLD_AT_MOST, ATTEMPTS = 0.999, 0.001, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--preset", choices=PRESETS, default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache; not on tmpfs")
    parser.add_argument("--only", action="append", help="part of a job's name; np.memmap always runs")
    parser.add_argument("--check", action="store_true", help="compare the bytes of all arrays and stop")
    options = parser.parse_args()
    jobs = {
        name: job
        for name, job in JOBS.items()
        if name == TOUCH_REFERENCE or not options.only or any(part in name for part in options.only)
    }
    folder = options.where.resolve() / "tensorport-bench-load"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        tensors = _make_sources(folder, options, {source for _, source, _ in jobs.values()})
        failures, sums = _check(jobs, folder)
        kept = {name: job for name, job in jobs.items() if name not in failures}
        if kept and not options.check:
            results = _measure(kept, folder, options, sum(tensor["nbytes"] for tensor in tensors), sums)
            _print_table(results, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, reason in failures.items():
        print(f"{name}: failed: {reason}", file=sys.stderr)
    sys.exit(bool(failures))


def _make_sources(folder: Path, options: argparse.Namespace, wanted: set[str]) -> list[dict[str, Any]]:
    """Writes the checkpoint in every wanted layout, and the list of its tensors."""
    made, file = folder / "made", folder / "file"
    tensorport.synthesize(made, options.preset, num_hidden_layers=options.layers, progress=False)
    _pad_headers(made, file, 8)
    if "aligned" in wanted:
        _pad_headers(made, folder / "aligned", 0)
    shutil.rmtree(made)
    if "tree" in wanted:
        tensorport.convert(file, folder / "tree", progress=False)
    if "orbax" in wanted:
        subprocess.run([sys.executable, HERE / "baselines" / "orbax_save.py", file, folder / "orbax"], check=True)
    tensors = [tensor for path in sorted(file.glob("*.safetensors")) for tensor in _read_tensors(path)]
    (folder / "tensors.json").write_text(json.dumps(tensors))
    return tensors


def _pad_headers(source: Path, output: Path, remainder: int) -> None:
    """Copies a checkpoint, with spaces behind the headers until data begins `remainder` bytes behind a multiple of 64.

    JAX shares memory at multiples of 64 and copies any other. Writers pad to 8, so that one file in eight is aligned by
    chance; here chance must not decide. In gpt-oss-20b the size of every tensor is a multiple of 64.
    """
    output.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, output)
            continue
        with path.open("rb") as file, (output / path.name).open("wb") as copy:
            header = file.read(int.from_bytes(file.read(8), "little"))
            header += b" " * ((remainder - 8 - len(header)) % 64)
            copy.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(file, copy, 2**20)


def _read_tensors(path: Path) -> list[dict[str, Any]]:
    """Names, dtypes, shapes and digests, by plain reading, with no library."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        data_start = file.tell()
        tensors = []
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(data_start + start)
            digest = hashlib.sha256(file.read(end - start)).hexdigest()
            dtype = DTYPES[entry["dtype"]]
            tensors.append(
                {"name": name, "dtype": dtype, "shape": entry["shape"], "nbytes": end - start, "sha256": digest}
            )
    return tensors


def _command(job: tuple[Path, str, dict[str, Any]], folder: Path) -> list[str]:
    script, source, load_options = job
    paths = [str(HERE / "load_job.py"), str(script), str(folder / source), str(folder / "tensors.json")]
    return [sys.executable, *paths, "--options", json.dumps(load_options)]


def _check(jobs: dict[str, tuple[Path, str, dict[str, Any]]], folder: Path) -> tuple[dict[str, str], str]:
    """Runs every job once and compares all bytes; returns why jobs failed, and the digest of the sums of all arrays."""
    failures = {}
    sums: dict[str, str] = {}
    for name, job in jobs.items():
        try:
            measured = measure.run([*_command(job, folder), "--check"])
        except subprocess.CalledProcessError as fault:
            lines = fault.stderr.decode(errors="replace").strip().splitlines() or [f"status {fault.returncode}"]
            failures[name] = lines[-1]
            continue
        result = _result(measured)
        sums[name] = result["sums"]
        print(f"check: {name}: {result['tensors']} tensors, bytes as in the checkpoint", file=sys.stderr)
    if len(set(sums.values())) > 1:
        sys.exit(f"sums differ although the bytes agree: {sums}")
    return failures, next(iter(sums.values()), "")


def _measure(
    jobs: dict[str, tuple[Path, str, dict[str, Any]]],
    folder: Path,
    options: argparse.Namespace,
    tensor_bytes: int,
    sums: str,
) -> dict[str, dict[str, list[float]]]:
    """For each job its figures, each a list with one number for each round."""

    def prepare(job: tuple[Path, str, dict[str, Any]]) -> Callable[[], Sequence[str]]:
        def make() -> Sequence[str]:
            source = folder / job[1]
            measure.warm_memory(int(WARM_SHARE * tensor_bytes) + WARM_BYTES)
            for _ in range(ATTEMPTS):
                (page_cache.drop if options.cold else page_cache.warm)(source)
                share = page_cache.resident_share(source)
                if share <= COLD_AT_MOST if options.cold else share >= WARM_AT_LEAST:
                    return _command(job, folder)
            sys.exit(f"{source}: {share:.1%} is in the page cache; is this tmpfs, or too little memory?")

        return make

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    runs = measure.repeat({name: prepare(job) for name, job in jobs.items()}, options.rounds, options.warmups, say)
    results: dict[str, dict[str, list[float]]] = {}
    for name, measurements in runs.items():
        figures: dict[str, list[float]] = {}
        for measurement in measurements:
            result = _result(measurement)
            if result.pop("sums") != sums:
                sys.exit(f"{name}: the sums of its arrays differ from those of the check")
            result["anonymous_peak_bytes"] = _peak(measurement, result)
            result["process_wall_s"] = measurement.wall_s
            for figure, value in result.items():
                figures.setdefault(figure, []).append(round(value, 6))
        results[name] = figures
    return results


def _result(measurement: measure.Measurement) -> dict[str, Any]:
    return json.loads(measurement.output.splitlines()[-1])


def _peak(measurement: measure.Measurement, result: dict[str, Any]) -> int:
    """Peak from the call to the end of the first touch, sampled and at both ends, above what there was before."""
    started_s, _, touched_s = (result.pop(name) for name in ("started_s", "loaded_s", "touched_s"))
    sampled = measurement.peak_between(started_s, touched_s)
    peak = max(sampled, result["anonymous_loaded_bytes"], result["anonymous_touched_bytes"])
    return max(0, peak - result["anonymous_before_bytes"])


def _print_table(results: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    medians = {
        name: {figure: statistics.median(values) for figure, values in figures.items()}
        for name, figures in results.items()
    }
    reference_s = medians.get(REFERENCE, {}).get("arrays_s")
    touch_reference_s = medians[TOUCH_REFERENCE]["first_touch_s"] if TOUCH_REFERENCE in medians else None

    def ratio(value: float, reference: float | None) -> str:
        return "-" if reference is None else f"{value / reference:.2f}"

    nbytes = next(iter(medians.values()))["tensor_bytes"]
    print(f"{measure.machine()}; {options.where}, page cache {'cold' if options.cold else 'warm'};")
    print(f"{_versions()}; {nbytes / 1e9:.2f} GB; medians of {options.rounds} after {options.warmups} warm-ups\n")
    print(
        "| job | arrays s | / tensorport, file | first touch s | / np.memmap | second touch s | both s | CPU s "
        "| anonymous MB | / tensors | aliased | disk GB |"
    )
    print("|---" * 12 + "|")
    for name, median in medians.items():
        both = statistics.median(map(sum, zip(results[name]["arrays_s"], results[name]["first_touch_s"], strict=True)))
        disk_bytes = median["disk_read_arrays_bytes"] + median["disk_read_touch_bytes"]
        print(
            f"| {name} | {median['arrays_s']:.3f} | {ratio(median['arrays_s'], reference_s)} "
            f"| {median['first_touch_s']:.3f} | {ratio(median['first_touch_s'], touch_reference_s)} "
            f"| {median['second_touch_s']:.3f} | {both:.3f} | {median['arrays_cpu_s']:.2f} "
            f"| {median['anonymous_peak_bytes'] / 1e6:.0f} | {median['anonymous_peak_bytes'] / nbytes:.2f} "
            f"| {median['aliased_bytes'] / nbytes:.0%} | {disk_bytes / 1e9:.2f} |"
        )
    print()
    for name, figures in results.items():
        print(json.dumps({"job": name, "cold": options.cold, **figures}))


def _versions() -> str:
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "safetensors", "orbax-checkpoint"))
    return f"Python {sys.version.split()[0]}, tensorport {tensorport.__version__}, {libraries}"


if __name__ == "__main__":
    main()
