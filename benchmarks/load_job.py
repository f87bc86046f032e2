"""Loads a checkpoint once, in a process of its own, and prints as JSON how long that took and what came of it.

usage: python benchmarks/load_job.py SCRIPT SOURCE TENSORS [--options JSON] [--check]

SCRIPT defines `load(source, shapes, **options)`, which returns a dict of jax.Arrays with the names of `shapes`.
TENSORS is a JSON file: a list of {"name", "dtype", "shape", "sha256"}, whatever the layout of SOURCE.

Imports, the start of JAX's backend and compiling are over before the clock starts. A touch is a sum over every value of
all arrays, one compiled function. `--check` compares the bytes of every array with the SHA-256 too.
"""

import argparse
import gc
import hashlib
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("source", type=Path)
    parser.add_argument("tensors", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()

    load = runpy.run_path(arguments.script)["load"]
    tensors = json.loads(arguments.tensors.read_text())
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    shapes = {
        tensor["name"]: jax.ShapeDtypeStruct(tuple(tensor["shape"]), jnp.dtype(tensor["dtype"]), sharding=device)
        for tensor in tensors
    }
    touch = jax.jit(_touch).lower(shapes).compile()
    # What JAX starts at the first transfer and at the first run of anything.
    jax.block_until_ready(jax.jit(_touch)({"": jax.device_put(np.zeros((64, 64), np.float32))}))
    gc.collect()

    before, cpu_before_s, disk_before = _status(), time.process_time(), _disk_bytes()
    started_s = time.perf_counter()
    arrays = load(arguments.source, shapes, **arguments.options)
    jax.block_until_ready(arrays)
    loaded_s = time.perf_counter()
    loaded, cpu_loaded_s, disk_loaded = _status(), time.process_time(), _disk_bytes()
    _check_kind(arrays, shapes)
    touch_started_s = time.perf_counter()
    sums = jax.block_until_ready(touch(arrays))
    touched_s = time.perf_counter()
    touched, disk_touched = _status(), _disk_bytes()
    again_started_s = time.perf_counter()
    jax.block_until_ready(touch(arrays))
    again_s = time.perf_counter() - again_started_s

    if arguments.check:
        _check_bytes(arrays, {tensor["name"]: tensor["sha256"] for tensor in tensors})
    result = {
        "arrays_s": loaded_s - started_s,
        "first_touch_s": touched_s - touch_started_s,
        "second_touch_s": again_s,
        "arrays_cpu_s": cpu_loaded_s - cpu_before_s,
        "tensors": len(arrays),
        "tensor_bytes": sum(array.nbytes for array in arrays.values()),
        "aliased_bytes": _aliased_bytes(arrays, arguments.source),
        "anonymous_before_bytes": before["RssAnon"],
        "anonymous_loaded_bytes": loaded["RssAnon"],
        "anonymous_touched_bytes": touched["RssAnon"],
        "mapped_touched_bytes": touched["RssFile"] + touched["RssShmem"],
        "disk_read_arrays_bytes": disk_loaded - disk_before,
        "disk_read_touch_bytes": disk_touched - disk_loaded,
        "touch_temporary_bytes": touch.memory_analysis().temp_size_in_bytes,
        "sums": hashlib.sha256(b"".join(np.asarray(sums[name]).tobytes() for name in sorted(sums))).hexdigest(),
        "started_s": started_s,
        "loaded_s": loaded_s,
        "touched_s": touched_s,
    }
    print(json.dumps(result))


def _touch(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # float32 also for integers: XLA's CPU backend runs this sum at the speed of memory (18 GB/s on two cores of an EPYC
    # with bfloat16, 5 GB/s with uint8), but one of integers writes a widened copy first (1 GB/s); jaxlib 0.10.2, 2026.
    return {name: jnp.sum(array, dtype=jnp.float32) for name, array in arrays.items()}


def _check_kind(arrays: dict[str, Any], shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    if arrays.keys() != shapes.keys():
        sys.exit(f"names differ: {sorted(arrays.keys() ^ shapes.keys())[:10]}")
    for name, array in arrays.items():
        expected = shapes[name]
        if not isinstance(array, jax.Array):
            sys.exit(f"{name}: found {type(array)}, expected a jax.Array")
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            sys.exit(f"{name}: found {array.dtype}{array.shape}, expected {expected.dtype}{expected.shape}")
        if array.devices() != expected.sharding.device_set:
            sys.exit(f"{name}: found on {array.devices()}, expected on {expected.sharding.device_set}")


def _check_bytes(arrays: dict[str, jax.Array], digests: dict[str, str]) -> None:
    for name, array in arrays.items():
        data = np.asarray(array).reshape(-1).view(np.uint8)
        if hashlib.sha256(data).hexdigest() != digests[name]:
            sys.exit(f"{name}: bytes differ from those of the checkpoint")


def _aliased_bytes(arrays: dict[str, jax.Array], source: Path) -> int:
    """Bytes of the arrays that lie in mappings of the source's files."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and Path(fields[5]).is_relative_to(source.resolve()):
            ranges.append(tuple(int(end, 16) for end in fields[0].split("-")))
    return sum(
        array.nbytes
        for array in arrays.values()
        if any(start <= array.unsafe_buffer_pointer() < end for start, end in ranges)
    )


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if field[2:] == ["kB"]}


def _disk_bytes() -> int:
    """What this process made the disk read so far, page faults included."""
    fields = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return next(int(value) for name, value in fields if name == "read_bytes")


if __name__ == "__main__":
    main()
