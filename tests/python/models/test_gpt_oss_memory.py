"""Weights are in memory once: no step copies them, and none decodes experts that are not in use."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from tensorport.models import gpt_oss
from tensorport.mxfp4 import MXFP4Array
from tensorport.text import decoder as loop
from tensorport.text.sampling import Sampling, row_keys

ROWS = 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 90 MB, so that what a step needs besides is small."""
    return tensorport.synthesize(
        tmp_path_factory.mktemp("wide") / "demo", "demo", num_hidden_layers=2, vocab_size=24000, progress=False
    )


def weights_bytes(params: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_a_loop_of_steps_needs_little_besides_the_weights(tmp_path: Path, wide: Path, dtype: str, experts: str) -> None:
    config = gpt_oss.load_config(wide)
    if experts == "dense":
        tensorport.convert(wide, tmp_path / "tree", mxfp4="dequantize", progress=False)
        wide = tmp_path / "tree"
    params = tensorport.load_params_shapes(wide, dtype=dtype)
    decoder = gpt_oss.GptOss(config)
    cache = gpt_oss.empty_cache(config, ROWS, 128, dtype=dtype)
    row, settings = (
        np.zeros(ROWS, np.int32),
        loop.Settings(Sampling.of(ROWS), row_keys(0, ROWS), jnp.zeros(8, jnp.int32)),
    )
    seen, done = np.zeros((ROWS, config.vocab_size), np.bool_), np.zeros(ROWS, np.bool_)
    step = loop.more_tokens.lower(
        decoder, loop.placement(cache), params, cache, seen, row, row, done, np.int32(4), settings
    ).compile()
    analysis = step.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 0.1 * weights_bytes(params)


def test_experts_that_no_token_chooses_are_not_read(golden_hf: Path) -> None:
    config = gpt_oss.load_config(golden_hf)
    params, _ = gpt_oss.load_model_params(golden_hf, config, dtype="float32")
    ids = np.array([[3, 1, 4]])
    logits, _ = gpt_oss.forward(params, config, ids)
    outputs = gpt_oss.GptOss(config).layers(params, jnp.asarray(ids))
    chosen = [np.unique(np.asarray(output.experts)) for output in outputs if output.experts is not None]
    assert any(len(experts) < config.num_local_experts for experts in chosen)
    layers = dict(params["model"]["layers"])
    for number, used in enumerate(chosen):
        # What is decoded from scales of 255 is NaN, which no weight of zero would hide.
        experts = dict(layers[str(number)]["mlp"]["experts"])
        unused = [expert for expert in range(config.num_local_experts) if expert not in used]
        for name in ("gate_up_proj", "down_proj"):
            scales = np.array(experts[name].scales)
            scales[unused] = 255
            experts[name] = MXFP4Array(experts[name].blocks, jnp.asarray(scales))
        layers[str(number)] = {**layers[str(number)], "mlp": {**layers[str(number)]["mlp"], "experts": experts}}
    poisoned, _ = gpt_oss.forward({**params, "model": {**params["model"], "layers": layers}}, config, ids)
    np.testing.assert_array_equal(poisoned, logits)


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory and mappings from /proc")
def test_native_kernels_read_every_weight_where_its_file_is_mapped(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 736, "intermediate_size": 1056, "vocab_size": 32003, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 10, "num_key_value_heads": 5, "num_local_experts": 24, "num_experts_per_tok": 3}
    source = tensorport.synthesize(tmp_path / "source", "demo", **sizes, progress=False)
    tensorport.convert(source, tmp_path / "tree", progress=False)
    command = [sys.executable, str(Path(__file__).parent / "mapped_worker.py"), str(tmp_path / "tree")]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert told["mapped_bytes"] == told["weights_bytes"] > 200e6
    assert len(told["in_file"]) == 4 * 19 + 3
    assert all(told["in_file"].values())
    # XLA itself reads few: it takes rows of the embeddings, and multiplies by vectors.
    others = [name for name, is_handed_over in told["handed_over"].items() if not is_handed_over]
    of_xla = re.compile(r".*norm\.weight|.*layernorm\.weight|.*\.sinks|.*embed_tokens\.weight")
    assert [name for name in others if not of_xla.fullmatch(name)] == []
    # A copy of one layer's experts would take 28 MB.
    assert max(told["grown_bytes"]) < 8e6, told["grown_bytes"]
    assert len(set(told["chosen"])) > 1
