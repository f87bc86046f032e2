"""tensorport in JAX beside transformers in PyTorch: the same weights, prompts and sampling, and whether tokens agree.

usage: python benchmarks/jax_vs_pytorch.py [CHECKPOINT | --preset demo|tiny] [--output FILE] [--pytorch PYTHON]
                                           [--dtype bfloat16|float32] [--device auto|cpu|gpu] [--allow-missing]

CHECKPOINT is a folder with a gpt-oss in the layout of Hugging Face and a tokenizer; --preset makes a random one. The
prompts are those of prompts.json, tokenized once for both sides. --pytorch is a Python with torch and transformers,
this one by default. Each side runs in a process of its own; they take turns, rounds of them, and begin in turn too. A
round:

- load: until all weights are on the device; imports are over by then.
- prompts: each alone, greedy, `--new` tokens whatever they are. Time to first token: from the call until it is on the
  host. Tokens per second: of the tokens after the first.
- batch: so many rows at once, each of `--batch-tokens` tokens, so that no side pads; medians of `--repeats` calls.
- compile: what first calls took beyond later ones.
- memory: the peak of the process in all this, anonymous and all resident; of the device where it tells.

Before what is measured come at least 30 warm-up calls in JAX and 25 in PyTorch, for the prompts and for each batch. At
last the greedy tokens of both are compared, and where they part, the logits of the two tokens on the JAX side.

Writes a line of JSON for each measurement of each side and round (jax_vs_pytorch_records.py has their form), which
benchmarks/analyze.py turns into tables and plots. Exit code 1: a side failed, or is not installed and --allow-missing
was not given; both are records too. Minutes with the preset demo on two cores, seconds with tiny and few warm-ups and
prompts.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

import tensorport
from tensorport.synthesize import PRESETS
from tensorport.text import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import measure
from jax_vs_pytorch_records import Record

HERE = Path(__file__).parent
PROMPTS = HERE / "prompts.json"
SCRIPTS: Final = {"jax": HERE / "jax_vs_pytorch_job.py", "pytorch": HERE / "baselines" / "transformers_compare.py"}
NEEDS: Final = {"jax": ("jax",), "pytorch": ("torch", "transformers")}
WARMUPS: Final = {"jax": 30, "pytorch": 25}
"""The least for figures that are to be compared: the records say whether there were so many."""

FINDS: Final = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
"""

NEAR_TIE: Final = {"bfloat16": 2 * 2.0**-8, "float32": 2 * 2.0**-16}
"""Where two tokens' logits are this near, of the largest, rounding decides.

bfloat16: two roundings, as in gpu_model_job.py. float32: some hundred roundings of 2 ** -24, for sums are in another
order.
"""


class Run:
    """One run of the script: what it measures, and the file it writes to."""

    def __init__(self, options: argparse.Namespace, checkpoint: Path, folder: Path, log: IO[str]) -> None:
        self.options = options
        self.checkpoint = checkpoint
        self.folder = folder
        self.log = log
        self.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.machine = measure.machine()
        self.prompts = tokenized_prompts(options, checkpoint)
        self.facts: dict[str, dict[str, Any]] = {}
        self.ids: dict[str, list[list[int]]] = {}
        self.failed = False

    def tell(
        self,
        side: str,
        measurement: str,
        status: str,
        values: dict[str, Any] | None = None,
        *,
        number: int = 0,
        note: str = "",
    ) -> None:
        """Writes a record; it is in the file at once."""
        facts = self.facts.get(side, {})
        record = Record(
            side=side,
            measurement=measurement,
            status=status,
            round=number,
            date=self.date,
            machine=self.machine,
            device=facts.get("device"),
            versions=facts.get("versions", {}),
            settings={**self.settings(side), **facts.get("settings", {})},
            values=values or {},
            note=note,
        )
        print(record.line(), file=self.log, flush=True)
        if status != "measured":
            print(f"{side}: {measurement}: {status}: {note}", file=sys.stderr, flush=True)

    def settings(self, side: str) -> dict[str, Any]:
        """What a record says of how it was measured."""
        options = self.options
        warmups = {"jax": options.warmups_jax, "pytorch": options.warmups_pytorch}
        are_full = {name: warmups[name] >= least for name, least in WARMUPS.items()}
        return {
            "model": options.preset or self.checkpoint.name,
            "config": {
                name: value
                for name, value in json.loads((self.checkpoint / "config.json").read_text()).items()
                if name.startswith("num_") or name.endswith("_size")
            },
            "dtype": options.dtype,
            "temperature": options.temperature,
            "seed": options.seed,
            "prompts": len(self.prompts),
            "max_prompt_tokens": options.max_prompt_tokens,
            "new_tokens": options.new,
            "batches": options.batch,
            "batch_tokens": options.batch_tokens,
            "rounds": options.rounds,
            "repeats": options.repeats,
            "warmups": warmups if side == "both" else warmups[side],
            "warmups_are_full": all(are_full.values()) if side == "both" else are_full[side],
        }

    def job_settings(self, side: str, **more: Any) -> dict[str, Any]:
        """What a side's process is told."""
        options = self.options
        return {
            "side": side,
            "checkpoint": str(self.checkpoint),
            "device": options.device,
            "dtype": options.dtype,
            "temperature": options.temperature,
            "seed": options.seed,
            "prompts": self.prompts,
            "batches": [batch_rows(self.prompts, batch, options.batch_tokens) for batch in options.batch],
            "new": options.new,
            "repeats": options.repeats,
            "warmups": options.warmups_jax if side == "jax" else options.warmups_pytorch,
            "rows": str(self.folder / f"{side} rows"),
            **more,
        }


