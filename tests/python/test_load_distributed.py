"""load_params() in two real processes: each reads and holds its own part of a checkpoint, and no more."""

import dataclasses
import errno
import functools
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorport
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts bytes by /proc, limits memory by RLIMIT_DATA")

Write = Callable[..., Path]
Arrays = dict[str, NDArray[Any]]
Region = tuple[tuple[int, int], ...]

WORKER = Path(__file__).with_name("load_worker.py")

TIMEOUT_S = 120
"""For processes that take some three seconds."""

GAP_BYTES = 32 << 10
"""What lies between the pieces of a shard is read along if it is no longer than this."""

HEADER_BYTES = 500_000
"""More than headers, manifests and files of /proc; less than the share of any large tensor."""

BOTH = ("host", "core")
"""The axes of a mesh of 2 by 4 devices: two processes of four devices, or one of all eight."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A tensor and how it is sharded: for each axis the axes of the mesh that split it."""

    shape: tuple[int, ...]
    axes: tuple[str | tuple[str, str] | None, ...]
    dtype: Any = ml_dtypes.bfloat16

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    def region(self, device: int) -> Region:
        """What a device holds: (start, stop) on each axis."""
        index_and_count = {"host": (device // 4, 2), "core": (device % 4, 4), BOTH: (device, 8), None: (0, 1)}
        axes = self.axes + (None,) * (len(self.shape) - len(self.axes))
        parts = [(size, *index_and_count[axis]) for size, axis in zip(self.shape, axes, strict=True)]
        assert all(size % count == 0 for size, _, count in parts)
        return tuple((index * size // count, (index + 1) * size // count) for size, index, count in parts)

    @functools.cache  # noqa: B019 - of a dozen tensors that live as long as the module
    def held(self, devices: Sequence[int]) -> NDArray[np.intp]:
        """Positions, in row-major order, of the elements that devices hold."""
        mask = np.zeros(self.shape, np.bool_)
        for device in devices:
            mask[tuple(slice(*part) for part in self.region(device))] = True
        return np.flatnonzero(mask)

    def held_bytes(self, devices: Sequence[int]) -> int:
        return len(self.held(devices)) * self.itemsize

    def read_bytes(self, devices: Sequence[int]) -> tuple[int, int]:
        """The least and the most to be read: what is held, and short gaps; and the ends of rows that such gaps fill."""
        gaps = (np.diff(self.held(devices)) - 1) * self.itemsize
        short = gaps[(gaps > 0) & (gaps <= GAP_BYTES)]
        least = self.held_bytes(devices) + int(short.sum())
        return least, least + int(short.max(initial=0))


# 44 MB. Two have short gaps within what a process holds: last_narrow between its rows, the scales between experts.
# Other gaps are too long to be read along.
CASES = {
    "leading": Case((2408, 1504), (BOTH,)),
    "last_wide": Case((72, 40_016), (None, BOTH)),
    "last_narrow": Case((550, 2008), (None, BOTH)),
    "both": Case((1304, 1416), ("host", "core")),
    "crossed": Case((44, 70_002), ("core", "host")),
    "middle": Case((6, 1048, 510), (None, BOTH, None)),
    "halves": Case((702, 900), ("host",)),
    "same_on_each_host": Case((516, 700), ("core",)),
    "replicated": Case((13, 17), ()),
    "norm": Case((1501,), (), np.float32),
    "scalar": Case((), (), np.float32),
    "experts_blocks": Case((12, 606, 85, 16), ("core", "host"), np.uint8),
    "experts_scales": Case((12, 606, 85), ("core", "host"), np.uint8),
}

# Decoded, the pair is read as one tensor whose elements are 16 bytes of codes and one of scale.
DECODED_CASES = {name: case for name, case in CASES.items() if not name.startswith("experts")}
DECODED_CASES["experts"] = dataclasses.replace(CASES["experts_scales"], dtype="V17")

RULES = [(f"^{name}$", case.axes) for name, case in DECODED_CASES.items()]

STAGES = {"leading": 0, "experts": 1}
"""Tensors that are split over the cores of one host: the stages of a pipeline."""

# Tests see each of these loads in each process of two, and in one process that has all devices.
LOADS: dict[str, dict[str, Any]] = {
    "file": {},
    "tree": {},
    "tree, read": {"io": "read"},
    "file, decoded": {"dtype": "float32", "mxfp4": "dequantize"},
}


@dataclasses.dataclass(frozen=True)
class Process:
    """One process: the places of its devices in the mesh, and what each load did there."""

    devices: tuple[int, ...]
    loads: Mapping[str, dict[str, Any]]

    def report(self, load: str) -> dict[str, Any]:
        report: dict[str, Any] = self.loads[load]["report"]
        return report


def run_workers(folder: Path, process_count: int, jobs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs jobs in so many processes; returns what each process did for each. None of them outlives this call."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    # A proxy would be asked for the way to the other process.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    # Compiling takes most of the time otherwise.
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    answers = [folder / f"answer{number}" for number in range(process_count)]
    logs = [folder / f"log{number}" for number in range(process_count)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for number, (answer, log) in enumerate(zip(answers, logs, strict=True)):
            task = {"coordinator": coordinator, "process_id": number, "process_count": process_count}
            command = [
                sys.executable,
                "-W",
                "error",
                str(WORKER),
                json.dumps(task | {"jobs": jobs, "answer": str(answer)}),
            ]
            with log.open("wb") as output:
                workers.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        deadline = time.monotonic() + TIMEOUT_S
        # One that fails would leave the others waiting for it.
        while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0] * process_count, "\n".join(log.read_text("utf-8", "replace") for log in logs)
    return [json.loads(answer.read_text("utf-8")) for answer in answers]


def job(source: Path, options: Mapping[str, Any], **how: Any) -> dict[str, Any]:
    return {"source": str(source), "options": options, **how}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, write_safetensors: Write) -> Path:
    """A checkpoint whose data begins at an odd offset: nothing of it can be mapped."""
    rng = np.random.default_rng(4)
    tensors = {}
    for name, case in CASES.items():
        content = rng.integers(0, 256, (math.prod(case.shape), case.itemsize), np.uint8)
        if name.endswith("_scales"):
            # float32 holds every code under these.
            content = content % 30 + 110
        elif case.dtype != np.uint8:
            # Neither infinite nor NaN.
            content[:, -1] &= 0xBF
        tensors[name] = np.ascontiguousarray(content).view(case.dtype).reshape(case.shape)
    return write_safetensors(tmp_path_factory.mktemp("file") / "model.safetensors", tensors, misalign=1)


@pytest.fixture(scope="module")
def tree(file: Path) -> Path:
    """The checkpoint as a tree in which tensors of more than 3 MB are split."""
    tree = file.parent / "tree"
    tensorport.convert(file, tree, shard_size=0.003, progress=False)
    return tree


@pytest.fixture(scope="module")
def stored(file: Path) -> Arrays:
    """What the safetensors library reads."""
    arrays: Arrays = load_file(file)
    return arrays


@pytest.fixture(scope="module")
def expected(stored: Arrays) -> dict[str, Arrays]:
    """The values of each load; casts and codes as ml_dtypes has them."""
    blocks, scales = stored["experts_blocks"], stored["experts_scales"]
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    experts = codes.reshape(*scales.shape, 32) * scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
    decoded = {name: stored[name].astype(np.float32) for name in DECODED_CASES.keys() - {"experts"}}
    decoded["experts"] = experts.reshape(*scales.shape[:-1], 32 * scales.shape[-1])
    return {load: decoded if "decoded" in load else stored for load in LOADS}


@pytest.fixture(scope="module", params=[2, 1], ids=["two", "one"])
def processes(
    request: pytest.FixtureRequest, file: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Process]:
    jobs = [job(tree if "tree" in load else file, options, rules=RULES) for load, options in LOADS.items()]
    jobs.append(job(file, {"include": list(STAGES)}, stages=STAGES))
    answers = run_workers(tmp_path_factory.mktemp("workers") / "run", request.param, jobs)
    places = np.split(np.arange(8), len(answers))
    return [
        Process(tuple(devices.tolist()), dict(zip([*LOADS, "stages"], answer, strict=True)))
        for devices, answer in zip(places, answers, strict=True)
    ]


def cases_of(load: str) -> dict[str, Case]:
    return DECODED_CASES if "decoded" in load else CASES


def sum_of_bits(array: NDArray[Any]) -> int:
    return int(array.reshape(-1).view(f"u{array.dtype.itemsize}").sum(dtype=np.uint64)) % 2**32


@pytest.mark.parametrize("load", LOADS)
def test_every_device_holds_its_part_of_every_tensor(
    processes: list[Process], expected: dict[str, Arrays], load: str
) -> None:
    for process in processes:
        shards = process.loads[load]["shards"]
        assert shards.keys() == expected[load].keys()
        for name, array in expected[load].items():
            assert sorted(map(int, shards[name])) == list(process.devices)
            for device, shard in shards[name].items():
                case = cases_of(load)[name]
                # Further axes are whole.
                region = case.region(int(device))[: len(case.axes)]
                assert shard["region"][: len(region)] == [list(part) for part in region]
                part = array[tuple(slice(*part) for part in region)]
                assert shard["hash"] == xxhash.xxh3_128_hexdigest(part.tobytes()), name


@pytest.mark.parametrize("load", LOADS)
def test_a_jitted_reduction_sees_every_value_of_every_process(
    processes: list[Process], expected: dict[str, Arrays], load: str
) -> None:
    sums = {name: sum_of_bits(array) for name, array in expected[load].items()}
    assert [process.loads[load]["sums"] for process in processes] == [sums] * len(processes)


@pytest.mark.parametrize("load", [load for load in LOADS if load != "tree"])
def test_each_process_reads_what_its_devices_hold_and_short_gaps(processes: list[Process], load: str) -> None:
    for process in processes:
        bounds = [case.read_bytes(process.devices) for case in cases_of(load).values()]
        least, most = map(sum, zip(*bounds, strict=True))
        bytes_read = process.report(load)["bytes_read"]
        assert least <= bytes_read <= most
        # The kernel counted the same, and headers.
        assert bytes_read < process.loads[load]["rchar"] < bytes_read + HEADER_BYTES


def test_processes_read_the_checkpoint_once_together_but_for_what_both_need(
    processes: list[Process], stored: Arrays
) -> None:
    total = sum(array.nbytes for array in stored.values())
    bytes_read = [process.report("file")["bytes_read"] for process in processes]
    if len(processes) == 1:
        assert bytes_read == [total]
        return
    both_hold = sum(stored[name].nbytes for name in ("same_on_each_host", "replicated", "norm", "scalar"))
    short_gaps = sum(stored[name].nbytes for name in ("last_narrow", "experts_scales")) // 2
    assert bytes_read == [(total + both_hold) // 2 + short_gaps] * 2
    assert short_gaps + both_hold // 2 < 0.1 * total


@pytest.mark.parametrize("load", [load for load in LOADS if "decoded" not in load])
def test_what_several_devices_hold_is_in_memory_once(processes: list[Process], load: str) -> None:
    for process in processes:
        held = sum(case.held_bytes(process.devices) for case in CASES.values())
        assert process.report(load)["nbytes"] == held
        # Mapped or read, JAX uses it where it lies.
        assert process.report(load)["shared_bytes"] == held


def mapped_bytes(tree: Path, devices: Sequence[int]) -> int:
    """What devices hold in one piece of one npy file that begins, as the file's data does, at a multiple of 64."""
    manifest = json.loads((tree / "manifest.json").read_text("utf-8"))
    total = 0
    for name, case in CASES.items():
        sizes = [np.load(tree / file, mmap_mode="r").nbytes for file in manifest["tensors"][name]["files"]]
        files = list(zip(np.cumsum([0, *sizes[:-1]]), np.cumsum(sizes), strict=True))
        for device in {case.region(device): device for device in devices}.values():
            positions = case.held((device,))
            start, stop = positions[0] * case.itemsize, (positions[-1] + 1) * case.itemsize
            is_whole = stop - start == case.held_bytes((device,))
            if is_whole and any(first <= start and stop <= last and (start - first) % 64 == 0 for first, last in files):
                total += int(stop - start)
    return total


def test_aligned_pieces_of_a_split_tree_are_mapped_and_the_rest_is_read(processes: list[Process], tree: Path) -> None:
    assert len(list(tree.rglob("leading.part*.npy"))) == 3
    for process in processes:
        report = process.report("tree")
        assert report["mapped_bytes"] == mapped_bytes(tree, process.devices) > 2_000_000
        assert report["reasons"].keys() == {"not in one piece", "misaligned"}
        assert report["nbytes"] - report["mapped_bytes"] <= report["bytes_read"]
        assert report["bytes_read"] < process.report("tree, read")["bytes_read"]
        assert process.loads["tree"]["rchar"] < report["bytes_read"] + HEADER_BYTES


def test_a_process_reads_nothing_of_what_lies_on_the_devices_of_others(
    processes: list[Process], stored: Arrays
) -> None:
    names = {"leading": ("leading",), "experts": ("experts_blocks", "experts_scales")}
    for process in processes:
        here = {stage for stage, host in STAGES.items() if host * 4 in process.devices}
        nbytes = sum(stored[name].nbytes for stage in here for name in names[stage])
        report, shards = process.report("stages"), process.loads["stages"]["shards"]
        assert report["tensors"] == len(STAGES)
        assert report["bytes_read"] == report["nbytes"] == nbytes > 0
        assert {name: len(held) for name, held in shards.items()} == {
            name: 4 if stage in here else 0 for stage in STAGES for name in names[stage]
        }


def test_a_device_of_one_process_may_be_named_in_all(file: Path, tmp_path: Path) -> None:
    jobs = [job(file, {"include": "norm"}, device=7)]
    (first,), (second,) = run_workers(tmp_path / "run", 2, jobs)
    assert (first["report"]["nbytes"], second["report"]["nbytes"]) == (0, 1501 * 4)


def test_a_checkpoint_larger_than_the_memory_of_a_process_is_loaded_by_two(tmp_path: Path) -> None:
    values = np.arange(2000 * 20_004, dtype=np.uint32).reshape(2000, 20_004)
    layers = {f"layers.{number}": layer for number, layer in enumerate(np.split(values, 5))}
    source = tmp_path / "large.safetensors"
    save_file(layers, source)
    sums = {name: sum_of_bits(layer) for name, layer in layers.items()}
    # Half of it, and room for two threads; not the whole.
    options = {"io": "read", "workers": 2}
    limited = job(source, options, rules=[("", (BOTH,))], headroom_bytes=values.nbytes * 3 // 4)

    for (outcome,) in run_workers(tmp_path / "two", 2, [limited]):
        assert outcome["sums"] == sums
        assert outcome["report"]["bytes_read"] == outcome["report"]["nbytes"] == values.nbytes // 2

    ((refused, loaded),) = run_workers(tmp_path / "one", 1, [limited, limited | {"headroom_bytes": None}])
    assert refused.get("errno") == errno.ENOMEM, refused
    assert loaded["sums"] == sums
    assert loaded["report"]["nbytes"] == values.nbytes
