"""benchmarks/gpu_ceiling.py on a CPU: what it says, what it skips, and that its kernels lower for CUDA."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_ceiling.py"

# JAX 0.11 and later say so at every lowering.
ignore_triton_deprecation = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

THUNKS_OF_A_LOOP = """\
001: kCopy  [source       | next=003 (2)] kCopy
003: kWhile [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source       | next=006 (1)] loop_add_fusion grid: [1, 1, 1]
        006: kCustomCall [prev=005 (1) | sink        ] kCustomCall
    007: kKernel [prev=006 (1) | sink        ] tail grid: [1, 1, 1]
"""
THUNKS_OF_A_CAPTURED_LOOP = """\
000: kCommandBuffer [source | sink]
    001: kCopy  [source       | next=003 (2)] kCopy
    003: kWhile [prev=002 (1) | sink        ]
condition:
        004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
      body:
        005: kCustomKernel [source       | next=006 (1)] loop_add_fusion grid: [1, 1, 1]
"""
THUNKS_OF_BRANCHES = """\
000: kCommandBuffer [source | sink]
    001: kConditional [source | sink]
      false_branch:
        002: kCopy [source | sink] kCopy
      true_branch:
        003: kKernel [source | sink] some grid: [1, 1, 1]
004: kConditional [prev=000 (1) | sink]
  false_branch:
    000: kCommandBuffer [source | sink]
        005: kKernel [source | sink] some grid: [1, 1, 1]
  true_branch:
    006: kKernel [source | sink] other grid: [1, 1, 1]