def tokenized_prompts(options: argparse.Namespace, checkpoint: Path) -> list[dict[str, Any]]:
    """The first `--prompts` of them, in turn of each class, as ids."""
    prompts = json.loads(PROMPTS.read_text("utf-8"))
    of_class: dict[str, list[Any]] = {}
    for prompt in prompts:
        of_class.setdefault(prompt["class"], []).append(prompt)
    mixed = sorted(prompts, key=lambda prompt: of_class[prompt["class"]].index(prompt))
    tokenizer = Tokenizer.from_directory(checkpoint)
    return [
        {
            "id": prompt["id"],
            "class": prompt["class"],
            "ids": [int(token) for token in tokenizer.encode(prompt["text"])][: options.max_prompt_tokens],
        }
        for prompt in mixed[: options.prompts]
    ]


def batch_rows(prompts: Sequence[dict[str, Any]], batch: int, tokens: int) -> list[list[int]]:
    """Rows of equal length: each begins with another prompt, and goes on with the next ones where it is short."""
    rows = []
    for row in range(batch):
        ids: list[int] = []
        for step in range(tokens):
            if len(ids) >= tokens:
                break
            ids += prompts[(row + step) % len(prompts)]["ids"]
        rows.append(ids[:tokens])
    return rows


def last_line(error: subprocess.CalledProcessError) -> str:
    """What a process that failed said last."""
    lines = (error.stderr or b"").decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


def python_of(run: Run, side: str) -> str:
    return str(run.options.pytorch) if side == "pytorch" else sys.executable


def missing(python: str, names: Sequence[str]) -> list[str]:
    """Which of these packages a Python does not find; they are not imported.

    Raises:
        OSError: there is no such Python.
        subprocess.CalledProcessError: it is no Python.
    """
    found = subprocess.run([python, "-c", FINDS, *names], capture_output=True, text=True, check=True)
    names_missing: list[str] = json.loads(found.stdout)
    return names_missing


def environment(run: Run) -> dict[str, str]:
    """Of a side's process: JAX takes its device from there."""
    platform = {"auto": None, "cpu": "cpu", "gpu": "cuda"}[run.options.device]
    return {**os.environ, **({"JAX_PLATFORMS": platform} if platform else {})}


def run_job(run: Run, side: str, settings: dict[str, Any]) -> measure.Measurement:
    file = run.folder / f"{side} settings"
    file.write_text(json.dumps(settings))
    Path(settings["rows"]).unlink(missing_ok=True)
    return measure.run([python_of(run, side), str(SCRIPTS[side]), str(file)], environment(run))


def measure_side(run: Run, side: str, number: int) -> None:
    """A round of a side: what it measured, and how it failed if it did."""
    print(f"round {number + 1} of {run.options.rounds}: {side}", file=sys.stderr, flush=True)
    settings = run.job_settings(side)
    fault, anonymous_bytes = None, 0
    try:
        anonymous_bytes = run_job(run, side, settings).anonymous_bytes
    except subprocess.CalledProcessError as error:
        fault = f"ended with {error.returncode}: {last_line(error)}"
    rows = Path(settings["rows"])
    for line in rows.read_text("utf-8").splitlines() if rows.exists() else []:
        row = json.loads(line)
        run.facts[side] = row["facts"]
        values = row["values"]
        if row["measurement"] == "memory":
            values = {"anonymous_bytes": anonymous_bytes, **values}
        if row["measurement"] == "prompts":
            run.ids[side] = row["ids"]
        run.tell(side, row["measurement"], "measured", values, number=number, note=row.get("note", ""))
    if fault is not None:
        run.failed = True
        run.tell(side, "process", "failed", number=number, note=fault)


