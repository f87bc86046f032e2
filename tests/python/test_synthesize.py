"""synthesize(): random checkpoints that are gpt-oss in every name, shape, dtype and field."""

import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

# tensorport.synthesize is the function; its module has the tables.
module = importlib.import_module("tensorport.synthesize")

Layout = Literal["huggingface", "original"]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def tables(preset: str, layout: Layout) -> list[Any]:
    config = module._config(preset, {})
    make = module._huggingface_tensors if layout == "huggingface" else module._original_tensors
    return list(make(config))


@pytest.fixture(scope="module")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensorport.synthesize(tmp_path_factory.mktemp("s") / "o", "tiny", layout="original", progress=False)


@pytest.mark.parametrize(
    ("preset", "layout", "tensors", "nbytes", "parameters", "stored"),
    [
        ("gpt-oss-20b", "huggingface", 459, 13_761_264_768, 20_914_757_184, 21_511_953_984),
        ("gpt-oss-20b", "original", 363, 13_761_264_768, 20_914_757_184, 21_511_953_984),
        ("gpt-oss-120b", "huggingface", 687, 65_248_815_744, 116_829_156_672, 120_412_337_472),
        ("gpt-oss-120b", "original", 543, 65_248_815_744, 116_829_156_672, 120_412_337_472),
    ],
)
def test_large_presets_have_the_size_of_the_published_checkpoints(  # noqa: PLR0917 - one for each column above
    preset: str, layout: Layout, tensors: int, nbytes: int, parameters: int, stored: int
) -> None:
    table = tables(preset, layout)
    assert len({tensor.name for tensor in table}) == len(table) == tensors
    assert sum(math.prod(tensor.shape) * (1 if tensor.dtype == "uint8" else 2) for tensor in table) == nbytes
    assert sum(tensor.nbytes for tensor in table) == nbytes
    elements = {"blocks": 0, "scales": 0, "others": 0}
    for tensor in table:
        kind = tensor.name[-6:] if tensor.dtype == "uint8" else "others"
        elements[kind] += math.prod(tensor.shape)
    assert elements["others"] + 2 * elements["blocks"] == parameters
    assert elements["others"] + 2 * elements["blocks"] + elements["scales"] == stored


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_a_written_checkpoint_is_its_table(tiny: Path, tiny_original: Path, layout: Layout) -> None:
    folder = tiny if layout == "huggingface" else tiny_original
    arrays = load_file(folder / "model.safetensors")
    table = {tensor.name: (np.dtype(tensor.dtype), tensor.shape) for tensor in tables("tiny", layout)}
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == table
    checkpoint = tensorport.open(folder)
    assert {name: (spec.dtype, spec.shape) for name, spec in checkpoint.specs.items()} == table
    assert all(spec.offset % spec.dtype.alignment == 0 for spec in checkpoint.specs.values())
    assert checkpoint.total_parameters == tensorport.open(tiny).total_parameters


def test_golden_checkpoints_have_the_same_names_shapes_dtypes_and_fields(
    tmp_path: Path, golden_hf: Path, golden_original: Path
) -> None:
    overrides = json.loads((golden_hf / "config.json").read_text())
    for layout, golden in (("huggingface", golden_hf), ("original", golden_original)):
        folder = tensorport.synthesize(tmp_path / layout, "tiny", layout=layout, progress=False, **overrides)  # type: ignore[arg-type]
        ours, theirs = tensorport.open(folder).specs, tensorport.open(golden).specs
        assert {name: (spec.dtype, spec.shape) for name, spec in ours.items()} == {
            name: (spec.dtype, spec.shape) for name, spec in theirs.items()
        }
        config, expected = (json.loads((path / "config.json").read_text()) for path in (folder, golden))
        config.pop("transformers_version", None)
        assert config == expected


def test_one_seed_is_one_model_whatever_the_workers(tmp_path: Path, tiny: Path) -> None:
    for workers in (1, 5):
        again = tensorport.synthesize(tmp_path / f"{workers}", "tiny", seed=0, workers=workers, progress=False)
        assert again == tmp_path / f"{workers}"
        assert folder_bytes(again) == folder_bytes(tiny)


def test_another_seed_is_another_model(tmp_path: Path, tiny: Path) -> None:
    last = tensorport.synthesize(tmp_path / "last", "tiny", seed=2**64 - 1, progress=False)
    ours, theirs = tensorport.open(last), tensorport.open(tiny)
    assert dict(ours.specs) == dict(theirs.specs)
    assert all(ours[name].tobytes() != theirs[name].tobytes() for name in ours)
    assert (last / "config.json").read_bytes() == (tiny / "config.json").read_bytes()


def test_no_two_tensors_hold_the_same_values(tiny: Path) -> None:
    checkpoint = tensorport.open(tiny)
    # The first bytes suffice: a shared stream would begin alike.
    beginnings = [checkpoint[name].tobytes()[:12] for name in checkpoint if not name.endswith("_scales")]
    assert len(set(beginnings)) == len(beginnings)


