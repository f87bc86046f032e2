"""Calls from compiled programs into Rust, by the handler that tells how it was called."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import NamedSharding, PartitionSpec
from tensorport import mxfp4
from tensorport.kernels import native

PROBE = "tensorport.v1.probe"

TIMEOUT_S = 120
"""For processes that take some three seconds."""

has_one_core = not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2
needs_two_cores = pytest.mark.skipif(has_one_core, reason="needs a pool of two threads: two cores, counted by Linux")

RESULTS = (
    jax.ShapeDtypeStruct((3,), np.int32),
    jax.ShapeDtypeStruct((2,), np.uint32),
    jax.ShapeDtypeStruct((), np.float32),
)

# What scripts in processes of their own begin with.
PRELUDE = f"""
import jax, numpy as np
from tensorport.kernels import native
S = jax.ShapeDtypeStruct
def probe(memory, values, mode=0):
    results = (S((3,), np.int32), S((2,), np.uint32), S((), np.float32))
    return native.call("{PROBE}", results, memory, values, mode=mode)
memory, values = np.zeros((3, 5), np.uint8), np.arange(1000, dtype=np.float32)
"""


def probe(memory: Any, values: Any, mode: int = 0) -> Any:
    """Threads and where tasks ran; the halves of memory's address; the sum of values."""
    return native.call(PROBE, RESULTS, memory, values, mode=mode)


def place(address: Any) -> int:
    low, high = np.asarray(address).tolist()
    return int(low | high << 32)


@pytest.fixture
def memory() -> jax.Array:
    return jnp.zeros((3, 5, 4), jnp.uint8)


@pytest.fixture
def values() -> jax.Array:
    return jnp.arange(1000, dtype=jnp.float32)


def start(script: str, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out.strip()


def run(script: str, **env: str) -> str:
    """What a script prints in a process of its own."""
    return finish(start(script, **env))


def test_a_call_computes_on_threads_of_xla(memory: jax.Array, values: jax.Array) -> None:
    (threads, own, other), _, total = jax.jit(probe)(memory, values)
    assert threads >= 1
    assert own + other == 16  # chunks of 64 values
    assert total == 999 * 500


@needs_two_cores
def test_another_thread_takes_tasks(memory: jax.Array, values: jax.Array) -> None:
    assert jax.jit(lambda memory, values: probe(memory, values, mode=4))(memory, values)[2] == 999 * 500


def test_registers_in_a_process_where_nothing_started_jax() -> None:
    assert run(PRELUDE + "print(native.unavailable(), jax.jit(probe)(memory, values)[2])") == "None 499500.0"


def test_registers_after_jax_started() -> None:
    script = "import jax; jax.jit(lambda x: x + 1)(1)\n" + PRELUDE + "print(jax.jit(probe)(memory, values)[2])"
    assert run(script) == "499500.0"


def test_importing_starts_no_backend() -> None:
    script = "from tensorport.kernels import native; from jax._src import xla_bridge; print(xla_bridge._backends)"
    assert run(script) == "{}"


def test_threads_may_ask_first_at_once() -> None:
    script = """
import threading
barrier, answers = threading.Barrier(8), []
def ask():
    barrier.wait()
    answers.append(native.unavailable())
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(answers == [None] * 8, jax.jit(probe)(memory, values)[2])
"""
    assert run(PRELUDE + script) == "True 499500.0"


# A handler that says it was made for a version of the interface that does not exist.
NEWER = """
import ctypes
def newer(frame):
    extension = ctypes.c_void_p.from_address(frame + 8).value
    metadata = ctypes.c_void_p.from_address(extension + 24).value
    ctypes.c_int.from_address(metadata + 28).value = 99
handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(newer)
native._core.ffi_targets = lambda: {
    "tensorport.newer": jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value)
}
"""


def test_a_handler_that_xla_refuses_leaves_the_backend_working() -> None:
    script = """
print(native.unavailable(), jax.jit(lambda x: x + 1)(np.float32(1)), sep="|")
try:
    probe(memory, values)
except NotImplementedError as fault:
    print(fault)
"""
    told, called = run(PRELUDE + NEWER + script).splitlines()
    reason, computed = told.split("|")
    assert reason.startswith("XLA refused tensorport.newer: ")
    assert "99) is incompatible" in reason
    assert computed == "2.0"
    assert called == f"{PROBE}: {reason}"


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(native, "_refusal", native._NOT_TRIED)
    return monkeypatch


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, RuntimeError, TypeError, ValueError])
def test_a_registration_that_fails_is_a_reason_that_stays(
    unregistered: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("not today")

    with unregistered.context() as patch:
        patch.setattr(jax.ffi, "register_ffi_target", refuse)
        reason = native.unavailable()
    assert reason is not None
    assert reason.startswith("XLA refused tensorport.")
    assert reason.endswith("not today")
    assert native.unavailable() == reason
    assert jax.jit(lambda x: x * 2)(np.int32(4)) == 8


def test_no_cpu_backend_is_a_reason_while_there_is_none(unregistered: pytest.MonkeyPatch) -> None:
    def missing(platform: str) -> None:
        raise RuntimeError(f"Unknown backend {platform}")

    with unregistered.context() as patch:
        patch.setattr(jax, "devices", missing)
        assert native.unavailable() == "JAX has no CPU backend: Unknown backend cpu"
    assert native.unavailable() is None


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        (1, "INVALID_ARGUMENT: tensorport.v1.probe: mode: found 1, expected one that does not fail"),
        (2, "INTERNAL: tensorport.v1.probe: panic: as mode 2 asks"),
        pytest.param(3, "INTERNAL: tensorport.v1.probe: panic: as mode 3 asks", marks=needs_two_cores),
    ],
    ids=["error", "panic", "panic on a thread of the pool"],
)
def test_a_failure_arrives_with_its_text_and_the_process_goes_on(
    memory: jax.Array, values: jax.Array, mode: int, text: str
) -> None:
    for _ in range(20):
        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            jax.block_until_ready(jax.jit(probe, static_argnums=2)(memory, values, mode))
        assert text in str(caught.value)
        assert jax.jit(probe)(memory, values)[2] == 999 * 500


