"""benchmarks/gpu_kernels.py runs from end to end without a GPU, and finds a kernel that computes something else."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"


def test_every_kernel_is_measured_or_says_why_not(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--quick", "--json", str(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    cases = [record for record in records if record["kind"] == "case"]
    assert {case["section"] for case in cases} == {
        "device memory",
        "mxfp4.matmul",
        "mxfp4.expert_matmul",
        "mxfp4.moe",
        "attention",
    }
    interpreted = [case for case in cases if case["case"].endswith("pallas_triton")]
    assert len(interpreted) == 8
    for case in interpreted:
        assert case["status"] == "measured"
        assert case["note"].startswith("interpreted, differs by ")
        assert case["seconds"] > 0
        assert case["nbytes"] > 0
    for case in cases:
        assert case["status"] == "measured" or case["note"].startswith("needs an NVIDIA GPU"), case
    assert "| mxfp4.moe | 9 tokens, 3 of 6 experts, pallas_triton | " in done.stdout
    assert "the figures say nothing" in done.stdout


def test_a_result_that_is_not_that_of_xla_fails(script: Any) -> None:
    wanted = np.linspace(-1, 1, 7)
    assert script.difference(wanted, wanted, "bfloat16") == 0
    with pytest.raises(ValueError, match=r"differs from xla by 1\.0e-01 of the largest value, expected at most"):
        script.difference(wanted + 0.1, wanted, "bfloat16")
    with pytest.raises(ValueError, match="differs from xla by nan"):
        script.difference(wanted * np.nan, wanted, "float32")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
