"""Flags of the commands that run a model, and what they make of them."""

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final

from tensorport.commands.terminal import is_terminal
from tensorport.errors import CheckpointError
from tensorport.source import local_path

if TYPE_CHECKING:
    from tensorport.models import LanguageModel

__all__ = ["COMPILES", "add_model", "add_sampling", "load", "sampling"]

COMPILES: Final = "JAX compiles the model before the first tokens, and again where there are many more."
"""What a person who waits is told; JAX_COMPILATION_CACHE_DIR keeps what was compiled for the next program."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, and the dtype that it computes in."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|HUB_ID",
        help="a checkpoint or a converted tree with its config.json, or org/name[@revision][/subfolder]",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation [default: bfloat16]"
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How tokens are chosen, and how many."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"at most [default: {max_new_tokens}]"
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0: the most likely token each time [default: 1]"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the most likely tokens that together have probability P"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: tokens that were there are rarer"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws [default: 0]")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text, besides the model's own ends; repeatable"
    )


def sampling(parsed: argparse.Namespace) -> dict[str, Any]:
    """What :meth:`LanguageModel.generate` and :meth:`LanguageModel.chat` call these flags."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
    return {name: getattr(parsed, name) for name in names}


def load(parsed: argparse.Namespace, *, text: bool) -> "LanguageModel":
    """The model; `text` if it has to have a tokenizer, for which it is refused before gigabytes are read."""
    from tensorport.models.language_model import load_model, read_config  # noqa: PLC0415 - needs JAX

    is_shown = is_terminal(sys.stderr)
    source = local_path(parsed.model, is_shown, name="--model")
    if text:
        from tensorport.text import Tokenizer  # noqa: PLC0415 - as above

        _, config = read_config(source)
        try:
            Tokenizer.from_directory(config.parent)
        except CheckpointError as fault:
            raise CheckpointError(f"{fault} (tensorport generate --prompt-ids)") from fault
    return load_model(source, dtype=parsed.dtype, progress=is_shown)