def test_both_layouts_hold_the_same_weights(tiny: Path, tiny_original: Path) -> None:
    ours, theirs = tensorport.open(tiny), tensorport.open(tiny_original)
    pairs = {"embedding.weight": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
    pairs["unembedding.weight"] = "lm_head.weight"
    for block in range(4):
        for original, name in {
            "attn.norm.scale": "input_layernorm.weight",
            "attn.sinks": "self_attn.sinks",
            "attn.out.weight": "self_attn.o_proj.weight",
            "attn.out.bias": "self_attn.o_proj.bias",
            "mlp.norm.scale": "post_attention_layernorm.weight",
            "mlp.gate.weight": "mlp.router.weight",
            "mlp.gate.bias": "mlp.router.bias",
            "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
            "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
            "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
            "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
            "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
            "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
        }.items():
            pairs[f"block.{block}.{original}"] = f"model.layers.{block}.{name}"
    for original, name in pairs.items():
        assert theirs[original].shape == ours[name].shape
        assert theirs[original].tobytes() == ours[name].tobytes()
    joined = set(theirs) - set(pairs)
    assert joined == {f"block.{layer}.attn.qkv.{part}" for layer in range(4) for part in ("weight", "bias")}
    for name in joined:
        _, layer, _, _, part = name.split(".")
        rows = [ours[f"model.layers.{layer}.self_attn.{which}_proj.{part}"] for which in "qkv"]
        assert [len(array) for array in rows] == [192, 64, 64]
        assert theirs[name].tobytes() == np.concatenate(rows).tobytes()


def test_dense_values_have_the_mean_and_deviation_that_the_table_says(tiny: Path) -> None:
    checkpoint = tensorport.open(tiny)
    checked = 0
    for tensor in tables("tiny", "huggingface"):
        if tensor.dtype == "uint8":
            continue
        mean, std = tensor.fill["normal"]["mean"], tensor.fill["normal"]["std"]
        values = checkpoint[tensor.name].astype(np.float64)
        # Five deviations of the estimates, and the rounding to bfloat16.
        assert abs(values.mean() - mean) < 5 * std / math.sqrt(values.size)
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * values.size) + 0.01
        checked += values.size > 5000
    assert checked >= 2 + 3 * 4


def decoded(blocks: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float64]:
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    values: NDArray[np.float64] = codes.reshape(*scales.shape, 32) * np.exp2(scales[..., None] - 127.0)
    return values


@pytest.mark.parametrize(("name", "columns"), [("gate_up_proj", 96), ("down_proj", 160)])
def test_experts_decode_to_values_of_about_the_deviation_of_dense_ones(tiny: Path, name: str, columns: int) -> None:
    checkpoint = tensorport.open(tiny)
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts.{name}"
        blocks, scales = checkpoint[f"{prefix}_blocks"], checkpoint[f"{prefix}_scales"]
        values = decoded(blocks, scales)
        # Scales are powers of two, so that the deviation is met within a factor of about sqrt(2).
        assert 0.6 < values.std() * math.sqrt(columns) < 1.5
        assert abs(values.mean()) < 5 * values.std() / math.sqrt(values.size)
        codes = np.bincount(np.concatenate([(blocks & 15).ravel(), (blocks >> 4).ravel()]), minlength=16)
        assert (np.delete(codes, 8) > 0).all()  # 8 is the negative zero
        np.testing.assert_allclose(codes[1:8], codes[9:16], rtol=0.1)
        low, high = np.unique(scales)
        assert high == low + 1
        assert abs((scales == low).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / scales.size)


