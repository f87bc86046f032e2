"""gpt-oss-20b on a GPU, from the page cache to tokens: load, memory, decode and prefill, beside transformers.

usage: python benchmarks/gpu_model.py [--json FILE] [--implementation NAME]... [--where FOLDER] [--random] [--quick]

Needs tensorport with a JAX that drives the GPU; torch and transformers are measured too where they are installed with
CUDA. Prints a Markdown table last; --json writes a line for the machine and one for each case as it ends.

The checkpoint is random, of exact shape, and made in FOLDER (13.8 GB, in the page cache after that); where there is no
room, or with --random, the weights are made on the device. Every implementation runs in a process of its own, `xla`
first, with greedy decoding on the device through `generate`:

- load: seconds from `load_model` until all weights are on the device.
- context: a step of one row after a long prompt, and the peak of the device's memory, load included.
- compile: the first runs of all other cases, at once in threads; their programs are compiled there.
- decode: a step of all rows; the first token and the first dispatch are not counted. Every row makes 320 tokens.
- prefill: a prompt with `--chunk` tokens at a time, into a cache of its size.

Experts are those that a step goes through in a layer, and the weights of a step what it reads with so many: GB/s come
from them, and their share of what the device reads at most, by benchmarks/gpu_ceiling.py in the same run. The ids are
compared with those of `xla`; where they differ, the logits of both are, and what is no near-tie fails. `..., one graph`
compiles the loop of a dispatch as one CUDA graph (tensorport.text.decoder.CAPTURES_LOOP).

Cases are left out that would end after --time-limit. --quick runs a tiny model, on a CPU too, where kernels are
interpreted: it tests this script, and its figures say nothing. Exit code 1: a case failed; the others ran.
"""

import argparse
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import tensorport
from tensorport.kernels.registry import ImplementationName
from tensorport.synthesize import _config

sys.path.insert(0, str(Path(__file__).parent))
from gpu_ceiling import last_line, show_bytes, show_seconds
from gpu_model_rows import Row, describe, say

HERE = Path(__file__).parent
CHECKPOINT_BYTES, SPARE_BYTES = 13_800_000_000, 2_000_000_000
GRACE_S = 10.0  # a job that has not ended so long after its time is ended
TRANSFORMERS = "transformers, bfloat16"
# By which the time is divided; guesses, as xla's programs take twice as long to compile, and one graph has few cases.
SHARES = {"xla": 2.2, "one graph": 0.6, "transformers": 0.9}
USUAL_SHARE = 1.5


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    preset: str = "gpt-oss-20b"
    layers: int = 24
    batches: tuple[int, ...] = (1, 4, 16, 64)
    prompt: int = 16
    new: int = 320  # of which the dispatches after the two first have 318
    context: int = 3584  # and `new`: a cache of 4096
    prefills: tuple[int, ...] = (512, 2048, 8192)
    graph_batches: tuple[int, ...] = (1, 16)
    rounds: int = 3


QUICK = Sizes("tiny", 1, (3,), 5, 12, 20, (24,), (3,), 2)


