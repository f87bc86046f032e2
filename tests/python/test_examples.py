"""The scripts in examples/ run as they stand and do what they print; here on tiny shapes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport
from tensorport import mxfp4

EXAMPLES = Path(__file__).parents[2] / "examples"

LORA = ["--layers=2", "--tokens=40", "--rank=3", "--steps=30", "--learning-rate=0.02"]
QAT = ["--width=32", "--depth=2", "--steps=600", "--batch=256", "--learning-rate=0.01"]

TIMEOUT_S = 300
"""For scripts that take some ten seconds."""


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, arguments: list[str]) -> str:
    """What a script prints in a process of its own, where warnings are errors."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert job.returncode == 0, job.stderr
    return job.stdout


def test_every_example_says_how_to_run_it_and_is_tested_here() -> None:
    tests = Path(__file__).read_text("utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert f'"{file.stem}"' in tests
        assert f"    python {file.name} " in file.read_text("utf-8")


def test_lora_learns_and_leaves_codes_as_they_are() -> None:
    printed = run("lora_mxfp4", LORA)
    losses = [float(loss) for loss in re.findall(r"^step +\d+  loss +(\S+)", printed, re.MULTILINE)]
    assert losses[-1] < losses[0] / 3
    assert "codes and scales: as they were, byte for byte" in printed
    # Of the preset "tiny": 2 layers of 6 experts with [320, 96] and [96, 160].
    values = 2 * 6 * (320 * 96 + 96 * 160)
    adapters = 2 * 6 * 3 * (320 + 96 + 96 + 160) * 4
    for label, nbytes in (("MXFP4, frozen", values * 17 // 32), ("they were bf16", values * 2), ("float32", adapters)):
        assert re.search(rf"{label} +{nbytes:,} bytes", printed), label


def test_lora_takes_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_experts_per_tok": 2,
        "num_local_experts": 5,
        "hidden_size": 64,
    }
    checkpoint = tensorport.synthesize(tmp_path / "own", "tiny", progress=False, swiglu_limit=5.0, **sizes)
    losses = example("lora_mxfp4").main([f"--checkpoint={checkpoint}", "--tokens=40", "--steps=15"])
    assert len(losses) == 15
    assert losses[-1] < losses[0]


def test_adapters_are_what_they_are_said_to_be(tiny: Path) -> None:
    lora = example("lora_mxfp4")
    frozen, config = lora.load(tiny, 1)
    rng = np.random.default_rng(0)
    (adapter,) = lora.new_adapters(frozen, 3, lora.jax.random.key(0))
    for pair in adapter.values():
        assert not np.any(pair["b"])
        pair["b"] = rng.normal(size=pair["b"].shape).astype(np.float32)
    x = rng.normal(size=(7, 96)).astype(np.float32)
    mlp = frozen["layers"][0]["mlp"]
    found = lora.adapted_experts(x, mlp, config, adapter)

    # The same layer with dense matrices W + B A, one token and expert at a time.
    dense = {
        name: mlp["experts"][name].dequantize(np.float32) + np.einsum("enr,erk->enk", pair["b"], pair["a"])
        for name, pair in adapter.items()
    }
    indices, weights = map(np.asarray, lora.route(x, mlp["router"], config))
    for token, row in enumerate(x):
        expected = np.zeros(96)
        for e, weight in zip(indices[token], weights[token], strict=True):
            h = dense["gate_up_proj"][e] @ row + mlp["experts"]["gate_up_proj_bias"][e]
            gate, up = np.minimum(h[0::2], 7), np.clip(h[1::2], -7, 7)
            a = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            expected += weight * (dense["down_proj"][e] @ a + mlp["experts"]["down_proj_bias"][e])
        np.testing.assert_allclose(found[token], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_training_for_mxfp4_loses_less_of_it() -> None:
    printed = run("qat_mxfp4", QAT)
    (usual, usual_mxfp4), (aware, aware_mxfp4) = (
        map(float, re.findall(r"\d\.\d{6}", line)) for line in printed.splitlines() if line.startswith("trained")
    )
    assert usual < aware
    assert aware_mxfp4 < usual_mxfp4 / 2
    assert aware_mxfp4 == pytest.approx(aware, rel=1e-3)
    assert "quantized: 2 tensors" in printed


def test_the_trained_network_is_exported_as_codes(tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    errors = example("qat_mxfp4").main([*QAT[:2], "--steps=60", "--batch=64", f"--output={file}"])
    assert errors["aware_while_training"] < errors["aware_first_loss"]
    assert errors["usual_while_training"] < errors["usual_first_loss"]
    params = tensorport.load_params(file)
    for number in ("0", "1"):
        weight = params["hidden"][number]["weight"]
        assert isinstance(weight, mxfp4.MXFP4Array)
        assert weight.shape == (32, 32)
