"""load_model and LanguageModel: logits, generation and chats as users call them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray
from tensorport import CheckpointError, LanguageModel
from tensorport.models import Generation, gpt_oss

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def golden(golden_hf: Path) -> dict[str, NDArray[Any]]:
    with np.load(golden_hf / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(golden_hf: Path) -> LanguageModel:
    """Without a tokenizer."""
    return tensorport.load_model(golden_hf, dtype="float32")


@pytest.fixture(scope="module")
def speaker(two_layers: Path) -> LanguageModel:
    """With a tokenizer of 256 bytes and harmony's tokens."""
    return tensorport.load_model(two_layers)


def test_calling_the_model_gives_logits(model: LanguageModel, golden: dict[str, NDArray[Any]]) -> None:
    logits = model(golden["input_ids"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(logits, model(jnp.asarray(golden["input_ids"])))


def test_ids_that_cannot_be_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"input_ids: found 3 \.\. 519, expected ids between 0 and 518"):
        model(np.array([[3, 519]]))
    with pytest.raises(ValueError, match=r"input_ids: found int64 \(2,\), expected integers \[B, T\]"):
        model(np.array([3, 4]))
    with pytest.raises(ValueError, match="input_ids: found float64"):
        model(np.array([[0.5]]))
    for empty in (np.zeros((1, 0), np.int32), jnp.zeros((0, 2), jnp.int32)):
        with pytest.raises(ValueError, match=r"input_ids: found int32 \(\d, \d\), expected integers .*at least one"):
            model(empty)
    for row in ([True, False], [1.0, 2.0]):
        with pytest.raises(TypeError, match=r"prompts\[0\]: found (bool|float64), expected integers"):
            model.generate(row)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompts\[1\]: found token -1"):
        model.generate([[3], [-1]])
    with pytest.raises(ValueError, match=r"prompts\[0\]: found no tokens"):
        model.generate([[]])
    with pytest.raises(TypeError, match="prompt: found texts and ids"):
        model.generate(["a", [1]])  # type: ignore[arg-type]
    wrong: list[Any] = [None, 5, {"a": 1}, b"ab"]
    for prompt in wrong:
        with pytest.raises(TypeError, match=f"prompt: found {type(prompt).__name__}, expected a text, ids, or a list"):
            model.generate(prompt)
    with pytest.raises(ValueError, match="max_positions: found 131072, expected at least 131073"):
        model.generate([[1]], max_new_tokens=131072)


def test_greedy_ids_are_those_of_transformers(model: LanguageModel, golden: dict[str, NDArray[Any]]) -> None:
    prompt, expected = golden["input_ids"][:1], golden["greedy_ids"]
    ids = model.generate(prompt, **GREEDY)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected[None])
    np.testing.assert_array_equal(model.generate(prompt[0], **GREEDY), expected)
    assert model.generate(prompt[0].tolist(), **GREEDY) == expected.tolist()
    # In a batch of other lengths, in chunks of a prompt, and as a stream.
    ragged = [prompt[0].tolist(), golden["input_ids"][1, :7].tolist(), [5]]
    rows = model.generate(ragged, **GREEDY)
    assert rows[0] == expected.tolist()
    assert [len(row) for row in rows] == [45 + 24, 7 + 24, 1 + 24]
    assert model.generate(prompt, chunk=16, **GREEDY).tolist() == [expected.tolist()]
    pieces = list(model.generate(prompt[0], stream=True, **GREEDY))
    assert len(pieces) > 1
    assert [token for piece in pieces for token in piece] == expected[45:].tolist()


def test_logprobs_are_those_of_uncached_logits(model: LanguageModel, golden: dict[str, NDArray[Any]]) -> None:
    found = model.generate(golden["input_ids"], logprobs=True, seed=7, max_new_tokens=9, ignore_eos=True)
    assert isinstance(found, Generation)
    assert found.finish_reason == ["length"] * 2
    assert found.text is None
    ids = np.concatenate([golden["input_ids"], found.ids], axis=1)
    logits = np.asarray(model(ids[:, :-1]), np.float64)[:, -9:]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logprobs, np.asarray(found.ids)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=2e-4)