def test_arguments_that_the_kernel_does_not_take_are_refused_by_name(memory: jax.Array, values: jax.Array) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="argument 0: found float32, expected uint8"):
        jax.block_until_ready(probe(values, values))
    with pytest.raises(jax.errors.JaxRuntimeError, match="number of arguments: found 3, expected 2"):
        jax.block_until_ready(native.call(PROBE, RESULTS, memory, values, values, mode=0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="number of results: found 2, expected 3"):
        jax.block_until_ready(native.call(PROBE, RESULTS[:2], memory, values, mode=0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="attribute mode: found none, expected int32"):
        jax.block_until_ready(native.call(PROBE, RESULTS, memory, values))
    with pytest.raises(jax.errors.JaxRuntimeError, match="attribute mode: found float32, expected int32"):
        jax.block_until_ready(native.call(PROBE, RESULTS, memory, values, mode=1.5))


def test_attributes_are_numbers_that_fit(memory: jax.Array, values: jax.Array) -> None:
    assert native.call(PROBE, RESULTS, memory, values, mode=np.int32(0))[2] == 999 * 500
    text: Any = "0"
    with pytest.raises(TypeError, match="attribute mode: found '0', expected a number"):
        native.call(PROBE, RESULTS, memory, values, mode=text)
    with pytest.raises(OverflowError):
        native.call(PROBE, RESULTS, memory, values, mode=1 << 31)


def in_loop(memory: jax.Array, values: jax.Array) -> Any:
    def step(_: Any, seen: Any) -> Any:
        return probe(memory, values)[1] | seen

    return lax.fori_loop(0, 3, step, jnp.zeros(2, jnp.uint32))


def in_scan(memory: jax.Array, values: jax.Array) -> Any:
    def step(seen: Any, index: Any) -> Any:
        return probe(memory, values + index)[1] | seen, None

    return lax.scan(step, jnp.zeros(2, jnp.uint32), jnp.arange(4, dtype=jnp.float32))[0]


def carried(memory: jax.Array, values: jax.Array) -> Any:
    def step(carry: Any) -> Any:
        index, memory, seen = carry
        return index + 1, memory, probe(memory, values)[1] | seen

    return lax.while_loop(lambda carry: carry[0] < 3, step, (0, memory, jnp.zeros(2, jnp.uint32)))[2]


# Addresses of several calls are joined bit by bit: they give the argument's only if each is that.
WAYS: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "argument": lambda memory, values: probe(memory, values)[1],
    "reshape": lambda memory, values: probe(memory.reshape(15, 4), values)[1],
    "reshape that splits": lambda memory, values: probe(memory.reshape(3, 5, 2, 2), values)[1],
    "fori_loop": in_loop,
    "scan": in_scan,
    "while carry": carried,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_argument_arrives_in_its_own_memory(memory: jax.Array, values: jax.Array, way: str) -> None:
    assert place(jax.jit(WAYS[way])(memory, values)) == memory.unsafe_buffer_pointer()


def test_shards_arrive_in_their_own_memory() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
    rows = PartitionSpec("x")
    memory = jax.device_put(np.zeros((6, 7), np.uint8), NamedSharding(mesh, rows))
    values = jax.device_put(np.arange(10, dtype=np.float32), NamedSharding(mesh, PartitionSpec()))

    def body(memory: Any, values: Any) -> Any:
        _, address, total = probe(memory, values)
        return address, total.reshape(1)

    addresses, totals = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=(rows, rows))
    )(memory, values)
    found = [place(half) for half in np.asarray(addresses).reshape(2, 2)]
    assert found == [shard.data.unsafe_buffer_pointer() for shard in memory.addressable_shards]
    assert totals.tolist() == [45, 45]


