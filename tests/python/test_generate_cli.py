"""`tensorport generate`: what is printed where, beside what `LanguageModel.generate` returns."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorport
from tensorport import LanguageModel, cli

Capture = pytest.CaptureFixture[str]

# One size of prompts and one of caches: compiled once for all tests.
LENGTH = ["--max-new-tokens", "12"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def model(two_layers: Path) -> LanguageModel:
    return tensorport.load_model(two_layers)


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Status, standard output and standard error of `tensorport generate`."""
    capsys.readouterr()
    status = cli.main(["generate", *map(str, arguments)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_what_is_new_is_printed_and_nothing_else(two_layers: Path, model: LanguageModel, capsys: Capture) -> None:
    expected = model.generate("The people", seed=3, **SETTINGS)
    assert run(capsys, "--model", two_layers, "--prompt", "The people", "--seed", 3, *LENGTH) == (
        0,
        f"{expected}\n",
        "",
    )
    # In pieces it is the same text.
    streamed = run(capsys, "--model", two_layers, "--prompt", "The people", "--seed", 3, *LENGTH, "--stream")
    assert streamed == (0, f"{expected}\n", "")


def test_standard_input_is_a_prompt(
    two_layers: Path, model: LanguageModel, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate("Ünder\nwater ", seed=3, **SETTINGS)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ünder\nwater \n"))
    assert run(capsys, "--model", two_layers, "--prompt", "-", "--seed", 3, *LENGTH) == (0, f"{expected}\n", "")


def test_settings_reach_the_model(two_layers: Path, model: LanguageModel, capsys: Capture) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "repetition_penalty": 0.5, "seed": 6}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    expected = model.generate("The people", **SETTINGS, **settings)
    assert run(capsys, "--model", two_layers, "--prompt", "The people", *LENGTH, *flags)[1] == f"{expected}\n"
    # Each changes something, so that none of them can get lost.
    for name in settings:
        other = model.generate("The people", **SETTINGS, **{key: settings[key] for key in settings if key != name})
        assert other != expected, name
    greedy = model.generate("The people", **SETTINGS, temperature=0)
    stop = greedy[5:8]
    stopped = model.generate("The people", **SETTINGS, temperature=0, stop=[stop, "never"])
    flags = ["--temperature", 0, "--stop", stop, "--stop", "never"]
    assert stopped == greedy[: greedy.index(stop)]
    assert run(capsys, "--model", two_layers, "--prompt", "The people", *LENGTH, *flags)[1] == f"{stopped}\n"


def test_ids_need_no_tokenizer(golden_hf: Path, capsys: Capture) -> None:
    prompt = [7, 301, 44, 5]
    expected = tensorport.load_model(golden_hf).generate([prompt], temperature=0, **SETTINGS)[0][len(prompt) :]
    flags = ["--model", golden_hf, "--prompt-ids", "7,301,44,5", "--temperature", 0, *LENGTH]
    assert run(capsys, *flags) == (0, ",".join(map(str, expected)) + "\n", "")
    assert run(capsys, *flags, "--stream") == (0, ",".join(map(str, expected)) + "\n", "")
    fields = json.loads(run(capsys, *flags, "--json")[1])
    assert (fields["ids"], fields["text"], fields["finish_reason"]) == (expected, None, "length")


def test_a_text_without_a_tokenizer_is_refused_before_the_model_is_read(
    golden_hf: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorport.models.language_model.load_model", None)
    for flags in (["--prompt", "The people"], ["--prompt-ids", "1,2", "--stop", "."]):
        status, out, err = run(capsys, "--model", golden_hf, *flags)
        assert (status, out) == (1, "")
        assert "found no tokenizer.json" in err
        assert "--prompt-ids" in err


def test_json_is_one_object_with_all_there_is(two_layers: Path, model: LanguageModel, capsys: Capture) -> None:
    expected = model.generate("The people", seed=3, stats=True, **SETTINGS)
    status, out, err = run(capsys, "--model", two_layers, "--prompt", "The people", "--seed", 3, *LENGTH, "--json")
    assert (status, err) == (0, "")
    fields = json.loads(out)
    assert list(fields) == ["ids", "text", "logprobs", "finish_reason", "stats"]
    assert (fields["ids"], fields["text"]) == (expected.ids, expected.text)
    assert fields["logprobs"] == pytest.approx(expected.logprobs)
    assert fields["stats"]["new_tokens"] == len(fields["ids"]) == 12
    assert fields["stats"]["weight_bytes_per_step"] == expected.stats.weight_bytes_per_step


def test_several_prompts_are_told_apart(two_layers: Path, model: LanguageModel, capsys: Capture) -> None:
    prompts = ["The people", "A word\nof the year " + "and more " * 20]
    expected = model.generate(prompts, seed=3, **SETTINGS)
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    _, out, _ = run(capsys, "--model", two_layers, *flags, "--seed", 3, *LENGTH)
    first, second = expected
    assert out.startswith(f"[1] The people\n{first}\n[2] A word of the year and more ")
    assert out.endswith(f"…\n{second}\n")
    fields = json.loads(run(capsys, "--model", two_layers, *flags, "--seed", 3, *LENGTH, "--json")[1])
    assert fields["text"] == expected
    assert [len(ids) for ids in fields["ids"]] == [12, 12]


def test_stats_and_logprobs(two_layers: Path, model: LanguageModel, capsys: Capture) -> None:
    expected = model.generate("The people", seed=3, logprobs=True, **SETTINGS)
    flags = ["--prompt", "The people", "--seed", 3, *LENGTH, "--logprobs", "--stats"]
    _, out, err = run(capsys, "--model", two_layers, *flags)
    assert out.startswith(f"{expected.text}\n")
    rows = re.findall(r"^ +(-\d+\.\d{4})  (\d+)  (['\"].*)$", out, re.MULTILINE)
    assert [int(token) for _, token, _ in rows] == expected.ids
    assert [float(logprob) for logprob, _, _ in rows] == pytest.approx(expected.logprobs, abs=6e-5)
    assert "new: 12 tokens" in err
    assert "weights read per step" in err


def test_float32_is_another_computation(two_layers: Path, model: LanguageModel, capsys: Capture) -> None:
    flags = ["--prompt", "The people", "--temperature", 0, *LENGTH, "--json"]
    other = json.loads(run(capsys, "--model", two_layers, *flags, "--dtype", "float32")[1])["logprobs"]
    own = model.generate("The people", temperature=0, logprobs=True, **SETTINGS).logprobs
    assert other[0] == pytest.approx(own[0], abs=0.2)
    assert other[0] != pytest.approx(own[0], abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model"),
        (["--model", "TINY"], "--prompt"),
        (["--model", "TINY", "--prompt", "a", "--prompt-ids", "1"], "not both"),
        (["--model", "TINY", "--prompt-ids", "1,x"], "found '1,x', expected numbers with commas"),
        (["--model", "TINY", "--prompt-ids", "519"], "519"),
        (["--model", "TINY", "--prompt", "-", "--prompt", "-"], "once"),
        (["--model", "TINY", "--prompt", "a", "--prompt", "b", "--stream"], "--stream"),
        (["--model", "TINY", "--prompt", "a", "--stream", "--json"], "--stream"),
        (["--model", "TINY", "--prompt", "a", "--dtype", "float16"], "float16"),
        (["--model", "TINY", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--model", "TINY", "--prompt", "a", "--top-p", "2"], "top_p"),
        (["--model", "TINY", "--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens"),
        (["--model", "TINY", "--prompt", "a", "--max-new-tokens", "131072"], "131072"),
        (["--model", "TINY", "--prompt", ""], "no tokens"),
    ],
)
def test_a_usage_error_exits_2_and_names_the_flag(
    two_layers: Path, capsys: Capture, flags: list[str], words: str
) -> None:
    status, out, err = run(capsys, *(str(two_layers) if flag == "TINY" else flag for flag in flags))
    assert (status, out) == (2, "")
    assert words in err


def test_a_missing_model_exits_1(tmp_path: Path, capsys: Capture) -> None:
    for flags in (["--prompt", "a"], ["--prompt-ids", "1"]):
        status, out, err = run(capsys, "--model", tmp_path / "missing", *flags)
        assert (status, out) == (1, "")
        assert "missing" in err


def test_no_control_character_reaches_a_terminal(two_layers: Path) -> None:
    # Hot enough that single bytes come, control characters among them.
    flags = ["--model", str(two_layers), "--prompt", "The people", "--temperature", "50", "--max-new-tokens", "100"]
    reader, writer = pty.openpty()
    job = subprocess.Popen(
        [sys.executable, "-m", "tensorport", "generate", *flags], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    shown = b""
    try:
        while piece := os.read(reader, 65536):
            shown += piece
    except OSError:  # the terminal's way to say that the other side is closed
        pass
    os.close(reader)
    assert job.wait(timeout=120) == 0
    assert job.stderr is not None
    job.stderr.close()
    text = tensorport.load_model(two_layers).generate("The people", temperature=50, max_new_tokens=100)
    controls = [c for c in text if ord(c) < 32 or 127 <= ord(c) < 160]
    assert set(controls) - {"\n", "\t"}
    printed = shown.decode().replace("\r\n", "\n")
    assert not re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)
    assert re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), printed) == f"{text}\n"
