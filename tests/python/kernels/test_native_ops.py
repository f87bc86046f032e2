"""Native kernels within programs: wherever a program has them run, the values are those of one call."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mxfp4_oracle as oracle
import numpy as np
import pytest
import tensorport
from jax import export, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from mxfp4_cases import EPSILON, float64, random_array, random_weights
from numpy.typing import NDArray
from tensorport import mxfp4
from tensorport.kernels import native
from tensorport.kernels.dense_moe.api import dense_moe
from tensorport.kernels.linear.api import linear
from tensorport.mxfp4 import MXFP4Array

TIMEOUT_S = 240
"""For processes that take some five seconds."""

ROWS, K, N, E, WIDTH, CHOICES, BATCH = 10, 96, 7, 6, 160, 3, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An op on arrays with a row for each token, and on weights."""

    target: str
    op: Callable[..., Any]
    rows: tuple[Any, ...]
    weights: tuple[Any, ...]

    def __call__(self, *rows: Any, implementation: Any = "native") -> Any:
        return self.op(*rows, *self.weights, implementation=implementation)


def router() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(E)[:CHOICES] for _ in range(ROWS)])
    return jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random((ROWS, CHOICES)), jnp.float32)


def expert_matmul(x: Any, ids: Any, w: Any, *, implementation: Any) -> Any:
    return mxfp4.expert_matmul(x, w, ids, implementation=implementation)


NAMES = ("linear", "matmul", "expert_matmul", "moe", "dense_moe")
"""All ops that have native kernels."""

each_op = pytest.mark.parametrize("name", NAMES)


@functools.cache
def cases() -> dict[str, Case]:
    x = random_array(ROWS, K)
    matrix, bias = random_array(N, K, dtype=jnp.bfloat16, seed=1), random_array(N, seed=2)
    ids = jnp.asarray(np.random.default_rng(9).integers(0, E, ROWS), jnp.int32)
    scales = (117, 124)
    gate_up, down = random_weights(E, 2 * WIDTH, K, seed=3, scales=scales), random_weights(E, K, WIDTH, seed=4)
    biases = random_array(E, 2 * WIDTH, seed=5), random_array(E, K, seed=6)
    experts = gate_up, biases[0], down, biases[1]
    dense = gate_up.dequantize(), biases[0], down.dequantize(), biases[1]
    routed = (x, *router())
    return {
        "linear": Case("linear", linear, (x,), (matrix, bias)),
        "matmul": Case("mxfp4_matmul", mxfp4.matmul, (x,), (random_weights(N, K, seed=7),)),
        "expert_matmul": Case("mxfp4_expert_matmul", expert_matmul, (x, ids), (random_weights(E, N, K, seed=8),)),
        "moe": Case("mxfp4_moe", mxfp4.moe, routed, experts),
        "dense_moe": Case("dense_moe", dense_moe, routed, dense),
    }


def assert_alike(found: Any, wanted: Any) -> None:
    """Up to the order of sums in float32: kernels take rows together as they come."""
    size = np.abs(float64(wanted)).max()
    np.testing.assert_allclose(float64(found), float64(wanted), rtol=0, atol=1e-5 * size)


def twice(case: Case) -> tuple[Any, ...]:
    """A batch of two of the rows, of which the second has another x."""
    return tuple(
        jnp.stack([array, -array if array.dtype == jnp.float32 and number == 0 else array])
        for number, array in enumerate(case.rows)
    )


def in_scan(case: Case, batch: tuple[Any, ...]) -> Any:
    return lax.scan(lambda carry, rows: (carry, case(*rows)), jnp.float32(0), batch)[1]


@each_op
def test_vmap_and_scan_give_the_values_of_single_calls(name: str) -> None:
    case = cases()[name]
    batch = twice(case)
    single = np.stack([case(*(array[number] for array in batch)) for number in range(BATCH)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(case))(*batch), single)
    np.testing.assert_array_equal(jax.jit(lambda *batch: in_scan(case, batch))(*batch), single)


