"""Tries settings of the kernels through Triton on this GPU, and writes the fastest into the table that they look into.

usage: python benchmarks/gpu_tune.py [--output FILE] [--minutes 8] [--only OP]... [--case TEXT]... [--dtype bfloat16]

Needs tensorport with jax. For every shape of an op's cases.py: first the settings of its rule, then those of its search
space in a random order, until the time is up, which all shapes share alike. A result that is not that of `xla` (two
roundings of the dtype) counts as failed, and so does what does not compile. What is at least 3% faster than the rule is
written, with device, date and versions; the rest stays with the rule. --output is the table of this checkout if nothing
else is said; what it has of other devices and shapes stays. Prints a Markdown table.

--quick shrinks every size and has kernels interpreted where there is no GPU: it tests this script, asks for --output,
and what it writes says nothing.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tensorport.kernels import tuned
from tensorport.kernels.attention.configs import TritonConfig as AttentionConfig
from tensorport.kernels.cases import Case
from tensorport.kernels.mxfp4_expert_matmul.configs import triton_rule, triton_space
from tensorport.kernels.mxfp4_matmul.configs import TritonConfig as MatmulConfig

sys.path.insert(0, str(Path(__file__).parent))
import gpu_ceiling
import gpu_kernels

TABLE = Path(__file__).parents[1] / "python" / "tensorport" / "kernels" / "tuned.json"
WORTH_IT = 0.97  # of the rule's time: what is nearer to it may be chance
Config = Any


class Space(NamedTuple):
    """An op's rule and what can be tried in its place, for sizes that it asked the table for."""

    rule: Callable[[Mapping[str, int]], Config]
    configs: Callable[[Mapping[str, int]], Sequence[Config]]


_EXPERTS = Space(
    lambda sizes: triton_rule(sizes["rows"], sizes["experts"]),
    lambda sizes: triton_space(sizes["rows"]),
)
SPACES = {
    "mxfp4.matmul": Space(lambda sizes: MatmulConfig.rule(sizes["m"]), lambda sizes: MatmulConfig.space(sizes["m"])),
    "mxfp4.expert_matmul": _EXPERTS,
    "mxfp4.moe": _EXPERTS,
    "attention": Space(
        lambda sizes: AttentionConfig.rule(sizes["groups"], sizes["rows"], sizes["keys"]),
        lambda sizes: AttentionConfig.space(sizes["rows"], sizes["keys"]),
    ),
}


class Found(NamedTuple):
    """What came out for one shape."""

    op: str
    case: str
    bucket: str
    rule_s: float
    best_s: float
    best: Config
    tried: int
    failed: int
    space: int

    @property
    def is_better(self) -> bool:
        return self.best_s < WORTH_IT * self.rule_s


def tune(setting: gpu_ceiling.Setting, name: str, case: Case, dtype: str, seconds: float) -> Found:
    """The fastest settings for one shape that were found in time.

    Raises:
        ValueError: the settings of the rule give another result than `xla`.
    """
    began = time.perf_counter()
    measured = gpu_kernels.OPS[name]
    inputs = gpu_kernels.inputs_of(measured, case, dtype, is_quick=not setting.is_gpu)
    reference = jax.jit(lambda *args: measured.op.implementations["xla"].run(*args, *measured.settings))(*inputs[0])

    def seconds_of(config: Config | None) -> tuple[float, tuple[str, dict[str, int]]]:
        compute, _ = gpu_kernels.function(setting, measured, case, "pallas_triton", dtype)
        fields = None if config is None else dataclasses.asdict(config)
        with tuned.forced(name, fields) as asked:
            gpu_kernels.difference(compute(*inputs[0]), reference, dtype)
        timing = gpu_ceiling.measure(setting, lambda number: compute(*inputs[number % len(inputs)]), calls=0)
        return timing.seconds, asked[0]

    rule_s, (bucket, sizes) = seconds_of(None)
    space = SPACES[name]
    best_s, best = rule_s, space.rule(sizes)
    configs = [config for config in space.configs(sizes) if config != best]
    random.Random(bucket).shuffle(configs)
    tried = failed = 0
    for config in configs:
        if time.perf_counter() - began > seconds:
            break
        tried += 1
        try:
            config_s, _ = seconds_of(config)
        except Exception:
            failed += 1
            continue
        if config_s < best_s:
            best_s, best = config_s, config
    return Found(name, case.name, bucket, rule_s, best_s, best, tried, failed, len(configs))


