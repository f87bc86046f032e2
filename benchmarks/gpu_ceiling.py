"""What a device does at most when JAX drives it: the ceilings for the loader and for the kernels.

usage: python benchmarks/gpu_ceiling.py [--json FILE] [--seconds-per-case 0.3] [--quick] [--only SECTION]...

Needs jax and numpy alone. Prints a Markdown table last; --json writes a line for the machine and one for each case as
it ends, so that nothing is lost when the time runs out. Times are medians on the host's clock over calls that are
waited for, after a warm-up, on random data, over inputs that take turns and together exceed the caches; "spread" is the
distance of the quartiles over the median. The bytes behind each GB/s are counted where the case stands, in comments.

On a CPU everything runs that means something there, on smaller arrays; the rest is listed with the reason. --quick
shrinks every size: it tests this script, and its figures say nothing. Exit code 1: a case failed; the others ran.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as pltriton
from jax.sharding import SingleDeviceSharding

KIB, MIB, GIB = 2**10, 2**20, 2**30

# XLA's compile options (DebugOptions in xla.proto). An empty list captures nothing into command buffers (CUDA graphs).
NO_GRAPHS: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
# By default loops are left out, and only their bodies are captured. A captured loop needs the smallest graph size as
# well: it counts as one command, and by default a graph has five or more.
LOOPS_IN_GRAPHS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
    "xla_gpu_graph_min_graph_size": 1,
}
# The body once for each turn, in one graph: the only way to capture a scan, whose slices move with each turn.
UNROLLED_IN_GRAPHS: dict[str, Any] = {**LOOPS_IN_GRAPHS, "xla_gpu_command_buffer_unroll_loops": True}
NO_THUNKS = "no thunks in XLA's dump"
# The workaround of https://github.com/jax-ml/jax/issues/27988.
LEGACY_TARGETS = "--legacy_command_buffer_custom_call_targets=__gpu$xla.gpu.triton"

TINY_ELEMS = 1024  # of a kernel that is nothing but its launch
CAPTURED_KERNELS = 8  # XLA makes no command buffer of fewer than five
CHILD_TIMEOUT_S = 60
MIN_SAMPLES, MAX_SAMPLES, MIN_WARM_UPS = 5, 1000, 3
QUEUED_S = 0.02  # so much work is enqueued before waiting where only the device's time counts
MAX_QUEUED = 200
# A CPU takes seconds for more, and nobody decodes on it.
CPU_FLOPS, CPU_WEIGHT_BYTES = 5 * 10**9, GIB


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cases work on; a value of its own for each, so that a mistaken one shows."""

    copy_bytes: int = 2 * GIB
    transfer_bytes: int = GIB
    parts: int = 16  # of a transfer, in flight at once
    small: tuple[tuple[int, int], ...] = ((1024, MIB), (4096, 16 * KIB))  # (arrays, bytes of each)
    # gpt-oss-20b: hidden size, rows of q, k and v together, 64 heads of 64, vocabulary.
    hidden: int = 2880
    qkv: int = 5120
    attention: int = 4096
    vocabulary: int = 201088
    batches: tuple[int, ...] = (1, 16, 2048)
    rotated_weight_bytes: int = 512 * MIB  # eight times the 60 MB of an H200's second-level cache
    square: int = 8192
    chains: tuple[int, int] = (64, 512)
    token_kernels: int = 200  # 24 layers of 8 kernels, the head and sampling
    tokens: int = 16
    arguments: int = 459  # the tensors of gpt-oss-20b


