"""TextStream: its pieces are the whole text, without half a character, cut at the first stop string."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tensorport.text import TextStream, Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

SPECIAL, UNASSIGNED = 400, 350

# What the byte-level vocabulary has beside single bytes: characters, parts of them, and more than one of them.
PARTS = [part.encode() for part in ("the", " the", "END", "EN", "DE", "ab", "aab", "é", "€", "猫", "😀", "\ufffd")]
PARTS += [b"\xf0\x9f", b"\x98\x80", b"\x9f\x98", b"\xe2\x82", b"\x82\xac", b"\xacA", b"a\xe7", b"\x80\x80", b"\xff"]


def with_special(model: models.Model, decoder: decoders.Decoder) -> Tokenizer:
    backend = Backend(model)
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    assert backend.token_to_id("<|end|>") == SPECIAL
    assert backend.id_to_token(UNASSIGNED) is None
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    """Ids 0 .. 255 are the bytes, the parts follow."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    # Printable bytes have letters of their own, for the others there are letters from 256 on, in order.
    others = iter(sorted(letter for letter in alphabet if ord(letter) >= 256))
    letters = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    vocab = {letters[byte]: byte for byte in range(256)}
    vocab |= {"".join(letters[byte] for byte in part): 256 + n for n, part in enumerate(PARTS)}
    return with_special(models.BPE(vocab | {"<|end|>": SPECIAL}, []), decoders.ByteLevel())


def pieces_of_sentences(decoder: decoders.Decoder) -> Tokenizer:
    """Blanks are ▁, and what is in no vocabulary is spelled in bytes."""
    words = ["▁the", "▁", "▁a", "ab", "END", "EN", "D", "é", "猫", "▁▁", ".", "▁END"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + n for n, word in enumerate(words)}
    return with_special(models.BPE(vocab | {"<|end|>": SPECIAL}, []), decoder)


def word_pieces() -> Tokenizer:
    words = ["[UNK]", "the", "##s", "##é", "猫", ".", "END", "##END", ",", "'", "a"]
    model = models.WordPiece({word: n for n, word in enumerate(words)} | {"<|end|>": SPECIAL}, unk_token="[UNK]")
    return with_special(model, decoders.WordPiece())


BLANKS_AND_BYTES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
TOKENIZERS = {
    "byte-level": byte_level(),
    "metaspace": pieces_of_sentences(decoders.Metaspace()),
    "byte fallback": pieces_of_sentences(decoders.Sequence(BLANKS_AND_BYTES)),
    "word pieces": word_pieces(),
}
BYTES = TOKENIZERS["byte-level"]
STOPS = ["END", "ENDE", "ND", "aab", "ab", "the ", "猫", "😀é", "b\n", "s."]


def ids_of(name: str) -> list[int]:
    return [id for id in range(SPECIAL + 1) if TOKENIZERS[name].token(id) is not None] + [UNASSIGNED]


def any_ids(name: str) -> st.SearchStrategy[list[int]]:
    """Ids in any order, and so characters in halves, bytes that are no UTF-8, and runs of either; or broken texts."""
    # Lists of some length, for a stream forgets what is long ago; hypothesis alone makes short ones.
    sizes = st.integers(0, 100)
    ids = sizes.flatmap(lambda size: st.lists(st.sampled_from(ids_of(name)), min_size=size, max_size=size + 20))
    if name == "word pieces":
        return ids
    letters = sizes.flatmap(lambda size: st.lists(st.sampled_from("😀猫éa."), min_size=size, max_size=size + 20))
    texts = letters.map(lambda text: list("".join(text).encode()))
    broken = st.builds(lambda text, lost: text[:lost] + text[lost + 1 :], texts, st.integers(0, 300))
    return st.one_of(ids, broken)


ANY_IDS = {name: any_ids(name) for name in TOKENIZERS}
TEXTS = st.text(
    st.sampled_from("aabENDthe \n猫é€😀\u0301\ufffd.") | st.characters(exclude_categories=["Cs"]), max_size=80
)
LETTERS = st.lists(st.sampled_from([*b"aabENDEthe", *range(256, 263), SPECIAL]), max_size=60)


def chunked(ids: Sequence[int], cuts: Sequence[int]) -> Iterator[Sequence[int]]:
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return (ids[start:end] for start, end in itertools.pairwise(places))


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, character by character; the longest of several."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


CUTS = st.lists(st.integers(0, 200), max_size=8)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), cuts=CUTS)
def test_pieces_of_any_ids_are_what_the_library_decodes(name: str, data: st.DataObject, cuts: list[int]) -> None:
    ids = data.draw(ANY_IDS[name])
    stream = TextStream(TOKENIZERS[name])
    text = "".join([*map(stream.push, chunked(ids, cuts)), stream.finish()])
    assert text == TOKENIZERS[name]._backend.decode(ids)
    assert (stream.stopped, stream.tokens_used) == (None, len(ids))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), cuts=CUTS, stops=st.lists(st.sampled_from(STOPS), min_size=1, max_size=4))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    name: str, data: st.DataObject, cuts: list[int], stops: list[str]
) -> None:
    ids = data.draw(ANY_IDS[name])
    stream = TextStream(TOKENIZERS[name], stops)
    text = "".join([*map(stream.push, chunked(ids, cuts)), stream.finish()])
    assert (text, stream.stopped) == cut_at(TOKENIZERS[name]._backend.decode(ids), stops)


