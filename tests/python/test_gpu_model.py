"""benchmarks/gpu_model.py runs from end to end without a GPU, and tells what fails in a part of it."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorport
from tensorport.text import decoder as text_decoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What is measured means nothing here, and compiling takes most of the time.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def run(*options: str) -> Any:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu_model.py"), "--quick", *options]
    env = {**os.environ, "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The rows of the table and the JSON lines of one run."""
    lines = tmp_path_factory.mktemp("model") / "lines.jsonl"
    done = run("--json", str(lines))
    assert done.returncode == 0, done.stderr
    assert "the figures say nothing" in done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert "xla: decode: 3 rows after 5 tokens: about 5 s of " in done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in told[2:]]
    return rows, [json.loads(line) for line in lines.read_text("utf-8").splitlines()]


def test_every_part_of_both_implementations_is_measured(quick: tuple[Any, list[dict[str, Any]]]) -> None:
    _, (environment, *cases) = quick
    assert (environment["kind"], environment["platform"]) == ("environment", "cpu")
    measured = [case for case in cases if case["status"] == "measured" and not case["implementation"].startswith("tr")]
    parts = ["load", "context", "compile", "decode", "prefill"]
    assert [(case["implementation"], case["part"]) for case in measured] == [
        ("xla", "ceiling"),
        *(("xla", part) for part in parts),
        *(("pallas_triton", part) for part in parts),
    ]
    for case in measured:
        positive = {
            "ceiling": ["seconds", "nbytes"],
            "load": ["seconds", "nbytes"],
            "compile": ["compile_s"],
            "context": ["seconds", "tokens_per_s", "compile_s", "experts", "nbytes"],
            "decode": ["seconds", "tokens_per_s", "experts", "nbytes"],
            "prefill": ["seconds", "tokens_per_s"],
        }[case["part"]]
        assert all(case[field] > 0 for field in positive), case
        assert case["peak_bytes"] is None
        if case["implementation"] == "pallas_triton":
            assert case["note"].startswith("interpreted")
            assert "are those of xla" in case["note"] or case["part"] not in {"context", "decode"}


def test_a_step_of_one_row_reads_the_experts_of_one_token(quick: tuple[Any, list[dict[str, Any]]]) -> None:
    one, three = (case for case in quick[1] if case.get("experts") and case["implementation"] == "xla")
    assert (one["part"], one["experts"]) == ("context", 3.0)  # those that a token of the tiny model chooses
    assert (three["part"], three["case"]) == ("decode", "3 rows after 5 tokens")
    assert 3.0 < three["experts"] <= 6.0
    assert three["nbytes"] > one["nbytes"]


def test_rows_of_the_table_are_those_of_the_log(quick: tuple[list[list[str]], list[dict[str, Any]]]) -> None:
    rows, records = quick
    cases = [record for record in records if record["kind"] == "case"]
    assert [row[:3] for row in rows] == [[case[name] for name in ("part", "case", "implementation")] for case in cases]
    for row, case in zip(rows, cases, strict=True):
        assert (row[3] == "-") == (case["seconds"] is None)
        if case["part"] in {"context", "decode"} and case["status"] == "measured" and case["experts"]:
            assert row[9].endswith("%")
            assert row[11] == "not told"


def test_what_cannot_be_measured_here_says_why(quick: tuple[list[list[str]], Any]) -> None:
    rows, _ = quick
    assert ["decode", "all", "pallas_triton, one graph"] in [row[:3] for row in rows]
    transformers = [row for row in rows if row[2] == "transformers, bfloat16"]
    if HAS_TORCH:
        assert [row[0] for row in transformers] == ["load", "decode", "prefill"]
    else:
        assert [row[-1] for row in transformers] == ["skipped: not installed"]


def test_an_implementation_that_cannot_run_fails_and_the_rest_is_told() -> None:
    done = run("--implementation", "pallas_mosaic", "--random")
    assert done.returncode == 1, done.stderr
    failed = [line for line in done.stdout.splitlines() if "failed: NotImplementedError" in line]
    assert len(failed) == 3
    assert "| ceiling | read " in done.stdout
    assert "| load | random weights | pallas_mosaic | " in done.stdout
    assert "| transformers | all | " in done.stdout


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, what it runs for an implementation, and what both share."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("gpu_model", "gpu_model_job", "gpu_model_rows")
    yield [importlib.import_module(name) for name in names]
    for name in (*names, "gpu_ceiling"):
        sys.modules.pop(name, None)


@pytest.fixture
def a_run(modules: Any, tmp_path: Path) -> Any:
    script, *_ = modules
    return script.Run(argparse.Namespace(quick=True, time_limit=60), script.QUICK, tmp_path, None)


@pytest.mark.parametrize(
    ("ends", "seconds", "words"),
    [("os.kill(os.getpid(), 9)", 60, "ended with -9: a last word"), ("time.sleep(60)", -20, "ended by this script")],
)
def test_rows_before_the_end_of_a_process_are_kept(
    modules: Any, a_run: Any, ends: str, seconds: float, words: str
) -> None:
    script, _, rows = modules
    row = json.dumps(dataclasses.asdict(rows.Row("load", "some", "fake", seconds=1.5)))
    code = f"import os, sys, time; print('told'); print({row!r}, flush=True); print('a last word', file=sys.stderr)"
    command = [sys.executable, "-c", f"{code}; sys.stderr.flush(); {ends}"]
    script.run_job(a_run, "fake", command, time.time() + seconds)
    # A second is the least that a process gets.
    first, last = a_run.rows
    assert (first.part, first.seconds) == ("load", 1.5)
    assert (last.status, last.implementation) == ("failed", "fake")
    assert last.note.startswith(words)


