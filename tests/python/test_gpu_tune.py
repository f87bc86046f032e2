"""benchmarks/gpu_tune.py runs from end to end without a GPU, and what it writes is what kernels take."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from tensorport.kernels import tuned
from tensorport.kernels.attention.configs import TritonConfig as AttentionConfig
from tensorport.kernels.mxfp4_expert_matmul.configs import choose_triton, triton_rule, triton_space
from tensorport.kernels.mxfp4_matmul import pallas_triton
from tensorport.kernels.mxfp4_matmul.configs import TritonConfig
from tensorport.kernels.registry import Device
from tensorport.mxfp4 import quantize

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_tune.py"
ODD_ONE = TritonConfig(block_m=4, block_n=16, block_k=256, num_warps=8, num_stages=5)


def tune(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def use(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], kind: str | None = None) -> None:
    rows = {
        name: {"config": {field: getattr(config, field) for field in config.__slots__}}
        for name, config in settings.items()
    }
    table = {kind or Device.of().kind: {"settings": rows}}
    monkeypatch.setattr(tuned, "table", lambda: table)


def test_shapes_are_tuned_and_other_devices_stay_in_the_table(tmp_path: Path) -> None:
    output = tmp_path / "tuned.json"
    other = {"NVIDIA H200": {"date": "2026-01-02", "versions": {}, "settings": {"a bucket": {}}}}
    output.write_text(json.dumps(other))
    ops = ["--only", "mxfp4.matmul", "--only", "attention", "--case", "1 rows", "--case", "1 tokens"]
    done = tune("--quick", "--output", output, "--minutes", "0.1", *ops)
    assert done.returncode == 0, done.stderr
    assert "the figures say nothing" in done.stdout
    assert "| mxfp4.matmul | quick, 1 rows | " in done.stdout
    assert "| attention | quick, 1 tokens | " in done.stdout
    table = json.loads(output.read_text())
    assert table["NVIDIA H200"] == other["NVIDIA H200"]
    row = table[jax.devices()[0].device_kind]
    assert set(row["versions"]) == {"jax", "jaxlib"}
    for bucket, entry in row["settings"].items():
        (TritonConfig if bucket.startswith("mxfp4") else AttentionConfig)(**entry["config"])
        assert 0 < entry["us"] < entry["untuned_us"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--quick needs --output"),
        ([], "expected a GPU; --quick interprets kernels on a CPU"),
        (["--quick", "--output", "x.json", "--case", "no such"], "found no case with ['no such']"),
    ],
)
def test_what_cannot_be_tuned_is_told(arguments: list[str], message: str) -> None:
    done = tune(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_kernel_takes_what_was_measured_for_its_bucket_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"mxfp4.matmul bfloat16 m<=4 n=70 k=96": ODD_ONE})
    for m in (3, 4):
        assert TritonConfig.choose(m, 70, 96, jnp.bfloat16) == ODD_ONE
    for m, n, k, dtype in [
        (2, 70, 96, jnp.bfloat16),
        (5, 70, 96, jnp.bfloat16),
        (3, 70, 64, jnp.bfloat16),
        (3, 70, 96, jnp.float32),
    ]:
        assert TritonConfig.choose(m, n, k, dtype) == TritonConfig.rule(m)
    use(monkeypatch, {"mxfp4.matmul bfloat16 m<=4 n=70 k=96": ODD_ONE}, kind="NVIDIA H200")
    assert TritonConfig.choose(3, 70, 96, jnp.bfloat16) == TritonConfig.rule(3)


def test_each_op_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = AttentionConfig(block_rows=16, block_keys=128, splits=3, num_warps=8, num_stages=1)
    use(
        monkeypatch,
        {
            "mxfp4.moe bfloat16 rows<=16 experts=6 n=70 k=96": ODD_ONE,
            "attention float32 groups<=8 rows<=4 keys<=512 head_dim=64": wide,
        },
    )
    assert choose_triton("mxfp4.moe", 12, 6, 70, 96, jnp.bfloat16) == ODD_ONE
    assert choose_triton("mxfp4.expert_matmul", 12, 6, 70, 96, jnp.bfloat16) == triton_rule(12, 6)
    assert AttentionConfig.choose(7, 3, 300, 64, jnp.float32) == wide
    assert AttentionConfig.choose(7, 3, 300, 128, jnp.float32) == AttentionConfig.rule(7, 3, 300)


def test_forced_settings_are_what_a_kernel_is_launched_with(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = jnp.ones((3, 96), jnp.bfloat16), quantize(jnp.ones((70, 96)))
    launched = []
    launch = pl.pallas_call

    def record(*args: Any, **kw: Any) -> Any:
        launched.append(kw)
        return launch(*args, **kw)

    monkeypatch.setattr(pl, "pallas_call", record)
    with tuned.forced("mxfp4.matmul", {field: getattr(ODD_ONE, field) for field in ODD_ONE.__slots__}) as asked:
        found = pallas_triton.matmul(x, w, interpret=True)
    assert asked == [("mxfp4.matmul bfloat16 m<=4 n=70 k=96", {"m": 3, "n": 70, "k": 96})]
    (kw,) = launched
    assert kw["grid"] == (1, 5)
    assert (kw["compiler_params"].num_warps, kw["compiler_params"].num_stages) == (8, 5)
    assert (found == 96).all()
    with tuned.forced("mxfp4.moe", {}):
        assert TritonConfig.choose(3, 70, 96, jnp.bfloat16) == TritonConfig.rule(3)


@pytest.mark.parametrize("m", [1, 4, 5, 16, 64, 65, 3000])
def test_the_rule_is_among_what_is_tried(m: int) -> None:
    assert TritonConfig.rule(m) in TritonConfig.space(m)
    assert triton_rule(m, 32) in triton_space(m)
