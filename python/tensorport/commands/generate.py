"""`tensorport generate`: prompts and what a model makes of them."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensorport.commands.options import COMPILES, add_model, add_sampling, load, sampling
from tensorport.commands.terminal import encodable, is_terminal, note, visible

if TYPE_CHECKING:
    from tensorport.models import Generation, LanguageModel

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        "tensorport generate",
        description="Continue prompts. What is new goes to standard output, all else to standard error.",
    )
    add_model(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a text to continue; - reads standard input; repeatable"
    )
    parser.add_argument(
        "--prompt-ids",
        action="append",
        type=_ids,
        metavar="1,2,3",
        help="token ids to continue, which needs no tokenizer; prints ids; repeatable",
    )
    add_sampling(parser, max_new_tokens=128)
    parser.add_argument("--stream", action="store_true", help="print what is new as it comes; for one prompt")
    parser.add_argument("--stats", action="store_true", help="say how long it took")
    parser.add_argument(
        "--logprobs", action="store_true", help="print a line for each token: log probability, id, text"
    )
    parser.add_argument(
        "--json", action="store_true", help="print ids, text, logprobs, finish_reason and stats as JSON"
    )
    parsed = parser.parse_args(arguments)
    if bool(parsed.prompt) == bool(parsed.prompt_ids):
        parser.error("expected --prompt or --prompt-ids, and not both")
    prompts: list[Any] = _texts(parser, parsed.prompt) if parsed.prompt else parsed.prompt_ids
    if parsed.stream and (len(prompts) > 1 or parsed.json):
        parser.error("--stream: expected one prompt, and no --json")

    model = load(parsed, text=parsed.prompt is not None or parsed.stop is not None)
    from tensorport.models.generation import TextGeneration  # noqa: PLC0415 - needs JAX

    if is_terminal(sys.stderr):
        note(COMPILES)
    generation = TextGeneration(model, prompts if len(prompts) > 1 else prompts[0], **sampling(parsed))
    is_first = True
    for ids, texts in generation.steps():
        if parsed.stream:
            separator = "" if is_first or not ids[0] else ","
            _write(texts[0] if parsed.prompt else separator + _joined(ids[0]))
            is_first = False
    result = generation.result()
    if parsed.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        _show(parsed, model, prompts, result)
    if parsed.stats:
        note(f"{model.report!r}\n{result.stats!r}")
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers with commas between them") from None


def _texts(parser: argparse.ArgumentParser, prompts: list[str]) -> list[str]:
    """The prompts, with standard input in place of a `-`, without the newline at its end that `echo` puts there."""
    if prompts.count("-") > 1:
        parser.error("--prompt -: standard input can be read once")
    if "-" in prompts and sys.stdin is None:
        parser.error("--prompt -: standard input is closed")
    return [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]


def _show(parsed: argparse.Namespace, model: "LanguageModel", prompts: list[Any], result: "Generation") -> None:
    """Prints a result for people: of several prompts each behind a line that names it."""
    is_one = len(prompts) == 1
    new = result.text if parsed.prompt else result.ids
    for number, prompt in enumerate(prompts):
        ids, logprobs = (result.ids, result.logprobs) if is_one else (result.ids[number], result.logprobs[number])
        if not is_one:
            shown = " ".join(prompt.split()) if parsed.prompt else _joined(prompt)
            _write(f"[{number + 1}] {shown if len(shown) <= 70 else shown[:69] + '…'}\n")
        if not parsed.stream:
            own = new if is_one else new[number]
            _write(own if parsed.prompt else _joined(own))
        _write("\n")
        if parsed.logprobs:
            tokenizer = model.tokenizer if parsed.prompt else None
            for token, logprob in zip(ids, logprobs, strict=True):
                text = "" if tokenizer is None else f"  {tokenizer.decode([token], skip_special_tokens=False)!r}"
                _write(f"{logprob:10.4f}  {token}{text}\n")


def _joined(ids: Sequence[int]) -> str:
    """Ids as `--prompt-ids` reads them."""
    return ",".join(map(str, ids))


def _write(text: str) -> None:
    """Writes a part of a result: what drives a terminal is spelled out on one, and left as it is for programs."""
    if sys.stdout is not None:
        text = visible(text) if is_terminal(sys.stdout) else text
        print(encodable(text, sys.stdout), end="", flush=True)
