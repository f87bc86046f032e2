"""The reference forward pass against what transformers and the publisher's code compute."""

import json
import math
from pathlib import Path
from typing import Any

import gpt_oss_reference as reference
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray


class Recorder:
    """A hook that keeps what the tests ask for, and rounds each activation to `dtype` as a model in it would."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.dtype = dtype
        self.largest = 0.0
        self.streams: list[reference.Array] = []  # of the embeddings, and after each layer
        self.chosen: list[NDArray[np.int64]] = []

    def __call__(self, layer: int, name: str, value: reference.Array) -> reference.Array:
        if name == "chosen":
            self.chosen.append(value.astype(np.int64))
            return value
        assert np.isfinite(value).all(), f"layer {layer}, {name}"
        self.largest = max(self.largest, float(np.abs(value).max()))
        value = value.astype(self.dtype).astype(np.float32)
        assert np.isfinite(value).all(), f"layer {layer}, {name} in {self.dtype}"
        if name == "stream":
            self.streams.append(value)
        return value


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_the_reference_computes_what_transformers_and_the_publishers_code_do(
    golden_hf: Path, golden_original: Path, layout: str
) -> None:
    config = json.loads((golden_hf / "config.json").read_text())
    folder = golden_hf if layout == "huggingface" else golden_original
    weights: reference.Weights = tensorport.open(folder)
    if layout == "original":
        weights = reference.from_original(weights, config)
    golden = np.load(folder / "golden.npz")
    # Four products of matrices in each layer add an error of about epsilon * root of the length of their sums, the
    # longest being those over all query heads; the largest of thousands of errors is some five deviations.
    longest = config["num_attention_heads"] * config["head_dim"]
    tolerance = 5 * np.finfo(np.float32).eps * 4 * config["num_hidden_layers"] * math.sqrt(longest)
    for row, input_ids in enumerate(golden["input_ids"]):
        recorder = Recorder()
        logits = reference.forward(weights, config, input_ids, recorder)
        assert logits.dtype == np.float32
        expected = {"logits": (logits, golden["logits"][row])}
        if layout == "huggingface":
            # The last of these is not the stream but its norm.
            for layer in range(config["num_hidden_layers"] - 1):
                expected[f"layer {layer}"] = recorder.streams[layer + 1], golden[f"hidden_{layer}"][row]
        for what, (ours, theirs) in expected.items():
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * theirs.std(), err_msg=what)