def written(table: dict[str, Any], setting: gpu_ceiling.Setting, found: Sequence[Found]) -> dict[str, Any]:
    """The table with what was found on this device; a shape for which the rule was as fast has no entry any more."""
    kind = setting.device.device_kind
    settings = dict(table.get(kind, {}).get("settings", {}))
    for shape in found:
        settings.pop(shape.bucket, None)
        if shape.is_better:
            us, untuned_us = (round(1e6 * seconds, 2) for seconds in (shape.best_s, shape.rule_s))
            settings[shape.bucket] = {"config": dataclasses.asdict(shape.best), "us": us, "untuned_us": untuned_us}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    date = datetime.datetime.now().astimezone().date().isoformat()
    row = {"date": date, "versions": versions, "settings": dict(sorted(settings.items()))}
    return dict(sorted({**table, kind: row}.items()))


def lines(found: Sequence[Found]) -> Iterator[str]:
    yield "| op | case | rule, us | best, us | of the rule | settings | tried of, failed |"
    yield "|---|---|---|---|---|---|---|"
    for shape in found:
        told = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(shape.best).items())
        ratio = f"{shape.best_s / shape.rule_s:.2f}"
        yield (
            f"| {shape.op} | {shape.case} | {1e6 * shape.rule_s:.1f} | {1e6 * shape.best_s:.1f} | {ratio} "
            f"| {told if shape.is_better else 'the rule'} | {shape.tried} of {shape.space}, {shape.failed} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a table; default: the one of this checkout")
    parser.add_argument("--minutes", type=float, default=8, help="for all shapes together")
    parser.add_argument("--only", action="append", choices=list(SPACES), help="an op; may be given more than once")
    parser.add_argument("--case", action="append", help="cases whose name has this text; may be given more than once")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seconds-per-case", type=float, default=None, help="to time settings; default: 0.05")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test this script")
    options = parser.parse_args()
    options.scratch = Path()
    options.seconds_per_case = options.seconds_per_case or (0.01 if options.quick else 0.05)
    setting = gpu_ceiling.make_setting(options)
    if options.quick and options.output is None:
        parser.error("--quick needs --output: what it measures says nothing")
    if not setting.is_gpu and not options.quick:
        parser.error(f"found {setting.device.device_kind}, expected a GPU; --quick interprets kernels on a CPU")
    output = options.output or TABLE
    table = json.loads(output.read_text("utf-8")) if output.exists() else {}

    shapes = [
        (name, case)
        for name in options.only or SPACES
        for case in (gpu_kernels.OPS[name].quick if options.quick else gpu_kernels.OPS[name].cases)
        if options.case is None or any(text in case.name for text in options.case)
    ]
    if not shapes:
        parser.error(f"found no case with {options.case}")
    found: list[Found] = []
    ends = time.perf_counter() + 60 * options.minutes
    problems = 0
    for number, (name, case) in enumerate(shapes):
        seconds = (ends - time.perf_counter()) / (len(shapes) - number)
        try:
            found.append(tune(setting, name, case, options.dtype, seconds))
        except Exception as error:
            problems += 1
            print(f"{name}, {case.name}: {gpu_ceiling.describe(error)}", file=sys.stderr)
            continue
        # Nothing is lost when the machine goes.
        table = written(table, setting, found[-1:])
        output.write_text(json.dumps(table, indent=2) + "\n", "utf-8")
    print("sizes of --quick: the figures say nothing\n" if options.quick else "")
    print("\n".join(lines(found)))
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
