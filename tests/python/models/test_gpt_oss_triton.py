"""gpt-oss with `pallas_triton`: interpreted on CPU and run on a GPU, and lowered for CUDA at full width without one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from tensorport.kernels.attention import pallas_triton as attention
from tensorport.kernels.mxfp4_moe import pallas_triton as mxfp4_moe
from tensorport.kernels.registry import Device
from tensorport.models import gpt_oss
from tensorport.models.gpt_oss import names

# JAX 0.11 announces that its backend for Triton will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Implementations are chosen as for an H200."""
    monkeypatch.setattr(Device, "of", classmethod(lambda *_: Device("gpu", "NVIDIA H200", (9, 0))))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch, _on_a_gpu: None) -> None:
    for module, name in ((attention, "attention"), (mxfp4_moe, "moe")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))


@pytest.mark.usefixtures("_interpreted")
def test_logits_are_those_of_transformers(golden_hf: Path) -> None:
    compare_logits(golden_hf)


@pytest.mark.gpu
def test_logits_on_a_gpu_are_those_of_transformers(golden_hf: Path) -> None:
    with jax.default_matmul_precision("highest"):
        compare_logits(golden_hf)


def compare_logits(golden_hf: Path) -> None:
    config = gpt_oss.load_config(golden_hf)
    params, _ = gpt_oss.load_model_params(golden_hf, config, dtype="float32")
    with np.load(golden_hf / "golden.npz") as arrays:
        # Beyond the window of 8; the interpreter is slow.
        ids, expected = jnp.asarray(arrays["input_ids"][:1, :12]), np.asarray(arrays["logits"][:1, :12], np.float64)
    forward = partial(gpt_oss.forward, params, config)
    logits, _ = forward(ids, implementation="pallas_triton")
    # The shares of values in float32, as all else: what the two add up in another order.
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # The last token through a cache.
    cache = gpt_oss.empty_cache(config, len(ids), ids.shape[1], dtype="float32")
    _, filled = forward(ids[:, :-1], cache, implementation="xla")
    last, _ = forward(ids[:, -1:], filled, implementation="pallas_triton")
    np.testing.assert_allclose(np.asarray(last[:, 0]), expected[:, -1], rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (16, 1), (1, 512)])
@pytest.mark.parametrize("preset", ["gpt-oss-20b", "gpt-oss-120b"])
def test_two_layers_of_full_width_lower_for_cuda(
    preset: str, batch: int, tokens: int, on_h200: Callable[[], Any]
) -> None:
    config = gpt_oss.Config.from_json(tensorport.synthesize.__globals__["_config"](preset, {"num_hidden_layers": 2}))
    params = names.parameter_shapes(config, "bfloat16")
    cache = jax.eval_shape(partial(gpt_oss.empty_cache, config, batch, 4096, dtype="bfloat16"))
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)

    def step(params: Any, ids: Any, cache: Any) -> Any:
        return gpt_oss.forward(params, config, ids, cache, implementation="pallas_triton")

    with on_h200():
        text = jax.jit(step).trace(params, ids, cache).lower(lowering_platforms=("cuda",)).as_text()
    # Of each layer attention, and the two layers of its experts; functions that are the same stand there once.
    assert text.count("__gpu$xla.gpu.triton") >= 3
    assert "tensorport.v1" not in text


GENERATE = """
import json, sys, tensorport
from tensorport.text import decoder
model = tensorport.load_model(sys.argv[1], implementation=sys.argv[2], dtype="float32")
made = []
for decoder.CAPTURES_LOOP in (False, True):
    made.append(model.generate([[3, 1, 4], [1, 5, 9]], max_new_tokens=70, temperature=0, ignore_eos=True))
print(json.dumps(made))
"""


@pytest.mark.parametrize(
    ("platform", "implementation"), [("cpu", "xla"), pytest.param("cuda", "pallas_triton", marks=pytest.mark.gpu)]
)
def test_a_loop_that_is_one_graph_makes_the_same_tokens(golden_hf: Path, platform: str, implementation: str) -> None:
    """In a process of its own, which XLA may end; on a CPU both loops are the same. Some graphs run more than once."""
    command = [sys.executable, "-W", "ignore", "-c", GENERATE, str(golden_hf), implementation]
    env = {**os.environ, "JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    usual, captured = json.loads(done.stdout)
    assert captured == usual
    assert [len(row) for row in usual] == [73, 73]