class Run:
    """One run of the script: where it writes, and how long it may take."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes, folder: Path, log: IO[str] | None) -> None:
        self.options = options
        self.sizes = sizes
        self.folder = folder
        self.log = log
        self.ends_at = time.time() + options.time_limit
        self.rows: list[Row] = []
        self.environment: dict[str, Any] = {}
        self.read_rate: float | None = None

    def tell(self, row: Row) -> None:
        """Adds a row; it is in the log at once."""
        self.rows.append(row)
        figure = show_seconds(row.seconds) if row.seconds is not None else row.status
        say(f"{row.implementation}: {row.part}: {row.case}: {figure} {row.note} (took {row.took_s:.1f} s)")
        self.write("case", dataclasses.asdict(row))

    def write(self, kind: str, fields: dict[str, Any]) -> None:
        if self.log is not None:
            print(json.dumps({"kind": kind, **fields}, ensure_ascii=False), file=self.log, flush=True)

    def share(self, weight: float, of: float) -> float:
        """When a job is to end that may have such a share of the time left."""
        return time.time() + max(self.ends_at - time.time(), 0) * weight / of


def measure_ceiling(run: Run) -> None:
    """What the device reads at most, and what it is."""
    lines = run.folder / "ceiling.jsonl"
    command = [sys.executable, str(HERE / "gpu_ceiling.py"), "--only", "device memory", "--json", str(lines)]
    began = time.perf_counter()
    ended = subprocess.run(
        command + ["--quick"] * run.options.quick, capture_output=True, text=True, timeout=120, check=False
    )
    records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    for record in records:
        kind = record.pop("kind")
        if kind == "environment":
            run.environment = record
            run.write("environment", record)
    read = [record for record in records if record.get("case", "").startswith("read ") and record["seconds"]]
    if not run.environment or not read:
        raise RuntimeError(f"gpu_ceiling.py ended with {ended.returncode}: {last_line(ended.stderr)}")
    run.read_rate = read[0]["nbytes"] / read[0]["seconds"]
    took_s = time.perf_counter() - began
    run.tell(
        Row(
            "ceiling",
            read[0]["case"],
            "xla",
            seconds=read[0]["seconds"],
            spread=read[0]["spread"],
            nbytes=read[0]["nbytes"],
            took_s=took_s,
        )
    )


def make_checkpoint(run: Run) -> tuple[Path, bool]:
    """The folder of the checkpoint, and whether it has weights; else it has a config.json alone."""
    folder = run.folder / "checkpoint"
    free = shutil.disk_usage(run.folder).free
    needed = 0 if run.options.quick else CHECKPOINT_BYTES + SPARE_BYTES
    if run.options.random or free < needed:
        if not run.options.random:
            say(f"{run.folder}: found {show_bytes(free)} free, expected {show_bytes(needed)}: weights are random")
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps(_config(run.sizes.preset, {"num_hidden_layers": run.sizes.layers}))
        )
        return folder, False
    began = time.perf_counter()
    say(f"checkpoint: {run.sizes.preset}: about 30 s")
    tensorport.synthesize(folder, run.sizes.preset, num_hidden_layers=run.sizes.layers, progress=False)
    say(f"checkpoint: took {time.perf_counter() - began:.1f} s")
    return folder, True


def make_prompts(run: Run, vocab_size: int) -> Path:
    """Random ids, the same ones for all."""
    sizes, rng = run.sizes, np.random.default_rng(0)
    prompts = {
        "decode": rng.integers(0, vocab_size, (max(sizes.batches), sizes.prompt)).tolist(),
        "context": rng.integers(0, vocab_size, sizes.context).tolist(),
        "prefill": rng.integers(0, vocab_size, max(sizes.prefills)).tolist(),
    }
    file = run.folder / "prompts.json"
    file.write_text(json.dumps(prompts))
    return file


def run_job(run: Run, label: str, command: Sequence[str], ends_at: float) -> None:
    """Runs a process that prints rows; says where it ended before it was done."""
    began = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        timer = threading.Timer(max(ends_at + GRACE_S - time.time(), 1.0), process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                run.tell(Row(**json.loads(line)))
            else:
                say(line.rstrip())
        code = process.wait()
        took_s = time.perf_counter() - began
        was_ended = not timer.is_alive()
        timer.cancel()
        errors.seek(0)
        said = errors.read()
    if code:
        why = f"ended by this script after {took_s:.0f} s" if was_ended else f"ended with {code}: {last_line(said)}"
        run.tell(Row("process", "the rest", label, status="failed", took_s=took_s, note=why))
    say(f"{label}: {took_s:.0f} s in all, {run.ends_at - time.time():.0f} s are left")


def implementations(options: argparse.Namespace) -> list[tuple[str, bool]]:
    """Each with whether its loop is one graph; `xla` first, for the others are compared with it."""
    asked = options.implementation or ["xla", "pallas_triton"]
    names = sorted(dict.fromkeys(asked), key=lambda name: name != "xla")
    return [*((name, False) for name in names), *((name, True) for name in names if name == "pallas_triton")]


def measure_implementations(run: Run, checkpoint: Path, prompts: Path, *, has_weights: bool) -> None:
    """A process for each; the first `xla` leaves its ids to the others."""
    jobs, reference = implementations(run.options), None
    shares = [SHARES.get("one graph" if one_graph else name, USUAL_SHARE) for name, one_graph in jobs]
    for index, (name, one_graph) in enumerate(jobs):
        label = f"{name}, one graph" if one_graph else name
        if one_graph and run.environment.get("platform") == "cpu":
            run.tell(Row("decode", "all", label, status="skipped", note="CUDA graphs exist on a GPU only"))
            continue
        ids = run.folder / f"ids {label}.json"
        ends_at = run.share(shares[index], sum(shares[index:]) + SHARES["transformers"])
        settings = {
            "implementation": name,
            "label": label,
            "one_graph": one_graph,
            "checkpoint": str(checkpoint),
            "random": not has_weights,
            "prompts": str(prompts),
            "context": not one_graph,
            "batches": run.sizes.graph_batches if one_graph else run.sizes.batches,
            "prefills": () if one_graph else run.sizes.prefills,
            "new": run.sizes.new,
            "chunk": run.options.chunk,
            "rounds": run.sizes.rounds,
            "is_quick": run.options.quick,
            "ends_at": ends_at,
            "reference": str(reference) if reference else None,
            "ids": str(ids),
        }
        file = run.folder / f"settings {label}.json"
        file.write_text(json.dumps(settings))
        run_job(run, label, [sys.executable, str(HERE / "gpu_model_job.py"), str(file)], ends_at)
        if name == "xla" and not one_graph and ids.exists():
            reference = ids


def measure_transformers(run: Run, checkpoint: Path, prompts: Path, *, has_weights: bool) -> None:
    """The same prompts by transformers on torch, with the experts as bfloat16."""
    why = None
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        why = "not installed"
    elif not has_weights:
        why = "needs the checkpoint on a disk"
    if why is not None:
        run.tell(Row("transformers", "all", TRANSFORMERS, status="skipped", note=why))
        return
    sizes = run.sizes
    settings = {
        "label": TRANSFORMERS,
        "checkpoint": str(checkpoint),
        "prompts": str(prompts),
        "batches": sizes.batches,
        "prefills": sizes.prefills,
        "new": sizes.new,
        "rounds": sizes.rounds,
        "is_quick": run.options.quick,
        "ends_at": run.ends_at,
    }
    file = run.folder / "settings transformers.json"
    file.write_text(json.dumps(settings))
    run_job(
        run, TRANSFORMERS, [sys.executable, str(HERE / "baselines" / "transformers_gpu.py"), str(file)], run.ends_at
    )


COLUMNS = ["part", "case", "implementation", "time", "spread", "tokens/s", "experts", "weights", "GB/s", "% of read"]
COLUMNS += ["compile", "peak memory", ""]


def table(rows: Sequence[Row], read_rate: float | None) -> str:
    """The rows in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        rate = row.nbytes / row.seconds if row.nbytes and row.seconds else None
        told_peak = "not told" if row.status == "measured" and row.part != "ceiling" else "-"
        cells = [
            row.part,
            row.case,
            row.implementation,
            "-" if row.seconds is None else show_seconds(row.seconds),
            "-" if row.spread is None else f"{row.spread:.0%}",
            "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            "-" if row.experts is None else f"{row.experts:.1f}",
            f"{row.nbytes / 1e6:,.1f} MB" if row.nbytes else "-",
            "-" if rate is None else f"{rate / 1e9:.4g}",
            f"{rate / read_rate:.0%}" if rate and read_rate and row.is_of_read else "-",
            "-" if row.compile_s is None else f"{row.compile_s:.1f} s",
            told_peak if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB",
            (row.note if row.status == "measured" else f"{row.status}: {row.note}").replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_all(run: Run) -> None:
    """Every part; one that fails is a row."""
    try:
        measure_ceiling(run)
    except Exception as error:  # without a device nothing else runs either, and says so itself
        run.tell(Row("ceiling", "read", "xla", status="failed", note=describe(error)))
    if run.environment.get("platform") == "cpu" and not run.options.quick:
        raise SystemExit("device: found a CPU, expected a GPU; --quick tests this script on a CPU")
    checkpoint, has_weights = make_checkpoint(run)
    prompts = make_prompts(run, json.loads((checkpoint / "config.json").read_text())["vocab_size"])
    measure_implementations(run, checkpoint, prompts, has_weights=has_weights)
    measure_transformers(run, checkpoint, prompts, has_weights=has_weights)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file for JSON lines")
    parser.add_argument(
        "--implementation",
        action="append",
        choices=get_args(ImplementationName),
        help="may be given more than once; xla and pallas_triton by default",
    )
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()), help="a folder for the checkpoint")
    parser.add_argument("--random", action="store_true", help="weights made on the device")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt that go through the model at a time")
    parser.add_argument("--time-limit", type=float, default=480, help="seconds for all of it")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to test this script")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_options()
    began = time.perf_counter()
    log = options.json.open("w") if options.json else None
    with tempfile.TemporaryDirectory(prefix="tensorport-model-", dir=options.where) as folder:
        run = Run(options, QUICK if options.quick else Sizes(), Path(folder), log)
        try:
            measure_all(run)
        finally:
            if log is not None:
                log.close()
    facts = run.environment
    print(", ".join(f"{name} {facts.get(name)}" for name in ("device", "driver", "date", "jax", "jaxlib", "python")))
    print(f"{run.sizes.preset}; {time.perf_counter() - began:.0f} s in all")
    print("a tiny model of --quick: the figures say nothing\n" if options.quick else "")
    print(table(run.rows, run.read_rate))
    return int(any(row.status == "failed" for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
