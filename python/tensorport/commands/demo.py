"""`tensorport demo`: the whole way from a checkpoint to text, with a small random one."""

import argparse
import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorport.checkpoint import open
from tensorport.convert import convert, verify
from tensorport.reports import human_bytes
from tensorport.synthesize import synthesize

__all__ = ["run"]

_PROMPT = "The first time that people"
_NEW_TOKENS = 24


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        "tensorport demo", description="Synthesize, convert, verify, load and run a small model."
    )
    parser.add_argument("--output", type=Path, help="folder for the demo's files; a new temporary one by default")
    parsed = parser.parse_args(arguments)
    try:
        import jinja2  # noqa: F401, PLC0415 - an extra
        import tokenizers  # noqa: F401, PLC0415 - an extra

        from tensorport.models.language_model import load_model  # noqa: PLC0415 - an extra
    except ImportError as fault:
        raise ImportError("the demo needs JAX and a tokenizer: pip install 'tensorport[jax,text]'") from fault
    folder = parsed.output or Path(tempfile.mkdtemp(prefix="tensorport-demo-"))
    checkpoint, tree = folder / "checkpoint", folder / "converted"

    with _step(f"1. synthesize: a random gpt-oss in {checkpoint}"):
        synthesize(checkpoint, "demo", progress=False)
        print(f"   {open(checkpoint)!r}")
    with _step("2. convert: every tensor to an npy file that JAX maps into memory, MXFP4 kept at 4 bits"):
        report = convert(checkpoint, tree, progress=False)
        print(f"   {report.total_files} files, {human_bytes(report.total_bytes)}")
    with _step("3. verify: every value against the source"):
        verification = verify(tree, checkpoint, progress=False)
        print(f"   {'ok' if verification.ok else verification}")
    if not verification.ok:
        return 1
    with _step("4. load: the converted tree, without a copy where that can be"):
        model = load_model(tree)
        print(f"   {model!r}, {human_bytes(model.report.shared_bytes)} of it shared with the files")
    with _step(f"5. generate: {_NEW_TOKENS} tokens; the weights are random, and so are the words. Compiles first"):
        result = model.generate(_PROMPT, max_new_tokens=_NEW_TOKENS, ignore_eos=True, stats=True)
        print(f"   {_PROMPT + result.text!r}")
        rate = result.stats.tokens_per_s
        print(f"   {'' if rate is None else f'{rate:.0f} tokens/s once compiled, '}", end="")
        print(f"{human_bytes(result.stats.weight_bytes_per_step)} of weights read for each")

    program = sys.argv[0] if Path(sys.argv[0]).name == "tensorport" else "python -m tensorport"
    source, converted = shlex.quote(str(checkpoint)), shlex.quote(str(tree))
    print(f"""
The same in Python ({shlex.quote(sys.executable)}):
  import tensorport
  model = tensorport.load_model({str(tree)!r})
  print(model.generate({_PROMPT!r}, max_new_tokens={_NEW_TOKENS}))

To look around:
  {program} inspect {converted} --stats
  {program} generate --model {converted} --prompt 'Once upon a time' --stats
  {program} chat --model {converted}
  {program} validate --model {converted} --source {source}""")
    return 0


@contextlib.contextmanager
def _step(title: str) -> Iterator[None]:
    print(title, flush=True)
    begin = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - begin:.2f} s", flush=True)