"""


@pytest.fixture(scope="module")
def ceiling() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("gpu_ceiling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def setting(ceiling: Any, tmp_path: Path) -> Any:
    return ceiling.Setting(jax.devices("cpu")[0], ceiling.QUICK, 0.0, tmp_path)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The rows of the table and the JSON lines of one run."""
    log = tmp_path_factory.mktemp("ceiling") / "log.jsonl"
    command = [sys.executable, str(SCRIPT), "--quick", "--seconds-per-case", "0", "--json", str(log)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert ran.stdout.rstrip().endswith(lines[-1])
    return rows, [json.loads(line) for line in log.read_text().splitlines()]


def test_every_row_has_a_figure_or_a_reason(quick: tuple[list[list[str]], Any], ceiling: Any) -> None:
    rows, _ = quick
    assert {row[0] for row in rows} == set(ceiling.SECTIONS)
    for row in rows:
        _, _, seconds, *_, note = row
        assert re.fullmatch(r"\d+\.\d\d (µs|ms|s)", seconds) or re.fullmatch(r"skipped: .{20,}", note), row


@pytest.mark.parametrize("section", ["device memory", "product"])
def test_bandwidths_and_rates_are_measured_on_a_cpu_too(section: str, quick: tuple[list[list[str]], Any]) -> None:
    rows, _ = quick
    for row in (row for row in rows if row[0] == section):
        assert float(row[3]) > 0, row
        assert section != "product" or float(row[5]) > 0, row


def test_the_log_has_the_machine_and_every_case(quick: tuple[list[list[str]], list[dict[str, Any]]]) -> None:
    rows, (environment, *lines) = quick
    assert environment["kind"] == "environment"
    assert environment["jax"] == jax.__version__
    cases = [line for line in lines if line["kind"] == "case"]
    assert [[case["section"], case["case"]] for case in cases] == [row[:2] for row in rows]
    copy = cases[0]
    assert copy["nbytes"] == 2 * environment["sizes"]["copy_bytes"]  # read and written


def test_a_case_that_fails_is_a_row_and_the_others_run(ceiling: Any, setting: Any) -> None:
    def cases(_: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "first", lambda: ceiling.Result(1 // 0)
        yield "second", lambda: ceiling.Result(note="ran")
        raise OSError("no more of them")

    results = ceiling.run_sections(setting, {"test": cases}, None)
    assert [(result.status, result.case) for result in results] == [
        ("failed", "first"),
        ("measured", "second"),
        ("failed", "the rest"),
    ]
    table = ceiling.table(results)
    assert "| failed: ZeroDivisionError: " in table
    assert "| failed: OSError: no more of them |" in table


def test_captured_kernels_are_told_from_others_by_their_indent(ceiling: Any) -> None:
    loop = ceiling.count_captured(THUNKS_OF_A_LOOP)
    assert dataclasses.astuple(loop) == (1, 2, 2, 0, 1, 0, 0)
    assert str(loop) == "2 of 4 kernels in 1 command buffer, the loop outside"
    assert str(ceiling.count_captured(THUNKS_OF_A_CAPTURED_LOOP)) == "2 of 2 kernels in 1 command buffer, the loop too"


def test_branches_are_counted_where_the_host_takes_them(ceiling: Any) -> None:
    branches = ceiling.count_captured(THUNKS_OF_BRANCHES)
    assert dataclasses.astuple(branches) == (2, 2, 1, 0, 0, 1, 1)


def test_the_dump_after_thunk_passes_is_preferred(ceiling: Any, tmp_path: Path) -> None:
    assert ceiling.read_dump(tmp_path, "chain") is None
    (tmp_path / "module_0001.jit_chain.thunk_sequence.txt").write_text("001: kCustomKernel\n")
    assert ceiling.read_dump(tmp_path, "chain").graphs == 0
    after = tmp_path / "module_0001.jit_chain.thunk_sequence_after_thunk_passes.txt"
    after.write_text(THUNKS_OF_A_CAPTURED_LOOP)
    assert ceiling.read_dump(tmp_path, "chain").graphs == 1


@pytest.fixture
def timed_chains(ceiling: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretends that a chain takes 5 µs and 2 µs a kernel, on a GPU whose XLA leaves out some kernels."""

    def pretend(left_out: int) -> None:
        chains = iter(ceiling.QUICK.chains)
        counts: list[int] = []

        def compile_and_look(*_: Any) -> tuple[None, Any]:
            counts.append(next(chains))
            return None, ceiling.Captured(graphs=1, kernels_inside=counts[-1] - left_out)

        monkeypatch.setattr(ceiling.Setting, "is_gpu", True)
        monkeypatch.setattr(ceiling, "compile_and_look", compile_and_look)
        monkeypatch.setattr(ceiling, "measure", lambda *_: ceiling.Timing(5e-6 + 2e-6 * counts[-1], 0.01, 9))

    return pretend


def launch_result(ceiling: Any, setting: Any) -> Any:
    return next(ceiling.run_section("launch", ceiling.launches, setting))


def test_one_more_kernel_is_told_from_the_call(ceiling: Any, setting: Any, timed_chains: Callable[[int], None]) -> None:
    timed_chains(0)
    result = launch_result(ceiling, setting)
    assert result.seconds == pytest.approx(2e-6)
    assert result.note == "5 µs a call besides; 24 of 24 kernels in 1 command buffer"


def test_a_chain_that_xla_merges_fails(ceiling: Any, setting: Any, timed_chains: Callable[[int], None]) -> None:
    timed_chains(3)
    result = launch_result(ceiling, setting)
    assert (result.status, result.note) == ("failed", "RuntimeError: XLA made 5 kernels of a chain of 8")


@pytest.fixture
def child_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_xla_takes_the_compile_options(ceiling: Any) -> None:
    for options in (ceiling.NO_GRAPHS, ceiling.LOOPS_IN_GRAPHS, ceiling.UNROLLED_IN_GRAPHS):
        jax.jit(ceiling.halve, compiler_options=options)(ceiling.tiny_array())


@pytest.mark.usefixtures("child_on_cpu")
def test_a_flag_that_xla_does_not_have_is_skipped_with_the_reason(ceiling: Any) -> None:
    results = ceiling.capture_in_child("--xla_no_such_flag=1")
    assert set(results) == {"Triton", "Mosaic"}
    for result in results.values():
        assert (result.status, result.note) == ("skipped", "this XLA has no --xla_no_such_flag any more")


@pytest.mark.usefixtures("child_on_cpu")
def test_what_goes_wrong_in_the_child_is_told_for_each_kernel(ceiling: Any) -> None:
    for result in ceiling.capture_in_child("").values():  # on a CPU neither kernel runs
        assert result.status == "failed"
        assert "interpret" in result.note


@ignore_triton_deprecation
@pytest.mark.parametrize(
    ("kernel", "target"), [("Triton", "__gpu$xla.gpu.triton"), ("Mosaic", "mosaic_gpu")], ids=["Triton", "Mosaic"]
)
def test_kernels_lower_for_cuda(ceiling: Any, kernel: str, target: str) -> None:
    lowered = ceiling.lower_for_cuda(ceiling.PALLAS_KERNELS[kernel], ceiling.tiny_array())
    assert f"custom_call @{target}" in lowered


@ignore_triton_deprecation
def test_the_chain_of_kernels_is_right_in_interpret_mode(ceiling: Any) -> None:
    x = ceiling.tiny_array(7)
    chain = ceiling.repeated(lambda value: ceiling.triton_halve(value, interpret=True), 3)
    expected = np.asarray(x)
    for _ in range(3):
        expected = expected * np.float32(0.5) + np.float32(0.5)
    np.testing.assert_array_equal(np.asarray(chain(x)), expected)
    np.testing.assert_array_equal(np.asarray(ceiling.repeated(ceiling.halve, 3)(x)), expected)
