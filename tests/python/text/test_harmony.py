"""HarmonyParser: what gpt-oss writes, in every order that it uses, and what no model should write."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorport.text import (
    ChatReply,
    HarmonyDelta,
    HarmonyMessage,
    HarmonyParser,
    Tokenizer,
    ToolCall,
    reply,
    stop_token_ids,
)

HARMONY = ["start", "channel", "message", "end", "return", "call", "constrain", "endoftext", "startoftext"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny)


def parsed(
    tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int] = ()
) -> tuple[list[HarmonyDelta], list[HarmonyMessage]]:
    parser = HarmonyParser(tokenizer)
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    deltas = [delta for start, end in itertools.pairwise(places) for delta in parser.push(ids[start:end])]
    return deltas + parser.finish(), parser.messages


def messages_of(tokenizer: Tokenizer, text: str) -> list[HarmonyMessage]:
    ids = tokenizer.encode(text)
    deltas, messages = parsed(tokenizer, ids)
    one_by_one, same = parsed(tokenizer, ids, range(len(ids)))
    assert same == messages
    for found in (deltas, one_by_one):
        assert "".join(delta.text for delta in found) == "".join(message.content for message in messages)
    return messages


def message(
    channel: str, content: str, recipient: str | None = None, content_type: str | None = None
) -> HarmonyMessage:
    return HarmonyMessage("assistant", channel, recipient, content_type, content)


WEATHER = '{"location": "Tokyo"}'
CALL = ("commentary", WEATHER, "functions.get_weather")


# Sources: openai/harmony, docs/format.md and tests/test_harmony.py.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<|channel|>analysis<|message|>Simple arithmetic.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>",
            [message("analysis", "Simple arithmetic."), message("final", "2 + 2 = 4.")],
        ),
        (
            f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{WEATHER}<|call|>",
            [message(*CALL, "<|constrain|>json")],
        ),
        (
            f"<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{WEATHER}<|call|>",
            [message(*CALL, "<|constrain|>json")],
        ),
        (
            f" to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{WEATHER}<|call|>",
            [message(*CALL, "<|constrain|>json")],
        ),
        (
            "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.get_weather<|channel|>"
            f"commentary json<|message|>{WEATHER}<|call|>",
            [message("analysis", "Look."), message(*CALL, "json")],
        ),
        (
            "<|start|>assistant to=functions.get_weather<|channel|>commentary<|constrain|>json<|message|>{}<|call|>",
            [message("commentary", "{}", "functions.get_weather", "<|constrain|>json")],
        ),
        (
            "<|channel|>analysis to=browser.search code<|message|>{}<|call|>",
            [message("analysis", "{}", "browser.search", "code")],
        ),
        ("<|channel|>commentary functions.f<|message|>{}<|call|>", [message("commentary", "{}", "functions.f")]),
        (
            "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
            [message("final", "{}", None, "<|constrain|>json")],
        ),
        (
            "<|channel|>commentary<|message|>First the plan.<|end|><|start|>assistant<|channel|>final<|message|>So.",
            [message("commentary", "First the plan."), message("final", "So.")],
        ),
        (
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>4<|end|>",
            [HarmonyMessage("functions.f", "commentary", "assistant", None, "4")],
        ),
        ("<|message|>No channel.<|return|>", [message("final", "No channel.")]),
        ("<|channel|>final<|startoftext|><|message|>x<|return|>", [message("final", "x")]),
    ],
)
def test_messages_have_their_channel_recipient_type_and_content(
    tokenizer: Tokenizer, text: str, expected: list[HarmonyMessage]
) -> None:
    assert messages_of(tokenizer, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("Hello, world.", [("final", "Hello, world.")]),
        ("to be or not", [("final", "to be or not")]),
        ("to", [("final", "to")]),
        ("Hello<|return|>", [("final", "Hello")]),
        ("<|channel|>final<|message|>cut o", [("final", "cut o")]),
        ("<|channel|>analysis Thinking about all of it<|end|>", [("analysis", "Thinking about all of it")]),
        ("<|channel|>final<|end|>", [("final", "")]),
        ("<|channel|>finally<|message|>x<|end|>", [("final", "x")]),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", [("analysis", "a"), ("final", "b")]),
        ("<|channel|>analysis<|message|>a<|start|>assistant<|message|>b", [("analysis", "a"), ("final", "b")]),
        ("<|channel|>analysis<|message|>a<|message|>b<|constrain|>c", [("analysis", "abc")]),
        ("<|channel|>analysis<|channel|>final<|message|>b", [("analysis", ""), ("final", "b")]),
        ("a<|end|>\n<|start|>assistant<|channel|>final<|message|>b", [("final", "a"), ("final", "b")]),
        ("<|start|>assistant and so on", [("final", "and so on")]),
        ("<|start|>somebody said so", [("final", "somebody said so")]),
        ("<|start|>hello", [("final", "hello")]),
        ("<|start|>assistant<|channel|>other", [("final", "other")]),
        ("<|start|>hello<|channel|>fin", [("final", "hellofin")]),
        ("<|end|><|end|><|return|><|call|><|start|><|start|>", []),
        ("<|startoftext|><|constrain|>", [("final", "")]),
    ],
)
def test_what_is_malformed_is_text_and_mostly_the_answer(
    tokenizer: Tokenizer, text: str, expected: list[tuple[str, str]]
) -> None:
    assert [(message.channel, message.content) for message in messages_of(tokenizer, text)] == expected


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>",
        "<|channel|>anal",
        "<|channel|>commentary to=functions.get_w",
        "<|channel|>commentary to=functions.f <|constrain|>js",
        "<|start|>",
        "<|start|>assist",
        "<|start|>assistant to=functions.f<|channel|>comm",
    ],
)
def test_a_header_that_is_cut_off_is_no_text(tokenizer: Tokenizer, header: str) -> None:
    begun = "<|channel|>analysis<|message|>Hm.<|end|>"
    assert messages_of(tokenizer, header) == []
    assert messages_of(tokenizer, begun + header) == [message("analysis", "Hm.")]


def test_a_text_that_looks_like_a_header_comes_before_it_is_long(tokenizer: Tokenizer) -> None:
    parser = HarmonyParser(tokenizer)
    ids = tokenizer.encode("to=" + "x" * 500)
    shown = [delta for id in ids[:100] for delta in parser.push([id])]
    assert "".join(delta.text for delta in shown) == tokenizer.decode(ids[:100])


def test_text_comes_as_soon_as_its_ids_do(tokenizer: Tokenizer) -> None:
    parser = HarmonyParser(tokenizer)
    marker = {name: tokenizer.token_id(f"<|{name}|>") or 0 for name in HARMONY}
    assert parser.push([marker["channel"], *tokenizer.encode("analysis")]) == []
    assert parser.push([marker["message"], *tokenizer.encode("Hm")]) == [HarmonyDelta("analysis", None, "Hm")]
    emoji = tokenizer.encode("😀")
    assert len(emoji) == 4
    assert [parser.push([id]) for id in emoji] == [[], [], [], [HarmonyDelta("analysis", None, "😀")]]
    # Two messages in one call: one delta for each.
    rest = tokenizer.encode("!<|end|><|start|>assistant<|channel|>final<|message|>Yes, all of it.")
    assert parser.push(rest) == [HarmonyDelta("analysis", None, "!"), HarmonyDelta("final", None, "Yes, all of it.")]
    assert parser.messages == [message("analysis", "Hm😀!")]
    assert parser.push(emoji[:2]) == []
    assert parser.finish() == [HarmonyDelta("final", None, "\ufffd")]
    assert parser.messages[1:] == [message("final", "Yes, all of it.\ufffd")]
    assert parser.finish() == []
    assert len(parser.messages) == 2


def test_two_messages_of_one_channel_are_two_deltas(tokenizer: Tokenizer) -> None:
    message = "<|channel|>analysis<|message|>{}<|end|>"
    deltas, _ = parsed(tokenizer, tokenizer.encode(message.format("One.") + message.format("Two.")))
    assert deltas == [HarmonyDelta("analysis", None, "One."), HarmonyDelta("analysis", None, "Two.")]


def test_recipients_are_in_the_deltas(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|channel|>commentary to=functions.f json<|message|>{}<|call|>")
    assert parsed(tokenizer, ids)[0] == [HarmonyDelta("commentary", "functions.f", "{}")]


WORDS = [
    "assistant",
    "analysis",
    "commentary",
    "final",
    " to=",
    "functions.f",
    " json",
    "to",
    "=",
    " ",
    "\n",
    "{}",
    "a",
]


@given(data=st.data(), cuts=st.lists(st.integers(0, 300), max_size=6))
def test_garbage_never_raises_and_nothing_is_said_twice(
    tokenizer: Tokenizer, data: st.DataObject, cuts: list[int]
) -> None:
    markers = [[tokenizer.token_id(f"<|{name}|>") or 0] for name in HARMONY]
    words = [tokenizer.encode(word) for word in WORDS]
    any_id = st.lists(st.integers(0, 600), min_size=1, max_size=1)
    parts = data.draw(st.lists(st.one_of(st.sampled_from(markers), st.sampled_from(words), any_id), max_size=60))
    ids = [id for part in parts for id in part]
    deltas, messages = parsed(tokenizer, ids, cuts)
    assert "".join(delta.text for delta in deltas) == "".join(message.content for message in messages)
    assert parsed(tokenizer, ids)[1] == messages
    assert {delta.channel for delta in deltas} <= {"analysis", "commentary", "final"}
    answer = reply(messages)
    assert answer.text == "".join(m.content for m in messages if m.channel == "final" and m.recipient is None)
    assert json.loads(json.dumps(answer.message)) == answer.message
    assert repr(answer).startswith("ChatReply(text=")


@given(ids=st.lists(st.integers(0, 600), max_size=120))
def test_text_without_markers_is_all_shown(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [id for id in ids if not tokenizer.is_special(id)]
    deltas, messages = parsed(tokenizer, ids, range(len(ids)))
    text = tokenizer.decode(ids)
    shown = "".join(delta.text for delta in deltas)
    # Blanks alone, and blanks before a recipient, are no text.
    assert shown == text or (not shown and not text.strip())
    assert messages in ([], [message("final", text)])


@given(ids=st.lists(st.integers(0, 509), max_size=80))
def test_content_is_what_stands_between_its_markers(tokenizer: Tokenizer, ids: list[int]) -> None:
    header = tokenizer.encode("<|channel|>analysis<|message|>")
    end = tokenizer.encode("<|end|>")
    assert parsed(tokenizer, header + ids + end)[1] == [message("analysis", tokenizer.decode(ids))]


def test_a_tokenizer_without_harmony_makes_one_answer(minilm: Path) -> None:
    plain = Tokenizer.from_directory(minilm)
    assert plain.token_id("<|channel|>") is None
    ids = plain.encode("a short text", add_special_tokens=False)
    deltas, messages = parsed(plain, ids)
    assert messages == [message("final", "a short text")]
    assert deltas == [HarmonyDelta("final", None, "a short text")]


def test_an_answer_ends_at_return_call_and_what_the_checkpoint_says(tokenizer: Tokenizer) -> None:
    ids = {name: tokenizer.token_id(f"<|{name}|>") for name in HARMONY}
    assert stop_token_ids(tokenizer) == [ids["return"], ids["call"], ids["endoftext"]]
    tokenizer = Tokenizer(tokenizer._backend, eos_token_ids=[7])
    assert stop_token_ids(tokenizer) == [ids["return"], ids["call"], ids["endoftext"], 7]


def test_a_reply_has_the_answer_the_reasoning_and_the_calls() -> None:
    messages = [
        message("analysis", "First."),
        message("analysis", "Then."),
        message("commentary", "I look it up."),
        message("commentary", WEATHER, "functions.get_weather", "json"),
        message("analysis", "print(", "python", "code"),
        message("final", "It is "),
        message("final", "warm."),
    ]
    answer = reply(iter(messages), stats={"tokens": 5})
    calls = (ToolCall("get_weather", WEATHER, {"location": "Tokyo"}), ToolCall("python", "print(", None))
    assert answer == ChatReply("It is warm.", "First.\nThen.", "I look it up.", calls, {"tokens": 5})
    assert str(answer) == "It is warm."


@pytest.mark.parametrize("arguments", ["[1]", "3", "", "{", "[" * 100_000, '{"a": 1} x'], ids=range(6))
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    assert reply([message("commentary", arguments, "functions.f")]).tool_calls == (ToolCall("f", arguments, None),)


def test_a_repr_shows_what_there_is_and_cuts_it() -> None:
    assert repr(ChatReply("Hi.")) == "ChatReply(text='Hi.')"
    shown = repr(ChatReply("x" * 1000, "Hm.", tool_calls=(ToolCall("f", "{}", {}),), stats=3))
    assert "… (1000 characters)" in shown
    assert shown.endswith("analysis='Hm.', tool_calls=(ToolCall(name='f', arguments='{}', parsed={}),), stats=3)")
    assert len(shown) < 400


@pytest.mark.parametrize("content", ["", "Warm."])
@pytest.mark.parametrize("analysis", ["", "Hm."])
@pytest.mark.parametrize("commentary", ["", "Wait."])
@pytest.mark.parametrize("arguments", [None, WEATHER, "no JSON"])
def test_the_message_of_a_reply_goes_through_the_chat_template(
    tokenizer: Tokenizer, content: str, analysis: str, commentary: str, arguments: str | None
) -> None:
    messages = [message("analysis", analysis), message("commentary", commentary), message("final", content)]
    if arguments is not None:
        messages.append(message("commentary", arguments, "functions.get_weather", "json"))
    answer = reply(messages).message
    history = [{"role": "user", "content": "How warm is it?"}, answer]
    if arguments is None:
        prompt = tokenizer.chat_prompt([*history, {"role": "user", "content": "And now?"}])
        written = f"<|start|>assistant<|channel|>final<|message|>{content}<|end|>"
    else:
        prompt = tokenizer.chat_prompt([*history, {"role": "tool", "content": "22"}])
        reasoning = analysis or commentary + content
        written = f"<|start|>assistant<|channel|>analysis<|message|>{reasoning}<|end|>" if reasoning else ""
        written += "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
        written += (WEATHER if arguments == WEATHER else '"no JSON"') + "<|call|>"
        written += '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"22"<|end|>'
    asked = "<|start|>user<|message|>How warm is it?<|end|>"
    assert asked + written in prompt
    # What the template writes of an answer, the parser reads.
    body = written.removeprefix("<|start|>assistant").split("<|start|>functions.get_weather to=assistant")[0]
    read = reply(messages_of(tokenizer, body))
    assert (read.text, len(read.tool_calls)) == (content if arguments is None else "", arguments is not None)