@each_op
def test_shard_map_over_rows_gives_the_values_of_one_call(name: str) -> None:
    case = cases()[name]
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("data",))

    def part(rows: Any, weights: Any) -> Any:
        return case.op(*rows, *weights, implementation="native")

    spread = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))
    assert_alike(spread(case.rows, case.weights), case(*case.rows))


def exported(case: Case, implementation: str, *platforms: str) -> export.Exported:
    def program(rows: Any, weights: Any) -> Any:
        return case.op(*rows, *weights, implementation=implementation)

    checks = [export.DisabledSafetyCheck.custom_call(f"tensorport.v1.{case.target}")]
    return export.export(jax.jit(program), platforms=platforms, disabled_checks=checks)(case.rows, case.weights)


@each_op
def test_an_exported_program_has_the_kernel_for_cpu_alone(name: str) -> None:
    case = cases()[name]
    assert f"@tensorport.v1.{case.target}" in exported(case, "auto", "cpu").mlir_module()
    assert "tensorport.v1" not in exported(case, "auto", "cuda").mlir_module()
    program = exported(case, "auto", "cpu", "cuda").serialize()
    found = export.deserialize(program).call(case.rows, case.weights)
    np.testing.assert_array_equal(found, case(*case.rows))


def test_a_program_from_the_compilation_cache_gives_the_same_values(tmp_path: Path) -> None:
    script = """
import hashlib, sys
import jax
sys.path[:0] = sys.argv[1:]
import test_native_ops as ops
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
programs = {name: jax.jit(lambda rows, case=case: case(*rows)) for name, case in ops.cases().items()}
before = len(hits)
digest = hashlib.sha256(b"".join(bytes(program(ops.cases()[name].rows)) for name, program in programs.items()))
print(len(hits) - before, digest.hexdigest())
"""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    (missed, first), (hits, second) = (finish(start(script, *folders, **cache)).split() for _ in range(2))
    assert first == second
    assert int(hits) >= len(cases()) > int(missed)


