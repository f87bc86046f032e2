"""Synthesized models compute sensible numbers: an independent forward pass through every layer of every preset.

The deviations of matrices follow their width as fan-in ** -0.5, so that what holds for every layer of a narrow
gpt-oss-120b holds for a wide one.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gpt_oss_reference as reference
import ml_dtypes
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray

# Every layer and every expert, of narrow matrices; eight query heads for one key-value head, as in the wide models.
NARROW = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 519,
    "eos_token_id": 518,
    "pad_token_id": 517,
}
MODELS: dict[str, dict[str, Any]] = {"tiny": {}, "demo": {}, "gpt-oss-20b": NARROW, "gpt-oss-120b": NARROW}


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


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, tokens more than its window is long, and what it computes from them in float32."""

    folder: Path
    config: dict[str, Any]
    input_ids: NDArray[np.int64]
    recorder: Recorder
    logits: reference.Array


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    preset: str = request.param
    folder = tmp_path_factory.mktemp("activations") / preset
    tensorport.synthesize(folder, preset, progress=False, **MODELS[preset])
    config = json.loads((folder / "config.json").read_text())
    recorder = Recorder()
    input_ids = np.random.default_rng(0).integers(0, config["vocab_size"], 160)
    logits = reference.forward(tensorport.open(folder), config, input_ids, recorder)
    return Run(folder, config, input_ids, recorder, logits)


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


def test_activations_are_finite_and_grow_slowly_through_all_layers(run: Run) -> None:
    deviations = [float(stream.std()) for stream in run.recorder.streams]
    assert len(deviations) == run.config["num_hidden_layers"] + 1
    # Embeddings have a deviation of 4, and each layer adds a variance of about 0.65.
    for layers, deviation in enumerate(deviations):
        assert 0.8 < deviation / math.sqrt(16 + 0.65 * layers) < 1.25
    assert run.recorder.largest < 200
    assert 0.1 < run.logits.std() < 30


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_activations_are_finite_when_each_is_rounded_to_two_bytes(run: Run, dtype: Any) -> None:
    input_ids = run.input_ids[:40]
    logits = reference.forward(tensorport.open(run.folder), run.config, input_ids, Recorder(dtype))
    # A rounding may send a token to another expert, so that some logits differ much; all together they agree.
    assert np.corrcoef(logits.ravel(), run.logits[:40].ravel())[0, 1] > 0.9


def test_positions_differ_after_the_last_layer(run: Run) -> None:
    unit = run.recorder.streams[-1] / np.linalg.norm(run.recorder.streams[-1], axis=-1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(len(unit), dtype=bool)]
    assert abs(cosines.mean()) < 0.15
    # Zero, were the logits of all positions equal; their whole deviation, were they independent.
    assert run.logits.std(axis=0).mean() > 0.9 * run.logits.std()


def test_tokens_spread_over_the_experts_in_every_layer(run: Run) -> None:
    experts, taken = run.config["num_local_experts"], run.config["num_experts_per_tok"]
    assert len(run.recorder.chosen) == run.config["num_hidden_layers"]
    for chosen in run.recorder.chosen:
        assert chosen.shape == (len(run.input_ids), taken)
        shares = np.bincount(chosen.ravel(), minlength=experts) / chosen.size
        used = shares[shares > 0]
        # The entropy, as a number of equally busy experts: as many as a token takes, if all take the same.
        assert max(taken, experts / 2) < np.exp(-(used * np.log(used)).sum()) <= experts * (1 + 1e-9)
