"""The MXFP4 codec of NumPy arrays against what else there is: a NumPy table, torch's way, and copying memory.

usage: python benchmarks/mxfp4_codec.py [--experts 8] [--rounds 5] [--warmups 3] [--only NAME]...

The tensor is the first `--experts` of the 32 of one gate_up_proj of gpt-oss-20b, [32, 5760, 90 blocks]. All jobs run in
this process, once per round in another order each time; rates are medians. Results are compared bit for bit first.

The limit is np.copyto of the bytes of the floats: decoding writes and encoding reads as many as that. Memory that was
never touched costs more than memory that was: "reused" jobs write where earlier results lay, "fresh" ones into memory
that the system has to bring, as any np.empty of this size is. Before a fresh job as much memory is touched and freed: a
virtual machine may have given it to its host. NumPy asks for huge pages, which such a machine brings fast or very
slowly; tensorport asks for them only elsewhere.

"jax.Arrays" are decoded and encoded by XLA on the CPU, into its own fresh memory.

torch's way is transformers' convert_moe_packed_tensors: as transformers calls it, with the transpose at its end, and
called so that there is nothing to transpose. It is skipped where it cannot be imported.

Prints tables in Markdown, and after them a line of JSON with the seconds of all runs.
"""

import argparse
import gc
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tensorport import _core, mxfp4
from tensorport.mxfp4 import MXFP4Array, _host

sys.path.insert(0, str(Path(__file__).parent))
import measure