def start(script: str, *args: str, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out.strip()


def test_threads_that_call_every_op_at_once_get_the_values_of_single_calls() -> None:
    programs: list[tuple[Any, tuple[Any, ...], NDArray[Any]]] = []
    for case in cases().values():
        batch = twice(case)
        ways: list[Any] = [
            (case, case.rows),
            (jax.vmap(case), batch),
            (lambda *rows, case=case: in_scan(case, rows), batch),
        ]
        for way, rows in ways:
            program = jax.jit(way)
            programs.append((program, rows, np.asarray(program(*rows))))
    faults: list[Any] = []
    barrier = threading.Barrier(5)

    def work(seed: int) -> None:
        try:
            barrier.wait()
            for number in np.random.default_rng(seed).permutation(len(programs) * 8) % len(programs):
                program, rows, wanted = programs[number]
                np.testing.assert_array_equal(program(*rows), wanted)
        # Whatever it is: in a thread of its own nobody would hear of it.
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


# Two threads of each process decode at once, on weights that all processes map.
DECODE = """
import hashlib, json, sys, threading
from functools import partial
import jax, jax.numpy as jnp
from tensorport.models import gpt_oss
config = gpt_oss.load_config(sys.argv[1])
params, report = gpt_oss.load_model_params(sys.argv[1], config, dtype="bfloat16")
assert report.mapped_bytes == report.nbytes
step = jax.jit(partial(gpt_oss.forward, config=config))
digests = []
def decode():
    cache, token, digest = gpt_oss.empty_cache(config, 1, 40, dtype="bfloat16"), jnp.asarray([[3, 1, 4, 1, 5]]), b""
    for _ in range(8):
        logits, cache = step(params, tokens=token, cache=cache)
        token = jnp.argmax(logits[:, -1:], axis=-1)
        digest += bytes(logits)
    digests.append(hashlib.sha256(digest).hexdigest())
threads = [threading.Thread(target=decode) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(digests))
"""


def test_processes_that_map_one_file_decode_alike(tmp_path: Path, two_layers: Path) -> None:
    tensorport.convert(two_layers, tmp_path / "tree", progress=False)
    alone = json.loads(finish(start(DECODE, str(tmp_path / "tree"))))
    together = [start(DECODE, str(tmp_path / "tree")) for _ in range(4)]
    found = [json.loads(finish(process)) for process in together]
    assert len(alone) == 2
    assert {digest for digests in [alone, *found] for digest in digests} == {alone[0]}
    assert all(len(digests) == 2 for digests in found)


def wrong(name: str, number: int, array: Any) -> tuple[str, list[Any], dict[str, Any]]:
    """The target, the arguments with one of them replaced, and the attributes."""
    case = cases()[name]
    args = jax.tree.leaves((case.rows, case.weights))
    if name == "expert_matmul":
        args = [args[0], *args[2:], args[1]]
    args[number] = array
    attributes = {"limit": np.float32(7), "alpha": np.float32(1.702)} if "moe" in name else {}
    return f"tensorport.v1.{case.target}", args, attributes


@pytest.mark.parametrize(
    ("name", "number", "array", "text"),
    [
        ("linear", 1, np.zeros((N, K + 1), jnp.bfloat16), r"weight: found \[7, 97\], expected \[7, 96\]"),
        ("linear", 2, np.zeros(N + 1, np.float32), r"bias: found \[8\], expected \[7\]"),
        ("linear", 0, np.zeros((ROWS, K), np.int32), "argument 0: found int32, expected bfloat16 or float32"),
        ("matmul", 1, np.zeros((N, 2, 16), np.uint8), r"blocks of w: found \[7, 2, 16\], expected \[7, 3, 16\]"),
        ("matmul", 2, np.zeros((N, 4), np.uint8), r"scales of w: found \[7, 4\], expected \[7, 3\]"),
        ("expert_matmul", 3, np.zeros(ROWS - 1, np.int32), r"ids: found \[9\], expected \[10\]"),
        ("expert_matmul", 3, np.zeros(ROWS, np.uint32), "argument 3: found uint32, expected int32"),
        ("moe", 1, np.zeros((ROWS, 4), np.int32), r"weights: found \[10, 3\], expected \[10, 4\]"),
        ("moe", 5, np.zeros((E, 319), np.float32), "width of gate_up: found 319, expected an even number above 0"),
        ("moe", 7, np.zeros((E, K, 4), np.uint8), r"scales of down: found \[6, 96, 4\], expected \[6, 96, 5\]"),
        (
            "dense_moe",
            3,
            np.zeros((0, 320, K), jnp.bfloat16),
            r"gate_up: found \[0, 320, 96\], expected \[6, 320, 96\]",
        ),
        ("dense_moe", 6, np.zeros((E, K + 1), np.float32), r"bias of down: found \[6, 97\], expected \[6, 96\]"),
    ],
)
def test_a_program_that_calls_with_wrong_arrays_fails_and_the_process_goes_on(
    name: str, number: int, array: Any, text: str
) -> None:
    assert native.unavailable() is None
    target, args, attributes = wrong(name, number, array)
    case = cases()[name]
    call: Any = jax.ffi.ffi_call(target, jax.eval_shape(case, *case.rows))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT: {target}: {text}"):
        jax.block_until_ready(call(*args, **attributes))
    assert np.isfinite(np.asarray(case(*case.rows))).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("m", "k"), [(1, 32), (1, 96), (3, 96), (1, 2880), (5, 2880)])