def test_a_case_that_fails_or_would_end_too_late_is_a_row(modules: Any) -> None:
    *_, rows = modules
    settings = {"is_quick": False, "ends_at": time.time() + 20, "label": "fake"}
    cases = [("decode", "one", lambda: rows.Row(nbytes=1 // 0)), ("context", "long", rows.Row), ("load", "x", rows.Row)]
    failed, skipped, measured = rows.run_cases(cases, settings)
    assert (failed.status, failed.note) == ("failed", "ZeroDivisionError: integer division or modulo by zero")
    assert skipped.status == "skipped"
    assert skipped.note.endswith("s are left, and it may take 45 s")
    assert (measured.status, measured.part, measured.implementation) == ("measured", "load", "fake")


@pytest.fixture
def compared(modules: Any, tmp_path: Path) -> Any:
    """Compares ids of three rows with those of a reference, where logits at the first difference are so far apart."""
    _, job, _ = modules
    wanted = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    (tmp_path / "prompts").write_text("{}")
    (tmp_path / "ids").write_text(json.dumps({"3 after 2": {"ids": wanted, "experts": 4.5}}))
    made = job.Job({"prompts": str(tmp_path / "prompts"), "reference": str(tmp_path / "ids")})

    def compare(ids: list[list[int]], gap: float) -> tuple[str, bool]:
        def walk(sequences: Any, at: dict[int, int]) -> tuple[dict[int, Any], float]:
            assert sequences.shape == (3, 5)
            assert at == {1: 2}
            logits = np.linspace(-4, 0, 11)
            logits[5], logits[0], logits[10] = 3.0, 3.0 - gap, -4.0
            return {1: logits}, 5.5

        made._walk = walk
        told: tuple[str, bool] = made._compared("3 after 2", [[0, 0]] * 3, ids)
        return told

    return compare


def test_ids_that_are_those_of_xla_pass(compared: Any) -> None:
    assert compared([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 1.0) == ("ids are those of xla", False)


@pytest.mark.parametrize(("gap", "is_wrong"), [(0.03, False), (0.032, True), (np.nan, True)])
def test_ids_that_differ_pass_at_a_near_tie_alone(compared: Any, gap: float, is_wrong: bool) -> None:
    """The largest logit is 4 in magnitude, and 2 ** -7 of it 0.03125."""
    told, found = compared([[1, 2, 3], [4, 0, 6], [7, 8, 9]], gap)
    # Behind the first difference rows go their own ways; 4 stands before it.
    assert told.startswith("ids of 2 of 3 rows are those of xla; first difference at token 1, where")
    assert found == is_wrong
    assert ("1 of 1 are no near-ties" in told) == is_wrong


def test_random_weights_have_the_shapes_and_the_spread_of_a_checkpoint(modules: Any, tmp_path: Path) -> None:
    _, job, _ = modules
    tensorport.synthesize(tmp_path / "checkpoint", "tiny", num_hidden_layers=1, progress=False)
    loaded = tensorport.load_model(tmp_path / "checkpoint", implementation="xla")
    made = job.random_model(tmp_path / "checkpoint", "xla")
    made_leaves, loaded_leaves = (dict(jax.tree.leaves_with_path(model.params)) for model in (made, loaded))
    assert made_leaves.keys() == loaded_leaves.keys()
    for path, leaf in made_leaves.items():
        assert (leaf.shape, leaf.dtype) == (loaded_leaves[path].shape, loaded_leaves[path].dtype)
    ids = np.arange(24).reshape(2, 12)
    found, wanted = (np.asarray(model(ids)) for model in (made, loaded))
    assert np.std(found) == pytest.approx(np.std(wanted), rel=0.2)


def test_one_graph_is_for_nvidia_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's other backends do not know these options by the same meaning, or loops in graphs fail there."""

    class Client:
        def __init__(self, version: str) -> None:
            self.platform_version = version

    class FakeDevice:
        def __init__(self, platform: str, version: str) -> None:
            self.platform, self.client = platform, Client(version)

    class Leaf:
        def __init__(self, *device: str) -> None:
            self._device = FakeDevice(*device)

        def devices(self) -> set[FakeDevice]:
            return {self._device}

    leaves = {name: Leaf(*name) for name in (("gpu", "cuda 13000"), ("gpu", "rocm 70100"), ("tpu", "TPU v6"))}
    cpu = jax.numpy.zeros(3)
    usual = text_decoder.more_tokens
    assert all(text_decoder.loop_for(leaf) is usual for leaf in (*leaves.values(), cpu))
    monkeypatch.setattr(text_decoder, "CAPTURES_LOOP", True)
    for name, leaf in leaves.items():
        assert (text_decoder.loop_for(leaf) is usual) == (name[1] != "cuda 13000")
    assert text_decoder.loop_for((cpu, cpu)) is usual