ON_CPU = dataclasses.replace(Sizes(), copy_bytes=256 * MIB, transfer_bytes=64 * MIB, small=((64, MIB), (512, 16 * KIB)))
QUICK = Sizes(
    copy_bytes=8 * MIB,
    transfer_bytes=4 * MIB,
    parts=4,
    small=((6, 64 * KIB), (10, 4 * KIB)),
    hidden=192,
    qkv=320,
    attention=256,
    vocabulary=1088,
    batches=(1, 3, 24),
    rotated_weight_bytes=256 * KIB,
    square=128,
    chains=(8, 24),
    token_kernels=10,
    tokens=4,
    arguments=20,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how all cases run."""

    device: jax.Device
    sizes: Sizes
    seconds_per_case: float
    scratch: Path

    @property
    def is_gpu(self) -> bool:
        return self.device.platform == "gpu"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    seconds: float
    spread: float
    samples: int


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table; seconds are of one of what the case names: a call, a product, a kernel, a token.

    `is_of_copy` says that its bytes per second are to be compared with those of the fastest copy.
    """

    section: str = ""
    case: str = ""
    status: str = "measured"  # or "skipped", "failed"
    seconds: float | None = None
    spread: float | None = None
    samples: int = 0
    nbytes: int = 0
    flops: int = 0
    note: str = ""
    is_of_copy: bool = False


class Skip(Exception):  # noqa: N818 (no error)
    """The case cannot run here; the text says why."""


Case = tuple[str, Callable[[], Result]]
Section = Callable[[Setting], Iterator[Case]]


# How things are timed.


def measure(
    setting: Setting,
    start: Callable[[Any], Any],
    *,
    prepare: Callable[[int], Any] = lambda number: number,
    calls: int = 1,
    wait: bool = True,
) -> Timing:
    """Times `start(prepare(number))`, waiting for what it returns; `prepare` is not timed.

    Args:
        setting: says for how long.
        start: enqueues the work and returns its arrays.
        prepare: what `start` gets, for each call anew; waits by itself where it has to.
        calls: to enqueue before waiting. 0: as many as fill QUEUED_S, so that only the device's time counts.
        wait: whether the waiting counts.
    """
    number = 0

    def sample(count: int) -> float:
        nonlocal number
        inputs = [prepare(number + step) for step in range(count)]
        number += count
        began = time.perf_counter()
        for value in inputs:
            out = start(value)
        returned = time.perf_counter()
        jax.block_until_ready(out)
        return ((time.perf_counter() if wait else returned) - began) / count

    def samples(count: int, least: int, seconds: float) -> list[float]:
        values: list[float] = []
        ends = time.perf_counter() + seconds
        while len(values) < least or (time.perf_counter() < ends and len(values) < MAX_SAMPLES):
            values.append(sample(count))
        return values

    warm = samples(calls or 1, MIN_WARM_UPS, setting.seconds_per_case / 4)
    values = samples(calls or calls_to_fill(min(warm)), MIN_SAMPLES, setting.seconds_per_case)
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(statistics.median(values), (high - low) / median, len(values))


def calls_to_fill(seconds: float) -> int:
    return max(1, min(MAX_QUEUED, math.ceil(QUEUED_S / seconds)))


def measured(
    timing: Timing, *, per: int = 1, nbytes: int = 0, flops: int = 0, note: str = "", is_of_copy: bool = False
) -> Result:
    """A result of which `per` make up one call; bytes, flops and the result's seconds are of one of them."""
    return Result(
        seconds=timing.seconds / per,
        spread=timing.spread,
        samples=timing.samples,
        nbytes=nbytes,
        flops=flops,
        note=note,
        is_of_copy=is_of_copy,
    )


# What the cases share.


def random_bytes(setting: Setting, nbytes: int, seed: int) -> np.ndarray[Any, Any]:
    """Random memory aligned to 64 bytes on a GPU, and to fewer on a CPU: there JAX would share it and copy nothing."""
    buffer = np.empty(nbytes + 128, np.uint8)
    begin = -buffer.ctypes.data % 64 + (0 if setting.is_gpu else 16)
    aligned = buffer[begin : begin + nbytes]
    aligned[:] = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)
    return aligned


def place(setting: Setting, value: Any, kind: str = "device") -> Any:
    """device_put of an array, or of several, into one kind of the device's memory."""
    if kind not in {memory.kind for memory in setting.device.addressable_memories()}:
        raise Skip(f"this device has no memory of kind {kind}")
    placed = jax.device_put(value, SingleDeviceSharding(setting.device, memory_kind=kind))
    if not setting.is_gpu:  # may_alias=False would not help
        for source, array in zip(jax.tree.leaves(value), jax.tree.leaves(placed), strict=True):
            if isinstance(source, np.ndarray) and array.unsafe_buffer_pointer() == source.ctypes.data:
                raise Skip("a CPU's array shares this memory: nothing is copied")
    return placed


def halve(x: jax.Array) -> jax.Array:
    """A tiny kernel that XLA keeps apart from the next one on a GPU. Exact in float32, with a fixed point at 1."""
    return lax.optimization_barrier(x * 0.5 + 0.5)


def halve_kernel(x_ref: Any, out_ref: Any) -> None:
    out_ref[...] = x_ref[...] * 0.5 + 0.5