def test_products_under_every_scale_byte_are_those_of_float64(m: int, k: int, dtype: str) -> None:
    """Row n of the matrix has the scale byte n in all blocks: from sums that are subnormal to those beyond float32."""
    codes = np.random.default_rng(k).integers(0, 256, (256, k // 32, 16), np.uint8)
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], k // 32, axis=1)
    x = random_array(m, k, dtype=dtype, seed=m)
    found = float64(mxfp4.matmul(x, MXFP4Array(codes, scales), implementation="native"))
    weights = oracle.decode(codes, scales)
    with np.errstate(invalid="ignore"):
        wanted, magnitude = float64(x) @ weights.T, np.abs(float64(x)) @ np.abs(weights).T
    assert np.isnan(found[:, 255]).all()
    largest = float(np.finfo(np.float32).max)
    fits = magnitude[:, :255] < largest
    assert 240 * m <= fits.sum() < 255 * m
    # Where one instruction multiplies bfloat16, it takes what is subnormal for zero.
    least = 2.0**-126 * 8 if dtype == "bfloat16" else 2.0**-149
    bound = k * (EPSILON["float32"] * magnitude + least) + EPSILON[dtype] * np.abs(wanted)
    assert (np.abs(found - wanted)[:, :255][fits] <= bound[:, :255][fits]).all()
    # Where parts of a sum are beyond float32, it may end there.
    beyond = ~fits & (np.abs(wanted[:, :255]) > largest * (1 + EPSILON[dtype]))
    assert not np.isfinite(found[:, :255][beyond]).any()


def one_hot_rows(values: list[float]) -> NDArray[np.float32]:
    x = np.zeros((len(values), K), np.float32)
    x[:, 40] = values
    return x


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", ["linear", "matmul", "expert_matmul"])
def test_each_row_has_the_values_that_float32_has(name: str, together: bool) -> None:
    """Weights of 1 and 0: NaN, infinities, zeros, what is subnormal and what is large comes through as it is."""
    # A row alone is multiplied by codes of at most 6 first, and by scales then.
    large, least = float(np.finfo(np.float32).max) / 6, 2.0**-149
    values = [np.nan, np.inf, -np.inf, -0.0, least, -3 * least, 2.0**-127, large, -large]
    x = one_hot_rows(values)
    ones = np.zeros((K, K), np.float32)
    ones[5, 40] = 1
    w, ids = mxfp4.quantize(ones), jnp.zeros(len(x), jnp.int32)
    stack = MXFP4Array(w.blocks[None], w.scales[None])
    op: Callable[..., Any] = {
        "linear": lambda x, _: linear(x, jnp.asarray(ones, jnp.bfloat16), implementation="native"),
        "matmul": lambda x, _: mxfp4.matmul(x, w, implementation="native"),
        "expert_matmul": lambda x, ids: mxfp4.expert_matmul(x, stack, ids, implementation="native"),
    }[name]
    parts = [slice(None)] if together else [slice(i, i + 1) for i in range(len(x))]
    found = np.concatenate([np.asarray(op(jnp.asarray(x[part]), ids[part])) for part in parts])
    np.testing.assert_array_equal(found[:, 5], np.asarray(values, np.float32))
    is_finite = np.isfinite(values)
    np.testing.assert_array_equal(np.delete(found, 5, axis=1)[is_finite], 0)
    assert np.isnan(np.delete(found, 5, axis=1)[~is_finite]).all()


def test_sums_beyond_float32_are_infinite_and_experts_without_rows_count_for_nothing() -> None:
    w = random_weights(E, N, K)
    scales = np.asarray(w.scales).copy()
    scales[[0, 4]] = 255  # which are NaN, and of experts that no row goes to
    ids = jnp.asarray([2, 5, -1, 3, E, 2])
    x = random_array(6, K)
    found = np.asarray(mxfp4.expert_matmul(x, MXFP4Array(w.blocks, scales), ids, implementation="native"))
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), [False, False, True, False, True, False])
    assert np.isfinite(found[[0, 1, 3, 5]]).all()
    huge = linear(jnp.full((2, K), 3e38), jnp.ones((N, K), jnp.bfloat16), implementation="native")
    np.testing.assert_array_equal(huge, np.full((2, N), np.inf))