ROWS, GROUPS = 5760, 90
BFLOAT16 = ml_dtypes.bfloat16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([E2M1[np.arange(256) % 16], E2M1[np.arange(256) // 16]], axis=-1)
THREADS = (1, 2)


class Job(NamedTuple):
    """One row of a table.

    Attributes:
        run: does it once and returns what it made.
        limit: the job that copies as many bytes by as many threads into such memory; None for the limits themselves.
        is_fresh: whether its results lie in memory that was never touched.
    """

    run: Callable[[], Any]
    limit: str | None
    is_fresh: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--only", action="append", help="part of a job's name; limits always run")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (options.experts, ROWS, GROUPS, 16), np.uint8)
    # Scales of weights: 2^-12 to 2^-3.
    scales = rng.integers(115, 125, blocks.shape[:-1], np.uint8)
    floats = {np.dtype(dtype): _host.decode(blocks, scales, dtype) for dtype in (BFLOAT16, np.float32)}
    wanted = options.only or [""]
    print(f"{measure.machine()}; {_versions()};")
    print(f"{scales.size:,} blocks; medians of {options.rounds} after {options.warmups} warm-ups")
    results = {}
    with ThreadPoolExecutor(max(THREADS)) as executor:
        for dtype, values in floats.items():
            copies = _copies(executor, values.reshape(-1).view(np.uint8))
            decodings, encodings = _decodings(blocks, scales, values), _encodings(values)
            for title, jobs in ((f"decode to {dtype}", decodings), (f"encode {dtype}", encodings)):
                chosen = copies | {name: job for name, job in jobs.items() if any(part in name for part in wanted)}
                results[title] = _measure(chosen, values.nbytes, options.rounds, options.warmups)
                _print_table(title, chosen, results[title], values)
    print(json.dumps(results))


def _copies(executor: ThreadPoolExecutor, source: np.ndarray) -> dict[str, Job]:
    """np.copyto of all bytes of `source`."""
    warmed = np.empty_like(source)
    warmed[:] = 1

    def copy(target: np.ndarray, threads: int) -> np.ndarray:
        parts = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
        list(executor.map(lambda part: np.copyto(*part), parts))
        return target

    jobs = {}
    for threads in THREADS:
        jobs[_name("memcpy", "reused", threads)] = Job(lambda n=threads: copy(warmed, n), None, False)
        jobs[_name("memcpy", "fresh", threads)] = Job(lambda n=threads: copy(np.empty_like(source), n), None, True)
    return jobs


def _decodings(blocks: np.ndarray, scales: np.ndarray, expected: np.ndarray) -> dict[str, Job]:
    dtype, memory = expected.dtype, _core.Memory()
    jobs = {}
    for threads in THREADS:
        for kind, options in (("reused", {"memory": memory}), ("fresh", {})):
            jobs[_name("tensorport", kind, threads)] = Job(
                lambda o=options, n=threads: _host.decode(blocks, scales, dtype, workers=n, **o),
                _name("memcpy", kind, threads),
                kind == "fresh",
            )

    w = MXFP4Array(jnp.asarray(blocks), jnp.asarray(scales))
    jobs["tensorport, jax.Arrays"] = Job(
        lambda: np.asarray(mxfp4.dequantize(w, dtype)), _name("memcpy", "fresh", max(THREADS)), True
    )

    def numpy_table() -> np.ndarray:
        values = PAIRS[blocks].reshape(*scales.shape, 32)
        values *= np.exp2(scales.astype(np.float32) - 127)[..., None]
        return values.astype(dtype, copy=False).reshape(expected.shape)

    jobs["numpy table"] = Job(numpy_table, _name("memcpy", "fresh", 1), True)
    try:
        torch = importlib.import_module("torch")
        convert = importlib.import_module("transformers.integrations.mxfp4").convert_moe_packed_tensors
    except ImportError as fault:
        print(f"torch's way is skipped: {fault}", file=sys.stderr)
    else:
        torch.set_num_threads(max(THREADS))
        torch_dtype = getattr(torch, dtype.name)
        for how, rows in (("transposed", blocks.shape[1]), ("not transposed", 1)):
            tensors = [torch.from_numpy(array.reshape(-1, rows, *array.shape[2:])) for array in (blocks, scales)]
            jobs[f"torch {metadata.version('torch')}, {max(THREADS)} threads, {how}"] = Job(
                lambda tensors=tensors: convert(*tensors, dtype=torch_dtype),
                _name("memcpy", "fresh", max(THREADS)),
                True,
            )
    for name, job in jobs.items():
        made = job.run()
        if not isinstance(made, np.ndarray):
            made = made.transpose(1, 2).contiguous().view(torch.uint8).numpy()
        if not np.array_equal(made.reshape(-1).view(np.uint8), expected.reshape(-1).view(np.uint8)):
            sys.exit(f"{name}: other bytes than tensorport's")
    return jobs


def _encodings(values: np.ndarray) -> dict[str, Job]:
    memory = _core.Memory()
    jobs = {}
    for threads in THREADS:
        for kind, options in (("reused", {"memory": memory}), ("fresh", {})):
            jobs[_name("tensorport", kind, threads)] = Job(
                lambda o=options, n=threads: _host.encode(values, "floor", workers=n, **o),
                _name("memcpy", kind, threads),
                kind == "fresh",
            )

    array = jnp.asarray(values)

    def quantize() -> tuple[np.ndarray, np.ndarray]:
        w = mxfp4.quantize(array)
        return np.asarray(w.blocks), np.asarray(w.scales)

    jobs["tensorport, jax.Arrays"] = Job(quantize, _name("memcpy", "fresh", max(THREADS)), True)

    def numpy_quantize() -> tuple[np.ndarray, np.ndarray]:
        groups = values.reshape(*values.shape[:-1], -1, 32).astype(np.float32)
        exponents = np.frexp(np.abs(groups).max(axis=-1))[1] - 3
        codes = np.clip(np.ldexp(groups, -exponents[..., None]), -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4), np.maximum(exponents + 127, 0).astype(np.uint8)

    jobs["numpy and ml_dtypes"] = Job(numpy_quantize, _name("memcpy", "fresh", 1), True)
    first, *others = (job.run() for job in jobs.values())
    for name, other in zip(list(jobs)[1:], others, strict=True):
        if any(not np.array_equal(mine, theirs) for mine, theirs in zip(first, other, strict=True)):
            sys.exit(f"{name}: other bytes than tensorport's")
    return jobs


def _name(who: str, kind: str, threads: int) -> str:
    return f"{who}, {kind} memory, {threads} thread{'s' * (threads > 1)}"


def _measure(jobs: dict[str, Job], nbytes: int, rounds: int, warmups: int) -> dict[str, list[float]]:
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(warmups + rounds):
        for name in order.sample(list(jobs), len(jobs)):
            job = jobs[name]
            gc.collect()
            if job.is_fresh:
                measure.warm_memory(nbytes)
            started_s = time.perf_counter()
            result = job.run()
            elapsed_s = time.perf_counter() - started_s
            del result
            if number >= warmups:
                seconds[name].append(elapsed_s)
    return seconds


def _print_table(title: str, jobs: dict[str, Job], seconds: dict[str, list[float]], values: np.ndarray) -> None:
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    print(f"\n| {title} | ms | GB/s of floats | values/ns | rate / memcpy's |")
    print("|---" * 5 + "|")
    for name, median_s in medians.items():
        limit = jobs[name].limit
        ratio = f"{medians[limit] / median_s:.2f}" if limit else "-"
        rates = f"{values.nbytes / median_s / 1e9:.2f} | {values.size / median_s / 1e9:.2f}"
        print(f"| {name} | {median_s * 1e3:.1f} | {rates} | {ratio} |")


def _versions() -> str:
    installed = {distribution.name for distribution in metadata.distributions()}
    names = [name for name in ("numpy", "ml_dtypes", "jax", "torch", "transformers") if name in installed]
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"Python {sys.version.split()[0]}, {libraries}"


if __name__ == "__main__":
    main()