def test_stats_say_what_was_done(model: LanguageModel, golden: dict[str, NDArray[Any]]) -> None:
    found = model.generate(golden["input_ids"], stats=True, **GREEDY)
    stats = found.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (90, 48)
    assert stats.first_token_s is not None
    assert 0 < stats.prefill_s <= stats.first_token_s
    assert stats.tokens_per_s is not None
    # By hand: 2 rows touch all 6 experts of 3 each at most, two rows of the embeddings, and all the rest.
    total = sum(
        np.prod(spec.shape) * (4 if spec.dtype.itemsize == 2 else 1)
        for spec in tensorport.open(model.folder).specs.values()
    )
    assert stats.weight_bytes_per_step == total - 519 * 96 * 4 + 2 * 96 * 4
    one = model.decoder.bytes_per_token(model.params)
    experts = 4 * (2 * 160 * 3 * 17 + 96 * 5 * 17 + (2 * 160 + 96) * 4) * 6
    assert one == total - 519 * 96 * 4 + 96 * 4 - experts // 2
    # Buckets of 128 for two full layers, 8 slots for two sliding ones, 2 heads of 32 in float32, keys and values.
    assert stats.cache_bytes == 2 * 2 * (2 * 128 + 2 * 8) * 2 * 32 * 4 + 2 * 4
    assert "tokens/s" in repr(stats)
    assert json.loads(stats.to_json())["new_tokens"] == 48


def test_rows_end_at_end_tokens_and_at_stop(model: LanguageModel, golden: dict[str, NDArray[Any]]) -> None:
    prompt, expected = golden["input_ids"][:1], golden["greedy_ids"][45:].tolist()
    ids = model.generate(prompt, stop=expected[5], temperature=0)
    assert ids[0, 45:].tolist() == expected[: expected.index(expected[5]) + 1]
    found = model.generate(prompt, stop=[expected[5], 3], temperature=0, stats=True)
    assert found.finish_reason == ["stop"]
    # The checkpoint's own end token is 518; a model that makes it at once stops there, unless told otherwise.
    with pytest.raises(CheckpointError, match=r"found no tokenizer\.json"):
        model.generate(prompt, stop="text")
    with pytest.raises(TypeError, match=r"stop: found 1\.5, expected strings and token ids"):
        model.generate(prompt, stop=[1.5])  # type: ignore[list-item]


def test_ids_may_be_scalars_of_any_library(model: LanguageModel, golden: dict[str, NDArray[Any]]) -> None:
    prompt, greedy = golden["input_ids"][0], golden["greedy_ids"]
    stop = greedy[len(prompt) + 3]
    for ids in (list(prompt), list(jnp.asarray(prompt))):
        new = model.generate(ids, **GREEDY, stop=stop)[len(prompt) :]
        assert new == greedy[len(prompt) :][: len(new)].tolist()
        assert new[-1] == stop


def test_rows_that_end_early_are_padded(model: LanguageModel, golden: dict[str, NDArray[Any]]) -> None:
    alone = [model.generate(row, **GREEDY)[45:].tolist() for row in golden["input_ids"]]
    stop = alone[0][3]
    assert stop not in alone[1][:4]
    ids = model.generate(golden["input_ids"], stop=stop, temperature=0, max_new_tokens=8)
    assert ids.shape == (2, 53)
    assert ids[0, 45:49].tolist() == alone[0][:4]
    assert set(ids[0, 49:].tolist()) == {517}  # pad_token_id of the config


def test_padding_that_is_no_token_of_the_model_is_not_used(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "folder", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 2**32 - 1, "eos_token_id": [519, 77]}))
    first, second = model.generate(np.array([[1], [2]]), **GREEDY | {"max_new_tokens": 2}).tolist()
    ended = model.generate(np.array([[1], [2]]), **GREEDY | {"max_new_tokens": 2}, stop=[second[1]])
    assert ended.tolist() == [first, [2, second[1], 77]]


def test_text_needs_a_tokenizer_and_says_that_ids_work(model: LanguageModel) -> None:
    with pytest.raises(CheckpointError, match=r"found no tokenizer\.json.*prompts have to be ids"):
        model.generate("text")


def test_text_comes_out_as_it_streams(speaker: LanguageModel) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "seed": 3}
    text = speaker.generate("Grüße, 🦀!", **settings)
    assert isinstance(text, str)
    pieces = list(speaker.generate("Grüße, 🦀!", stream=True, **settings))
    assert "".join(pieces) == text
    found = speaker.generate("Grüße, 🦀!", stats=True, **settings)
    assert found.text == text
    assert speaker.tokenizer.decode(found.ids) == text
    assert found.stats.prompt_tokens == len(speaker.tokenizer.encode("Grüße, 🦀!"))
    several = speaker.generate(["Grüße, 🦀!", "b"], **settings)
    assert len(several) == 2
    assert several[0] == text


def test_stop_strings_are_no_part_of_the_text(speaker: LanguageModel) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "seed": 4, "ignore_eos": True}
    text = speaker.generate("Once", **settings)
    stop = text[9:12]
    assert len(stop) == 3
    found = speaker.generate("Once", stop=["never there", stop], stats=True, **settings)
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"
    assert len(found.ids) == len(found.logprobs) < 40
    assert "".join(speaker.generate("Once", stop=stop, stream=True, **settings)) == found.text