@pytest.mark.parametrize(
    ("ids", "stops", "expected"),
    [
        ([*b"x ", 256 + PARTS.index(b"aab")], ["ab", "aab"], ("x ", "aab")),
        ([*b"x ", 256 + PARTS.index(b"aab")], ["aab", "a"], ("x ", "a")),
        ([*b"a", 256 + PARTS.index(b"END"), 68], ["ENDD", "ND"], ("aE", "ND")),
    ],
)
def test_of_several_stop_strings_in_one_id_the_first_complete_and_longest_counts(
    ids: list[int], stops: list[str], expected: tuple[str, str]
) -> None:
    for order in (stops, stops[::-1]):
        stream = TextStream(BYTES, order)
        assert (stream.push(ids), stream.stopped) == expected == cut_at(BYTES.decode(ids), order)


@given(text=TEXTS, stops=st.lists(st.sampled_from(STOPS), max_size=3))
@example(text="xENDE", stops=["ENDE", "ND"])
@example(text="aaab", stops=["aab"])
@example(text="a😀é", stops=["😀é"])
def test_a_text_in_single_bytes_is_given_out_as_soon_as_it_can_be(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(BYTES, stops), ""
    for end, byte in enumerate(text.encode(), start=1):
        shown += stream.push([byte])
        whole, stopped = cut_at(text.encode()[:end].decode(errors="replace"), stops)
        if stopped is None:
            whole = whole.removesuffix("\ufffd")  # perhaps half a character
            held = [n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])]
            whole = whole[: len(whole) - max(held, default=0)]
        assert (shown, stream.stopped) == (whole, stopped)
    assert (shown + stream.finish(), stream.stopped) == cut_at(text, stops)


@given(ids=LETTERS, cuts=CUTS, stops=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3))
def test_ids_are_counted_to_the_one_that_completes_the_stop_string(
    ids: list[int], cuts: list[int], stops: list[str]
) -> None:
    stream = TextStream(BYTES, stops)
    for chunk in chunked(ids, cuts):
        stream.push(chunk)
    ends = [end for end in range(len(ids) + 1) if any(stop in BYTES._backend.decode(ids[:end]) for stop in stops)]
    assert stream.tokens_used == min(ends, default=len(ids))


def test_an_emoji_in_four_ids_comes_whole() -> None:
    stream = TextStream(BYTES)
    assert [stream.push([byte]) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_a_replacement() -> None:
    stream = TextStream(BYTES)
    assert stream.push("a😀".encode()[:-1]) == "a"
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


def test_a_stop_string_may_lie_across_ids_and_nothing_of_it_is_seen() -> None:
    stream = TextStream(BYTES, "END")
    ids = [*b"a E", *b"EN", 256 + PARTS.index(b"DE"), *b"more"]
    assert [stream.push([id]) for id in ids] == ["a", " ", "", "E", "", "", "", "", "", ""]
    assert (stream.stopped, stream.tokens_used, stream.finish()) == ("END", 6, "")


def test_what_only_began_as_a_stop_string_is_shown_in_the_end() -> None:
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(b"xE"), stream.push(b"N"), stream.push(b"e"), stream.push(b"EN")] == ["x", "", "ENe", ""]
    assert (stream.finish(), stream.stopped) == ("EN", None)


def test_special_tokens_are_shown_on_demand() -> None:
    assert TextStream(BYTES).push([97, SPECIAL, 98]) == "ab"
    assert TextStream(BYTES, "<|end|>", skip_special_tokens=False).push([97, SPECIAL, 98]) == "a"


@pytest.mark.parametrize("ids", ["text", "halves", "no UTF-8", "special", "replacements"])
def test_an_id_costs_the_decoding_of_a_few_however_long_the_text_is(ids: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    stream = TextStream(BYTES, ["never"])
    patterns = {"text": b"the cat ", "halves": "😀".encode(), "no UTF-8": b"\xff\x80\xf0\x9f"}
    patterns |= {"special": bytes(1), "replacements": "\ufffd".encode()}
    pattern = [SPECIAL, 97] if ids == "special" else list(patterns[ids])
    costs = []
    for id in pattern * (4000 // len(pattern)):
        before = decoded
        stream.push([id])
        costs.append(decoded - before)
    assert max(costs) < 100
    assert sum(costs[-1000:]) <= sum(costs[1000:2000]) * 1.1


def test_bad_arguments_are_value_errors() -> None:
    with pytest.raises(ValueError, match="stop: found an empty string"):
        TextStream(BYTES, ["a", ""])
    with pytest.raises(ValueError, match="ids: found -1"):
        TextStream(BYTES).push([-1])
