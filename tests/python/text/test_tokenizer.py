"""Tokenizer: the checkpoint's own, what stands beside it, and what is said where it is missing or broken."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorport
from hypothesis import given
from hypothesis import strategies as st
from tensorport.text import Tokenizer
from tokenizers import Tokenizer as Backend


@pytest.fixture(scope="module")
def backend(tiny: Path) -> Backend:
    return Backend.from_file(str(tiny / "tokenizer.json"))


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A tokenizer.json and nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    return tmp_path / "model"


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


def test_it_reads_what_synthesize_writes(tiny: Path) -> None:
    tokenizer = Tokenizer.from_directory(tiny)
    assert tokenizer.eos_token_ids == [518, 517, 516]
    assert tokenizer.pad_token_id == 517
    assert tokenizer.vocab_size == 519
    assert tokenizer.chat_template == (tiny / "chat_template.jinja").read_text("utf-8")
    assert tokenizer.special_tokens == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
    }
    assert repr(tokenizer) == "Tokenizer(519 tokens, eos_token_ids=[518, 517, 516], a chat template)"
    assert Tokenizer.from_directory(str(tiny)).vocab_size == 519


@given(text=st.text())
def test_any_text_comes_back(tiny: Path, backend: Backend, text: str) -> None:
    tokenizer = Tokenizer.from_directory(tiny)
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(ids=st.lists(st.integers(0, 700)))
def test_any_ids_have_a_text_and_those_without_a_token_are_left_out(
    tiny: Path, backend: Backend, ids: list[int]
) -> None:
    tokenizer = Tokenizer.from_directory(tiny)
    text = tokenizer.decode(ids)
    assert text == backend.decode(ids) == tokenizer.decode([id for id in ids if id < 519])
    assert text == tokenizer.decode([id for id in ids if not tokenizer.is_special(id)])


def test_special_tokens_in_a_text_are_their_ids(tiny: Path) -> None:
    tokenizer = Tokenizer.from_directory(tiny)
    end, message = tokenizer.token_id("<|end|>"), tokenizer.token_id("<|message|>")
    assert tokenizer.encode("<|message|>a<|end|>") == [message, *tokenizer.encode("a"), end]
    assert tokenizer.decode(tokenizer.encode("<|message|>a<|end|>")) == "a"
    assert tokenizer.decode(tokenizer.encode("<|message|>a<|end|>"), skip_special_tokens=False) == "<|message|>a<|end|>"
    assert tokenizer.token_id("<|nothing|>") is None
    assert (tokenizer.token(516), tokenizer.token(519), tokenizer.token(-1)) == ("<|call|>", None, None)
    assert (tokenizer.is_special(516), tokenizer.is_special(0), tokenizer.is_special(519)) == (True, False, False)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_what_is_no_id_is_a_value_error(tiny: Path, number: int) -> None:
    with pytest.raises(ValueError, match=rf"ids: found {number}, expected numbers between 0 and 2\*\*32 - 1"):
        Tokenizer.from_directory(tiny).decode([1, number])


def test_half_a_surrogate_pair_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"text: found '\\ud800' at 1, expected characters of Unicode"):
        Tokenizer.from_directory(tiny).encode("a\ud800")


def test_a_real_tokenizer_adds_what_it_adds_itself(minilm: Path) -> None:
    tokenizer = Tokenizer.from_directory(minilm)
    ids = tokenizer.encode("A short text.")
    assert [tokenizer.token(id) for id in ids] == ["[CLS]", "a", "short", "text", ".", "[SEP]"]
    assert tokenizer.encode("A short text.", add_special_tokens=False) == ids[1:-1]
    # Its file says that texts are cut at 128 tokens, and padded: that was for its training.
    assert len(tokenizer.encode("a " * 1000)) == 1002
    assert tokenizer.chat_template is None
    with pytest.raises(tensorport.CheckpointError, match=r"found neither chat_template\.jinja nor chat_template in"):
        tokenizer.chat_prompt([])


@pytest.mark.parametrize(
    ("files", "eos", "pad"),
    [
        ({}, [], None),
        ({"generation_config.json": {"eos_token_id": [3, 4], "pad_token_id": 5}}, [3, 4], 5),
        ({"config.json": {"eos_token_id": 6, "pad_token_id": None}}, [6], None),
        (
            {"generation_config.json": {"eos_token_id": 3}, "config.json": {"eos_token_id": 6, "pad_token_id": 7}},
            [3],
            7,
        ),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 0, "pad_token_id": 0}}, [0], 0),
        ({"tokenizer_config.json": {"eos_token": "<|end|>", "pad_token": {"content": "<|call|>"}}}, [514], 516),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|end|>"}}}, [514], None),
        ({"tokenizer_config.json": {"eos_token": "<nothing>", "pad_token": None}}, [], None),
        (
            {
                "special_tokens_map.json": {"eos_token": "<|end|>"},
                "tokenizer_config.json": {"eos_token": "<|call|>"},
            },
            [516],
            None,
        ),
    ],
)
def test_ids_that_end_and_pad_come_from_the_first_file_that_has_them(
    folder: Path, files: dict[str, Any], eos: list[int], pad: int | None
) -> None:
    for name, value in files.items():
        write(folder, name, value)
    tokenizer = Tokenizer.from_directory(folder)
    assert (tokenizer.eos_token_ids, tokenizer.pad_token_id) == (eos, pad)


def test_chat_templates_stand_in_a_file_or_in_the_configuration(folder: Path) -> None:
    assert Tokenizer.from_directory(folder).chat_template is None
    write(folder, "tokenizer_config.json", {"chat_template": "from the configuration"})
    assert Tokenizer.from_directory(folder).chat_template == "from the configuration"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]
    write(folder, "tokenizer_config.json", {"chat_template": named, "eos_token": "<|end|>"})
    assert Tokenizer.from_directory(folder).chat_template == "d{{ eos_token }}"
    assert Tokenizer.from_directory(folder).chat_prompt([]) == "d<|end|>"
    assert Tokenizer.from_directory(folder).chat_prompt([], eos_token="x") == "dx"
    write(folder, "tokenizer_config.json", {"chat_template": named[:1]})
    assert Tokenizer.from_directory(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("é", "utf-8")
    assert Tokenizer.from_directory(folder).chat_template == "é"


def test_a_checkpoint_without_a_tokenizer_says_that_ids_still_work(golden_hf: Path) -> None:
    message = rf"{re.escape(str(golden_hf))}: found no tokenizer\.json, expected .*; without it prompts have to be ids"
    with pytest.raises(tensorport.CheckpointError, match=message):
        Tokenizer.from_directory(golden_hf)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as fault:
        Tokenizer.from_directory(tmp_path / "nothing")
    assert fault.value.filename == str(tmp_path / "nothing")


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"],
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"3"], ids=range(6))
def test_a_broken_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(tensorport.CheckpointError, match=re.escape(f"{folder / name}: found")):
        Tokenizer.from_directory(folder)


def test_a_tokenizer_that_makes_the_library_panic_is_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = json.loads((folder / "tokenizer.json").read_text())
    broken["model"]["continuing_subword_prefix"] = "xyz"
    write(folder, "tokenizer.json", broken)
    with pytest.raises(tensorport.CheckpointError, match=r"tokenizer\.json: found no tokenizer that can be read"):
        Tokenizer.from_directory(folder)
    assert "panicked" in capfd.readouterr().err  # else this is no test of panics


@pytest.mark.parametrize("value", [-1, 2**32, 1.5, True, "2", [1, None], {"a": 1}])
@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
def test_ids_that_are_none_are_refused(folder: Path, field: str, value: object) -> None:
    write(folder, "generation_config.json", {field: value})
    with pytest.raises(
        tensorport.CheckpointError, match=rf"generation_config\.json: {field}: found .*, expected an id"
    ):
        Tokenizer.from_directory(folder)


def test_broken_chat_templates_are_refused(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": 3})
    with pytest.raises(tensorport.CheckpointError, match=r"tokenizer_config\.json: chat_template: found int"):
        Tokenizer.from_directory(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(tensorport.CheckpointError, match=r"chat_template\.jinja: found no UTF-8"):
        Tokenizer.from_directory(folder)


def test_without_the_library_the_error_names_the_extra(tiny: Path) -> None:
    code = (
        "import sys; sys.modules['tokenizers'] = None\nfrom tensorport.text import Tokenizer\n"
        "print('imported')\nTokenizer.from_directory(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "imported\n")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: text needs the library tokenizers: pip install 'tensorport[text]'"
    )


def test_importing_it_imports_neither_jax_nor_an_extra() -> None:
    code = "import sys, tensorport.text; print({'jax', 'tokenizers', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
