"""tensorport's kernels on a device: times, and how near they come to what the device does when it copies.

usage: python benchmarks/gpu_kernels.py [--json FILE] [--dtype bfloat16] [--quick] [--only OP]...

Needs tensorport with jax. Every op runs at the shapes of gpt-oss in its folder's cases.py, by each implementation that
this device has, over random arguments that take turns and together exceed the caches; GB/s are those of the weights,
read once. Before it is timed, a result is compared with that of `xla`: the note says by how much of the largest value
it differs, and where that is more than two roundings of the dtype, the case fails. Prints a Markdown table; --json
writes a line for the machine and one for each case as it ends.

--quick shrinks every size and has kernels interpreted where there is no GPU: it tests this script, and its figures say
nothing. Exit code 1: a case failed; the others ran.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tensorport.kernels.attention import api as attention_api
from tensorport.kernels.attention import cases as attention_cases
from tensorport.kernels.attention import pallas_triton as attention_triton
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.cases import Case
from tensorport.kernels.mxfp4_expert_matmul import api as expert_api
from tensorport.kernels.mxfp4_expert_matmul import cases as expert_cases
from tensorport.kernels.mxfp4_expert_matmul import pallas_triton as expert_triton
from tensorport.kernels.mxfp4_matmul import api as matmul_api
from tensorport.kernels.mxfp4_matmul import cases as matmul_cases
from tensorport.kernels.mxfp4_matmul import pallas_triton as matmul_triton
from tensorport.kernels.mxfp4_moe import api as moe_api
from tensorport.kernels.mxfp4_moe import cases as moe_cases
from tensorport.kernels.mxfp4_moe import pallas_triton as moe_triton
from tensorport.kernels.mxfp4_moe.types import Activation
from tensorport.kernels.registry import Device, Op

sys.path.insert(0, str(Path(__file__).parent))
import gpu_ceiling

CACHE_BYTES = 1 << 28  # several times the largest cache of a GPU
TOO_MUCH_FOR_A_CPU = "too much for a CPU, where --quick alone makes sense"


class Measured(NamedTuple):
    """An op, and where it is measured."""

    op: Op
    cases: Sequence[Case]
    quick: Sequence[Case]
    settings: tuple[Any, ...]
    triton: Callable[..., Any]


OPS = {
    "mxfp4.matmul": Measured(
        matmul_api.OP,
        matmul_cases.CASES,
        [matmul_cases.case("quick", m, 70, 96) for m in (1, 5)],
        (),
        matmul_triton.matmul,
    ),
    "mxfp4.expert_matmul": Measured(
        expert_api.OP,
        expert_cases.CASES,
        [expert_cases.case(rows, 6, 70, 96) for rows in (5, 29)],
        (),
        expert_triton.expert_matmul,
    ),
    "mxfp4.moe": Measured(
        moe_api.OP,
        moe_cases.CASES,
        [moe_cases.case(tokens, 6, 3, 64, 96) for tokens in (1, 9)],
        (Activation(7.0, 1.702),),
        moe_triton.moe,
    ),
    "attention": Measured(
        attention_api.OP,
        attention_cases.CASES,
        [attention_cases.case(f"quick, {queries} tokens", 2, queries, 70, 12, 3, 16) for queries in (1, 9)],
        (Settings(0.125, None),),
        attention_triton.attention,
    ),
}


def section(name: str, dtype: str, *, is_quick: bool) -> gpu_ceiling.Section:
    """The cases of one op by all implementations that this device has."""
    measured = OPS[name]

    def cases(setting: gpu_ceiling.Setting) -> Iterator[gpu_ceiling.Case]:
        for case in measured.quick if is_quick else measured.cases:
            for implementation in measured.op.implementations:
                # The automatic choice has a name of its own there.
                if " " not in implementation:
                    run = functools.partial(_time, setting, measured, case, implementation, dtype, is_quick)
                    yield f"{case.name}, {implementation}", run

    return cases


def _time(  # noqa: PLR0917 - what a case is made of
    setting: gpu_ceiling.Setting, measured: Measured, case: Case, implementation: str, dtype: str, is_quick: bool
) -> gpu_ceiling.Result:
    if not setting.is_gpu and not is_quick:
        raise gpu_ceiling.Skip(TOO_MUCH_FOR_A_CPU)
    compute, note = function(setting, measured, case, implementation, dtype)
    inputs = inputs_of(measured, case, dtype, is_quick=is_quick)
    reference = jax.jit(lambda *args: measured.op.implementations["xla"].run(*args, *measured.settings))
    differs_by = difference(compute(*inputs[0]), reference(*inputs[0]), dtype)
    timing = gpu_ceiling.measure(setting, lambda number: compute(*inputs[number % len(inputs)]), calls=0)
    notes = [note, f"differs by {differs_by:.1e}"] if implementation != "xla" else [note]
    return gpu_ceiling.measured(
        timing,
        nbytes=case.weight_bytes,
        flops=2 * case.multiplications,
        note=", ".join(filter(None, notes)),
        is_of_copy=True,
    )


def inputs_of(measured: Measured, case: Case, dtype: str, *, is_quick: bool) -> list[tuple[Any, ...]]:
    """At least two sets of arguments, so that each leaves the caches before its next turn."""
    sets = max(2, math.ceil((0 if is_quick else CACHE_BYTES) / max(case.weight_bytes, 1)))
    make = jax.jit(functools.partial(case.arguments, dtype=jnp.dtype(dtype)))
    return [measured.op.arguments(*jax.block_until_ready(make(jax.random.key(seed)))) for seed in range(sets)]


def function(
    setting: gpu_ceiling.Setting, measured: Measured, case: Case, implementation: str, dtype: str
) -> tuple[Callable[..., Any], str]:
    """What is timed, and how it runs where that is not as users have it."""
    shapes = jax.eval_shape(functools.partial(case.arguments, dtype=jnp.dtype(dtype)), jax.random.key(0))
    inputs = jax.eval_shape(measured.op.arguments, *shapes)
    reason = measured.op.explain(implementation, Device.of(), *inputs).reasons[implementation]
    if implementation == "pallas_triton" and not setting.is_gpu:
        compute, note = functools.partial(measured.triton, interpret=True), "interpreted"
    elif reason is not None:
        raise gpu_ceiling.Skip(reason)
    else:
        compute, note = measured.op.implementations[implementation].run, ""
    return jax.jit(lambda *args: compute(*args, *measured.settings)), note


def difference(found: Any, wanted: Any, dtype: str) -> float:
    """The largest, as a share of the largest value."""
    found, wanted = (np.asarray(array, np.float64) for array in (found, wanted))
    differs_by = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    most = 2 * float(jnp.finfo(dtype).eps) if dtype != "float32" else 1e-4
    if not differs_by <= most:
        raise ValueError(f"differs from xla by {differs_by:.1e} of the largest value, expected at most {most:.1e}")
    return differs_by


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    names = ["device memory", *OPS]
    gpu_ceiling.add_options(parser, names)
    options = parser.parse_args()
    sections = {"device memory": gpu_ceiling.device_memory} | {
        name: section(name, options.dtype, is_quick=options.quick) for name in OPS
    }
    return gpu_ceiling.run_and_tell(gpu_ceiling.make_setting(options), gpu_ceiling.chosen(sections, options), options)


if __name__ == "__main__":
    sys.exit(main())