def compare_tokens(run: Run) -> None:
    """Where the tokens of the two part, and whether rounding explains it."""
    both = [run.facts.get(side, {}) for side in ("jax", "pytorch")]
    run.facts["both"] = {
        "device": both[0].get("device"),
        "versions": {name: version for facts in both for name, version in facts.get("versions", {}).items()},
    }
    if set(run.ids) != {"jax", "pytorch"}:
        run.tell("both", "agreement", "missing", note="tokens of one side only")
        return
    if run.options.temperature:
        note = "drawn with the same seed by different generators of random numbers: tokens are not to be compared"
        run.tell("both", "agreement", "not comparable", note=note)
        return
    rows, differences = [], []
    for prompt, jax_ids, torch_ids in zip(run.prompts, run.ids["jax"], run.ids["pytorch"], strict=True):
        same = common_prefix(jax_ids, torch_ids)
        rows.append({"id": prompt["id"], "class": prompt["class"], "new_tokens": len(jax_ids), "same_tokens": same})
        if same < len(jax_ids):
            tokens = [jax_ids[same], torch_ids[same]]
            differences.append({"ids": prompt["ids"] + jax_ids[:same], "tokens": tokens})
    settings = run.job_settings("jax", differences=differences, rows=str(run.folder / "gaps"))
    try:
        if differences:
            run_job(run, "jax", settings)
    except subprocess.CalledProcessError as error:
        run.failed = True
        note = f"logits: ended with {error.returncode}: {last_line(error)}"
        run.tell("both", "agreement", "failed", note=note)
        return
    gaps: Iterator[float] = iter(json.loads(Path(settings["rows"]).read_text()) if differences else [])
    near_tie = NEAR_TIE[run.options.dtype]
    for row in rows:
        gap = next(gaps) if row["same_tokens"] < row["new_tokens"] else None
        row |= {"gap": gap, "is_near_tie": None if gap is None else gap <= near_tie}
    run.tell("both", "agreement", "measured", {"per_prompt": rows, "near_tie": near_tie})


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens are the same before the first difference."""
    pairs = zip(left, right, strict=True)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(left))


def measure_all(run: Run) -> None:
    """All rounds of both sides, and the comparison of their tokens."""
    sides = []
    for side, names in NEEDS.items():
        try:
            absent = missing(python_of(run, side), names)
            note = f"not installed in {python_of(run, side)}: {', '.join(absent)}"
        except (OSError, subprocess.CalledProcessError) as fault:
            absent, note = list(names), f"{python_of(run, side)}: found no Python that runs: {fault}"
        if absent:
            run.failed |= not run.options.allow_missing
            run.tell(side, "process", "missing", note=note)
        else:
            sides.append(side)
    for number in range(run.options.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            measure_side(run, side, number)
    compare_tokens(run)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a folder with a gpt-oss and its tokenizer")
    parser.add_argument("--preset", choices=PRESETS, help="a random checkpoint instead")
    parser.add_argument("--output", type=Path, default=Path("jax_vs_pytorch.jsonl"), help="the file of records")
    parser.add_argument("--pytorch", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--dtype", choices=NEAR_TIE, default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; else tokens are not compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=_count, default=None, help="so many, of all classes in turn; all by default")
    parser.add_argument("--max-prompt-tokens", type=_count, default=None, help="longer prompts are cut")
    parser.add_argument("--new", type=_count, default=24, help="tokens made for each prompt; at least 2")
    parser.add_argument(
        "--batch", type=_count, action="append", help="rows at once; repeatable; 1, 2, 4 and 8 by default"
    )
    parser.add_argument("--batch-tokens", type=_count, default=64, help="tokens of each row's prompt")
    parser.add_argument("--repeats", type=_count, default=5, help="measured calls of each batch in a round")
    parser.add_argument("--rounds", type=_count, default=2, help="processes of each side")
    parser.add_argument("--warmups-jax", type=int, default=WARMUPS["jax"], help="at least 30 for figures to compare")
    parser.add_argument("--warmups-pytorch", type=int, default=WARMUPS["pytorch"], help="at least 25")
    parser.add_argument("--allow-missing", action="store_true", help="a side that is not installed is no failure")
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()), help="a folder for --preset")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) == (options.preset is None):
        parser.error("found both or neither of CHECKPOINT and --preset, expected one of them")
    if options.new < 2:
        parser.error(f"--new: found {options.new}, expected at least 2: the first token is timed apart")
    options.batch = options.batch or [1, 2, 4, 8]
    return options


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"found {text}, expected at least 1")
    return int(text)


def main() -> int:
    options = parse_options()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorport-compare-", dir=options.where)))
        checkpoint = options.checkpoint
        if options.preset:
            checkpoint = tensorport.synthesize(folder / "checkpoint", options.preset, progress=False)
        log = stack.enter_context(options.output.open("w", encoding="utf-8"))
        run = Run(options, checkpoint.resolve(), folder, log)
        measure_all(run)
    print(options.output)
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
