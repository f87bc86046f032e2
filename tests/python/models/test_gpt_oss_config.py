"""config.json of gpt-oss in both layouts: what is read, what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorport import CheckpointError, synthesize
from tensorport.models import gpt_oss

# The rope of openai/gpt-oss-20b, by hand: openai/gpt-oss, gpt_oss/torch/model.py.
ROPE_20B = gpt_oss.Rope(150000.0, 32.0, 32.0, 1.0, 4096, truncate=False)


@pytest.fixture(scope="module")
def fields(golden_hf: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden_hf / "config.json").read_text())
    return content


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def test_both_layouts_of_one_model_say_the_same(golden_hf: Path, golden_original: Path) -> None:
    config = gpt_oss.load_config(golden_hf)
    assert config == gpt_oss.load_config(golden_original)
    assert hash(config) == hash(gpt_oss.load_config(golden_original))
    assert config.vocab_size == 519
    assert config.layer_types == ("sliding_attention", "full_attention") * 2
    assert config.rope == ROPE_20B
    assert (config.max_position_embeddings, config.num_hidden_layers) == (131072, 4)


def test_yarn_of_20b_is_not_truncated() -> None:
    frequencies = ROPE_20B.frequencies(64)
    # From the published bounds 8.0927791 and 17.3980245 of the ramp.
    for pair in (0, 8, 9, 13, 17, 18, 31):
        ramp = min(max((pair - 8.0927791) / (17.3980245 - 8.0927791), 0), 1)
        plain = 150000 ** (-pair / 32)
        assert frequencies[pair] == pytest.approx(plain * (ramp / 32 + 1 - ramp), rel=1e-6)
    assert ROPE_20B.concentration == pytest.approx(1.3465736, rel=1e-7)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
def test_frequencies_are_those_of_transformers(truncate: bool, factor: float) -> None:
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    configuration = pytest.importorskip("transformers").GptOssConfig(
        head_dim=48,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 20000.0, "factor": factor, "beta_fast": 24.0, "beta_slow": 2.0,
            "original_max_position_embeddings": 512, "truncate": truncate,
        },
    )  # fmt: skip
    expected, concentration = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](configuration, torch.device("cpu"))
    rope = gpt_oss.Rope(20000.0, factor, 24.0, 2.0, 512, truncate)
    np.testing.assert_allclose(rope.frequencies(48), expected.numpy(), rtol=1e-5)
    assert rope.concentration == pytest.approx(concentration)


def test_presets_are_read() -> None:
    for preset, layers, experts in (("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)):
        fields = synthesize.__globals__["_config"](preset, {})
        config = gpt_oss.Config.from_json(fields)
        assert (config.num_hidden_layers, config.num_local_experts) == (layers, experts)
        assert config.rope == ROPE_20B


def test_the_form_of_newer_transformers_is_read(fields: dict[str, Any]) -> None:
    newer = without(fields, "rope_scaling", "rope_theta", "experts_per_token")
    newer["rope_parameters"] = {**fields["rope_scaling"], "rope_theta": 150000.0}
    newer |= {"swiglu_alpha": 1.5, "dtype": "bfloat16", "bos_token_id": None}
    config = gpt_oss.Config.from_json(newer)
    assert config.rope == ROPE_20B
    assert config.swiglu_alpha == 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: found 'llama', expected 'gpt_oss'"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        ({"attention_bias": False}, "attention_bias: found False, expected True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True, expected False"),
        ({"hidden_size": 100}, "hidden_size: found 100, expected a multiple of 32"),
        ({"intermediate_size": 0}, "intermediate_size: found 0, expected a positive integer"),
        ({"vocab_size": True}, "vocab_size: found True, expected a positive integer"),
        ({"vocab_size": 1 << 70}, "vocab_size: found 1180591620717411303424, expected a positive integer"),
        ({"num_attention_heads": 5}, r"num_attention_heads: found 5, expected a multiple of num_key_value_heads \(2\)"),
        ({"num_experts_per_tok": 7, "experts_per_token": 7}, "num_experts_per_tok: found 7, expected at most 6"),
        ({"experts_per_token": 2}, "num_experts_per_tok and experts_per_token: found 3 and 2, expected the same"),
        ({"head_dim": 33}, "head_dim: found 33, expected an even number"),
        ({"num_hidden_layers": 3}, "layer_types: found 4 entries, expected 3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected at most"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types: found .'chunked_attention'"),
        ({"layer_types": 5}, "layer_types: found 5, expected a list"),
        ({"layer_types": "full_attention"}, "layer_types: found 'full_attention', expected a list"),
        ({"rope_scaling": None}, "rope_scaling: found None, expected an object"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type: found 'llama3', expected 'yarn' or 'default'"),
        ({"sliding_window": 2**31}, "sliding_window: found 2147483648, expected a positive integer"),
        ({"rope_theta": 1}, "rope_theta: found 1.0, expected a number above 1"),
        ({"rope_theta": 10**400}, "rope_theta: found 10+, expected a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps: found nan, expected a positive number"),
        ({"swiglu_limit": "7"}, "swiglu_limit: found '7', expected a positive number"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: found the method 'awq'"),
        ({"attn_logit_softcapping": 50}, "found the unknown fields 'attn_logit_softcapping'"),
    ],
    ids=str,
)
def test_what_the_model_is_not_is_refused_by_name(fields: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        gpt_oss.Config.from_json({**fields, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original_max_position_embeddings": 0.3}, "original_max_position_embeddings: found 0, expected at least 1"),
        ({"beta_fast": 1e308}, r"beta_fast: found 1e\+308, expected a positive number"),
        ({"beta_slow": 1e-323}, "beta_slow: found 1e-323, expected a positive number"),
        ({"rope_theta": 10000.0}, "rope_theta: found 150000 and 10000.0, expected the same"),
    ],
    ids=str,
)
def test_a_rope_without_finite_frequencies_is_refused(
    fields: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        gpt_oss.Config.from_json({**fields, "rope_scaling": {**fields["rope_scaling"], **change}})


@pytest.mark.parametrize("least", [1e-30, 1e30])
def test_the_most_absurd_numbers_that_are_taken_have_finite_frequencies(fields: dict[str, Any], least: float) -> None:
    numbers = dict.fromkeys(("beta_fast", "beta_slow", "factor"), least)
    scaling = {**fields["rope_scaling"], **numbers, "original_max_position_embeddings": 1e30, "truncate": True}
    rope = gpt_oss.Config.from_json({**fields, "rope_theta": 1e30, "rope_scaling": scaling}).rope
    assert np.isfinite([*rope.frequencies(64), rope.concentration]).all()


def test_all_faults_are_told_together_with_the_file(fields: dict[str, Any]) -> None:
    broken = without(fields, "vocab_size", "num_local_experts") | {"hidden_act": "relu", "extra": 1}
    with pytest.raises(
        CheckpointError, match=r"(?s)somewhere/config\.json: .*relu.*vocab_size.*num_local_experts.*extra"
    ):
        gpt_oss.Config.from_json(broken, "somewhere/config.json")


def test_mscale_of_other_models_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="rope_scaling: found mscale"):
        gpt_oss.Config.from_json({**fields, "rope_scaling": {**fields["rope_scaling"], "mscale": 1.0}})


def test_a_rope_that_is_not_stretched_has_plain_frequencies(fields: dict[str, Any]) -> None:
    config = gpt_oss.Config.from_json({**fields, "rope_scaling": {"rope_type": "default"}})
    assert config.rope.frequencies(8) == [150000 ** (-pair / 4) for pair in range(4)]
    assert config.rope.concentration == 1.0


def test_gpt_oss_of_another_kind_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "qwen3"}))
    with pytest.raises(CheckpointError, match=r"config\.json: found model_type 'qwen3', expected one of 'gpt_oss'"):
        gpt_oss.load(tmp_path)
