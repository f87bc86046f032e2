"""The files beside the tensors: copied, corrected where they would lie, never in the way of our own."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport

Write = Callable[..., Path]


def config_after(source: Path, tree: Path, **options: Any) -> tuple[dict[str, Any], tensorport.ConversionReport]:
    report = tensorport.convert(source, tree, progress=False, **options)
    config: dict[str, Any] = json.loads((tree / "config.json").read_text("utf-8"))
    return config, report


@pytest.fixture
def source(tmp_path: Path, write_safetensors: Write) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {"a.w": np.arange(15, dtype=np.float32).reshape(3, 5)})
    return folder


def test_configuration_is_copied_bit_for_bit_where_nothing_changes(tmp_path: Path, golden_hf: Path) -> None:
    report = tensorport.convert(golden_hf, tmp_path / "tree", progress=False)
    assert (tmp_path / "tree" / "config.json").read_bytes() == (golden_hf / "config.json").read_bytes()
    assert (report.copied_files, report.edited_files) == (("config.json",), ())


@pytest.mark.parametrize(
    ("options", "dtype", "is_quantized"),
    [
        ({"mxfp4": "dequantize"}, "bfloat16", False),
        ({"mxfp4": "dequantize", "precision": "float32"}, "float32", False),
        ({"precision": "float16"}, "float16", True),
    ],
)
def test_configuration_names_the_new_dtype_and_loses_the_quantization_that_is_gone(
    tmp_path: Path, golden_hf: Path, options: dict[str, str], dtype: str, is_quantized: bool
) -> None:
    before = json.loads((golden_hf / "config.json").read_text("utf-8"))
    config, report = config_after(golden_hf, tmp_path / "tree", **options)
    assert config.pop("dtype") == dtype
    assert ("quantization_config" in config) == is_quantized
    if not is_quantized:
        before.pop("quantization_config")
    assert config == before
    assert list(config) == list(before)
    assert (report.copied_files, report.edited_files) == ((), ("config.json",))


@pytest.mark.parametrize("keys", [["torch_dtype"], ["dtype"], ["torch_dtype", "dtype"], []])
def test_each_key_that_names_the_dtype_is_corrected(tmp_path: Path, source: Path, keys: list[str]) -> None:
    before = {"model_type": "x", **dict.fromkeys(keys, "float32"), "é": 1e-12, "big": 12345678901234567890}
    (source / "config.json").write_text(json.dumps(before))
    config, _ = config_after(source, tmp_path / "tree", precision="bfloat16")
    assert config == before | dict.fromkeys(keys or ["dtype"], "bfloat16")


def test_configuration_stays_where_the_precision_is_already_there(tmp_path: Path, source: Path) -> None:
    (source / "config.json").write_text('{"torch_dtype":   "float32"}')
    for number, options in enumerate([{"precision": "float32"}, {"mxfp4": "dequantize"}]):
        report = tensorport.convert(source, tmp_path / f"{number}", progress=False, **options)  # type: ignore[arg-type]
        assert (tmp_path / f"{number}" / "config.json").read_text() == '{"torch_dtype":   "float32"}'
        assert report.edited_files == ()


@pytest.mark.parametrize("text", ["not JSON", "[1, 2]", ""])
def test_a_configuration_that_cannot_be_corrected_is_refused(tmp_path: Path, source: Path, text: str) -> None:
    (source / "config.json").write_text(text)
    with pytest.raises(tensorport.CheckpointError, match=r"config\.json"):
        tensorport.convert(source, tmp_path / "tree", precision="float16", progress=False)
    tensorport.convert(source, tmp_path / "kept", progress=False)
    assert (tmp_path / "kept" / "config.json").read_text() == text


def test_what_travels_with_a_checkpoint_is_copied_and_the_rest_is_not(tmp_path: Path, source: Path) -> None:
    travels = ["tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "NOTICE", "USAGE_POLICY", "README.md"]
    travels += ["vocab.model", "o200k.tiktoken"]
    stays = [".hidden", ".gitattributes", ".secret.json", "pytorch_model.bin", "training.log", "modeling.py"]
    for name in travels + stays:
        (source / name).write_bytes(name.encode() * 3)
    (source / "folder.json").mkdir()
    (source / "dangling.json").symlink_to("nowhere")
    (tmp_path / "blob").write_text("linked")
    (source / "linked.json").symlink_to(tmp_path / "blob")
    if hasattr(os, "mkfifo"):
        os.mkfifo(source / "pipe.json")
    tree = tmp_path / "tree"
    report = tensorport.convert(source, tree, progress=False)
    assert set(report.copied_files) == {*travels, "linked.json"}
    assert {path.name for path in tree.iterdir()} == {*travels, "linked.json"} | {
        "manifest.json",
        "load_params.py",
        "shard_000",
    }
    for name in travels:
        assert (tree / name).read_bytes() == name.encode() * 3
    assert (tree / "linked.json").read_text() == "linked"
    assert not (tree / "linked.json").is_symlink()


def test_a_sources_files_cannot_take_the_place_of_our_own(tmp_path: Path, source: Path) -> None:
    tensorport.convert(source, tmp_path / "clean", progress=False)
    for name in ("manifest.json", "MANIFEST.JSON", "load_params.py", "journal.jsonl", "journal.jsonl.tmp"):
        (source / name).write_text('{"evil": true}')
    report = tensorport.convert(source, tmp_path / "tree", progress=False)
    assert report.copied_files == ()
    for name in ("manifest.json", "load_params.py"):
        assert (tmp_path / "tree" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {"manifest.json", "load_params.py", "shard_000"}


def test_a_single_file_brings_nothing_along(tmp_path: Path, source: Path) -> None:
    (source / "config.json").write_text("{}")
    report = tensorport.convert(source / "model.safetensors", tmp_path / "tree", progress=False)
    assert report.copied_files == ()
    assert not (tmp_path / "tree" / "config.json").exists()


def test_numbers_of_an_edited_configuration_keep_every_digit(tmp_path: Path, source: Path) -> None:
    text = (
        '{"a": 0.9806866256778739, "b": 123456789012345678901234567890, "c": [0.0, Infinity, -Infinity], "d": NaN,\n'
        ' "s": "NaN, \\"Infinity", "torch_dtype": "float32", "text_config": {"torch_dtype": "float32", "e": 1e-05}}'
    )
    (source / "config.json").write_text(text)
    tensorport.convert(source, tmp_path / "tree", precision="float16", progress=False)
    edited = (tmp_path / "tree" / "config.json").read_text()
    for kept in ("0.9806866256778739", "123456789012345678901234567890", "[0.0, Infinity, -Infinity]", "1e-05"):
        assert kept in edited
    before, after = json.loads(text), json.loads(edited)
    assert (after.pop("torch_dtype"), after["text_config"].pop("torch_dtype")) == ("float16", "float16")
    del before["torch_dtype"], before["text_config"]["torch_dtype"]
    assert repr(after) == repr(before)


@pytest.mark.skipif(os.name == "nt", reason="such names are not legal there")
def test_files_that_a_manifest_cannot_list_stay_behind(tmp_path: Path, source: Path) -> None:
    for name in ("notes:v1.txt", "a\\b.json", "n" * 248 + ".txt"):
        (source / name).write_text("x")
    report = tensorport.convert(source, tmp_path / "tree", progress=False)
    assert (report.copied_files, report.verified) == ((), True)