def test_subnormals_are_kept(memory: jax.Array) -> None:
    # Multiples of the smallest float, whose sum is below the smallest normal one: added up exactly, or flushed to 0.
    bits = np.arange(1, 1001, dtype=np.uint32)
    _, _, total = jax.jit(probe)(memory, jnp.asarray(bits.view(np.float32)))
    assert np.asarray(total).view(np.uint32) == bits.sum()


def test_xla_computes_after_a_call_as_before(memory: jax.Array) -> None:
    def program(memory: Any, x: Any) -> Any:
        before = x * jnp.float32(0.5)
        total = probe(memory, before + jnp.float32(1))[2]
        return before, x * (total / jnp.float32(16))  # which waits for the call, and halves too

    before, after = jax.jit(program)(memory, jnp.full(8, np.finfo(np.float32).tiny))
    # XLA on CPU flushes both to zero. The second would be half of the smallest normal number on a thread that the call
    # left in another state.
    assert after.tolist() == before.tolist()


def test_vmap_calls_for_each_element(memory: jax.Array) -> None:
    batch = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    counts, addresses, totals = jax.jit(jax.vmap(probe, in_axes=(None, 0)))(memory, batch)
    assert totals.tolist() == [6, 22, 38]
    assert {place(address) for address in addresses} == {memory.unsafe_buffer_pointer()}
    assert counts.shape == (3, 3)


def test_a_gradient_is_refused_by_name(memory: jax.Array, values: jax.Array) -> None:
    with pytest.raises(ValueError, match=PROBE):
        jax.grad(lambda values: probe(memory, values)[2])(values)


def total_anywhere(memory: jax.Array, values: jax.Array) -> Any:
    return lax.platform_dependent(
        memory,
        values,
        cpu=lambda memory, values: probe(memory, values)[2],
        default=lambda _, values: jnp.sum(values) + 1,
    )


def exported(function: Callable[..., Any], *platforms: str) -> export.Exported:
    args = jax.ShapeDtypeStruct((3, 5), np.uint8), jax.ShapeDtypeStruct((1000,), np.float32)
    checks = [export.DisabledSafetyCheck.custom_call(PROBE)]
    return export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*args)


def test_a_program_for_cpu_has_the_kernel_alone(values: jax.Array) -> None:
    text = exported(total_anywhere, "cpu").mlir_module()
    assert text.count(f"custom_call @{PROBE}") == 1
    assert "stablehlo.reduce" not in text
    assert jax.jit(total_anywhere)(jnp.zeros((3, 5), jnp.uint8), values) == 999 * 500