def test_a_large_checkpoint_has_several_files_and_an_index(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_FILE_BYTES", 200_000)
    folder = tensorport.synthesize(tmp_path / "sharded", "tiny", progress=False)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 4
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    whole, sharded = tensorport.open(tiny), tensorport.open(folder)
    assert index["metadata"] == {"total_size": whole.nbytes}
    assert index["weight_map"] == {name: spec.files[0] for name, spec in sharded.specs.items()}
    assert set(sharded) == set(whole)
    assert all(sharded[name].tobytes() == whole[name].tobytes() for name in whole)
    for file in files:
        held = [spec.nbytes for spec in sharded.specs.values() if spec.files == (file,)]
        assert sum(held) <= 200_000
        assert {name: array.shape for name, array in load_file(folder / file).items()} == {
            name: spec.shape for name, spec in sharded.specs.items() if spec.files == (file,)
        }


def test_overrides_change_the_configuration_and_the_tensors(tmp_path: Path) -> None:
    folder = tensorport.synthesize(
        tmp_path / "t", "tiny", progress=False, num_hidden_layers=3, num_local_experts=5, experts_per_token=2
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_local_experts"]) == (3, 5)
    assert config["num_experts_per_tok"] == config["experts_per_token"] == 2
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    checkpoint = tensorport.open(folder)
    assert len(checkpoint) == 3 + 19 * 3
    assert checkpoint["model.layers.2.mlp.experts.down_proj_blocks"].shape == (5, 96, 5, 16)


@pytest.mark.parametrize("overrides", [{"pad_token_id": 0}, {"rope_theta": 500000.0}], ids=str)
def test_values_that_real_configurations_have_are_taken(tmp_path: Path, overrides: dict[str, Any]) -> None:
    folder = tensorport.synthesize(tmp_path / "t", "tiny", progress=False, **overrides)
    assert json.loads((folder / "config.json").read_text()).items() >= overrides.items()


HARMONY = {"startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message", "call"}

# openai/gpt-oss, gpt_oss/tokenizer.py.
GPT_OSS_IDS = {"<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003}
GPT_OSS_IDS |= {
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}


@pytest.mark.parametrize("layout", ["huggingface", "original"])
@pytest.mark.parametrize(
    ("overrides", "eos", "pad"),
    [
        ({}, [518, 517, 516], 517),
        ({"vocab_size": 265}, [264, 263, 262], 263),
        ({"vocab_size": 700}, [699, 698, 697], 698),
        ({"vocab_size": 2000, "eos_token_id": 7}, [7, 1998, 1999], 1998),
        ({"pad_token_id": 0}, [518, 0, 517], 0),
        ({"eos_token_id": 300, "pad_token_id": 300}, [300, 518, 517], 300),
        ({"vocab_size": 201088, "num_hidden_layers": 1}, [200002, 199999, 200012], 199999),
        ({"vocab_size": 200013, "num_hidden_layers": 1}, [200002, 199999, 200012], 199999),
        ({"vocab_size": 200012, "num_hidden_layers": 1}, [200011, 200010, 200009], 200010),
    ],
    ids=str,
)
def test_a_tokenizer_of_the_vocabularys_size_is_written(
    tmp_path: Path, layout: Layout, overrides: dict[str, int], eos: list[int], pad: int
) -> None:
    folder = tensorport.synthesize(tmp_path / "t", "tiny", layout=layout, progress=False, **overrides)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = overrides.get("vocab_size", 519)
    vocab = tokenizer.get_vocab()
    assert len(set(vocab.values())) == len(vocab)
    assert max(vocab.values()) < size
    special = {token: id for token, id in vocab.items() if token in {f"<|{name}|>" for name in HARMONY}}
    assert len(special) == len(HARMONY)
    assert {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special} == set(special.values())
    if size > 200012:
        assert special == GPT_OSS_IDS
        assert set(range(199998)) < set(vocab.values())
    else:
        assert set(vocab.values()) == set(range(size))
    assert [special["<|return|>"], special["<|endoftext|>"], special["<|call|>"]] == eos
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (eos, pad)
    assert generation["bos_token_id"] == special["<|startoftext|>"]
    if layout == "huggingface":
        config = json.loads((folder / "config.json").read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == (eos[0], pad)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokens["eos_token"] == "<|return|>"
    assert tokenizer.token_to_id(tokens["pad_token"]) == pad
    text = "The people said: 你好, 😀 <|end|>\n\tétude\x00"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.decode([size - 1, size, 2**31]) == tokenizer.decode([size - 1])


def test_common_words_are_one_token(tmp_path: Path) -> None:
    folder = tensorport.synthesize(tmp_path / "t", "tiny", progress=False, vocab_size=4000)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(" the people think about different words").tokens[:4] == [
        "Ġthe",
        "Ġpeople",
        "Ġthink",
        "Ġabout",
    ]
    # Every id without a marker has a text of its own, for a random model chooses any.
    texts = [tokenizer.decode([id]) for id in range(256, 4000 - len(HARMONY))]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) > 1


@pytest.mark.parametrize("overrides", [{"vocab_size": 264}, {"vocab_size": 600, "eos_token_id": 600}], ids=str)
def test_a_vocabulary_without_room_gets_no_tokenizer(tmp_path: Path, overrides: dict[str, Any]) -> None:
    folder = tensorport.synthesize(tmp_path / "t", "tiny", progress=False, **overrides)
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_text_files_travel_with_a_conversion(tmp_path: Path, tiny: Path) -> None:
    report = tensorport.convert(tiny, tmp_path / "tree", progress=False)
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    assert set(copied) < set(report.copied_files)
    for name in copied:
        assert (tmp_path / "tree" / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"preset": "gpt-oss-7b"},
        {"layout": "jax"},
        {"seed": -1},
        {"seed": 2**64},
        {"hidden_sise": 96},
        {"hidden_size": 100},
        {"intermediate_size": 33},
        {"hidden_size": 0},
        {"num_hidden_layers": -2},
        {"num_hidden_layers": "4"},
        {"num_attention_heads": 7},
        {"num_experts_per_tok": 7},
        {"experts_per_token": 0},
        {"layer_types": ["full_attention"]},
        {"rope_scaling": {}, "layout": "original"},
    ],
    ids=str,
)
def test_bad_arguments_are_value_errors_and_write_nothing(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match="experts_per_tok" if "experts_per_token" in arguments else next(iter(arguments))
        ):
            tensorport.synthesize(tmp_path / "t", **{"preset": "tiny", "progress": False, **arguments})
    assert not (tmp_path / "t").exists()


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(tensorport.ConversionError, match="found files in it"):
        tensorport.synthesize(tmp_path, "tiny", progress=False)
    assert folder_bytes(tmp_path) == {"mine": b"x"}