def triton_halve(x: jax.Array, *, interpret: bool = False) -> Any:
    """The same through Pallas Triton: one block."""
    return pl.pallas_call(
        halve_kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(x)


def mosaic_halve(x: jax.Array) -> Any:
    """The same through Pallas Mosaic GPU: one block, from device memory to device memory."""
    return plgpu.kernel(
        halve_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x)


PALLAS_KERNELS: dict[str, Callable[[jax.Array], Any]] = {"Triton": triton_halve, "Mosaic": mosaic_halve}


def repeated(step: Callable[[Any], Any], count: int, name: str = "chain") -> Callable[[Any], Any]:
    def chain(x: Any) -> Any:
        for _ in range(count):
            x = step(x)
        return x

    chain.__name__ = name
    return chain


def tiny_array(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random(TINY_ELEMS, np.float32))


def lower_for_cuda(function: Callable[..., Any], *args: Any) -> str:
    """The StableHLO of a function for an H200, on any machine."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("d",), abstract_device=device)):
        return str(jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


# What XLA captured, read from its dump.


@dataclasses.dataclass(frozen=True)
class Captured:
    """Kernels, loops and branches inside command buffers and outside them."""

    graphs: int = 0
    kernels_inside: int = 0
    kernels_outside: int = 0
    loops_inside: int = 0
    loops_outside: int = 0
    branches_inside: int = 0
    branches_outside: int = 0

    @property
    def kernels(self) -> int:
        return self.kernels_inside + self.kernels_outside

    def __str__(self) -> str:
        text = f"{self.kernels_inside} of {self.kernels} kernels in {self.graphs} command buffer"
        text += "s" * (self.graphs != 1)
        if self.loops_inside + self.loops_outside:
            text += ", the loop too" if self.loops_inside else ", the loop outside"
        return text


def count_captured(thunks: str) -> Captured:
    """Counts in XLA's text of a thunk sequence: lines of `<indent><number>: <kind> ...`, nested by their indent."""
    counts: collections.Counter[str] = collections.Counter()
    graph_indent: int | None = None
    for line in thunks.splitlines():
        match = re.match(r"( *)\d+: (\w+)", line)
        if not match:  # "condition:" and "body:" of a loop
            continue
        indent, kind = len(match[1]), match[2]
        if graph_indent is not None and indent <= graph_indent:
            graph_indent = None
        where = "outside" if graph_indent is None else "inside"
        if kind == "kCommandBuffer":
            counts["graphs"] += 1
            graph_indent = indent
        elif kind in {"kKernel", "kCustomKernel", "kCustomCall"}:
            counts[f"kernels_{where}"] += 1
        elif kind == "kWhile":
            counts[f"loops_{where}"] += 1
        elif kind == "kConditional":
            counts[f"branches_{where}"] += 1
    return Captured(**counts)


def read_dump(folder: Path, name: str) -> Captured | None:
    """What XLA captured of the jitted function `name`, or None when the dump has no thunks of it."""
    # The second file is written only when something was captured.
    for ending in ("thunk_sequence_after_thunk_passes.txt", "thunk_sequence.txt"):
        files = sorted(folder.glob(f"*.jit_{name}.*{ending}"))
        if files:
            return count_captured(files[-1].read_text())
    return None


def compile_and_look(
    setting: Setting,
    function: Callable[..., Any],
    example: Callable[[], Any],
    options: Mapping[str, Any],
    *,
    donate: bool = False,
) -> tuple[Callable[..., Any], Captured | None]:
    """Jits with XLA's options, runs it once, and reads what XLA captured: on a GPU, unless its dump fails."""
    donated = (0,) if donate else ()
    if not setting.is_gpu:
        if options:
            raise Skip("command buffers exist on a GPU only")
        program = jax.jit(function, donate_argnums=donated)
        jax.block_until_ready(program(example()))
        return program, None
    with tempfile.TemporaryDirectory(prefix="tensorport-ceiling-") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = jax.jit(function, donate_argnums=donated, compiler_options={**options, **dump})
        jax.block_until_ready(program(example()))
        return program, read_dump(Path(folder), function.__name__)


# Sections: each yields its cases.


def captures(setting: Setting) -> Iterator[Case]:
    """Whether XLA captures Pallas kernels into a command buffer, in a process of its own: a bad flag aborts it."""
    for label, flag in (("by default", ""), ("with the legacy flag", LEGACY_TARGETS)):
        for kernel, step in PALLAS_KERNELS.items():
            yield f"{kernel} kernel, {label}", functools.partial(_captured, setting, kernel, step, flag)


def _captured(setting: Setting, kernel: str, step: Callable[[jax.Array], Any], flag: str) -> Result:
    if not setting.is_gpu:
        (target,) = re.findall(r"custom_call @(\S+?)\(", lower_for_cuda(step, tiny_array()))
        raise Skip(f"command buffers exist on a GPU only; the kernel lowers for CUDA, to {target}")
    return capture_in_child(flag)[kernel]


@functools.cache
def capture_in_child(flag: str) -> dict[str, Result]:
    """Runs `capture_child` with XLA's dump and one more flag; a result for each kernel."""
    with tempfile.TemporaryDirectory(prefix="tensorport-ceiling-") as folder:
        env = {
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text {flag}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process holds most of the device's memory
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not dumped
        }
        command = [sys.executable, __file__, "--capture-child"]
        try:
            ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            return dict.fromkeys(PALLAS_KERNELS, Result(status="failed", note=describe(error)))
        if "Unknown flag" in ran.stderr:
            gone = Result(status="skipped", note=f"this XLA has no {flag.partition('=')[0]} any more")
            return dict.fromkeys(PALLAS_KERNELS, gone)
        problems = dict(line.split("\t", 1) for line in ran.stdout.splitlines() if "\t" in line)
        ended = f"the process ended with {ran.returncode}: {last_line(ran.stderr)}"
        return {
            kernel: _outcome(problems.get(kernel, ended), read_dump(Path(folder), f"{kernel}_chain"))
            for kernel in PALLAS_KERNELS
        }


def _outcome(problem: str, captured: Captured | None) -> Result:
    if problem:
        return Result(status="failed", note=problem)
    return Result(note=str(captured or NO_THUNKS))


def capture_child() -> None:
    """Compiles, runs and checks a chain of each kernel; prints its name, a tab and what is wrong, if anything."""
    x = tiny_array()
    expected = repeated(lambda value: value * np.float32(0.5) + np.float32(0.5), CAPTURED_KERNELS)(np.asarray(x))
    for kernel, step in PALLAS_KERNELS.items():
        try:
            found = np.asarray(jax.jit(repeated(step, CAPTURED_KERNELS, f"{kernel}_chain"))(x))
            problem = "" if np.array_equal(found, expected) else f"wrong by {np.max(np.abs(found - expected))}"
        except Exception as error:  # the other kernel is to be tried too
            problem = describe(error)
        print(f"{kernel}\t{problem}", flush=True)


def device_memory(setting: Setting) -> Iterator[Case]:
    elems = setting.sizes.copy_bytes // 4
    nbytes = 4 * elems
    draw = jax.jit(functools.partial(jax.random.bits, shape=(elems,), dtype=jnp.uint32))
    arrays = [jax.block_until_ready(draw(jax.random.key(seed))) for seed in range(2)]
    scalars = [jnp.uint32(seed) for seed in range(2)]

    def case(function: Callable[[Any], Any], inputs: Sequence[Any], moved_bytes: int) -> Callable[[], Result]:
        program = jax.jit(function)
        return lambda: measured(
            measure(setting, lambda number: program(inputs[number % len(inputs)]), calls=0), nbytes=moved_bytes
        )

    # Each byte is read once and written once.
    yield f"copy {show_bytes(nbytes)}", case(jnp.copy, arrays, 2 * nbytes)
    yield f"copy {show_bytes(nbytes)} through a kernel (bitwise not)", case(jnp.bitwise_not, arrays, 2 * nbytes)
    # Each byte is read once; the result is one number.
    yield f"read {show_bytes(nbytes)} (maximum)", case(jnp.max, arrays, nbytes)
    # Each byte is written once.
    yield f"write {show_bytes(nbytes)}", case(functools.partial(jnp.broadcast_to, shape=(elems,)), scalars, nbytes)


def products(setting: Setting) -> Iterator[Case]:
    """bf16 products of activations [m, k] with weights [n, k], as checkpoints have them, or [k, n]."""
    sizes = setting.sizes
    for name, k, n in (
        ("qkv", sizes.hidden, sizes.qkv),
        ("o", sizes.attention, sizes.hidden),
        ("head", sizes.hidden, sizes.vocabulary),
    ):
        for m in sizes.batches:
            yield _product(setting, name, m, k, n, transposed=True)
        yield _product(setting, name, sizes.batches[0], k, n, transposed=False)
    yield _product(setting, "square", sizes.square, sizes.square, sizes.square, transposed=True)


def _product(setting: Setting, name: str, m: int, k: int, n: int, *, transposed: bool) -> Case:
    layout = f"[{n}, {k}]ᵀ" if transposed else f"[{k}, {n}]"
    return (
        f"{name}: [{m}, {k}] x {layout}",
        functools.partial(_time_product, setting, m, k, n, transposed),
    )


def _time_product(setting: Setting, m: int, k: int, n: int, transposed: bool) -> Result:
    weight_bytes, flops = 2 * k * n, 2 * m * k * n
    # At least two weights, so that each is evicted before its next turn.
    count = max(2, math.ceil(setting.sizes.rotated_weight_bytes / weight_bytes))
    if not setting.is_gpu and (flops > CPU_FLOPS or count * weight_bytes > CPU_WEIGHT_BYTES):
        raise Skip(f"too much for a CPU: {flops / 1e9:.0f} GFLOP, {count * weight_bytes / 1e9:.1f} GB of weights")
    shape = (n, k) if transposed else (k, n)
    weights = [_normal(shape, seed) for seed in range(count)]
    x = _normal((m, k), count)

    def chain(x: jax.Array, weights: list[jax.Array]) -> Any:
        outputs = []
        for weight in weights:
            # Without the barrier XLA could merge the products or run them at once; each waits for the one before.
            x, y = lax.optimization_barrier((x, x @ (weight.T if transposed else weight)))
            outputs.append(y)
        return sum(y[:1, :128].astype(jnp.float32) for y in outputs)  # one tiny kernel: all are needed

    program = jax.jit(chain).lower(x, weights).compile()
    timing = measure(setting, lambda _: program(x, weights), calls=0)
    # Bytes are the weights' alone, each read once: activations and outputs come on top.
    note = f"{count} in turn: {kernels_of(program)}"
    return measured(timing, per=count, nbytes=weight_bytes, flops=flops, note=note, is_of_copy=True)


def _normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Random values, a million of them repeated: to draw all anew is to compile a generator for each shape."""
    return _repeat(jax.random.normal(jax.random.key(seed), (1_000_003,), jnp.bfloat16), shape)


_repeat = jax.jit(jnp.resize, static_argnums=1)


def kernels_of(program: Any) -> str:
    """What a compiled program calls at its top level, as XLA names it: `16 __triton_gemm, 1 kLoop`."""
    text = program.as_text()
    found: list[str] = []
    for line in text[text.rindex("ENTRY ") :].splitlines():
        target = re.search(r'custom_call_target="([^"]+)"', line)
        fusion = re.search(r" fusion\(.*kind=(k\w+)", line)
        custom = re.search(r'"kind":"(\w+)"', line)
        if target:
            found.append(target[1])
        elif fusion:
            found.append(custom[1] if custom else fusion[1])
        elif re.search(r" (dot|call|copy)\(", line):
            found.append(re.findall(r" (dot|call|copy)\(", line)[0])
    return ", ".join(f"{count} {name}" for name, count in collections.Counter(found).most_common())


def launches(setting: Setting) -> Iterator[Case]:
    """Chains of tiny kernels, each waiting for the one before: seconds of one more kernel in a chain."""
    for name, step in {"XLA": halve, **PALLAS_KERNELS}.items():
        for label, options in (("", {}), (", no command buffers", NO_GRAPHS)):
            yield f"{name} kernel{label}", functools.partial(_time_chains, setting, step, options)
    # What a graph costs whose inputs and outputs move, as without donation: it is updated before it is launched.
    label = "XLA kernel, addresses change with each call"
    yield label, functools.partial(_time_chains, setting, halve, {}, inputs=2)


def _time_chains(
    setting: Setting, step: Callable[[jax.Array], Any], options: Mapping[str, Any], *, inputs: int = 1
) -> Result:
    if not setting.is_gpu:
        raise Skip("XLA for CPUs may merge the chain, and Pallas kernels for GPUs need one")
    arrays = [tiny_array(seed) for seed in range(inputs)]
    kept: collections.deque[Any] = collections.deque(maxlen=inputs - 1)  # occupies the last output's address
    short, long = setting.sizes.chains

    def time_chain(count: int) -> tuple[Timing, Captured | None]:
        program, captured = compile_and_look(setting, repeated(step, count), tiny_array, options)
        if captured is not None and captured.kernels != count:
            raise RuntimeError(f"XLA made {captured.kernels} kernels of a chain of {count}")

        def start(number: int) -> Any:
            out = program(arrays[number % inputs])
            kept.append(out)
            return out

        return measure(setting, start), captured

    (first, _), (second, captured) = time_chain(short), time_chain(long)
    per_kernel = (second.seconds - first.seconds) / (long - short)
    fixed = first.seconds - short * per_kernel
    note = f"{fixed * 1e6:.0f} µs a call besides; {captured or NO_THUNKS}"
    return dataclasses.replace(measured(second), seconds=per_kernel, note=note)


def dispatches(setting: Setting) -> Iterator[Case]:
    """What the host takes for one jit call of one tiny kernel."""
    x = tiny_array()
    one = jax.jit(halve)
    first = jax.jit(lambda x: halve(x)[0])
    many_in = [tiny_array(seed) for seed in range(setting.sizes.arguments)]
    many = jax.jit(lambda arrays: halve(arrays[0]), keep_unused=True)
    state = [x]

    def next_state(_: int) -> jax.Array:
        state[0] = one(state[0])
        return state[0]

    def timed(start: Callable[[int], Any], **how: Any) -> Callable[[], Result]:
        return lambda: measured(measure(setting, start, **how))

    yield "call returns", timed(lambda _: one(x), calls=20, wait=False)
    yield "call and wait", timed(lambda _: one(x))
    yield "call and fetch 4 bytes", timed(lambda _: np.asarray(first(x)))
    yield "calls in a row, each on the last one's result", timed(next_state, calls=MAX_QUEUED)
    label = f"call with {setting.sizes.arguments} arguments"
    yield f"{label} returns", timed(lambda _: many(many_in), calls=20, wait=False)
    yield f"{label}, and wait", timed(lambda _: many(many_in))


def tokens(setting: Setting) -> Iterator[Case]:
    """A token of tiny kernels, one or several to a call, the state donated: seconds of a token."""
    count = setting.sizes.tokens
    token = repeated(halve, setting.sizes.token_kernels, "token")

    def fori(x: jax.Array) -> Any:
        return lax.fori_loop(0, count, lambda _, x: token(x), x)

    def scan(x: jax.Array) -> Any:
        return lax.scan(lambda x, _: (token(x), x[0]), x, None, length=count)

    def until(x: jax.Array) -> Any:  # as with a stop token; the second condition, on data, always holds
        return lax.while_loop(lambda s: (s[1] < count) & (s[0][0] < 2), lambda s: (token(s[0]), s[1] + 1), (x, 0))

    yield "one a call", functools.partial(_time_tokens, setting, token, 1, {})
    yield "one a call, no command buffers", functools.partial(_time_tokens, setting, token, 1, NO_GRAPHS)
    yield "4 a call, unrolled", functools.partial(_time_tokens, setting, repeated(token, 4), 4, {})
    for name, loop, options in (
        ("fori_loop", fori, {}),
        ("fori_loop in a command buffer", fori, LOOPS_IN_GRAPHS),
        ("fori_loop unrolled in a command buffer", fori, UNROLLED_IN_GRAPHS),
        ("scan", scan, {}),
        ("scan unrolled in a command buffer", scan, UNROLLED_IN_GRAPHS),
        ("while_loop on data", until, {}),
        ("while_loop on data in a command buffer", until, LOOPS_IN_GRAPHS),
    ):
        yield f"{count} a call, {name}", functools.partial(_time_tokens, setting, loop, count, options)


def _time_tokens(
    setting: Setting, function: Callable[[jax.Array], Any], count: int, options: Mapping[str, Any]
) -> Result:
    program, captured = compile_and_look(setting, function, tiny_array, options, donate=True)
    state = [tiny_array()]

    def start(_: int) -> jax.Array:
        state[0] = jax.tree.leaves(program(state[0]))[0]
        return state[0]

    timing = measure(setting, start, calls=0)
    if not setting.is_gpu:
        return measured(timing, per=count, note="XLA for CPUs may merge the kernels")
    per_kernel = timing.seconds / count / setting.sizes.token_kernels
    return measured(timing, per=count, note=f"{per_kernel * 1e6:.2f} µs a kernel; {captured or NO_THUNKS}")


def host_to_device(setting: Setting) -> Iterator[Case]:
    """device_put, waited for; several arrays go into one call, unless it says otherwise. Each byte counts once."""
    sizes = setting.sizes
    size = show_bytes(sizes.transfer_bytes)
    sources = [random_bytes(setting, sizes.transfer_bytes, seed) for seed in range(2)]
    put = functools.partial(place, setting)

    def case(
        start: Callable[[Any], Any], prepare: Callable[[int], Any], nbytes: int = sizes.transfer_bytes
    ) -> Callable[[], Result]:
        return lambda: measured(measure(setting, start, prepare=prepare), nbytes=nbytes)

    def whole(number: int) -> Any:
        return sources[number % 2]

    def cut(count: int, nbytes: int) -> Callable[[int], Any]:
        return lambda number: np.split(sources[number % 2][: count * nbytes], count)

    def pinned(take: Callable[[int], Any]) -> Callable[[int], Any]:
        held = functools.cache(lambda parity: jax.block_until_ready(put(take(parity), "pinned_host")))
        return lambda number: held(number % 2)

    yield f"anonymous, {size}", case(put, whole)
    yield f"pinned_host, {size}", case(put, pinned(whole))
    yield f"anonymous into pinned_host, {size}", case(lambda value: put(value, "pinned_host"), whole)
    for count, nbytes in ((sizes.parts, sizes.transfer_bytes // sizes.parts), *sizes.small):
        label, take = f"{count} x {show_bytes(nbytes)}", cut(count, nbytes)
        yield f"anonymous, {label}", case(put, take, count * nbytes)
        yield f"pinned_host, {label}", case(put, pinned(take), count * nbytes)

    parts = cut(sizes.parts, sizes.transfer_bytes // sizes.parts)
    label = f"{sizes.parts} x {show_bytes(sizes.transfer_bytes // sizes.parts)}"
    one_by_one = case(lambda arrays: [put(array).block_until_ready() for array in arrays], parts)
    yield f"anonymous, {label}, each waited for", one_by_one
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield f"anonymous, {label}, 4 threads", case(lambda arrays: list(pool.map(put, arrays)), parts)

    with tempfile.TemporaryDirectory(prefix="tensorport-ceiling-", dir=setting.scratch) as folder:
        file = Path(folder) / "bytes"
        with file.open("wb") as out:
            for source in sources:
                source.tofile(out)  # and so into the page cache
        yield from _page_cache(setting, file, case)


def _page_cache(setting: Setting, file: Path, case: Callable[..., Callable[[], Result]]) -> Iterator[Case]:
    """A file that holds two transfers, taken in turn."""
    nbytes, parts = setting.sizes.transfer_bytes, setting.sizes.parts
    put = functools.partial(place, setting)

    def mapped(number: int) -> np.ndarray[Any, Any]:
        return np.memmap(file, np.uint8, "r", number % 2 * nbytes, (nbytes,))

    touched = [mapped(number) for number in range(2)]
    for mapping in touched:
        mapping.max()
    buffer = random_bytes(setting, nbytes, 2)

    def read(number: int) -> Any:
        with file.open("rb", buffering=0) as stream:
            stream.seek(number % 2 * nbytes)
            if stream.readinto(buffer) != nbytes:
                raise EOFError("a short read")
        return put(buffer).block_until_ready()  # the buffer is used again

    yield f"page cache, new memmap, {show_bytes(nbytes)}", case(put, mapped)
    yield f"page cache, touched memmap, {show_bytes(nbytes)}", case(put, lambda number: touched[number % 2])
    label = f"page cache, touched memmap, {parts} x {show_bytes(nbytes // parts)}"
    yield label, case(put, lambda number: np.split(touched[number % 2], parts))
    yield f"page cache, read on one core, then put, {show_bytes(nbytes)}", case(read, lambda number: number)


def device_to_host(setting: Setting) -> Iterator[Case]:
    """Each byte counts once. Each call fetches arrays that were just made: JAX keeps what it fetched once."""
    sizes = setting.sizes
    size = show_bytes(sizes.transfer_bytes)
    base = place(setting, random_bytes(setting, sizes.transfer_bytes, 0))
    flip = jax.jit(jnp.bitwise_xor)
    flip_parts = jax.jit(lambda x, number: [jnp.bitwise_xor(p, number) for p in jnp.split(x, sizes.parts)])

    def case(start: Callable[[Any], Any], make: Callable[..., Any]) -> Callable[[], Result]:
        def prepare(number: int) -> Any:
            return jax.block_until_ready(make(base, np.uint8(number % 256)))

        return lambda: measured(measure(setting, start, prepare=prepare), nbytes=sizes.transfer_bytes)

    def to_numpy(arrays: Any) -> list[np.ndarray[Any, Any]]:
        if not setting.is_gpu:
            raise Skip("np.asarray copies nothing on a CPU")
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()
        return [np.asarray(array) for array in jax.tree.leaves(arrays)]

    yield f"to NumPy, {size}", case(to_numpy, flip)
    part = f"{sizes.parts} x {show_bytes(sizes.transfer_bytes // sizes.parts)}"
    yield f"to NumPy, {part}, in flight at once", case(to_numpy, flip_parts)
    yield f"to pinned_host, {size}", case(lambda array: place(setting, array, "pinned_host"), flip)


SECTIONS: dict[str, Section] = {
    "device memory": device_memory,
    "product": products,
    "launch": launches,
    "dispatch": dispatches,
    "tokens": tokens,
    "host to device": host_to_device,
    "device to host": device_to_host,
    "capture": captures,
}


# Running and telling.


def run_section(name: str, section: Section, setting: Setting) -> Iterator[Result]:
    """Runs a section's cases. What one raises becomes its row: device time is short, and the others can run."""
    cases = section(setting)
    while True:
        try:
            case, call = next(cases)
        except StopIteration:
            return
        except Exception as error:  # the section could not prepare its next case
            yield dataclasses.replace(explain(error), section=name, case="the rest")
            return
        try:
            result = call()
        except Exception as error:
            result = explain(error)
        yield dataclasses.replace(result, section=name, case=case)


def explain(error: Exception) -> Result:
    if isinstance(error, Skip):
        return Result(status="skipped", note=str(error))
    return Result(status="failed", note=describe(error))


def describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def environment(setting: Setting) -> dict[str, Any]:
    return {
        "device": setting.device.device_kind,
        "platform": setting.device.platform,
        "driver": query_nvidia_smi("driver_version"),
        "date": datetime.datetime.now().astimezone().date().isoformat(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": " ".join(setting.device.client.platform_version.split()),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "seconds_per_case": setting.seconds_per_case,
        "sizes": dataclasses.asdict(setting.sizes),
    }


def query_nvidia_smi(fields: str) -> str | None:
    """The first GPU's fields, or None where nvidia-smi does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    ran = subprocess.run(
        [command, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return ran.stdout.splitlines()[0].strip() if ran.returncode == 0 and ran.stdout else None


def show_bytes(nbytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def show_seconds(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.2f} {name}"
    return f"{seconds * 1e6:.2f} µs"


def table(results: Sequence[Result]) -> str:
    """The results in Markdown; `% of copy` compares the bytes of weights per second with the fastest copy's."""
    copies = [r for r in results if r.section == "device memory" and r.case.startswith("copy") and r.seconds]
    copy_rate = max((r.nbytes / r.seconds for r in copies if r.seconds), default=None)
    lines = ["| section | case | time | GB/s | % of copy | TFLOP/s | spread | |", "|---|---|---|---|---|---|---|---|"]
    for result in results:
        time_, rate, share, flops, spread = "-", "-", "-", "-", "-"
        if result.seconds is not None:
            time_ = show_seconds(result.seconds)
            spread = f"{result.spread or 0:.0%}"
            rate = f"{result.nbytes / result.seconds / 1e9:.4g}" if result.nbytes else "-"
            flops = f"{result.flops / result.seconds / 1e12:.3g}" if result.flops else "-"
            if result.is_of_copy and copy_rate:
                share = f"{result.nbytes / result.seconds / copy_rate:.0%}"
        note = result.note if result.status == "measured" else f"{result.status}: {result.note}"
        cells = (result.section, result.case, time_, rate, share, flops, spread, note.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_setting(options: argparse.Namespace) -> Setting:
    device = jax.devices()[0]
    sizes = QUICK if options.quick else Sizes() if device.platform == "gpu" else ON_CPU
    seconds = options.seconds_per_case or (0.01 if options.quick else 0.3)
    return Setting(device, sizes, seconds, options.scratch)


def run_sections(setting: Setting, sections: Mapping[str, Section], log: IO[str] | None) -> list[Result]:
    """Runs the sections, telling each result on stderr and in the log as it comes."""

    def write(kind: str, fields: Mapping[str, Any]) -> None:
        if log is not None:
            print(json.dumps({"kind": kind, **fields}, ensure_ascii=False), file=log, flush=True)

    write("environment", environment(setting))
    results: list[Result] = []
    for name, section in sections.items():
        began = time.perf_counter()
        for result in run_section(name, section, setting):
            results.append(result)
            told = show_seconds(result.seconds) if result.seconds is not None else result.status
            print(f"{name}: {result.case}: {told} {result.note}", file=sys.stderr, flush=True)
            write("case", dataclasses.asdict(result))
        seconds = time.perf_counter() - began
        print(f"{name}: {seconds:.1f} s in all", file=sys.stderr, flush=True)
        state = query_nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw") if setting.is_gpu else None
        write("section", {"section": name, "seconds": seconds, "gpu_after": state})
    return results


def run_and_tell(setting: Setting, sections: Mapping[str, Section], options: argparse.Namespace) -> int:
    """Runs the sections and prints their table; returns the exit code."""
    began = time.perf_counter()
    if options.json is None:
        results = run_sections(setting, sections, None)
    else:
        with options.json.open("w") as log:
            results = run_sections(setting, sections, log)

    facts = environment(setting)
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    print(f"{facts['device']}{driver}; {facts['date']}; jax {facts['jax']}, jaxlib {facts['jaxlib']}, Python", end=" ")
    print(f"{facts['python']}; {facts['system']}; {time.perf_counter() - began:.0f} s in all")
    print("sizes of --quick: the figures say nothing\n" if options.quick else "")
    print(table(results))
    return int(any(result.status == "failed" for result in results))


def add_options(parser: argparse.ArgumentParser, sections: Iterable[str]) -> None:
    """What every script of this kind takes."""
    parser.add_argument("--json", type=Path, help="a file for JSON lines")
    parser.add_argument("--seconds-per-case", type=float, default=None, help="default: 0.3, with --quick 0.01")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test this script")
    parser.add_argument(
        "--only", action="append", choices=list(sections), help="a section; may be given more than once"
    )
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="for a file of 2 GiB")


def chosen(sections: Mapping[str, Section], options: argparse.Namespace) -> dict[str, Section]:
    """Those of --only, in their order here."""
    return {name: section for name, section in sections.items() if not options.only or name in options.only}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, SECTIONS)
    parser.add_argument("--capture-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.capture_child:
        capture_child()
        return 0
    return run_and_tell(make_setting(options), chosen(SECTIONS, options), options)


if __name__ == "__main__":
    sys.exit(main())