def test_a_program_for_another_platform_takes_the_other_way() -> None:
    text = exported(total_anywhere, "cuda").mlir_module()
    assert PROBE not in text
    assert "stablehlo.reduce" in text


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")], ids=" ".join)
def test_an_exported_program_runs(platforms: tuple[str, ...], values: jax.Array) -> None:
    program = export.deserialize(exported(total_anywhere, *platforms).serialize())
    assert program.call(jnp.zeros((3, 5), jnp.uint8), values) == 999 * 500


def products(implementation: Any, *platforms: str) -> Any:
    """A product with an MXFP4 matrix, exported."""

    def product(x: Any, blocks: Any, scales: Any) -> Any:
        return mxfp4.matmul(x, mxfp4.MXFP4Array(blocks, scales), implementation=implementation)

    shape: Any = jax.ShapeDtypeStruct
    args = shape((2, 96), np.float32), shape((7, 3, 16), np.uint8), shape((7, 3), np.uint8)
    checks = [export.DisabledSafetyCheck.custom_call("tensorport.v1.mxfp4_matmul")]
    return export.export(jax.jit(product), platforms=platforms, disabled_checks=checks)(*args)


def test_an_automatic_choice_runs_on_any_platform() -> None:
    assert "tensorport.v1" not in products("auto", "cuda").mlir_module()
    program = export.deserialize(products("auto", "cpu", "cuda").serialize())
    w = mxfp4.quantize(jax.random.normal(jax.random.key(0), (7, 96)))
    x = jax.random.normal(jax.random.key(1), (2, 96))
    np.testing.assert_array_equal(program.call(x, w.blocks, w.scales), mxfp4.matmul(x, w, implementation="native"))


def test_a_named_kernel_is_refused_elsewhere_when_lowered() -> None:
    assert "tensorport.v1.mxfp4_matmul" in products("native", "cpu").mlir_module()
    with pytest.raises(NotImplementedError, match=r"'cpu'.* not found for platform cuda"):
        products("native", "cuda")


def test_a_program_from_the_compilation_cache_finds_the_kernel(tmp_path: Path) -> None:
    script = """
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
print(len(hits), jax.jit(probe)(memory, values)[2], len(hits))
"""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    assert [run(PRELUDE + script, **cache) for _ in range(2)] == ["0 499500.0 0", "0 499500.0 1"]


# One core: the pool has one thread, which may be the caller.
STRESS = """
import threading
@jax.jit
def total(memory, values):
    def step(index, total):
        return total + probe(memory, values + total)[2]
    return jax.lax.fori_loop(0, 8, step, np.float32(0)), probe(memory, values)[0]
ones, faults = np.ones(300, np.float32), []
def work():
    for _ in range(60):
        # total = 301 * total + 300 in float32 arithmetic, every time the same
        found = np.asarray(total(memory, ones)[0])
        if found != expected: faults.append(found)
expected, (count, *_) = map(np.asarray, total(memory, ones))
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(faults), np.isclose(expected, 301.0 ** 8 - 1, rtol=1e-5), int(count))
"""


def test_threads_and_processes_may_call_at_once() -> None:
    processes = [start(PRELUDE + STRESS) for _ in range(2)]
    assert [finish(process).split()[:2] for process in processes] == [["0", "True"]] * 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="takes cores from a process as Linux does")
def test_a_pool_of_one_thread_is_enough() -> None:
    one_core = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert run(one_core + PRELUDE + STRESS) == "0 True 1"


def test_calls_from_many_threads_agree(memory: jax.Array) -> None:
    program = jax.jit(lambda memory, values: [probe(memory, values + jnp.float32(n))[2] for n in range(8)])
    faults: list[Any] = []

    def work(seed: int) -> None:
        values = jnp.full(200, seed, jnp.float32)
        for _ in range(40):
            found = [float(total) for total in program(memory, values)]
            if found != [200.0 * (seed + n) for n in range(8)]:
                faults.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
