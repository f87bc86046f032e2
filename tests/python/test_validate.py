"""Validation: what is right passes, by results of transformers; what is wrong is found, and where it is."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray
from tensorport import cli
from tensorport.models.gpt_oss.cache import LayerCache
from tensorport.validation import ValidationReport, memory
from tensorport.validation.comparison import Comparison
from tensorport.validation.tensors import count_values

Tensors = dict[str, NDArray[Any]]
Edit = Callable[[Tensors], object]
Edited = Callable[..., Path]

ATTENTION = "model.layers.2.self_attn"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
# Compiled once for this prompt, whatever the weights.
FLOAT32: dict[str, Any] = {"dtype": "float32"}


@pytest.fixture
def edited(tmp_path: Path, golden_hf: Path, write_safetensors: Callable[..., Path]) -> Edited:
    """A function that writes the golden checkpoint with other tensors or another config.json."""

    def edit(change: Edit = lambda _: None, **fields: Any) -> Path:
        folder = tmp_path / "edited"
        folder.mkdir()
        tensors = {name: np.array(array) for name, array in tensorport.open(golden_hf).items()}
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors)
        config = json.loads((golden_hf / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    return edit


@pytest.fixture(scope="module")
def report(golden_hf: Path) -> ValidationReport:
    """The golden checkpoint beside the results of transformers."""
    return tensorport.validate(golden_hf, reference=golden_hf / "golden.npz", dtype="float32")


def statuses(report: ValidationReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def test_a_right_model_passes_beside_stored_results(report: ValidationReport) -> None:
    assert (report.ok, report.failures, report.dtype, report.tokens) == (True, (), "float32", (2, 45))
    assert statuses(report) == {
        "config and tensors": "ok",
        "values": "ok",
        "activations": "ok",
        "stream behind layers": "ok",
        "cache": "ok",
        "logits of golden.npz": "ok",
        "greedy tokens": "ok",
    }
    details = {check.name: check.detail for check in report.checks}
    assert details["greedy tokens"] == "24 of 24 are the same"
    assert "tolerance 0.0001" in details["logits of golden.npz"]


def test_activations_are_those_that_transformers_has(report: ValidationReport, golden_hf: Path) -> None:
    assert [layer.name for layer in report.layers] == ["embeddings", *(f"layer {n}" for n in range(4)), "final norm"]
    golden = np.load(golden_hf / "golden.npz")
    embedded = np.array(tensorport.open(golden_hf)["model.embed_tokens.weight"])[golden["input_ids"]]
    # transformers gives the stream behind the last layer after the last norm alone.
    expected = {0: embedded.astype(np.float32), **{n + 1: golden[f"hidden_{n}"] for n in range(3)}}
    expected[5] = golden["hidden_3"]
    for place, stream in expected.items():
        layer = report.layers[place]
        np.testing.assert_allclose(layer.rms, np.sqrt(np.mean(np.square(stream, dtype=np.float64))), rtol=1e-5)
        np.testing.assert_allclose(layer.largest, np.abs(stream).max(), rtol=1e-5)
        assert layer.nonfinite == 0
    assert [layer.experts for layer in report.layers] == [None, 6, 6, 6, 6, None]
    assert all(3 <= (layer.experts_used or 0) <= 6 for layer in report.layers[1:5])


def test_reports_print_and_are_json(report: ValidationReport) -> None:
    assert "ok: yes" in repr(report)
    assert "layer 3: RMS" in repr(report)
    fields = json.loads(report.to_json())
    assert fields["ok"] is True
    assert [check["name"] for check in fields["checks"]] == [check.name for check in report.checks]
    assert fields["layers"][1] == dataclasses.asdict(report.layers[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.ok = False  # type: ignore[misc]


def test_bfloat16_passes_at_the_tolerance_of_bfloat16(golden_hf: Path) -> None:
    report = tensorport.validate(golden_hf, reference=golden_hf / "golden.npz", dtype="bfloat16")
    assert (report.ok, report.dtype) == (True, "bfloat16")
    # Two tokens may be equally likely: what follows says nothing.
    assert "greedy tokens" not in statuses(report)
    detail = {check.name: check.detail for check in report.checks}["logits of golden.npz"]
    assert "tolerance 0.06" in detail


def test_a_converted_tree_of_the_original_layout_passes_beside_its_source(
    golden_original: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(golden_original, tree, progress=False)
    whole = tensorport.validate(tree, source=golden_original, reference=golden_original / "golden.npz", **FLOAT32)
    assert (whole.ok, statuses(whole)["source"]) == (True, "ok")
    assert statuses(whole)["logits of golden.npz"] == "ok"

    # A bit that changes no logit visibly: the tree is no longer its source.
    file = tree / tensorport.open(tree).specs["norm.scale"].files[0]
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    broken = tensorport.validate(tree, source=golden_original, reference=golden_original / "golden.npz", **FLOAT32)
    assert (broken.ok, statuses(broken)["source"]) == (False, "FAILED")
    assert any("norm.scale" in failure for failure in broken.failures)


def test_a_scale_of_255_is_counted_and_its_layer_named(edited: Edited, golden_hf: Path) -> None:
    def break_scale(tensors: Tensors) -> None:
        tensors[SCALES][:, 5, 2] = 255

    report = tensorport.validate(edited(break_scale), reference=golden_hf / "golden.npz", **FLOAT32)
    assert not report.ok
    values, activations = report.failures
    assert values == f"{SCALES}: found 6 scales of 255, which is NaN, expected none"
    assert activations.startswith("layer 1: found ")
    assert [layer.nonfinite > 0 for layer in report.layers] == [False, False, True, True, True, True]
    # One of 96 dimensions of each of 90 tokens.
    assert report.layers[2].nonfinite == 90
    assert statuses(report) == {
        "config and tensors": "ok",
        "values": "FAILED",
        "activations": "FAILED",
        "cache": "skipped",
        "reference": "skipped",
    }


def test_an_infinite_weight_is_counted_and_its_layer_named(edited: Edited, golden_hf: Path) -> None:
    def break_weight(tensors: Tensors) -> None:
        tensors[f"{ATTENTION}.v_proj.weight"][3, 7] = np.inf

    report = tensorport.validate(edited(break_weight), reference=golden_hf / "golden.npz", **FLOAT32)
    values, activations = report.failures
    assert values == f"{ATTENTION}.v_proj.weight: found 1 NaNs or infinities, expected none"
    assert activations.startswith("layer 2: found ")


def test_tensors_that_exchanged_their_shapes_are_both_named(edited: Edited) -> None:
    def exchange(tensors: Tensors) -> None:
        q, o = (f"{ATTENTION}.{name}.weight" for name in ("q_proj", "o_proj"))
        tensors[q], tensors[o] = tensors[q].reshape(96, 192), tensors[o].reshape(192, 96)

    report = tensorport.validate(edited(exchange), max_tokens=45, **FLOAT32)
    assert set(report.failures) == {
        f"{ATTENTION}.q_proj.weight: found bfloat16 [96, 192], expected bfloat16 [192, 96]",
        f"{ATTENTION}.o_proj.weight: found bfloat16 [192, 96], expected bfloat16 [96, 192]",
    }
    assert statuses(report) == {
        "config and tensors": "FAILED",
        "values": "ok",
        "activations": "skipped",
        "cache": "skipped",
    }


def test_missing_and_unknown_tensors_are_all_named(edited: Edited) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[f"{ATTENTION}.sinks"]
        del tensors[SCALES]
        tensors["model.layers.4.input_layernorm.weight"] = tensors["model.norm.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"].view(np.uint16)

    failures = "\n".join(tensorport.validate(edited(change), **FLOAT32).failures)
    assert f"{ATTENTION}.sinks: found no such tensor" in failures
    assert f"{SCALES.removesuffix('_scales')}: found no such tensor, expected MXFP4" in failures
    assert "model.layers.4.input_layernorm.weight: found bfloat16 [96], expected no such tensor" in failures
    assert "lm_head.weight: found uint16 [519, 96], expected bfloat16" in failures


def test_a_configuration_that_does_not_fit_is_a_failure(edited: Edited) -> None:
    report = tensorport.validate(edited(head_dim=33, unheard_of=1), **FLOAT32)
    assert statuses(report)["config and tensors"] == "FAILED"
    assert report.failures == (
        "head_dim: found 33, expected an even number",
        "found the unknown fields 'unheard_of', expected only known ones",
    )


def test_another_rope_factor_is_found_beside_stored_results(edited: Edited, golden_hf: Path) -> None:
    rope = json.loads((golden_hf / "config.json").read_text())["rope_scaling"]
    model = edited(rope_scaling=rope | {"factor": 31.0})
    report = tensorport.validate(model, reference=golden_hf / "golden.npz", **FLOAT32)
    found = statuses(report)
    assert [found[name] for name in ("config and tensors", "values", "activations", "cache")] == ["ok"] * 4
    assert [found[name] for name in ("stream behind layers", "logits of golden.npz")] == ["FAILED"] * 2
    assert report.failures[0].startswith("layer 0: ")


def test_a_cache_that_keeps_other_values_is_found(golden_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = LayerCache.write

    def write_wrong(self: LayerCache, keys: Any, values: Any, positions: Any, *rest: Any, **options: Any) -> LayerCache:
        return write(self, keys, values * (1 + 1e-3 * (positions == 17))[..., None, None], positions, *rest, **options)

    monkeypatch.setattr(LayerCache, "write", write_wrong)
    # No other test has a prompt of this length, for which functions may be compiled already.
    report = tensorport.validate(golden_hf, max_tokens=37, **FLOAT32)
    assert statuses(report)["cache"] == "FAILED"
    assert [failure.split(":")[0] for failure in report.failures] == ["cache"]


def test_the_prompt_follows_the_seed(golden_hf: Path) -> None:
    reports = [tensorport.validate(golden_hf, max_tokens=45, seed=seed, **FLOAT32) for seed in (1, 2, 1)]
    assert all(report.ok and report.tokens == (1, 45) for report in reports)
    first, second, again = (report.layers for report in reports)
    assert first == again
    assert first != second


@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_transformers(golden_hf: Path) -> None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("needs torch and transformers")
    report = tensorport.validate(golden_hf, reference="transformers", max_tokens=45, **FLOAT32)
    assert report.ok, report.failures
    assert statuses(report)["logits of transformers"] == "ok"


def test_without_transformers_the_message_says_what_to_install(
    golden_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch transformers"):
        tensorport.validate(golden_hf, reference="transformers", max_tokens=45, **FLOAT32)
    with pytest.raises(ValueError, match="layout of Hugging Face"):
        tensorport.validate(golden_hf, reference="transformers", source=tmp_path, max_tokens=45, **FLOAT32)


def test_the_dtype_follows_the_memory(golden_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tensorport.open(golden_hf)
    floats = sum(spec.nbytes * 2 for spec in checkpoint.specs.values() if spec.dtype == ml_dtypes.bfloat16)
    codes = sum(spec.nbytes for spec in checkpoint.specs.values() if spec.dtype == np.uint8)
    for available, dtype in ((2 * (floats + codes), "float32"), (2 * (floats + codes) - 1, "bfloat16")):
        monkeypatch.setattr(memory, "host_available_bytes", lambda available=available: available)
        assert memory.choose_dtype(checkpoint) == dtype
    monkeypatch.undo()
    assert memory.host_available_bytes() > 1e8


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_values_are_counted_in_every_float(tmp_path: Path, write_safetensors: Callable[..., Path], dtype: Any) -> None:
    # The largest finite number has all bits of the exponent but the last.
    largest = {np.float16: 65504.0, np.float64: 1.7976931348623157e308}.get(dtype, 3.3895313892515355e38)
    bad = np.array([np.nan, 1, np.inf, 0, -np.inf, largest, -largest], dtype)
    file = write_safetensors(tmp_path / "a.safetensors", {"good": bad[[1, 3, 5, 6]], "bad": bad})
    counts = count_values(tensorport.open(file))
    assert (counts.floats, counts.scales) == (11, 0)
    assert counts.failures == ("bad: found 3 NaNs or infinities, expected none",)


def test_comparisons_know_their_tolerance() -> None:
    random = np.random.default_rng(3)
    expected = random.standard_normal((5, 7, 400)).astype(np.float32)
    noise = random.standard_normal(expected.shape).astype(np.float32)
    # The largest of 14,000 normal numbers is about 4; the RMS is 1.
    for dtype, scale, is_ok in (
        ("float32", 2e-5, True),
        ("float32", 4e-5, False),
        ("bfloat16", 0.059, True),
        ("bfloat16", 0.061, False),
        ("float32", np.nan, False),
        ("bfloat16", np.nan, False),
    ):
        comparison = Comparison(dtype)
        for row in range(5):
            comparison.add(expected[row] * 3 + 3 * np.float32(scale) * noise[row], expected[row] * 3)
        assert comparison.ok is is_ok, (dtype, scale, str(comparison))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "input_ids and no logits"),
        ({"input_ids": np.zeros((1, 4), np.int32)}, "no logits"),
        ({"input_ids": np.zeros((1, 4), np.float32), "logits": np.zeros((1, 4, 519), np.float32)}, "input_ids"),
        ({"input_ids": np.zeros((1, 4), np.int32), "logits": np.zeros((1, 5, 519), np.float32)}, "logits"),
        ({"input_ids": np.zeros((1, 4), np.int32), "logits": np.zeros((1, 4, 7), np.float32)}, "vocabulary of 519"),
        (
            {
                "input_ids": np.zeros((1, 4), np.int32),
                "logits": np.zeros((1, 4, 519), np.float32),
                "greedy_ids": np.ones(6, np.int32),
            },
            "greedy_ids",
        ),
        (None, "no npz"),
    ],
)
def test_a_file_that_is_no_reference_is_a_usage_error(
    golden_hf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arrays: dict[str, NDArray[Any]] | None,
    words: str,
) -> None:
    file = tmp_path / "reference.npz"
    if arrays is None:
        file.write_bytes(b"nothing")
    else:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    assert cli.main(["validate", "--model", str(golden_hf), "--reference", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err


def test_the_command_prints_the_report_and_exits_by_it(
    golden_hf: Path, edited: Edited, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--reference", str(golden_hf / "golden.npz"), "--dtype", "float32"]
    assert cli.main(["validate", "--model", str(golden_hf), *arguments]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "logits of golden.npz: ok: " in shown.out
    assert "layer 2: RMS " in shown.out

    def break_scale(tensors: Tensors) -> None:
        tensors[SCALES][0, 0, 0] = 255

    broken = edited(break_scale)
    assert cli.main(["validate", "--model", str(broken), *arguments, "--json"]) == 1
    shown = capsys.readouterr()
    fields = json.loads(shown.out)
    assert (fields["ok"], fields["model"]) == (False, str(broken))
    assert fields["failures"][0] == f"{SCALES}: found 1 scales of 255, which is NaN, expected none"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "--model"),
        (["--model", "missing"], 1, "missing"),
        (["--model", "GOLDEN", "--max-tokens", "1"], 2, "max_tokens"),
        (["--model", "GOLDEN", "--max-tokens", "131073"], 2, "131072"),
        (["--model", "GOLDEN", "--seed", "-1"], 2, "--seed"),
        (["--model", "GOLDEN", "--dtype", "float16"], 2, "float16"),
        (["--model", "GOLDEN", "--reference", "missing.npz"], 1, "missing.npz"),
    ],
)
def test_validate_refuses_what_it_cannot_do(
    golden_hf: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    words_with_paths = [str(golden_hf) if word == "GOLDEN" else word for word in arguments]
    assert cli.main(["validate", *words_with_paths]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
