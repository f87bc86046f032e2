"""Tokens per second of a full-width gpt-oss-20b of three layers on CPU, beside transformers on torch.

usage: python benchmarks/generate.py [--where FOLDER] [--layers 3] [--rounds 3] [--prompt 512] [--new 32] [--batch 1]...
                                     [--baseline PYTHON] [--only NAME]...

The checkpoint (3.75 GB for three layers) lies in FOLDER as an ordinary Hugging Face file and as a converted tree; both
are in the page cache. Every job is a process of its own, with prompts of random ids and greedy decoding; jobs take
turns, rounds of them. `--baseline` is a Python with torch and transformers; without it only tensorport is measured.

Prints a table in Markdown, and after it a line of JSON for each job with the figures of all its runs:

- load: seconds from the call until the model is there; imports are over by then.
- first token: seconds for a prompt of one token, the first time: what a new process waits, compiling included.
- prefill: tokens of the prompt per second, the second time.
- decode: milliseconds per step of all rows, after a prompt of 16 tokens each; not counted are the first steps.
- anonymous: the peak of the process in all this.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import tensorport
from tensorport.synthesize import PRESETS

sys.path.insert(0, str(Path(__file__).parent))
import measure

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--preset", choices=PRESETS, default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt whose prefill is measured")
    parser.add_argument("--new", type=int, default=32, help="tokens made by each row")
    parser.add_argument("--batch", type=int, action="append", help="rows decoded at once; repeatable, 1 by default")
    parser.add_argument("--baseline", help="a Python with torch and transformers")
    parser.add_argument("--only", action="append", help="part of a job's name")
    options = parser.parse_args()
    batches = options.batch or [1]
    folder = options.where.resolve() / "tensorport-bench-generate"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        tensorport.synthesize(folder / "file", options.preset, num_hidden_layers=options.layers, progress=False)
        tensorport.convert(folder / "file", folder / "tree", progress=False)
        jobs = {
            "tensorport, tree": [sys.executable, HERE / "generate_job.py", folder / "tree"],
            "tensorport, file": [sys.executable, HERE / "generate_job.py", folder / "file"],
        }
        if options.baseline:
            script = HERE / "baselines" / "transformers_generate.py"
            jobs["transformers on torch, bfloat16"] = [options.baseline, script, folder / "file"]
        jobs = {
            name: command
            for name, command in jobs.items()
            if not options.only or any(part in name for part in options.only)
        }
        sizes = json.dumps({"prompt": options.prompt, "new": options.new, "batches": batches})
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
        for _ in range(options.rounds):
            for name, command in jobs.items():
                runs[name].append(_run([str(part) for part in command] + [sizes]))
                print(name, json.dumps(runs[name][-1]), file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _print_table(runs, batches)
    for name, figures in runs.items():
        print(json.dumps({"job": name, "runs": figures}))


def _run(command: list[str]) -> dict[str, Any]:
    measured = measure.run(command)
    figures: dict[str, Any] = json.loads(measured.output.strip().splitlines()[-1])
    return figures | {"anonymous_bytes": measured.anonymous_bytes}


def _print_table(runs: dict[str, list[dict[str, Any]]], batches: list[int]) -> None:
    decode = [f"decode {batch}, ms/step" for batch in batches]
    columns = ["job", "load", "first token", "prefill, tokens/s", *decode, "anonymous memory"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, figures in runs.items():

        def median(key: str, figures: list[dict[str, Any]] = figures) -> float:
            return float(statistics.median(run[key] for run in figures))

        cells = [name, f"{median('load_s'):.2f} s", f"{median('first_token_s'):.1f} s"]
        cells += [f"{median('prefill_tokens_per_s'):.0f}"]
        cells += [f"{median(f'decode_{batch}_ms'):.0f}" for batch in batches]
        cells += [f"{median('anonymous_bytes') / 1e6:.0f} MB"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
