"""The text files of synthesized checkpoints: a byte-level BPE tokenizer with harmony's special tokens, a chat template.

Nothing is downloaded and no library is needed: merges are learnt here, from a list of common English words.
"""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, Final

__all__ = ["default_ids", "special_ids", "text_files"]

# o200k_harmony, as openai/gpt-oss has it in gpt_oss/tokenizer.py; other ids from 199,998 on are reserved.
_GPT_OSS_IDS: Final = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}

# The same in a smaller vocabulary: its last ids, in this order.
_LAST: Final = (
    "<|startoftext|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endoftext|>",
    "<|return|>",
)

# The most common words of English, most common first.
_COMMON_WORDS: Final = """
the of and to a in is you that it he was for on are as with his they I at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who oil its now find long down day did get come made may part over new sound take only little work know
place year live me back give most very after thing our just name good sentence man think say great where help through
much before line right too mean old any same tell boy follow came want show also around form three small set put end
does another well large must big even such because turn here why ask went men read need land different home us move try
kind hand picture again change off play spell air away animal house point page letter mother answer found study still
learn should world
"""

_TEMPLATE: Final = Path(__file__).parent / "text" / "gpt_oss_chat_template.jinja"


def default_ids(vocab_size: int) -> dict[str, int]:
    """`eos_token_id` and `pad_token_id` of a vocabulary of this size."""
    if vocab_size > max(_GPT_OSS_IDS.values()):
        return {"eos_token_id": _GPT_OSS_IDS["<|return|>"], "pad_token_id": _GPT_OSS_IDS["<|endoftext|>"]}
    return {"eos_token_id": max(0, vocab_size - 1), "pad_token_id": max(0, vocab_size - 2)}


def special_ids(config: dict[str, Any]) -> dict[str, int] | None:
    """The ids of the special tokens; None where config.json leaves them no room beside 256 bytes.

    `<|return|>` is config.json's `eos_token_id`, `<|endoftext|>` its `pad_token_id` if that is another.
    """
    size, eos, pad = (config[field] for field in ("vocab_size", "eos_token_id", "pad_token_id"))
    if size < 256 + len(_LAST) or max(eos, pad) >= size:
        return None
    ids = {"<|return|>": eos} | ({"<|endoftext|>": pad} if pad != eos else {})
    taken = {eos, pad}
    if size > max(_GPT_OSS_IDS.values()):
        wanted = {token: id for token, id in _GPT_OSS_IDS.items() if token not in ids and id not in taken}
        ids |= wanted
        taken |= set(wanted.values())
    free = (id for id in range(size - 1, -1, -1) if id not in taken)
    for token in reversed(_LAST):
        if token not in ids:
            ids[token] = next(free)
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def text_files(config: dict[str, Any]) -> dict[str, Any]:
    """Contents by file name: texts, or values for JSON. Nothing where :func:`special_ids` finds no room."""
    ids = special_ids(config)
    if ids is None:
        return {}
    by_id = {id: token for token, id in ids.items()}
    return {
        "tokenizer.json": _tokenizer(config["vocab_size"], ids),
        "tokenizer_config.json": {
            "bos_token": "<|startoftext|>",
            "clean_up_tokenization_spaces": False,
            "eos_token": by_id[config["eos_token_id"]],
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config["max_position_embeddings"],
            "pad_token": by_id[config["pad_token_id"]],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "chat_template.jinja": _TEMPLATE.read_text("utf-8"),
    }


def _tokenizer(vocab_size: int, special: dict[str, int]) -> dict[str, Any]:
    """tokenizer.json: bytes, then what merges make, then pairs of words that only a model can write."""
    reserved = set(special.values())
    if vocab_size > max(_GPT_OSS_IDS.values()):
        reserved |= set(range(min(_GPT_OSS_IDS.values()), vocab_size))
    free = [id for id in range(vocab_size) if id not in reserved]
    letters, words = list(_byte_letters().values()), _COMMON_WORDS.split()
    merges = _learn_merges(words, len(free) - len(letters))
    # The names of the vocabulary, each once, as many as there are ids.
    names = dict.fromkeys(itertools.chain(letters, map("".join, merges)))
    for several in itertools.chain(itertools.product(words, repeat=2), itertools.product(words, repeat=3)):
        if len(names) >= len(free):
            break
        names["Ġ" + "".join(several)] = None
    vocab = dict(zip(names, free, strict=False)) | special
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, id in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _byte_letters() -> dict[int, str]:
    """The letter of each byte in byte-level vocabularies: its own where that is printable; Ġ is a blank.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _learn_merges(words: list[str], limit: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: joins the most frequent pair, again and again, until each word is one token."""
    # Word frequencies fall as one over the rank; whole numbers, so that every machine finds the same.
    weighted = [(list("Ġ" + word), 10_000 // (rank + 1)) for rank, word in enumerate(words)]
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, weight in weighted:
            for pair in itertools.pairwise(parts):
                pairs[pair] += weight
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts, _ in weighted:
            for i in range(len(parts) - 2, -1, -1):
                if parts[i : i + 2] == [*best]:
                    parts[i : i + 2] = ["".join(best)]
    return merges