def test_a_chat_answers_and_goes_on(speaker: LanguageModel) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    reply = speaker.chat(messages, max_new_tokens=30, reasoning_effort="low")
    assert reply.message["role"] == "assistant"
    assert reply.stats.new_tokens <= 30
    messages.append(reply.message)
    messages.append({"role": "user", "content": "And 3 + 3?"})
    stream = speaker.chat(messages, max_new_tokens=30, stream=True)
    deltas = list(stream)
    texts = "".join(delta.text for delta in deltas if delta.channel == "final")
    assert stream.reply.text == texts
    assert speaker.chat("What is 2 + 2?", max_new_tokens=30, reasoning_effort="low").text == reply.text
    with pytest.raises(TypeError, match="chat: found the argument 'stats', expected some of temperature, top_k"):
        speaker.chat("What is 2 + 2?", stats=True)


def test_a_model_and_what_it_wrote_show_in_a_few_lines(speaker: LanguageModel) -> None:
    assert repr(speaker).endswith("/two_layers': 704.62 kB>")
    result = speaker.generate("Once", max_new_tokens=30, seed=4, ignore_eos=True, stats=True)
    first, *rest = repr(result).splitlines()
    assert first.startswith(f"Generation(ids=[{result.ids[0]}, {result.ids[1]}, ")
    assert first.count(", ...]") == 2  # ids and logprobs
    assert repr(result.text[:50])[1:-1] in first
    assert "finish_reason='length'" in first
    assert "\n".join(["GenerationStats", *rest]) == f"{result.stats!r})"


def test_completion_offers_the_public_names_alone() -> None:
    assert dir(tensorport) == sorted(tensorport.__all__)


def test_a_chat_reads_the_channels_that_a_model_writes(speaker: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    written = (
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        '<|constrain|>json<|message|>{"a": 2}<|call|>'
    )
    ids = speaker.tokenizer.encode(written)

    def steps(_: object) -> Iterator[tuple[list[list[int]], list[str]]]:
        for token in ids:
            yield [[token]], [""]

    monkeypatch.setattr("tensorport.models.generation.TextGeneration.steps", steps)
    reply = speaker.chat(
        "Add.",
        tools=[
            {
                "type": "function",
                "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
            }
        ],
    )
    assert (reply.analysis, reply.text) == ("Easy.", "")
    assert [(call.name, call.parsed) for call in reply.tool_calls] == [("add", {"a": 2})]


def test_what_is_no_model_is_refused_by_name(tmp_path: Path, golden_hf: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tensorport.load_model(tmp_path / "nowhere")
    shutil.copytree(golden_hf, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    fields = json.loads(config.read_text())
    for content, message in (
        (None, "found no config.json, expected one beside the tensors"),
        ("{", "config.json: found no JSON"),
        ("[]", "config.json: found list, expected a JSON object"),
        (
            json.dumps({**fields, "model_type": "llama\x1b[2J"}),
            r"found model_type 'llama\\x1b.*', expected one of 'gpt_oss'",
        ),
        ("{}", "found no model_type, expected one of 'gpt_oss'"),
    ):
        config.unlink(missing_ok=True)
        if content is not None:
            config.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            tensorport.load_model(tmp_path / "model")


def test_tensors_that_do_not_fit_the_configuration_are_all_named(tmp_path: Path, golden_hf: Path) -> None:
    shutil.copytree(golden_hf, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "num_local_experts": 7, "vocab_size": 520}))
    with pytest.raises(
        tensorport.MappingError, match=r"(?s)embed_tokens\.weight: found .*519.*520.*mlp\.router\.weight"
    ):
        tensorport.load_model(tmp_path / "model")


def test_only_dtypes_that_the_model_can_be_computed_in_are_taken(golden_hf: Path) -> None:
    with pytest.raises(ValueError, match="dtype: found float16, expected bfloat16 or float32"):
        tensorport.load_model(golden_hf, dtype="float16")


def test_a_single_file_is_a_source(golden_original: Path, golden: dict[str, NDArray[Any]]) -> None:
    model = gpt_oss.load(golden_original / "model.safetensors", dtype="float32")
    np.testing.assert_allclose(model(golden["input_ids"]), golden["logits"], rtol=0, atol=1e-4)


def test_weights_of_a_converted_tree_are_not_copied(tmp_path: Path, tiny: Path) -> None:
    tensorport.convert(tiny, tmp_path / "tree", progress=False)
    report = tensorport.load_model(tmp_path / "tree").report
    assert report.bytes_read == 0
    assert report.shared_bytes == report.mapped_bytes == report.nbytes


def test_importing_tensorport_imports_neither_jax_nor_models() -> None:
    code = (
        "import sys, tensorport; print(sorted({'jax', 'tokenizers', 'jinja2', 'tensorport.models'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"
