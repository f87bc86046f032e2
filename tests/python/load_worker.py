"""One of the processes that load a checkpoint together; test_load_distributed.py starts it.

Argument: JSON with `coordinator` (host:port), `process_id`, `process_count`, `jobs`, and `answer`: a file for what
came of each job, as JSON. A job is a call of load_params: `source`, `options`; one of `rules` (a regex and the list of
a PartitionSpec each), `stages` (by name the host whose cores the leading axis is split over), `device` (its place in
the mesh); and perhaps `headroom_bytes`, by which the process's private memory may grow meanwhile.
"""

import contextlib
import dataclasses
import json
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorport
import xxhash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICES = 8
"""Of all processes together: 2 hosts with 4 cores each."""


def number_behind(label: str, file: str) -> int:
    match = re.search(rf"^{label}:\s+(\d+)", Path("/proc/self", file).read_text("ascii"), re.MULTILINE)
    assert match is not None
    return int(match[1])


@contextlib.contextmanager
def limited_memory(headroom_bytes: int | None) -> Iterator[None]:
    """The kernel refuses private writable memory beyond what the process has now and `headroom_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if headroom_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (number_behind("VmData", "status") * 1024 + headroom_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def partition_spec(axes: list[Any]) -> PartitionSpec:
    return PartitionSpec(*(tuple(axis) if isinstance(axis, list) else axis for axis in axes))


def placement(job: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The arguments `sharding` and `mesh`."""
    if "rules" in job:
        return {"sharding": [(regex, partition_spec(axes)) for regex, axes in job["rules"]], "mesh": mesh}
    if "device" in job:
        return {"sharding": mesh.devices.flat[job["device"]]}
    cores = [NamedSharding(Mesh(devices, ("core",)), PartitionSpec("core")) for devices in mesh.devices]
    return {"sharding": lambda name, _: cores[job["stages"][name]]}


def arrays_of(params: dict[str, Any]) -> dict[str, jax.Array]:
    """Every array under its name; blocks and scales of MXFP4Arrays under the names that their tensors have."""
    arrays: dict[str, jax.Array] = {}
    for name, leaf in params.items():
        if isinstance(leaf, tensorport.mxfp4.MXFP4Array):
            arrays |= {f"{name}_blocks": leaf.blocks, f"{name}_scales": leaf.scales}
        else:
            arrays[name] = leaf
    return arrays


@jax.jit
def sums_of_bits(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """For each array, over all processes, the sum of its bits modulo 2 ** 32: the same in whatever order."""
    widths = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = {name: jax.lax.bitcast_convert_type(array, widths[array.dtype.itemsize]) for name, array in arrays.items()}
    return {name: jnp.sum(numbers, dtype=jnp.uint32) for name, numbers in bits.items()}


def shards_of(array: jax.Array, mesh: Mesh) -> dict[int, dict[str, Any]]:
    """For this process's devices, by their place in the mesh: where a shard lies in the array, a hash of its bytes."""
    places = {device: place for place, device in enumerate(mesh.devices.flat)}
    return {
        places[shard.device]: {
            "region": [part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)],
            "hash": xxhash.xxh3_128_hexdigest(np.asarray(shard.data).tobytes()),
        }
        for shard in array.addressable_shards
    }


def run(job: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    options = {"nested": False, **placement(job, mesh), **job["options"]}
    # What a first load imports is no part of what it reads.
    tensorport.load_params_shapes(job["source"], **options)
    before = number_behind("rchar", "io")
    try:
        with limited_memory(job.get("headroom_bytes")):
            params, report = tensorport.load_params(job["source"], **options, return_report=True)
    except OSError as fault:
        if jax.process_count() > 1:
            # Others would wait for this process's part.
            raise
        return {"errno": fault.errno, "message": str(fault)}
    rchar = number_behind("rchar", "io") - before
    arrays = arrays_of(params)
    return {
        "report": dataclasses.asdict(report),
        "rchar": rchar,
        "shards": {name: shards_of(array, mesh) for name, array in arrays.items()},
        "sums": {name: int(total) for name, total in sums_of_bits(arrays).items()} if "rules" in job else {},
    }


def main() -> None:
    task = json.loads(sys.argv[1])
    count = task["process_count"]
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    if count > 1:
        jax.distributed.initialize(task["coordinator"], count, task["process_id"], initialization_timeout=60)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("host", "core"))
    Path(task["answer"]).write_text(json.dumps([run(job, mesh) for job in task["jobs"]]), "utf-8")


if __name__ == "__main__":
    main()
